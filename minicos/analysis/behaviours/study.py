"""Perception before action and working memory: how often, when and where (paper, Sec. 4)?
Self-correction is in `commitment` (completions) and `plant`.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.behaviours import courses
from minicos.analysis.behaviours.memory import EMBED, PLACES, memories
from minicos.analysis.options import BehavioursOptions, Ideal
from minicos.analysis.result import Curve, Number, Result, write
from minicos.analysis.tools import cases, figures, observer, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.readout import readout
from minicos.puzzles.draw import COLOURS, SHAPES
from minicos.runs import Progress, Run
from minicos.video_model import VideoModel

LABELS = {"shape": len(SHAPES), "colour": len(COLOURS)}


def study(wan: VideoModel, run: Run, options: BehavioursOptions) -> Result:
    """When the destination and the route are decided, on held-out puzzles; and, unless --rows is 0,
    what can be read out of the tokens that cover an object.
    """
    at = options.at or tuple(dict.fromkeys((0, wan.preset.steps // 4)))
    models = {kind: _models(wan, kind, options) for kind in courses.KINDS}
    work = {kind: _work(kind, options) for kind in courses.KINDS}
    hidden = _hidden(options)
    batches = sum(len(models[kind]) * len(work[kind]) for kind in work)
    with Progress(batches + sum(map(len, hidden.values())), "behaviours") as bar:
        followed = {
            kind: cases.collect_each(run, kind, models[kind], work[kind], courses.follow, bar)
            for kind in work
        }
        remember = partial(memories, wan, at=at)
        rows = {
            split: cases.collect(run, f"memory_{split}", some, remember, bar)
            for split, some in hidden.items()
        }
    numbers = [number for kind in work for number in _courses(wan, run, kind, followed, options)]
    files = [f"{kind}.png" for kind in work]
    if not rows:
        return write(run, Result("behaviours", run.settings, numbers, files=files))
    train, test = ({k: torch.from_numpy(v) for k, v in rows[split].items()} for split in hidden)
    curves: list[Curve] = []
    for label, (what, classes) in enumerate(LABELS.items()):
        found, drawn = readouts(train, test, label, what, classes, at)
        numbers, curves = numbers + found, curves + drawn
        files.append(f"memory_{what}.png")
        figures.lines(
            run.path(files[-1]),
            drawn,
            y="share read rightly",
            title=f"Can the hidden object's {what} be read from tokens? Learnt from {options.rows} "
            f"puzzles, n = {options.n}",
            levels={f"chance: {1 / classes:.2f}": 1 / classes},
        )
    return write(run, Result("behaviours", run.settings, numbers, curves=curves, files=files))


def _models(wan: VideoModel, kind: str, options: BehavioursOptions) -> dict[str, VideoModel]:
    """Without a choice of routes, an ideal observer has nothing to decide."""
    return observer.models(wan, options if courses.KINDS[kind] == "how" else Ideal())


def _work(kind: str, options: BehavioursOptions) -> list[list[Case]]:
    """The puzzles of one kind."""
    keep = cases.ambiguous if courses.KINDS[kind] == "how" else cases.anything
    return cases.batches(
        cases.held_out(kind, options.n, size=options.size, seed=options.seed, keep=keep)
    )


def _hidden(options: BehavioursOptions) -> dict[str, list[list[Case]]]:
    """Puzzles with an object behind a wall, by split; none where no rows are asked for."""
    counts = {"train": options.rows, "test": options.n} if options.rows else {}
    return {
        split: cases.batches(
            cases.held_out("memory", n, size=options.size, split=split, seed=options.seed)
        )
        for split, n in counts.items()
    }


def _courses(
    wan: VideoModel,
    run: Run,
    kind: str,
    followed: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    options: BehavioursOptions,
) -> list[Number]:
    """When where and how are decided, on the puzzles of one kind."""
    found = followed[kind]
    figures.lines(
        run.path(f"{kind}.png"),
        courses.curves(kind, found, wan.schedule().sigmas),
        y="share decided, of runs that end right",
        title=f"{kind}: when it is decided, n = {options.n}",
        falling=True,
    )
    return courses.numbers(kind, found)


def readouts(
    train: Mapping[str, Tensor],
    test: Mapping[str, Tensor],
    label: int,
    what: str,
    classes: int,
    at: tuple[int, ...],
) -> tuple[list[Number], list[Curve]]:
    """The accuracy of reading the hidden object's labels in every layer of each place, and in the
    best layer compared with its controls.

    The layer is chosen on the training rows alone, by leave-one-out.
    """
    labels, truth = train["labels"][:, label], test["labels"][:, label]
    shuffle = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))

    def right(a: Tensor, b: Tensor, labels: Tensor = labels) -> tuple[np.ndarray, float]:
        read, left_out = readout(a, labels, b, classes)
        return (read == truth).double().numpy(), left_out

    numbers, curves = [], []
    depth = train["states"].shape[2]
    for s, step in enumerate(at):
        for k, place in enumerate(PLACES):
            pairs = [
                (train["states"][:, s, i, k], test["states"][:, s, i, k]) for i in range(depth)
            ]
            layers = [right(a, b) for a, b in pairs]
            best = int(np.argmax([left_out for _, left_out in layers]))
            read = layers[best][0]
            controls = {
                "shuffled labels": right(*pairs[best], labels=labels[shuffle])[0],
                "patch embedding": layers[0][0],
                "drawn video": right(train["drawn"][:, k], test["drawn"][:, k])[0],
            }
            where = f"hidden object's {what} read rightly, {place}, step {step}"
            note = f"layer {best + EMBED}; chance: {1 / classes:.2f}"
            numbers.append(stats.mean(where, read, note, "share"))
            numbers += [
                stats.difference(f"{where}: minus {name}", read, values, name, "share")
                for name, values in controls.items()
            ]
            rates = np.stack([hits for hits, _ in layers], axis=1)
            at_layers, axis = np.arange(depth) + EMBED, "layer (-1: patch embedding)"
            title = f"{what}, {place}, step {step}"
            curves.append(stats.curve(title, rates, at_layers, axis, "share"))
    return numbers, curves
