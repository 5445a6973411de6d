"""Does a run correct a wrong answer? One is put into the latent, and the run continues from there
(ours; the paper, Sec. 4, judges self-correction from the pictures).

A model that is rarely wrong has little to correct. So a plausible wrong answer z is planted at step
s, on the schedule: x = (1 - sigma) z + sigma noise, which is exactly the latent of a run whose
estimate is z. The video then shows a valid answer (repaired), the wrong one, or nothing clear.

A run may also abandon what it holds for no reason. So the control plants a valid answer and counts
the runs that end at another valid one (switched); the finding is repaired minus switched. Trivial
by construction: at step 0 nothing of the plant is left, and a late plant can hardly be abandoned by
any model. An ideal observer, which knows the valid answers, repairs all (`--ideal`): a network's
share of this measures its knowledge of the rules at that noise level.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.commitment import complete
from minicos.analysis.options import PlantOptions
from minicos.analysis.result import Number, Result, Row, write
from minicos.analysis.steps import spread
from minicos.analysis.tools import cases, figures, observer, posterior, stats
from minicos.analysis.tools.cases import Case
from minicos.puzzles import Puzzle
from minicos.runs import Run
from minicos.video_model import VideoModel

OUTCOMES = {
    "repaired": "a wrong answer becomes a valid one",
    "stayed wrong": "a wrong answer stays",
    "switched": "a valid answer becomes another",
    "stayed valid": "a valid answer stays",
}


def has_foils(puzzle: Puzzle) -> bool:
    """Whether there is a plausible wrong answer to plant."""
    return bool(puzzle.foils)


def outcomes(wan: VideoModel, batch: Sequence[Case], at: Sequence[int]) -> dict[str, Tensor]:
    """The outcome of an answer planted at each step, 0 or 1: each of OUTCOMES, b steps.

    The case's seed selects which wrong and which valid answer is planted. Passes per case: 2 *
    sum(N - s for s in at).
    """
    condition, schedule = cases.condition(wan, batch), wan.schedule()
    noise = cases.noise(wan, condition, batch)
    puzzles = [cases.known(case) for case in batch]
    valid = [case.seed % len(p.candidates) for case, p in zip(batch, puzzles, strict=True)]
    wrong = [case.seed % len(p.foils) for case, p in zip(batch, puzzles, strict=True)]
    latents = [posterior.answers(wan, p, foils=True) for p in puzzles]
    foils = [len(p.candidates) + i for p, i in zip(puzzles, wrong, strict=True)]
    found: dict[str, list[list[float]]] = {name: [] for name in OUTCOMES}
    for s in at:
        sigma = schedule.sigmas[s]
        for planted, names in ((foils, [*OUTCOMES][:2]), (valid, [*OUTCOMES][2:])):
            z = torch.stack([some[i] for some, i in zip(latents, planted, strict=True)])
            end = complete(wan, condition, (1 - sigma) * z + sigma * noise, s)
            verdicts = cases.scores(wan, end, batch)
            if planted is foils:
                left = [v.solved for v in verdicts]
                stayed = [v.foil == i for v, i in zip(verdicts, wrong, strict=True)]
            else:
                same = [v.answer == i for v, i in zip(verdicts, valid, strict=True)]
                left = [v.solved and not k for v, k in zip(verdicts, same, strict=True)]
                stayed = [v.solved and k for v, k in zip(verdicts, same, strict=True)]
            for name, values in zip(names, (left, stayed), strict=True):
                found[name].append([float(value) for value in values])
    return {name: torch.tensor(values).T.contiguous() for name, values in found.items()}


def study(wan: VideoModel, run: Run, options: PlantOptions) -> Result:
    """The outcomes of wrong and of valid answers planted at the steps `at`, for each model."""
    at = options.at or spread(6, wan.preset.steps)
    chosen = cases.chosen(options, keep=has_foils)
    models, work = observer.models(wan, options), cases.batches(chosen)
    found = cases.collect_each(run, "planted", models, work, partial(outcomes, at=at))
    sigmas = wan.schedule().sigmas
    levels = [sigmas[s] for s in at]
    curves = [
        stats.curve(f"{title}, {who}", kept[name], levels, "sigma at which it is planted", "share")
        for who, kept in found.items()
        for name, title in OUTCOMES.items()
        if name in ("repaired", "switched")
    ]
    figures.lines(
        run.path("plant.png"),
        curves,
        y="share of runs",
        title=f"What becomes of a planted answer, n = {len(chosen)}",
        falling=True,
    )
    rows: list[Row] = []
    for who, kept in found.items():
        for k, s in enumerate(at):
            means = {name: stats.average(kept[name][:, k]) for name in OUTCOMES}
            rows.append({"step": s, "sigma": sigmas[s], "model": who, **means})
    made = numbers(found, at, sigmas)
    return write(run, Result("plant", run.settings, made, {"steps": rows}, curves, ["plant.png"]))


def numbers(
    found: Mapping[str, Mapping[str, np.ndarray]], at: Sequence[int], sigmas: Sequence[float]
) -> list[Number]:
    """Repaired minus switched at each step (n steps for each outcome), for each model."""
    out = []
    for k, s in enumerate(at):
        more = {who: f["repaired"][:, k] - f["switched"][:, k] for who, f in found.items()}
        note = f"a valid answer, planted likewise at sigma {sigmas[s]:.2f}"
        title = f"repaired minus switched, planted at step {s}"
        out += stats.compared(title, more, note, "share")
    return out
