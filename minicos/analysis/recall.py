"""Is an invented object the same when it reappears, and which frame reads which? (paper, Sec. 4,
working memory)

The paper's objects are visible in the first frame, which is an input at every step, so nothing has
to be remembered. In `reveal` the model invents the object that comes out from behind a block, and
in `shell` it invents the swaps: the second appearance must agree with the first (`consistent`),
whichever side of the block comes first.
Attention between the frames that show it is cut, in all layers and steps:

    forward     later frames do not read the earlier ones: a memory handed on in time would be lost
    backward    earlier frames do not read the later ones: a network that denoises all frames at
                once can equally well agree in this direction
    both        neither reads the other; "random" forbids as many keys to the same queries
    causal      every frame reads only itself and earlier ones

The loss under `forward` minus the loss under `backward` distinguishes a chain of frames from frames
that settle together. Nothing is trivial by construction: a chain along the frames and one along the
steps predict opposite signs. A cut can also spoil the drawing, so `solved` is reported as well.
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
from minicos.video_model import VideoModel

RULE = {Reveal: "same", Shell: "ball"}  # the check in a score that decides whether it is consistent


def frames(puzzle: Puzzle) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The latent frames that first show what is invented, and those that must agree with them.

    Raises:
        MinicosError: nothing is invented twice in this puzzle.
    """
    if isinstance(puzzle, Reveal):
        return (1,), (3,)
    if isinstance(puzzle, Shell):  # frame 1 covers the ball, the last one shows it
        return tuple(range(2, 2 + puzzle.length)), (2 + puzzle.length,)
    raise MinicosError(f"in a {puzzle.kind} nothing is made up twice: take reveal or shell")


def cuts(puzzle: Puzzle) -> dict[str, Hooks]:
    """The hooks of every arm, by name."""
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


def recalled(wan: VideoModel, batch: Sequence[Case]) -> dict[str, Tensor]:
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


def study(wan: VideoModel, run: Run, options: RecallOptions) -> Result:
    """The loss under each cut, in the rates of consistent videos and of solved puzzles."""
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
    """The same for puzzles with a longer first reveal, a longer second one, and neither."""
    dwells = np.array([getattr(case.puzzle, "dwell", "") for case in chosen])
    return [
        {"cut": f"{arm}, longer: {dwell}", "consistent": stats.average(values[dwells == dwell])}
        for dwell in sorted(set(dwells.tolist()) - {""})
        for arm, values in consistent.items()
    ]


def numbers(consistent: Mapping[str, np.ndarray], solved: Mapping[str, np.ndarray]) -> list[Number]:
    """The rate of consistent videos, the loss under each cut, and in which direction it is larger
    (n values for each arm).
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
