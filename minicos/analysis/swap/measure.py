"""Measurements of swaps: every arm of a plan on pairs, in batches that a killed sweep does not
repeat.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.swap.pairs import UNREAD, Pair, donors
from minicos.analysis.swap.plan import Arm, Plan, layer_name
from minicos.analysis.swap.states import Swap, flip, leverage, lockstep
from minicos.analysis.tools import cases
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.masks import on_grid
from minicos.media import save_video
from minicos.runs import Progress, Run
from minicos.video_model import VideoModel


def undisturbed(wan: VideoModel, made: Sequence[Pair], starts: Sequence[int]) -> dict[str, Tensor]:
    """Both undisturbed runs of each pair, first axis pairs: where they end, what that shows, and
    B's latent and velocity at `starts`.
    """
    out, ends = {}, {}
    for name in ("a", "b"):
        condition = cases.condition(wan, [getattr(pair, name) for pair in made])
        noise = cases.noise(wan, condition, [pair.b for pair in made])
        kept = {}
        for step in wan.sample(condition, noise=noise):
            if step.index in starts:
                kept[step.index] = step.x, step.velocity
        ends[name] = step.next
    out["x"], out["velocity"] = (torch.stack([kept[i][k] for i in starts], dim=1) for k in (0, 1))
    return out | ends | {f"{name}.answer": read(wan, ends[name], made) for name in ends}


def measure(
    wan: VideoModel,
    made: Sequence[Pair],
    given: Sequence[Case],
    plain: Mapping[str, Tensor],
    swaps: Sequence[Swap],
    *,
    donor: str = "own",
    index: int = 0,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """All measurements of some swaps in some pairs, each (pairs swaps), and B's final latents, one
    for each swap.

    Args:
        given: the donors' cases (`donors`).
        plain: the pairs' `undisturbed` runs.
        index: which of their starts is the first step of the swaps.
    """
    take = cases.condition(wan, [pair.b for pair in made])
    give = cases.condition(wan, given)
    noise = cases.noise(wan, take, [pair.b for pair in made])
    first = swaps[0].steps.start
    # solver history and further latents are not kept: dropping them is a change in itself
    resumed = wan.preset.solver == "euler" and not wan.beside(noise, take)
    x, start = (plain["x"][:, index].to(noise), first) if resumed else (noise, 0)
    for steps in lockstep(wan, give, take, noise, swaps, donor=donor, x=x, start=start):
        if steps[0].index == first:
            moved = [leverage(step, plain["velocity"][:, index].to(noise)) for step in steps]
    ends = [step.next for step in steps]
    flips, off_axis = zip(*(flip(y, plain["a"].to(y), plain["b"].to(y)) for y in ends), strict=True)
    out = {
        "flip": torch.stack(flips, 1),
        "off_axis": torch.stack(off_axis, 1),
        "leverage": torch.stack(moved, 1),
        "changed": torch.stack([(y - plain["b"].to(y)).abs().flatten(1).amax(1) for y in ends], 1),
        "answer": torch.stack([read(wan, y, made) for y in ends], 1),
    }
    return out, ends


def read(wan: VideoModel, latent: Tensor, made: Sequence[Pair]) -> Tensor:
    """What each pair's final latent shows, int64 (b,); decoded only if something can judge it."""
    if not any(pair.shows for pair in made):
        return torch.full((len(made),), UNREAD)
    return torch.tensor(
        [pair.read(video) for pair, video in zip(made, wan.decode(latent), strict=True)]
    )


Results = Mapping[Arm | None, Mapping[str, np.ndarray]]


def measure_all(
    wan: VideoModel, run: Run, plan: Plan, made: Sequence[Pair], most: int = cases.MOST
) -> Results:
    """Measure every arm of a plan: {"flip", "off_axis", "leverage", "changed", "answer"}, each
    (pairs layers). The `undisturbed` runs are stored under the key None. Batches in `run` are not
    computed again. For the first pair, all videos are kept to look at.
    """
    plan.check(made)
    work = [slice(i, i + most) for i in range(0, len(made), most)]
    starts = sorted({steps.start for steps in plan.ranges})

    def compute_plain(rows: slice) -> dict[str, Tensor]:
        out = undisturbed(wan, made[rows], starts)
        if not rows.start:
            _keep(wan, run, "undisturbed", {name: out[name] for name in ("b", "a")})
        return out

    bar = Progress((1 + len(plan.arms)) * len(work), "swap")
    plain = cases.collect(run, "undisturbed", work, compute_plain, bar)
    results: dict[Arm | None, dict[str, np.ndarray]] = {None: plain}
    for arm in plan.arms:
        given = donors(made, arm.control)

        def compute(
            rows: slice, arm: Arm = arm, given: Sequence[Case] = given
        ) -> dict[str, Tensor]:
            swaps = plan.swaps(arm, _region(wan, plan.region, made[rows]))
            before = {name: torch.from_numpy(values[rows]) for name, values in plain.items()}
            index = starts.index(arm.steps.start)
            out, ends = measure(
                wan, made[rows], given[rows], before, swaps, donor=arm.donor, index=index
            )
            if not rows.start and not arm.control:
                _keep(
                    wan,
                    run,
                    arm.file,
                    {f"layer_{layer_name(k)}": y for k, y in zip(plan.layers, ends, strict=True)},
                )
            return out

        results[arm] = cases.collect(run, arm.file, work, compute, bar)
    bar.close()
    return results


def _region(wan: VideoModel, name: str, made: Sequence[Pair]) -> Tensor | None:
    """The swapped tokens in each pair, bool (b, l); None for all."""
    if name == "all":
        return None
    grid = wan.grid(cases.condition(wan, [pair.b for pair in made]).shape)
    objects = [pair.objects for pair in made if pair.objects is not None]
    inside = torch.stack([on_grid(mask, grid).flatten() for mask in objects])
    return inside if name == "objects" else ~inside


def _keep(wan: VideoModel, run: Run, name: str, latents: Mapping[str, Tensor]) -> None:
    """Save the first sample of each latent as a video, and all last frames for the picture of
    `draw`.
    """
    last = {}
    for label, latent in latents.items():
        video = wan.decode(latent[:1])[0]
        save_video(run.path(f"videos/{name}/{label}.mp4"), video, fps=wan.preset.fps)
        last[label] = torch.from_numpy(video[-1])
    run.save_tensors(f"last/{name}.safetensors", last)
