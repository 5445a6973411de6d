"""Which part of the picture decides? The gradient, with respect to the given frame, of how far x0
leans towards the right answer and away from another."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

import minicos
from minicos.analysis.swap.pairs import pairs
from minicos.analysis.tools import cases, figures, posterior

wan, rows, names = minicos.load("tiny"), [], []
for pair in pairs("mark", 3):
    case, puzzle = pair.b, cases.known(pair.b)
    right, other = (posterior.answers(wan, cases.known(c))[0] for c in (case, pair.a))
    condition = wan.condition(case.prompt, case.image)
    *_, before = islice(wan.sample(condition, seed=0), 4)
    picture = torch.as_tensor(condition.y).clone().requires_grad_()
    condition = replace(condition, y=picture)
    run = wan.sample(condition, noise=before.next, start=4, state=before.state, grad=True)
    ((next(run).x0[0] - other) * (right - other)).sum().backward()
    saliency = (torch.as_tensor(picture.grad) * picture.detach())[0, 4:, 0].sum(0).abs()  # h w
    names.append(case.prompt)
    rows.append([puzzle.first_frame(), figures.heat(saliency.sqrt().numpy()), puzzle.draw(0)[-1]])
columns = ["given", "gradient (black: none)", "right answer"]
title = "What the answer is read from, step 4"
print(figures.sheet(Path("attribution.png"), rows, rows=names, columns=columns, title=title))
