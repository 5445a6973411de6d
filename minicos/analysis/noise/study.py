"""Is a step fragile and a frame robust? Noise at steps and in frames, measured on many cases
(paper, Sec. 3.2 and Fig. 3).

Sensitivity at step s is D of the video after noise at s. The peak is the step where its mean over
cases is largest; its interval is that of the peaks of resampled cases. Step and frame noise are
compared by a paired difference: for each case, the mean over the noised steps minus the mean over
the noised frames. Scores are differences to the clean run of the same cases.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from minicos.analysis.noise import pictures
from minicos.analysis.noise.measure import Measured, edits, measure_all
from minicos.analysis.options import NoiseOptions
from minicos.analysis.outline import Outline
from minicos.analysis.result import Cell, Curve, Interval, Number, Result, write
from minicos.analysis.tools import cases, stats
from minicos.analysis.tools.observer import IDEAL, NETWORK, Observer
from minicos.errors import MinicosError
from minicos.runs import Run
from minicos.video_model import VideoModel

FRAMES = (("right frames", "all"), ("of those untouched", "untouched"), ("of the answer", "answer"))


def check(wan: Outline, options: NoiseOptions) -> None:
    """Raise MinicosError for steps, frames and layers that the run does not have, before anything
    runs.
    """
    layers = wan.depth
    if options.layer is not None and not 0 <= options.layer < layers:
        raise MinicosError(f"--layer {options.layer}: the model has blocks 0 to {layers - 1}")
    edits(options, wan.preset.steps, [False] * wan.latent_frames(wan.preset.frames))


def study(wan: VideoModel, run: Run, options: NoiseOptions) -> Result:
    """Noise at the steps and in the frames of `options`: numbers, the table of all edits,
    sensitivity over steps, pictures.
    """
    chosen = cases.chosen(options)
    measured = measure_all(wan, chosen, run, options)
    ideal = None
    if options.ideal:
        alone = replace(options, layer=None)
        ideal = measure_all(Observer.of(wan), chosen, run.inside("ideal"), alone)
    return report(wan, run, options, measured, ideal)


def report(
    wan: VideoModel,
    run: Run,
    options: NoiseOptions,
    measured: Measured,
    ideal: Measured | None = None,
) -> Result:
    """Turn measurements into a result, saved in `run` with its pictures."""
    drawn = curves(measured, options.mode)
    return write(
        run,
        Result(
            "noise",
            run.settings,
            numbers(measured, ideal),
            {"edits": [_row(measured, name) for name in measured.edits]},
            drawn,
            pictures.draw(measured, drawn, options, wan, run),
        ),
    )


def effects(measured: Measured) -> dict[str, tuple[np.ndarray, str, str]]:
    """The difference between noise at steps and noise in frames, and between early and late steps:
    for each puzzle, with its control and unit.
    """
    steps, frames = measured.names("step"), measured.names("frame")
    pictured = {f"frame {f}" for f in measured.pictured}
    later = [name for name in frames if name not in pictured]
    found: dict[str, tuple[np.ndarray, str, str]] = {}

    def against(name: str, per_case: Callable[[str], np.ndarray], unit: str) -> None:
        a, b = (np.mean([per_case(e) for e in kind], axis=0) for kind in (steps, frames))
        found[f"{name}: step noise minus frame noise"] = (a - b, "noise in a frame", unit)
        if later and later != frames:
            c = np.mean([per_case(e) for e in later], axis=0)
            title = f"{name}: step noise minus noise in a frame that was not given"
            found[title] = (a - c, "the given frame is an input at every step", unit)

    if steps and frames:
        against("D of the video", measured.final, "D")
        if measured.puzzles:
            runs = measured.runs
            against("puzzles not solved", lambda e: 1.0 - runs[e]["solved"], "share")
            against("frames not right", lambda e: 1.0 - runs[e]["right"].mean(1), "share")
    if len(steps) > 1:
        damage, at = sensitivity(measured), measured.noised
        title = f"D of the video: noise at step {at[0]} minus step {at[-1]}"
        found[title] = (damage[:, 0] - damage[:, -1], f"step {at[-1]}", "D")
    return found


def numbers(measured: Measured, ideal: Measured | None = None) -> list[Number]:
    """The findings: step noise against frame noise, early against late, both also against an ideal
    observer if measured; the units, the peak, and the cost.
    """
    steps, frames = measured.names("step"), measured.names("frame")
    theirs = {} if ideal is None else effects(ideal)
    found = []
    for name, (values, note, unit) in effects(measured).items():
        arms = {NETWORK: values} | ({IDEAL: theirs[name][0]} if theirs else {})
        found += stats.compared(name, arms, note, unit)
    if steps and frames:
        doses = [np.mean([measured.dose(e) for e in kind], axis=0) for kind in (steps, frames)]
        title, unit = "dose: step noise minus frame noise", "latent frames"
        found.append(stats.difference(title, doses[0], doses[1], "noise in a frame", unit))
        others = [d for e in frames if (d := measured.untouched(e)) is not None]
        if others:
            title, note = "D of the frames that frame noise left alone", "0: frames are independent"
            found.append(stats.mean(title, np.mean(others, axis=0), note, "D"))
    if steps:
        top, _ = peak(sensitivity(measured), measured.noised)
        hand = measured.boundary
        note = "" if hand is None else f"the experts change at step {hand}"
        title = "step whose noise changes the video most"
        found.append(Number.of(title, top, unit="step", note=note))
    null, other = (float(measured.final(name).max()) for name in ("null", "seed 1"))
    note = "exactly 0 under Euler"
    found.append(Number("largest D of the null intervention", null, unit="D", note=note))
    note = "1 by definition, mean over all seeds"
    found.append(Number("largest D of another seed", other, unit="D", note=note))
    if measured.puzzles:
        solved = measured.runs["clean"]["solved"].astype(float)
        found.append(stats.mean("puzzles solved without noise", solved, unit="share"))
    spent, full = measured.passes()
    if full:
        note = f"{spent} passes of {full}"
        title = "network passes of the steps' sweep, of as many full runs"
        found.append(Number(title, spent / full, note=note))
    return found


def _row(measured: Measured, name: str) -> dict[str, Cell]:
    """The table row of one edit over all cases; scores are differences to the clean run."""
    ours, clean = measured.runs[name], measured.runs["clean"]
    untouched = measured.untouched(name)
    row: dict[str, Cell] = {
        "edit": name,
        "dose": float(measured.dose(name).mean()),
        "D": stats.average(measured.final(name)),
        "D untouched": None if untouched is None else stats.average(untouched),
        "1 - CKA": stats.average(ours["cka"][:, -1]),
        "1 - CKA hidden": stats.average(ours["hidden"][:, -1]) if "hidden" in ours else None,
    }
    if not measured.puzzles:
        return row
    row["solved"] = stats.paired(ours["solved"], clean["solved"])
    for key, which in FRAMES:
        if (shown := measured.shown(name, which)).any():
            arms = (runs["right"][:, shown].mean(1) for runs in (ours, clean))
            row[key] = stats.paired(*arms)
    if (before := clean["solved"]).any():  # of the cases solved clean
        same = ours["answer"] == clean["answer"]
        row["same answer"] = float((ours["solved"] & same)[before].mean())
        row["another"] = float((ours["solved"] & ~same)[before].mean())
    return row


# -- curves over the steps that were noised --------------------------------------------------------


def sensitivity(measured: Measured, measure: str = "D") -> np.ndarray:
    """Damage by noise at each noised step: n steps. "D" and "cka" are of the video; "solved" and
    "right" are what the clean run has more of.
    """
    clean, names = measured.runs["clean"], measured.names("step")
    if measure == "D":
        return np.stack([measured.final(name) for name in names], axis=1)
    if measure == "cka":
        return np.stack([measured.runs[name]["cka"][:, -1] for name in names], axis=1)
    lost = [clean[measure].astype(float) - measured.runs[name][measure] for name in names]
    values = np.stack(lost, axis=1)
    return values.mean(2) if measure == "right" else values  # right: n steps F


def curves(measured: Measured, mode: str) -> list[Curve]:
    """Sensitivity over the noised steps in each measure: D and 1 - CKA, and for puzzles also the
    loss of score.
    """
    names = {"D": "D", "1 - CKA": "cka"} if measured.names("step") else {}
    if names and measured.puzzles:
        names |= {"not solved": "solved", "wrong frames": "right"}
    label = f"step that is noised ({mode})"
    return [
        stats.curve(name, sensitivity(measured, key), measured.noised, label)
        for name, key in names.items()
    ]


def peak(values: np.ndarray, steps: np.ndarray) -> tuple[Interval, np.ndarray]:
    """The step with the largest mean (values: n steps), with the interval of resampled peaks, which
    extends at least to the neighbouring noised steps; and those peaks.
    """
    peaks = steps[(stats.resampled(len(values)) @ values).argmax(1)]
    low, high = np.percentile(peaks, [2.5, 97.5])
    best = int(values.mean(0).argmax())
    top = float(steps[best])
    if len(steps) > 1:  # nothing is known between noised steps
        low = min(low, steps[max(best - 1, 0)])
        high = max(high, steps[min(best + 1, len(steps) - 1)])
    return Interval(top, float(low), float(high), len(values)), peaks
