"""The cost of watching as `minicos energy`, `attention` and `steps` do, compared with a pass
without hooks and with the method of the published tools.

The published method is a forward hook on each block that does `out.detach().cpu().float()`; numbers
are computed from that later. All run in turns. On a CPU that method copies nothing, so it costs no
more than keeping existing tensors.

Whole runs of the embedded model follow, on any device, with everything that a verb keeps and
decodes, but without its pictures; then "as typed", the whole commands with pictures, video and
page, in a process that has imported everything. On a card a run of A14B takes minutes, so that of
`steps` is composed of passes and decodings, which are measured.
"""

import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
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
from minicos.bench import vae
from minicos.bench.measure import Line, alternate, attempt, attempt_all
from minicos.bench.networks import Subject, subject
from minicos.config import get_preset
from minicos.media import to_uint8
from minicos.open import load
from minicos.ops import REFERENCE
from minicos.precision import tf32_convolutions
from minicos.runs import Run

VERBS = ("energy", "attention", "steps")
UNDRAWN = {  # what a run leaves out
    "energy": "without pictures",
    "attention": "without pictures",
    "steps": "with its decoded videos, without sheets and plots",
}
LARGE = "Wan2.2-I2V-A14B"


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    yield from attempt_all([f"{v}, a pass" for v in VERBS[:2]], lambda: passes(device, quick))
    yield from attempt_all([f"{v}, a run" for v in VERBS], lambda: runs(device, quick))
    yield from attempt_all([f"{v}, as typed" for v in VERBS], lambda: typed(device, quick))
    if device.type == "cuda":
        yield attempt(f"steps, a run of {LARGE}", lambda: composed(device, quick))


def passes(device: torch.device, quick: bool) -> list[Line]:
    """A pass under the recorders of `energy` and `attention`."""
    s = subject(device, quick)
    found = []
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
        found.append(Line(what, ms, "unwatched pass", plain, note=note))
        note = f"theirs {_cost(published, plain)}"
        found.append(Line(what, ms, "hidden states to the host", published, note=note))
    return found


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


def runs(device: torch.device, quick: bool) -> list[Line]:
    """Whole runs of the embedded model at the verbs' defaults, without pictures, against
    generation.
    """
    wan = load("tiny", device=device)
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
    names = [f"{verb}, run of {steps} steps" for verb in VERBS]
    return _against("generation", plain, names, ours, [UNDRAWN[verb] for verb in VERBS])


def typed(device: torch.device, quick: bool) -> list[Line]:
    """Whole commands as users type them, with all files that they write, against `minicos
    generate`.
    """
    given = ["--puzzle", "mark", "--device", str(device), *(["--steps", "2"] if quick else [])]
    plain, *ours = alternate(
        *(partial(command, [verb, *given]) for verb in ("generate", *VERBS)),
        device=device,
        repeats=1 if quick else 3,
        warmup=0 if quick else 1,
        label="" if quick else "commands, tiny",
    )
    names = [f"{verb}, as typed, with pictures" for verb in VERBS]
    note = f"{' '.join(given[:2])}, without the start of Python"
    return _against("generate, as typed", plain, names, ours, [note] * len(names))


def command(argv: list[str]) -> None:
    """Run `minicos` in this process, silently, in a new folder. Raises MinicosError."""
    from minicos.cli import parser  # which imports this package's list of benchmarks

    with TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        words = [*argv, "--out", str(Path(folder) / "run")]
        about = Namespace(command=shlex.join(["minicos", *words]), begin=time.monotonic())
        args = parser().parse_args(words, about)
        args.run(args)


def composed(device: torch.device, quick: bool) -> Line:
    """A run of A14B by `minicos steps` at its defaults, against generation, composed of a pass and
    of a decoding as by default on a card (TF32).
    """
    s, pixels, preset = subject(device, quick), vae.subject(device, quick), get_preset(LARGE)
    count, branches = preset.steps * len(preset.branches), len(preset.branches)
    videos = len(spread(8, preset.steps)) * (1 + branches * (branches > 1))

    def decode() -> None:
        with tf32_convolutions(device.type == "cuda"):
            for part in pixels.vae.stream(pixels.latent):
                to_uint8(part[0])

    one, decoded = alternate(
        s.run,
        decode,
        device=device,
        repeats=2 if quick else 5,
        label="" if quick else "steps, a run",
    )
    plain = count * one + decoded
    note = (
        f"composed: {count} passes of {one:.4g} ms, and {videos} videos and the last one, each "
        f"decoded in {decoded:.4g} ms; without writing files and pictures"
    )
    name = f"steps, run of {preset.steps} steps, {s.name}"
    return Line(name, plain + videos * decoded, "generation", plain, note=note)


def _against(
    peer: str, plain: float, names: list[str], ours: list[float], notes: list[str]
) -> list[Line]:
    """A line for each of our runs, with what it costs beyond the plain one."""
    return [
        Line(name, ms, peer, plain, note=f"{_cost(ms, plain)}; {note}")
        for name, ms, note in zip(names, ours, notes, strict=True)
    ]


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
