"""Until which step can another prompt change the answer? B until a step, A from there on."""

from pathlib import Path

import minicos
from minicos.analysis.result import Curve
from minicos.analysis.swap.pairs import pairs
from minicos.analysis.swap.states import flip
from minicos.analysis.tools import cases, figures

wan, both = minicos.load("tiny").with_preset(steps=10), pairs("mark", 4)
a, b = (cases.condition(wan, [getattr(pair, side) for pair in both]) for side in "ab")
noise = wan.noise(b, 0)
first, second = (list(wan.sample(condition, noise=noise)) for condition in (a, b))
switches, flips = range(len(second) + 1), []
for s in switches:
    before = second[s - 1]
    x, state = (before.next, before.state) if s else (noise, None)
    *_, last = wan.sample(a, noise=x, start=s, state=state) if s < len(second) else [before]
    flips.append(flip(last.next, first[-1].next, second[-1].next)[0])
values = [float(f.mean()) for f in flips]
low, high = ([float(pick(f)) for f in flips] for pick in (lambda f: f.amin(), lambda f: f.amax()))
curve = Curve("mean; shaded: all", switches, values, low, high, "first step under prompt A")
path, y = Path("prompt_switch.png"), "flip (-1: B, +1: A)"
print(figures.lines(path, [curve], y=y, title="Prompt switch"))
