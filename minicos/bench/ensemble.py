"""Three seeds that share states at one step of a run, against a plain run; `analysis.ensemble`
defines the cost in passes.

On a CPU both runs are made with the embedded model, at 50 steps. On a card a run of A14B is 100
passes of several seconds, so passes are measured and the run is composed of them: under `override`
with guidance, one prompted pass of three seeds that share the states of ten layers, and then the
100 passes of the carrier's plain run.
"""

from collections import deque
from collections.abc import Iterator

import torch

from minicos.analysis.ensemble.share import Ensemble, Passes, hooks, run, window
from minicos.analysis.tools import cases
from minicos.bench.measure import Line, alternate
from minicos.bench.networks import subject
from minicos.open import load

SEEDS, STEPS = 3, 50


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    yield _composed(device, quick) if device.type == "cuda" else _real(device, quick)


def _real(device: torch.device, quick: bool) -> Line:
    """Whole runs of the embedded model on one puzzle."""
    steps = 3 if quick else STEPS
    wan = load("tiny", device=device).with_preset(steps=steps)
    batch = cases.held_out("maze", 1)
    condition = cases.condition(wan, batch)
    three = condition.take(torch.zeros(SEEDS, dtype=torch.long))
    noise = wan.noise(three, seed=0)
    e = Ensemble(window(20, 29, wan.experts["high"].cfg.num_layers), seeds=SEEDS)
    name = f"{SEEDS} seeds at step 0 of {steps}, tiny"
    counter = Passes()
    run(wan, three, noise, e, watch=counter.hooks)

    def together() -> None:
        run(wan, three, noise, e)

    def alone() -> None:
        deque(wan.sample(condition, noise=noise[:1]), maxlen=0)

    told = {"repeats": 1, "warmup": 0} if quick else {"repeats": 9, "warmup": 1, "label": name}
    shared, plain = alternate(together, alone, device=device, **told)
    return Line(name, shared, "plain run", plain, note=f"{counter.count} passes of {steps}")


def _composed(device: torch.device, quick: bool) -> Line:
    one, three = subject(device, quick), subject(device, quick, SEEDS)
    ops, depth = one.dit.ops, one.dit.cfg.num_layers
    e = Ensemble(
        window(20, 29, depth), "lockstep", seeds=SEEDS
    )  # the same work as the first pass of override
    sharing = hooks(e, ops).at(step=0, branch="cond")
    shared, plain = alternate(
        lambda: three.run(sharing),
        one.run,
        device=device,
        repeats=2 if quick else 5,
        label="" if quick else "ensemble",
    )
    passes = 2 * STEPS
    note = f"composed: {passes} passes of {plain:.4g} ms and one of three seeds, {shared:.4g} ms"
    name = f"{SEEDS} seeds at step 0 of {STEPS}, {one.name}"
    return Line(name, passes * plain + shared, "plain run", passes * plain, note=note)
