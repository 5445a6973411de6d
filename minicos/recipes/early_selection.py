"""Choose one of six seeds by an early clean estimate: does it end at the wanted answer?"""

from pathlib import Path

import torch
from torch import Tensor

import minicos
from minicos.analysis.result import Curve
from minicos.analysis.tools import cases, figures, posterior

wan, seeds = minicos.load("tiny").with_preset(steps=10), 6
puzzles = cases.held_out("maze", 5, keep=cases.ambiguous)  # several routes are right
condition = cases.condition(wan, puzzles).repeat(seeds)  # each prompt is encoded once
answers = [posterior.answers(wan, cases.known(case)) for case in puzzles]  # r c f h w, each


def lean(x0: Tensor) -> Tensor:
    """How much nearer to the first route than to any other: puzzle seed."""
    pairs = zip(x0.unflatten(0, (-1, seeds)).unsqueeze(2), answers, strict=True)
    far = [(x - z).flatten(2).norm(dim=2) for x, z in pairs]  # seed r
    return torch.stack([d[:, 1:].amin(1) - d[:, 0] for d in far])


leans = [lean(step.x0) for step in wan.sample(condition, seed=100)]
wanted = (leans[-1] > 0).float()  # whether it ends at the first route
rates = [float(wanted.gather(1, x.argmax(1, keepdim=True)).mean()) for x in leans]
curve = Curve("the seed that leans most at this step", range(10), rates, x_label="step")
levels = {"any seed": float(wanted.mean()), "best seed": float(wanted.amax(1).mean())}
path, y = Path("early_selection.png"), "ends at the wanted route"
print(figures.lines(path, [curve], y=y, title="Choosing a seed early", levels=levels))
