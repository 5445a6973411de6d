"""Read a finished run folder into a page, with the videos, energy, attention, curves and numbers
that it holds.

Nothing is computed here: a page shows the run's files. If a file is missing, its part of the page
is missing too, and `index.html` can be made again from the folder alone at any time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minicos.analysis.reading import READINGS, Reading
from minicos.analysis.result import FILE, Result, brief, cells, read
from minicos.analysis.tools.shown import INTERVENTIONS, VIDEOS, Where
from minicos.media import load_video
from minicos.runs import Run, read_json, replace_file

from . import kept
from .content import LIMIT, Clip, Curve, Map, Page, Picture, Series, Table, render

NAME = "index.html"
NOT_A_CHART = (
    *(OSError, RecursionError, ValueError, ArithmeticError),
    *(LookupError, TypeError, AttributeError),
)  # what a file of another kind raises
MOST_PICTURES, MOST_VIDEOS = 24, 24  # on one page
UNLISTED = ("x0/", "steps/", "made_with/", ".")  # many of a kind, or records of processes
LARGEST_SIGMA = 1e6
FORMS = {
    "centred": "Token energy, centred",
    "raw": "Token energy, raw",
    "update": "Energy of each block's update",
}
UNITS = {"centred": "median token: 1", "raw": "L2 norm", "update": "L2 norm"}


def write(run: Run, record: Mapping[str, Any] | None = None) -> Path:
    """Make `index.html` of a run folder; returns its path. `record` as in `gather`."""
    return write_page(run.folder, gather(run, record))


def write_page(folder: Path, page: Page) -> Path:
    """Make `index.html` of a page in a folder; returns its path."""
    path, html = folder / NAME, render(page)
    replace_file(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    return path


def gather(run: Run, record: Mapping[str, Any] | None = None) -> Page:
    """The page of a run folder. Raises MinicosError for a damaged file.

    `record` is the content of run.json, for a folder inside a run, which has none of its own.
    """
    record = read_json(run.path("run.json")) if record is None else record
    settings = record.get("settings", {}) if isinstance(record, Mapping) else None
    if not isinstance(settings, Mapping):
        raise kept.wrong(run.path("run.json"), '"settings" has to be an object')
    sigmas = _sigmas(run)
    result = read(run.folder) if run.has(FILE) else None
    verb = _verb(record)
    reading = READINGS.get(verb, Reading("", ""))
    pictures = _pictures(run, () if result is None else result.files)
    clips = [*_clips(run, sigmas), *_videos(run)]
    model = {**settings, "lead": record.get("lead")}
    maps = [*_energy(run, model), *_attention(run, model)]
    touch = reading.touch if clips or maps else ""
    return Page(
        title=f"minicos {verb}".strip(),
        command=str(record.get("command", "")),
        prompt=str(settings.get("prompt") or ""),
        summary=_summary(settings, record),
        reading=f"{reading.shows} {reading.read} {touch}".strip(),
        picture=kept.picture(run.path("first_frame.png")),
        sigmas=sigmas,
        fps=max(1, int(kept.number(run.path("run.json"), settings, "fps", 16))),
        clips=clips,
        maps=maps,
        curves=[*_convergence(run), *_charts(run, () if result is None else result.files)],
        marks=_marks(run),
        tables=[] if result is None else _tables(result),
        pictures=pictures,
        settings=settings,
        files=_files(run),
        next=reading.next,
    )


def _sigmas(run: Run) -> list[float]:
    """Sigma of every step and after the last one; empty if the run stores no schedule."""
    if not run.has("schedule.json"):
        return []
    schedule = run.load_json("schedule.json")
    sigmas = schedule.get("sigmas", []) if isinstance(schedule, dict) else None
    if not isinstance(sigmas, list) or not all(
        type(s) in (int, float) and abs(s) <= LARGEST_SIGMA for s in sigmas
    ):
        raise kept.wrong(run.path("schedule.json"), '"sigmas" has to be a list of numbers')
    return [float(s) for s in sigmas]


def _verb(record: Mapping[str, Any]) -> str:
    words = str(record.get("command", "")).split()
    return words[1] if len(words) > 1 else ""


def _summary(settings: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    size = settings.get("size")
    pixels = " x ".join(map(str, size)) if isinstance(size, list) else ""  # of puzzles: cells
    parts = [
        f"model {settings.get('model')}",
        ""
        if "counts" in settings
        else f"{settings.get('steps')} steps of {settings.get('solver')}",
        f"seed {settings.get('seed')}",
        f"{settings.get('n')} puzzles" if settings.get("prompt") is None else "",
        f"{settings.get('frames')} frames of {pixels}" if pixels else "",
        f"device {record.get('device')}" if record.get("device") else "",
    ]
    return ", ".join(part for part in parts if part and "None" not in part)


def _pictures(run: Run, first: Sequence[str]) -> list[Picture]:
    """The figures of the folder, those of the result first. Curves are drawn by the page itself,
    and sheets of single steps are not included.
    """
    found = [
        path.name
        for path in sorted(run.folder.glob("*.png"))
        if path.name not in ("first_frame.png", "preview.png")
        and not path.with_suffix(".json").exists()
        and path.is_file()
        and path.stat().st_size <= LIMIT
    ]
    ordered = dict.fromkeys([*(name for name in first if name in found), *found])
    named = list(ordered)[:MOST_PICTURES]
    return [Picture(name, run.path(name).read_bytes()) for name in named]


# -- videos ----------------------------------------------------------------------------------------


def _clips(run: Run, sigmas: Sequence[float]) -> list[Clip]:
    """The decoded clean estimates, in order, and the result."""
    clips = []
    for path in sorted(run.folder.glob("x0/step_*.mp4")):
        found = re.fullmatch(r"step_(\d{1,6})", path.stem, re.ASCII)
        if found is None:  # not one of the run's
            continue
        step = int(found[1])
        sigma = f", σ {sigmas[step]:.2f}" if step < len(sigmas) else ""
        name = path.relative_to(run.folder).as_posix()
        clips.append(Clip(step, f"step {step}{sigma}", _video(path), name))
    if run.path("video.mp4").exists():
        label = "the result" if clips else "the video"
        clips.append(Clip(None, label, _video(run.path("video.mp4")), "video.mp4"))
    return clips


def _videos(run: Run) -> list[Clip]:
    """The videos that a study lists, side by side."""
    listed = kept.objects(run, VIDEOS, ("file", "label"))[:MOST_VIDEOS]
    paths = [kept.inside(run, VIDEOS, one["file"]) for one in listed]
    return [
        Clip(None, str(one["label"]), _video(path), str(one["file"]))
        for one, path in zip(listed, paths, strict=True)
        if path.exists()
    ]


def _video(path: Path) -> np.ndarray:
    return np.asarray(load_video(path))


# -- maps ------------------------------------------------------------------------------------------


def _over(settings: Mapping[str, Any], frames: int) -> tuple[int, int]:
    """`stride` and `lead` of a map with so many frames of tokens; they differ between models."""
    videos, lead = settings.get("frames"), settings.get("lead")
    before = lead if type(lead) is int and 0 < lead < frames else 0
    if type(videos) is not int or not 0 < videos < kept.MOST or frames < 2:
        return Map.stride, before
    return max(1, round((videos - 1) / (frames - 1))), before


def _energy(run: Run, settings: Mapping[str, Any]) -> list[Map]:
    """Every form of every branch, centred first: raw energy is dominated by frame 0."""
    words = {"uncond": "unprompted"}
    if not run.has("energy.safetensors"):
        return []
    saved = run.load_tensors("energy.safetensors")  # "cond.raw": step layer f h w
    maps = []
    branches = {key.rpartition(".")[0] for key in saved}  # as named by the model that was watched
    for branch in sorted(branches):
        for form, name in FORMS.items():
            if f"{branch}.{form}" in saved:
                values = kept.table(run, "energy.safetensors", saved, f"{branch}.{form}", 5)
                steps, layers, f, h, w = values.shape
                title = name if branch == "cond" else f"{name}, {words.get(branch, branch)} branch"
                axes = range(steps), range(layers)
                over = _over(settings, f)
                maps.append(Map(title, values, *axes, (f, h, w), *over, unit=UNITS[form]))
    return maps


def _attention(run: Run, settings: Mapping[str, Any]) -> list[Map]:
    """Mass received by every token, and between every pair of tokens if the run stored it."""
    if not run.has("attention.safetensors"):
        return []
    saved = run.load_tensors("attention.safetensors")  # "step3.received.6": f h w
    maps = []
    for what, name, kind in (
        ("received", "Attention received", "tokens"),
        ("pairs", "Attention between tokens: click one", "pairs"),
    ):
        keys = [re.fullmatch(rf"step(\d{{1,6}})\.{what}\.(\d{{1,6}})", key) for key in saved]
        found = [(int(m[1]), int(m[2])) for m in keys if m]
        if not found:
            continue
        steps, layers = (sorted(set(part)) for part in zip(*found, strict=True))
        tokens = _grids(run, saved, steps, layers, "received").shape[2:]
        values = _grids(run, saved, steps, layers, what)
        (f, h, w), unit = values.shape[2:5], "mean token: 1"
        if kind == "pairs":
            values, unit = (
                values.reshape(*values.shape[:2], f * h * w, -1),
                "share of its attention",
            )
            if (f, h, w) != tokens:
                name += f", in {f * h * w} cells of {math.prod(tokens)} tokens"
        maps.append(
            Map(
                name,
                values,
                steps,
                layers,
                (f, h, w),
                *_over(settings, tokens[0]),
                unit,
                kind,
                latents=tokens[0],
            )
        )
    return maps


def _grids(
    run: Run, saved: Mapping[str, Tensor], steps: Sequence[int], layers: Sequence[int], what: str
) -> np.ndarray:
    """Attention of every step and layer: step layer f h w, and twice f h w of pairs."""
    file, dims = "attention.safetensors", 3 if what == "received" else 6
    each = [
        [kept.table(run, file, saved, f"step{s}.{what}.{k}", dims) for k in layers] for s in steps
    ]
    shapes = {values.shape for row in each for values in row}
    if len(shapes) > 1 or any(shape[:3] != shape[-3:] for shape in shapes):
        raise kept.wrong(run.path(file), f'"{what}" has maps of shapes {sorted(shapes)[:3]}')
    return np.stack([np.stack(row) for row in each])


# -- curves and numbers ----------------------------------------------------------------------------


def _convergence(run: Run) -> list[Curve]:
    if not run.has("convergence.safetensors"):
        return []
    file = "convergence.safetensors"
    moved = kept.table(run, file, run.load_tensors(file), "moved", 2)  # step f
    series = [Series(f"latent frame {f}", line) for f, line in enumerate(moved.T) if _some(line)]
    title = "How far each frame of the estimate still is from the final one"
    return [Curve(title, "denoising step", range(len(moved)), series, follows="step", ends=(0, 1))]


def _some(line: np.ndarray) -> bool:
    return bool(np.isfinite(line).any())


def _charts(run: Run, first: Sequence[str]) -> list[Curve]:
    """The curves stored next to their figures, as `figures.lines` writes them, those of the result
    first.
    """
    found = []
    order = {Path(name).stem: i for i, name in enumerate(first)}
    paths = run.folder.glob("*.json")
    for path in sorted(paths, key=lambda path: (order.get(path.stem, len(order)), path.name)):
        if path.with_suffix(".png").exists() and path.is_file():
            try:
                found.append(_chart(json.loads(path.read_text(encoding="utf-8"))))
            except NOT_A_CHART:
                continue  # a file of another kind with the picture's name
    return found


def _chart(kept: Mapping[str, Any]) -> Curve:
    curves = kept["curves"]
    axis = str(curves[0]["x_label"])
    x = sorted({float(at) for c in curves for at in c["x"]})
    whole = all(at.is_integer() for at in x)
    follows = "step" if "step" in axis else "layer" if "layer" in axis else ""
    return Curve(
        title=str(kept["title"]),
        axis=axis,
        x=[int(at) for at in x] if whole else x,
        series=[
            Series(
                str(c["name"]),
                _on(x, c["x"], c["value"]),
                _on(x, c["x"], c["low"]) if c["low"] else None,
                _on(x, c["x"], c["high"]) if c["high"] else None,
            )
            for c in curves
        ],
        unit=str(kept["unit"]),
        follows=follows if whole else "",
        marks={str(k): float(v) for k, v in kept["marks"].items()},
        levels={str(k): float(v) for k, v in kept["levels"].items()},
        falling=bool(kept.get("falling", False)),
    )


def _on(
    x: Sequence[float], own: Sequence[float], values: Sequence[float | None]
) -> list[float | None]:
    """Values on the axis that all curves of a chart share; None where a curve has no point."""
    pairs = zip(map(float, own), values, strict=True)
    known = {at: float("nan") if v is None else v for at, v in pairs}
    return [known.get(at) for at in x]


def _tables(result: Result) -> list[Table]:
    """The numbers, then the tables of details."""
    tables = []
    if result.numbers:
        columns = ("finding", "value", "95 % interval", "n", "unit", "compared with")
        rows = [
            (n.name, n.value, brief(n).partition(" ")[2].strip("[]"), n.n, n.unit, n.note)
            for n in result.numbers
        ]
        tables.append(Table("Numbers", columns, rows))
    for name, details in result.tables.items():
        if details:
            head, *lines = cells(details)
            tables.append(Table(name.capitalize(), head, lines))
    return tables


# -- interventions ---------------------------------------------------------------------------------


def _marks(run: Run) -> list[Where]:
    """The interventions of the run, and where they act."""
    axes = ("steps", "frames", "layers")
    listed = kept.objects(run, INTERVENTIONS, ("label", *axes))
    path = run.path(INTERVENTIONS)
    return [
        Where(str(one["label"]), *(kept.indices(path, one[axis]) for axis in axes))
        for one in listed
    ]


def _files(run: Run) -> list[str]:
    """What else the folder holds for people to open: its own files before those of its folders."""
    found = (p for p in run.folder.rglob("*") if p.suffix in {".png", ".mp4", ".json", ".md"})
    names = (p.relative_to(run.folder).as_posix() for p in found)
    listed = (name for name in names if not name.startswith(UNLISTED))
    return sorted(listed, key=lambda name: (name.count("/"), name))[:40]
