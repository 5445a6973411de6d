"""The same measurement under several settings: hand-over of the experts, frame counts (App. B), few steps or other weights (App. C).

A setting is a model under a preset with its cases; the measurement is `noise_study.study`: how fast the clean estimate converges (D of each
step's estimate to the last one, in units of another seed) and how sensitive the run is to noise at one step. Peaks are compared on
the same resamples of the same cases, so that their difference has an interval of its own.

boundary     The paper's sensitivity peaks at steps 20-30 of 50, and at 50 steps the experts change at step 21 under its tools' 0.875,
             at step 18 under the 0.8997 that VBVR was trained with. A peak that follows the boundary is the hand-over's. A flat curve
             has no peak to follow (its interval is wide), so the steps that two boundaries give to different experts are compared too.
frames       Counts that a model was not trained at are out of distribution; read its success first.
distilled    Steps are no common axis between 4 and 50 of them; the noise level is, and the share of the run is the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minicos.analysis.noise.results import at, curve, draw, peak, sensitivity, to_json
from minicos.analysis.noise.study import Plan, Results, study
from minicos.analysis.tools import figures
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.stats import Interval, bootstrap, paired
from minicos.runs import Run
from minicos.wan import Wan

SETTLED = 0.1  # D of an estimate to the last one, below which it counts as settled


@dataclass(frozen=True)
class Setting:
    """One model under one preset, with its own plan: 20 steps and 4 steps are not noised at the same ones."""

    wan: Wan
    plan: Plan


@dataclass(frozen=True)
class Row:
    """One setting over all cases."""

    name: str
    steps: int
    handover: int | None
    solved: Interval | None
    settled: (
        Interval  # when the estimate comes within SETTLED of the last one, as a share of the run
    )
    peak: Interval  # the noised step that changes the video most
    shift: Interval  # of the peak, against the first setting's
    largest: Interval  # D there
    # mean D, minus the first setting's, for noise at steps that the two give to different experts
    between: Interval | None


def compare(
    settings: Mapping[str, Setting], subjects: Sequence[Case], run: Run, most: int = 25
) -> dict[str, Results]:
    """Study every setting in a folder of its own, with its pictures."""
    found = {}
    for name, setting in settings.items():
        inside = Run(run.path(name), run.settings)
        found[name] = study(setting.wan, subjects, inside, setting.plan, most)
        draw(found[name], setting.wan, inside)
        inside.save_json("results.json", to_json(found[name]))
    return found


def settled(results: Results) -> np.ndarray:
    """For each case, the share of the run after which the estimate stays within SETTLED of the last one: n, 0 to 1."""
    far = results.estimates > SETTLED  # n N
    last = np.where(far.any(1), far.shape[1] - 1 - far[:, ::-1].argmax(1), -1)
    return (last + 1) / far.shape[1]


def rows(found: Mapping[str, Results]) -> list[Row]:
    """Every setting, the first one being what the others are held against."""
    first = next(iter(found.values()))
    top_first, peaks_first = peak(sensitivity(first), at(first))
    out = []
    for name, results in found.items():
        steps, values = at(results), sensitivity(results)
        top, peaks = peak(values, steps)
        low, high = np.percentile(peaks - peaks_first, [2.5, 97.5])
        out.append(
            Row(
                name,
                steps=len(results.sigmas) - 1,
                handover=results.handover,
                solved=bootstrap(results.runs["clean"]["solved"]) if results.puzzles else None,
                settled=bootstrap(settled(results)),
                peak=top,
                shift=Interval(top.value - top_first.value, float(low), float(high), top.n),
                largest=bootstrap(values[:, list(steps).index(top.value)]),
                between=_between(results, first),
            )
        )
    return out


def _between(ours: Results, first: Results) -> Interval | None:
    steps = at(ours)
    if ours.sigmas != first.sigmas or not np.array_equal(steps, at(first)):
        return None
    low, high = sorted(len(r.sigmas) if r.handover is None else r.handover for r in (ours, first))
    chosen = (steps >= low) & (steps < high)
    if not chosen.any():
        return None
    return paired(*(sensitivity(r)[:, chosen].mean(1) for r in (ours, first)))


def table(found: Sequence[Row], x: str) -> str:
    lines = [
        [
            x,
            "steps",
            "hand-over",
            "solved",
            "settled after",
            "peak at step",
            "against the first",
            "D at the peak",
            "D between",
        ]
    ]
    for row in found:
        handover = "-" if row.handover is None else str(row.handover)
        numbers = (row.solved, row.settled, row.peak, row.shift, row.largest, row.between)
        brief = [
            "-" if v is None else f"{v.value:.2f} [{v.low:.2f}, {v.high:.2f}]" for v in numbers
        ]
        lines.append([row.name, str(row.steps), handover, *brief])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def picture(found: Mapping[str, Results], run: Run, axis: str = "step") -> list[str]:
    """Sensitivity and convergence of all settings in two figures, over the step, the noise level ("sigma") or the "share" of the run."""
    place: dict[str, Callable[[Results, np.ndarray], np.ndarray]] = {
        "step": lambda results, steps: steps,
        "sigma": lambda results, steps: 1 - np.array(results.sigmas)[steps],
        "share": lambda results, steps: steps / (len(results.sigmas) - 1),
    }
    label = {"step": "step", "sigma": "1 - sigma on entering", "share": "share of the run"}[axis]
    marks = {
        name: float(place[axis](results, np.array([results.handover]))[0])
        for name, results in found.items()
        if results.handover
    }
    figures.bands(
        run.path("settings.png"),
        {n: curve(sensitivity(r), place[axis](r, at(r))) for n, r in found.items()},
        log=True,
        x=f"{label} that is noised",
        y="D of the video",
        title="Sensitivity to noise at one step (dashed: hand-over)",
        marks=marks,
        levels={"another seed": 1.0},
    )
    everywhere = {n: place[axis](r, np.arange(len(r.sigmas) - 1)) for n, r in found.items()}
    figures.bands(
        run.path("convergence.png"),
        {n: curve(r.estimates, everywhere[n]) for n, r in found.items()},
        log=True,
        x=label,
        y="D of the estimate to the last one",
        title="Convergence of the clean estimate",
        marks=marks,
    )
    return ["settings.png", "convergence.png"]
