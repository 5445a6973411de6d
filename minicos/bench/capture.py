"""The cost of watching as `minicos energy`, `attention` and `steps` do, compared with a pass
without hooks and with the method of the published tools.

The published method is a forward hook on each block that does `out.detach().cpu().float()`; numbers
are computed from that later. All run in turns. On a CPU that method copies nothing, so it costs no
more than keeping existing tensors. There, whole runs of the embedded model are measured as well,
with everything that a verb keeps and decodes, but without its pictures.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from minicos.analysis.attention import Attention, gives_lse
from minicos.analysis.energy import Energy
from minicos.analysis.steps import Steps, spread
from minicos.analysis.tools import cases
from minicos.analysis.tools.figures import evenly
from minicos.analysis.tools.record import Recorder, record
from minicos.bench.measure import Line, alternate
from minicos.bench.networks import Subject, subject
from minicos.open import load
from minicos.ops import REFERENCE
from minicos.runs import Run


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    s = subject(device, quick)
    ways = recorders(s)
    plain, published, *ours = alternate(
        s.run,
        partial(hidden_states, s),
        *(partial(watched, s, make) for make in ways.values()),
        device=device,
        repeats=2 if quick else 7 if device.type == "cuda" else 30,
        label="" if quick else f"capture, {s.name}",
    )
    for (name, make), ms in zip(ways.items(), ours, strict=True):
        what, kept = f"{name}, {s.name}", sum(x.nbytes for x in watched(s, make).values())
        note = f"{_cost(ms, plain)}; {kept:,} bytes kept{_peak(s, make)}"
        yield Line(what, ms, "unwatched pass", plain, note=note)
        note = f"theirs {_cost(published, plain)}"
        yield Line(what, ms, "hidden states to the host", published, note=note)
    if device.type == "cpu":
        yield from runs(quick)


def recorders(s: Subject) -> dict[str, Callable[[], Recorder]]:
    """The recorders of the verbs, for a step that is only recorded and for one that is drawn."""
    ops, layers = s.dit.ops, tuple(evenly(s.dit.cfg.num_layers, 8))
    own = ops.self_attention is REFERENCE.self_attention
    return {
        "energy": lambda: Energy((), ops=ops),
        "energy, a drawn step": lambda: Energy((0,), ops=ops),
        f"attention of {len(layers)} layers": lambda: Attention(layers, (0,), ops=ops, lse=own),
    }


def watched(s: Subject, make: Callable[[], Recorder]) -> dict[str, Tensor]:
    """A prompted pass under a recorder; returns what it keeps, on the host."""
    recorder, nothing = make(), Any  # its data do not depend on the step or the run
    s.run(recorder.hooks().at(step=0, branch="cond"))
    return dict(recorder.keep(nothing, nothing))  # type: ignore[arg-type]


def hidden_states(s: Subject) -> list[Tensor]:
    """A pass with the published method: every hidden state (b l d) as float32 on the host."""
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


def runs(quick: bool) -> Iterator[Line]:
    """Whole runs of the embedded model on a CPU, at the verbs' defaults, against generation."""
    wan = load("tiny", device="cpu")
    wan = wan.with_preset(steps=3) if quick else wan
    steps, batch = wan.preset.steps, cases.held_out("maze", 1)
    condition = cases.condition(wan, batch)
    noise = cases.noise(wan, condition, batch)
    chosen, layers = spread(8, steps), tuple(evenly(wan.depth, 8))
    ways: dict[str, Callable[[], list[Recorder]]] = {
        "generation": lambda: [],
        "energy": lambda: [Energy(chosen, wan.frames_behind_token, ops=wan.ops)],
        "attention": lambda: [Attention(layers, chosen, ops=wan.ops, lse=gives_lse(wan))],
        "steps": lambda: [Steps(wan, chosen)],
    }

    def run(make: Callable[[], list[Recorder]]) -> None:
        with TemporaryDirectory() as folder:
            wan.decode(record(wan, condition, Run.open(Path(folder), {}), make(), noise))

    sides = (partial(run, make) for make in ways.values())
    plain, *ours = alternate(
        *sides,
        device=wan.device,
        repeats=1 if quick else 9,
        warmup=0 if quick else 1,
        label="" if quick else "runs, tiny",
    )
    for name, ms in zip([*ways][1:], ours, strict=True):
        yield Line(f"{name}, run of {steps} steps", ms, "generation", plain, note=_cost(ms, plain))


def _cost(watched: float, plain: float) -> str:
    return f"{watched - plain:+.3g} ms, {100 * (watched / plain - 1):+.2f} %"


def _peak(s: Subject, make: Callable[[], Recorder]) -> str:
    """The additional peak memory of a watched pass on a card."""
    if s.x.device.type != "cuda":
        return ""
    peaks = []
    for run in (s.run, partial(watched, s, make)):
        torch.cuda.reset_peak_memory_stats(s.x.device)
        run()
        peaks.append(torch.cuda.max_memory_allocated(s.x.device))
    return f", {(peaks[1] - peaks[0]) / 1e6:+.3g} MB at the peak"
