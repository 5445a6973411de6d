"""Reading a checkpoint into a network: strict, in small pieces.

The network is built without memory (`with torch.device("meta")`). First the headers of all files are held against its
parameters, so that a wrong file fails before anything is read. Then a few threads read tensor after tensor, each through
one reused buffer: a piece is read from the file, brought to the device, unpacked if it is fp8_scaled, and cast into its
final place. So beside the finished weights there is only a buffer for each thread, and nothing is read twice. A tensor
that a LoRA changes is made in float32 as a whole, merged, and then cast; those are merged one after the other, in order,
so that nothing depends on the number of threads. On a CPU, tensors that need no change stay views of the file
(memory-mapped), which costs no memory at all.
"""

import ctypes
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minicos.errors import MinicosError
from minicos.runs import progress
from minicos.weights.header import BITS, Header, is_archive, read_header, weight_files
from minicos.weights.lora import Lora
from minicos.weights.names import is_weight, renamer

J, R = TypeVar("J"), TypeVar("R")
Source = str | Path | Sequence[str | Path]
Place = Callable[
    [str, torch.Size, torch.dtype], Tensor
]  # name, shape, dtype -> the contiguous tensor to fill
SCALES = (
    ".scale_weight",
    ".weight_scale",
)  # of the FP8_FACTORS, those of matrices; the others concern activations
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
READERS = 3  # threads: one waits for the disk while another casts or copies
PIECE = (
    2**21
)  # bytes of each one's buffer: few new pages to touch, and it stays in the processor's cache
PINNED = 2**26  # the same for a card
LONG = 2**30  # bytes from which a progress bar is shown


@dataclass(frozen=True)
class Loaded:
    """What `load_into` did."""

    files: tuple[str, ...]
    tensors: int
    parameters: int
    merged: int  # parameters that a LoRA changed


@dataclass(frozen=True)
class _File:
    path: Path
    shapes: Mapping[str, tuple[int, ...]]  # in the order of the file
    dtypes: Mapping[str, torch.dtype]
    view: Callable[[str], Tensor]  # key -> the tensor, mapped: no memory of its own
    pieces: Callable[
        [str, Tensor], Iterator[Tensor]
    ]  # key, buffer -> its bytes in order, each piece in that buffer

    def bytes(self, key: str) -> int:
        return prod(self.shapes[key]) * self.dtypes[key].itemsize


@dataclass(frozen=True)
class _Job:
    """One tensor: where it comes from and what becomes of it."""

    file: _File
    key: str
    name: str
    wanted: torch.dtype
    factor: Tensor | None  # of an fp8 matrix
    loras: tuple[Lora, ...]  # those that change it

    @property
    def unchanged(self) -> bool:
        return self.factor is None and not self.loras and self.wanted == self.file.dtypes[self.key]


def load_into(
    module: nn.Module,
    source: Source,
    *,
    rename: Callable[[str], str] | None = None,
    dtype: torch.dtype | Callable[[str], torch.dtype | None] | None = None,
    device: torch.device | str = "cpu",
    lora: Lora | Sequence[Lora] = (),
    unused: tuple[str, ...] = (),
    check_finite: bool = False,
    place: Place | None = None,
    readers: int = READERS,
    label: str = "",
) -> Loaded:
    """Give every parameter and buffer of `module` (usually on the meta device) its tensor from `source`.

    `source` is a file (.safetensors, .pth), a folder of shards, or a list of files. `rename` maps a key to the module's
    name for it; by default the naming is recognised (official, ComfyUI, diffusers, transformers). `dtype` is one dtype,
    a function of the official name, or None to keep what is stored. LoRAs are merged in float32 before the cast.
    `unused`: how the names begin of tensors that the source holds and the module knowingly does without.
    `place` says where finished tensors go, by default to new memory on `device` or to a view of the file. Memory beyond the
    result: `readers` buffers of 2 MiB (of 64 for a card) and, with a LoRA, readers + 2 matrices in float32. A `label` asks
    for a progress bar, from 1 GiB on. The module ends in eval mode, without gradients.

    Raises MinicosError where a key is missing, unknown, twice there or of another shape, where a file is damaged or a
    LoRA does not fit, and, with `check_finite`, where a tensor holds NaN or infinity. The module is then unusable.
    """
    files = [_open(path) for path in _paths(source)]
    rename = rename or renamer(key for file in files for key in file.shapes)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    loras = (lora,) if isinstance(lora, Lora) else tuple(lora)
    for one in loras:
        one.check(expected)
    plans = [_plan(file, rename, unused) for file in files]
    _check(module, expected, files, plans)

    device = torch.device(device)
    views_do = device.type == "cpu" and place is None
    new = place or (lambda name, shape, dtype: _new(shape, dtype, device))
    buffers = _buffers(readers, device)

    def read(job: _Job) -> Tensor:
        """In a thread: the finished tensor, or the float32 one that LoRAs change."""
        if job.unchanged and views_do:
            return job.file.view(job.key)
        shape = torch.Size(job.file.shapes[job.key])
        target = (
            _new(shape, torch.float32, device) if job.loras else new(job.name, shape, job.wanted)
        )
        buffer = buffers.get()
        try:
            _fill(target, job, buffer)
        finally:
            buffers.put(buffer)
        return target

    jobs = list(_jobs(files, plans, rename, dtype, loras))
    mapped = views_do and all(
        job.unchanged for job in jobs
    )  # threads would only take turns at the interpreter
    results = ((job, read(job)) for job in jobs) if mapped else _in_order(read, jobs, readers)
    size = sum(file.bytes(key) for file, plan in zip(files, plans, strict=True) for key in plan)
    with closing(results) as done:
        for job, tensor in progress(done, len(expected), label) if label and size >= LONG else done:
            for one in job.loras:
                tensor = one.merge(job.name, tensor)
            if job.loras:
                tensor = new(job.name, tensor.shape, job.wanted).copy_(tensor)
            if check_finite and not _finite(tensor):
                raise MinicosError(
                    f"{job.file.path}: {job.key} holds NaN or infinity. Download it again or use a wider dtype."
                )
            _assign(module, job.name, tensor)
    module.requires_grad_(False).eval()
    return Loaded(
        files=tuple(str(file.path) for file in files),
        tensors=len(expected),
        parameters=sum(torch.Size(shape).numel() for shape in expected.values()),
        merged=len({name for one in loras for name in one.deltas}),
    )


def stored(source: Source) -> dict[torch.dtype, int]:
    """Bytes of each dtype in the files of `source`, from their headers."""
    found: dict[torch.dtype, int] = {}
    for file in map(_open, _paths(source)):
        for key, dtype in file.dtypes.items():
            found[dtype] = found.get(dtype, 0) + file.bytes(key)
    return found


def _jobs(files, plans, rename, dtype, loras) -> Iterator[_Job]:
    for file, plan in zip(files, plans, strict=True):
        factors = dict(_scales(file, rename, plan))
        for key, name in plan.items():
            default = torch.float32 if name in factors else file.dtypes[key]
            wanted = (dtype(name) if callable(dtype) else dtype) or default
            changes = tuple(one for one in loras if name in one.deltas)
            yield _Job(file, key, name, wanted, factors.get(name), changes)


def _in_order(work: Callable[[J], R], jobs: Iterable[J], threads: int) -> Iterator[tuple[J, R]]:
    """(job, work(job)) in the order of the jobs. The threads are at most one job further than there are of them."""
    pool = ThreadPoolExecutor(threads, "minicos-reader")
    ahead: deque = deque()
    try:
        for job in jobs:
            ahead.append((job, pool.submit(work, job)))
            if len(ahead) > threads:
                first, future = ahead.popleft()
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()
    finally:  # also after an error or Ctrl-C: no thread outlives the call
        pool.shutdown(cancel_futures=True)


def _new(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory to fill. Linux is asked for large pages: to touch small ones for the first time takes longer than to read a cached file.

    It may refuse, and nothing depends on it.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= PIECE and hasattr(mmap, "MADV_HUGEPAGE"):
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - begin
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


def _buffers(count: int, device: torch.device) -> "SimpleQueue[Tensor]":
    """Pieces of host memory that threads take and give back; pinned for CUDA, so that copies to the card are asynchronous."""
    queue: SimpleQueue[Tensor] = SimpleQueue()
    pin = device.type == "cuda"
    for _ in range(count):
        queue.put(torch.empty(PINNED if pin else PIECE, dtype=torch.uint8, pin_memory=pin))
    return queue


@torch.no_grad()
def _fill(target: Tensor, job: _Job, buffer: Tensor) -> None:
    """Read a tensor into `target` piece by piece, unpacking and casting on target's device."""
    flat, begin = target.view(-1), 0
    factor = None if job.factor is None else job.factor.to(target.device)
    for piece in job.file.pieces(job.key, buffer):
        # All threads share the current (default) stream of the card: one link carries the copies anyhow, and what the
        # allocator hands out on that stream is safe to write on it. The copy overlaps with the other threads' reading.
        part = piece.to(target.device, non_blocking=True).view(job.file.dtypes[job.key])
        part = part if factor is None else part.float() * factor
        flat[begin : begin + len(part)].copy_(part)
        begin += len(part)
        if target.is_cuda:  # the buffer is free again when the card has read it
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(target.device))
            arrived.synchronize()


def _finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. A sum tells it at the speed of memory; elements are looked at only where it fails.

    It has the tensor's own dtype: in another one torch would copy the tensor first.
    """
    if not tensor.is_floating_point():
        return True
    pieces = tensor.reshape(-1).split(2**24)
    pieces = (
        piece.float() if piece.dtype.itemsize == 1 else piece for piece in pieces
    )  # fp8 has no arithmetic
    return all(p.sum().isfinite() or p.isfinite().all() for p in pieces)


def _paths(source: Source) -> list[Path]:
    return (
        weight_files(source) if isinstance(source, str | Path) else [Path(path) for path in source]
    )


def _open(path: Path) -> _File:
    """What a file holds and how to read it; no tensor is read yet."""
    return _archive(path, _unpack(path)) if is_archive(path) else _safetensors(read_header(path))


def _archive(path: Path, tensors: dict[str, Tensor]) -> _File:
    def pieces(key: str, buffer: Tensor) -> Iterator[Tensor]:
        for part in tensors[key].contiguous().view(-1).view(torch.uint8).split(len(buffer)):
            yield buffer[: len(part)].copy_(part)

    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return _File(
        path,
        shapes,
        {key: tensor.dtype for key, tensor in tensors.items()},
        tensors.__getitem__,
        pieces,
    )


def _safetensors(header: Header) -> _File:
    path = header.path
    for key, info in header.tensors.items():
        if info.dtype not in DTYPES:
            raise MinicosError(
                f"{path}: {key} is stored as {info.dtype}, which minicos does not read. Convert it."
            )
    data = header.size - sum(
        info.elements * BITS[info.dtype] // 8 for info in header.tensors.values()
    )
    mapped = cache(lambda: safe_open(path, "pt"))  # one mapping for all views

    def view(key: str) -> Tensor:
        try:
            return mapped().get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise MinicosError(f"{path} cannot be read: {error}. Download it again.") from error

    def pieces(key: str, buffer: Tensor) -> Iterator[Tensor]:
        info = header.tensors[key]
        left = info.elements * BITS[info.dtype] // 8
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(data + info.begin)
                while left:
                    piece = buffer[: min(left, len(buffer))]
                    _read_whole(file, piece)
                    yield piece
                    left -= len(piece)
        except OSError as error:
            raise MinicosError(
                f"{path} cannot be read: {error.strerror or error}. Check the disk."
            ) from error

    shapes = {key: info.shape for key, info in header.tensors.items()}
    return _File(
        path,
        shapes,
        {key: DTYPES[info.dtype] for key, info in header.tensors.items()},
        view,
        pieces,
    )


def _read_whole(file: BinaryIO, target: Tensor) -> None:
    """Fill `target` (uint8) from an unbuffered file, which may hand out less than asked for."""
    view = memoryview(target.numpy())
    while view:
        count = file.readinto(view)
        if not count:
            raise MinicosError(
                f"{file.name} has become shorter while it was read. Download it again."
            )
        view = view[count:]


def _unpack(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch archive, mapped into memory; nothing in it is executed (weights_only)."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises anything from KeyError to UnpicklingError here
        reason = str(error).strip().split("\n")[0]
        raise MinicosError(
            f"{path} cannot be opened as tensors only: {reason}. Download or convert it."
        ) from error
    if isinstance(tensors, dict) and set(tensors) == {"model_state"}:  # DiffSynth's VAE files
        tensors = tensors["model_state"]
    if not isinstance(tensors, dict):
        raise MinicosError(
            f"{path} holds a {type(tensors).__name__}, not a table of tensors. Save its state_dict."
        )
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise MinicosError(
                f"{path}: {key!r} is a {type(tensor).__name__}, not a tensor. Save only the state_dict."
            )
    return tensors


def _plan(file: _File, rename: Callable[[str], str], unused: tuple[str, ...]) -> dict[str, str]:
    """Key -> name in the module, for the keys of a file that are weights."""
    try:
        names = {key: rename(key) for key in file.shapes if is_weight(key)}
    except MinicosError as error:
        raise MinicosError(f"{file.path}: {error}") from error
    return {key: name for key, name in names.items() if not name.startswith(unused)}


def _scales(
    file: _File, rename: Callable[[str], str], plan: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Name -> factor of the fp8 matrices of a file."""
    for key, tensor in ((key, file.view(key)) for key in file.shapes if key.endswith(SCALES)):
        name = rename(key.rpartition(".")[0] + ".weight")
        if name not in plan.values() or tensor.numel() != 1:
            raise MinicosError(
                f"{file.path}: {key} {tuple(tensor.shape)} is no factor of a matrix. Download it again."
            )
        yield name, tensor.float()


def _check(
    module: nn.Module, expected: Mapping[str, tuple], files: Sequence[_File], plans: Sequence[dict]
) -> None:
    """Hold what the files promise against what the module needs."""
    network, seen = type(module).__name__, {}
    for file, plan in zip(files, plans, strict=True):
        for key, name in plan.items():
            if name not in expected:
                raise MinicosError(
                    f"{file.path}: {key} is not part of this {network}. {_advice(file.path)}"
                )
            if name in seen:
                raise MinicosError(
                    f"{file.path}: {key} is {name}, which {seen[name]} holds too. Keep one of them."
                )
            if file.shapes[key] != expected[name]:
                shapes = (
                    f"{list(file.shapes[key])}, and this {network} needs {list(expected[name])}"
                )
                raise MinicosError(f"{file.path}: {key} is {shapes}. {_advice(file.path)}")
            seen[name] = file.path
    missing = [name for name in expected if name not in seen]
    if missing:
        names = ", ".join(missing[:3]) + (
            f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        )
        where = ", ".join(str(file.path) for file in files[:3]) or "no file at all"
        raise MinicosError(
            f"{where}: this {network} needs {names}, which is not there. Is a file incomplete or forgotten?"
        )


def _advice(path: Path | str) -> str:
    return f"`minicos inspect {path}` says which variant it is for."


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor
