"""What does the network believe at each step, and what would an ideal observer believe? Several
candidates early, one late (paper, Sec. 3).

The clean estimate of a perfect network is the posterior mean over the valid answers
(`tools/posterior.py`), so several routes at high noise follow from Bayes' rule and are not a
property of the network. The question is where a network deviates from it: in the weights of the
answers, and in the part of its estimate that is not a mixture of answers at all (`outside`). This
is never evidence about large models. With `--ideal` the observer also runs as a model from the same
noise, on its own latents.

The answer shown most at step 0, where the latent is pure noise, may be the final one because the
noise decides, or because the network prefers it in this picture whatever the noise. It is therefore
also compared with the final answer of another seed's run (`other`).

In a guided run, the prompted branch is compared: a guided estimate is not a posterior mean, by
construction. Also trivial by construction: at the last steps one answer has all the weight,
whatever the network. `prior` is the control, an observer that knows the answers but does not see x;
a network that is nearer to the ideal estimate has used x.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.options import BeliefOptions
from minicos.analysis.result import Number, Result, Row, write
from minicos.analysis.steps import spread
from minicos.analysis.tools import cases, controls, figures, observer, posterior, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.observer import NETWORK
from minicos.condition import Condition
from minicos.runs import Progress, Run
from minicos.sample import Step
from minicos.video_model import VideoModel

OTHER = 10_000_000  # offset between the seeds of a case's two runs
COLUMNS = {
    "ideal": "answers alive, ideal observer",
    "shown": "answers alive, network",
    "departure": "from the ideal estimate",
    "outside": "of it no mixture of answers",
    "prior": "from it without looking",
    "leads": "the answer shown most is the final one",
    "other": "it is the final one of another seed",
    "final": "ideal weight of the video's answer",
}


@dataclass(frozen=True)
class Belief:
    """Network and ideal observer at one step of one run. Distances are squared, relative to the
    mean squared distance between two answers.
    """

    ideal: Tensor  # r  posterior weights
    shown: Tensor  # r  coefficients of the network's estimate
    departure: float  # distance of the estimate to E[z | x]: 0 ideal, 1 as far as another answer
    outside: float  # the part of it that is not a mixture of answers (off their affine span)
    prior: float  # departure of the even mixture of all answers


def belief(x: Tensor, x0: Tensor, sigma: float, z: Tensor) -> Belief:
    """Compare the estimate x0 that a network makes from x (both c f h w) with the posterior mean.
    Raises ValueError if there is only one answer.
    """
    if len(z) < 2:
        raise ValueError("a puzzle with one answer leaves nothing to be undecided about")
    x, x0, z = (tensor.double().cpu() for tensor in (x, x0, z))
    w, a = posterior.weights(x, sigma, z), posterior.coefficients(x0, z)
    ideal, unit = posterior.mean(w, z), torch.pdist(z.flatten(1)).square().mean()
    gaps = (x0 - ideal, x0 - posterior.mean(a, z), z.mean(0) - ideal)
    return Belief(w, a, *((gap.square().sum() / unit).item() for gap in gaps))


def beliefs(wan: VideoModel, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Run a batch of puzzles and compare every step: each b N (N steps), float64; the first axis is
    the cases.

    Returns:
        ideal, shown: answers alive (`posterior.effective`) for the ideal observer, and in the
            network's estimate.
        departure, outside, prior: see `Belief`.
        leads: whether the answer shown most is the one shown most at the last step.
        other: whether it is the one shown most at the last step of another seed.
        final: the ideal observer's weight of the finished video's answer; NaN if the video shows
            none.
    """
    condition = cases.condition(wan, batch)
    answered = _answered(wan, condition, batch)
    seen = []
    for step in wan.sample(condition, noise=cases.noise(wan, condition, batch)):
        seen.append(_at(step, answered))
    verdicts = cases.scores(wan, step.next, batch)
    again = wan.sample(condition, noise=cases.noise(wan, condition, batch, OTHER))
    (last,) = deque(again, maxlen=1)
    elsewhere = [int(b.shown.argmax()) for b in _at(last, answered)]
    rows = [
        _course(course, verdict.answer if verdict.solved else None, other)
        for course, verdict, other in zip(zip(*seen, strict=True), verdicts, elsewhere, strict=True)
    ]
    return {
        name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in COLUMNS
    }


def _answered(wan: VideoModel, condition: Condition, batch: Sequence[Case]) -> list[Tensor]:
    """The latents of each case's answers (r c f h w), on the CPU; taken from an ideal observer's
    condition, which already holds them.
    """
    if isinstance(condition, observer.Known):
        each = zip(condition.answers, condition.counts.tolist(), strict=True)
        return [z[:count].cpu() for z, count in each]
    return [posterior.answers(wan, cases.known(case)).cpu() for case in batch]


def _at(step: Step, answered: Sequence[Tensor]) -> list[Belief]:
    """The belief of each case at a step."""
    each = zip(step.x, step.x0_cond, answered, strict=True)
    return [belief(x, x0, step.sigma, z) for x, x0, z in each]


def _course(course: Sequence[Belief], answer: int | None, other: int) -> dict[str, list[float]]:
    """One run, step by step, in the columns of `beliefs`."""
    final = int(course[-1].shown.argmax())
    return {
        "ideal": [posterior.effective(b.ideal) for b in course],
        "shown": [posterior.effective(b.shown) for b in course],
        "departure": [b.departure for b in course],
        "outside": [b.outside for b in course],
        "prior": [b.prior for b in course],
        "leads": [float(b.shown.argmax() == final) for b in course],
        "other": [float(b.shown.argmax() == other) for b in course],
        "final": [math.nan if answer is None else b.ideal[answer].item() for b in course],
    }


def first_departure(wan: VideoModel, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Departure of a network's first estimate from the ideal one: b. For the untrained control."""
    condition = cases.condition(wan, batch)
    answered = _answered(wan, condition, batch)
    step = next(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    return {"departure": torch.tensor([b.departure for b in _at(step, answered)])}


def study(wan: VideoModel, run: Run, options: BeliefOptions) -> Result:
    """Beliefs at every step of puzzles with several answers, compared with the ideal observer and
    with an untrained network.
    """
    chosen = cases.chosen(options)
    work = cases.batches(chosen)
    models = observer.models(wan, options)
    with Progress(len(models) * len(work) + 1, "belief") as bar:
        arms = cases.collect_each(run, "beliefs", models, work, beliefs, bar)
        compute = partial(first_departure, controls.untrained(wan))  # one batch suffices
        random = cases.collect(run, "untrained", work[:1], compute, bar)["departure"]
    seen = arms[NETWORK]
    steps = seen["ideal"].shape[1]
    rows: list[Row] = [
        {
            "step": s,
            **{title: stats.mean("", seen[name][:, s]).interval for name, title in COLUMNS.items()},
        }
        for s in range(steps)
    ]
    curves = [
        stats.curve(title, seen[name], range(steps), "denoising step")
        for name, title in COLUMNS.items()
    ]
    several = float(np.mean([len(cases.known(case).candidates) for case in chosen]))
    figures.lines(
        run.path("alive.png"),
        curves[:2],
        y="answers alive",
        title=f"How many of {several:.1f} right answers, n = {len(chosen)}",
        sigmas=wan.schedule().sigmas,
    )
    figures.lines(
        run.path("departure.png"),
        curves[2:5],
        y="squared distance, 1: another answer",
        title=f"How far the estimate is from the ideal one, n = {len(chosen)}",
        sigmas=wan.schedule().sigmas,
    )
    files = ["alive.png", "departure.png", _sheet(wan, run, chosen, seen["shown"][:, 0])]
    return write(
        run,
        Result(
            "belief", run.settings, numbers(chosen, arms, random), {"steps": rows}, curves, files
        ),
    )


def numbers(
    chosen: Sequence[Case], arms: Mapping[str, Mapping[str, np.ndarray]], random: np.ndarray
) -> list[Number]:
    """The findings for each model: answers alive, the preference at step 0, and the network's
    distance to the ideal observer on the network's own latents.
    """
    seen = arms[NETWORK]
    ideal, shown, middle = seen["ideal"], seen["shown"], seen["ideal"].shape[1] // 2
    chance = np.array([1 / len(cases.known(case).candidates) for case in chosen])
    alive = {who: found["shown"].mean(1) - found["shown"][:, -1] for who, found in arms.items()}
    lean = {who: found["leads"][:, 0] - found["other"][:, 0] for who, found in arms.items()}
    taste = {who: found["other"][:, 0] - chance for who, found in arms.items()}
    at_0, at_middle = "at step 0", f"at step {middle}"
    return [
        *stats.compared(
            "answers alive in the estimate, mean over steps minus the last",
            alive,
            "the last step",
            "answers",
        ),
        stats.difference(
            f"answers alive {at_middle}: network minus Bayes at its own latents",
            shown[:, middle],
            ideal[:, middle],
            "ideal observer",
            "answers",
        ),
        *stats.compared(
            f"answer shown most {at_0} is the run's own end minus another seed's end",
            lean,
            "another seed of the same picture",
            "share",
        ),
        *stats.compared(
            f"answer shown most {at_0} is another seed's end minus chance",
            taste,
            "one in its answers",
            "share",
        ),
        stats.mean(
            f"departure from the ideal observer {at_0}",
            seen["departure"][:, 0],
            "0: ideal, 1: as far as another answer",
        ),
        stats.mean(
            f"departure from the ideal observer {at_middle}",
            seen["departure"][:, middle],
            "0: ideal",
        ),
        stats.difference(
            f"departure {at_0}: untrained minus trained",
            random,
            seen["departure"][: len(random), 0],
            "untrained network",
        ),
    ]


def _sheet(wan: VideoModel, run: Run, chosen: Sequence[Case], alive: np.ndarray) -> str:
    """The last frame of network and ideal observer over the steps, for the first case and for the
    one with the most answers alive at step 0.
    """
    if run.has("sheet.png"):
        return "sheet.png"
    shown = {"first": chosen[0], "most answers\nat step 0": chosen[int(alive.argmax())]}
    rows, names = [], []
    for name, case in shown.items():
        condition, z = cases.condition(wan, [case]), posterior.answers(wan, cases.known(case))
        steps = wan.sample(condition, noise=cases.noise(wan, condition, [case]))
        made = [s for s in steps if s.index in spread(8, wan.preset.steps)]
        ideal = [
            posterior.mean(posterior.weights(s.x[0], s.sigma, z), z)[None].float() for s in made
        ]
        for who, estimates in (("network", [s.x0_cond for s in made]), ("ideal observer", ideal)):
            rows.append(list(wan.decode(torch.cat(estimates))[:, -1]))
            names.append(f"{name}\n{who}")
    columns = [f"step {s.index}\nσ {s.sigma:.2f}" for s in made]
    title = "Last frame of the clean estimate"
    figures.sheet(run.path("sheet.png"), rows, rows=names, columns=columns, title=title)
    run.record("sheet.png")
    return "sheet.png"
