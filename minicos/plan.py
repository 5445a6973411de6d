"""Where the weights of a model are kept, decided before any are read: on the device, on the host,
or streamed block by block.

`choose` receives the sizes of the networks, the memory that each needs while it runs, and the free
memory. It returns the first plan that fits, with its costs; `stream.Residency` carries it out. A
network is placed in one of four ways:

    resident  on the device from loading to the end
    offload   in (pinned) host memory; moved to the device when it is used, and back when another
              network needs the room. An expert thus moves once, at the boundary, and stays while
              the VAE decodes if both fit
    stream    its blocks pass through two buffers on the device in turn: while one block computes,
              the weights of the next are copied. The rest of the network is resident
    disk      the same, from its files instead of the host's memory, read by a thread: the system
              keeps as much of them in memory as there is room for, fp8 as fp8, and a block is
              expanded for each use
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from minicos.errors import MinicosError

CHOICES = ("auto", "resident", "swap", "stream", "disk")
ALIGN = 256  # bytes, of every tensor in a host buffer
EXPANDING = 10 * 2**26  # bytes on a card while 2^26 fp8 numbers are expanded, in float32 twice
HEADROOM = 0.9  # usable share of the free memory; the rest covers what libraries allocate

Dtype = Callable[[str], torch.dtype]  # name of a parameter -> its dtype


@dataclass(frozen=True)
class Part:
    """One network: its sizes in bytes, and where its weights are placed."""

    name: str  # "high" | "low" | "text" | "vae"
    weights: int
    work: int = 0  # memory that it needs while it runs, in addition to the weights
    blocks: int = 0  # the share of the weights in blocks that can be streamed ...
    block: int = 0  # ... and in the largest of these blocks
    mapped: int = 0  # the share of the weights that a CPU uses in place, mapped from the file
    stored: int = 0  # bytes in its files, if its blocks can be read from there in every pass
    placement: str = "resident"  # "resident" | "offload" | "stream" | "disk"

    @property
    def resident_bytes(self) -> int:
        """Bytes held on the device permanently."""
        return {
            "resident": self.weights - self.mapped,
            "offload": 0,
            "stream": self.weights - self.blocks,
            "disk": self.weights - self.blocks,
        }[self.placement]

    @property
    def transient_bytes(self) -> int:
        """Extra bytes on the device while it runs."""
        return self.work + (self.weights if self.placement == "offload" else 0)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory, if the device is not the host."""
        return {"offload": self.weights, "stream": self.blocks}.get(self.placement, 0)


@dataclass(frozen=True)
class Plan:
    """The placement of every network, and what it costs."""

    residency: str  # "resident" | "swap" | "stream" | "disk"
    device: torch.device
    parts: tuple[Part, ...]
    free: int | None = None  # bytes free on the device when the plan was made; None if unknown
    operations: int = 0  # floating-point operations of a step, over all passes
    dtype: torch.dtype = torch.float32  # of the matrix products

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def buffers(self) -> int:
        """Bytes of the two device buffers through which blocks are streamed and, for blocks from
        files on a card, of what expands them.
        """
        moving = [part.block for part in self.parts if part.placement in ("stream", "disk")]
        expanding = self.residency == "disk" and self.device.type == "cuda"
        return 2 * max(moving, default=0) + EXPANDING * expanding

    @property
    def peak(self) -> int:
        """Expected bytes on the device at the worst moment."""
        return (
            sum(part.resident_bytes for part in self.parts)
            + self.buffers
            + max(part.transient_bytes for part in self.parts)
        )

    @property
    def host(self) -> int:
        """Bytes of host memory, if the device is not the host."""
        return sum(part.host_bytes for part in self.parts)


class DoesNotFit(MinicosError):
    """A plan needs more memory than there is."""

    def __init__(self, message: str, plan: Plan):
        super().__init__(message)
        self.plan = plan


def choose(
    residency: str,
    parts: Sequence[Part],
    device: torch.device,
    *,
    free: int | None,
    host: int | None,
    operations: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """The plan with the given residency, if it fits as it is or with the text encoder offloaded.
    "auto" chooses the first that fits: resident, swap, stream, disk; on a CPU, resident or disk.

    Args:
        free: bytes available on the device, None if unknown (see `available`).
        host: bytes of host memory available, None if unknown.
        operations: floating-point operations of a step, for the time estimate in `describe`.
        dtype: dtype of the matrix products, for the same estimate.

    Raises:
        DoesNotFit: the plan, or with "auto" every plan, needs more memory than there is.
    """
    if residency not in CHOICES:
        raise MinicosError(f"no residency {residency!r}: take one of {', '.join(CHOICES)}")
    plans = [
        Plan(name, device, _placed(parts, placement), free, operations, dtype)
        for name, placement in _ORDER
        if name != "disk" or any(part.stored for part in parts)
    ]
    named = [plan for plan in plans if residency in ("auto", plan.residency)]
    if not named:
        raise MinicosError("--residency disk is for Wan's networks: take stream")
    if device.type == "cpu":  # moving weights within the same memory gains nothing
        named = [plan for plan in named if not plan.host] or named
    for plan in named:
        if _fits(plan, free, host):
            return plan
    last = named[-1]
    needs = f"{last.residency} needs about {_size(last.peak)} of {_size(free)} free on {device}"
    if last.host:
        needs += f" and {_size(last.host)} of {_size(host)} of host memory"
    raise DoesNotFit(f"not enough memory for the plan: {needs}.", last)


_ORDER: tuple[tuple[str, dict[str, str]], ...] = (
    ("resident", {}),
    ("resident", {"text": "offload"}),
    ("swap", {"text": "offload", "vae": "offload", "high": "offload", "low": "offload"}),
    ("stream", {"text": "offload", "vae": "offload", "high": "stream", "low": "stream"}),
    ("disk", {"high": "disk", "low": "disk"}),
    ("disk", {"text": "offload", "vae": "offload", "high": "disk", "low": "disk"}),
)


def _placed(parts: Sequence[Part], placement: Mapping[str, str]) -> tuple[Part, ...]:
    return tuple(replace(part, placement=placement.get(part.name, "resident")) for part in parts)


def _fits(plan: Plan, free: int | None, host: int | None) -> bool:
    if plan.device.type == "cpu":  # host and device share one memory
        return free is None or plan.peak + plan.host <= HEADROOM * free
    return all(
        there is None or needed <= HEADROOM * there
        for needed, there in ((plan.peak, free), (plan.host, host))
    )


def available(device: torch.device) -> int | None:
    """Free bytes of a device (the CPU: of host memory); None if the system does not report it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    # unlike sysconf, includes memory that can be freed
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def describe(plan: Plan, speed: float | None = None) -> str:
    """The plan in a few lines. `speed` is in operations per second, see `cost.throughput`."""
    free = "" if plan.free is None else f", {_size(plan.free)} free"
    places = {
        "resident": "stays on {}",
        "offload": "on the host, on {} from its use until room is needed",
        "stream": "block by block through {}",
        "disk": "block by block through {}, each time from its files",
    }
    lines = [f"plan: {plan.residency} on {plan.device}{free}"]
    for part in plan.parts:
        mapped = (
            f" ({_size(part.mapped)} of it in its file)"
            if part.mapped and part.placement == "resident"
            else f" ({_size(part.stored)}, expanded for each use)"
            if part.placement == "disk"
            else ""
        )
        lines.append(
            f"  {part.name:<5}{_size(part.weights):>9}  "
            f"{places[part.placement].format(plan.device)}{mapped}"
        )
    host = f", {_size(plan.host)} on the host" if plan.host else ""
    lines.append(f"  expected peak {_size(plan.peak)} on {plan.device}{host}")
    if speed and plan.operations:
        lines.append(
            f"  expected time {plan.operations / speed:.3g} s a step: an estimate from "
            f"{plan.operations / 1e12:.3g} TFLOP"
            f" at {speed / 1e12:.3g} TFLOP/s, measured here on matrix products"
        )
    return "\n".join(lines)


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def measure(
    name: str, network: nn.Module, dtype: Dtype, *, work: int = 0, mapped: int = 0, stored: int = 0
) -> Part:
    """The sizes of a network (which may be on the meta device) whose parameters will have these
    dtypes.
    """
    total = _bytes(network, dtype)
    blocks = [
        _bytes(block, dtype, f"blocks.{i}.", ALIGN)
        for i, block in enumerate(getattr(network, "blocks", ()))
    ]
    block, mapped = max(blocks, default=0), min(total, mapped)
    return Part(name, total, work, min(total, sum(blocks)), block, mapped, stored)


def _bytes(module: nn.Module, dtype: Dtype, prefix: str = "", align: int = 1) -> int:
    sizes = (
        tensor.numel() * dtype(prefix + name).itemsize
        for name, tensor in module.state_dict().items()
    )
    return sum(-(-size // align) * align for size in sizes)
