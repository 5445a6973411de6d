"""What comes of ensembles: T plain runs and every arm from the same noise, on batches of cases."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.ensemble.share import Ensemble, Passes, run
from minicos.analysis.tools import cases, stats
from minicos.analysis.tools.cases import Case
from minicos.condition import Condition
from minicos.runs import Progress
from minicos.video_model import VideoModel

# offset between the noise seeds of a case's T runs, since neighbouring cases have adjacent seeds
APART = 1_000_000


def starts(wan: VideoModel, batch: Sequence[Case], seeds: int) -> tuple[Condition, Tensor]:
    """Condition and noise of T runs of each case, in rows (case seed)."""
    single = cases.condition(wan, batch)
    noise = [cases.noise(wan, single, batch, APART * j) for j in range(seeds)]
    repeated = single.take(torch.arange(len(batch)).repeat_interleave(seeds))
    return repeated, torch.stack(noise, dim=1).flatten(0, 1)


def plain_runs(
    wan: VideoModel, batch: Sequence[Case], condition: Condition, noise: Tensor, select: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """Make T plain runs of each case, with a network or an ideal observer, from `starts`.

    Returns:
        The final latents in rows (case seed) c f h w, and these numbers, one for each case, or one
        for each of its T runs where "case seed" is noted:

        plain.latent: for cases without a puzzle, case seed c f h w.
        plain.solved: for puzzles, case seed, 0 or 1.
        plain.passes: through the network.
        plain.apart: mean squared distance between two of the runs.
        plain.vote: the run nearest to the others: of three runs of which two agree, one of those
            two. It needs no scorer.
        plain.early: for puzzles, the run whose clean estimate scores best after `select` steps
            (the first of equals): a verifier that knows the rules judges it.
        plain.early.passes: its cost: all runs for `select` steps, one to the end.
    """
    seeds, counter, early = len(noise) // len(batch), Passes(), None
    for step in wan.sample(condition, noise=noise, hooks=counter.hooks):
        final = step.next
        if step.index == select - 1 and batch[0].puzzle is not None:
            each = [case for case in batch for _ in range(seeds)]
            early = torch.tensor([v.score for v in cases.scores(wan, step.x0, each)])
    out = outcome(wan, "plain", batch, final, counter)
    plain = final.unflatten(0, (len(batch), seeds))
    apart = plain[:, :, None].double() - plain[:, None].double()
    pairs = apart.square().sum(dim=(3, 4, 5, 6))  # case seed seed
    out["plain.vote"] = pairs.sum(2).argmin(1)
    out["plain.apart"] = pairs.sum(dim=(1, 2)) / max(1, seeds * (seeds - 1))
    if early is not None:
        out["plain.early"] = early.view(len(batch), seeds).argmax(1)
        share = select / wan.preset.steps  # the part of a run that all seeds make
        out["plain.early.passes"] = out["plain.passes"] * (share + (1 - share) / seeds)
    return out, final


def outcome(
    wan: VideoModel, name: str, batch: Sequence[Case], latent: Tensor, counter: Passes
) -> dict[str, Tensor]:
    """The outcome of an arm under its name: `latent` or `solved`, and `passes` (`plain_runs`)."""
    each = latent.unflatten(0, (len(batch), -1))
    out = {f"{name}.passes": torch.full((len(batch),), counter.count / len(batch))}
    if batch[0].puzzle is None:
        return {f"{name}.latent": each, **out}
    repeated = [case for case in batch for _ in range(each.shape[1])]
    solved = torch.tensor([score.solved for score in cases.scores(wan, latent, repeated)])
    return {f"{name}.solved": solved.view(each.shape[:2]).byte(), **out}


def compare(
    wan: VideoModel,
    arms: Mapping[str, Ensemble],
    batch: Sequence[Case],
    select: int = 1,
    bar: Progress | None = None,
) -> dict[str, Tensor]:
    """Make T plain runs of each case (`plain_runs`), and every arm from the same noise.

    Each arm adds `latent` or `solved` and `passes`, prefixed with its name; the second axis is its
    carriers (1 or T). `moved` is the squared distance of its final latent to the plain one of the
    same seed. Each arm is a tick of `bar`.
    """
    (seeds,) = {e.seeds for e in arms.values()}
    condition, noise = starts(wan, batch, seeds)
    out, final = plain_runs(wan, batch, condition, noise, select)
    plain = final.unflatten(0, (len(batch), seeds))
    for name, e in arms.items():
        counter = Passes()
        latent = run(wan, condition, noise, e, watch=counter.hooks)
        out |= outcome(wan, name, batch, latent, counter)
        own = plain if e.carrier is None else plain[:, e.carrier : e.carrier + 1]
        out[f"{name}.moved"] = stats.squared(latent, own.flatten(0, 1)).sum(1).view(own.shape[:2])
        if bar is not None:
            bar.tick()
    return out


def moved(data: Mapping, name: str) -> float | None:
    """D of an arm's final latents to the plain ones; None for T = 1.

    Pooled over cases: three seeds that give one answer are no yardstick of their own.
    """
    apart, unit = (np.array([float(data[k].mean())]) for k in (f"{name}.moved", "plain.apart"))
    return float(stats.distance(apart, unit)) if unit.any() else None
