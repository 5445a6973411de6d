"""Scores as tables: by domain and category as in the paper, paired differences to one condition,
and task by task.

Samples of one task are similar (the same generator, often nearly the same score) and so not
independent: the intervals here are over tasks, not samples. A difference is between two
conditions on the same samples. Compare absolute scores with the two baselines: a static video
scores .27 on average and 1.0 on some tasks, and the true one does not always score 1.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minicos.analysis.result import Cell, Interval, Number, Result, Row, markdown
from minicos.analysis.tools import figures, intervals
from minicos.analysis.tools.stats import resolvable
from minicos.runs import replace_file
from minicos.vbvr.cases import SPLITS, Sample, printable
from minicos.vbvr.published import BENCH, CATEGORIES, MAIN, MARK, PRO, SOURCES

DOMAINS = {"In-Domain_50": "ID", "Out-of-Domain_50": "OOD"}


@dataclass(frozen=True)
class Scores:
    """All scores: for each condition those of its samples; and the tasks of the samples."""

    by_condition: Mapping[str, Mapping[str, float]]  # condition -> sample -> 0 to 1
    samples: Mapping[str, Sample]  # by name, all that should have a score
    failed: Mapping[str, Mapping[str, str]]  # condition -> sample -> why it has no score

    @property
    def columns(self) -> dict[str, list[str]]:
        """Column -> its samples: Overall, then each domain with its categories. Columns without
        samples are omitted.
        """
        out = {"Overall": list(self.samples)}
        for split in SPLITS:
            inside = [name for name, sample in self.samples.items() if sample.split == split]
            found = {self.samples[name].category for name in inside}
            order = [c for c in CATEGORIES if c in found]
            order += sorted(found - set(CATEGORIES) - {""})
            out[DOMAINS[split]] = inside
            for category in order:
                names = [name for name in inside if self.samples[name].category == category]
                out[f"{DOMAINS[split]} {category}"] = names
        return {column: names for column, names in out.items() if names}


def clustered(
    values: Sequence[float], clusters: Sequence[str], *, signed: bool = False
) -> Interval:
    """The mean of `values`, 0 to 1, or -1 to 1 if `signed`, with its interval over clusters
    (tasks): that of what each contributes to the mean (the linearised ratio of their sums to their
    sizes; Cochran, Sampling Techniques, 1977, sec. 6.3).

    With a single cluster there is nothing to compare, and the interval is NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    if not len(array):
        return Interval(np.nan, np.nan, np.nan, 0)
    middle = float(array.mean())
    if len(names) < 2:
        return Interval(middle, np.nan, np.nan, len(array))
    excess = np.bincount(member, array) - middle * np.bincount(member)
    low, high = intervals.mean(middle + excess * len(names) / len(array), span=1.0)
    return Interval(middle, max(low, -1.0 if signed else 0.0), min(high, 1.0), len(array))


def overview(scores: Scores) -> list[Row]:
    """A row for each condition, a column for each domain and category: means, and intervals for
    the three main columns.
    """
    rows: list[Row] = []
    for condition, found in scores.by_condition.items():
        row: dict[str, Cell] = {
            "condition": condition,
            "scored": f"{len(found)} of {len(scores.samples)}",
        }
        for column, names in scores.columns.items():
            there = [name for name in names if name in found]
            interval = clustered([found[n] for n in there], [scores.samples[n].task for n in there])
            row[column] = interval if column in MAIN else interval.value
        rows.append(row)
    return rows


def reference(pro: bool) -> list[Row]:
    """The published rows of a benchmark, all marked, with doubts about suspicious ones."""
    rows: list[Row] = []
    for one in PRO if pro else BENCH:
        doubts = f"; suspicious: {', '.join(one.suspicions)}" if one.suspicions else ""
        rows.append(
            {"condition": one.name, "scored": f"{MARK} ({one.source}){doubts}", **one.scores}
        )
    return rows


def brief(rows: Sequence[Row]) -> list[Row]:
    """The columns that fit on a terminal, without categories."""
    return [{k: v for k, v in row.items() if not k.startswith(("ID ", "OOD "))} for row in rows]


def differences(scores: Scores, base: str) -> list[Row]:
    """Each condition minus `base` on the samples that both have: means with intervals over tasks,
    in every column.
    """
    rows: list[Row] = []
    for condition in scores.by_condition:
        if condition == base or base not in scores.by_condition:
            continue
        row: dict[str, Cell] = {"condition": condition, "minus": base}
        for column, names in scores.columns.items():
            row[column] = apart(scores, condition, base, names)
        rows.append(row)
    return rows


def apart(scores: Scores, condition: str, base: str, names: Sequence[str]) -> Interval:
    """One condition minus another on those of the named samples that both have."""
    found, other = scores.by_condition[condition], scores.by_condition[base]
    both = [name for name in names if name in found and name in other]
    tasks = [scores.samples[name].task for name in both]
    return clustered([found[name] - other[name] for name in both], tasks, signed=True)


def tasks(scores: Scores, base: str) -> list[Row]:
    """Each task: the mean of every condition, and of every condition's paired difference to
    `base`.
    """
    rows: list[Row] = []
    groups: dict[tuple[str, str], list[str]] = {}
    for name, sample in scores.samples.items():
        groups.setdefault((sample.split, sample.task), []).append(name)
    for (split, task), names in groups.items():
        row: dict[str, Cell] = {
            "domain": DOMAINS.get(split, ""),
            "category": scores.samples[names[0]].category,
            "task": task,
        }
        for condition, found in scores.by_condition.items():
            there = [found[name] for name in names if name in found]
            row[condition] = float(np.mean(there)) if there else None
        for condition, found in scores.by_condition.items():
            other = scores.by_condition.get(base, {})
            both = [found[n] - other[n] for n in names if n in found and n in other]
            if condition != base:
                row[f"{condition} minus {base}"] = float(np.mean(both)) if both else None
        rows.append(row)
    return rows


def numbers(scores: Scores, base: str, kind: str = "score") -> list[Number]:
    """The findings: each condition's overall score of a kind, and its difference to `base` with the
    smallest resolvable difference.
    """
    out = []
    columns = scores.columns["Overall"]
    for condition, found in scores.by_condition.items():
        there = [name for name in columns if name in found]
        interval = clustered([found[n] for n in there], [scores.samples[n].task for n in there])
        out.append(Number.of(f"{kind}: {condition}", interval, unit=UNITS[kind]))
    for row in differences(scores, base):
        condition, cell = str(row["condition"]), row["Overall"]
        if isinstance(cell, Interval):
            number = Number.of(
                f"{kind}: {condition} minus {base}",
                cell,
                unit=UNITS[kind],
                note="the same samples; interval over tasks",
            )
            out.append(replace(number, resolvable=_resolvable(scores, condition, base)))
    return out


UNITS = {"score": "score", "solved": "share"}  # of each kind of score


def result(
    scores: Scores,
    base: str,
    settings: Mapping[str, object],
    references: Sequence[Row] = (),
    kind: str = "score",
) -> Result:
    """Everything in the project's form of a result. `references` are further rows of the scores."""
    tables = {
        "scores": [*overview(scores), *references],
        "differences": differences(scores, base),
        "tasks": tasks(scores, base),
    }
    return Result("vbvr", settings, numbers(scores, base, kind), tables, (), ("table.md",))


def write(folder: Path, scores: Scores, base: str, found: Result, kind: str = "score") -> Result:
    """Write table.md, a CSV for each table, and table.png, each atomically. Returns the result with
    the names of the files.
    """
    names = []
    for name, rows in found.tables.items():
        if rows:
            names.append(f"{name}.csv")
            save(folder / names[-1], to_csv(rows))
    bars = {str(row["condition"]): row["Overall"] for row in found.tables["differences"]}
    shown: dict[str, Interval] = {
        name: bar for name, bar in bars.items() if isinstance(bar, Interval) and bar.n
    }
    if shown:
        title = f"{len(scores.samples)} samples; bars: 95 % over tasks"
        figures.intervals(folder / "table.png", shown, x=f"{kind}: minus {base}", title=title)
        names.append("table.png")
    save(folder / "table.md", text(scores, base, found))
    return replace(found, files=(*found.files, *names))


def text(scores: Scores, base: str, found: Result) -> str:
    """The tables for a reader, in Markdown."""
    parts = [
        "# Scores\n",
        markdown(found.tables["scores"]),
        "\nMeans, with 95 % intervals over tasks. Compare them with `static` (the first frame "
        "held) and `truth`.\n",
    ]
    if any(MARK in str(row["scored"]) for row in found.tables["scores"]):
        parts.append("".join(f"- {letter}: {what}\n" for letter, what in SOURCES.items()))
    if found.tables["differences"]:
        parts += [
            f"# Differences to {base}, on the same samples\n",
            markdown(found.tables["differences"]),
            "",
        ]
    if found.tables.get("steps"):
        parts += [
            "# Chain of steps: the clean estimate of each step as an answer\n",
            markdown(found.tables["steps"]),
            "",
        ]
    for condition, failed in scores.failed.items():
        if failed:
            parts.append(f"# Without a score: {condition}\n")
            parts += [f"- {printable(name)}: {printable(why)}" for name, why in failed.items()]
            parts.append("")
    return "\n".join(parts) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Rows for a spreadsheet: an interval becomes three columns; text that a spreadsheet would
    evaluate is quoted.
    """
    flat = []
    for row in rows:
        line: dict[str, object] = {}
        for name, cell in row.items():
            if isinstance(cell, Interval):
                line |= {
                    name: cell.value,
                    f"{name} low": cell.low,
                    f"{name} high": cell.high,
                    f"{name} n": cell.n,
                }
            else:
                line[name] = cell
        flat.append(line)
    columns = list(dict.fromkeys(name for line in flat for name in line))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for line in flat:
        writer.writerow([_literal(line.get(name)) for name in columns])
    return out.getvalue()


def _literal(value: object) -> object:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def _resolvable(scores: Scores, condition: str, base: str) -> float:
    """The smallest difference that this number of tasks finds with 80 % power."""
    apart: dict[str, list[float]] = {}
    for name, value in scores.by_condition[condition].items():
        if name in scores.by_condition[base]:
            apart.setdefault(scores.samples[name].task, []).append(
                value - scores.by_condition[base][name]
            )
    means = [float(np.mean(values)) for values in apart.values()]
    return resolvable(float(np.std(means, ddof=1)), len(means)) if len(means) > 1 else float("nan")


def save(path: Path, text: str) -> None:
    """Write a text atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
