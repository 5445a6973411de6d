"""Is a step fragile and a frame robust? Noise at steps and in frames, measured on many cases
(paper, Sec. 3.2 and Fig. 3).

Sensitivity at step s is D of the video after noise at s. Its peak is the step where the mean over
cases is largest; the interval is that of the peaks of resampled cases. Step against frame noise is
a paired difference: for each case, the mean over the noised steps minus the mean over the noised
frames. Scores are differences to the clean run of the same cases.
"""

import numpy as np

from minicos.analysis.noise import pictures
from minicos.analysis.noise.measure import Measured, edits, measure_all
from minicos.analysis.options import NoiseOptions
from minicos.analysis.result import Cell, Curve, Interval, Number, Result, write
from minicos.analysis.tools import cases, stats
from minicos.errors import MinicosError
from minicos.runs import Run
from minicos.wan import Wan

FRAMES = (("right frames", "all"), ("of those untouched", "untouched"), ("of the answer", "answer"))


def check(wan: Wan, options: NoiseOptions) -> None:
    """Raise MinicosError for steps, frames and layers that the run does not have, before
    anything runs.
    """
    layers, stride = wan.depth, wan.stride[0]
    if options.layer is not None and not 0 <= options.layer < layers:
        raise MinicosError(f"--layer {options.layer}: the model has blocks 0 to {layers - 1}")
    edits(options, wan.preset.steps, [False] * ((wan.preset.frames - 1) // stride + 1))


def study(wan: Wan, run: Run, options: NoiseOptions) -> Result:
    """Noise at the steps and in the frames of `options`: numbers, the table of all edits,
    sensitivity over steps, pictures.
    """
    return report(wan, run, options, measure_all(wan, cases.chosen(options), run, options))


def report(wan: Wan, run: Run, options: NoiseOptions, measured: Measured) -> Result:
    """What was measured as a result, saved in `run` with its pictures."""
    drawn = curves(measured, options.mode)
    return write(
        run,
        Result(
            "noise",
            run.settings,
            numbers(measured),
            {"edits": [_row(measured, name) for name in measured.edits]},
            drawn,
            pictures.draw(measured, drawn, options, wan, run),
        ),
    )


def numbers(measured: Measured) -> list[Number]:
    """The findings: step noise against frame noise, early against late, the yardsticks, the
    peak, and the cost.
    """
    steps, frames = measured.names("step"), measured.names("frame")
    found = []
    if steps and frames:

        def against(name: str, per_case: dict[str, np.ndarray], unit: str) -> Number:
            a, b = (np.mean([per_case[e] for e in kind], axis=0) for kind in (steps, frames))
            return stats.difference(
                f"{name}: step noise minus frame noise", a, b, "noise in a frame", unit
            )

        both = [*steps, *frames]
        found.append(against("D of the video", {e: measured.final(e) for e in both}, "D"))
        if measured.puzzles:
            lost = {e: 1.0 - measured.runs[e]["solved"] for e in both}
            wrong = {e: 1.0 - measured.runs[e]["right"].mean(1) for e in both}
            found.append(against("puzzles not solved", lost, "share"))
            found.append(against("frames not right", wrong, "share"))
        found.append(against("dose", {e: measured.dose(e) for e in both}, "latent frames"))
        others = [d for e in frames if (d := measured.untouched(e)) is not None]
        if others:
            note = "0: frames do not depend on each other"
            found.append(
                stats.mean(
                    "D of the frames that frame noise left alone",
                    np.mean(others, axis=0),
                    note,
                    "D",
                )
            )
    if len(steps) > 1:
        damage, at = sensitivity(measured), measured.noised
        name = f"D of the video: noise at step {at[0]} minus step {at[-1]}"
        found.append(stats.difference(name, damage[:, 0], damage[:, -1], f"step {at[-1]}", "D"))
    if steps:
        top, _ = peak(sensitivity(measured), measured.noised)
        hand = (
            "" if measured.boundary is None else f"the experts change at step {measured.boundary}"
        )
        found.append(
            Number.of("step whose noise changes the video most", top, unit="step", note=hand)
        )
    found.append(
        stats.mean(
            "D of the null intervention", measured.final("null"), "exactly 0 under Euler", "D"
        )
    )
    found.append(
        stats.mean(
            "D of another seed", measured.final("seed 1"), "1 by definition, over all seeds", "D"
        )
    )
    if measured.puzzles:
        solved = measured.runs["clean"]["solved"].astype(float)
        found.append(stats.mean("puzzles solved without noise", solved, unit="share"))
    spent, full = measured.passes()
    if full:
        note = f"{spent} passes of {full}"
        found.append(
            Number(
                "network passes of the steps' sweep, of as many full runs", spent / full, note=note
            )
        )
    return found


def _row(measured: Measured, name: str) -> dict[str, Cell]:
    """One edit over all cases; scores are differences to the clean run."""
    ours, clean = measured.runs[name], measured.runs["clean"]
    untouched = measured.untouched(name)
    row: dict[str, Cell] = {
        "edit": name,
        "dose": float(measured.dose(name).mean()),
        "D": stats.bootstrap(measured.final(name)),
        "D untouched": None if untouched is None else stats.bootstrap(untouched),
        "1 - CKA": stats.bootstrap(ours["cka"][:, -1]),
        "1 - CKA hidden": stats.bootstrap(ours["hidden"][:, -1]) if "hidden" in ours else None,
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
    """Damage by noise at each noised step: n steps. "D" and "cka" of the video; "solved" and
    "right": what the clean run has more.
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
    """Sensitivity over the noised steps in each measure: D and 1 - CKA; of puzzles also what is
    lost.
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
    """The step of the largest mean (values: n steps) with the interval of resampled peaks, and
    those peaks.
    """
    peaks = steps[(stats.resampled(len(values)) @ values).argmax(1)]
    low, high = np.percentile(peaks, [2.5, 97.5])
    top = float(steps[values.mean(0).argmax()])
    return Interval(top, float(low), float(high), len(values)), peaks
