"""A lens: the network's own head applied to the stream of earlier layers, as a clean estimate."""

from itertools import islice
from pathlib import Path

from torch import Tensor

import minicos
from minicos.analysis.tools import cases, figures
from minicos.streams import stream

wan, batch, at = minicos.load("tiny"), cases.held_out("mark", 1), 8
condition = wan.condition(batch[0].prompt, batch[0].image)
*_, before = islice(wan.sample(condition, noise=cases.noise(wan, condition, batch)), at)


def x0(layer: int) -> Tensor:
    """The clean estimate if the stream after `layer` were the last block's output."""
    left = stream(wan, before.next, at, condition, layer + 1)
    hooks = minicos.Hooks().on(f"blocks.{wan.depth - 1}", lambda x, site: left)
    return next(wan.sample(condition, noise=before.next, start=at, hooks=hooks)).x0


layers = range(1, wan.depth, 2)
pictures = [[*wan.decode(x0(k))[0][::3]] for k in layers]
columns = [f"frame {f}" for f in range(0, 13, 3)]
rows, title = (
    [f"layer {k}" for k in layers],
    f"Head on earlier layers, step {at}: {batch[0].prompt}",
)
print(figures.sheet(Path("lens.png"), pictures, rows=rows, columns=columns, title=title))
