"""Chain of Steps: how good the clean estimate of every denoising step is as an answer, over the
noise level sigma at which the step begins.

Each step whose estimates were written has a tree of videos, which is scored like the final one. The
curve of a condition ends at sigma 0, with its finished videos.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minicos.analysis.result import Cell, Curve, Interval, Number, Row
from minicos.analysis.tools import figures
from minicos.vbvr import table
from minicos.vbvr.table import Scores

END = "end"  # instead of a step: the finished videos


@dataclass(frozen=True)
class Estimates:
    """A tree of clean estimates, for one step of the runs in the tree `of`."""

    of: str
    step: int
    sigma: float  # at which the step begins


def rows(scores: Scores, trees: Mapping[str, Estimates]) -> list[Row]:
    """A row for every step and one for the end: its scores, and their difference to the end's on
    the same samples.
    """
    overall = {str(row["condition"]): row for row in table.overview(scores)}
    out: list[Row] = []
    for of in dict.fromkeys(one.of for one in trees.values()):
        own = sorted((one.step, one.sigma, name) for name, one in trees.items() if one.of == of)
        ends: list[tuple[int | str, float, str]] = [*own, (END, 0.0, of)]
        for step, sigma, name in ends:
            row: dict[str, Cell] = {"condition": of, "step": step, "sigma": sigma}
            row |= {k: v for k, v in overall[name].items() if k != "condition"}
            if name != of:
                row["minus the end"] = table.apart(scores, name, of, list(scores.samples))
            out.append(row)
    return out


def curves(found: Sequence[Row]) -> list[Curve]:
    """The overall score of each condition over sigma."""
    out = []
    for of in dict.fromkeys(str(row["condition"]) for row in found):
        own = [row for row in found if row["condition"] == of]
        ends = [cell for row in own if isinstance(cell := row["Overall"], Interval)]
        out.append(
            Curve(
                of,
                tuple(float(str(row["sigma"])) for row in own),
                tuple(end.value for end in ends),
                tuple(end.low for end in ends),
                tuple(end.high for end in ends),
                "sigma at which the step begins (0: the finished video)",
                "score",
            )
        )
    return out


def numbers(found: Sequence[Row]) -> list[Number]:
    """The difference of the first scored estimate to the end, for each condition."""
    out = []
    for of in dict.fromkeys(str(row["condition"]) for row in found):
        first = next(row for row in found if row["condition"] == of)
        cell = first.get("minus the end")
        if isinstance(cell, Interval):
            name = f"score: {of}, clean estimate of step {first['step']} minus the end"
            note = f"the same samples; sigma {first['sigma']:.3f}; interval over tasks"
            out.append(Number.of(name, cell, unit="score", note=note))
    return out


def draw(path: Path, lines: Sequence[Curve], levels: Mapping[str, float]) -> None:
    """The curves, from noise on the left to the finished video on the right."""
    title = "Score of each step's clean estimate; bands: 95 % over tasks"
    figures.lines(path, lines, y="score", title=title, levels=levels, falling=True)
