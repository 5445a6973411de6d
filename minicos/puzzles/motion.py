"""The motion of hard balls of equal mass in a box: exact, from one event to the next.

Places and speeds are complex numbers, x + iy with y downwards, in px and px per frame; times are in
frames.
"""

from __future__ import annotations

import cmath
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from math import inf, pi, sqrt
from typing import NamedTuple

import numpy as np

RADIUS = 5
SPEED = 3.5
ANGLES = 24  # directions
LOW, HIGH = 7, 57  # limits of a centre
UPRIGHT, LEVEL = -1, -2  # walls


class Ball(NamedTuple):
    """A colour, a place and a direction."""

    colour: str
    start: tuple[int, int]  # centre (y, x), px
    angle: int  # of ANGLES, clockwise from rightwards

    def __str__(self) -> str:
        return f"{self.colour}@{self.start[0]},{self.start[1]}/{self.angle}"

    @property
    def place(self) -> complex:
        """The centre as x + iy, px."""
        return complex(self.start[1], self.start[0])

    @property
    def heading(self) -> complex:
        """The direction as a complex number of size 1."""
        return cmath.rect(1, 2 * pi * self.angle / ANGLES)


class Event(NamedTuple):
    """Ball i reaches ball j, or for j < 0 a wall."""

    wait: float  # frames
    i: int
    j: int  # UPRIGHT, LEVEL, or a ball
    share: float = 1.0  # of the relative speed along the line of centres


class Motion(NamedTuple):
    """The motion of balls, as straight stretches."""

    times: list[float]  # frames at which a stretch begins or ends
    places: list[list[complex]]  # at each of these, of each ball: x + iy, px
    events: list[Event]  # the event at the end of each stretch; `wait` counts from the start

    def at(self, frame: np.ndarray) -> np.ndarray:
        """Places at `frame` (n,): complex (n, balls)."""
        tracks = np.array(self.places).T
        return np.stack([np.interp(frame, self.times, track) for track in tracks], axis=1)


@lru_cache(32)
def move(balls: tuple[Ball, ...], rule: str, until: float) -> Motion:
    """The motion of balls of equal mass, exact, up to a time in frames.

    When two meet, by `rule`, they "bounce", "pass" through each other or "stop"; with "stop", a
    single ball stops at a wall.
    """
    places, speeds = [b.place for b in balls], [SPEED * b.heading for b in balls]
    times, track = [0.0], [places]
    events: list[Event] = []
    while True:
        meetings = () if rule == "pass" else _meetings(places, speeds)
        event = min((*_walls(places, speeds), *meetings), default=Event(inf, 0, 0))
        step = min(event.wait, until - times[-1])
        places = [place + step * speed for place, speed in zip(places, speeds, strict=True)]
        times.append(times[-1] + step)
        track.append(places)
        if step < event.wait:
            return Motion(times, track, events)
        events.append(event._replace(wait=times[-1]))
        _change(places, speeds, event, stop=rule == "stop")


def _change(places: list[complex], speeds: list[complex], event: Event, stop: bool) -> None:
    """Update the speeds for an event."""
    _, i, j, _ = event
    if j >= 0:
        line = (places[j] - places[i]) / abs(places[j] - places[i])
        passed = ((speeds[i] - speeds[j]) * line.conjugate()).real * line
        speeds[i], speeds[j] = (0j, 0j) if stop else (speeds[i] - passed, speeds[j] + passed)
    elif stop and len(speeds) == 1:
        speeds[i] = 0j
    else:
        speeds[i] = speeds[i].conjugate() * (-1 if j == UPRIGHT else 1)


def _walls(places: list[complex], speeds: list[complex]) -> Iterator[Event]:
    """When each ball would reach the two walls ahead."""
    for i, (place, speed) in enumerate(zip(places, speeds, strict=True)):
        for wall, at, v in ((UPRIGHT, place.real, speed.real), (LEVEL, place.imag, speed.imag)):
            if abs(v) > 1e-9:
                yield Event(max(0.0, ((HIGH if v > 0 else LOW) - at) / v), i, wall)


def _meetings(places: list[complex], speeds: list[complex]) -> Iterator[Event]:
    """When each two balls that approach each other would touch."""
    for i, j in combinations(range(len(places)), 2):
        gap, speed = places[j] - places[i], speeds[j] - speeds[i]
        closing = -(gap * speed.conjugate()).real
        if closing > 1e-9:
            square = abs(speed) ** 2
            inside = closing**2 - square * (abs(gap) ** 2 - 4 * RADIUS**2)
            if inside > 0:
                share = sqrt(inside / square) / (2 * RADIUS)
                yield Event(max(0.0, (closing - sqrt(inside)) / square), i, j, share)
