"""What watching costs: the token energy of every block, beside the way of the published tools, both
held against an unwatched pass.

The published way is a forward hook on each block that does `out.detach().cpu().float()`; numbers
are taken from that later. All four run in turns. On a CPU that way copies nothing, and costs no
more than keeping what is there anyway.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minicos.bench.measure import Line, alternate
from minicos.bench.networks import Subject, subject
from minicos.hooks import Hooks
from minicos.ops import REFERENCE, Ops
from minicos.record import Record


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    s = subject(device, quick)
    ops = s.dit.ops
    repeats = 2 if quick else 7 if device.type == "cuda" else 30
    plain, ours, reference, published = alternate(
        s.run,
        lambda: energies(s, ops),
        lambda: energies(s, REFERENCE),
        lambda: hidden_states(s),
        device=device,
        repeats=repeats,
        label="" if quick else f"capture, {s.name}",
    )
    kept = sum(x.nbytes for x in energies(s, ops))
    name, copied = f"energy, {s.name}", f"theirs {_cost(published, plain)}"
    if ops.token_energy is REFERENCE.token_energy:
        yield Line(name, not_measured="the kernels run on a CUDA card, and this is a CPU")
    else:
        note = f"{_cost(ours, plain)}; {kept:,} bytes kept{_peak(s, ops)}"
        yield Line(name, ours, "unwatched", plain, note=note)
        yield Line(name, ours, "hidden states to the host", published, note=copied)
    name += ", reference"
    yield Line(
        name, reference, "unwatched", plain, note=f"{_cost(reference, plain)}; {kept:,} bytes kept"
    )
    yield Line(name, reference, "hidden states to the host", published, note=copied)


def energies(s: Subject, ops: Ops) -> list[Tensor]:
    """A watched pass: the energies of every block (b l)."""
    record = Record(ops.token_energy)
    s.run(Hooks().on("blocks.*", record))
    return [energy for _, energy in record.entries]


def hidden_states(s: Subject) -> list[Tensor]:
    """A pass watched as the published tools watch: every hidden state (b l d) as float32 on the
    host.
    """
    kept: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda module, given, out: kept.append(out.detach().cpu().float())
        )
        for block in s.dit.blocks
    ]
    try:
        s.run()
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _cost(watched: float, plain: float) -> str:
    return f"{watched - plain:+.3g} ms, {100 * (watched / plain - 1):+.2f} %"


def _peak(s: Subject, ops: Ops) -> str:
    """How much more a card's memory is taken at the worst moment of a watched pass."""
    peaks = []
    for run in (s.run, lambda: energies(s, ops)):
        torch.cuda.reset_peak_memory_stats(s.x.device)
        run()
        peaks.append(torch.cuda.max_memory_allocated(s.x.device))
    return f", {(peaks[1] - peaks[0]) / 1e6:+.3g} MB at the peak"
