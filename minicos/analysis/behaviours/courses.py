"""Perception before action, as numbers on the embedded model (paper, Sec. 4): is the destination
decided before the route?

At every step the clean estimate is nearest to one of several hypotheses: the valid answers, and the
answers to the picture's other prompts, which have another destination.

    where   the step from which on the nearest hypothesis is a valid answer, which has the
            destination in the prompt; in pictures without routes (`pick`) that is the choice itself
    how     the step from which on the nearest valid answer is the one that the video ends at

The second considers valid answers only, so neither contains the other. Trivial by construction: if
several routes are possible, an ideal observer also decides the route late, and is never wrong about
the destination, so it is run as a model for comparison (`--ideal`). A blurred mixture of valid
answers may be nearest to a wrong one. The paper does not say how to measure this behaviour; the
definition is ours, and applies to puzzles of the embedded model only.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.result import Curve, Number
from minicos.analysis.tools import cases, posterior, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.observer import NETWORK
from minicos.puzzles import Puzzle
from minicos.video_model import VideoModel

KINDS = {"goal": "how", "pick": "what"}  # family -> what is decided in addition to where


def hypotheses(wan: VideoModel, puzzle: Puzzle) -> Tensor:
    """Latents of the valid answers, then of the answers to the picture's other prompts:
    r c f h w.
    """
    return torch.cat([posterior.answers(wan, p) for p in (puzzle, *puzzle.variants())])


def leading(x0: Tensor, z: Tensor) -> int:
    """The hypothesis in z (r c f h w) that is nearest to the estimate x0 (c f h w)."""
    return int((z - x0).square().flatten(1).sum(1).argmin())


def follow(wan: VideoModel, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Run a batch and record its course; the first axis is the cases.

    Returns:
        wrong: whether the nearest hypothesis is not a valid answer, b N.
        leads: the nearest valid answer, b N.
        right: whether the finished video is right, b.
    """
    condition = cases.condition(wan, batch)
    steps = list(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    wrong, leads = [], []
    for k, case in enumerate(batch):
        z, valid = hypotheses(wan, cases.known(case)), len(cases.known(case).candidates)
        wrong.append([leading(step.x0_cond[k], z) >= valid for step in steps])
        leads.append([leading(step.x0_cond[k], z[:valid]) for step in steps])
    verdicts = cases.scores(wan, steps[-1].next, batch)
    return {
        "wrong": torch.tensor(wrong),
        "leads": torch.tensor(leads),
        "right": torch.tensor([verdict.solved for verdict in verdicts]),
    }


def decided(found: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which where and how are decided: n each, NaN if the video is not right."""
    leads = found["leads"]
    where = stats.settled(found["wrong"]).astype(float)
    how = stats.settled(leads != leads[:, -1:]).astype(float)
    right = found["right"].astype(bool)
    return np.where(right, where, np.nan), np.where(right, how, np.nan)


def curves(
    kind: str, found: Mapping[str, Mapping[str, np.ndarray]], sigmas: Sequence[float]
) -> list[Curve]:
    """The share of right runs in which where, and how, is decided by each step, over sigma."""
    out = []
    for who, course in found.items():
        steps = np.arange(course["wrong"].shape[1])
        for name, step in zip(("where", "how"), decided(course), strict=True):
            if name == "where" or KINDS[kind] == "how":
                right = step[np.isfinite(step)]
                by = right[:, None] <= steps
                at = list(sigmas[: len(steps)])
                out.append(stats.curve(f"{name}, {who}", by, at, "sigma", "share"))
    return out


def numbers(kind: str, found: Mapping[str, Mapping[str, np.ndarray]]) -> list[Number]:
    """When each is decided in the courses of every model."""
    steps = {who: decided(courses) for who, courses in found.items()}
    where, how = steps[NETWORK]
    right, wrong = found[NETWORK]["right"], found[NETWORK]["wrong"][:, 0]
    out = [
        stats.mean(f"{kind}: right in the end", right, unit="share"),
        stats.mean(f"{kind}: leading hypothesis wrong at step 0", wrong, unit="share"),
        stats.mean(f"{kind}: step at which it settles where", where, unit="step"),
    ]
    if KINDS[kind] == "how":
        out.append(stats.mean(f"{kind}: step at which it settles how", how, unit="step"))
        apart = {who: how - where for who, (where, how) in steps.items()}
        out += stats.compared(
            "step at which it settles: how minus where", apart, "where it goes", "step"
        )
    return out
