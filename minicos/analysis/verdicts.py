"""From a number to a verdict, by a rule that could also have given another verdict.

A claim says that an effect is above zero, and `least` is the smallest effect that would matter:

    supported               p, corrected for all headlines together, is at most .05, the 95 %
                            interval is above zero, and an effect of `least` is not ruled out
    not supported           the interval is below `least`: any effect is too small to matter
    cannot be decided here  otherwise, and if a need of the claim is not met: a puzzle that is
                            always solved leaves no room for a gain

`python -m minicos.analysis.verdicts claims.json` prints the headlines of a report as a table. Given
the files of several reports, it prints what each says, and exits with 1 if their verdicts differ.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from minicos.analysis.result import Interval, Number, Result, Row, brief, markdown
from minicos.analysis.tools.stats import holm
from minicos.errors import MinicosError
from minicos.runs import read_json

LEVEL = 0.05
SUPPORTED, NOT, OPEN = "supported", "not supported", "cannot be decided here"
FIELDS = (  # of an entry in claims.json
    "claim",
    "paper",
    "headline",
    "effect",
    "low",
    "high",
    "n",
    "ideal",
    "control",
    "verdict",
    "command",
    "least",
    "unit",
)


@dataclass(frozen=True)
class Need:
    """A number that must be within bounds for a claim to be decided."""

    number: str  # its name in the claim's result
    low: float
    high: float
    why: str  # what is wrong if it is not

    def missed(self, result: Result) -> str:
        """The reason why the claim cannot be decided; empty if the need is met."""
        value = result.number(self.number).value
        return "" if self.low <= value <= self.high else f"{self.why} ({value:.2f})"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or a condition of its interpretation, as the sign of one number."""

    text: str  # what is true if the effect is above zero
    paper: str  # its figure, table or section
    part: str  # the section and part of the report that measures it
    number: str  # the effect's name in that result
    least: float  # the smallest effect that would matter, in the number's unit
    control: str  # what the effect is compared with
    ideal: str | None = None  # name of the ideal observer's number; None if there is none
    headline: bool = False
    flipped: bool = False  # the claim is that the number is below zero, so its sign is changed
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True)
class Finding:
    """The outcome of a claim."""

    claim: Claim
    number: Number
    ideal: float | None
    p: float  # corrected together for headlines
    verdict: str
    why: str  # the unmet need, if that prevents a decision
    command: str = ""

    def line(self) -> dict[str, Any]:
        """The finding in the fields of claims.json, without infinity and NaN."""
        number, claim = self.number, self.claim
        values = (claim.text, claim.paper, claim.headline, number.value, number.low, number.high)
        control = f"{claim.control}; {self.why}" if self.why else claim.control
        ideal = "n/a" if self.ideal is None else self.ideal
        rest = (number.n, ideal, control, self.verdict, self.command, claim.least, number.unit)
        plain = [None if isinstance(v, float) and not isfinite(v) else v for v in (*values, *rest)]
        return dict(zip(FIELDS, plain, strict=True))


def verdict(number: Number, p: float, least: float) -> str:
    """The verdict on a number with its p value, by the rule at the top of this file."""
    if isnan(number.value) or isnan(number.low) or not number.n:
        return OPEN
    if number.high < least:
        return NOT
    return SUPPORTED if p <= LEVEL and number.low > 0 else OPEN


def judge(
    claims: Sequence[Claim], results: Mapping[str, Result], commands: Mapping[str, str]
) -> list[Finding]:
    """Judge every claim whose part (in `results`) exists. Headlines are corrected together, after
    Holm; other lines are not corrected.
    """
    made = [claim for claim in claims if claim.part in results]
    numbers = [_signed(claim, results[claim.part].number(claim.number)) for claim in made]
    p = [1.0 if isnan(number.p) else number.p for number in numbers]
    heads = [i for i, claim in enumerate(made) if claim.headline]
    for i, corrected in zip(heads, holm([p[i] for i in heads]), strict=True):
        p[i] = corrected
    out = []
    for claim, number, value in zip(made, numbers, p, strict=True):
        result = results[claim.part]
        why = "; ".join(filter(None, (n.missed(result) for n in claim.needs)))
        found = OPEN if why else verdict(number, value, claim.least)
        ideal = None if claim.ideal is None else _signed(claim, result.number(claim.ideal)).value
        out.append(Finding(claim, number, ideal, value, found, why, commands[claim.part]))
    return out


def _signed(claim: Claim, number: Number) -> Number:
    if not claim.flipped:
        return number
    return replace(number, value=0 - number.value, low=0 - number.high, high=0 - number.low)


def table(lines: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Lines of claims.json for a reader: effect with interval, ideal observer, n, verdict."""
    return [
        {
            "claim": line["claim"],
            "paper": line["paper"],
            "effect [95 %]": f"{brief(_interval(line))} {line.get('unit', '')}".strip(),
            "matters from": line.get("least"),  # earlier reports lack this and the unit
            "ideal observer": line["ideal"],
            "n": line["n"],
            "set against": line["control"],
            "verdict": line["verdict"],
        }
        for line in lines
    ]


def _interval(line: Mapping[str, Any]) -> Interval:
    value, low, high = (
        float("nan") if line[k] is None else line[k] for k in ("effect", "low", "high")
    )
    return Interval(value, low, high, line["n"] or 0)


def compared(reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """What several reports (name -> lines of claims.json) say about each claim: the effects, and
    the verdict if they agree, or each one. A claim that a report lacks is "not made" there.
    """
    claims = list(dict.fromkeys(line["claim"] for lines in reports.values() for line in lines))
    rows: list[Row] = []
    for claim in claims:
        found = {
            name: next((line for line in lines if line["claim"] == claim), None)
            for name, lines in reports.items()
        }
        verdicts = [line["verdict"] if line else "not made" for line in found.values()]
        effects = {name: brief(_interval(line)) if line else None for name, line in found.items()}
        same = len(set(verdicts)) == 1
        shared = verdicts[0] if same else " | ".join(verdicts)
        rows.append({"claim": claim, **effects, "verdict": shared, "same": "yes" if same else "NO"})
    return rows


def main(argv: Sequence[str]) -> int:
    """Print the headlines of a claims.json as a Markdown table, or compare those of several; with
    --all every line. Returns 0, 1 if reports have different verdicts, 2 for mistakes.
    """
    files = [word for word in argv if word != "--all"]
    if not files:
        print(
            "usage: python -m minicos.analysis.verdicts claims.json [others.json ...] [--all]",
            file=sys.stderr,
        )
        return 2
    reports = {}
    for file in dict.fromkeys(files):
        try:
            lines = read_json(Path(file))
            reports[file] = [x for x in lines if x["headline"] or "--all" in argv]
            rows = table(reports[file])
        except (MinicosError, KeyError, TypeError) as error:
            print(f"{file} is not the claims.json of a report: {error}", file=sys.stderr)
            return 2
    if len(reports) > 1:
        rows = compared(reports)
    print(markdown(rows))
    return int(any(row.get("same") == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
