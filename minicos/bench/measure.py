"""How a benchmark measures: minicos and its peer in turns (A B A B) in one process, medians, and
the ceilings of the same machine.

    ours_ms, peer_ms = alternate(ours, peer, device=device)
    share = ceilings(device).of_matmul(flops, ours_ms)
    yield Line("velocity", ours_ms, "diffusers", peer_ms, share)

Inputs are random, since a card multiplies zeros faster. On a card, time is measured between two
device events, so launches queue up as in a real run, and the L2 cache is overwritten before each
measurement. On a CPU with one thread it is the processor time of this process, which other work on
the machine hardly affects; with several threads it is wall-clock time.
"""

import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from time import perf_counter, process_time
from typing import Any, Protocol

import torch

from minicos import cost
from minicos.errors import MinicosError
from minicos.runs import progress

# -- a result --------------------------------------------------------------------------------------

# The ceiling is a product or a copy of one size; cores and caches may serve another one better, and
# a machine shared with other work is not equally fast at all times.
ABOVE = "above the ceiling: faster than the best product or copy measured before and after"


@dataclass(frozen=True)
class Line:
    """One figure and its peer's, or the reason why there is none. Times are medians in
    milliseconds.
    """

    name: str
    ours_ms: float | None = None
    peer: str | None = None  # what it is compared with
    peer_ms: float | None = None
    ceiling_share: float | None = (
        None  # of what this machine reaches at best in matrix products or copies (`ceilings`)
    )
    note: str = ""  # further information for people, e.g. TFLOP/s or memory
    above: str = ABOVE  # why a share may lie above 1
    not_measured: str = ""

    @property
    def ratio(self) -> float | None:
        """ours / peer: below 1, ours is faster."""
        return None if self.ours_ms is None or not self.peer_ms else self.ours_ms / self.peer_ms

    @property
    def remarks(self) -> str:
        """The note, with the reason for a share above 1."""
        above = self.ceiling_share is not None and self.ceiling_share > 1
        return "; ".join(filter(None, [self.note, self.above * above]))

    def to_json(self) -> dict[str, Any]:
        if self.not_measured:
            return {"name": self.name, "not_measured": self.not_measured}
        names = ("name", "ours_ms", "peer", "peer_ms", "ratio", "ceiling_share")
        above = {"remarks": self.remarks} if self.above in self.remarks else {}
        return {name: getattr(self, name) for name in names} | above

    def cells(self) -> list[str]:
        """The cells of a Markdown row, below `MARKDOWN`."""
        if self.not_measured:
            return [self.name, "not measured", "", "", "", "", self.not_measured]
        share = None if self.ceiling_share is None else 100 * self.ceiling_share
        figures = (_figure(self.ours_ms, " ms"), self.peer or "", _figure(self.peer_ms, " ms"))
        return [self.name, *figures, _figure(self.ratio, ""), _figure(share, " %"), self.remarks]

    def __str__(self) -> str:
        """A row of the table below `TITLES`."""
        if self.not_measured:
            return f"{self.name:{NAME}}  not measured: {self.not_measured}"
        share = None if self.ceiling_share is None else 100 * self.ceiling_share
        cells = (
            f"{self.name:{NAME}}",
            _figure(self.ours_ms, " ms"),
            f"{self.peer or '':{PEER}}",
            _figure(self.peer_ms, " ms"),
            _figure(self.ratio, " x"),
            _figure(share, " %"),
            self.remarks,
        )
        return "  ".join(cells).rstrip()


MARKDOWN = ("what", "ours", "peer", "its time", "ratio", "ceiling", "")
NAME, PEER, FIGURE = 40, 34, 10  # widths of columns
TITLES = (
    f"{'':{NAME}}  {'ours':>{FIGURE}}  {'peer':{PEER}}  "
    f"{'its time':>{FIGURE}}  {'ratio':>{FIGURE}}  {'ceiling':>{FIGURE}}"
)


def _figure(value: float | None, unit: str) -> str:
    """Four digits, e.g. "12.35 ms"."""
    if value is None:
        return " " * FIGURE
    digits = max(0, 3 - math.floor(math.log10(value))) if value else 0
    return f"{value:.{min(digits, 5)}f}{unit}".rjust(FIGURE)


def rate(flops: float, ms: float) -> str:
    """Operations per second in words: "612 TFLOP/s"."""
    giga = flops / ms / 1e6
    return f"{giga / 1e3:.4g} TFLOP/s" if giga >= 1e3 else f"{giga:.4g} GFLOP/s"


def attempt(name: str, measured: Callable[[], Line]) -> Line:
    """A line, or the reason why there is none: the message of a MinicosError (no diffusers, no GPU
    ...), or a lack of memory.
    """
    (line,) = attempt_all([name], lambda: [measured()])
    return line


def attempt_all(names: Sequence[str], measured: Callable[[], Sequence[Line]]) -> Sequence[Line]:
    """`attempt` for lines that are measured together."""
    try:
        return measured()
    except MinicosError as error:
        why = str(error)
    except torch.OutOfMemoryError as error:
        why = f"out of memory ({str(error).splitlines()[0]})"
    return [Line(name, not_measured=why) for name in names]


# -- time ------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Takes time stamps during a computation."""

    def ready(self) -> None:
        """Bring the device into the initial state of a measurement."""
        ...

    def mark(self) -> Any: ...

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two time stamps."""
        ...


def host_time() -> Callable[[], float]:
    """The clock of computations on this host: see the top of this file."""
    return process_time if torch.get_num_threads() == 1 else perf_counter


class HostClock:
    """For the CPU, where a call returns when it is done."""

    def __init__(self) -> None:
        self.mark = host_time()

    def ready(self) -> None:
        pass

    def ms(self, begin: float, end: float) -> float:
        return 1e3 * (end - begin)


class DeviceClock:
    """Events on the current CUDA stream. Overwriting the L2 cache also keeps the card busy while
    the next launch is prepared.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.filler = torch.empty(
            2**29, dtype=torch.uint8, device=device
        )  # larger than any card's L2 cache; takes about 0.1 ms

    def ready(self) -> None:
        self.filler.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end)


@torch.no_grad()
def alternate(
    *runs: Callable[[], object],
    device: torch.device,
    repeats: int = 10,
    warmup: int = 2,
    label: str = "",
    clock: Clock | None = None,
) -> tuple[float, ...]:
    """The median time of each call in milliseconds, measured in turns: A B A B, so that a slowdown
    of the machine affects both.

    Results of the calls are discarded immediately. If a call takes seconds, give a `label` for a
    progress bar. `clock` is by default that of the device.
    """
    usual: Clock = DeviceClock(device) if device.type == "cuda" else HostClock()
    clock = clock or usual
    for _ in range(warmup):
        for run in runs:
            run()
    marks = []
    rounds = range(repeats)
    for _ in progress(rounds, label=label) if label else rounds:
        for run in runs:
            clock.ready()
            begin = clock.mark()
            run()
            marks.append((begin, clock.mark()))
    times = [
        clock.ms(begin, end) for begin, end in marks
    ]  # only now: waiting in between would empty the queue
    return tuple(median(times[i :: len(runs)]) for i in range(len(runs)))


# -- ceilings --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """The best measured performance of this machine."""

    # floating-point operations per second of matrix products; a product and a sum count as two
    matmul: float
    copy: float  # bytes per second, read and written, of a copy within the device's memory

    def of_matmul(self, flops: float, ms: float) -> float:
        """The share of the ceiling that `flops` in `ms` reach."""
        return flops / (self.matmul * ms / 1e3)

    def of_copy(self, count: float, ms: float) -> float:
        """The same for bytes read and written."""
        return count / (self.copy * ms / 1e3)


_best: dict[tuple[torch.device, torch.dtype], float] = {}


def ceilings(device: torch.device, dtype: torch.dtype = torch.float32) -> Ceilings:
    """The ceilings of matrix products of this dtype, and of copies far larger than any cache.

    Products are measured again at every call, which comes after the measurement of a line that has
    a ceiling, and the best so far counts, so that the line is compared with what the machine did
    before and after it.
    Copies are measured once per process.
    """
    clock = perf_counter if device.type == "cuda" else host_time()  # that of the lines
    found = [cost.throughput(device, dtype, clock) for _ in range(3)]
    _best[device, dtype] = max(_best.get((device, dtype), 0.0), *found)
    return Ceilings(_best[device, dtype], _copies(device))


@cache
def _copies(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of several copies."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times = [
        alternate(lambda: target.copy_(source), device=device, repeats=1, warmup=1)[0]
        for _ in range(7)
    ]
    return 2 * source.nbytes / (min(times) / 1e3)


# -- the machine -----------------------------------------------------------------------------------


PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors")


def machine(device: torch.device) -> dict[str, str]:
    """Date, device, versions and command, for the head of a table."""
    return {
        "date": date.today().isoformat(),
        "device": _device_name(device),
        "versions": ", ".join(map(_version, PACKAGES)),
        "command": shlex.join(["minicos", *sys.argv[1:]]),
    }


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def header(device: torch.device) -> str:
    """`machine` as lines above a table."""
    return "\n".join(f"{key:9} {value}" for key, value in machine(device).items())


def markdown(results: Mapping[str, Sequence[Line]], about: str) -> str:
    """All results as one table, below the description of the machine."""
    rows = [["", *MARKDOWN], ["---"] * (len(MARKDOWN) + 1)]
    for name, lines in results.items():
        rows += [[f"`{name}`", *line.cells()] for line in lines]
    cells = ([" ".join(cell.replace("|", "/").split()) for cell in row] for row in rows)
    return "\n".join(["```", about, "```", "", *(f"| {' | '.join(row)} |" for row in cells), ""])
