"""The pictures of a noise study: sensitivity over steps, damage over later steps and frames, and
the first case's videos.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from minicos.analysis.noise.measure import Measured
from minicos.analysis.options import NoiseOptions
from minicos.analysis.result import Curve
from minicos.analysis.tools import figures
from minicos.analysis.tools.shown import save_videos
from minicos.runs import Run
from minicos.video_model import VideoModel


def draw(
    measured: Measured, curves: Sequence[Curve], options: NoiseOptions, wan: VideoModel, run: Run
) -> list[str]:
    """Write the pictures and arrays of a study; returns their names, the main one first."""
    names = [*_curves(measured, curves, run), *_matrices(measured, options, run)]
    if measured.names("frame"):
        names.append(_frames(measured, run))
    return [*names, _videos(measured, options, wan, run), "noise.safetensors"]


def _curves(measured: Measured, curves: Sequence[Curve], run: Run) -> list[str]:
    """Sensitivity and, for puzzles, what the noise costs."""
    begins = measured.boundary and {"the low-noise\nexpert begins": measured.boundary}
    names = []
    for name, part, y, title in (
        (
            "sensitivity.png",
            curves[:2],
            "distance to the clean video",
            "How much noise at one step changes the video",
        ),
        ("score.png", curves[2:], "more than in the clean run", "What noise at one step costs"),
    ):
        if part:
            far = name == "sensitivity.png"
            levels = {"another seed": 1.0} if far else None
            figures.lines(
                run.path(name),
                part,
                y=y,
                title=title,
                marks=begins or None,
                levels=levels,
                log=far,
                sigmas=measured.sigmas,
            )
            names.append(name)
    return names


def _matrices(measured: Measured, options: NoiseOptions, run: Run) -> list[str]:
    """Noised step against later step: D, 1 - CKA and, on request, 1 - CKA of a layer; and the
    arrays behind them.
    """
    steps, n = measured.noised, len(measured.sigmas) - 1
    of: dict[str, Callable[[str], np.ndarray]] = {
        "D": measured.d,
        "cka": lambda name: measured.runs[name]["cka"],
    }
    if options.layer is not None:
        of["hidden"] = lambda name: measured.runs[name]["hidden"]
    to = "of the clean estimate, to the clean run's"
    titles = {
        "D": f"D {to}",
        "cka": f"1 - CKA {to}",
        "hidden": f"1 - CKA of block {options.layer}, to the clean run",
    }
    saved = {"steps": torch.from_numpy(steps), "sigmas": torch.tensor(measured.sigmas)}
    for key, values in of.items():
        arrays = {name: np.ascontiguousarray(values(name)) for name in measured.edits}
        saved |= {f"{key}.{name}": torch.from_numpy(array) for name, array in arrays.items()}
        matrix = np.full((n, n), np.nan)
        if len(steps):
            matrix[steps] = np.stack([arrays[name].mean(0) for name in measured.names("step")])
        top = np.nanpercentile(matrix, 95) if np.isfinite(matrix).any() else 1.0
        figures.grid(
            run.path(f"{key}.png"),
            matrix,
            x="later step",
            y="noised step",
            bar="0: as the clean run",
            sigmas=measured.sigmas,
            limits=(0, max(top, 1e-9)),
            mark=measured.boundary and measured.boundary - 0.5,
            title=titles[key],
        )
    run.save_tensors("noise.safetensors", saved)
    return [f"{key}.png" for key in of]


def _frames(measured: Measured, run: Run) -> str:
    """Noised frame against frame of the video: D, frame by frame."""
    unit = measured.unit[-1]
    # D is undefined for a frame that does not vary between seeds
    unit = np.where(unit > 1e-3 * unit.max(), unit, np.nan)
    spread = np.full((len(unit), len(unit)), np.nan)
    for name in measured.names("frame"):
        moved = measured.runs[name]["squared"][:, -1].mean(0)
        spread[list(measured.edits[name].frames or ())] = moved / unit
    figures.grid(
        run.path("frames.png"),
        spread,
        x="latent frame of the video",
        y="noised latent frame",
        bar="1: another seed",
        limits=(0, 2),
        title="D, frame by frame",
    )
    return "frames.png"


def _videos(measured: Measured, options: NoiseOptions, wan: VideoModel, run: Run) -> str:
    """The first case's videos: clean, another seed, noise at some steps, in some frames."""
    steps, frames = measured.names("step"), measured.names("frame")
    shown = [
        "clean",
        *measured.names("seed")[:1],
        *(steps[i] for i in figures.evenly(len(steps), 6)),
        *(frames[i] for i in figures.evenly(len(frames), 4)),
    ]
    videos = [wan.decode(torch.from_numpy(measured.runs[name]["final"][:1]))[0] for name in shown]
    labels = [_label(name, options.mode) for name in shown]
    save_videos(run, dict(zip(labels, videos, strict=True)), wan.preset.fps)
    columns = figures.evenly(len(videos[0]), 7)
    figures.sheet(
        run.path("videos.png"),
        [list(video[columns]) for video in videos],
        rows=labels,
        columns=[f"frame {f}" for f in columns],
        title=f"Videos after noise ({options.mode}): where it was put (down), video frame (across)",
    )
    return "videos.png"


def _label(name: str, mode: str) -> str:
    """The label of an edit in a picture."""
    kind, _, index = name.partition(" ")
    if kind == "seed":
        return "another seed"
    places = {"step": f"{mode}: step {index}", "frame": f"{mode}: latent frame {index}"}
    return places.get(kind, name)
