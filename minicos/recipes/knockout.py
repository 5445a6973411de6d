"""From which latent frame does the answer come? Attention from it to all other frames is cut."""

from pathlib import Path

import minicos
from minicos.analysis.knockout import Flow, Knockout, Tokens
from minicos.analysis.result import Curve
from minicos.analysis.tools import cases, figures

wan, batch = minicos.load("tiny").with_preset(steps=10), cases.held_out("mark", 4)
condition = cases.condition(wan, batch)
noise, frames = cases.noise(wan, condition, batch), range(condition.shape[2])


def score(knockout: Knockout) -> float:
    *_, last = wan.sample(condition, noise=noise, hooks=knockout.hooks())
    return sum(found.score for found in cases.scores(wan, last.next, batch)) / len(batch)


cuts = [Knockout(Flow(Tokens((f,)), Tokens((f,)).others)) for f in frames]
which = {"the frame is cut off": cuts, "as many random pairs": [cut.control() for cut in cuts]}
curves = [
    Curve(name, frames, [*map(score, each)], x_label="latent frame") for name, each in which.items()
]
path, y = Path("knockout.png"), "score of the video"
print(figures.lines(path, curves, y=y, title="Attention knockout"))
