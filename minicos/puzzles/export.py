"""Write puzzles as files, one folder each, in the layout of VBVR-Bench; and show several in one
picture.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .base import Puzzle

FPS = 16
OTHERS = 3  # further answers of a puzzle, and foils, to export and show
GAP = 4  # px between the pictures of a sheet


def export(puzzle: Puzzle, i: int, folder: str | os.PathLike[str], scale: int = 1) -> Path:
    """Write answer i as `first_frame.png`, `final_frame.png`, `ground_truth.mp4` and `prompt.txt`
    to a new `folder`.

    Some other valid answers and some foils are in `answers/` and `foils/`. The files are written
    next to the folder and renamed into place, so an existing folder is complete. `scale` repeats
    pixels (6 makes a 4x4 puzzle 384 px wide). Raises FileExistsError.
    """
    # imported here, so that puzzles can be drawn without torch
    from minicos.media import save_image, save_video
    from minicos.runs import temporary

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a folder that exists is complete")
    unfinished = temporary(folder)
    unfinished.mkdir(parents=True)
    try:
        video = _scaled(puzzle.draw(i), scale)
        save_image(unfinished / "first_frame.png", video[0])
        save_image(unfinished / "final_frame.png", video[-1])
        save_video(unfinished / "ground_truth.mp4", video, fps=FPS)
        (unfinished / "prompt.txt").write_text(puzzle.prompt + "\n", encoding="utf-8")
        for name, indices in zip(("answers", "foils"), _others(puzzle, i), strict=True):
            for k in indices:
                (unfinished / name).mkdir(exist_ok=True)
                save_video(unfinished / name / f"{k:02d}.mp4", _scaled(puzzle.draw(k), scale), FPS)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def sheet(puzzles: Sequence[Puzzle], scale: int = 2) -> np.ndarray:
    """Puzzles of one size and length, one per row: an answer over time, the ends of others, the
    ends of foils. uint8 (h, w, 3)
    """
    rows = []
    for puzzle in puzzles:
        video = puzzle.draw(0)
        frames = [*video[np.linspace(0, len(video) - 1, 5).round().astype(int)]]
        for indices in _others(puzzle, 0):
            frames += [puzzle.draw(k)[-1] for k in indices]
            frames += [np.full_like(video[0], 255)] * (OTHERS - len(indices))
        rows.append(_joined(frames, axis=1))
    return _scaled(_joined(rows, axis=0)[None], scale)[0]


def _others(puzzle: Puzzle, i: int) -> tuple[list[int], list[int]]:
    """Indices of some valid answers other than i, and of some foils."""
    valid = len(puzzle.candidates)
    answers = [k for k in range(valid) if k != i][:OTHERS]
    return answers, list(range(valid, valid + len(puzzle.foils)))[:OTHERS]


def _scaled(video: np.ndarray, scale: int) -> np.ndarray:
    return video.repeat(scale, axis=1).repeat(scale, axis=2)


def _joined(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    padding = [(GAP, GAP) if k == axis else (0, 0) for k in range(3)]
    return np.concatenate([np.pad(p, padding, constant_values=255) for p in pictures], axis)
