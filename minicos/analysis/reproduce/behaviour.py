"""Self-correction, perception before action, working memory."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis import behaviours
from minicos.analysis.report import Section, difference, mean
from minicos.analysis.reproduce.subjects import groups
from minicos.analysis.tools import cases, figures
from minicos.analysis.tools.cases import Case, held_out
from minicos.puzzles.draw import COLOURS, SHAPES
from minicos.runs import Run
from minicos.wan import Wan


def course(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Corrections and, for still and moving parts, the step at which they settle: each b."""
    condition = cases.condition(wan, batch)
    made = list(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    found = [network for network, _ in behaviours.courses(wan, batch, made)]
    still, moving = [], []
    for k, (case, c) in enumerate(zip(batch, found, strict=True)):
        for out, where in zip(
            (still, moving),
            behaviours.masks(case.puzzle, c.final or 0, wan.vae.cfg.stride),
            strict=True,
        ):
            out.append(
                behaviours.first_below(behaviours.unsettled(made, k, where))
                if where.any()
                else torch.nan
            )
    hypotheses = [
        c.valid + sum(len(p.candidates) for p in case.puzzle.variants())
        for case, c in zip(batch, found, strict=True)
    ]
    return {
        "still": torch.tensor(still, dtype=torch.float64),
        "moving": torch.tensor(moving, dtype=torch.float64),
        "wrong": torch.tensor([float(c.leaders[0] >= c.valid) for c in found]),
        "chance": torch.tensor([1 - c.valid / h for c, h in zip(found, hypotheses, strict=True)]),
        "corrected": torch.tensor([float(c.corrected is not None) for c in found]),
        "changed": torch.tensor([float(c.settled > 0 and c.corrected is None) for c in found]),
        "solved": torch.tensor([float(c.final is not None) for c in found]),
    }


def hidden(wan: Wan, step: int, batch: Sequence[Case]) -> dict[str, Tensor]:
    """At the tokens that hide the object: states of every block at a step (b layer d), the drawn video's latents (b p), labels (b 2)."""
    kept = behaviours.memories(wan, batch, (step,))
    return kept | {"states": kept["states"][:, 0, 1:]}  # without the patch embedding


def behaviour_section(wan: Wan, run: Run, n: int) -> Section:
    goal = cases.collect(run, "goal", groups(held_out("goal", n), 25), partial(course, wan))
    step = wan.preset.steps // 2
    told, test = (
        cases.collect(
            run,
            f"memory_{split}",
            groups(held_out("memory", count, split=split), 25),
            partial(hidden, wan, step),
        )
        for split, count in (("dev", n + n // 2), ("test", n))
    )
    claims = [
        difference(
            "leading hypothesis wrong at step 0: rate minus chance",
            goal["wrong"],
            goal["chance"],
            "a leader drawn at random",
        ),
        mean("wrong early and right late (self-correction): rate", goal["corrected"], "0"),
        difference(
            "step at which it settles: what moves minus what stands still",
            goal["moving"],
            goal["still"],
            "what stands still",
        ),
    ]
    lines, blocks = {}, []
    for i, (name, classes) in enumerate((("shape", len(SHAPES)), ("colour", len(COLOURS)))):
        right = _readouts(told, test, i, classes)
        layer = right["layer"]
        blocks.append(layer)
        lines[name] = right["states"].mean(0)
        read = right["states"][:, layer]
        claims += [
            difference(
                f"hidden object's {name}, read right: minus shuffled labels",
                read,
                right["shuffled"],
                "labels of other objects",
            ),
            difference(
                f"hidden object's {name}, read right: minus drawn picture",
                read,
                right["drawn"],
                "drawn latents, same tokens",
            ),
        ]
    figures.curves(
        run.path("memory.png"),
        lines,
        x="layer",
        y="share read out right",
        title=f"The hidden object at step {step}; chance {1 / len(SHAPES):.2f}, {1 / len(COLOURS):.2f}",
    )
    wrong, corrected, changed, solved = (
        f"{goal[key].mean():.2f}" for key in ("wrong", "corrected", "changed", "solved")
    )
    text = f"""\
Three behaviours that the paper describes (`minicos/analysis/behaviours.py`).

*Self-correction*: mazes with two goals, the leading hypothesis of every step's estimate among the valid routes and those to
the other goal. It is wrong at step 0 in {wrong} of the runs; {corrected} of the runs are wrong early and right late, {changed}
change their mind among valid answers, and {solved} end right.

*Perception before action*: what moves settles {claims[2]} steps after what stands still. That is the easier job and no
wonder, since what stands still need only be copied from the given frame.

*Working memory*: while an object is behind a wall, its shape and colour are read from the hidden states at the tokens that
hide it, by a linear classifier that was told of puzzles of the dev split and is judged on test puzzles; the layer was chosen
on dev as well ({blocks[0]} for shape, {blocks[1]} for colour). Against shuffled labels it reads {claims[3]} (shape) and
{claims[5]} (colour). The latents of a drawn video are the harder control: four video frames share a latent frame, and the
object is in sight in some of them. Against these: {claims[4]} and {claims[6]}."""
    return Section(
        "Self-correction, perception before action, working memory",
        text,
        tuple(claims),
        ("memory.png",),
    )


def _readouts(
    told: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], label: int, classes: int
) -> dict:
    """Which test objects are read out right: from the states of each layer (n layer), with shuffled labels and from drawn latents (n)."""
    told, test = ({k: torch.from_numpy(v) for k, v in data.items()} for data in (told, test))
    y, truth = told["labels"][:, label], test["labels"][:, label]
    half = len(y) // 2

    def right(x: Tensor, y: Tensor, other: Tensor, truth: Tensor) -> np.ndarray:
        return (behaviours.readout(x, y, other, classes)[0] == truth).double().numpy()

    depth, a = told["states"].shape[1], told["states"]
    folds = [
        right(a[:half, k], y[:half], a[half:, k], y[half:]).mean()
        + right(a[half:, k], y[half:], a[:half, k], y[:half]).mean()
        for k in range(depth)
    ]
    layer = int(np.argmax(folds))
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    return {
        "layer": layer,
        "states": np.stack(
            [right(a[:, k], y, test["states"][:, k], truth) for k in range(depth)], axis=1
        ),
        "shuffled": right(a[:, layer], shuffled, test["states"][:, layer], truth),
        "drawn": right(told["drawn"], y, test["drawn"], truth),
    }
