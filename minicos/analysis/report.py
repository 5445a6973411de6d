"""The report of `reproduce`: report.md with verdicts, numbers and pictures, and claims.json."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from textwrap import fill

from minicos.analysis import result
from minicos.analysis.claims import CLAIMS
from minicos.analysis.reproduce import SECTIONS, Part
from minicos.analysis.result import Interval, Number, Result, Row
from minicos.analysis.tools import figures
from minicos.analysis.verdicts import Finding, judge, table
from minicos.runs import replace_file, write_json

SHOWN = 4  # most pictures of a study
FIGURE, LIMIT = "verdicts.png", 10
WIDTH = 60  # characters of a line in it
CAVEAT = (
    "A miniature illustrates what the experiments measure. It is not evidence about a model of 14 "
    "billion parameters: to learn "
    "something about one, run the same commands with `--model`."
)
HOW = """\
Every claim says that an effect is above zero. *Supported*: p, corrected after Holm for all
headlines of this report together, is at most .05, and the 95 % interval lies above zero and reaches
the smallest effect that would matter. *Not supported*: the interval lies below that. Else it
*cannot be decided here*. All of that was fixed before these puzzles (test split) were used:
`minicos/analysis/claims.py`. A difference is paired, both arms having seen the same puzzles and the
same noise, unless it says otherwise; intervals are exact or score intervals where values are yes or
no, else Student's. *Ideal observer* is what an exact posterior over the right answers shows in the
same experiment, run as a model; where a claim is set against it, the effect is the network's minus
the observer's."""

Found = Mapping[str, Sequence[tuple[Part, Result]]]  # of each section


def write(folder: Path, found: Found, about: str, model: str) -> list[Finding]:
    """Write report.md, with figures by relative links, and claims.json; equal results give equal
    bytes. Returns the finding for each claim.
    """
    made = {f"{name}/{p.name}": (p, r) for name, some in found.items() for p, r in some}
    results = {key: r for key, (_, r) in made.items()}
    judged = judge(CLAIMS, results, {key: p.command(model) for key, (p, _) in made.items()})
    lines = [finding.line() for finding in judged]
    write_json(folder / "claims.json", lines)
    heads = [line for line in lines if line["headline"]]
    rest = [line for line in lines if not line["headline"]]
    head = ["# Demystifying Video Reasoning, in miniature", f"**{CAVEAT}**", about]
    if heads:
        picture = _draw(folder / FIGURE, [found for found in judged if found.claim.headline])
        head += ["## Verdicts", HOW, *picture, result.markdown(table(heads))]
    if rest:
        head += ["Other lines, each by itself (p not corrected):", result.markdown(table(rest))]
    sections = [block for name, parts in found.items() for block in _section(name, parts, model)]
    text = "\n\n".join([*head, *sections]) + "\n"
    replace_file(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    return judged


def _draw(path: Path, heads: Sequence[Finding]) -> list[str]:
    """Draw every headline's effect in units of the smallest that would matter, cut at LIMIT;
    returns the link to the picture, if there is anything to draw.
    """
    shown = {}
    for f in heads:
        ends = (f.number.value, f.number.low, f.number.high)
        if all(map(isfinite, ends)):
            value, low, high = (max(-LIMIT, min(LIMIT, e / f.claim.least)) for e in ends)
            label = fill(f"{f.claim.text}: {f.verdict}", WIDTH)
            shown[label] = Interval(value, low, high, f.number.n or 0)
    if not shown:
        return []
    title = f"Effects with 95 % intervals, cut at {LIMIT}"
    figures.intervals(path, shown, x="1: the smallest that would matter", title=title)
    return [f"![{path.name}]({path.name})"]


def _section(name: str, parts: Sequence[tuple[Part, Result]], model: str) -> list[str]:
    blocks = [f"## {SECTIONS[name].title}", SECTIONS[name].text]
    for part, found in parts:
        pictures = [file for file in found.files if file.endswith(".png")][:SHOWN]
        links = [f"![{file}]({name}/{part.name}/{file})" for file in pictures]
        blocks += [
            f"`{part.command(model)}`",
            result.markdown([_row(n) for n in found.numbers]),
            *links,
        ]
    return blocks


def _row(number: Number) -> Row:
    return {
        "finding": number.name,
        "effect [95 %]": result.brief(number),
        "n": number.n,
        "unit": number.unit or None,
        "compared with": number.note or None,
        "power": number.resolvable if isfinite(number.resolvable) else None,
    }
