"""How many denoising steps does an answer take, and what do other lengths of video do? (paper, App.
B and C, in miniature)

The share of puzzles solved, over step counts and frame counts, from the same noise. One step
returns the first clean estimate, which is a mixture wherever there is a choice. Frame counts that a
model was not trained at are out of distribution.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minicos.analysis.options import CountsOptions
from minicos.analysis.result import Result, Row, write
from minicos.analysis.tools import cases, figures, stats
from minicos.analysis.tools.cases import Case
from minicos.runs import Run
from minicos.wan import Wan


def success(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Whether each puzzle is solved, 0 or 1: b."""
    condition = cases.condition(wan, batch)
    *_, last = wan.sample(condition, noise=cases.noise(wan, condition, batch))
    solved = [float(score.solved) for score in cases.scores(wan, last.next, batch)]
    return {"solved": torch.tensor(solved)}


def study(wan: Wan, run: Run, options: CountsOptions) -> Result:
    """The share solved at every count, and its difference to the most steps at the preset's
    frames.
    """
    work = cases.batches(cases.chosen(options))
    most = max(options.counts)
    few = {f"{k} steps": wan.with_preset(steps=k) for k in sorted(options.counts, reverse=True)}
    other = {f"{f} frames": wan.with_preset(steps=most, frames=f) for f in options.lengths}
    solved = {
        name: cases.collect(run, name.replace(" ", "_"), work, partial(success, model))["solved"]
        for name, model in (few | other).items()
    }
    base = f"{most} steps, {wan.preset.frames} frames"
    plain = solved[f"{most} steps"]
    numbers = [stats.mean(f"puzzles solved: {base}", plain, unit="share")]
    numbers += [
        stats.difference(f"puzzles solved: {name} minus {base}", values, plain, base, "share")
        for name, values in solved.items()
        if values is not plain
    ]
    rates = {name: stats.bootstrap(values) for name, values in solved.items()}
    figures.intervals(
        run.path("counts.png"),
        rates,
        x="share of puzzles solved",
        title=f"{len(plain)} puzzles; {base} unless said",
    )
    rows: list[Row] = [{"setting": name, "solved": rate} for name, rate in rates.items()]
    return write(
        run, Result("counts", run.settings, numbers, {"settings": rows}, files=["counts.png"])
    )
