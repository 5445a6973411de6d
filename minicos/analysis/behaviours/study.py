"""Perception before action, working memory: how often, when, where (paper, Sec. 4)? Self-correction
is in `commitment` (completions) and `plant`.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.behaviours import courses
from minicos.analysis.behaviours.memory import EMBED, memories
from minicos.analysis.options import BehavioursOptions
from minicos.analysis.result import Curve, Number, Result, write
from minicos.analysis.tools import cases, figures, observer, stats
from minicos.analysis.tools.readout import readout
from minicos.puzzles.draw import COLOURS, SHAPES
from minicos.runs import Run
from minicos.wan import Wan

LABELS = {"shape": len(SHAPES), "colour": len(COLOURS)}


def study(wan: Wan, run: Run, options: BehavioursOptions) -> Result:
    """Where and how are decided, on held-out puzzles; and, unless --rows is 0, what is read out of
    the tokens that hide an object.
    """
    numbers = [number for kind in courses.KINDS for number in _courses(wan, run, kind, options)]
    if not options.rows:
        return write(run, Result("behaviours", run.settings, numbers))
    at = options.at or tuple(dict.fromkeys((0, wan.preset.steps // 4)))
    rows = {
        split: _memories(wan, run, split, n, at, options)
        for split, n in (("train", options.rows), ("test", options.n))
    }
    curves: list[Curve] = []
    for label, (what, classes) in enumerate(LABELS.items()):
        found, drawn = readouts(rows["train"], rows["test"], label, what, classes, at)
        numbers, curves = numbers + found, curves + drawn
    figures.lines(
        run.path("memory.png"),
        curves,
        y="share read rightly",
        title=f"What the tokens behind the wall hold: {options.rows} rows, n = {options.n}",
        levels={f"chance, {what}: {1 / n:.2f}": 1 / n for what, n in LABELS.items()},
    )
    return write(
        run, Result("behaviours", run.settings, numbers, curves=curves, files=["memory.png"])
    )


def _courses(wan: Wan, run: Run, kind: str, options: BehavioursOptions) -> list[Number]:
    """When where and how are decided, on the puzzles of one kind."""
    keep = cases.ambiguous if courses.KINDS[kind] == "how" else cases.anything
    chosen = cases.held_out(kind, options.n, size=options.size, seed=options.seed, keep=keep)
    work = cases.batches(chosen)
    found = {
        who: cases.collect(run, observer.folder(kind, who), work, partial(courses.follow, model))
        for who, model in observer.models(wan, options).items()
    }
    return courses.numbers(kind, found)


def _memories(
    wan: Wan, run: Run, split: str, n: int, at: tuple[int, ...], options: BehavioursOptions
) -> dict[str, Tensor]:
    chosen = cases.held_out("memory", n, size=options.size, split=split, seed=options.seed)
    compute = partial(memories, wan, at=at)
    kept = cases.collect(run, f"memory_{split}", cases.batches(chosen), compute)
    return {key: torch.from_numpy(value) for key, value in kept.items()}


def readouts(
    train: Mapping[str, Tensor],
    test: Mapping[str, Tensor],
    label: int,
    what: str,
    classes: int,
    at: tuple[int, ...],
) -> tuple[list[Number], list[Curve]]:
    """How often a label of the hidden object is read rightly at every layer, and at the best one
    beside its controls.

    The layer is chosen on the training rows alone, each row left out in turn.
    """
    labels, truth = train["labels"][:, label], test["labels"][:, label]
    shuffle = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))

    def right(a: Tensor, b: Tensor, labels: Tensor = labels) -> tuple[np.ndarray, float]:
        read, left_out = readout(a, labels, b, classes)
        return (read == truth).double().numpy(), left_out

    drawn, _ = right(train["drawn"], test["drawn"])
    numbers, curves = [], []
    depth = train["states"].shape[2]
    for s, step in enumerate(at):
        states = [(train["states"][:, s, k], test["states"][:, s, k]) for k in range(depth)]
        layers = [right(a, b) for a, b in states]
        best = int(np.argmax([left_out for _, left_out in layers]))
        read = layers[best][0]
        wrong, _ = right(*states[best], labels=labels[shuffle])
        where = f"hidden object's {what} read rightly, step {step}, layer {best + EMBED}"
        numbers += [
            stats.mean(where, read, f"chance: {1 / classes:.2f}", "share"),
            stats.difference(
                f"{where}: minus shuffled labels", read, wrong, "labels of other objects", "share"
            ),
            stats.difference(
                f"{where}: minus patch embedding",
                read,
                layers[0][0],
                "the same tokens before block 0",
                "share",
            ),
            stats.difference(
                f"{where}: minus drawn video",
                read,
                drawn,
                "latents of the drawn video, same tokens",
                "share",
            ),
        ]
        rates = np.stack([hits for hits, _ in layers], axis=1)
        at_layers = np.arange(depth) + EMBED
        label_x = "layer (-1: patch embedding)"
        curves.append(stats.curve(f"{what}, step {step}", rates, at_layers, label_x, "share"))
    return numbers, curves
