"""Which routes of a maze are drawn at each step? The trail in the decoded clean estimate, measured
in the picture.

Only for the embedded puzzles, which know every valid route, so "several candidates early, one late"
becomes a curve for each route.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.result import Curve, Number
from minicos.analysis.tools import figures
from minicos.analysis.tools.record import Saved
from minicos.hooks import NO_HOOKS, Hooks
from minicos.puzzles.maze import Maze, edges_of, grid_edges
from minicos.runs import Run
from minicos.sample import Step
from minicos.video_model import VideoModel


@dataclass(frozen=True)
class Routes:
    """Evidence for every valid route at every step: the amount of trail on the edges that not all
    routes share, 0 to 1.
    """

    wan: VideoModel
    puzzle: Maze
    name: str = "routes"

    def hooks(self) -> Hooks:
        """No hooks: the picture is decoded from the step itself."""
        return NO_HOOKS

    def keep(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        """ "trail": the amount of trail on every edge of the grid, 0 to 1."""
        last = self.wan.decode(step.x0[:1])[0, -1]  # the whole trail is in the last frame
        return {"trail": torch.from_numpy(self.puzzle.read_trail(last).clip(0, 1).mean(1))}  # edges

    def draw(self, saved: Saved, run: Run) -> list[str]:
        """routes.png: a curve for each valid route."""
        lines = evidence(self.puzzle, np.stack([s["trail"].numpy() for s in saved]))
        routes = enumerate(zip(self.puzzle.candidates, lines, strict=True))
        figures.lines(
            run.path("routes.png"),
            [
                Curve(
                    f"route {i} ({len(route) - 1} moves)",
                    range(len(line)),
                    line.tolist(),
                    x_label="denoising step",
                )
                for i, (route, line) in routes
            ],
            y="trail on the route's own edges, 0 to 1",
            title="Evidence for every valid route in the clean estimate",
            sigmas=self.wan.schedule().sigmas,
        )
        return ["routes.png"]

    def numbers(self, saved: Saved) -> list[Number]:
        """None."""
        return []


def evidence(puzzle: Maze, trail: np.ndarray) -> np.ndarray:
    """Trail per edge (steps edges) -> evidence (route step): the mean over the edges that not all
    routes share.
    """
    index = {edge: k for k, edge in enumerate(grid_edges(puzzle.size))}
    routes = [{index[edge] for edge in edges_of(route)} for route in puzzle.candidates]
    shared = set.intersection(*routes) if len(routes) > 1 else set()
    return np.stack([trail[:, sorted(route - shared)].mean(1) for route in routes])
