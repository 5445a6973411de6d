"""What an experiment runs on: held-out puzzles that know their answers, or anybody's picture and prompt.

Experiments go through cases in batches, and `collect` keeps what each batch gave in the run folder: killed and started again,
an experiment computes only what is missing, and the result is the same to the last bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minicos import puzzles
from minicos.condition import Condition
from minicos.runs import Run, progress
from minicos.wan import Wan

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Case:
    """One thing to generate: a prompt, a first frame (3 H W in [0, 1]) where the model takes one, and the seed of its noise."""

    prompt: str
    image: Tensor | None = None
    seed: int = 0
    puzzle: puzzles.Puzzle | None = (
        None  # knows the valid answers; None for a picture of the user's
    )

    @classmethod
    def of(cls, puzzle: puzzles.Puzzle, seed: int) -> "Case":
        image = torch.from_numpy(puzzle.first_frame()).permute(2, 0, 1).float() / 255
        return cls(puzzle.prompt, image, seed, puzzle)


def held_out(
    kind: str,
    n: int,
    *,
    size: int = 4,
    split: str = "test",
    seed: int = 0,
    keep: Callable[[puzzles.Puzzle], bool] = lambda puzzle: True,
) -> list[Case]:
    """The first n distinct puzzles of a split that `keep` accepts, with the noise seeds seed, seed + 1, ..."""
    return [
        Case.of(puzzle, seed + i)
        for i, puzzle in enumerate(puzzles.distinct(kind, n, size, split, keep))
    ]


def ambiguous(puzzle: puzzles.Puzzle) -> bool:
    """Whether several answers are right: the puzzles in which there is something to decide."""
    return len(puzzle.candidates) > 1


def batches(cases: Sequence[Case], most: int = 25) -> list[list[Case]]:
    """Cases in order, at most `most` together, only pictures of one size together."""
    alike = groupby(cases, key=lambda case: None if case.image is None else tuple(case.image.shape))
    groups = [list(group) for _, group in alike]
    return [group[i : i + most] for group in groups for i in range(0, len(group), most)]


def condition(wan: Wan, batch: Sequence[Case]) -> Condition:
    """The batch's condition; pictures have one size (`batches`)."""
    images = [case.image for case in batch]
    return wan.condition(
        [case.prompt for case in batch], None if images[0] is None else torch.stack(images)
    )


def noise(wan: Wan, condition: Condition, batch: Sequence[Case], offset: int = 0) -> Tensor:
    """The noise that each case starts from: the case's seed, plus `offset` for independent runs of the same case."""
    return wan.noise(condition, [case.seed + offset for case in batch])


def scores(wan: Wan, latent: Tensor, batch: Sequence[Case]) -> list[puzzles.Score]:
    """The verdict on each case's final latent (b c f h w), from its decoded pixels."""
    return [case.puzzle.score(video) for case, video in zip(batch, wan.decode(latent), strict=True)]


def collect(
    run: Run, name: str, work: Sequence[Batch], compute: Callable[[Batch], Mapping[str, Tensor]]
) -> dict[str, np.ndarray]:
    """`compute` each batch once and keep its tensors (first axis: cases) in `run`; all of them together, in order."""
    parts = []
    for index, batch in enumerate(progress(work, len(work), name)):
        file = f"{name}/{index:03d}.safetensors"
        if not run.has(file):
            run.save_tensors(file, dict(compute(batch)))
        parts.append(run.load_tensors(file))
    return {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
