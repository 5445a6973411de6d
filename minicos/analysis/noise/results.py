"""What a noise study says (`noise_study.study`): a table with intervals, the headline, the peak, and pictures.

Sensitivity at step s is D of the video after noise at s. Its peak is the step where the mean over cases is largest; the interval is
that of the peaks of resampled cases. Step against frame noise is a paired difference: for each case, the mean over the noised steps
minus the mean over the noised frames. Score figures are differences to the clean run of the same cases.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from minicos.analysis.noise.study import Results
from minicos.analysis.tools import figures
from minicos.analysis.tools.stats import Interval, bootstrap, paired
from minicos.runs import Run
from minicos.wan import Wan

Curve = tuple[np.ndarray, np.ndarray]  # x, and rows of middle, low, high


@dataclass(frozen=True)
class Row:
    """One edit over all cases. Shares of right frames and of solved puzzles are differences to the clean run; None without puzzles."""

    name: str
    dose: float  # latent frames of unit variance
    distance: Interval  # D of the video; 1 is another seed
    untouched: Interval | None  # the same over the latent frames that were left alone
    cka: Interval  # 1 - CKA of the last step's estimate
    hidden: Interval | None = None  # 1 - CKA of the block's output at the last step
    solved: Interval | None = None
    kept: float | None = (
        None  # of the cases solved clean: share solved by the same answer, and by another valid one
    )
    changed: float | None = None
    right: Interval | None = (
        None  # shares of right frames: of all, of those left alone, of those that show the whole answer
    )
    right_untouched: Interval | None = None
    right_answer: Interval | None = None


def rows(results: Results) -> list[Row]:
    """Every edit: the control, the yardsticks, then steps and frames."""
    return [_row(results, name) for name in results.edits]


def _row(results: Results, name: str) -> Row:
    ours, clean = results.runs[name], results.runs["clean"]
    beside = results.untouched(name)
    row = {
        "name": name,
        "dose": float(results.dose(name).mean()),
        "distance": bootstrap(results.final(name)),
        "untouched": None if beside is None else bootstrap(beside),
        "cka": bootstrap(ours["cka"][:, -1]),
        "hidden": bootstrap(ours["hidden"][:, -1]) if "hidden" in ours else None,
    }
    if results.puzzles:
        before, after = clean["solved"], ours["solved"]
        same = ours["answer"] == clean["answer"]
        row |= {"solved": paired(after, before)}
        if before.any():
            row |= {
                "kept": float((after & same)[before].mean()),
                "changed": float((after & ~same)[before].mean()),
            }
        for key, which in (
            ("right", "all"),
            ("right_untouched", "untouched"),
            ("right_answer", "answer"),
        ):
            if (shown := results.shown(name, which)).any():
                row[key] = paired(ours["right"][:, shown].mean(1), clean["right"][:, shown].mean(1))
    return Row(**row)


def table(found: Sequence[Row]) -> str:
    """The rows as text."""
    heads = {
        "distance": "D [95 %]",
        "untouched": "D untouched",
        "cka": "1 - CKA",
        "hidden": "1 - CKA hidden",
        "solved": "solved",
        "right": "right frames",
        "right_untouched": "untouched",
        "right_answer": "answer's",
    }
    heads = {
        key: head
        for key, head in heads.items()
        if any(getattr(row, key) is not None for row in found)
    }
    lines = [
        ["", "dose", *heads.values()] + ["same answer", "another"] * (found[0].kept is not None)
    ]
    for row in found:
        shares = [] if row.kept is None else [f"{row.kept:.2f}", f"{row.changed:.2f}"]
        lines.append(
            [
                row.name,
                f"{row.dose:.2f}",
                *(_brief(getattr(row, key), key) for key in heads),
                *shares,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _brief(value: Interval | None, key: str) -> str:
    if value is None:
        return "-"
    sign = "+" if key in ("solved", "right", "right_untouched", "right_answer") else ""
    return f"{value.value:{sign}.2f} [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"


def headline(results: Results) -> dict[str, Interval]:
    """Step noise minus frame noise, paired by case: doses, D and, for puzzles, solved and right frames. Empty without both kinds."""
    steps, frames = results.names("step"), results.names("frame")
    if not steps or not frames:
        return {}

    def against(value: Callable[[str], np.ndarray]) -> Interval:
        means = (np.mean([value(name) for name in names], axis=0) for names in (steps, frames))
        return paired(*means)

    out = {"dose": against(results.dose), "D": against(results.final)}
    if results.puzzles:
        out["solved"] = against(lambda name: results.runs[name]["solved"].astype(float))
        out["right frames"] = against(lambda name: results.runs[name]["right"].mean(1))
    return out


# -- curves over the steps that were noised ---------------------------------------------------------------------------


def at(results: Results) -> np.ndarray:
    """The noised steps."""
    return np.array([results.edits[name].steps[0] for name in results.names("step")])


def sensitivity(results: Results, measure: str = "D") -> np.ndarray:
    """Damage by noise at each noised step: n steps. "D" and "cka" of the video; "solved" and "right": what the clean run has more."""
    clean, names = results.runs["clean"], results.names("step")
    if measure == "D":
        return np.stack([results.final(name) for name in names], axis=1)
    if measure == "cka":
        return np.stack([results.runs[name]["cka"][:, -1] for name in names], axis=1)
    values = np.stack(
        [clean[measure].astype(float) - results.runs[name][measure] for name in names], axis=1
    )
    return values.mean(2) if measure == "right" else values  # right: n steps F


def resampled(n: int, *, seed: int = 0, resamples: int = 2000) -> np.ndarray:
    """Shares of each case in resampled means: resamples n. One seed gives the same resamples, so differences are paired."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n


def peak(values: np.ndarray, steps: np.ndarray) -> tuple[Interval, np.ndarray]:
    """The step of the largest mean (values: n steps) with the interval of resampled peaks, and those peaks."""
    peaks = steps[(resampled(len(values)) @ values).argmax(1)]
    low, high = np.percentile(peaks, [2.5, 97.5])
    return Interval(
        float(steps[values.mean(0).argmax()]), float(low), float(high), len(values)
    ), peaks


def curve(values: np.ndarray, x: np.ndarray) -> Curve:
    """Means over cases with their intervals: values n x."""
    means = resampled(len(values)) @ values
    return x, np.stack([values.mean(0), *np.percentile(means, [2.5, 97.5], axis=0)])


def draw(results: Results, wan: Wan, run: Run) -> list[str]:
    """Write the pictures and numbers of one study; their names, the one to open first in front."""
    steps, change = at(results), results.handover and results.handover - 0.5
    hand = change and {"the low-noise\nexpert begins": results.handover}
    lines = {
        "D": curve(sensitivity(results), steps),
        "1 - CKA": curve(sensitivity(results, "cka"), steps),
    }
    figures.bands(
        run.path("sensitivity.png"),
        lines,
        x=f"step that is noised ({results.plan.mode})",
        y="distance to the clean video",
        title="How much noise at one step changes the video",
        marks=hand,
        levels={"another seed": 1.0},
        log=True,
    )
    names = ["sensitivity.png"]
    if results.puzzles:
        lines = {
            "not solved": curve(sensitivity(results, "solved"), steps),
            "wrong frames": curve(sensitivity(results, "right"), steps),
        }
        figures.bands(
            run.path("score.png"),
            lines,
            x=f"step that is noised ({results.plan.mode})",
            y="more than in the clean run",
            title="What noise at one step costs",
            marks=hand,
        )
        names.append("score.png")
    n = len(results.sigmas) - 1
    matrices = {"D": lambda name: results.d(name), "cka": lambda name: results.runs[name]["cka"]}
    if results.plan.layer is not None:
        matrices["hidden"] = lambda name: results.runs[name]["hidden"]
    titles = {"D": "D", "cka": "1 - CKA", "hidden": f"1 - CKA of block {results.plan.layer}"}
    saved = {"steps": torch.from_numpy(steps), "sigmas": torch.tensor(results.sigmas)}
    for key, of in matrices.items():
        matrix = np.full((n, n), np.nan)
        matrix[steps] = np.stack([of(name).mean(0) for name in results.names("step")])
        saved |= {
            f"{key}.{name}": torch.from_numpy(np.ascontiguousarray(of(name)))
            for name in results.edits
        }
        top = np.nanpercentile(matrix, 95) if np.isfinite(matrix).any() else 1.0
        figures.grid(
            run.path(f"{key}.png"),
            matrix,
            x="later step",
            y="noised step",
            limits=(0, max(top, 1e-9)),
            mark=change,
            title=f"{titles[key]}, to the clean run"
            if key == "hidden"
            else f"{titles[key]} of the clean estimate, to the clean run's",
        )
        names.append(f"{key}.png")
    if frames := results.names("frame"):
        unit = results.unit[-1]
        unit = np.where(
            unit > 1e-3 * unit.max(), unit, np.nan
        )  # a frame that no seed changes has no yardstick
        spread = np.full((len(unit), len(unit)), np.nan)
        for name in frames:
            spread[results.edits[name].frames] = results.runs[name]["squared"][:, -1].mean(0) / unit
        figures.grid(
            run.path("frames.png"),
            spread,
            x="latent frame of the video",
            y="noised latent frame",
            limits=(0, 2),
            title="D, frame by frame",
        )
        names.append("frames.png")
    run.save_tensors("noise.safetensors", saved)
    return [*names, _sheet(results, wan, run), "noise.safetensors"]


def _sheet(results: Results, wan: Wan, run: Run) -> str:
    """The first case's videos: clean, another seed, noise at some steps, in some frames."""
    steps, frames = results.names("step"), results.names("frame")
    shown = [
        "clean",
        *results.names("seed")[:1],
        *(steps[i] for i in figures.evenly(len(steps), 6)),
        *(frames[i] for i in figures.evenly(len(frames), 4)),
    ]
    videos = [wan.decode(torch.from_numpy(results.runs[name]["final"][:1]))[0] for name in shown]
    columns = figures.evenly(len(videos[0]), 7)
    figures.sheet(
        run.path("videos.png"),
        [list(video[columns]) for video in videos],
        rows=shown,
        columns=[f"frame {f}" for f in columns],
        title=f"Videos after noise ({results.plan.mode}): where it was put (down), video frame (across)",
    )
    return "videos.png"


def to_json(results: Results) -> dict:
    """The study's numbers for results.json."""
    spent, full = results.passes()
    return {
        "plan": asdict(results.plan),
        "clean": float(results.runs["clean"]["solved"].mean()) if results.puzzles else None,
        "handover": results.handover,
        "rows": [asdict(row) for row in rows(results)],
        "step minus frame": {key: asdict(value) for key, value in headline(results).items()},
        "peak": asdict(peak(sensitivity(results), at(results))[0])
        if results.names("step")
        else None,
        "passes": {"sweep": spent, "full runs": full, "ratio": spent / max(full, 1)},
    }
