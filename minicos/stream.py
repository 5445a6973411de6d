"""Execution of a plan: offloaded networks move to the device when they are used, streamed networks
block by block, from the host's memory or from their files.

Weights are copied, or read again by the function that read them first, so results are bitwise equal
to those of a resident model. For the placements see `plan`.
"""

import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from minicos.dit import DiT
from minicos.errors import MinicosError, warn
from minicos.plan import ALIGN, HEADROOM, Dtype, Part, Plan
from minicos.weights.load import Read

N = TypeVar("N", bound=nn.Module)


class HostBuffer:
    """The weights of a module in one piece of host memory, so that one copy moves all of them."""

    def __init__(
        self, module: nn.Module, dtype: Dtype, pin: bool, prefix: str = "", kept: bool = True
    ):
        self.module, self.prefix = module, prefix  # of its weights' names, for `dtype`
        # name -> begin, end, shape, dtype
        self.slots: dict[str, tuple[int, int, torch.Size, torch.dtype]] = {}
        self.size = 0
        for name, tensor in module.state_dict().items():
            kind = dtype(prefix + name)
            size = tensor.numel() * kind.itemsize
            self.slots[name] = (self.size, self.size + size, tensor.shape, kind)
            self.size += -(-size // ALIGN) * ALIGN
        self.memory = host_memory(self.size if kept else 0, pin)

    def view(self, name: str, memory: Tensor | None = None) -> Tensor:
        """A weight inside `memory` (uint8, with this buffer's layout), by default inside the buffer
        itself.
        """
        begin, end, shape, dtype = self.slots[name]
        return (self.memory if memory is None else memory)[begin:end].view(dtype).view(shape)

    def bind(self, memory: Tensor | None = None) -> None:
        """Make the module use the weights in `memory`, by default those of the buffer. Its
        parameters stay the same objects.
        """
        for name, parameter in self.module.named_parameters():
            parameter.data = self.view(name, memory)

    def write(self, target: Tensor) -> None:
        """Copy the weights to `target` (uint8, with this buffer's layout)."""
        target.copy_(self.memory, non_blocking=True)


class FileBuffer(HostBuffer):
    """The weights of a module that stay in their file and are read for each use: quantised tensors
    are expanded, and LoRAs merged, in the memory they are written to. Without such memory, the
    module's weights are NaN.
    """

    read: Read

    def view(self, name: str, memory: Tensor | None = None) -> Tensor:
        if memory is not None:
            return super().view(name, memory)
        _, _, shape, dtype = self.slots[name]
        return torch.full((), torch.nan, dtype=dtype).expand(shape)

    def write(self, target: Tensor) -> None:
        for name in self.slots:
            self.read(self.prefix + name, lambda *_, name=name: self.view(name, target))


def host_memory(size: int, pin: bool) -> Tensor:
    """`size` bytes of host memory, pinned for a CUDA card.

    Memory is pinned by registering it, since torch rounds its own pinned memory up to a power of
    two. If the system refuses, copies still work, and a warning says that they are slow.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if pin and size:
        cudart, address = torch.cuda.cudart(), memory.data_ptr()
        try:
            torch.cuda.check_error(int(cudart.cudaHostRegister(address, size, 0)))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warn(
                f"{size / 1e9:.1f} GB of host memory cannot be pinned ({reason}), so weights come "
                "to the card more slowly: raise the limit of locked memory (ulimit -l)"
            )
        else:
            weakref.finalize(memory, cudart.cudaHostUnregister, address)
    return memory


class CopyQueue(Protocol):
    """A serial queue of copies that overlaps with computation. Each side can wait for events of the
    other.
    """

    def event(self) -> Any:
        """An event that occurs when all computation submitted so far is done."""

    def copy(self, target: Tensor, source: HostBuffer, after: Any) -> Any:
        """Write the weights to `target` once the event `after` has occurred; returns the event of
        the copy's end.
        """

    def wait(self, event: Any) -> None:
        """Delay further computation until the event of a copy has occurred."""


class ThreadCopyQueue:
    """Copies in a thread, with futures as their events. An error in it reaches whoever waits.

    There is one thread, so what an interrupted pass still copies comes before all that a later one
    copies to the same buffers.
    """

    def __init__(self) -> None:
        # of each process: a forked one has no threads of its parent
        self._threads = defaultdict[int, Any](lambda: ThreadPoolExecutor(1, "minicos-copy"))

    def event(self) -> Any:
        """None, since computation on the CPU is done when its call returns."""

    def copy(self, target: Tensor, source: HostBuffer, after: Any) -> Future:
        return self._threads[os.getpid()].submit(self._copy, target, source, after)

    def wait(self, event: Future) -> None:
        event.result()

    def _copy(self, target: Tensor, source: HostBuffer, after: Any) -> Any:
        source.write(target)


class CudaCopyQueue(ThreadCopyQueue):
    """Copies on a separate CUDA stream. Computation is ordered by the current stream.

    They are submitted by the thread because weights from files come in pieces through little pinned
    memory: most pieces wait until an older one has left it, thus for the computation before the
    copy. If the caller waited for that, the next block would be launched too late to overlap.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.stream = device, torch.cuda.Stream(device)

    def event(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: Future) -> None:
        """Waits here until the copy is on its way, and on the card until it has ended."""
        torch.cuda.current_stream(self.device).wait_event(event.result())

    def _copy(self, target: Tensor, source: HostBuffer, after: Any) -> Any:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            source.write(target)
            event = torch.cuda.Event()
            event.record(self.stream)
        return event


# process and source of a copy, the buffer it goes to, and the event of its end
_Copied = tuple[tuple[int, HostBuffer], Tensor, Any]


class Streamer:
    """Puts the weights of one block after the other on the device, alternating between two buffers.
    While the last two blocks compute, the first two of the next pass are copied.

    Two waits protect the buffers: a block computes only after the copy into its buffer, and a copy
    begins only after the block that used the buffer before. Both buffers exist as long as the
    streamer, so the allocator never reuses their memory and `record_stream` is not needed.
    """

    def __init__(self, queue: CopyQueue, device: torch.device):
        self.queue, self.device = queue, device
        self.host: dict[nn.Module, HostBuffer] = {}  # block -> its weights
        self._pass: object = None  # the pass that currently uses the device buffers
        self._turn = Lock()  # held while buffers change owner, since passes may start in threads
        self._bound: set[HostBuffer] = set()  # those whose block points into a device buffer
        self._ahead: tuple[_Copied, ...] = ()  # what the last whole pass copied for the next one

    def stream(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """The blocks in order, each with its weights on the device until the next one is requested
        (for `DiT.stream_blocks`).

        A pass that was stopped early, by an exception or an abandoned generator, is cleaned up by
        the next one. Raises MinicosError if a second pass, perhaps in another thread, has begun
        meanwhile.
        """
        blocks = list(blocks)
        hosts = [self.host[block] for block in blocks]
        with self._turn:
            current = self._pass = object()
            for host in list(self._bound):
                self._release(host)
            coming, self._ahead = self._ahead, ()
            if [copied[0] for copied in coming] != [(os.getpid(), host) for host in hosts[:2]]:
                begin = self.queue.event()  # also after work that an interrupted pass left running
                firsts = zip(self._buffers, hosts[:2], strict=False)
                coming = tuple(self._fill(buffer, host, begin) for buffer, host in firsts)
        for i, (block, host) in enumerate(zip(blocks, hosts, strict=True)):
            (_, buffer, copied), *rest = coming
            self.queue.wait(copied)
            with self._turn:
                self._check(current)
                host.bind(buffer)
                self._bound.add(host)
            yield block
            with self._turn:
                self._check(current)
                self._release(host)
                after = hosts[(i + 2) % len(hosts)]
                coming = (*rest, self._fill(buffer, after, self.queue.event()))
                self._ahead = coming if block is blocks[-1] else ()

    def _check(self, current: object) -> None:
        if self._pass is not current:
            raise MinicosError(
                "two passes through a streamed network at once: make one after the other, or take "
                "--residency resident"
            )

    def _fill(self, buffer: Tensor, host: HostBuffer, after: Any) -> "_Copied":
        """The copy of a block; of no use to a forked process, which has no thread that copies."""
        return (os.getpid(), host), buffer, self.queue.copy(buffer[: host.size], host, after)

    def _release(self, host: HostBuffer) -> None:
        host.bind()
        self._bound.discard(host)

    @cached_property
    def _buffers(self) -> tuple[Tensor, ...]:
        """Two buffers on the device, each for the largest block; ordinary tensors, since a thread
        could not write to those made in a caller's inference mode.
        """
        size = max(host.size for host in self.host.values())
        with torch.inference_mode(False):
            return tuple(torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))


class Residency:
    """Carries out a plan: call `allocate` for a network before its weights are read, and
    `to_device` whenever it is to run.
    """

    def __init__(self, plan: Plan, queue: CopyQueue | None = None):
        self.plan, self._queue = plan, queue
        self._offloaded: dict[nn.Module, HostBuffer] = {}
        self._parts: dict[nn.Module, Part] = {}
        self._on_device: list[nn.Module] = []  # offloaded networks on the device, last used last

    @cached_property
    def _streamer(self) -> Streamer:
        device = self.plan.device
        copies = CudaCopyQueue(device) if device.type == "cuda" else ThreadCopyQueue()
        return Streamer(self._queue or copies, device)

    def allocate(
        self, name: str, network: nn.Module, dtype: Dtype
    ) -> Callable[[str, torch.Size, torch.dtype], Tensor] | None:
        """Reserve memory for a network without weights; returns the `place` of `load_into`."""
        part = self._parts[network] = next(p for p in self.plan.parts if p.name == name)
        pin = self.plan.device.type == "cuda"
        if part.placement == "resident":
            return None
        if part.placement == "offload":
            buffer = self._offloaded[network] = HostBuffer(network, dtype, pin)
            return lambda name, shape, dtype: buffer.view(name)
        if not isinstance(network, DiT):
            raise TypeError(f"blocks are streamed of a DiT, not of a {type(network).__name__}")
        streamer, blocks = self._streamer, list(network.blocks)
        disk = part.placement == "disk"
        kind = FileBuffer if disk else HostBuffer
        for i, block in enumerate(blocks):
            streamer.host[block] = kind(block, dtype, pin, f"blocks.{i}.", kept=not disk)
        network.stream_blocks(streamer.stream)
        # weights that stay in their file are read here a first time, to be checked
        scratch = torch.empty(part.block * disk, dtype=torch.uint8, device=self.plan.device)

        def place(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            first, _, rest = name.partition(".")
            if first != "blocks":
                return torch.empty(shape, dtype=dtype, device=self.plan.device)
            index, _, inside = rest.partition(".")
            return streamer.host[blocks[int(index)]].view(inside, scratch if disk else None)

        return place

    def loaded(self, network: nn.Module, read: Read) -> None:
        """Weights that stay in their file are read again with this function."""
        if isinstance(network, DiT) and self._parts[network].placement == "disk":
            for block in network.blocks:
                host = self._streamer.host[block]
                if isinstance(host, FileBuffer):
                    host.read = read
                    host.bind()

    def to_device(self, network: N) -> N:
        """The same network, ready to run on the device. Offloaded networks leave the device until
        there is room for it, the least recently used first.
        """
        there = self._on_device
        present = network in there
        if present:
            there.remove(network)
        while there and not self._fits(network):
            self._offloaded[there.pop(0)].bind()
        if network in self._offloaded:
            if not present:
                buffer = self._offloaded[network]
                buffer.bind(buffer.memory.to(self.plan.device, non_blocking=True, copy=True))
            there.append(network)
        return network

    def _fits(self, network: nn.Module) -> bool:
        """Whether the network can run while the offloaded ones on the device stay there."""
        plan = self.plan
        if plan.free is None or network not in self._parts:
            return False
        need = sum(part.resident_bytes for part in plan.parts) + plan.buffers
        need += sum(self._parts[other].weights for other in self._on_device)
        need += plan.host if plan.device.type == "cpu" else 0  # host and device share one memory
        return need + self._parts[network].transient_bytes <= HEADROOM * plan.free
