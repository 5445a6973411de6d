"""Noise at every step of a run, resumed from the saved clean run as in `minicos noise`, against as
many full runs.

Both sides are complete: the clean run, written to disk step by step, then the edited runs and their
measurements from the edit on. In passes, for N steps: N + N (N + 1) / 2 against N + N^2. Uses the
embedded model, since the ratio is that of any model with slow passes. Each side runs once and
without a warm-up, as a sum of thousands of passes.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minicos.analysis.noise.edit import Noise
from minicos.analysis.noise.measure import Clean, measure
from minicos.analysis.tools import cases
from minicos.analysis.tools.record import record
from minicos.bench.measure import Line, alternate
from minicos.open import load
from minicos.runs import Run


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    wan = load("tiny", device=device).with_preset(steps=3 if quick else 50)
    steps = wan.preset.steps
    batch = cases.held_out("maze", 1)
    condition = cases.condition(wan, batch)
    noise = cases.noise(wan, condition, batch)
    edits = [Noise("replace", (step,)) for step in range(steps)]
    passes = {}

    def sweep(side: str, start: int | None = None) -> None:
        with TemporaryDirectory() as folder:
            clean = Run.open(Path(folder), {})
            record(wan, condition, clean, [Clean(None)], noise)
            measured = [measure(wan, condition, noise, clean, edit, start=start) for edit in edits]
            passes[side] = steps + sum(int(one["passes"]) for one in measured)

    name = f"noise at each of {steps} steps, tiny"
    sides = partial(sweep, "resumed"), partial(sweep, "full", start=0)
    ours, theirs = alternate(
        *sides, device=device, repeats=1, warmup=0, label="" if quick else name
    )
    resumed, full = passes["resumed"], passes["full"]
    note = f"{resumed} passes of {full}: {resumed / full:.3f} x"
    yield Line(name, ours, f"{steps} full runs", theirs, note=note)
