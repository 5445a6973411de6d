"""Every family of puzzles: a kind with its size and knobs, and whether the embedded model is
trained on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Literal

from minicos.errors import MinicosError

from .balls import Balls
from .base import FREE, Knobs, Puzzle
from .count import Count
from .latin import Latin
from .mark import Mark
from .maze import Goal, Maze
from .memory import Memory
from .mirror import Mirror
from .partner import Partner
from .pick import Pick
from .reveal import Reveal
from .sequence import Sequence
from .shell import Shell
from .slide import Slide
from .tictactoe import TicTacToe
from .tour import Tour
from .turn import Turn

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Family:
    """A distribution of puzzles. `domain` is "in" if the model is trained on it, else "out".

    A family draws legible puzzles of the compositions that its kind does not hold out, or with
    `held_out` only those that it does.
    """

    name: str
    puzzle: type[Puzzle]
    size: int = 4
    knobs: Knobs = FREE
    domain: Literal["in", "out"] = "in"
    held_out: bool = False

    @property
    def category(self) -> str:
        """One of `base.CATEGORIES`."""
        return self.puzzle.category

    def draw(self, seed: int, split: str = "train") -> Puzzle:
        """The puzzle of this seed: a pure function of its arguments. Puzzles are
        drawn until one belongs to `split`.
        """
        if split not in SPLITS:
            raise MinicosError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
        rng = Random(f"{self.name}/{split}/{seed}")
        while True:
            puzzle = self.puzzle.sample(rng, self.size, self.knobs)
            asked = (puzzle.composition in self.puzzle.held_out) == self.held_out
            if asked and puzzle.legible and split_of(puzzle.key) == split:
                return puzzle

    def distinct(
        self, n: int, split: str = "test", keep: Callable[[Puzzle], bool] = lambda puzzle: True
    ) -> list[Puzzle]:
        """The first n distinct (picture, prompt) pairs of a split that `keep` accepts. Raises
        MinicosError if there are fewer.
        """
        found: dict[str, Puzzle] = {}
        for seed in range(100 * n):
            puzzle = self.draw(seed, split)
            if keep(puzzle):
                found.setdefault(f"{puzzle.key}: {puzzle.prompt}", puzzle)
            if len(found) == n:
                return list(found.values())
        raise MinicosError(
            f"there are not {n} distinct {self.puzzle.kind} puzzles of size {self.size} "
            f"in the {split} split: ask for fewer"
        )


def split_of(key: str) -> str:
    """The split of a picture: 90 % train, 5 % dev, 5 % test, by its canonical key and never by a
    seed.
    """
    percent = int.from_bytes(sha256(key.encode()).digest()[:8], "big") % 100
    return "train" if percent < 90 else "dev" if percent < 95 else "test"


# One line per family; the first of a kind has the kind's name. `-one` marks the variant with one
# answer, `-short` that with a short chain.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("maze", Maze, knobs=Knobs(k=2, s=6, d=1)),
        Family("maze-one", Maze, knobs=Knobs(k=1, s=6, d=1)),
        Family("maze-3x3", Maze, size=3),
        Family("maze-4x4", Maze),
        Family("maze-5x5", Maze, size=5, knobs=Knobs(s=8, d=1), domain="out"),
        Family("maze-6x6", Maze, size=6, knobs=Knobs(s=10, d=1), domain="out"),
        Family("latin", Latin, size=5, knobs=Knobs(k=2)),
        Family("latin-one", Latin, size=5, knobs=Knobs(k=1)),
        Family("latin-many", Latin, size=5, knobs=Knobs(k=100)),
        Family("latin-4x4", Latin, size=4, knobs=Knobs(k=2), domain="out"),
        Family("sequence", Sequence),
        Family("sequence-short", Sequence, knobs=Knobs(s=1)),
        Family("sequence-pairs", Sequence, knobs=Knobs(s=2), domain="out", held_out=True),
        Family("pick", Pick),
        Family("pick-second", Pick, domain="out", held_out=True),
        Family("partner", Partner),
        Family("partner-back", Partner, domain="out", held_out=True),
        Family("count", Count, knobs=Knobs(k=2)),
        Family("count-one", Count, knobs=Knobs(k=1)),
        Family("count-new", Count, knobs=Knobs(k=2), domain="out", held_out=True),
        Family("tictactoe", TicTacToe, size=3, domain="out"),
        Family("goal", Goal),
        Family("mark", Mark),
        Family("memory", Memory),
        Family("turn", Turn),
        Family("turn-one", Turn, knobs=Knobs(k=1)),
        Family("mirror", Mirror),
        Family("mirror-one", Mirror, knobs=Knobs(k=1)),
        Family("mirror-new", Mirror, knobs=Knobs(k=1), domain="out", held_out=True),
        Family("reveal", Reveal),
        Family("reveal-colour", Reveal, knobs=Knobs(k=4)),
        Family("reveal-one", Reveal, knobs=Knobs(k=1)),
        Family("reveal-new", Reveal, knobs=Knobs(k=1), domain="out", held_out=True),
        Family("shell", Shell, knobs=Knobs(s=2)),
        Family("shell-one", Shell, knobs=Knobs(k=1, s=2)),
        Family("shell-short", Shell, knobs=Knobs(s=1)),
        Family("shell-long", Shell, knobs=Knobs(s=3), domain="out"),
        Family("balls", Balls, knobs=Knobs(s=2)),
        Family("balls-one", Balls, knobs=Knobs(s=1)),
        Family("balls-three", Balls, knobs=Knobs(s=3)),
        Family("balls-four", Balls, knobs=Knobs(s=4), domain="out"),
        Family("tour", Tour, knobs=Knobs(s=3), domain="out"),
        Family("tour-one", Tour, knobs=Knobs(k=1, s=3), domain="out"),
        Family("tour-short", Tour, knobs=Knobs(k=1, s=2), domain="out"),
        Family("tour-new", Tour, knobs=Knobs(k=1, s=3), domain="out", held_out=True),
        Family("tour-four", Tour, size=5, knobs=Knobs(k=1, s=4), domain="out"),
        Family("slide", Slide, knobs=Knobs(k=6, s=3), domain="out"),
        Family("slide-one", Slide, knobs=Knobs(k=1, s=3), domain="out"),
        Family("slide-short", Slide, knobs=Knobs(k=2, s=2), domain="out"),
        Family("slide-four", Slide, knobs=Knobs(s=4), domain="out"),
    )
}
PUZZLES: dict[str, type[Puzzle]] = {f.puzzle.kind: f.puzzle for f in FAMILIES.values()}
PROMPTS: tuple[str, ...] = ("", *dict.fromkeys(p for cls in PUZZLES.values() for p in cls.prompts))
WORDS: tuple[str, ...] = tuple(dict.fromkeys(word for prompt in PROMPTS for word in prompt.split()))
