"""`turn`: an L turns by a quarter about its centre, either way or the way that is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import hypot
from random import Random
from typing import ClassVar, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw
from .base import FREE, Knobs, Puzzle
from .draw import CELL, COLOURS

FORMS = ((2, 2), (3, 2), (2, 3), (3, 3))  # length of upright and foot of the L, in stroke widths
STROKES = (8, 12, 16)  # px; even, so that outlines fall on pixel borders before and after the turn
WAYS = {"clockwise": 1, "anticlockwise": -1}  # quarters of a clockwise turn
PLACES = 4  # px between the places where an L may stand; finer ones would test drawing alone


@cache
def fits(size: int) -> tuple[tuple[tuple[int, int], int, int], ...]:
    """Every (form, stroke, room): the room is how far off the middle, px, the L can turn freely."""
    reach = {(form, stroke): hypot(*form) * stroke / 2 for form in FORMS for stroke in STROKES}
    return tuple(
        (form, stroke, int(size * CELL / 2 - 2 - radius))
        for (form, stroke), radius in reach.items()
        if max(form) * stroke >= 20 and radius <= size * CELL / 2 - 2
    )


@dataclass(frozen=True)
class Turn(Puzzle):
    """Turn the L by 90 degrees: either way (k = 2) or the way that is named (k = 1).

    Distinct puzzles: 912 (3x3), 6,384 (4x4): 38 and 266 sizes and places, times 4 ways to stand and
    6 colours.
    """

    form: tuple[int, int]  # length of upright and foot, in strokes
    stroke: int  # px
    quarter: int  # how it stands: quarters of a clockwise turn from the letter L, 0..3
    centre: tuple[int, int]  # (y, x) of the middle of its bounding box, px
    colour: str
    way: str | None = None  # one of WAYS, None: either

    kind: ClassVar[str] = "turn"
    category: ClassVar[str] = "transformation"
    prompts: ClassVar[tuple[str, ...]] = ("turn the l", *(f"turn the l {way}" for way in WAYS))
    sizes: ClassVar[tuple[int, ...]] = (3, 4)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k")
        if knobs.k not in (None, 1, 2):
            raise MinicosError(f"{cls.kind} has 1 or 2 answers, not k = {knobs.k}")
        form, stroke, room = rng.choice(fits(size))
        middle, far = size * CELL // 2, room // PLACES
        centre = middle + PLACES * rng.randint(-far, far), middle + PLACES * rng.randint(-far, far)
        quarter, colour = rng.randrange(4), rng.choice(tuple(COLOURS))
        way = rng.choice(tuple(WAYS)) if knobs.k == 1 else None
        return cls(size, form, stroke, quarter, centre, colour, way)

    @property
    def prompt(self) -> str:
        return f"turn the l {self.way or ''}".strip()

    @property
    def key(self) -> str:
        form, centre = "{}x{}".format(*self.form), "{},{}".format(*self.centre)
        pose = f"{form} stroke {self.stroke} quarter {self.quarter} at {centre}"
        return f"{self.kind}/{self.size}/{self.colour} {pose}"

    @property
    def candidates(self) -> tuple[str, ...]:
        """Ways to turn."""
        return tuple(WAYS) if self.way is None else (self.way,)

    @property
    def foils(self) -> tuple[str, ...]:
        """The way not asked for, a half turn, and the mirror image unless it is a turned L."""
        flip = ("flip",) if self.form[0] != self.form[1] else ()
        return (*(way for way in WAYS if way not in self.candidates), "half turn", *flip)

    def variants(self) -> tuple[Self, ...]:
        """The same picture with the other way named."""
        return tuple(replace(self, way=way) for way in WAYS if self.way not in (None, way))

    def backdrop(self) -> np.ndarray:
        return draw.border(draw.floor(self.size))

    def animate(self, answer: str, progress: np.ndarray) -> np.ndarray:
        quarters = {**WAYS, "half turn": 2, "flip": 0}[answer] * progress
        angle = ((self.quarter + quarters) * (np.pi / 2))[:, None, None].astype(np.float32)
        y, x = draw.pixels(self.size * CELL)
        y, x = y - self.centre[0], x - self.centre[1]
        # Pixels are turned back by the angle into the frame of an upright L (y points down, so x to
        # y is clockwise).
        v, u = np.cos(angle) * y - np.sin(angle) * x, np.cos(angle) * x + np.sin(angle) * y
        flat = np.cos(np.pi * progress * (answer == "flip"))[:, None, None].astype(np.float32)
        pen = self.stroke / 2
        half_h, half_w = (length * pen for length in self.form)
        upright = draw.box(v, u + (half_w - pen) * flat, half_h, pen * np.abs(flat))
        foot = draw.box(v - (half_h - pen), u, pen, half_w * np.abs(flat))
        cover = draw.coverage(np.minimum(upright, foot))
        return draw.paint(self.backdrop(), cover, COLOURS[self.colour])
