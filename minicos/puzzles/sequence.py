"""`sequence`: three figures change by a rule; draw the next.

Size, direction or colour change, one or two of them at a time (knob `s`), along a row or a column.
Knob `d`: number of other figures. Some pairs of rules never occur in training: `sequence-pairs`
draws those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import ClassVar, Self

import numpy as np

from . import draw, figures
from .base import FREE, Knobs, Puzzle
from .draw import COLOURS, PALE, Cell
from .figures import TURNS, Figure

LEVELS = len(figures.RADII)
RULES = {  # what it changes -> its rules: name and step
    "level": {"grow": 1, "shrink": -1},
    "turn": {"right": 1, "left": -1},  # in quarters of a turn
    "colour": {"alternate": 1},
}
STEPS = {name: (what, step) for what, rules in RULES.items() for name, step in rules.items()}


@dataclass(frozen=True)
class Sequence(Puzzle):
    """Draw what comes next in the fourth cell of a row or column."""

    first: Figure
    second: str  # the colour that alternates with the first; the same where none does
    laws: tuple[str, ...]  # names of rules, sorted
    cells: tuple[Cell, ...]  # four, in order
    others: tuple[tuple[Figure, Cell], ...]

    kind: ClassVar[str] = "sequence"
    category: ClassVar[str] = "abstraction"
    sizes: ClassVar[tuple[int, ...]] = (4,)
    prompts: ClassVar[tuple[str, ...]] = ("draw the next shape",)
    held_out: ClassVar[frozenset[str]] = frozenset({"grow left", "right shrink", "alternate right"})

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "s", "d")
        many = rng.randint(1, 2) if knobs.s is None else knobs.s
        changing = rng.sample(tuple(RULES), many)
        laws = tuple(sorted(rng.choice(tuple(RULES[what])) for what in changing))
        turning = [name for name in TURNS if TURNS[name] > 1]
        shape = rng.choice(turning if "turn" in changing else tuple(TURNS))
        colour, second = rng.sample(tuple(COLOURS), 2)
        level = _start(rng, next((STEPS[r][1] for r in laws if STEPS[r][0] == "level"), 0))
        first = Figure(shape, colour, level, rng.randrange(TURNS[shape]))
        at, flip = rng.randrange(size), rng.random() < 0.5
        line = [(at, k) for k in range(size)] if flip else [(k, at) for k in range(size)]
        free = [(r, c) for r in range(size) for c in range(size) if (r, c) not in line]
        around = rng.sample(free, rng.randint(0, 4) if knobs.d is None else knobs.d)
        others = tuple((_figure(rng), cell) for cell in sorted(around))
        return cls(size, first, second, laws, tuple(line), others)

    @property
    def legible(self) -> bool:
        """Whether the embedded VAE can draw the answer so that a scorer can read it: pink comes out
        too pale, and so does a half of the colour of the sky; the smallest circle looks like a
        square, and of the smallest figures with a direction only those that shrink are clear.
        """
        answer = self.item(3)
        pale = answer.colour == PALE or (answer.colour, answer.shape) == ("sky", "half")
        turning = TURNS[answer.shape] > 1 and "shrink" not in self.laws
        vague = answer.level == 0 and (answer.shape == "circle" or turning)
        return not (pale or vague)

    @property
    def prompt(self) -> str:
        return "draw the next shape"

    @property
    def key(self) -> str:
        rule, ends = " ".join(self.laws), f"{self.cells[0]}{self.cells[-1]}"
        line = f"{self.first} {self.second} {rule} along {ends}"
        others = " ".join(f"{figure}@{r},{c}" for figure, (r, c) in self.others)
        return f"{self.kind}/{self.size}/{line} others {others}"

    @property
    def composition(self) -> str | None:
        return " ".join(self.laws) if len(self.laws) > 1 else None

    @property
    def depth(self) -> int:
        """Rules at work."""
        return len(self.laws)

    @property
    def distractors(self) -> int:
        return len(self.others)

    def item(self, i: int) -> Figure:
        """The i-th figure of the line."""
        figure = self.first
        for name in self.laws:
            what, step = STEPS[name]
            if what == "colour":
                figure = figure._replace(colour=(figure.colour, self.second)[i % 2])
            elif what == "level":
                figure = figure._replace(level=figure.level + i * step)
            else:
                figure = figure._replace(turn=(figure.turn + i * step) % TURNS[figure.shape])
        return figure

    @property
    def candidates(self) -> tuple[Figure, ...]:
        """The fourth figure."""
        return (self.item(3),)

    @cached_property
    def foils(self) -> tuple[Figure, ...]:
        """The fourth figure with one thing as it is in the third; for a turn, also as in the
        fifth.
        """
        right, changing = self.item(3), self._changing()
        found = [right._replace(**{what: getattr(self.item(2), what)}) for what in changing]
        if "turn" in changing:
            found.append(right._replace(turn=self.item(4).turn))
        return tuple(found)

    def _changing(self) -> list[str]:
        return [STEPS[name][0] for name in self.laws]

    def backdrop(self) -> np.ndarray:
        return draw.grid(self.size)

    def _given(self) -> np.ndarray:
        """The picture. float32 (h, w, 3)"""
        canvas = self.backdrop()[None].copy()
        for i, cell in enumerate(self.cells[:3]):
            figures.put(canvas, self.item(i), cell)
        for figure, cell in self.others:
            figures.put(canvas, figure, cell)
        return canvas[0]

    def animate(self, answer: Figure, progress: np.ndarray) -> np.ndarray:
        canvas = np.repeat(self._given()[None], len(progress), axis=0)
        figures.put(canvas, answer, self.cells[3], progress)
        return canvas

    def read(self, frame: np.ndarray) -> tuple[Figure | None, str]:
        figure = figures.read(frame, self.cells[3], self.backdrop())
        return figure, "" if figure else "the fourth cell shows no figure clearly"

    def rules(self, last: np.ndarray) -> dict[str, float]:
        """same: what does not change is as it was; and one check for each thing that does."""
        seen, right = figures.read(last, self.cells[3], self.backdrop()), self.item(3)
        changing = self._changing()
        if seen is None:
            return dict.fromkeys(("same", *changing), 0.0)
        equal = {
            what: float(getattr(seen, what) == getattr(right, what)) for what in Figure._fields
        }
        same = min(value for what, value in equal.items() if what not in changing)
        return {"same": same, **{what: equal[what] for what in changing}}


def _start(rng: Random, step: int) -> int:
    """A level from which three steps of `step` stay in range."""
    return rng.choice([n for n in range(LEVELS) if 0 <= n + 3 * step < LEVELS])


def _figure(rng: Random) -> Figure:
    """A figure to stand around."""
    shape = rng.choice(tuple(TURNS))
    return Figure(
        shape, rng.choice(tuple(COLOURS)), rng.randrange(LEVELS), rng.randrange(TURNS[shape])
    )
