"""When is the answer decided? Completions from a re-noised estimate (ours; the paper reads
commitment off the pictures).

A blurred estimate need not be an undecided one. So at step s the clean estimate x0 is thrown back
to its own noise level with fresh noise, x = (1 - sigma) x0 + sigma noise', and completed, K times
over. What the completions answer is what was decided at s:

    commitment(s) = 1 - H(answers of the completions) / log(valid answers)         0 every answer
                                                                                   alike, 1 always
                                                                                   the same

and the decision step is the first s with commitment >= 0.9 (`DECIDED`). Only the estimate survives
the re-noising, so whatever the noise itself would have decided later is left open; that is the
difference from the run's own future, where noise is not redrawn. Completions that answer nothing
valid count beside (`valid`). Trivial by construction: at the last step there is nothing left to
decide, and a puzzle with one answer is committed from the start, so it is refused.
"""

from collections.abc import Mapping, Sequence
from math import log, nan

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.options import CommitmentOptions
from minicos.analysis.result import Curve, Number, Result, Row, write
from minicos.analysis.steps import spread
from minicos.analysis.tools import cases, figures, stats
from minicos.analysis.tools.cases import Case
from minicos.condition import WanCondition
from minicos.errors import MinicosError
from minicos.runs import Run
from minicos.sample import State, Step
from minicos.wan import Wan

DECIDED = 0.9


def renoise(step: Step, seeds: Sequence[int]) -> Tensor:
    """The step's estimate at its own noise level, once with the noise of each seed: k b c f h w."""
    noises = [
        torch.randn(step.x.shape, generator=torch.Generator().manual_seed(s)).to(step.x)
        for s in seeds
    ]
    return torch.stack(
        [(1 - step.sigma_map) * step.x0 + step.sigma_map * noise for noise in noises]
    )


def complete(
    wan: Wan, condition: WanCondition, x: Tensor, start: int, state: State | None = None
) -> Tensor:
    """Sample on from latents x (b c f h w) that enter step `start` with what travels beside
    them; the final latents.
    """
    for step in wan.sample(condition, noise=x, start=start, state=state):
        x = step.next
    return x


def completions(
    wan: Wan, batch: Sequence[Case], at: Sequence[int], count: int, seed: int = 10_000
) -> Tensor:
    """Which valid answer each completion gives, -1 for none: b steps count, int64, steps in the
    order of `at`.

    Network passes: for a run of N steps, N + count * sum(N - s for s in at), per case.
    """
    condition = cases.condition(wan, batch)
    out = {}
    # what entered the step with its latent; a renoised one has no history
    beside: State | None = None
    for step in wan.sample(condition, noise=cases.noise(wan, condition, batch)):
        if step.index in at:
            ends = (
                complete(wan, condition, x, step.index, beside)
                for x in renoise(step, [seed + k for k in range(count)])
            )
            out[step.index] = torch.stack([_answers(wan, end, batch) for end in ends], dim=1)
        beside = step.state.edited()
    return torch.stack([out[s] for s in at], dim=1)


def _answers(wan: Wan, latent: Tensor, batch: Sequence[Case]) -> Tensor:
    return torch.tensor([s.answer if s.solved else -1 for s in cases.scores(wan, latent, batch)])


def shares(answers: Tensor, candidates: int) -> Tensor:
    """The share of each valid answer among the completions (..., count) that gave one: ...
    candidates, NaN where none did.
    """
    counts = torch.stack([(answers == r).sum(-1) for r in range(candidates)], dim=-1).double()
    return counts / counts.sum(-1, keepdim=True)


def commitment(share: Tensor) -> Tensor:
    """1 - H / log(candidates) of shares (... candidates): ...; needs two candidates or more."""
    if share.shape[-1] < 2:
        raise ValueError(
            "a puzzle with one answer is committed from the start: take puzzles with several"
        )
    return 1 - torch.special.entr(share).sum(-1) / log(share.shape[-1])


def decision(commitments: Sequence[float], at: Sequence[int]) -> int | None:
    """The first step of `at` that is committed; None where none is."""
    return next((s for s, c in zip(at, commitments, strict=True) if c >= DECIDED), None)


def spread_of(wan: Wan, case: Case, at: Sequence[int], count: int, seed: int = 10_000) -> Tensor:
    """The same for a case without a scorer: how far apart the completions of each step end, 1 as far as other seeds do  (steps).

    `count` is 2 or more. The yardstick are `count` plain runs, from the same seeds: at a step 0 of
    pure noise the completions *are* these runs, and it is 1 by construction. Passes: N + count * (N
    + sum(N - s for s in at)).
    """
    condition = cases.condition(wan, [case])
    ends = {}
    beside: State | None = None
    for step in wan.sample(condition, noise=cases.noise(wan, condition, [case])):
        if step.index in at:
            starts = renoise(step, [seed + k for k in range(count)])
            ends[step.index] = [complete(wan, condition, x, step.index, beside) for x in starts]
        beside = step.state.edited()
    others = [complete(wan, condition, wan.noise(condition, [seed + k]), 0) for k in range(count)]
    unit = stats.yardstick(others)
    return torch.stack([stats.distance(stats.yardstick(ends[s]), unit)[0] for s in at])


def study(wan: Wan, run: Run, options: CommitmentOptions) -> Result:
    """Commitment at the steps `at`, from `count` completions each; of a case of the user's own, how
    far apart they end.

    Raises MinicosError for a single completion without a scorer.
    """
    chosen = cases.chosen(options)
    at = options.at or spread(6, wan.preset.steps)
    if options.prompt is None:
        found = _puzzles(wan, run, chosen, at, options.count)
    elif options.count < 2:
        raise MinicosError(
            "--count 1: without a scorer, completions are compared with each other: take 2 or more"
        )
    else:
        found = _own(wan, run, chosen[0], at, options.count)
    return write(run, found)


def _puzzles(wan: Wan, run: Run, chosen: Sequence[Case], at: Sequence[int], count: int) -> Result:
    def compute(batch: Sequence[Case]) -> dict[str, Tensor]:
        return {"answers": completions(wan, batch, at, count)}

    kept = cases.collect(run, "completions", cases.batches(chosen), compute)
    answers = torch.from_numpy(kept["answers"])  # n steps count
    candidates = [len(cases.known(case).candidates) for case in chosen]
    pairs = zip(answers, candidates, strict=True)
    committed = np.stack([commitment(shares(a, r)).numpy() for a, r in pairs])
    valid = answers >= 0
    measured = {
        "commitment": committed,
        "all alike and valid": ((answers == answers[..., :1]) & valid).all(2).double().numpy(),
        "valid completions": valid.double().mean(2).numpy(),
    }
    label = "step that is completed from"
    curves = [stats.curve(name, values, at, label) for name, values in measured.items()]
    figures.lines(
        run.path("commitment.png"),
        curves,
        y="commitment; share",
        title=f"When is the answer decided? n = {len(chosen)}, {count} completions each",
        levels={"decided": DECIDED},
    )
    rows: list[Row] = [
        {"step": s, **{name: stats.mean("", v[:, k]).interval for name, v in measured.items()}}
        for k, s in enumerate(at)
    ]
    found = numbers(measured, at, count)
    return Result("commitment", run.settings, found, {"steps": rows}, curves, ["commitment.png"])


def numbers(measured: Mapping[str, np.ndarray], at: Sequence[int], count: int) -> list[Number]:
    """Every measure at each step minus the first of them, and when the answer is decided."""
    first = f"step {at[0]} ({count} completions; at step 0 other seeds, by construction)"
    decided = [decision(line, at) for line in measured["commitment"]]
    steps = [nan if step is None else step for step in decided]
    return [
        *(
            stats.difference(f"{name}: step {s} minus step {at[0]}", v[:, k], v[:, 0], first)
            for name, v in measured.items()
            for k, s in enumerate(at)
            if k
        ),
        stats.mean(
            "decided by the last of these steps",
            np.isfinite(steps),
            f"commitment of {DECIDED} or more",
            "share",
        ),
        stats.mean("step at which it is decided, where it is", steps, unit="step"),
    ]


def _own(wan: Wan, run: Run, case: Case, at: Sequence[int], count: int) -> Result:
    def compute(batch: Sequence[Case]) -> dict[str, Tensor]:
        return {"apart": spread_of(wan, batch[0], at, count)[None]}

    apart = cases.collect(run, "spread", [[case]], compute)["apart"][0].tolist()
    curve = Curve(
        "completions", tuple(at), tuple(apart), x_label="step that is completed from", unit="D"
    )
    figures.lines(
        run.path("spread.png"),
        [curve],
        y="D between completions, 1: another seed",
        title="How far apart the completions of each step end",
    )
    rows: list[Row] = [
        {"step": s, "D between completions": d} for s, d in zip(at, apart, strict=True)
    ]
    return Result("commitment", run.settings, (), {"steps": rows}, [curve], ["spread.png"])
