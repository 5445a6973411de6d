"""Steering: add the difference that two prompts make to the stream of one layer, at all steps."""

from pathlib import Path

import minicos
from minicos.analysis.result import Curve
from minicos.analysis.swap.pairs import pairs
from minicos.analysis.swap.states import flip
from minicos.analysis.tools import cases, figures

wan, point = minicos.load("tiny").with_preset(steps=10), "blocks.8"
both = pairs("mark", 4)
a, b = (cases.condition(wan, [getattr(pair, side) for pair in both]) for side in "ab")
noise, end, stream = wan.noise(b, 0), {}, {}
for name, condition in ("a", a), ("b", b):
    record = minicos.Record(lambda x: x, "b l d")
    *_, last = wan.sample(condition, noise=noise, hooks=minicos.Hooks().on(point, record))
    end[name] = last.next
    stream[name] = record.stack().at(branch="cond", point=point)  # step b l d
toward = stream["a"] - stream["b"]
strengths, curves = (0, 0.25, 0.5, 1, 2), []
for name, d in ("towards prompt A", toward), ("control: channels reversed", toward.flip(-1)):
    ways = [minicos.Hooks().on(point, lambda x, s, k=k, d=d: x + k * d[s.step]) for k in strengths]
    ends = [[*wan.sample(b, noise=noise, hooks=way)][-1].next for way in ways]
    flips = [float(flip(y, end["a"], end["b"])[0].mean()) for y in ends]
    curves.append(Curve(name, strengths, flips, x_label="strength"))
figures.lines(Path("steering.png"), curves, y="flip (-1: B, +1: A)", title=f"Added at {point}")
