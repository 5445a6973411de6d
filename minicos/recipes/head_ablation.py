"""Which heads matter? Each is set to zero in one pass; how far does the clean estimate move?"""

from pathlib import Path

import torch
from torch import Tensor

import minicos
from minicos.analysis.tools import cases, figures
from minicos.hooks import NO_HOOKS, Hooks

wan, batch = minicos.load("tiny"), cases.held_out("maze", 4)
condition = cases.condition(wan, batch)
noise = cases.noise(wan, condition, batch)


def x0(hooks: Hooks = NO_HOOKS) -> Tensor:
    return next(wan.sample(condition, noise=noise, hooks=hooks)).x0


def without(layer: int, head: int) -> Hooks:
    gone = torch.tensor([head])
    return NO_HOOKS.on(f"blocks.{layer}.self_attn.heads", lambda x, _: x.index_fill(1, gone, 0))


layers, heads, plain = range(wan.depth), range(wan.cfg.num_heads), x0()
moved = [[float((x0(without(k, n)) - plain).norm() / plain.norm()) for k in layers] for n in heads]
path, title = Path("head_ablation.png"), "How far x0 of step 0 moves without a head"
table, bar = torch.tensor(moved).numpy(), "share of x0"
print(figures.grid(path, table, x="layer", y="head", title=title, bar=bar))
