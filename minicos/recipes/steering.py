"""Steering: add the difference that two prompts make to the stream of one layer, at all steps."""

from pathlib import Path

from torch import Tensor

from minicos import Hooks, Record, load
from minicos.analysis.result import Curve
from minicos.analysis.swap.pairs import pairs
from minicos.analysis.swap.states import flip
from minicos.analysis.tools import cases, figures

wan, point, both = load("tiny").with_preset(steps=10), "blocks.8", pairs("mark", 4)
a, b = (cases.condition(wan, [getattr(pair, side) for pair in both]) for side in "ab")
noise, end, stream = wan.noise(b, 0), {}, {}
for name, condition in ("a", a), ("b", b):
    record = Record(lambda x: x, "b l d")
    *_, last = wan.sample(condition, noise=noise, hooks=Hooks().on(point, record))
    end[name] = last.next
    stream[name] = record.stack().at(branch="cond", point=point)  # step b l d
toward = stream["a"] - stream["b"]
strengths, curves, y = (0, 0.25, 0.5, 1, 2), [], "flip (-1: B, +1: A)"


def pushed(d: Tensor) -> float:
    *_, last = wan.sample(b, noise=noise, hooks=Hooks().on(point, lambda x, s: x + d[s.step]))
    return float(flip(last.next, end["a"], end["b"])[0].mean())


for name, d in ("towards prompt A", toward), ("control: channels reversed", toward.flip(-1)):
    flips = [pushed(k * d) for k in strengths]
    curves.append(Curve(name, strengths, flips, x_label="strength"))
print(figures.lines(Path("steering.png"), curves, y=y, title=f"Added at {point}"))
