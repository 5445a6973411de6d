"""The result of a study, and its form on disk: `results.json` in the run folder.

    {"schema": 1,
     "what": "noise",
     "settings": {"model": "tiny", "n": 25, ...},
     "numbers": [{"name": "D: step noise minus frame noise", "value": 0.63, "low": 0.58, "high":
     0.68,
                  "n": 100, "unit": "D", "note": "the same cells, frame by frame", "resolvable":
                  0.05}],
     "tables": {"edits": [{"edit": "step 5", "D": {"value": 0.9, "low": 0.8, "high": 1.0, "n":
     25}}]},
     "curves": [{"name": "D", "x": [0, 5], "value": [1.0, 0.9], "low": [...], "high": [...],
                 "x_label": "step that is noised", "unit": "D"}],
     "files": ["sensitivity.png", "videos.png"]}

The numbers are the findings, in the order in which to read them; tables and curves are the details.
JSON has no infinity and no NaN: both are null, which means that there is no such value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isinf, isnan, nan
from pathlib import Path
from typing import Any, Self

from minicos.errors import MinicosError
from minicos.journal import plain
from minicos.runs import Run, read_json

SCHEMA = 1
FILE = "results.json"


@dataclass(frozen=True)
class Interval:
    """A mean over n cases with its 95 % interval. NaN means no value; infinity means that the event
    in question never occurred.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return brief(self)


@dataclass(frozen=True)
class Number:
    """One finding. `note` names what it is compared with: a control, or a value that holds by
    construction.
    """

    name: str
    value: float
    low: float = nan  # the 95 % interval, if the number is a mean over cases
    high: float = nan
    n: int | None = None  # cases that have a value
    unit: str = ""
    note: str = ""
    resolvable: float = nan  # for a difference: the smallest that n cases find with 80 % power
    p: float = nan  # for a difference: two-sided, for no difference, uncorrected

    @classmethod
    def of(cls, name: str, interval: Interval, *, unit: str = "", note: str = "") -> Self:
        """The number of an interval."""
        return cls(name, interval.value, interval.low, interval.high, interval.n, unit, note)

    @property
    def interval(self) -> Interval:
        """The number without its name, as a table cell."""
        return Interval(self.value, self.low, self.high, self.n or 0)

    def __str__(self) -> str:
        return brief(self)


Cell = str | int | float | bool | None | Interval
Row = Mapping[str, Cell]  # column -> content


@dataclass(frozen=True)
class Curve:
    """Means over cases along an axis, with intervals if there are several cases."""

    name: str
    x: Sequence[float]
    value: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    x_label: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Result:
    """Everything that a study found. `files` are names in the run folder, the one to open first
    at the front.
    """

    what: str  # name of the study
    settings: Mapping[str, Any]  # everything that determines the numbers; JSON values
    numbers: Sequence[Number] = ()
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    files: Sequence[str] = ()

    def number(self, name: str) -> Number:
        """The number with this name. Raises KeyError if there is none."""
        for number in self.numbers:
            if number.name == name:
                return number
        raise KeyError(f"no number {name!r} in {', '.join(n.name for n in self.numbers)}")

    def rows(self) -> list[Row]:
        """The numbers as a table."""
        return [
            {"": n.name, "value [95 %]": brief(n), "n": n.n, "compared with": n.note or None}
            for n in self.numbers
        ]

    def text(self) -> str:
        """Numbers and tables for a terminal."""
        parts = [f"{name}\n{table(rows)}" for name, rows in self.tables.items() if rows]
        return "\n\n".join([table(self.rows()), *parts] if self.numbers else parts)


def write(run: Run, result: Result) -> Result:
    """Add the result to the run's journal and save it in its folder, atomically; returns it."""
    for line in lines(result) if run.journal else ():
        run.log({"what": result.what, **line})
    run.save_json(FILE, {"schema": SCHEMA, **plain(asdict(result))})
    return result


def lines(result: Result) -> Iterator[dict[str, Any]]:
    """A result as lines of a journal: each number, each row of a table, each point of a curve."""
    for number in result.numbers:
        found = asdict(number)
        yield {"number": found.pop("name"), **found}
    for name, rows in result.tables.items():
        for row in rows:
            cells = {k: asdict(v) if isinstance(v, Interval) else v for k, v in row.items()}
            yield {"table": name, **cells}
    for curve in result.curves:
        ends = {"low": curve.low, "high": curve.high} if len(curve.low) else {}
        columns = {"x": curve.x, "value": curve.value, **ends}
        for point in zip(*columns.values(), strict=True):
            values = dict(zip(columns, map(float, point), strict=True))
            yield {"curve": curve.name, **values, "x_label": curve.x_label, "unit": curve.unit}


def read(place: str | Path) -> Result:
    """The result in a run folder or a file. Raises MinicosError if it is missing, damaged or of
    another schema.
    """
    path = Path(place)
    path = path / FILE if path.is_dir() else path
    kept = read_json(path)
    if not isinstance(kept, dict) or kept.get("schema") != SCHEMA:
        schema = kept.get("schema") if isinstance(kept, dict) else None
        raise MinicosError(
            f"{path} has schema {schema!r}, and this version reads {SCHEMA}. Run the study again."
        )
    try:
        return Result(
            kept["what"],
            kept["settings"],
            tuple(Number(**_filled(number)) for number in kept["numbers"]),
            {
                name: tuple({k: _cell(v) for k, v in row.items()} for row in rows)
                for name, rows in kept["tables"].items()
            },
            tuple(Curve(**_filled(curve)) for curve in kept["curves"]),
            tuple(kept["files"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise MinicosError(
            f"{path} is not the result of a study ({error}). Run the study again."
        ) from error


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns; empty columns are omitted."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    head, *lines = ([cell.replace("|", "\\|") for cell in line] for line in cells(rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The header and every row as strings. Rows may lack columns; empty columns are omitted."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    filled = [name for name in names if any(row.get(name) is not None for row in rows)]
    return [filled, *([_shown(row.get(name)) for name in filled] for row in rows)]


def brief(value: Interval | Number) -> str:
    """ "0.123 [0.100, 0.150]"; "-" for no value, "never" for infinity."""
    bare = isnan(value.low) and isnan(value.high)
    ends = "" if bare else f" [{_shown(value.low)}, {_shown(value.high)}]"
    return f"{_shown(value.value)}{ends}"


def _shown(cell: Cell) -> str:
    if isinstance(cell, Interval):
        return brief(cell)
    if cell is None or (isinstance(cell, float) and isnan(cell)):
        return "-"
    if isinstance(cell, float):
        if isinf(cell):
            return "never"
        return f"{cell:.3f}" if cell == 0 or abs(cell) >= 0.0995 else f"{cell:.3g}"
    return str(cell)


def _cell(value: Any) -> Cell:
    return Interval(**_filled(value)) if isinstance(value, dict) else value


def _filled(kept: dict[str, Any]) -> dict[str, Any]:
    """The fields of a number, an interval or a curve, with null converted back to NaN; n may be
    missing.
    """
    return {
        name: tuple(nan if v is None else v for v in value)
        if isinstance(value, list)
        else nan
        if value is None and name != "n"
        else value
        for name, value in kept.items()
    }
