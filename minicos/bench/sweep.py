"""Noise at every step of a run, resumed from the saved clean run as `minicos noise` does it, beside as many full runs.

Ours is the whole of it: the clean run, written to disk step by step, and each edited run with what is measured on it. The full runs
are denoised and nothing else. In passes of N steps: N + N (N + 1) / 2 against N^2. The embedded model, since its ratio is that of
any model whose passes are slow. Each side runs once: it is a sum of thousands of passes.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minicos.analysis import cases
from minicos.analysis.noise import Clean, Noise, follow, measure
from minicos.analysis.observe import observe
from minicos.bench.measure import Line, alternate
from minicos.bench.networks import operations
from minicos.pipeline import load
from minicos.runs import Run


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    wan = load("tiny", device=device, ops=operations(device)).with_preset(steps=3 if quick else 50)
    steps = wan.preset.steps
    batch = cases.held_out("maze", 1)
    condition = cases.condition(wan, batch)
    noise = cases.noise(wan, condition, batch)
    edits = [Noise("replace", (step,)) for step in range(steps)]
    passes = []

    def resumed() -> None:
        with TemporaryDirectory() as folder:
            clean = Run.open(Path(folder), {})
            observe(wan, condition, clean, [Clean(None)], noise)
            passes[:] = [steps, *(int(measure(wan, condition, noise, clean, edit)["passes"]) for edit in edits)]

    def full() -> None:
        for edit in edits:
            deque(follow(wan, condition, noise, edit), maxlen=0)

    name = f"noise at each of {steps} steps, tiny"
    ours, theirs = alternate(resumed, full, device=device, repeats=1, warmup=0, label="" if quick else name)
    total = steps * steps
    yield Line(
        name, ours, f"{steps} full runs", theirs, note=f"{sum(passes)} passes of {total}: {sum(passes) / total:.3f} x"
    )
