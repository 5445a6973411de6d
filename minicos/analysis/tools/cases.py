"""The inputs of an experiment: held-out puzzles with known answers, or a picture and prompt of the
user's own.

Experiments process cases in batches, and `collect` stores the results of each batch in the run
folder. If it is killed and started again, an experiment computes only what is missing, and the
result is the same to the last bit.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minicos import config, puzzles
from minicos.analysis.options import Cases, Puzzles
from minicos.analysis.tools.observer import Observer, folder
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.journal import rows
from minicos.media import load_image
from minicos.peers import presets as peers
from minicos.runs import Progress, Run
from minicos.video_model import VideoModel

Batch = TypeVar("Batch")
MOST = 25  # most cases in a batch


@dataclass(frozen=True)
class Case:
    """One input: a prompt, a first frame (3 H W in [0, 1]) if the model takes one, and the seed of
    its noise.
    """

    prompt: str
    image: Tensor | None = None
    seed: int = 0
    puzzle: puzzles.Puzzle | None = None  # with known answers; None for a case of the user's own

    @classmethod
    def of(cls, puzzle: puzzles.Puzzle, seed: int) -> "Case":
        """The case of a puzzle, with its picture."""
        image = torch.from_numpy(puzzle.first_frame()).permute(2, 0, 1).float() / 255
        return cls(puzzle.prompt, image, seed, puzzle)


def anything(puzzle: puzzles.Puzzle) -> bool:
    """Accept every puzzle."""
    return True


def chosen(options: Puzzles, keep: Callable[[puzzles.Puzzle], bool] = anything) -> list[Case]:
    """The cases that options ask for: held-out puzzles that `keep` accepts, or one case of the
    user's own with `seeds` seeds.

    Raises:
        MinicosError: there is no such family or size, or an image is given without a prompt.
    """
    if isinstance(options, Cases) and options.prompt is not None:
        image = None if options.image is None else load_image(options.image)
        return [Case(options.prompt, image, options.seed + i) for i in range(options.seeds)]
    if isinstance(options, Cases) and options.image is not None:
        raise MinicosError("--image needs a --prompt; without both, held-out puzzles are used")
    found = [
        case for name, n in families(options).items() for case in _of_family(options, name, n, keep)
    ]
    return [replace(case, seed=options.seed + i) for i, case in enumerate(found)]


def families(options: Puzzles) -> dict[str, int]:
    """The number of puzzles of each family that options ask for, without empty families."""
    names = options.puzzle.split(",")
    shares = {name: len(range(k, options.n, len(names))) for k, name in enumerate(names)}
    return {name: n for name, n in shares.items() if n}


def _of_family(
    options: Puzzles, name: str, n: int, keep: Callable[[puzzles.Puzzle], bool]
) -> list[Case]:
    twin = f"{name}-one"  # the same family with one right answer, if it exists
    use_twin = options.single and options.size is None and twin in puzzles.FAMILIES

    def asked(puzzle: puzzles.Puzzle) -> bool:
        return keep(puzzle) and options.wants(ambiguous(puzzle))

    return held_out(
        twin if use_twin else name, n, size=options.size, split=options.split, keep=asked
    )


def held_out(
    puzzle: str,
    n: int,
    *,
    size: int | None = None,
    split: str = "test",
    seed: int = 0,
    keep: Callable[[puzzles.Puzzle], bool] = anything,
) -> list[Case]:
    """The first n distinct puzzles of a split that `keep` accepts, with the noise seeds seed, seed
    + 1, ... `puzzle` is a family, or with `size` a kind.
    """
    family = puzzles.family(puzzle) if size is None else puzzles.of_kind(puzzle, size)
    return [Case.of(one, seed + i) for i, one in enumerate(family.distinct(n, split, keep))]


def ambiguous(puzzle: puzzles.Puzzle) -> bool:
    """Whether several answers are right, so that there is something to decide."""
    return puzzle.ambiguity > 1


def batches(cases: Sequence[Case], most: int = MOST) -> list[list[Case]]:
    """Cases in order, in as few batches as possible, of nearly equal size. Cases in a batch have
    one picture size and one video length.

    Sizes are nearly equal since a batch of one case has no wrong donor (`ensemble`).
    """
    out = []
    for group in alike(cases):
        parts = -(-len(group) // most)
        ends = [len(group) * i // parts for i in range(parts + 1)]
        out += [group[a:b] for a, b in pairwise(ends)]
    return out


def alike(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases in order, split where picture size or video length changes."""
    return [list(group) for _, group in groupby(cases, key=_shape)]


def _shape(case: Case) -> tuple[int, ...]:
    picture = () if case.image is None else tuple(case.image.shape)
    return picture if case.puzzle is None else (*picture, case.puzzle.frames)


def boundary(wan: VideoModel) -> int | None:
    """The first step that the low-noise expert serves; None if one expert serves all."""
    serves = [wan.expert_name(t) for t in wan.schedule().timesteps]
    return serves.index("low") if len(set(serves)) > 1 else None


def condition(wan: VideoModel, batch: Sequence[Case]) -> Condition:
    """The batch's condition; pictures have one size and videos one length (`batches`). An ideal
    observer receives the puzzles, which a network must infer from prompt and picture.

    Raises:
        MinicosError: the model is not set to make videos in which puzzles can be judged.
    """
    length, area = frames(wan, batch), wan.preset.area
    if batch[0].puzzle is not None and area is not None:  # no picture would keep its size
        height, width, _ = batch[0].puzzle.first_frame().shape
        raise MinicosError(
            f"puzzles are judged in their own size, and {wan.variant} is set to videos of about "
            f"{area} pixels: take with_preset(frames={batch[0].puzzle.frames}, "
            f"size=({height}, {width}), area=None)"
        )
    if isinstance(wan, Observer):
        return wan.known([known(case) for case in batch], length)
    images = [case.image for case in batch if case.image is not None]
    prompts = [case.prompt for case in batch]
    return wan.condition(prompts, torch.stack(images) if images else None, frames=length)


def frames(wan: VideoModel, batch: Sequence[Case]) -> int:
    """The length of a batch's videos: that of its puzzles, unless the preset deviates from the
    model's usual one.
    """
    asked = wan.preset.frames
    presets = peers if wan.variant in peers.PRESETS else config
    if batch[0].puzzle is None or asked != presets.get_preset(wan.variant).frames:
        return asked
    return batch[0].puzzle.frames


def noise(wan: VideoModel, condition: Condition, batch: Sequence[Case], offset: int = 0) -> Tensor:
    """The initial noise of each case: from the case's seed, plus `offset` for independent runs of
    the same case.
    """
    return wan.noise(condition, [case.seed + offset for case in batch])


def scores(wan: VideoModel, latent: Tensor, batch: Sequence[Case]) -> list[puzzles.Score]:
    """The verdict on each case's final latent (b c f h w), from its decoded pixels."""
    return [known(case).score(v) for case, v in zip(batch, wan.decode(latent), strict=True)]


def known(case: Case) -> puzzles.Puzzle:
    """The puzzle of a case that has one. Raises ValueError for a case of the user's own."""
    if case.puzzle is None:
        raise ValueError(f"{case.prompt!r} is not a puzzle: its answers are unknown")
    return case.puzzle


def collect(
    run: Run,
    name: str,
    work: Sequence[Batch],
    compute: Callable[[Batch], Mapping[str, Tensor]],
    bar: Progress | None = None,
) -> dict[str, np.ndarray]:
    """`compute` each batch once and store its tensors (first axis: cases) in `run`; returns those
    of all batches, in order. `bar` is that of a study with several parts, one tick for each batch.
    """
    parts: list[dict[str, Tensor]] = []
    first = 0
    with Progress(len(work), name) if bar is None else nullcontext(bar) as shown:
        for index, batch in enumerate(work):
            shown.begin()
            file = stored(name, index)
            if not run.has(file):
                run.save_tensors(file, dict(compute(batch)))
            parts.append(run.load_tensors(file))
            first += log(run, name, first, parts[-1])
            shown.tick()
    return {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}


def stored(name: str, index: int) -> str:
    """The file in which `collect` stores a batch."""
    return f"{name}/{index:03d}.safetensors"


def collect_each(
    run: Run,
    name: str,
    models: Mapping[str, VideoModel],
    work: Sequence[Batch],
    compute: Callable[[VideoModel, Batch], Mapping[str, Tensor]],
    bar: Progress | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """`collect` for each of `observer.models`. `bar` is that of a study with several parts, one
    tick for each batch of each model.
    """
    with Progress(len(models) * len(work), name) if bar is None else nullcontext(bar) as shown:
        return {
            who: collect(run, folder(name, who), work, partial(compute, model), shown)
            for who, model in models.items()
        }


def log(run: Run, part: str, first: int, found: Mapping[str, Tensor]) -> int:
    """Write a batch's numbers to the run's journal, a line for each case, counted from `first`;
    returns the number of cases.
    """
    count = max(len(values) for values in found.values() if values.ndim)
    if run.journal is not None:
        for i, row in enumerate(rows(found, count)):
            run.log({"part": part, "case": first + i, **row})
    return count
