"""`turn`: an L turns by a quarter about its centre, either way: two valid answers to one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import hypot
from random import Random
from typing import ClassVar, Self

import numpy as np

from . import draw
from .base import FREE, Knobs, Puzzle
from .draw import CELL, COLOURS

FORMS = (
    (2, 2),
    (3, 2),
    (2, 3),
    (3, 3),
)  # length of the upright and of the foot of the L, in stroke widths
STROKES = (8, 12, 16)  # px; even, so that outlines fall on pixel borders before and after the turn
PLACES = 4  # px between the places where an L may stand; finer ones ask for drawing skill, not for reasoning


@cache
def fits(size: int) -> tuple[tuple[tuple[int, int], int, int], ...]:
    """Every (form, stroke, room): `room` is how far, in px, the L can stand off the middle and still turn freely."""
    reach = {(form, stroke): hypot(*form) * stroke / 2 for form in FORMS for stroke in STROKES}
    return tuple(
        (form, stroke, int(size * CELL / 2 - 2 - radius))
        for (form, stroke), radius in reach.items()
        if max(form) * stroke >= 20 and radius <= size * CELL / 2 - 2
    )


@dataclass(frozen=True)
class Turn(Puzzle):
    """Turn the L by 90 degrees, clockwise or anticlockwise.

    Distinct puzzles: 912 (3x3), 6,384 (4x4): 38 and 266 sizes and places, times 4 ways to stand and 6 colours.
    """

    form: tuple[int, int]  # length of upright and foot, in strokes
    stroke: int  # px
    quarter: int  # how it stands: quarters of a clockwise turn from the letter L, 0..3
    centre: tuple[int, int]  # (y, x) of the middle of its bounding box, px
    colour: str

    kind: ClassVar[str] = "turn"
    category: ClassVar[str] = "transformation"
    prompts: ClassVar[tuple[str, ...]] = ("turn the l",)
    sizes: ClassVar[tuple[int, ...]] = (3, 4)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind)
        form, stroke, room = rng.choice(fits(size))
        middle, far = size * CELL // 2, room // PLACES
        centre = middle + PLACES * rng.randint(-far, far), middle + PLACES * rng.randint(-far, far)
        return cls(size, form, stroke, rng.randrange(4), centre, rng.choice(tuple(COLOURS)))

    @property
    def prompt(self) -> str:
        return "turn the l"

    @property
    def key(self) -> str:
        form, centre = "{}x{}".format(*self.form), "{},{}".format(*self.centre)
        return f"{self.kind}/{self.size}/{self.colour} {form} stroke {self.stroke} quarter {self.quarter} at {centre}"

    @property
    def candidates(self) -> tuple[str, ...]:
        """Ways to turn."""
        return ("clockwise", "anticlockwise")

    def backdrop(self) -> np.ndarray:
        return draw.border(draw.floor(self.size))

    def animate(self, answer: str, progress: np.ndarray) -> np.ndarray:
        way = {"clockwise": 1, "anticlockwise": -1}[answer]
        angle = ((self.quarter + way * progress) * (np.pi / 2))[:, None, None].astype(np.float32)
        y, x = draw.pixels(self.size * CELL)
        y, x = y - self.centre[0], x - self.centre[1]
        # Pixels are turned back by the angle into the frame of an upright L (y points down, so x to y is clockwise).
        v, u = np.cos(angle) * y - np.sin(angle) * x, np.cos(angle) * x + np.sin(angle) * y
        half_h, half_w, pen = (
            self.form[0] * self.stroke / 2,
            self.form[1] * self.stroke / 2,
            self.stroke / 2,
        )
        upright = draw.box(v, u + (half_w - pen), half_h, pen)
        foot = draw.box(v - (half_h - pen), u, pen, half_w)
        return draw.paint(
            self.backdrop(), draw.coverage(np.minimum(upright, foot)), COLOURS[self.colour]
        )
