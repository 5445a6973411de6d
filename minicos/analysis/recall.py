"""Is what a model made up the same when it comes back, and which frame reads which? (paper, Sec. 4,
working memory)

The paper's objects stand in the first frame, which is given beside the latent at every step:
nothing need be remembered. In `reveal` the object that comes out from behind a block is made up by
the model, and in `shell` the swaps are: the second time must agree with the first (`consistent`).
Attention between the frames that show it is cut, in all layers and steps:

    forward     later frames no longer read the earlier ones: a memory that is handed on in time
                would be lost
    backward    earlier frames no longer read the later ones: a network that denoises all frames
                at once can as well agree in this direction
    both        neither reads the other; "random" forbids the same queries as many keys
    causal      every frame reads itself and earlier ones alone

What is lost by `forward` minus what is lost by `backward` tells a chain of frames from frames that
settle together. Trivial by construction: nothing; a chain along the frames and one along the steps
predict opposite signs. A cut can also spoil the drawing, so `solved` stands beside.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.knockout import Causal, Flow, Knockout, Tokens
from minicos.analysis.options import RecallOptions
from minicos.analysis.result import Number, Result, Row, write
from minicos.analysis.tools import cases, figures, stats
from minicos.analysis.tools.cases import Case
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.puzzles import Puzzle, Score
from minicos.puzzles.reveal import Reveal
from minicos.puzzles.shell import Shell
from minicos.runs import Run
from minicos.wan import Wan

RULE = {Reveal: "same", Shell: "ball"}  # the check of a score that says whether it is consistent


def frames(puzzle: Puzzle) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The latent frames that show what is made up for the first time, and those that must agree.

    Raises MinicosError for puzzles in which nothing is made up twice.
    """
    if isinstance(puzzle, Reveal):
        return (1,), (3,)
    if isinstance(puzzle, Shell):  # frame 1 covers the ball, the last one shows it
        return tuple(range(2, 2 + puzzle.length)), (2 + puzzle.length,)
    raise MinicosError(f"in a {puzzle.kind} nothing is made up twice: take reveal or shell")


def cuts(puzzle: Puzzle) -> dict[str, Hooks]:
    """Hooks of every arm, by name."""
    early, late = (Tokens(frames=some) for some in frames(puzzle))
    forward, backward = Knockout(Flow(early, late)), Knockout(Flow(late, early))
    return {
        "nothing cut": NO_HOOKS,
        "forward": forward.hooks(),
        "backward": backward.hooks(),
        "both": forward.hooks() + backward.hooks(),
        "random": forward.control(0).hooks() + backward.control(1).hooks(),
        "causal": Knockout(Causal()).hooks(),
    }


def recalled(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Whether each puzzle is consistent, and whether it is solved, 0 or 1, in every arm: each b
    arms.
    """
    condition = cases.condition(wan, batch)
    noise = cases.noise(wan, condition, batch)
    verdicts = []
    for hooks in cuts(cases.known(batch[0])).values():
        *_, last = wan.sample(condition, noise=noise, hooks=hooks)
        verdicts.append(cases.scores(wan, last.next, batch))
    rows = [*zip(*verdicts, strict=True)]
    puzzles = map(cases.known, batch)
    return {
        "consistent": torch.tensor(
            [[_consistent(p, v) for v in row] for p, row in zip(puzzles, rows, strict=True)]
        ),
        "solved": torch.tensor([[float(v.solved) for v in row] for row in rows]),
    }


def _consistent(puzzle: Puzzle, verdict: Score) -> float:
    return verdict.checks[RULE[type(puzzle)]]


def study(wan: Wan, run: Run, options: RecallOptions) -> Result:
    """What each cut costs, in the rate of consistent videos and of solved puzzles."""
    chosen = cases.chosen(options)
    arms = [*cuts(cases.known(chosen[0]))]
    kept = cases.collect(run, "recalled", cases.batches(chosen), partial(recalled, wan))
    found = {
        name: {arm: kept[name][:, i] for i, arm in enumerate(arms)}
        for name in ("consistent", "solved")
    }
    figures.intervals(
        run.path("recall.png"),
        {arm: stats.average(values) for arm, values in found["consistent"].items()},
        x="share of consistent videos",
        title=f"Attention cut between the frames that show it, {options.puzzle}, n = {len(chosen)}",
    )
    rows: list[Row] = [
        {"cut": arm, **{name: stats.average(values[arm]) for name, values in found.items()}}
        for arm in arms
    ]
    rows += _dwells(chosen, found["consistent"])
    made = numbers(found["consistent"], found["solved"])
    return write(run, Result("recall", run.settings, made, {"cuts": rows}, files=["recall.png"]))


def _dwells(chosen: Sequence[Case], consistent: Mapping[str, np.ndarray]) -> list[Row]:
    """The same for puzzles whose first reveal lasts longer, whose second does, and neither."""
    dwells = np.array([getattr(case.puzzle, "dwell", "") for case in chosen])
    return [
        {"cut": f"{arm}, longer: {dwell}", "consistent": stats.average(values[dwells == dwell])}
        for dwell in sorted(set(dwells.tolist()) - {""})
        for arm, values in consistent.items()
    ]


def numbers(consistent: Mapping[str, np.ndarray], solved: Mapping[str, np.ndarray]) -> list[Number]:
    """The rate of consistent videos, what each cut takes of it, and which direction takes more
    (n values of each arm).
    """
    plain, share = consistent["nothing cut"], "share"
    lost = "consistency lost"
    return [
        stats.mean("consistent: nothing cut", plain, unit=share),
        stats.mean("solved: nothing cut", solved["nothing cut"], unit=share),
        stats.difference(
            f"{lost}: later frames without earlier ones minus the reverse",
            consistent["backward"],
            consistent["forward"],
            "the same number of keys, cut the other way round",
            share,
        ),
        stats.difference(
            f"{lost}: neither reads the other minus as many random keys",
            consistent["random"],
            consistent["both"],
            "as many keys, drawn at random",
            share,
        ),
        *(
            stats.difference(f"{lost}: {arm}", plain, values, "nothing cut", share)
            for arm, values in consistent.items()
            if arm != "nothing cut"
        ),
    ]
