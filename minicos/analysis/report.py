"""Claims with their intervals and controls, sections that tell them, and the report they are written to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from pathlib import Path

import numpy as np

from minicos.analysis.tools import stats
from minicos.analysis.tools.stats import Interval
from minicos.runs import replace_file, write_json

FIELDS = ("claim", "effect", "low", "high", "n", "control", "command")  # of claims.json
CAVEAT = (
    "A miniature illustrates what the experiments measure. It is no evidence about a model of 14 billion parameters: to learn "
    "something about one, run the same commands with `--model`."
)


@dataclass(frozen=True)
class Claim:
    """One number with its 95 % interval over n puzzles, what it is held against, and the command that gives it."""

    claim: str
    effect: float
    low: float
    high: float
    n: int
    control: str
    command: str = ""
    resolvable: float | None = (
        None  # the smallest difference that n puzzles find with 80 % power; of differences alone
    )

    @property
    def brief(self) -> str:
        return f"{number(self.effect)} [{number(self.low)}, {number(self.high)}]"

    def __str__(self) -> str:
        """The number and, of a difference, what may be said of its sign."""
        if self.resolvable is None:
            return self.brief
        sign = (
            "above zero"
            if self.low > 0
            else "below zero"
            if self.high < 0
            else "not told from zero"
        )
        return f"{self.brief} ({sign})"


@dataclass(frozen=True)
class Section:
    """One experiment's part of the report. Figures are names of files in the section's folder."""

    title: str
    text: str
    claims: tuple[Claim, ...]
    figures: tuple[str, ...] = ()


def mean(claim: str, values: np.ndarray, control: str) -> Claim:
    """The mean over puzzles; those that have no value (NaN) are left out, and n tells."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    return of(
        claim, stats.bootstrap(values) if len(values) else Interval(nan, nan, nan, 0), control
    )


def difference(claim: str, a: np.ndarray, b: np.ndarray, control: str) -> Claim:
    """The mean of a - b on the same puzzles, with the power to find one."""
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return replace(mean(claim, d, control), resolvable=_resolvable(d[np.isfinite(d)]))


def of(claim: str, interval: Interval, control: str) -> Claim:
    return Claim(claim, interval.value, interval.low, interval.high, interval.n, control)


def _resolvable(d: np.ndarray) -> float | None:
    """None where no puzzle differs from another: scatter that was not seen is not zero."""
    return stats.resolvable(float(d.std()), len(d)) if len(d) and d.std() > 0 else nan


def number(value: float) -> str:
    return f"{value:+.3f}" if isfinite(value) else "never" if value == float("inf") else "-"


def write(folder: Path, sections: Mapping[str, Section], about: str) -> None:
    """report.md, with figures by relative links, and claims.json: the same sections give the same bytes."""
    claims = [claim for section in sections.values() for claim in section.claims]
    write_json(
        folder / "claims.json",
        [{key: _plain(getattr(claim, key)) for key in FIELDS} for claim in claims],
    )
    text = (
        "\n\n".join([_head(about), *(_part(name, section) for name, section in sections.items())])
        + "\n"
    )
    replace_file(
        folder / "report.md", lambda temporary: temporary.write_text(text, encoding="utf-8")
    )


def _head(about: str) -> str:
    return "\n\n".join(
        [
            "# Demystifying Video Reasoning, in miniature",
            f"**{CAVEAT}**",
            about,
            "Every effect is a mean over held-out puzzles (test split) with its 95 % bootstrap interval; a difference is paired, "
            "both arms having seen the same puzzles and the same noise, unless it says otherwise. Puzzle i of a section, counted "
            "from 0, starts from the noise of seed i. *Power* is the smallest true difference "
            "that so many puzzles find in four of five experiments at the 5 % level. Effects that do not appear stand beside those "
            "that do; only the ensemble's arms were chosen by their result, on other puzzles (dev split).",
        ]
    )


def _part(name: str, section: Section) -> str:
    rows = [
        f"| {c.claim} | {number(c.effect)} | {number(c.low)} … {number(c.high)} | {c.n} | {c.control} | {_power(c)} |"
        for c in section.claims
    ]
    return "\n\n".join(
        [
            f"## {section.title}",
            section.text,
            "\n".join(
                [
                    "| claim | effect | 95 % | n | control | power |",
                    "|---|---|---|---|---|---|",
                    *rows,
                ]
            ),
            f"`{section.claims[0].command}`",
            *(f"![{figure}]({name}/{figure})" for figure in section.figures),
        ]
    )


def _power(claim: Claim) -> str:
    return (
        ""
        if claim.resolvable is None or not isfinite(claim.resolvable)
        else f"{claim.resolvable:.3f}"
    )


def table(claims: Sequence[Claim]) -> str:
    """The claims as text for a terminal."""
    width = max(len(claim.claim) for claim in claims)
    return "\n".join(f"{claim.claim:{width}}  {claim.brief}  n = {claim.n}" for claim in claims)


def from_json(kept: Mapping) -> Section:
    """The section that `dataclasses.asdict` was saved of."""
    return Section(
        kept["title"],
        kept["text"],
        tuple(Claim(**claim) for claim in kept["claims"]),
        tuple(kept["figures"]),
    )


def _plain(value: object) -> object:
    """For claims.json, since JSON has no infinity: never is null, and so is what is not a number."""
    return value if not isinstance(value, float) or isfinite(value) else None
