"""Pictures for any model: two classes of objects on a blank background, their masks, and a prompt
for each class.

This is how the paper tests what a layer encodes (Sec. 5.2): "circle the cats" and "circle the
bicycles" ask for different things in one picture, and nothing else in it could. The paper's
pictures are not published; these are drawn silhouettes. Which objects a video marked is determined
from pixels alone: this measures where something was drawn, not how well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np

from minicos.puzzles import draw

COLOURS = ((40, 40, 45), (150, 75, 40), (35, 95, 150), (120, 50, 110))
AROUND = 1.6  # radii: how far from its centre a mark still counts for an object
TOUCHED = 0.03  # share of an object's surroundings that must change visibly


def _capsule(
    y: np.ndarray, x: np.ndarray, a: tuple[float, float], b: tuple[float, float], width: float
) -> np.ndarray:
    """Signed distance to a line with round ends from a to b (y, x)."""
    dy, dx = b[0] - a[0], b[1] - a[1]
    along = np.clip(((y - a[0]) * dy + (x - a[1]) * dx) / (dy * dy + dx * dx), 0, 1)
    return np.hypot(y - a[0] - along * dy, x - a[1] - along * dx) - width / 2


def _cat(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    body = (np.hypot((y - 0.4) / 0.58, x / 0.42) - 1) * 0.42
    head = np.hypot(y + 0.38, x) - 0.36
    ears = np.maximum(
        -0.92 - y, np.maximum(y + 0.4, np.abs(np.abs(x) - 0.24) - 0.4 * (y + 0.92) / 1.15)
    )
    tail = np.minimum(
        _capsule(y, x, (0.85, 0.2), (0.7, 0.7), 0.14), _capsule(y, x, (0.7, 0.7), (0.2, 0.75), 0.14)
    )
    return np.minimum.reduce([body, head, ears, tail])


def _bicycle(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    rear, front, pedal, seat, fork = (
        (0.35, -0.55),
        (0.35, 0.55),
        (0.35, -0.05),
        (-0.2, -0.22),
        (-0.2, 0.36),
    )
    wheels = [np.abs(np.hypot(y - cy, x - cx) - 0.38) - 0.05 for cy, cx in (rear, front)]
    tubes = [
        (rear, pedal),
        (rear, seat),
        (pedal, seat),
        (pedal, fork),
        (seat, fork),
        (front, (-0.45, 0.3)),
    ]
    ends = [((-0.45, 0.3), (-0.48, 0.52)), ((-0.33, -0.4), (-0.33, -0.1)), (seat, (-0.33, -0.26))]
    return np.minimum.reduce([*wheels, *(_capsule(y, x, a, b, 0.09) for a, b in tubes + ends)])


# signed distances in units of the radius
SILHOUETTES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cat": _cat,
    "bicycle": _bicycle,
    "circle": lambda y, x: draw.disc(y, x, 0.7),
    "triangle": lambda y, x: np.maximum(y - 0.6, (2 * np.abs(x) - y - 0.8) / 5**0.5),
}


@dataclass(frozen=True)
class Thing:
    """One object: its class, centre and radius in pixels, colour."""

    kind: str
    y: float
    x: float
    radius: float
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Drawing:
    """A blank picture of height x width pixels with things of two classes."""

    height: int
    width: int
    kinds: tuple[str, str]
    things: tuple[Thing, ...]

    @classmethod
    def sample(
        cls,
        rng: Random,
        height: int = 480,
        width: int = 832,
        kinds: tuple[str, str] = ("cat", "bicycle"),
    ) -> "Drawing":
        """One or two things of each class, at most one in each cell of a grid with two rows.
        `kinds` are names in SILHOUETTES.
        """
        columns = max(2, round(2 * width / height))
        cell = min(height / 2, width / columns)
        counts = [(kind, i) for kind in kinds for i in range(rng.randint(1, 2))]
        places = rng.sample([(r, c) for r in range(2) for c in range(columns)], len(counts))
        things = tuple(
            Thing(
                kind,
                (r + 0.5) * height / 2 + rng.uniform(-0.06, 0.06) * cell,
                (c + 0.5) * width / columns + rng.uniform(-0.06, 0.06) * cell,
                0.3 * cell,
                rng.choice(COLOURS),
            )
            for (kind, _), (r, c) in zip(counts, places, strict=True)
        )
        return cls(height, width, kinds, things)

    def prompt(self, kind: str, verb: str = "Circle") -> str:
        """ "Circle the cats." """
        return f"{verb} the {kind}{'s' if sum(t.kind == kind for t in self.things) > 1 else ''}."

    def image(self) -> np.ndarray:
        """The picture: uint8 (h, w, 3)."""
        canvas = np.full((self.height, self.width, 3), 255, np.float32)
        for thing in self.things:
            canvas = draw.paint(canvas, draw.coverage(self._distance(thing)), thing.colour)
        return draw.to_uint8(canvas)

    def mask(self, *kinds: str) -> np.ndarray:
        """Where things of these classes (default: both) are: bool (h, w)."""
        chosen = [t for t in self.things if t.kind in (kinds or self.kinds)]
        return np.logical_or.reduce([self._distance(t) < 0 for t in chosen])

    def touched(self, video: np.ndarray) -> list[float]:
        """For each thing, the share of its surroundings where the last frame of a video uint8 (f,
        h, w, 3) differs from the first.

        The surroundings are the pixels nearer to this thing than to any other and within AROUND
        radii, except the things themselves.
        """
        height, width = video.shape[1:3]
        y, x = (
            (np.arange(n) + 0.5) * full / n
            for n, full in ((height, self.height), (width, self.width))
        )
        away = np.stack([np.hypot(y[:, None] - t.y, x[None] - t.x) / t.radius for t in self.things])
        inside = np.stack([self._distance(t, y, x) < 0 for t in self.things]).any(0)
        changed = draw.differs(video[-1], video[0])
        near = (away < AROUND) & (away == away.min(0)) & ~inside
        return [float(changed[where].mean()) for where in near]

    def shows(self, kind: str) -> Callable[[np.ndarray], bool]:
        """A function that tests whether a video marks all things of a class and no others."""

        def verdict(video: np.ndarray) -> bool:
            found = self.touched(video)
            return all(
                (share >= TOUCHED) == (t.kind == kind)
                for t, share in zip(self.things, found, strict=True)
            )

        return verdict

    def _distance(
        self, thing: Thing, y: np.ndarray | None = None, x: np.ndarray | None = None
    ) -> np.ndarray:
        """Signed distance to a thing's outline in pixels, at rows y and columns x (default: all
        pixels).
        """
        y = np.arange(self.height) + 0.5 if y is None else y
        x = np.arange(self.width) + 0.5 if x is None else x
        units = (y[:, None] - thing.y) / thing.radius, (x[None] - thing.x) / thing.radius
        return (SILHOUETTES[thing.kind](*units) * thing.radius).astype(np.float32)
