"""Results of ensembles: T plain runs and every arm from the same noise, on batches of cases."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.ensemble.share import Ensemble, Passes, run
from minicos.analysis.tools import cases, stats
from minicos.analysis.tools.cases import Case
from minicos.video_model import VideoModel

# offset between the noise seeds of a case's T runs, since neighbouring cases have adjacent seeds
APART = 1_000_000


def compare(
    wan: VideoModel, arms: Mapping[str, Ensemble], batch: Sequence[Case], select: int = 1
) -> dict[str, Tensor]:
    """Make T plain runs of each case, and every arm from the same noise. First axis: cases.

    The second axis of "plain.*" is the T seeds; that of an arm is its carriers (1 or T). The vote
    "plain.vote" is the run nearest to the others: of three runs of which two agree, one of those
    two. It needs no scorer. For puzzles, "plain.early" is the run whose clean estimate scores best
    after `select` steps (the first of equals): a verifier that knows the rules judges it.

    Returns:
        latent: for cases without a puzzle.
        solved: for puzzles, 0 or 1.
        moved: squared distance of the final latent to the plain one of the same seed;
            "plain.apart" is that of two plain runs.
        passes: through the network, per case.
    Each key is prefixed with the name of its arm.
    """
    (seeds,) = {e.seeds for e in arms.values()}
    single = cases.condition(wan, batch)
    condition = single.take(torch.arange(len(batch)).repeat_interleave(seeds))
    noise = torch.stack(
        [cases.noise(wan, single, batch, APART * j) for j in range(seeds)], dim=1
    ).flatten(0, 1)
    out: dict[str, Tensor] = {}

    def note(name: str, latent: Tensor, counter: Passes) -> None:
        each = latent.unflatten(0, (len(batch), -1))
        repeated = [case for case in batch for _ in range(each.shape[1])]
        if batch[0].puzzle is None:
            out[f"{name}.latent"] = each
        else:
            solved = torch.tensor([score.solved for score in cases.scores(wan, latent, repeated)])
            out[f"{name}.solved"] = solved.view(each.shape[:2]).byte()
        out[f"{name}.passes"] = torch.full((len(batch),), counter.count / len(batch))

    counter = Passes()
    early: Tensor | None = None
    for step in wan.sample(condition, noise=noise, hooks=counter.hooks):
        final = step.next
        if step.index == select - 1 and batch[0].puzzle is not None:
            each = [case for case in batch for _ in range(seeds)]
            early = torch.tensor([v.score for v in cases.scores(wan, step.x0, each)])
    note("plain", final, counter)
    plain = final.unflatten(0, (len(batch), seeds))
    apart = plain[:, :, None].double() - plain[:, None].double()
    pairs = apart.square().sum(dim=(3, 4, 5, 6))  # case seed seed
    out["plain.vote"] = pairs.sum(2).argmin(1)
    if early is not None:
        out["plain.early"] = early.view(len(batch), seeds).argmax(1)
        share = select / wan.preset.steps  # the part of a run that all seeds make
        out["plain.early.passes"] = out["plain.passes"] * (share + (1 - share) / seeds)
    out["plain.apart"] = pairs.sum(dim=(1, 2)) / max(1, seeds * (seeds - 1))
    for name, e in arms.items():
        counter = Passes()
        latent = run(wan, condition, noise, e, watch=counter.hooks)
        note(name, latent, counter)
        own = plain if e.carrier is None else plain[:, e.carrier : e.carrier + 1]
        out[f"{name}.moved"] = stats.squared(latent, own.flatten(0, 1)).sum(1).view(own.shape[:2])
    return out


def moved(data: Mapping, name: str) -> float | None:
    """D of an arm's final latents to the plain ones; None for T = 1.

    Pooled over cases, since three seeds that give one answer define no unit of their own.
    """
    apart, unit = (np.array([float(data[k].mean())]) for k in (f"{name}.moved", "plain.apart"))
    return float(stats.distance(apart, unit)) if unit.any() else None
