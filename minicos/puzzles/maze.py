"""Mazes: `maze` has one goal, `goal` has a red and a blue one and a prompt that names one.

A maze is a uniform spanning tree of the grid plus up to two more doors. Every simple route no
longer than the shortest plus two is a valid answer. About half of the mazes have more than one,
which is why several routes can appear at once in an early step. Knobs: `k` 1 (one valid route) or
more (at least that many), `s` smallest length of the shortest route, `d` smallest number of decoys:
corridors that leave the routes, lead toward the goal and end there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from random import Random
from typing import ClassVar, Self

import numpy as np

from . import draw
from .base import FREE, Knobs, Puzzle
from .draw import CELL, COLOURS, WALL, Cell

AGENT, TRAIL = COLOURS["green"], COLOURS["sky"]
CLEAR = 0.12  # how far the strength of a trail is from a half, where it is or is not
DETOUR = 2  # a valid route is at most this many steps longer than the shortest

Edge = tuple[Cell, Cell]  # two neighbouring cells, the upper or left one first
Route = tuple[Cell, ...]


@cache
def grid_edges(size: int) -> tuple[Edge, ...]:
    """Every pair of neighbouring cells, the order of key bits and of `read_trail`."""
    across = tuple(((r, c), (r, c + 1)) for r in range(size) for c in range(size - 1))
    down = tuple(((r, c), (r + 1, c)) for r in range(size - 1) for c in range(size))
    return across + down


def edges_of(route: Route) -> tuple[Edge, ...]:
    """The edges a route walks, in order."""
    return tuple((a, b) if a < b else (b, a) for a, b in pairwise(route))


def neighbours(doors: frozenset[Edge], size: int) -> dict[Cell, tuple[Cell, ...]]:
    """For each cell, the cells one step away through a door."""
    near: dict[Cell, list[Cell]] = {(r, c): [] for r in range(size) for c in range(size)}
    for a, b in sorted(doors):
        near[a].append(b)
        near[b].append(a)
    return {cell: tuple(cells) for cell, cells in near.items()}


def distances(
    near: dict[Cell, tuple[Cell, ...]], goal: Cell, closed: Cell | None = None
) -> dict[Cell, int]:
    """Steps to `goal` from every cell that reaches it without entering `closed`."""
    steps, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for other in near[cell]:
            if other not in steps and other != closed:
                steps[other] = steps[cell] + 1
                queue.append(other)
    return steps


def routes(
    near: dict[Cell, tuple[Cell, ...]], start: Cell, goal: Cell, closed: Cell | None = None
) -> tuple[Route, ...]:
    """All simple routes that avoid `closed` and are at most DETOUR steps
    longer than the shortest, shortest first.
    """
    steps = distances(near, goal, closed)
    if start not in steps:
        return ()
    longest, found = steps[start] + DETOUR, []

    def extend(route: Route) -> None:
        if route[-1] == goal:
            found.append(route)
            return
        for cell in near[route[-1]]:
            if cell in steps and cell not in route and len(route) + steps[cell] <= longest:
                extend((*route, cell))

    extend((start,))
    return tuple(sorted(found, key=lambda route: (len(route), route)))


def random_doors(rng: Random, size: int) -> frozenset[Edge]:
    """A uniform spanning tree (Aldous-Broder: doors are where a random walk
    first enters a cell) plus 0-2 doors.
    """
    grid = neighbours(frozenset(grid_edges(size)), size)
    cell = rng.choice(sorted(grid))
    seen = {cell}
    doors: set[Edge] = set()
    while len(seen) < size * size:
        last, cell = cell, rng.choice(grid[cell])
        if cell not in seen:
            seen.add(cell)
            doors.update(edges_of((last, cell)))
    walls = [edge for edge in grid_edges(size) if edge not in doors]
    return frozenset(doors) | frozenset(rng.sample(walls, rng.randint(0, 2)))


@dataclass(frozen=True)
class Maze(Puzzle):
    """Find the way from the green agent to the red square.

    Distinct puzzles: 22,832 (3x3), 8.9e7 (4x4), 2.5e12 (5x5). That is, the grid's connected
    subgraphs with 0, 1 or 2 edges beyond a spanning tree (192 + 164 + 62 on 3x3), times the ordered
    pairs of cells that share no door.
    """

    doors: frozenset[Edge]  # edges without a wall
    start: Cell
    red: Cell

    kind: ClassVar[str] = "maze"
    category: ClassVar[str] = "spatiality"
    prompts: ClassVar[tuple[str, ...]] = ("solve the maze",)
    sizes: ClassVar[tuple[int, ...]] = (3, 4, 5, 6)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k", "s", "d")
        while True:
            doors = random_doors(rng, size)
            start = (rng.randrange(size), rng.randrange(size))
            steps = distances(neighbours(doors, size), start)
            far = [cell for cell in sorted(steps) if steps[cell] >= (knobs.s or 2)]
            if far and (maze := cls(size, doors, start, rng.choice(far)))._has(knobs):
                return maze

    def _has(self, knobs: Knobs) -> bool:
        """Whether the maze is as ambiguous as asked for and has as many decoys."""
        if (knobs.k is not None and self.ambiguity < knobs.k) or knobs.k == 1 < self.ambiguity:
            return False
        return self.distractors >= (knobs.d or 0)

    @property
    def prompt(self) -> str:
        return "solve the maze"

    @property
    def key(self) -> str:
        bits = "".join("01"[edge in self.doors] for edge in grid_edges(self.size))
        cells = " ".join(
            f"{name} {r},{c}" for name, (r, c) in [("start", self.start), *self.goals.items()]
        )
        return f"{self.kind}/{self.size}/{bits} {cells}"

    @property
    def goals(self) -> dict[str, Cell]:
        """Cell of every goal, by colour."""
        return {"red": self.red}

    @cached_property
    def candidates(self) -> tuple[Route, ...]:
        """Valid routes as cells from start to goal, shortest first."""
        return routes(neighbours(self.doors, self.size), self.start, self.red)

    @cached_property
    def decoys(self) -> tuple[Route, ...]:
        """Routes from the start into every dead end that lies two steps or more off the valid
        routes and nearer to the goal, as the crow flies, than where they leave them.
        """
        near = neighbours(self.doors, self.size)
        steps, walked = distances(near, self.start), {c for route in self.candidates for c in route}
        found = []
        for cell in sorted(steps):
            way = _downhill(near, steps, cell)
            off = sum(c not in walked for c in way)
            if len(near[cell]) == 1 and off >= 2 and self._gap(cell) < self._gap(way[off]):
                found.append(way[::-1])
        return tuple(found)

    @cached_property
    def shortcut(self) -> tuple[Route, ...]:
        """The shortest route through one wall, where that is shorter than every valid route."""
        near = neighbours(self.doors, self.size)
        there, back = distances(near, self.start), distances(near, self.red)
        walls = [edge for edge in grid_edges(self.size) if edge not in self.doors]
        ways = [(there[a] + 1 + back[b], a, b) for wall in walls for a, b in (wall, wall[::-1])]
        length, a, b = min(ways, default=(self.depth, self.start, self.start))
        if length >= self.depth:
            return ()
        return ((*_downhill(near, there, a)[::-1], *_downhill(near, back, b)),)

    @property
    def foils(self) -> tuple[Route, ...]:
        """Dead ends near the goal, and a short cut through a wall."""
        return self.decoys + self.shortcut

    @property
    def depth(self) -> int:
        """Steps of the shortest route."""
        return len(self.candidates[0]) - 1

    @property
    def distractors(self) -> int:
        """Decoys."""
        return len(self.decoys)

    def _gap(self, cell: Cell) -> int:
        """Steps to the goal if there were no walls."""
        return abs(cell[0] - self.red[0]) + abs(cell[1] - self.red[1])

    def backdrop(self) -> np.ndarray:
        canvas = draw.floor(self.size)
        for edge in grid_edges(self.size):
            if edge not in self.doors:
                (r, c), (below, right) = edge[1], (edge[1][0] + 1, edge[1][1] + 1)
                if (
                    edge[0][0] == edge[1][0]
                ):  # side by side: an upright wall, one pixel longer at both ends for corners
                    canvas[max(r * CELL - 1, 0) : below * CELL + 1, c * CELL - 1 : c * CELL + 1] = (
                        WALL
                    )
                else:
                    canvas[r * CELL - 1 : r * CELL + 1, max(c * CELL - 1, 0) : right * CELL + 1] = (
                        WALL
                    )
        return draw.border(canvas)

    def animate(self, answer: Route, progress: np.ndarray) -> np.ndarray:
        y, x = draw.pixels(self.size * CELL)
        canvas = self.backdrop()
        for colour, cell in self.goals.items():
            gy, gx = draw.centre(cell)
            canvas = draw.paint(
                canvas, draw.coverage(draw.box(y - gy, x - gx, 5, 5)), COLOURS[colour]
            )
        corners = np.array([draw.centre(cell) for cell in answer], np.float32)
        travelled = progress * np.float32(len(corners) - 1) * CELL  # px along the route (n,)
        ay, ax = (
            np.interp(travelled, np.arange(len(corners)) * CELL, corners[:, k])[:, None, None]
            for k in (0, 1)
        )
        across, along = _ribbon(corners, y, x)
        trail = draw.coverage(across - 2) * draw.coverage(along - travelled[:, None, None])
        agent = draw.coverage(draw.disc(y - ay.astype(np.float32), x - ax.astype(np.float32), 4.6))
        return draw.paint(draw.paint(canvas, trail, TRAIL), agent, AGENT)

    def read_trail(self, frame: np.ndarray) -> np.ndarray:
        """How much trail lies on each half of every edge, 0 (none) to 1: float (edges, 2), edges as
        in `grid_edges`.

        Read from a small patch on either side of the cell border, walls included, from chroma
        alone: floor, grid and walls are grey and read 0. Works on any frame, also on a blend of
        routes.
        """
        tint = np.subtract(TRAIL, np.mean(TRAIL))
        chroma = frame - frame.mean(-1, keepdims=True, dtype=np.float32)
        strength = chroma @ (tint / (tint @ tint))
        half, strengths = CELL // 2, []
        for (r, c), (down, right) in grid_edges(self.size):
            if r == down:
                patch = strength[
                    r * CELL + half - 1 : r * CELL + half + 1, right * CELL - 3 : right * CELL + 3
                ]
            else:
                patch = strength[
                    down * CELL - 3 : down * CELL + 3, c * CELL + half - 1 : c * CELL + half + 1
                ].T
            strengths.append(
                (patch[:, :2].mean(), patch[:, -2:].mean())
            )  # leaves out the 2 px a wall would take
        return np.array(strengths)

    def read(self, frame: np.ndarray) -> tuple[Route | None, str]:
        strength, drawn = self.read_trail(frame), self._drawn(frame)
        for route in (*self.candidates, *self.foils):
            if drawn == set(edges_of(route)) and (strength > 0.5).sum() == 2 * len(drawn):
                if np.abs(strength - 0.5).min() < CLEAR:
                    return None, "part of the trail is half there"
                return route, ""
        if not drawn:
            return None, "no trail"
        if crossed := sorted(drawn - self.doors):
            return None, f"the trail crosses the wall between {crossed[0][0]} and {crossed[0][1]}"
        return None, "the trail is not a valid route"

    def rules(self, last: np.ndarray) -> dict[str, float]:
        """walls: share of the trail that crosses none; goal: the agent is there; route: most of a
        valid route that is drawn, less what is drawn beyond it.
        """
        drawn, ways = self._drawn(last), [set(edges_of(route)) for route in self.candidates]
        arrived = self._still(self.candidates[0], 1.0)
        goal = draw.window(self.candidates[0][-1])
        there = draw.deviation(last, arrived)[goal][5:-5, 5:-5].max() < self.limit
        return {
            "walls": len(drawn & self.doors) / max(len(drawn), 1),
            "goal": float(there),
            "route": max(0.0, *((len(way & drawn) - len(drawn - way)) / len(way) for way in ways)),
        }

    def _drawn(self, frame: np.ndarray) -> set[Edge]:
        """The edges that carry trail on both halves."""
        halves = self.read_trail(frame) > 0.5
        return {
            edge for edge, half in zip(grid_edges(self.size), halves, strict=True) if half.all()
        }

    def halfway(self, frame: np.ndarray, answer: Route, progress: float) -> str:
        # The trail must be a beginning of the route. How long a beginning is left
        # open, short of nothing and of all.
        drawn = self._drawn(frame)
        walked = edges_of(answer)
        if drawn != set(walked[: len(drawn)]):
            return "the trail is not a beginning of the route"
        if not min(1, int(progress * len(walked))) <= len(drawn) < len(walked):
            return f"{len(drawn)} of {len(walked)} steps are drawn"
        return ""


@dataclass(frozen=True)
class Goal(Maze):
    """A maze with two goals: go to the one that is named, not through the other.

    Distinct pictures, two prompts each: about 7.0e4 (3x3), 7.1e8 (4x4), 3.7e13 (5x5); doors counted
    exactly as for `Maze`, the share of valid (start, red, blue) by sampling.
    """

    blue: Cell
    target: str = "red"  # or "blue"

    kind: ClassVar[str] = "goal"
    prompts: ClassVar[tuple[str, ...]] = ("go to the red goal", "go to the blue goal")

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind)
        while True:
            maze = Maze.sample(rng, size)
            steps = distances(neighbours(maze.doors, size), maze.start)
            blues = [cell for cell in sorted(steps) if steps[cell] >= 2 and cell != maze.red]
            target = rng.choice(("red", "blue"))
            if blues:
                puzzle = cls(size, maze.doors, maze.start, maze.red, rng.choice(blues), target)
                if (
                    puzzle.candidates and puzzle.variants()[0].candidates
                ):  # neither goal bars the way to the other
                    return puzzle

    @property
    def prompt(self) -> str:
        return f"go to the {self.target} goal"

    @property
    def goals(self) -> dict[str, Cell]:
        return {"red": self.red, "blue": self.blue}

    @cached_property
    def candidates(self) -> tuple[Route, ...]:
        """Valid routes to the named goal, none through the other goal's cell, shortest first."""
        goal, other = (self.red, self.blue) if self.target == "red" else (self.blue, self.red)
        return routes(neighbours(self.doors, self.size), self.start, goal, closed=other)

    @property
    def foils(self) -> tuple[Route, ...]:
        """Routes to the other goal."""
        return self.variants()[0].candidates

    def variants(self) -> tuple[Self, ...]:
        other = "blue" if self.target == "red" else "red"
        return (type(self)(self.size, self.doors, self.start, self.red, self.blue, other),)


def _downhill(near: dict[Cell, tuple[Cell, ...]], steps: dict[Cell, int], cell: Cell) -> Route:
    """From a cell to where `steps` are 0, by a shortest way."""
    way = [cell]
    while steps[way[-1]]:
        way.append(min(near[way[-1]], key=lambda c: steps[c]))
    return tuple(way)


def _ribbon(corners: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's place relative to a polyline `corners` (n + 1, 2): distance
    from it and length along it (h, w).
    """
    start, step = corners[:-1, :, None, None], np.diff(corners, axis=0)[:, :, None, None] / CELL
    along = np.clip(
        (y - start[:, 0]) * step[:, 0] + (x - start[:, 1]) * step[:, 1], 0, CELL
    )  # (n, h, w)
    across = np.hypot(y - start[:, 0] - along * step[:, 0], x - start[:, 1] - along * step[:, 1])
    nearest = across.argmin(0)[None]
    travelled = along + np.arange(len(along), dtype=np.float32)[:, None, None] * CELL
    return np.take_along_axis(across, nearest, 0)[0], np.take_along_axis(travelled, nearest, 0)[0]
