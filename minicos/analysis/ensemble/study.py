"""Ensembles over windows, modes and steps, chosen on one split and reported on another, beside controls and rivals (`experiment`).

What is shared, and when, is in `ensemble`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from minicos.analysis.ensemble.share import Ensemble, Passes, run, window
from minicos.analysis.tools import cases, stats
from minicos.analysis.tools.cases import Case
from minicos.runs import Run
from minicos.wan import Wan

APART = 1_000_000  # between the noise seeds of a case's T runs, since neighbouring cases have neighbouring seeds


def ablation(
    depth: int, windows: Sequence[tuple[int, int]], modes: Sequence[str], like: Ensemble
) -> dict[str, Ensemble]:
    """An arm for each mode and window (in blocks of 40), otherwise `like`; by name, e.g. "override 20-29 @0"."""
    return {
        f"{mode} {a}-{b} @{span(like.steps)}": replace(
            like, layers=window(a, b, depth), mode=mode, alpha=like.alpha if mode == "mix" else 1.0
        )
        for mode in modes
        for a, b in windows
    }


def controls(name: str, e: Ensemble) -> dict[str, Ensemble]:
    """The same arm with wrong donors, and with a random direction of equal norm (at the layers that count, so that it acts once)."""
    return {
        f"{name}, other cases": replace(e, donors="others"),
        f"{name}, random direction": replace(e, layers=e.counting, donors="random"),
    }


def rivals(like: Ensemble) -> dict[str, Ensemble]:
    """What could be averaged instead, at the same steps: clean estimates, and latents at their own norm."""
    common = {"layers": (), "alpha": 1.0, "donors": "own"}
    return {
        f"clean estimate @{span(like.steps)}": replace(like, **common, mode="x0", keep_norm=False),
        f"latent, norm kept @{span(like.steps)}": replace(
            like, **common, mode="latent", keep_norm=True
        ),
    }


def span(steps: Sequence[int]) -> str:
    """Steps in words: 0, 0-4, or 0,2,5."""
    low, high = min(steps), max(steps)
    consecutive = len(steps) == high - low + 1 > 1
    return f"{low}-{high}" if consecutive else ",".join(map(str, steps))


def compare(wan: Wan, arms: Mapping[str, Ensemble], batch: Sequence[Case]) -> dict[str, Tensor]:
    """T plain runs of each case and every arm from the same noise. First axis: cases.

    "plain.*" has a second axis of T seeds; an arm's second axis is its carriers (1, or T). Keys, each behind the name of its arm:
    latent   of cases without a puzzle
    solved   of puzzles, 0 or 1
    moved    squared distance of the final latent to the plain one of the same seed; "plain.apart" is that of two plain runs
    passes   through the network, per case
    "plain.vote" is the run nearest to the others: of three runs of which two agree, one of those. A vote without a scorer.
    """
    (seeds,) = {e.seeds for e in arms.values()}
    single = cases.condition(wan, batch)
    condition = single.rows(torch.arange(len(batch)).repeat_interleave(seeds))
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
    for step in wan.sample(condition, noise=noise, hooks=counter.hooks):
        final = step.next
    note("plain", final, counter)
    plain = final.unflatten(0, (len(batch), seeds))
    pairs = (
        (plain[:, :, None].double() - plain[:, None].double()).square().sum(dim=(3, 4, 5, 6))
    )  # case seed seed
    out["plain.vote"] = pairs.sum(2).argmin(1)
    out["plain.apart"] = pairs.sum(dim=(1, 2)) / max(1, seeds * (seeds - 1))
    for name, e in arms.items():
        counter = Passes()
        latent = run(wan, condition, noise, e, watch=counter.hooks)
        note(name, latent, counter)
        own = plain if e.carrier is None else plain[:, e.carrier : e.carrier + 1]
        out[f"{name}.moved"] = stats.squared(latent, own.flatten(0, 1)).sum(1).view(own.shape[:2])
    return out


@dataclass(frozen=True)
class Row:
    """One line of the result: an arm against the plain runs of the same seeds."""

    name: str
    rate: stats.Interval  # share of puzzles solved
    gain: stats.Interval  # paired difference to the plain carrier
    p: float  # sign-flip test
    p_holm: float | None  # corrected over the arms of the ablation; None for rivals and controls
    resolvable: float  # the gain that so many puzzles find, given the scatter (of one changed puzzle at least)
    distance: float | None  # D to the plain run: 0 the same video, 1 as different as another seed
    passes: float  # through the network, per puzzle


def result(data: Mapping, arms: Mapping[str, Ensemble], family: Sequence[str]) -> list[Row]:
    """The table: plain, the arms in order, then the rivals that choose among T plain runs. `family` is corrected together."""
    (carrier,) = {e.carrier for e in arms.values()}
    plain = data["plain.solved"].astype(float)
    seeds = plain.shape[1]
    passes = float(data["plain.passes"].mean())
    base = plain.mean(1) if carrier is None else plain[:, carrier]
    vote = plain[range(len(plain)), data["plain.vote"]]
    solved = {
        "plain (T = 1)": (base, passes / seeds, None),
        **{
            name: (
                data[f"{name}.solved"].mean(1),
                float(data[f"{name}.passes"].mean()),
                moved(data, name),
            )
            for name in arms
        },
        f"vote among {seeds} plain runs": (vote, passes, None),
        f"best of {seeds} plain runs (oracle)": (plain.max(1), passes, None),
    }
    p = {name: stats.p_value(values - base) for name, (values, _, _) in solved.items()}
    corrected = dict(zip(family, stats.holm([p[name] for name in family]), strict=True))
    return [
        Row(
            name,
            stats.bootstrap(values),
            stats.paired(values, base),
            p[name],
            corrected.get(name),
            stats.resolvable(max(float((values - base).std()), len(base) ** -0.5), len(base)),
            distance,
            cost,
        )
        for name, (values, cost, distance) in solved.items()
    ]


def moved(data: Mapping, name: str) -> float | None:
    """D of an arm's final latents to the plain ones; None for T = 1.

    Pooled over cases: three seeds that give one answer are no yardstick of their own.
    """
    unit = float(data["plain.apart"].mean())
    return float(data[f"{name}.moved"].mean()) / unit if unit else None


def experiment(
    wan: Wan,
    folder: Run,
    arms: Sequence[Mapping[str, Ensemble]],
    dev: Sequence[Sequence[Case]],
    test: Sequence[Sequence[Case]],
    instead: bool = True,
) -> tuple[str, list[Row]]:
    """Choose an arm on batches of dev puzzles, report on batches of test puzzles; its name, and the table.

    `arms` holds an `ablation` for each set of steps, the paper's in front. On dev all are tried, and most puzzles solved decides
    (of equals the first; without dev puzzles the very first is taken). On test: the first ablation, the chosen arm, its controls
    and, `instead` of hidden states, its `rivals`. Batches are kept in `folder` as they are finished.
    """
    candidates = {name: e for some in arms for name, e in some.items()}
    chosen = next(iter(candidates))
    if dev:
        data = cases.collect(folder, "dev", dev, partial(compare, wan, candidates))
        chosen = max(candidates, key=lambda name: data[f"{name}.solved"].mean())
    family = {**arms[0], chosen: candidates[chosen]}
    tried = {
        **family,
        **controls(chosen, candidates[chosen]),
        **(rivals(candidates[chosen]) if instead else {}),
    }
    return chosen, result(
        cases.collect(folder, "test", test, partial(compare, wan, tried)), tried, list(family)
    )
