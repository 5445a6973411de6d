"""Pages of folders with several runs: a row for each case, or a section for each experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minicos.analysis.reading import READINGS, Reading
from minicos.analysis.result import FILE, Number, Result, brief, read
from minicos.media import load_video
from minicos.runs import Run

from . import gather, kept
from .content import Page, Table

SHOWN = 4  # numbers shown per case


@dataclass(frozen=True)
class Row:
    """One case of a folder."""

    name: str  # name of its run folder
    prompt: str
    failed: str = ""  # the reason if it failed


def write_cases(folder: Path, verb: str, command: str, rows: Sequence[Row]) -> Path:
    """`index.html` of a folder of cases: picture, last frame, prompt and numbers of each."""
    results = {row.name: _result(folder / row.name) for row in rows}
    names = list(dict.fromkeys(n.name for found in results.values() for n in found))[:SHOWN]
    lines = [
        [
            _link(row.name, folder),
            {"image": kept.picture(folder / row.name / "first_frame.png")},
            {"image": _last(folder / row.name)},
            row.prompt,
            *(_value(results[row.name], name) for name in names),
            row.failed,
        ]
        for row in rows
    ]
    columns = ["case", "given", "last frame", "prompt", *names, ""]
    reading = READINGS.get(verb, Reading("", ""))
    page = Page(
        title=f"minicos {verb}: {len(rows)} cases",
        command=command,
        reading=f"{reading.shows} Each case has a page of its own: open one by its name.".strip(),
        tables=[Table("Cases", columns, lines)],
        next=reading.next,
    )
    return gather.write_page(folder, page)


def write_sections(
    run: Run,
    command: str,
    about: str,
    verdicts: Mapping[str, Sequence[Mapping[str, object]]],
    sections: Mapping[str, Sequence[tuple[str, str, Result]]],
) -> Path:
    """`index.html` of `reproduce`: the verdicts, then the numbers of every section. Each study has
    its own page.

    Args:
        verdicts: title -> a row for each claim, all with the same columns.
        sections: title -> its studies: subfolder, the command that makes it, result.
    """
    tables = [
        Table(
            title,
            list(lines[0]),
            [["" if v is None else v for v in line.values()] for line in lines],
        )
        for title, lines in verdicts.items()
        if lines
    ]
    for title, studies in sections.items():
        rows = []
        for name, own, result in studies:
            part = run.inside(name)
            gather.write(part, {"settings": dict(result.settings), "command": own})
            link = {"href": f"{name}/{gather.NAME}", "text": name}
            rows += [
                [link, n.name, n.value, brief(n).partition(" ")[2].strip("[]"), n.n, n.unit, n.note]
                for n in result.numbers
            ]
        columns = ["page", "finding", "value", "95 % interval", "n", "unit", "compared with"]
        tables.append(Table(title, columns, rows))
    reading = READINGS["reproduce"]
    page = Page(
        title="minicos reproduce",
        command=command,
        summary=about.replace("`", ""),
        reading=f"{reading.shows} {reading.read}",
        tables=tables,
        files=["report.md", "claims.json"],
        next=reading.next,
    )
    return gather.write_page(run.folder, page)


def _link(name: str, folder: Path) -> object:
    page = f"{name}/{gather.NAME}"
    return {"href": page, "text": name} if (folder / page).exists() else name


def _result(folder: Path) -> Sequence[Number]:
    return read(folder).numbers if (folder / FILE).exists() else ()


def _value(numbers: Sequence[Number], name: str) -> str:
    return next((brief(n) for n in numbers if n.name == name), "")


def _last(folder: Path) -> np.ndarray | None:
    path = folder / "video.mp4"
    return load_video(path)[-1] if path.exists() else None
