"""When is the answer decided, and is a wrong one corrected? Completions from a re-noised estimate
(ours; the paper judges both from the pictures).

A blurred estimate need not be undecided. So at step s the clean estimate x0 is set back to its
noise level with fresh noise, x = (1 - sigma) x0 + sigma noise', and completed, K times. What the
completions have in common was decided at s:

    commitment(s) = (agreement - 1/k) / (1 - 1/k)      k valid answers; agreement: the share of
                                                       pairs of valid completions that are equal

It is 0 if completions agree as often as random draws, 1 if they always agree, and unbiased for any
K of 2 or more. Only the estimate survives re-noising, so anything that the noise itself would have
decided later stays open; this differs from the run's own future, whose noise is not redrawn.
Trivial by construction: at step 0 completions are other seeds; at the last step nothing is left to
decide; a puzzle with one answer has no commitment; and an ideal observer also commits, by Bayes'
rule (`--ideal`).

Self-correction: completions that show a plausible wrong answer (a foil) where the run ends at a
valid one, minus the opposite. Errors that come and go independently give equal numbers of both.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.options import CommitmentOptions
from minicos.analysis.result import Curve, Number, Result, Row, write
from minicos.analysis.steps import spread
from minicos.analysis.tools import cases, figures, observer, stats
from minicos.analysis.tools.cases import Case
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.puzzles import Score
from minicos.runs import Run
from minicos.sample import State, Step
from minicos.video_model import VideoModel

NONE = -1  # no answer


def renoise(step: Step, seeds: Sequence[int]) -> Tensor:
    """The step's estimate at its own noise level, with the noise of each seed: k b c f h w."""
    noises = [
        torch.randn(step.x.shape, generator=torch.Generator().manual_seed(s)).to(step.x)
        for s in seeds
    ]
    return torch.stack(
        [(1 - step.sigma_map) * step.x0 + step.sigma_map * noise for noise in noises]
    )


def complete(
    wan: VideoModel, condition: Condition, x: Tensor, start: int, state: State | None = None
) -> Tensor:
    """Continue sampling from latents x (b c f h w) that enter step `start` with `state`; returns
    the final latents.
    """
    for step in wan.sample(condition, noise=x, start=start, state=state):
        x = step.next
    return x


def completions(
    wan: VideoModel, batch: Sequence[Case], at: Sequence[int], count: int, seed: int = 10_000
) -> dict[str, Tensor]:
    """The answers of the completions of each step, and of the run itself; int64: a valid answer
    from 0 on, NONE, or a foil below it.

    Network passes per case, for a run of N steps: N + count * sum(N - s for s in at).

    Returns:
        answers: b steps count, steps in the order of `at`.
        ends: b.
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
    answers = torch.stack([out[s] for s in at], dim=1)
    return {"answers": answers, "ends": _answers(wan, step.next, batch)}


def _answers(wan: VideoModel, latent: Tensor, batch: Sequence[Case]) -> Tensor:
    return torch.tensor([_shown(verdict) for verdict in cases.scores(wan, latent, batch)])


def _shown(verdict: Score) -> int:
    if verdict.solved and verdict.answer is not None:
        return verdict.answer
    return NONE if verdict.foil is None else NONE - 1 - verdict.foil


def commitment(answers: Tensor, candidates: int) -> Tensor:
    """How much more often two valid completions (..., count) agree than two random draws from
    `candidates` valid answers: ...; NaN if fewer than two are valid, or only one answer is.
    """
    seen = range(int(answers.max()) + 1)  # at most `candidates`, which can be a large number
    counts = torch.stack([(answers == r).sum(-1) for r in (*seen, candidates)], dim=-1).double()
    n = counts.sum(-1)
    alike = (counts * (counts - 1)).sum(-1) / (n * (n - 1))
    return (alike - 1 / candidates) / (1 - 1 / candidates) if candidates > 1 else alike * torch.nan


def corrected(answers: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Completions (n steps count) that show a foil where the run ends (n) at a valid answer, minus
    those that show a valid answer where it ends at a foil: n steps, mean over completions.
    """
    ends = ends[:, None, None]
    better, worse = (answers < NONE) & (ends >= 0), (answers >= 0) & (ends < NONE)
    return better.mean(2) - worse.mean(2)


def spread_of(
    wan: VideoModel, case: Case, at: Sequence[int], count: int, seed: int = 10_000
) -> Tensor:
    """The same for a case without a scorer: how far apart the completions of each step end, in
    units of the distance between seeds: steps.

    The unit is measured on `count` (2 or more) plain runs from the same seeds. At step 0, in pure
    noise, the completions *are* these runs, and the result is 1 by construction. Passes: N + count
    * (N + sum(N - s for s in at)).
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


def study(wan: VideoModel, run: Run, options: CommitmentOptions) -> Result:
    """Commitment at the steps `at`, from `count` completions each; for a case of the user's own,
    how far apart the completions end.

    Raises:
        MinicosError: a single completion is requested for a case without a scorer.
    """
    at = options.at or spread(6, wan.preset.steps)
    if options.prompt is None:
        found = _puzzles(wan, run, at, options)
    elif options.count < 2:
        raise MinicosError(
            "--count 1: without a scorer, completions are compared with each other: take 2 or more"
        )
    else:
        found = _own(wan, run, cases.chosen(options)[0], at, options.count)
    return write(run, found)


def _puzzles(wan: VideoModel, run: Run, at: Sequence[int], options: CommitmentOptions) -> Result:
    chosen, count = cases.chosen(options), options.count
    compute = partial(completions, at=at, count=count)
    models, work = observer.models(wan, options), cases.batches(chosen)
    kept = cases.collect_each(run, "completions", models, work, compute)
    candidates = [cases.known(case).ambiguity for case in chosen]
    found = {who: measures(**values, candidates=candidates) for who, values in kept.items()}
    label = "step that is completed from"
    curves = [
        stats.curve(f"{name}, {who}", values, at, label)
        for who, measured in found.items()
        for name, values in measured.items()
        if np.isfinite(values).any()
    ]
    figures.lines(
        run.path("commitment.png"),
        curves,
        y="commitment; share",
        title=f"When is the answer decided? n = {len(chosen)}, {count} completions each",
        sigmas=wan.schedule().sigmas,
    )
    rows: list[Row] = []
    for who, measured in found.items():
        for k, s in enumerate(at):
            means = {name: stats.average(values[:, k]) for name, values in measured.items()}
            rows.append({"step": s, "model": who, **means})
    made = numbers(found, at)
    return Result("commitment", run.settings, made, {"steps": rows}, curves, ["commitment.png"])


def measures(
    answers: np.ndarray, ends: np.ndarray, candidates: Sequence[int]
) -> dict[str, np.ndarray]:
    """What the completions (n steps count) and the ends of the runs (n) show, each n steps."""
    pairs = zip(torch.from_numpy(answers), candidates, strict=True)
    return {
        "commitment": np.stack([commitment(a, k).numpy() for a, k in pairs]),
        "self-correction": corrected(answers, ends),
        "valid completions": (answers >= 0).mean(2),
        "completions that show a foil": (answers < NONE).mean(2),
    }


def numbers(found: Mapping[str, Mapping[str, np.ndarray]], at: Sequence[int]) -> list[Number]:
    """For each model: commitment at each step minus the first of them, and self-correction from
    each step to the end.
    """
    out = []
    first = f"step {at[0]} (at step 0 completions are other seeds, by construction)"
    committed = {who: measured["commitment"] for who, measured in found.items()}
    for k, s in enumerate(at[1:], start=1):
        gained = {who: values[:, k] - values[:, 0] for who, values in committed.items()}
        title = f"commitment: step {s} minus step {at[0]}"
        out += stats.compared(title, gained, first, span=2.0)
    for k, s in enumerate(at):
        gained = {who: measured["self-correction"][:, k] for who, measured in found.items()}
        title = f"foil to valid minus valid to foil, step {s} to the end"
        out += stats.compared(title, gained, "0: errors come and go independently", "share")
    for who, measured in found.items():
        for name in ("valid completions", "completions that show a foil"):
            title = f"{name}, step {at[0]}: {who}"
            out.append(stats.mean(title, measured[name][:, 0], unit="share", span=1.0))
    return out


def _own(wan: VideoModel, run: Run, case: Case, at: Sequence[int], count: int) -> Result:
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
