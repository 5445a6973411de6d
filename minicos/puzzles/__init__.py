"""Procedurally drawn puzzles: what the embedded model is trained and judged on.

    p = puzzles.make("maze", seed=0, size=4, split="test")
    p.prompt, p.candidates            # what is asked, every valid answer
    p.draw(0)                         # the video of an answer: uint8 (13, h, w, 3), 16 px per cell
    p.score(video)                    # solved? which answer? why not?

Pure numpy; `export` alone needs `av`. Sizes: 3, 4 or 5 cells for `maze` and `goal`, 3 or 4 for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from random import Random

from minicos.errors import MinicosError

from .base import FRAMES, Puzzle, Score, timeline
from .draw import CELL
from .export import export
from .mark import Mark
from .maze import Goal, Maze
from .memory import Memory
from .turn import Turn

PUZZLES: dict[str, type[Puzzle]] = {cls.kind: cls for cls in (Maze, Mark, Goal, Memory, Turn)}
KINDS = tuple(PUZZLES)
SPLITS = ("train", "dev", "test")

__all__ = [
    "CELL",
    "FRAMES",
    "KINDS",
    "PUZZLES",
    "SPLITS",
    "Puzzle",
    "Score",
    "distinct",
    "export",
    "make",
    "split_of",
    "timeline",
]


def make(kind: str, seed: int, size: int = 4, split: str = "train") -> Puzzle:
    """The puzzle of this seed: a pure function of its arguments. Puzzles are drawn until one belongs to `split`."""
    if kind not in PUZZLES:
        raise MinicosError(f"unknown kind {kind!r}: one of {', '.join(KINDS)}")
    cls = PUZZLES[kind]
    if size not in cls.sizes:
        raise MinicosError(f"no {kind} of size {size}: one of {', '.join(map(str, cls.sizes))}")
    if split not in SPLITS:
        raise MinicosError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    rng = Random(f"{kind}/{size}/{split}/{seed}")
    while True:
        puzzle = cls.sample(rng, size)
        if split_of(puzzle.key) == split:
            return puzzle


def distinct(
    kind: str,
    n: int,
    size: int = 4,
    split: str = "test",
    keep: Callable[[Puzzle], bool] = lambda puzzle: True,
) -> list[Puzzle]:
    """The first n distinct (picture, prompt) pairs of a split that `keep` accepts. Raises MinicosError where there are not so many."""
    found: dict[str, Puzzle] = {}
    for seed in range(100 * n):
        puzzle = make(kind, seed, size, split)
        if keep(puzzle):
            found.setdefault(f"{puzzle.key}: {puzzle.prompt}", puzzle)
        if len(found) == n:
            return list(found.values())
    raise MinicosError(
        f"there are not {n} distinct {kind} puzzles of size {size} in the {split} split: ask for fewer"
    )


def split_of(key: str) -> str:
    """Which split a picture belongs to: 90 % train, 5 % dev, 5 % test, by its canonical key and never by a seed."""
    percent = int.from_bytes(sha256(key.encode()).digest()[:8], "big") % 100
    return "train" if percent < 90 else "dev" if percent < 95 else "test"
