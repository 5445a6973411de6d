"""Read a finished run folder into a page: whatever of videos, energy, attention, curves and numbers
it holds.

Nothing is computed here; a page shows what the run's own files say. A file that is missing is a
part of the page that is missing, and `index.html` can be made again at any time from the folder
alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minicos.analysis.reading import READINGS, Reading
from minicos.analysis.result import FILE, Result, brief, cells, read
from minicos.analysis.tools.shown import INTERVENTIONS, VIDEOS
from minicos.errors import MinicosError
from minicos.media import load_video
from minicos.runs import Run, read_json, replace_file

from .content import Clip, Curve, Map, Mark, Page, Picture, Series, Table, render

NAME = "index.html"
MOST_PICTURES, MOST_VIDEOS = 24, 24  # on one page
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
    """The page of a run folder. Raises MinicosError for a file that is damaged.

    record  what its run.json holds, for a folder inside a run, which has none
    """
    record = read_json(run.path("run.json")) if record is None else record
    settings: Mapping[str, Any] = record.get("settings", {})
    sigmas = _sigmas(run)
    result = read(run.folder) if run.has(FILE) else None
    verb = _verb(record)
    reading = READINGS.get(verb, Reading("", ""))
    pictures = _pictures(run, () if result is None else result.files)
    return Page(
        title=f"minicos {verb}".strip(),
        command=str(record.get("command", "")),
        prompt=str(settings.get("prompt") or ""),
        summary=_summary(settings, record),
        reading=f"{reading.shows} {reading.read}".strip(),
        picture=_picture(run.path("first_frame.png")),
        sigmas=sigmas,
        fps=int(settings.get("fps") or 16),
        clips=[*_clips(run, sigmas), *_videos(run)],
        maps=[*_energy(run, settings), *_attention(run, settings)],
        curves=[*_convergence(run), *_charts(run, () if result is None else result.files)],
        marks=_marks(run),
        tables=[] if result is None else _tables(result),
        pictures=pictures,
        settings=settings,
        files=_files(run),
        next=reading.next,
    )


def _sigmas(run: Run) -> list[float]:
    """Sigma of every step and after the last one; none where the run keeps no schedule."""
    if not run.has("schedule.json"):
        return []
    schedule = run.load_json("schedule.json")
    sigmas = schedule.get("sigmas", []) if isinstance(schedule, dict) else None
    if not isinstance(sigmas, list) or not all(
        type(s) in (int, float) and abs(s) <= LARGEST_SIGMA for s in sigmas
    ):
        raise MinicosError(
            f'{run.path("schedule.json")} is not what a run writes: "sigmas" has to be a list of '
            "numbers. Delete it and run the command again."
        )
    return [float(s) for s in sigmas]


def _verb(record: Mapping[str, Any]) -> str:
    words = str(record.get("command", "")).split()
    return words[1] if len(words) > 1 else ""


def _summary(settings: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    size = settings.get("size")
    pixels = " x ".join(map(str, size)) if isinstance(size, list) else ""  # of puzzles: cells
    parts = [
        f"model {settings.get('model')}",
        f"{settings.get('steps')} steps of {settings.get('solver')}",
        f"seed {settings.get('seed')}",
        f"{settings.get('n')} puzzles" if settings.get("prompt") is None else "",
        f"{settings.get('frames')} frames of {pixels}" if pixels else "",
        f"device {record.get('device')}" if record.get("device") else "",
    ]
    return ", ".join(part for part in parts if part and "None" not in part)


def _picture(path: Path) -> np.ndarray | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _pictures(run: Run, first: Sequence[str]) -> list[Picture]:
    """The figures of the folder, those of the result in front. Curves are drawn by the page itself,
    and sheets of single steps are left to their files.
    """
    found = [
        path.name
        for path in sorted(run.folder.glob("*.png"))
        if path.name not in ("first_frame.png", "preview.png")
        and not path.with_suffix(".json").exists()
    ]
    ordered = dict.fromkeys([*(name for name in first if name in found), *found])
    named = list(ordered)[:MOST_PICTURES]
    return [Picture(name, run.path(name).read_bytes()) for name in named]


# -- videos ----------------------------------------------------------------------------------------


def _clips(run: Run, sigmas: Sequence[float]) -> list[Clip]:
    """The clean estimates that were decoded, in their order, and the result."""
    clips = []
    for path in sorted(run.folder.glob("x0/step_*.mp4")):
        step = int(path.stem.split("_")[1])
        sigma = f", σ {sigmas[step]:.2f}" if step < len(sigmas) else ""
        name = path.relative_to(run.folder).as_posix()
        clips.append(Clip(step, f"step {step}{sigma}", _video(path), name))
    if run.path("video.mp4").exists():
        label = "the result" if clips else "the video"
        clips.append(Clip(None, label, _video(run.path("video.mp4")), "video.mp4"))
    return clips


def _videos(run: Run) -> list[Clip]:
    """The videos that a study lists, side by side."""
    listed = run.load_json(VIDEOS) if run.has(VIDEOS) else []
    return [
        Clip(None, str(one["label"]), _video(run.path(one["file"])), one["file"])
        for one in listed[:MOST_VIDEOS]
        if run.path(one["file"]).exists()
    ]


def _video(path: Path) -> np.ndarray:
    return np.asarray(load_video(path))


# -- maps ------------------------------------------------------------------------------------------


def _stride(settings: Mapping[str, Any], frames: int) -> int:
    """Video frames to a frame of tokens after the first, which no two models have alike."""
    videos = settings.get("frames")
    if not isinstance(videos, int) or frames < 2:
        return Map.stride
    return max(1, round((videos - 1) / (frames - 1)))


def _energy(run: Run, settings: Mapping[str, Any]) -> list[Map]:
    """Every form of every branch, centred first: raw energy is dominated by frame 0."""
    words = {"uncond": "unprompted"}
    if not run.has("energy.safetensors"):
        return []
    saved = run.load_tensors("energy.safetensors")  # "cond.raw": step layer f h w
    maps = []
    branches = {key.rpartition(".")[0] for key in saved}  # as the model that was watched names them
    for branch in sorted(branches):
        for form, name in FORMS.items():
            values = saved.get(f"{branch}.{form}")
            if values is not None:
                steps, layers, *grid = values.shape
                title = name if branch == "cond" else f"{name}, {words.get(branch, branch)} branch"
                f, h, w = grid
                maps.append(
                    Map(
                        title,
                        values.numpy(),
                        range(steps),
                        range(layers),
                        (f, h, w),
                        stride=_stride(settings, f),
                        unit=UNITS[form],
                    )
                )
    return maps


def _attention(run: Run, settings: Mapping[str, Any]) -> list[Map]:
    """Mass that every token receives, and between every pair of tokens where the run kept it."""
    if not run.has("attention.safetensors"):
        return []
    saved = run.load_tensors("attention.safetensors")  # "step3.received.6": f h w
    maps = []
    for what, name, kind in (
        ("received", "Attention received", "tokens"),
        ("pairs", "Attention between tokens: click one", "pairs"),
    ):
        keys = [re.fullmatch(rf"step(\d+)\.{what}\.(\d+)", key) for key in saved]
        found = [(int(m[1]), int(m[2])) for m in keys if m]
        if not found:
            continue
        steps, layers = (sorted(set(part)) for part in zip(*found, strict=True))
        first = saved[f"step{steps[0]}.received.{layers[0]}"]
        coarse = saved[f"step{steps[0]}.{what}.{layers[0]}"].shape[:3]
        (f, h, w), cells = (int(n) for n in coarse), int(np.prod(coarse))
        values = np.stack(
            [[saved[f"step{s}.{what}.{k}"].float().numpy() for k in layers] for s in steps]
        )
        if kind == "pairs":
            values = values.reshape(*values.shape[:2], cells, cells)
            unit = "share of its attention"
            if tuple(coarse) != tuple(first.shape):
                name += f", in {cells} cells of {first.numel()} tokens"
        else:
            unit = "mean token: 1"
        maps.append(
            Map(
                name,
                values,
                steps,
                layers,
                (f, h, w),
                stride=_stride(settings, len(first)),
                unit=unit,
                kind=kind,
                latents=len(first),
            )
        )
    return maps


# -- curves and numbers ----------------------------------------------------------------------------


def _convergence(run: Run) -> list[Curve]:
    if not run.has("convergence.safetensors"):
        return []
    saved = run.load_tensors("convergence.safetensors").get("moved")
    if saved is None or saved.ndim != 2:
        raise MinicosError(
            f"{run.path('convergence.safetensors')} is not what a run writes: it has no table "
            '"moved" of steps and frames. Delete it and run the command again.'
        )
    moved = saved.numpy()  # step f
    series = [Series(f"latent frame {f}", line) for f, line in enumerate(moved.T) if _some(line)]
    title = "How far each frame of the estimate still is from the final one"
    return [Curve(title, "denoising step", range(len(moved)), series, follows="step", ends=(0, 1))]


def _some(line: np.ndarray) -> bool:
    return bool(np.isfinite(line).any())


def _charts(run: Run, first: Sequence[str]) -> list[Curve]:
    """The curves that lie beside their figures, as `figures.lines` writes them, those of the result
    in front.
    """
    found = []
    order = {Path(name).stem: i for i, name in enumerate(first)}
    paths = run.folder.glob("*.json")
    for path in sorted(paths, key=lambda path: (order.get(path.stem, len(order)), path.name)):
        if path.with_suffix(".png").exists():
            try:
                found.append(_chart(json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                continue  # a file of another kind beside a picture of its name
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
    )


def _on(x: Sequence[float], own: Sequence[float], values: Sequence[float | None]) -> list[float]:
    """Values on the axis that all curves of a chart share; NaN where a curve has none."""
    known = {at: v for at, v in zip(map(float, own), values, strict=True) if v is not None}
    return [known.get(at, float("nan")) for at in x]


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


def _marks(run: Run) -> list[Mark]:
    """The interventions of the run, and where they act."""
    listed = run.load_json(INTERVENTIONS) if run.has(INTERVENTIONS) else []
    return [Mark(one["label"], one["steps"], one["frames"], one["layers"]) for one in listed]


def _files(run: Run) -> list[str]:
    """What else the folder holds for people to open."""
    found = (p for p in run.folder.rglob("*") if p.suffix in {".png", ".mp4", ".json", ".md"})
    names = sorted(p.relative_to(run.folder).as_posix() for p in found)
    return [name for name in names if not name.startswith(("x0/", "steps/", "."))][:40]
