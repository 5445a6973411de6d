"""Where in the network can the answer be read, before anything is denoised? A linear probe for each
layer, cross-validated, and one with shuffled labels."""

from pathlib import Path

import torch

import minicos
from minicos.analysis.result import Curve
from minicos.analysis.tools import cases, figures
from minicos.analysis.tools.readout import readout

wan, batch = minicos.load("tiny"), cases.held_out("mark", 48, size=3)
marks = [torch.from_numpy(cases.known(case).answer_mask(0)[-1]) for case in batch]  # h w
labels = torch.tensor([int(mark.nonzero()[:, 0].float().mean() * 3 / len(mark)) for mark in marks])
condition = cases.condition(wan, batch)
last = minicos.Record(lambda x: x.unflatten(1, (condition.shape[2], -1))[:, -1].flatten(1), "b d")
hooks = minicos.Hooks().on("embed", last).on("blocks.*", last, step=0)
next(wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=hooks))
x, fold = last.stack().at(step=0, branch="cond"), torch.arange(len(batch)) % 4  # layer b d
curves = []
for name, y in ("read", labels), ("shuffled labels", labels[torch.randperm(len(labels))]):
    split = [(fold != i, fold == i) for i in range(4)]
    right = [[readout(h[a], y[a], h[b], 3)[0] == y[b] for a, b in split] for h in x]
    rates = [float(torch.cat(each).float().mean()) for each in right]
    curves.append(Curve(name, range(-1, len(x) - 1), rates, x_label="layer (-1: embedding)"))
path, title = Path("probe.png"), "Upper, middle or lower third, step 0"
print(figures.lines(path, curves, y="share right", title=title))
