"""Read a finished run folder into a page: whatever of videos, energy, attention, curves and numbers
it holds.

Nothing is computed here; a page shows what the run's own files say. A file that is missing is a
part of the page that is missing, and `index.html` can be made again at any time from the folder
alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minicos.analysis.result import FILE, Result, brief, read
from minicos.media import load_video
from minicos.runs import Run, read_json, replace_file

from .content import Clip, Curve, Map, Mark, Page, Series, render

NAME = "index.html"
NEXT = {  # commands that run as they are, on the embedded model
    "noise": "See what noise in a step or in a frame destroys",
    "swap": "Find the layer at which a prompt becomes an answer",
    "commitment": "Find the step at which the answer is decided",
    "belief": "Compare the network with an ideal observer",
}
FORMS = {
    "centred": "Token energy, centred",
    "raw": "Token energy, raw",
    "update": "Energy of each block's update",
}


def write(run: Run) -> Path:
    """Make `index.html` of a run folder; returns its path."""
    page = gather(run)
    path = run.path(NAME)
    replace_file(path, lambda temporary: temporary.write_text(render(page), encoding="utf-8"))
    return path


def gather(run: Run) -> Page:
    """The page of a run folder. Raises MinicosError for a file that is damaged."""
    record: Mapping[str, Any] = read_json(run.path("run.json"))
    settings: Mapping[str, Any] = record.get("settings", {})
    schedule = run.load_json("schedule.json") if run.has("schedule.json") else {}
    sigmas: Sequence[float] = schedule.get("sigmas", ())
    result = read(run.folder) if run.has(FILE) else None
    verb = _verb(record)
    return Page(
        title=f"minicos {verb}".strip(),
        command=str(record.get("command", "")),
        prompt=str(settings.get("prompt") or ""),
        summary=_summary(settings, record),
        picture=_picture(run.path("first_frame.png")),
        sigmas=sigmas,
        fps=int(settings.get("fps") or 16),
        clips=_clips(run, sigmas),
        maps=[*_energy(run), *_attention(run)],
        curves=[*_convergence(run), *([] if result is None else _curves(result))],
        marks=_marks(settings),
        numbers=[] if result is None else _numbers(result),
        settings=settings,
        files=_files(run),
        next=[
            (why, f"minicos {name} --out runs/{name}") for name, why in NEXT.items() if name != verb
        ][:3],
    )


def _verb(record: Mapping[str, Any]) -> str:
    words = str(record.get("command", "")).split()
    return words[1] if len(words) > 1 else ""


def _summary(settings: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    size = settings.get("size") or ()
    parts = [
        f"model {settings.get('model')}",
        f"{settings.get('steps')} steps of {settings.get('solver')}",
        f"seed {settings.get('seed')}",
        f"{settings.get('frames')} frames of {' x '.join(map(str, size))}" if size else "",
        f"device {record.get('device')}" if record.get("device") else "",
    ]
    return ", ".join(part for part in parts if part and "None" not in part)


def _picture(path: Path) -> np.ndarray | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# -- videos ----------------------------------------------------------------------------------------


def _clips(run: Run, sigmas: Sequence[float]) -> list[Clip]:
    """The clean estimates that were decoded, in their order; without any, the result."""
    clips = []
    for path in sorted(run.folder.glob("x0/step_*.mp4")):
        step = int(re.sub(r"\D", "", path.stem) or 0)
        sigma = f", σ {sigmas[step]:.2f}" if step < len(sigmas) else ""
        clips.append(Clip(step, f"step {step}{sigma}", _video(path)))
    if not clips and run.has("video.mp4"):
        last = max(0, len(sigmas) - 2)
        clips.append(Clip(last, "the result", _video(run.path("video.mp4"))))
    return clips


def _video(path: Path) -> np.ndarray:
    return np.asarray(load_video(path))


# -- maps ------------------------------------------------------------------------------------------


def _energy(run: Run) -> list[Map]:
    """Every form of every branch, centred first: raw energy is dominated by frame 0."""
    if not run.has("energy.safetensors"):
        return []
    saved = run.load_tensors("energy.safetensors")  # "cond.raw": step layer f h w
    maps = []
    for branch in ("cond", "uncond"):
        for form, name in FORMS.items():
            values = saved.get(f"{branch}.{form}")
            if values is not None:
                steps, layers, *grid = values.shape
                title = name if branch == "cond" else f"{name}, unprompted branch"
                f, h, w = grid
                maps.append(Map(title, values.numpy(), range(steps), range(layers), (f, h, w)))
    return maps


def _attention(run: Run) -> list[Map]:
    """Mass that every token receives, and between every pair of tokens where the run kept it."""
    if not run.has("attention.safetensors"):
        return []
    saved = run.load_tensors("attention.safetensors")  # "step3.received.6": f h w
    maps = []
    for what, name, kind in (
        ("pairs", "Attention between tokens", "pairs"),
        ("received", "Attention received", "tokens"),
    ):
        keys = [re.fullmatch(rf"step(\d+)\.{what}\.(\d+)", key) for key in saved]
        found = [(int(m[1]), int(m[2])) for m in keys if m]
        if not found:
            continue
        steps, layers = (sorted(set(part)) for part in zip(*found, strict=True))
        values = np.stack(
            [[saved[f"step{s}.{what}.{k}"].float().numpy() for k in layers] for s in steps]
        )
        f, h, w = saved[f"step{steps[0]}.received.{layers[0]}"].shape
        maps.append(Map(name, values, steps, layers, (f, h, w), kind=kind))
    return maps


# -- curves and numbers ----------------------------------------------------------------------------


def _convergence(run: Run) -> list[Curve]:
    if not run.has("convergence.safetensors"):
        return []
    moved = run.load_tensors("convergence.safetensors")["moved"].numpy()  # step f
    series = [Series(f"latent frame {f}", line) for f, line in enumerate(moved.T) if _some(line)]
    title = "How far each frame of the estimate still is from the final one"
    return [Curve(title, "step", range(len(moved)), series, (0, 1))]


def _some(line: np.ndarray) -> bool:
    return bool(np.isfinite(line).any())


def _curves(result: Result) -> list[Curve]:
    """A study's curves; those that share an axis and a unit share a chart."""
    groups: dict[tuple[str, str, tuple[float, ...]], list[Any]] = {}
    for curve in result.curves:
        groups.setdefault((curve.x_label, curve.unit, tuple(curve.x)), []).append(curve)
    return [
        Curve(
            unit or ", ".join(c.name for c in curves),
            "step" if "step" in label else "layer" if "layer" in label else label,
            x,
            [Series(c.name, c.value, c.low or None, c.high or None) for c in curves],
        )
        for (label, unit, x), curves in groups.items()
        if len(x) > 1
    ]


def _numbers(result: Result) -> list[Sequence[object]]:
    return [
        (n.name, n.value, brief(n).partition(" ")[2].strip("[]"), n.n, n.note)
        for n in result.numbers
    ]


# -- interventions ---------------------------------------------------------------------------------


def _marks(settings: Mapping[str, Any]) -> list[Mark]:
    """The interventions among a run's settings, and where they act."""
    marks = []
    for name in ("noise", "swap", "ensemble", "share", "mask"):
        given = settings.get(name)
        for one in given if isinstance(given, list) else [given]:
            if isinstance(one, Mapping):
                where = {k: _whole(one.get(k)) for k in ("steps", "frames", "layers")}
                how = one.get("mode") or one.get("what") or one.get("donor") or ""
                marks.append(Mark(f"{name} {how}".strip(), **where))
    return marks


def _whole(value: object) -> list[int]:
    """Indices of a setting: a number, a list of numbers, or nothing."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, list):
        return [v for v in value if isinstance(v, int)]
    return []


def _files(run: Run) -> list[str]:
    """What else the folder holds for people to open."""
    found = (p for p in run.folder.rglob("*") if p.suffix in {".png", ".mp4", ".json", ".md"})
    names = sorted(p.relative_to(run.folder).as_posix() for p in found)
    return [name for name in names if not name.startswith(("x0/", "steps/", "."))][:40]
