"""`minicos behaviours`: self-correction, perception before action and working memory, measured on the embedded puzzles."""

import argparse
from typing import TYPE_CHECKING

from minicos.cli import opening, options, run_folder, values

if TYPE_CHECKING:
    import numpy as np

    from minicos.analysis.tools.stats import Interval
    from minicos.runs import Run
    from minicos.wan import Wan

EXAMPLES = """\
  minicos behaviours                                  50 puzzles of each kind, 300 to train the readout
  minicos behaviours --n 100 --rows 500 --at 0,4,8
self-correction: is the leading answer wrong early and right late, beyond what an ideal observer's blur explains?
perception first: does what stands still settle before what moves?
working memory: can the hidden object's shape and colour be read out of the tokens that hide it?
"""
KINDS = (
    "goal",
    "mark",
)  # one picture, several prompts, things that stand still and things that move


def add(verbs) -> None:
    parser = options.add_parser(
        verbs, "behaviours", "Self-correction, perception first, memory.", EXAMPLES, run
    )
    parser.add_argument(
        "--n", type=values.positive, default=50, help="held-out puzzles of each kind (default: 50)"
    )
    parser.add_argument(
        "--size", type=int, choices=(3, 4), default=4, help="cells along a side (default: 4)"
    )
    parser.add_argument(
        "--rows",
        type=values.positive,
        default=300,
        help="training puzzles that teach the readout (default: 300)",
    )
    parser.add_argument(
        "--at", type=values.indices, help="steps of the readout (default: 0, and a quarter of them)"
    )
    options.add_model_options(parser, out="runs/behaviours")


def run(args: argparse.Namespace) -> None:
    wan = opening.load(args)
    at = opening.within(args.at, wan.preset.steps) or (0, wan.preset.steps // 4)
    folder = run_folder.open_run(args, wan, [], n=args.n, size=args.size, rows=args.rows, at=at)
    found = {kind: _courses(wan, folder, kind, args) for kind in KINDS} | {
        "memory": _memory(wan, folder, at, args)
    }
    folder.save_json("behaviours.json", found)
    print(folder.path("memory.png"))


def _courses(wan: "Wan", folder: "Run", kind: str, args: argparse.Namespace) -> dict[str, object]:
    """Self-correction and perception on the puzzles of one kind."""
    import numpy as np

    from minicos.analysis import behaviours
    from minicos.analysis.tools import cases, stats

    chosen = cases.held_out(kind, args.n, size=args.size, seed=args.seed)
    kept = cases.collect(
        folder, kind, cases.batches(chosen, most=5), lambda batch: behaviours.watch(wan, batch)
    )
    finals = [None if final < 0 else int(final) for final in kept["final"]]

    def read(name: str) -> list[behaviours.Course]:
        rows = zip(kept[name], kept["valid"], finals, strict=True)
        return [
            behaviours.Course(tuple(row.tolist()), int(valid), final) for row, valid, final in rows
        ]

    own, ideal = read("leaders"), read("ideal")
    corrected = [course.corrected for course in own]
    late = [step for step in corrected if step is not None]
    shares = {
        "right in the end": [course.final is not None for course in own],
        "corrected: wrong early, right late": [step is not None for step in corrected],
        "... the ideal observer": [course.corrected is not None for course in ideal],
        "wrong at step 0": [0 in course.wrong for course in own],
    }
    out = {name: stats.bootstrap(np.array(values)) for name, values in shares.items()}
    out["corrected, network - ideal observer"] = stats.paired(
        *(np.array(shares[k]) for k in list(shares)[1:3])
    )
    out["step at which the leader settles"] = stats.bootstrap([course.settled for course in own])
    both = kept["settled"][np.isfinite(kept["settled"]).all(1)]
    if len(both):
        out["still things settle at step"] = stats.bootstrap(both[:, 0])
        out["moving things settle at step"] = stats.bootstrap(both[:, 1])
        out["moving - still"] = stats.paired(both[:, 1], both[:, 0])
    print(f"\n{kind}: self-correction and perception (95 % intervals)")
    _tell(out)
    if late:
        print(f"  median step of a correction: {int(np.median(late))}")
    return _plain(out) | {"steps of corrections": late}


def _memory(
    wan: "Wan", folder: "Run", at: tuple[int, ...], args: argparse.Namespace
) -> dict[str, object]:
    """Working memory: readout of shape and colour at every layer, on held-out puzzles."""
    import numpy as np
    import torch

    from minicos.analysis import behaviours
    from minicos.analysis.tools import cases, figures, stats
    from minicos.puzzles.draw import COLOURS, SHAPES

    parts = {}
    for name, split, n in (("train", "train", args.rows), ("test", "test", args.n)):
        chosen = cases.held_out("memory", n, size=args.size, split=split, seed=args.seed)
        work = cases.batches(chosen, most=10)
        kept = cases.collect(
            folder, f"memory_{name}", work, lambda batch: behaviours.memories(wan, batch, at)
        )
        parts[name] = {key: torch.from_numpy(value) for key, value in kept.items()}
    train, test = parts["train"], parts["test"]
    shuffle = torch.from_numpy(np.random.default_rng(0).permutation(args.rows))
    out, lines = {}, {}
    depth = train["states"].shape[2]
    for label, (what, classes) in enumerate((("shape", len(SHAPES)), ("colour", len(COLOURS)))):
        told, truth = train["labels"][:, label], test["labels"][:, label]

        def right(
            a: torch.Tensor, b: torch.Tensor, told=told, truth=truth, classes=classes
        ) -> "tuple[np.ndarray, float]":
            read, promised = behaviours.readout(a, told, b, classes)
            return (read == truth).double().numpy(), promised

        drawn, _ = right(train["drawn"], test["drawn"])
        out[f"{what}, from the drawn video's latent there"] = stats.bootstrap(drawn)
        for s, step in enumerate(at):
            layers = [
                right(train["states"][:, s, k], test["states"][:, s, k]) for k in range(depth)
            ]
            rates = [stats.bootstrap(hits) for hits, _ in layers]
            lines[f"{what}, step {step}"] = (
                np.arange(depth) + behaviours.EMBED,
                np.array([(i.value, i.low, i.high) for i in rates]).T,
            )
            best = int(
                np.argmax([promised for _, promised in layers])
            )  # chosen on the training rows alone
            a, b = train["states"][:, s, best], test["states"][:, s, best]
            wrong, _ = right(a, b, told=told[shuffle])
            where = f"{what}, step {step}, layer {best + behaviours.EMBED}"
            out[where] = rates[best]
            out[f"{where}, shuffled labels"] = stats.bootstrap(wrong)
            out[f"{where} - patch embedding"] = stats.paired(layers[best][0], layers[0][0])
            out[f"{where} - drawn video"] = stats.paired(layers[best][0], drawn)
    figures.bands(
        folder.path("memory.png"),
        lines,
        x="layer (-1: patch embedding)",
        y="share read rightly",
        title=f"What the tokens behind the wall hold: {args.rows} rows to learn from, n = {args.n}",
        levels={
            f"chance, {what}: {1 / len(n):.2f}": 1 / len(n)
            for what, n in (("shape", SHAPES), ("colour", COLOURS))
        },
    )
    print(
        "\nmemory: share of hidden objects read rightly (95 % intervals; the layer is chosen on the training rows)"
    )
    _tell(out)
    return _plain(out)


def _tell(lines: "dict[str, Interval]") -> None:
    for name, interval in lines.items():
        print(f"  {name:48} {interval}")


def _plain(lines: "dict[str, Interval]") -> dict[str, object]:
    from dataclasses import asdict

    return {name: asdict(interval) for name, interval in lines.items()}
