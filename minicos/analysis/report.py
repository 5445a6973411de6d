"""The report of `reproduce`: report.md with the numbers and pictures of every study, and
claims.json.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from minicos.analysis import result
from minicos.analysis.reproduce import SECTIONS, Part
from minicos.analysis.result import Number, Result, Row
from minicos.runs import replace_file, write_json

FIELDS = ("claim", "effect", "low", "high", "n", "control", "command")  # of claims.json
SHOWN = 4  # pictures of a study, at most
CAVEAT = (
    "A miniature illustrates what the experiments measure. It is no evidence about a model of 14 "
    "billion parameters: to learn "
    "something about one, run the same commands with `--model`."
)
HOW = (
    "Every effect is a mean over held-out puzzles (test split) with its 95 % bootstrap interval; a "
    "difference is paired, both arms "
    "having seen the same puzzles and the same noise, unless it says otherwise. Puzzle i, counted "
    "from 0, starts from the noise of "
    "seed i. *Power* is the smallest true difference that so many puzzles find in four of five "
    "experiments at the 5 % level. Effects "
    "that do not appear are listed like those that do; only the ensemble's arm was chosen by its "
    "result, on other puzzles (dev split)."
)

Found = Mapping[str, Sequence[tuple[Part, Result]]]  # of each section


def write(folder: Path, found: Found, about: str, model: str) -> None:
    """report.md, with figures by relative links, and claims.json: the same results give the same
    bytes.
    """
    claims = [
        _claim(number, part.command(model))
        for parts in found.values()
        for part, made in parts
        for number in made.numbers
    ]
    write_json(folder / "claims.json", claims)
    head = ["# Demystifying Video Reasoning, in miniature", f"**{CAVEAT}**", about, HOW]
    sections = [block for name, parts in found.items() for block in _section(name, parts, model)]
    text = "\n\n".join([*head, *sections]) + "\n"
    replace_file(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))


def _claim(number: Number, command: str) -> dict[str, object]:
    """One number in the fields of claims.json; JSON has no infinity and no NaN."""
    values = (number.name, number.value, number.low, number.high, number.n, number.note, command)
    plain = (v if not isinstance(v, float) or isfinite(v) else None for v in values)
    return dict(zip(FIELDS, plain, strict=True))


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
