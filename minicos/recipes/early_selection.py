"""The best of eight seeds, chosen by the score of an early clean estimate instead of the video."""

from pathlib import Path

import torch

import minicos
from minicos.analysis.result import Curve
from minicos.analysis.tools import cases, figures

wan, seeds, looks = minicos.load("tiny").with_preset(steps=10), 8, (1, 3, 6, 9)
puzzles = cases.held_out("maze", 2, size=5)
batch = [case for case in puzzles for _ in range(seeds)]
condition = cases.condition(wan, puzzles).repeat(seeds)  # each prompt is encoded once
scores = {}
for step in wan.sample(condition, seed=100):
    if step.index in looks:
        found = [found.score for found in cases.scores(wan, step.x0, batch)]
        scores[step.index] = torch.tensor(found).view(-1, seeds)
final = scores[looks[-1]]
chosen = [float(final.gather(1, scores[s].argmax(1, keepdim=True)).mean()) for s in looks]
curve = Curve("the seed that looks best at this step", looks, chosen, x_label="step")
levels = {"any seed": float(final.mean()), "best seed": float(final.amax(1).mean())}
title = "Final score of the chosen seed"
figures.lines(Path("early_selection.png"), [curve], y="score", title=title, levels=levels)
