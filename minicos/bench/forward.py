"""A pass of the network against diffusers' with the same weights, eager and with compiled blocks.

On a card minicos uses its kernels and the best attention for the card (`attention`). diffusers uses
PyTorch's own order of attention backends, which is what its users get. It runs once more with
cuDNN's backend first (`attention.ORDER`), so that everything else can be compared. From PyTorch
2.11 on ours keeps PyTorch's own order: there, only the peer of that line has an order forced on it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from minicos.attention import ORDER
from minicos.bench.measure import Line, alternate, attempt, ceilings, rate
from minicos.bench.networks import Subject, compiled, subject
from minicos.verify import diffusers_dit, their_velocity

Sides = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # a pass of ours, a pass of theirs


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    card = device.type == "cuda"
    ways = {"diffusers": plain}
    if card:
        ways["diffusers, cuDNN first"] = one_attention
    if card or not quick:  # compiling takes a minute on a CPU
        ways["diffusers, compiled"] = both_compiled
    repeats = 2 if quick else 5 if card else 30
    for batch in (1,) if card else (1, 8):
        s = subject(device, quick, batch)
        for peer, sides in ways.items():
            name = f"forward, {s.name}" + ", compiled" * (sides is both_compiled)
            yield attempt(name, partial(_measured, name, s, peer, sides, repeats, quick))


def _measured(
    name: str, s: Subject, peer: str, sides: Callable[[Subject], Sides], repeats: int, quick: bool
) -> Line:
    ours, theirs = alternate(
        *sides(s), device=s.x.device, repeats=repeats, label="" if quick else name
    )
    share = ceilings(s.x.device, s.dtype).of_matmul(s.flops, ours)
    return Line(name, ours, peer, theirs, share, rate(s.flops, ours))


def plain(s: Subject) -> Sides:
    """Ours and theirs, unchanged."""
    theirs = diffusers_dit(s.dit, exact_time=False)
    return s.run, lambda: their_velocity(theirs, *s.given)


def one_attention(s: Subject) -> Sides:
    """Theirs with cuDNN's attention first; ours unchanged."""
    ours, theirs = plain(s)

    def run() -> Tensor:
        with sdpa_kernel(ORDER, set_priority=True):
            return theirs()

    return ours, run


def both_compiled(s: Subject) -> Sides:
    """The blocks of both compiled, one by one."""
    theirs: Any
    ours, theirs = compiled(s), diffusers_dit(s.dit, exact_time=False)
    for block in theirs.blocks:
        block.compile()
    return ours, lambda: their_velocity(theirs, *s.given)
