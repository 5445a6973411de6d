"""Write puzzles as files, one folder each, in the layout of VBVR-Bench."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from .base import Puzzle

FPS = 16


def export(puzzle: Puzzle, i: int, folder: str | os.PathLike, scale: int = 1) -> Path:
    """Write candidate i as `first_frame.png`, `final_frame.png`, `ground_truth.mp4`, `prompt.txt` in a new `folder`.

    The files are written next to it and the folder is renamed into place, so that a folder that exists is complete.
    `scale` repeats pixels (6 makes a 4x4 puzzle 384 px wide).
    """
    from minicos.media import (
        save_image,
        save_video,
    )  # here, so that puzzles can be drawn without torch

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a folder that exists is complete")
    folder.parent.mkdir(parents=True, exist_ok=True)
    video = puzzle.draw(i).repeat(scale, axis=1).repeat(scale, axis=2)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_image(unfinished / "first_frame.png", video[0])
        save_image(unfinished / "final_frame.png", video[-1])
        save_video(unfinished / "ground_truth.mp4", video, fps=FPS)
        (unfinished / "prompt.txt").write_text(puzzle.prompt + "\n", encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp makes folders only the owner can read
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder
