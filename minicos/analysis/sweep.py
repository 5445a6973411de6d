"""The same measurement under several settings: boundaries of the experts, frame counts (App. B),
few steps or other weights (App. C).

A setting is a model under a preset. The measurement is that of `noise`: how fast the clean estimate
converges (D of each step's estimate to the last one, in units of another seed), and how sensitive
the run is to noise at one step. Peaks are compared on the same resamples of the same cases, so
their difference has its own interval.

- boundary: the paper's sensitivity peaks at steps 20-30 of 50. With 50 steps the experts change at
  step 21 under its tools' boundary of 0.875, and at step 18 under the 0.8997 that VBVR was trained
  with. A peak that follows the boundary belongs to the experts. A flat curve has no clear peak (its
  interval is wide), so D is also compared separately at the steps that the two settings give to
  different experts, and at those that they give to the same expert.
- frames: counts that a model was not trained on are out of distribution; look at its success first.
- distilled: steps are not a common axis between 4 and 50 of them. The noise level is one, and the
  fraction of the run is another.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from minicos.analysis.noise import study as noise_study
from minicos.analysis.noise.measure import Measured, measure_all, ticks
from minicos.analysis.noise.study import peak, sensitivity
from minicos.analysis.options import FramesOptions, NoiseOptions, SweepOptions
from minicos.analysis.outline import Outline
from minicos.analysis.result import Cell, Curve, Interval, Number, Result, write
from minicos.analysis.tools import cases, figures, stats
from minicos.errors import MinicosError
from minicos.runs import Progress, Run
from minicos.video_model import VideoModel

M = TypeVar("M", bound=Outline)
SETTLED = 0.1  # D of an estimate to the last one below which it counts as settled
LABELS = {  # axes: of what is noised, and of what is estimated
    "step": ("step that is noised", "step"),
    "sigma": ("sigma of the noised step", "sigma on entering"),
    "share": ("share of the run before the noised step", "share of the run"),
}


@dataclass(frozen=True)
class Setting(Generic[M]):
    """One model under one preset, with its own edits: runs of 20 and of 4 steps are not noised at
    the same steps.
    """

    wan: M
    options: NoiseOptions


def check(wan: Outline, options: NoiseOptions) -> None:
    """Raise MinicosError for settings that the model cannot run, before anything runs."""
    for setting in settings(wan, options).values():
        noise_study.check(setting.wan, setting.options)


def study(wan: VideoModel, run: Run, options: NoiseOptions) -> Result:
    """Sweep the boundaries of `NoiseOptions`, or the counts of `FramesOptions` and
    `DistilledOptions`.
    """
    return compare(settings(wan, options), run, options)


def settings(wan: M, options: NoiseOptions) -> dict[str, Setting[M]]:
    """The settings that the options ask for. Raises MinicosError for boundaries of a model with one
    expert.
    """
    if isinstance(options, FramesOptions):
        at = spread(options.points, wan.preset.steps)
        return {
            f"{count} frames": Setting(wan.with_preset(frames=count), replace(options, at=at))
            for count in options.counts
        }
    if isinstance(options, SweepOptions):
        return {
            f"{count} steps": few(wan.with_preset(steps=count), options) for count in options.counts
        }
    if len(wan.experts) < 2:
        raise MinicosError(f"--boundaries lie between two experts, and {wan.variant} has one here.")
    return {f"{b:g}": Setting(wan.with_preset(boundary=b), options) for b in options.boundaries}


def few(wan: M, options: SweepOptions) -> Setting[M]:
    """A setting with another number of steps."""
    return Setting(wan, replace(options, at=spread(options.points, wan.preset.steps)))


def spread(points: int, steps: int) -> tuple[int, ...]:
    """Steps spread evenly over a run, including the first but not the last."""
    points = min(points, steps)
    return tuple(sorted({i * steps // points for i in range(points)}))


def compare(chosen: Mapping[str, Setting[VideoModel]], run: Run, options: NoiseOptions) -> Result:
    """Study every setting in its own folder, with its pictures and numbers; then compare them."""
    what, axis = "boundary", "step"
    if isinstance(options, SweepOptions):
        frames = isinstance(options, FramesOptions)
        what, axis = ("frames", "share") if frames else ("distilled", "sigma")
    some, found = cases.chosen(options), {}
    batches = len(cases.batches(some))
    parts = sum(ticks(setting.wan, setting.options) for setting in chosen.values())
    bar = Progress(batches * parts, what)
    for name, setting in chosen.items():
        inside = run.inside(re.sub(r"[^\w.]+", "_", name))
        found[name] = measure_all(setting.wan, some, inside, setting.options, bar=bar)
        noise_study.report(setting.wan, inside, setting.options, found[name])
    curves = _curves(found, axis, options.mode)
    files = _draw(found, curves, axis, run)
    return write(
        run, Result(what, run.settings, numbers(found), {"settings": rows(found)}, curves, files)
    )


def settled(estimates: np.ndarray) -> np.ndarray:
    """For each case, the fraction of the run after which D of the estimate to the last (n N) stays
    within SETTLED: n, 0 to 1.
    """
    return stats.settled(estimates > SETTLED) / estimates.shape[1]


def rows(found: Mapping[str, Measured]) -> list[dict[str, Cell]]:
    """A row for each setting; shifts of the peak are relative to the first one."""
    first = next(iter(found.values()))
    top_first, peaks_first = peak(sensitivity(first), first.noised)
    out = []
    for name, measured in found.items():
        steps, values = measured.noised, sensitivity(measured)
        top, peaks = peak(values, steps)
        low, high = np.percentile(peaks - peaks_first, [2.5, 97.5])
        solved = measured.runs["clean"]["solved"] if measured.puzzles else None
        row: dict[str, Cell] = {
            "setting": name,
            "steps": len(measured.sigmas) - 1,
            "boundary at step": measured.boundary,
            "solved": None if solved is None else stats.average(solved),
            "settled after": stats.average(settled(measured.estimates)),
            "peak at step": top,
            "against the first": Interval(
                top.value - top_first.value, float(low), float(high), top.n
            ),
            "D at the peak": stats.average(values[:, list(steps).index(top.value)]),
        }
        out.append(row)
    return out


def numbers(found: Mapping[str, Measured]) -> list[Number]:
    """D at the noised steps: each setting minus the first, if both are noised at the same steps of
    one schedule.

    Separate for the steps that the two give to different experts and for those with the same one.
    """
    (name_first, first), *others = found.items()
    out = []
    for name, measured in others:
        steps = measured.noised
        if measured.sigmas != first.sigmas or not np.array_equal(steps, first.noised):
            continue
        ends = sorted(
            len(m.sigmas) if m.boundary is None else m.boundary for m in (measured, first)
        )
        changed = (steps >= ends[0]) & (steps < ends[1])
        for which, chosen in (("another expert", changed), ("the same expert", ~changed)):
            if not chosen.any():
                continue
            a, b = (sensitivity(m)[:, chosen].mean(1) for m in (measured, first))
            at = ", ".join(map(str, steps[chosen]))
            title = f"D, noise at steps {at} (served by {which}): {name} minus {name_first}"
            out.append(stats.difference(title, a, b, name_first, "D"))
    return out


def _curves(found: Mapping[str, Measured], axis: str, mode: str) -> list[Curve]:
    """Sensitivity of every setting, then convergence of every setting."""
    noised, label = LABELS[axis]
    damage, settling = [], []
    for name, measured in found.items():
        at = _place(measured, measured.noised, axis)
        damage.append(stats.curve(name, sensitivity(measured), at, f"{noised} ({mode})", "D"))
        everywhere = _place(measured, np.arange(len(measured.sigmas) - 1), axis)
        settling.append(
            stats.curve(name, measured.estimates, everywhere, label, "D to the last estimate")
        )
    return [*damage, *settling]


def _place(measured: Measured, steps: np.ndarray, axis: str) -> np.ndarray:
    """The positions of steps on an axis that all settings share."""
    if axis == "sigma":
        return np.array(measured.sigmas)[steps]
    return steps / (len(measured.sigmas) - 1) if axis == "share" else steps


def _draw(found: Mapping[str, Measured], curves: list[Curve], axis: str, run: Run) -> list[str]:
    """Sensitivity and convergence of all settings in two figures."""
    marks = {
        name: float(_place(measured, np.array([measured.boundary]), axis)[0])
        for name, measured in found.items()
        if measured.boundary is not None
    }
    figures.lines(
        run.path("sensitivity.png"),
        curves[: len(found)],
        y="D of the video",
        title="Sensitivity to noise at one step (dashed: the experts change)",
        marks=marks,
        levels={"another seed": 1.0},
        log=True,
        falling=axis == "sigma",
    )
    figures.lines(
        run.path("convergence.png"),
        curves[len(found) :],
        y="D of the estimate to the last one",
        title="Convergence of the clean estimate",
        marks=marks,
        log=True,
        falling=axis == "sigma",
    )
    return ["sensitivity.png", "convergence.png"]
