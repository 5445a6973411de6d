"""Evaluate the embedded model on held-out puzzles of every family.

    python -m minicos.tiny.evaluate [--json FILE]
    python -m minicos.tiny.evaluate --card scores.json     the table of the model card, from a FILE

Puzzles come from the test split, which no training stage has used (a hash of the picture decides).
Every video is sampled with the model's default preset, 20 Euler steps at guidance 1 (distilled: 4),
and scored from its pixels alone. For each family the report has:

    category, domain      its category; "in" if the model is trained on it, else "out"
    score, solved         mean graded score of its videos; share of them with the strict verdict
    truth, static, noise  mean score of drawn answers, of the static first frame, of noise
    oracle                share of drawn answers with the verdict after encoding and decoding
    n                     number of puzzles

and `vae_psnr_db`, `in_domain` and `out_of_domain` (mean scores over families), and `variants`, the
same for every variant in the package, with a fifth as many puzzles.
"""

import argparse
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minicos import puzzles
from minicos.errors import MinicosError
from minicos.media import to_float, to_uint8
from minicos.open import load
from minicos.puzzles import Family, Puzzle
from minicos.runs import progress, read_json, write_json
from minicos.wan import Wan
from minicos.weights import layouts

BATCH = 25
Report = dict[str, Any]


def batches(family: Family, n: int, split: str) -> Iterator[list[Puzzle]]:
    """n distinct puzzles, BATCH at a time."""
    chosen = family.distinct(n, split)
    for start in range(0, n, BATCH):
        yield chosen[start : start + BATCH]


def solve(wan: Wan, batch: Sequence[Puzzle], seed: int) -> np.ndarray:
    """One video for each puzzle, all of one size and length: uint8 (n f h w 3)."""
    images = torch.stack(
        [torch.from_numpy(p.first_frame()).permute(2, 0, 1).float() / 255 for p in batch]
    )
    condition = wan.condition([p.prompt for p in batch], images, frames=batch[0].frames)
    (last,) = deque(wan.sample(condition, seed=seed), maxlen=1)
    with torch.no_grad():
        videos = wan.vae.decode(last.next, chunk=last.next.shape[2])
    return np.stack([to_uint8(video.float()) for video in videos])


@torch.no_grad()
def reconstruct(wan: Wan, puzzles_: Sequence[Puzzle], videos: np.ndarray) -> dict[str, list[float]]:
    """PSNR in dB ("vae_psnr_db") and verdict ("oracle") of videos uint8 (n f h w 3) after encoding
    and decoding."""
    truth = torch.stack([to_float(video) for video in videos]).to(wan.device)
    latents = wan.vae.encode(truth, chunk=12)
    back = wan.vae.decode(latents, chunk=latents.shape[2]).float()
    error = (back - truth).square().mean(dim=(1, 2, 3, 4))
    verdicts = [p.score(to_uint8(video)).solved for p, video in zip(puzzles_, back, strict=True)]
    return {
        "vae_psnr_db": (10 * torch.log10(4 / error)).tolist(),
        "oracle": list(map(float, verdicts)),
    }


def baselines(puzzle: Puzzle, truth: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Scores of the drawn answer, of the static first frame, and of noise."""
    still = np.repeat(puzzle.first_frame()[None], len(truth), axis=0)
    noise = rng.integers(0, 256, truth.shape, dtype=np.uint8)
    videos = {"truth": truth, "static": still, "noise": noise}
    return {name: puzzle.score(video).score for name, video in videos.items()}


def judge(
    wan: Wan, family: Family, n: int, *, split: str = "test", seed: int = 0, vae: bool = True
) -> dict[str, float]:
    """Means over n puzzles: score and solved and, if `vae`, those that need no network: baselines,
    oracle and PSNR."""
    rows: dict[str, list[float]] = {}
    rng = np.random.default_rng(seed)

    def note(found: Mapping[str, Sequence[float]]) -> None:
        for name, values in found.items():
            rows.setdefault(name, []).extend(values)

    for index, batch in enumerate(batches(family, n, split)):
        scores = [
            p.score(video)
            for p, video in zip(batch, solve(wan, batch, seed + BATCH * index), strict=True)
        ]
        note({"score": [s.score for s in scores], "solved": [float(s.solved) for s in scores]})
        if vae:
            drawn = np.stack([p.draw(int(rng.integers(len(p.candidates)))) for p in batch])
            for p, video in zip(batch, drawn, strict=True):
                note({k: [v] for k, v in baselines(p, video, rng).items()})
            note(reconstruct(wan, batch, drawn))
    return {name: round(float(np.mean(values)), 4) for name, values in rows.items()}


def judge_model(
    model: str, family: Family, n: int, preset: str | None = None, **options: Any
) -> dict[str, float]:
    """`judge` in a separate process, which opens the model once."""
    return judge(opened(model, preset), family, n, **options)


def evaluate(
    means: Callable[[Family], Mapping[str, float]],
    n: int,
    families: Sequence[str] | None = None,
    each: Callable[..., Iterable[Mapping[str, float]]] = map,
) -> Report:
    """The report without its variants: every family of `puzzles.FAMILIES`, or those named.

    Args:
        means: the results of `judge` for a family.
        each: `map`, or that of a pool of processes.
    """
    table = [puzzles.family(name) for name in families or puzzles.FAMILIES]
    judged = zip(table, each(means, table), strict=True)
    found: dict[str, dict[str, Any]] = {
        family.name: {"category": family.category, "domain": family.domain, **row, "n": n}
        for family, row in progress(judged, len(table), "evaluate")
    }
    quality = [row.pop("vae_psnr_db") for row in found.values() if "vae_psnr_db" in row]
    return {
        "vae_psnr_db": round(float(np.mean(quality)), 2) if quality else None,
        "families": found,
        "in_domain": mean(found, "in"),
        "out_of_domain": mean(found, "out"),
    }


def mean(found: Mapping[str, Mapping[str, Any]], domain: str, what: str = "score") -> float | None:
    """The mean over the families of one domain; None if there are none."""
    values = [row[what] for row in found.values() if row["domain"] == domain]
    return round(float(np.mean(values)), 4) if values else None


def lines(report: Report) -> Iterator[str]:
    """The report as a table."""
    columns = ("score", "solved", "truth", "static", "noise", "oracle")
    yield f"{'family':18} {'category':15} {'domain':6} " + " ".join(f"{c:>7}" for c in columns)
    for name, row in report["families"].items():
        numbers = " ".join(f"{row[c]:7.3f}" if c in row else f"{'-':>7}" for c in columns)
        yield f"{name:18} {row['category']:15} {row['domain']:6} {numbers}"
    for domain, key in (("in", "in_domain"), ("out", "out_of_domain")):
        solved = mean(report["families"], domain, "solved")
        if solved is not None:
            yield f"{key:41} {report[key]:7.3f} {solved:7.3f}"
    if report["vae_psnr_db"] is not None:
        yield f"VAE, PSNR of drawn answers: {report['vae_psnr_db']} dB"


def card(report: Report) -> Iterator[str]:
    """The report as the Markdown table of the model card: families in domain first, ordered by the
    share solved."""
    columns = ("score", "solved", "static", "noise", "oracle")
    yield "| family | category | domain | n | " + " | ".join(columns) + " |"
    yield "|---" * (4 + len(columns)) + "|"
    rows = sorted(
        report["families"].items(), key=lambda item: (item[1]["domain"] != "in", -item[1]["solved"])
    )
    for name, row in rows:
        numbers = " | ".join(f"{row[c]:.2f}" if c in row else "-" for c in columns)
        yield f"| {name} | {row['category']} | {row['domain']} | {row['n']} | {numbers} |"


def variants_card(report: Report) -> Iterator[str]:
    """Means over families of the embedded model and its variants, as a Markdown table."""
    columns = [(d, what) for d in ("in", "out") for what in ("score", "solved")]
    heads = [f"{what}, {'in' if d == 'in' else 'out of'} domain" for d, what in columns]
    yield "| model | n | " + " | ".join(heads) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    models = {"tiny": report} | {f"tiny:{name}": r for name, r in report["variants"].items()}
    for name, found in models.items():
        rows = found["families"]
        numbers = " | ".join(f"{mean(rows, *column):.2f}" for column in columns)
        counts = ", ".join(map(str, sorted({row["n"] for row in rows.values()})))
        yield f"| `{name}` | {counts} | {numbers} |"


def complete(
    model: str,
    n: int,
    variants: Sequence[str],
    *,
    families: Sequence[str] | None = None,
    vae: bool = True,
    each: Callable[..., Iterable[Mapping[str, float]]] = map,
    **options: Any,
) -> Report:
    """The report of a model, with those of its variants: with a fifth as many puzzles, and
    without what concerns the VAE, which they share."""
    report = evaluate(partial(judge_model, model, n=n, vae=vae, **options), n, families, each)
    report["variants"] = {}
    for name in variants:
        fewer = (n + 4) // 5
        means = partial(judge_model, f"tiny:{name}", n=fewer, vae=False, **options)
        found = evaluate(means, fewer, families, each)
        report["variants"][name] = {k: v for k, v in found.items() if k != "vae_psnr_db"}
    return report


@cache
def opened(model: str, preset: str | None = None) -> Wan:
    """A model with a bfloat16 decoder, five times as fast on a CPU, at 56 dB PSNR from float32, a
    difference far below what a scorer notices."""
    return load(model, preset=preset, decode_dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minicos.tiny.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=50, help="puzzles of each family (default: 50)")
    parser.add_argument("--split", choices=puzzles.SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--preset", help="another way of sampling, such as 4step")
    parser.add_argument("--family", action="append", help="this family alone; may be repeated")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--no-vae", action="store_true", help="leave out baselines, oracle, PSNR")
    parser.add_argument("--json", type=Path, help="write the report here as well")
    parser.add_argument("--card", type=Path, metavar="FILE", help="print a FILE of --json, and end")
    args = parser.parse_args()
    if args.card:
        report = read_json(args.card)
        print("\n".join([*card(report), "", *variants_card(report)]))
        return
    if args.n < 1:
        parser.error(f"--n {args.n}: at least one puzzle of each family")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least one process")
    variants = layouts.embedded_variants() if (args.model, args.preset) == ("tiny", None) else ()
    options = {"split": args.split, "seed": args.seed, "families": args.family}
    options |= {"vae": not args.no_vae, "preset": args.preset}
    spawn = multiprocessing.get_context("spawn")
    try:
        opened(args.model, args.preset)  # what is wrong with it is said before processes start
        if args.workers == 1:
            report = complete(args.model, args.n, variants, **options)
        else:
            threads = (max(1, torch.get_num_threads() // args.workers),)
            with ProcessPoolExecutor(args.workers, spawn, torch.set_num_threads, threads) as pool:
                report = complete(args.model, args.n, variants, each=pool.map, **options)
    except MinicosError as error:
        parser.error(str(error))
    print("\n".join(lines(report)))
    for name, found in report["variants"].items():
        print("\n".join(["", f"tiny:{name}", *lines(found | {"vae_psnr_db": None})]))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
