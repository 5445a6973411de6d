"""Procedurally drawn puzzles, on which the embedded model is trained and evaluated.

    p = puzzles.make("maze", seed=0, size=4, split="test")
    p.prompt, p.candidates, p.foils   # the question, the valid answers, plausible wrong ones
    p.draw(0)                         # the video of an answer: uint8 (13, h, w, 3), 16 px per cell
    p.score(video)                    # solved? which answer? how far? why not?
    puzzles.FAMILIES["maze-one"].draw(seed=0, split="test")

A kind is a class of puzzles; a family is a kind with a size and knobs, in training or not
(`families.py`). Pure numpy; only `export` needs `av`.
"""

from __future__ import annotations

from collections.abc import Callable

from minicos.errors import MinicosError

from .base import CATEGORIES, FRAMES, FREE, Knobs, Puzzle, Score, timeline
from .draw import CELL
from .export import export
from .families import FAMILIES, PROMPTS, PUZZLES, SPLITS, WORDS, Family, split_of

KINDS = ("maze", "mark", "goal", "memory", "turn")  # kinds with several sizes

__all__ = [
    "CATEGORIES",
    "CELL",
    "FAMILIES",
    "FRAMES",
    "FREE",
    "KINDS",
    "PROMPTS",
    "PUZZLES",
    "SPLITS",
    "WORDS",
    "Family",
    "Knobs",
    "Puzzle",
    "Score",
    "distinct",
    "export",
    "family",
    "make",
    "of_kind",
    "split_of",
    "timeline",
]


def family(name: str) -> Family:
    """The family of this name. Raises MinicosError for an unknown one."""
    if name not in FAMILIES:
        raise MinicosError(f"unknown family {name!r}: one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def of_kind(kind: str, size: int = 4, knobs: Knobs = FREE) -> Family:
    """A family outside the table: a kind at any of its sizes, with any knobs. Raises MinicosError
    for others.
    """
    if kind not in PUZZLES:
        raise MinicosError(f"unknown kind {kind!r}: one of {', '.join(PUZZLES)}")
    cls = PUZZLES[kind]
    if size not in cls.sizes:
        raise MinicosError(f"no {kind} of size {size}: one of {', '.join(map(str, cls.sizes))}")
    return Family(f"{kind}/{size}", cls, size, knobs)


def make(kind: str, seed: int, size: int = 4, split: str = "train", knobs: Knobs = FREE) -> Puzzle:
    """The puzzle of a kind, size and seed: a pure function of its arguments."""
    return of_kind(kind, size, knobs).draw(seed, split)


def distinct(
    kind: str,
    n: int,
    size: int = 4,
    split: str = "test",
    keep: Callable[[Puzzle], bool] = lambda puzzle: True,
) -> list[Puzzle]:
    """The first n distinct puzzles of a kind and size that `keep` accepts, see
    `Family.distinct`.
    """
    return of_kind(kind, size).distinct(n, split, keep)
