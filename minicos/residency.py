"""Which weights are where: all on the device, one network at a time, or block by block.

The plan comes first (`choose`): from the sizes of the networks, what they need while they run, and the memory that is
free, it says where each lives, and what that will cost. `Residency` carries it out while a model runs:

    stay     on the device from loading to the end
    visit    in (pinned) host memory; on the device while it is used. One network visits at a time, so an expert moves once,
             at the boundary, and the text encoder leaves when the first expert comes
    stream   the blocks of an expert pass through two buffers on the device, in turn: while one block computes, the next one's
             weights arrive (`Streamer`). The rest of the expert stays

Weights are copied and never changed, so results are those of the resident model, bit for bit.
"""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from minicos.errors import MinicosError

CHOICES = ("auto", "resident", "swap", "stream")
ALIGN = 256  # bytes, of every tensor in a parcel
HEADROOM = 0.9  # the part of the free memory that a plan may use: what libraries keep for themselves is not counted

N = TypeVar("N", bound=nn.Module)
Dtype = Callable[[str], torch.dtype]  # name of a parameter -> its dtype


# -- the plan -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One network: its sizes in bytes, and where it lives."""

    name: str  # "high" | "low" | "text" | "vae"
    weights: int
    work: int = 0  # beside the weights, while it runs
    blocks: int = 0  # of the weights: those in blocks that can be streamed ...
    block: int = 0  # ... and in the largest of these
    mapped: int = 0  # of the weights: those that are used where they lie in their file, on a CPU
    where: str = "stay"  # "stay" | "visit" | "stream"

    @property
    def stays(self) -> int:
        """What it takes of the device all the time."""
        return {
            "stay": self.weights - self.mapped,
            "visit": 0,
            "stream": self.weights - self.blocks,
        }[self.where]

    @property
    def comes(self) -> int:
        """What it takes besides, while it is used."""
        return self.work + (self.weights if self.where == "visit" else 0)

    @property
    def host(self) -> int:
        """What it takes of the host's memory, where that is not the device's."""
        return {"stay": 0, "visit": self.weights, "stream": self.blocks}[self.where]


@dataclass(frozen=True)
class Plan:
    """Where every network lives, and what that costs."""

    residency: str  # "resident" | "swap" | "stream"
    device: torch.device
    parts: tuple[Part, ...]
    free: int | None = (
        None  # bytes on the device when the plan was made; None where that cannot be known
    )
    operations: int = 0  # floating-point operations of a step, all passes together
    dtype: torch.dtype = torch.float32  # of the matrix products

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def buffers(self) -> int:
        """The two through which blocks are streamed."""
        return 2 * max(part.block if part.where == "stream" else 0 for part in self.parts)

    @property
    def peak(self) -> int:
        """Expected bytes on the device at the worst moment."""
        return (
            sum(part.stays for part in self.parts)
            + self.buffers
            + max(part.comes for part in self.parts)
        )

    @property
    def host(self) -> int:
        """Bytes in host memory, where that is not the device's."""
        return sum(part.host for part in self.parts)


def choose(
    residency: str,
    parts: Sequence[Part],
    device: torch.device,
    *,
    free: int | None,
    host: int | None,
    **about: Any,
) -> Plan:
    """The plan of that name or, for "auto", the first that fits: resident, the same with the text encoder visiting, swap, stream.

    free, host  bytes available on the device and of host memory, None for unknown (see `available`)
    Raises MinicosError with the numbers where the plan, or every plan, needs more than there is.
    """
    if residency not in CHOICES:
        raise MinicosError(f"no residency {residency!r}: take one of {', '.join(CHOICES)}")
    plans = [Plan(name, device, _placed(parts, where), free, **about) for name, where in _ORDER]
    named = (
        plans
        if residency == "auto"
        else [plan for plan in plans if plan.residency == residency][:1]
    )
    if residency == "auto" and device.type == "cpu":
        named = plans[:1]  # moving weights about within one memory gains nothing
    for plan in named:
        if _fits(plan, free, host):
            return plan
    last = named[-1]
    needs = f"{last.residency} needs about {_size(last.peak)} of {_size(free)} free on {device}"
    if last.host:
        needs += f" and {_size(last.host)} of {_size(host)} of host memory"
    raise MinicosError(f"not enough memory for the plan: {needs}. {_remedy(last, residency)}")


_ORDER = (
    ("resident", {}),
    ("resident", {"text": "visit"}),
    ("swap", {"text": "visit", "vae": "visit", "high": "visit", "low": "visit"}),
    ("stream", {"text": "visit", "vae": "visit", "high": "stream", "low": "stream"}),
)


def _placed(parts: Sequence[Part], where: Mapping[str, str]) -> tuple[Part, ...]:
    return tuple(replace(part, where=where.get(part.name, "stay")) for part in parts)


def _fits(plan: Plan, free: int | None, host: int | None) -> bool:
    if plan.device.type == "cpu":  # one memory holds both
        return free is None or plan.peak + plan.host <= HEADROOM * free
    return all(
        there is None or needed <= HEADROOM * there
        for needed, there in ((plan.peak, free), (plan.host, host))
    )


def _remedy(plan: Plan, asked: str) -> str:
    worst = max(plan.parts, key=lambda part: part.comes)
    smaller = (
        "Take a smaller video" if worst.work > worst.weights else "Take a machine with more memory"
    )
    return f"{smaller}{'' if asked == 'auto' or plan.device.type == 'cpu' else ', or another --residency'}."


def available(device: torch.device) -> int | None:
    """Bytes that are free on a device, or of host memory for the CPU; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        with open(
            "/proc/meminfo"
        ) as file:  # what could be freed counts as free here, not so in sysconf
            return next(
                int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def describe(plan: Plan, speed: float | None = None) -> str:
    """The plan in a few lines for people. `speed`: operations a second, as `cost.throughput` measures them."""
    free = "" if plan.free is None else f", {_size(plan.free)} free"
    places = {
        "stay": "stays on {}",
        "visit": "on the host, on {} while it is used",
        "stream": "block by block through {}",
    }
    lines = [f"plan: {plan.residency} on {plan.device}{free}"]
    for part in plan.parts:
        mapped = (
            f" ({_size(part.mapped)} of it in its file)"
            if part.mapped and part.where == "stay"
            else ""
        )
        lines.append(
            f"  {part.name:<5}{_size(part.weights):>9}  {places[part.where].format(plan.device)}{mapped}"
        )
    host = f", {_size(plan.host)} on the host" if plan.host else ""
    lines.append(f"  expected peak {_size(plan.peak)} on {plan.device}{host}")
    if speed and plan.operations:
        lines.append(
            f"  expected time {plan.operations / speed:.3g} s a step: an estimate from {plan.operations / 1e12:.3g} TFLOP"
            f" at {speed / 1e12:.3g} TFLOP/s, measured here on matrix products"
        )
    return "\n".join(lines)


def _size(count: int | None) -> str:
    return (
        "unknown"
        if count is None
        else f"{count / 1e9:.1f} GB"
        if count >= 1e8
        else f"{count / 1e6:.1f} MB"
    )


def measure(name: str, network: nn.Module, dtype: Dtype, *, work: int = 0, mapped: int = 0) -> Part:
    """The sizes of a network (on the meta device, say) whose parameters will have these dtypes."""
    total = _bytes(network, dtype)
    blocks = [
        _bytes(block, dtype, f"blocks.{i}.", ALIGN)
        for i, block in enumerate(getattr(network, "blocks", ()))
    ]
    return Part(
        name, total, work, min(total, sum(blocks)), max(blocks, default=0), min(total, mapped)
    )


def _bytes(module: nn.Module, dtype: Dtype, prefix: str = "", align: int = 1) -> int:
    sizes = (
        tensor.numel() * dtype(prefix + name).itemsize
        for name, tensor in module.state_dict().items()
    )
    return sum(-(-size // align) * align for size in sizes)


# -- carrying it out ----------------------------------------------------------------------------------------------------


class Parcel:
    """The weights of a module side by side in one piece of host memory, so that one copy moves them all."""

    def __init__(self, module: nn.Module, dtype: Dtype, pin: bool):
        self.module = module
        self.slots: dict[
            str, tuple[int, int, torch.Size, torch.dtype]
        ] = {}  # name -> begin, end, shape, dtype
        self.size = 0
        for name, tensor in module.state_dict().items():
            size = tensor.numel() * dtype(name).itemsize
            self.slots[name] = (self.size, self.size + size, tensor.shape, dtype(name))
            self.size += -(-size // ALIGN) * ALIGN
        self.home = _host_memory(self.size, pin)

    def view(self, name: str, memory: Tensor | None = None) -> Tensor:
        """A weight in `memory` (uint8, laid out as the parcel), by default in the host's."""
        begin, end, shape, dtype = self.slots[name]
        return (self.home if memory is None else memory)[begin:end].view(dtype).view(shape)

    def live_in(self, memory: Tensor | None = None) -> None:
        """Let the module use the weights in `memory`, by default those at home. The parameters stay the objects they are."""
        for name, parameter in self.module.named_parameters():
            parameter.data = self.view(name, memory)


def _host_memory(size: int, pin: bool) -> Tensor:
    """`size` bytes; pinned by registering them, since torch's own pinned memory is rounded up to a power of two."""
    memory = torch.empty(size, dtype=torch.uint8)
    if pin and size:
        cudart, address = torch.cuda.cudart(), memory.data_ptr()
        torch.cuda.check_error(int(cudart.cudaHostRegister(address, size, 0)))
        weakref.finalize(memory, cudart.cudaHostUnregister, address)
    return memory


class Lane(Protocol):
    """Copies that run beside the computation, one after the other, and the marks by which the two wait for each other."""

    def mark(self) -> Any:
        """This moment of the computation."""
        ...

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy when the computation has passed the mark `after`; returns the mark of the copy's end."""
        ...

    def wait(self, mark: Any) -> None:
        """Let the computation go on only behind the mark of a copy."""
        ...


class CudaLane:
    """Copies on a stream of their own; marks are events. What is computed is what the current stream has been given."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        return event

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)


class ThreadLane:
    """Copies in a thread; marks are futures. On the host, what has been called has been computed."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "minicos-copy")

    def mark(self) -> Future:
        passed: Future = Future()
        passed.set_result(None)
        return passed

    def copy(self, target: Tensor, source: Tensor, after: Future) -> Future:
        return self._thread.submit(self._copy, target, source, after)

    def wait(self, mark: Future) -> None:
        mark.result()

    def _copy(self, target: Tensor, source: Tensor, after: Future) -> None:
        after.result()
        target.copy_(source)


class Streamer:
    """Lends blocks their weights in turn: two buffers on the device, each filled while the block in the other computes.

    Two waits keep them apart. A block computes only behind the copy into its buffer ("ready"), and a copy begins only behind
    the block that had the buffer before ("free"). The buffers live as long as the streamer, so the allocator never hands
    their memory to anyone else, and no `record_stream` is needed.
    """

    def __init__(self, lane: Lane, device: torch.device):
        self.lane, self.device = lane, device
        self.parcels: dict[nn.Module, Parcel] = {}  # block -> its weights
        self._buffers: tuple[Tensor, ...] = ()
        self._turn: object = None  # the pass that has the buffers
        self._lent: set[Parcel] = set()

    def visit(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """The blocks in order, each with its weights on the device until the next one is asked for. `DiT.visit`.

        A pass that broke off, by an exception or an abandoned generator, is cleared up by the next. Raises MinicosError where
        a second pass has begun before the first one was through.
        """
        turn = self._turn = object()
        for parcel in list(self._lent):
            self._give_back(parcel)
        blocks = list(blocks)
        parcels = [self.parcels[block] for block in blocks]
        buffers = self._room(max(parcel.size for parcel in self.parcels.values()))
        begin = self.lane.mark()  # also behind what a broken pass has left running
        ready = deque(
            self._fill(buffers[i % 2], parcels[i], begin) for i in range(min(2, len(parcels)))
        )
        for i, (block, parcel) in enumerate(zip(blocks, parcels, strict=True)):
            self.lane.wait(ready.popleft())
            parcel.live_in(buffers[i % 2])
            self._lent.add(parcel)
            yield block
            if self._turn is not turn:
                raise MinicosError(
                    "two passes through a streamed network at once: take --residency swap or resident"
                )
            self._give_back(parcel)
            free = self.lane.mark()
            if i + 2 < len(parcels):
                ready.append(self._fill(buffers[i % 2], parcels[i + 2], free))

    def _fill(self, buffer: Tensor, parcel: Parcel, after: Any) -> Any:
        return self.lane.copy(buffer[: parcel.size], parcel.home, after)

    def _give_back(self, parcel: Parcel) -> None:
        parcel.live_in()
        self._lent.discard(parcel)

    def _room(self, size: int) -> tuple[Tensor, ...]:
        if not self._buffers:
            self._buffers = tuple(
                torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)
            )
        return self._buffers


class Residency:
    """Carries out a plan: `settle` a network before its weights are read, `fetch` it whenever it is to run."""

    def __init__(self, plan: Plan, lane: Lane | None = None):
        self.plan = plan
        self._visitors: dict[nn.Module, Parcel] = {}
        self._here: nn.Module | None = None  # the visitor on the device
        self._lane, self._streamer = lane, None

    def settle(self, name: str, network: nn.Module, dtype: Dtype) -> Callable[..., Tensor] | None:
        """Prepare the home of a network that has no weights yet; returns the `place` of `load_into`."""
        where = next(part.where for part in self.plan.parts if part.name == name)
        pin = self.plan.device.type == "cuda"
        if where == "stay":
            return None
        if where == "visit":
            parcel = self._visitors[network] = Parcel(network, dtype, pin)
            return lambda name, shape, dtype: parcel.view(name)
        streamer = self._open_streamer()
        for i, block in enumerate(network.blocks):
            prefix = f"blocks.{i}."
            streamer.parcels[block] = Parcel(
                block, lambda name, prefix=prefix: dtype(prefix + name), pin
            )
        network.visit = streamer.visit
        return lambda name, shape, kind: self._streamed(network, name, shape, kind)

    def fetch(self, network: N) -> N:
        """The same network, ready to run on the device. A visitor that is there leaves first."""
        if self._here is not None and self._here is not network:
            self._visitors[self._here].live_in()
            self._here = None
        if network in self._visitors and self._here is None:
            parcel = self._visitors[network]
            parcel.live_in(parcel.home.to(self.plan.device, non_blocking=True, copy=True))
            self._here = network
        return network

    def _open_streamer(self) -> Streamer:
        if self._streamer is None:
            device = self.plan.device
            lane = self._lane or (CudaLane(device) if device.type == "cuda" else ThreadLane())
            self._streamer = Streamer(lane, device)
        return self._streamer

    def _streamed(
        self, network: nn.Module, name: str, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """Where a weight of a streamed network goes: into its block's parcel, or to the device."""
        first, _, rest = name.partition(".")
        if first != "blocks":
            return torch.empty(shape, dtype=dtype, device=self.plan.device)
        index, _, inside = rest.partition(".")
        return self._streamer.parcels[network.blocks[int(index)]].view(inside)
