"""How many denoising steps does an answer take, and what do other video lengths do? (paper, Secs 3
and 6, App. B and C, in miniature)

The share of puzzles solved over step counts and frame counts, from the same noise. A single step
returns the first clean estimate, which is a mixture if there is a choice. An ideal observer fails
there too, so in puzzles with several right answers only the network's gain beyond the observer
counts (`--ideal`). With one right answer, an ideal observer needs one step. If steps are steps of
reasoning, puzzles with longer chains of dependent facts gain more from them than similar puzzles
with short chains (`--against`). The gain is the slope of the share solved over log2 of the steps,
for each puzzle by least squares. Frame counts that a model was not trained on are out of
distribution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.options import CountsOptions
from minicos.analysis.outline import Outline
from minicos.analysis.result import Number, Result, Row, write
from minicos.analysis.tools import cases, figures, observer, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.observer import NETWORK
from minicos.condition import check_frames
from minicos.runs import Progress, Run
from minicos.schedule import make
from minicos.video_model import VideoModel

SLOPE = "solved more at twice the steps"  # as a share of the puzzles


def ladder(wan: VideoModel, batch: Sequence[Case], counts: Sequence[int]) -> dict[str, Tensor]:
    """Each puzzle at each number of steps: whether it is solved (0 or 1), and its graded score,
    each b counts.
    """
    condition = cases.condition(wan, batch)
    noise = cases.noise(wan, condition, batch)
    found = []
    for count in counts:
        *_, last = wan.with_preset(steps=count).sample(condition, noise=noise)
        found.append(cases.scores(wan, last.next, batch))
    verdicts = [*zip(*found, strict=True)]
    return {
        "solved": torch.tensor([[float(v.solved) for v in row] for row in verdicts]),
        "score": torch.tensor([[v.score for v in row] for row in verdicts]),
    }


def slopes(solved: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The gain from doubling the steps, for each puzzle (n counts): n, by least squares; NaN for a
    single count.
    """
    doublings = np.log2(np.array(counts, dtype=np.float64))
    apart = doublings - doublings.mean()
    with np.errstate(invalid="ignore"):
        return solved @ (apart / np.square(apart).sum())


def steepest(counts: Sequence[int]) -> float | None:
    """The largest possible slope of a puzzle: the length of the scale. None for one count."""
    if len(counts) < 2:
        return None
    jumps = np.tri(len(counts), dtype=np.float64)[:, ::-1]  # solved from one of the counts upwards
    return float(slopes(jumps, counts).max())


def check(model: Outline, options: CountsOptions) -> None:
    """Raise MinicosError for numbers of steps or frames that cannot be sampled."""
    for count in options.counts:
        make(model.preset.solver, count, model.preset.shift)
    for frames in options.lengths:
        check_frames(frames, model.stride[0])


def study(wan: VideoModel, run: Run, options: CountsOptions) -> Result:
    """The share solved at every count, compared with an ideal observer and with other families on
    request.
    """
    counts = sorted(options.counts)
    chosen = {"": cases.chosen(options)}
    if options.against is not None:
        chosen[options.against] = cases.chosen(replace(options, puzzle=options.against))
    models = observer.models(wan, options)
    work = {name: cases.batches(some) for name, some in chosen.items()}
    lengths = {f"{f} frames": wan.with_preset(frames=f) for f in options.lengths}
    batches = len(models) * sum(map(len, work.values())) + len(lengths) * len(work[""])
    with Progress(batches, "counts") as bar:
        compute = partial(ladder, counts=counts)
        kept = {
            name: cases.collect_each(run, folder, models, work[name], compute, bar)
            for name, folder in zip(work, ("steps", "against"), strict=False)
        }
        other = {
            name: cases.collect(
                run,
                name.replace(" ", "_"),
                work[""],
                partial(ladder, model, counts=counts[-1:]),
                bar,
            )["solved"][:, 0]
            for name, model in lengths.items()
        }
    found = {(who, name): kept[name][who] for who in models for name in work}
    solved = {who: found[who, ""]["solved"] for who in models}
    most = f"{counts[-1]} steps"
    made = numbers(solved, counts, other)
    if options.against is not None:
        ours, theirs = (found[NETWORK, name]["solved"] for name in chosen)
        made.append(against(ours, theirs, counts, options.against))
    rates = {
        f"{who}, {k} steps": v[:, i] for who, v in solved.items() for i, k in enumerate(counts)
    }
    figures.intervals(
        run.path("counts.png"),
        {name: stats.average(values) for name, values in (rates | other).items()},
        x="share of puzzles solved",
        title=f"{len(chosen[''])} puzzles of {options.puzzle}, {most} unless said",
    )
    rows = [row for (who, name), kept in found.items() for row in _rows(options, who, name, kept)]
    return write(
        run, Result("counts", run.settings, made, {"families": rows}, files=["counts.png"])
    )


def numbers(
    solved: Mapping[str, np.ndarray], counts: Sequence[int], other: Mapping[str, np.ndarray]
) -> list[Number]:
    """The share solved (n counts, for each model) at the largest step count; fewer steps and other
    lengths compared with that; and the gain from doubling the steps.
    """
    plain, most = solved[NETWORK][:, -1], f"{counts[-1]} steps"
    fewer = {f"{k} steps": solved[NETWORK][:, i] for i, k in enumerate(counts[:-1])}
    gained = {who: slopes(values, counts) for who, values in solved.items()}
    return [
        stats.mean(f"puzzles solved: {most}", plain, unit="share"),
        *(
            stats.difference(f"puzzles solved: {name} minus {most}", values, plain, most, "share")
            for name, values in (*reversed(fewer.items()), *other.items())
        ),
        *stats.compared(SLOPE, gained, "0: steps add nothing", "share", steepest(counts)),
    ]


def against(ours: np.ndarray, theirs: np.ndarray, counts: Sequence[int], name: str) -> Number:
    """The gain from doubling the steps, minus that of the puzzles with short chains (n counts)."""
    title = f"{SLOPE}: longer chains minus their twins"
    arms = slopes(ours, counts), slopes(theirs, counts)
    return stats.between(title, *arms, name, "share", steepest(counts))


def _rows(
    options: CountsOptions, who: str, other: str, found: Mapping[str, np.ndarray]
) -> list[Row]:
    """One row for each family and model, one column for each number of steps."""
    rows: list[Row] = []
    start = 0
    for name, n in cases.families(replace(options, puzzle=other or options.puzzle)).items():
        part = {key: values[start : start + n] for key, values in found.items()}
        start += n
        rates = {
            f"{k} steps": stats.average(part["solved"][:, i])
            for i, k in enumerate(sorted(options.counts))
        }
        score = float(part["score"][:, -1].mean())
        rows.append({"family": name, "model": who, **rates, "score at the most": score})
    return rows
