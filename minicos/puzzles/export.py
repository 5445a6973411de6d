"""Write puzzles as files, one folder each, in the layout of VBVR-Bench."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from .base import Puzzle

FPS = 16


def export(puzzle: Puzzle, i: int, folder: str | os.PathLike, scale: int = 1) -> Path:
    """Write candidate i as `first_frame.png`, `final_frame.png`, `ground_truth.mp4`, `prompt.txt` in a new `folder`.

    The files are written next to it and the folder is renamed into place, so that a folder that exists is complete.
    `scale` repeats pixels (6 makes a 4x4 puzzle 384 px wide).
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a folder that exists is complete")
    folder.parent.mkdir(parents=True, exist_ok=True)
    video = puzzle.draw(i).repeat(scale, axis=1).repeat(scale, axis=2)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_png(unfinished / "first_frame.png", video[0])
        write_png(unfinished / "final_frame.png", video[-1])
        write_mp4(unfinished / "ground_truth.mp4", video)
        (unfinished / "prompt.txt").write_text(puzzle.prompt + "\n", encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp makes folders only the owner can read
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def write_png(path: Path, frame: np.ndarray) -> None:
    """Write one frame uint8 (h, w, 3), lossless."""
    _encode(path, frame[None], "png", "rgb24", {}, container="image2")


def write_mp4(path: Path, video: np.ndarray) -> None:
    """Write a video uint8 (f, h, w, 3) as H.264 that every player opens; short groups of pictures make seeking fast."""
    _encode(path, video, "libx264", "yuv420p", {"crf": "10", "g": "12"})


def _encode(path: Path, video: np.ndarray, codec: str, layout: str, options: dict, container: str | None = None):
    import av  # the only dependency beyond numpy, and only for writing files

    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], layout
        for frame in video:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        out.mux(stream.encode())
