"""The content of a page, and its conversion to one HTML file.

Every string of a run (prompt, file names, notes) is stored as JSON and enters the document as text,
never as markup. Videos become sprites: one picture with all frames. Arrays become uint8, with their
true limits stored next to them. A page stays below `LIMIT` bytes: if a run holds more, frames are
shrunk, steps and layers are thinned, and the page says so.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from minicos.analysis.tools.shown import Where

LIMIT = 20_000_000  # bytes of a page


@dataclass(frozen=True)
class Clip:
    """A video: one step's clean estimate or, without a step, one of several results to compare."""

    step: int | None
    label: str  # shown below it
    video: np.ndarray  # uint8 (f, h, w, 3)
    file: str = ""  # in the run folder, if there is one


@dataclass(frozen=True)
class Map:
    """A number for every token, at some steps and layers, drawn over the frame.

    kind is "tokens" with values (steps, layers, f, h, w), or "pairs" with values (steps, layers, l,
    l), l = f h w, a row for the token that attends and a column for the token attended to. `lead`
    frames of tokens are not shown; the next one shows one frame of the video, and each later one
    `stride` frames.
    """

    name: str
    values: np.ndarray
    steps: Sequence[int]
    layers: Sequence[int]
    grid: tuple[int, int, int]
    stride: int = 4
    lead: int = 0
    unit: str = ""
    kind: str = "tokens"
    latents: int = 0  # frames of tokens of the run, if the map holds fewer


@dataclass(frozen=True)
class Series:
    """One line of a chart. `low` and `high` draw a band.

    NaN is a value that does not exist, and breaks the line; None is a place at which another line
    of the chart has its point, and does not.
    """

    name: str
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Curve:
    """A chart; its y axis starts at 0 unless a value is below it.

    follows is the slider that its x axis is linked to: "step", "layer" or "". marks are names and
    positions of vertical lines, levels those of horizontal lines.
    """

    title: str
    axis: str
    x: Sequence[float]
    series: Sequence[Series]
    unit: str = ""  # of the y axis
    follows: str = ""
    ends: tuple[float, float] | None = None  # the y axis spans at least these
    marks: Mapping[str, float] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    falling: bool = False  # whether x runs from high to low, as sigma does


@dataclass(frozen=True)
class Table:
    """Rows under a header; a cell may be {"href": ..., "text": ...} or {"image": uint8 (h w 3)
    or None}.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Picture:
    """A figure of the run folder, shown unchanged."""

    name: str
    png: bytes


@dataclass(frozen=True)
class Page:
    """Everything that `index.html` shows."""

    title: str
    command: str
    prompt: str = ""
    summary: str = ""
    reading: str = ""  # how to read the page, for a first-time reader
    picture: np.ndarray | None = None  # uint8 (h, w, 3)
    sigmas: Sequence[float] = ()  # steps + 1
    fps: int = 16
    clips: Sequence[Clip] = ()
    maps: Sequence[Map] = ()
    curves: Sequence[Curve] = ()
    marks: Sequence[Where] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    files: Sequence[str] = ()
    next: Sequence[tuple[str, str]] = ()  # (why, command)


def render(page: Page, limit: int = LIMIT) -> str:
    """The page as HTML of at most `limit` bytes, in the first of its `_forms` that fits. It states
    what was left out.
    """
    for form, width, thin, said in _forms(page):
        if sum(_codes(m, *thin) for m in form.maps) < limit:  # the others are not worth making
            html = _html(form, width, thin, said)
            if len(html.encode()) <= limit:
                break
    return html


Thin = tuple[int, int]  # one step in so many, one layer in so many


def _forms(page: Page) -> Iterator[tuple[Page, int, Thin, str]]:
    """A page in ever smaller forms, with the width of its frames and what to say about it.

    Frames are halved in size down to 128 pixels, figures left to their files, every second step
    dropped from clips and maps and, more slowly, every second layer; then maps and clips, the last
    ones first.
    """
    said = "To keep the page small"
    yield page, 512, (1, 1), ""
    for width in (256, 128):
        yield page, width, (1, 1), f"{said} it shows frames at most {width} pixels wide."
    said += " it shows frames at most 128 pixels wide, and figures are in separate files"
    page = replace(page, pictures=())
    yield page, 128, (1, 1), f"{said}."
    most = max([len(page.clips), *(max(len(m.steps), 4 * len(m.layers)) for m in page.maps)])
    thin = 1
    while thin <= most:
        thin *= 2
        steps, layers = thin, max(1, thin // 4)
        one = "" if layers == 1 else f" and one layer in {layers}"
        yield page, 128, (steps, layers), f"{said}; one step in {steps}{one} is shown."
    while page.maps or page.clips:
        page = replace(
            page, maps=page.maps[:-1], clips=page.clips if page.maps else page.clips[:-1]
        )
        less = "overlays and videos were left out: they are in the folder"
        yield page, 128, (steps, layers), f"{said}; {less}."


def _codes(m: Map, steps: int, layers: int) -> int:
    """Bytes of a map on a page, at least."""
    shown = len(m.steps[::steps]) * len(m.layers[::layers])
    return shown * m.values[0, 0].size * 4 // 3


def _html(page: Page, width: int, thin: Thin, done: str) -> str:
    files = resources.files(__package__)
    template, script = (
        files.joinpath(name).read_text(encoding="utf-8") for name in ("template.html", "page.js")
    )
    text = json.dumps(_data(page, width, thin, done), allow_nan=False)  # ASCII: any string fits
    text = text.replace("<", "\\u003c")  # so that data cannot end the script element
    head, rest = template.split("DATA", 1)
    middle, tail = rest.split("SCRIPT", 1)
    return head + text + middle + script + tail


def _data(page: Page, width: int, thin: Thin, done: str) -> dict[str, Any]:
    steps = [clip for clip in page.clips if clip.step is not None]
    clips = [*_thinned(steps, thin[0]), *(clip for clip in page.clips if clip.step is None)]
    maps = [_map(m, *thin) for m in page.maps]
    notes = [done] if done else []
    if maps:
        size = sum(m.values.size for m in page.maps)
        kept = sum(len(m["data"].rstrip("=")) * 3 // 4 for m in maps)
        notes.append(
            f"Overlays are rounded to 256 levels between the ends shown under them: {kept:,} of "
            f"{size:,} values."
        )
    return {
        "title": page.title,
        "prompt": page.prompt,
        "summary": page.summary,
        "reading": page.reading,
        "command": page.command,
        "picture": None if page.picture is None else _image(_small(page.picture[None], width)[0]),
        "sigmas": [float(s) for s in page.sigmas],
        "fps": page.fps,
        "frames": max((len(c.video) for c in clips), default=_frames(page.maps)),
        "clips": [_clip(c, width) for c in clips],
        "maps": maps,
        "curves": [_curve(c) for c in page.curves],
        "marks": [
            {
                "label": m.label,
                "steps": [int(i) for i in m.steps],
                "frames": [int(i) for i in m.frames],
                "layers": [int(i) for i in m.layers],
            }
            for m in page.marks
        ],
        "tables": [_table(t) for t in page.tables],
        "pictures": [
            {"name": p.name, "data": f"data:image/png;base64,{base64.b64encode(p.png).decode()}"}
            for p in page.pictures
        ],
        "settings": [[k, _plain(v)] for k, v in page.settings.items()],
        "files": list(page.files),
        "next": [{"why": why, "command": command} for why, command in page.next],
        "thinned": " ".join(notes),
    }


def _table(table: Table) -> dict[str, Any]:
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    return {"title": table.title, "columns": list(table.columns), "rows": rows}


def _cell(cell: object) -> Any:
    if isinstance(cell, dict) and "image" in cell:
        picture = cell["image"]  # None where there is none
        return picture if picture is None else {"image": _image(_small(picture[None], 160)[0])}
    return _plain(cell)


def _thinned(items: Sequence[Any], thin: int) -> list[Any]:
    """Every `thin`-th item, and the last."""
    kept = list(items[::thin])
    return kept if not items or (len(items) - 1) % thin == 0 else [*kept, items[-1]]


def _frames(maps: Sequence[Map]) -> int:
    return max((m.stride * (_latents(m) - m.lead - 1) + 1 for m in maps), default=1)


def _latents(m: Map) -> int:
    return m.latents or m.grid[0]


def _small(video: np.ndarray, width: int) -> np.ndarray:
    """A video (f, h, w, 3) at most `width` pixels wide, aspect kept."""
    h, w = video.shape[1:3]
    if w <= width:
        return video
    size = (width, max(1, round(h * width / w)))
    frames = [Image.fromarray(f).resize(size, Image.Resampling.BOX) for f in video]
    return np.stack([np.asarray(f) for f in frames])


def _clip(clip: Clip, width: int) -> dict[str, Any]:
    video = _small(clip.video, width)
    f, h, w, _ = video.shape
    columns = math.ceil(math.sqrt(f))
    rows = math.ceil(f / columns)
    sheet = np.zeros((rows * h, columns * w, 3), np.uint8)
    for i, frame in enumerate(video):
        r, c = divmod(i, columns)
        sheet[r * h : (r + 1) * h, c * w : (c + 1) * w] = frame
    return {
        "step": clip.step,
        "label": clip.label,
        "file": clip.file,
        "frames": f,
        "width": w,
        "height": h,
        "columns": columns,
        "sprite": _image(sheet),
    }


def _image(picture: np.ndarray) -> str:
    """A picture (h, w, 3) as a data URL: PNG, or JPEG if PNG is large and JPEG smaller."""
    image, png, jpeg = Image.fromarray(picture), io.BytesIO(), io.BytesIO()
    image.save(png, "png")
    kind, data = "png", png.getvalue()
    if len(data) > 200_000:
        image.save(jpeg, "jpeg", quality=88)
        if len(jpeg.getvalue()) < len(data):
            kind, data = "jpeg", jpeg.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _map(m: Map, thin: int, thin_layers: int) -> dict[str, Any]:
    keep = _thinned(range(len(m.steps)), thin)
    layers = _thinned(range(len(m.layers)), thin_layers)
    values = np.asarray(m.values, np.float32)[np.ix_(keep, layers)]
    flat = values.reshape(values.shape[0] * values.shape[1], -1)
    finite = np.where(np.isfinite(flat), flat, np.nan)
    blank = np.asarray(np.isnan(finite).all(axis=1))
    low = np.zeros(len(flat), np.float32) if m.kind == "pairs" else _ends(finite, blank, np.nanmin)
    high = _ends(finite, blank, np.nanmax)
    span = np.where(high > low, high - low, 1)[:, None]
    codes = np.nan_to_num(np.rint(255 * (finite - low[:, None]) / span)).astype(np.uint8)
    return {
        "name": m.name,
        "kind": m.kind,
        "unit": m.unit,
        "steps": [int(m.steps[i]) for i in keep],
        "layers": [int(m.layers[k]) for k in layers],
        "grid": list(m.grid),
        "stride": m.stride,
        "lead": m.lead,
        "latents": _latents(m),
        "low": low.tolist(),
        "high": high.tolist(),
        "data": base64.b64encode(codes.tobytes()).decode(),
    }


def _ends(rows: np.ndarray, blank: np.ndarray, end: Any) -> np.ndarray:
    out = np.zeros(len(rows), np.float32)
    out[~blank] = end(rows[~blank], axis=1)
    return out


def _curve(curve: Curve) -> dict[str, Any]:
    low, high = curve.ends or (None, None)
    return {
        "title": curve.title,
        "axis": curve.axis,
        "unit": curve.unit,
        "follows": curve.follows,
        "marks": [[name, _plain(at)] for name, at in curve.marks.items()],
        "levels": [[name, _plain(at)] for name, at in curve.levels.items()],
        "falling": curve.falling,
        "x": [_plain(x) for x in curve.x],
        "from": low,
        "to": high,
        "series": [
            {
                "name": s.name,
                "y": [_plain(y) for y in s.y],
                "gaps": [i for i, y in enumerate(s.y) if y is not None and not math.isfinite(y)],
                "low": None if s.low is None else [_plain(y) for y in s.low],
                "high": None if s.high is None else [_plain(y) for y in s.high],
            }
            for s in curve.series
        ],
    }


def _plain(value: object) -> Any:
    """A JSON value: NaN and infinity become null, unknown types their text."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) for v in value)
    return str(value)
