"""Read a checkpoint into a network: strictly, and one tensor at a time.

The network is built without memory (`with torch.device("meta")`). First the headers of all files
are compared with its parameters, so a wrong file fails before any tensor is read. Then every tensor
is mapped into memory from its file and cast into its final place. Quantised tensors are multiplied
by their factors; tensors that a LoRA changes are computed in float32, merged, and then cast. Peak
memory is thus the finished weights plus a piece of a tensor or, with a LoRA, one float32 matrix. On
a CPU, tensors that need no change remain views of the file and use no memory.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from minicos.errors import MinicosError, warn
from minicos.precision import FLOAT32_PRODUCTS
from minicos.runs import progress
from minicos.weights import gguf
from minicos.weights.archive import table as tensor_table
from minicos.weights.files import about, reading, table
from minicos.weights.header import Header, TensorInfo, read_part, tensors
from minicos.weights.lora import Lora
from minicos.weights.names import FACTOR, RECORD, WEIGHT, renamer, role

Source = str | Path | Sequence[str | Path]
# name, shape, dtype -> the contiguous tensor to fill
Place = Callable[[str, torch.Size, torch.dtype], Tensor]
# name, place (None: new memory, or a view of the file) -> the finished weight
Read = Callable[[str, Place | None], Tensor]
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
NARROW = ("F8_E4M3", "F8_E5M2", "I8")  # dtypes that can have a factor
FORMATS = {  # in ComfyUI's records -> dtype
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8_tensorwise": "I8",
}
# Other keys of these records that change nothing about the numbers, unlike `convrot`.
HARMLESS = ("format", "full_precision_matrix_mult", "orig_dtype", "orig_shape", "per_row")
PIECE = 2**22  # elements of a quantised tensor that are unpacked at a time
PINNED = 2**26  # bytes of each of the two buffers for copies to a card
LONG = 2**30  # bytes above which a progress bar is shown


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    header: Header
    key: str
    read: Callable[[str], Tensor]  # key -> the tensor, mapped, without memory of its own

    @property
    def info(self) -> TensorInfo:
        return self.header.tensors[self.key]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.info.dtype]


def check(
    module: nn.Module,
    source: Source,
    *,
    part: str = "",
    rename: Callable[[str], str] | None = None,
    unused: tuple[str, ...] = (),
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Compare the headers of `source` with what `module` needs, as `load_into` does first.

    Returns:
        The stored tensors, and the factors of quantised ones, by their names in the module.

    Raises:
        MinicosError: a key is missing, unknown, duplicated, of another shape, or stored in an
            unsupported format.
    """
    headers = read_part(source, part)
    stored, factors = _plan(headers, rename, unused)
    _check(module, dict(module.state_dict()), stored, factors, headers)
    return stored, factors


def load_into(
    module: nn.Module,
    source: Source,
    *,
    part: str = "",
    rename: Callable[[str], str] | None = None,
    dtype: torch.dtype | Callable[[str], torch.dtype | None] | None = None,
    device: torch.device | str = "cpu",
    lora: Lora | Sequence[Lora] = (),
    unused: tuple[str, ...] = (),
    check_finite: bool = False,
    place: Place | None = None,
    label: str = "",
) -> Read:
    """Fill every parameter and buffer of `module` (usually on the meta device) from `source`. The
    module ends in eval mode, without gradients.

    Args:
        source: a file (.safetensors, .pth), a folder of shards, an index of shards, or a list of
            files.
        part: the network to read from a file with several: "high", "low", "vae", "text", "clip".
        rename: key -> the module's name for it; default: the naming is recognised (official,
            ComfyUI, diffusers, transformers).
        dtype: one dtype, a function of the official name, or None to keep the stored dtypes.
        lora: merged in float32 before the cast.
        unused: prefixes of tensors in the source that the module does not need.
        place: the destination of finished tensors; default: new memory on `device`, or a view of
            the file.
        label: label of a progress bar, shown from 1 GiB upwards.
        check_finite: refuse NaN and infinity.

    Returns:
        What makes a weight again from its file, the same bits each time.

    Raises:
        MinicosError: a key is missing, unknown, duplicated or of another shape; a file is damaged
            or in an unsupported format; a LoRA does not fit; or a value is not finite. The module
            is then unusable.
    """
    loras = (lora,) if isinstance(lora, Lora) else tuple(lora)
    expected = dict(module.state_dict())
    for each in loras:
        each.check({name: tuple(tensor.shape) for name, tensor in expected.items()})
    stored, factors = check(module, source, part=part, rename=rename, unused=unused)

    device = torch.device(device)
    bring = PinnedCopies(device) if device.type == "cuda" else None

    def read(name: str, place: Place | None) -> Tensor:
        one, factor, shape = stored[name], factors.get(name), torch.Size(stored[name].info.shape)
        changes = [each for each in loras if name in each.deltas]
        default = torch.float32 if factor else one.dtype
        wanted = (dtype(name) if callable(dtype) else dtype) or default
        as_stored = not factor and not changes and wanted == one.dtype
        if place is None and device.type == "cpu" and as_stored:
            return one.read(one.key)
        new = place or (lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        # a thread reads between passes too, so changes are float32 whatever the caller has set
        tensor = (
            torch.empty(shape, dtype=torch.float32, device=device)
            if changes
            else new(name, shape, wanted)
        )
        tensor = _fill(tensor, one, factor, bring)
        for each in changes:
            with FLOAT32_PRODUCTS:
                tensor = each.merge(name, tensor)
        return new(name, shape, wanted).copy_(tensor) if changes else tensor

    total = sum(one.info.bytes for one in stored.values())
    names = progress(stored, len(stored), label) if label and total >= LONG else stored
    hollow: list[Stored] = []
    for name in names:
        tensor = read(name, place)
        if check_finite and not _finite(tensor):
            one = stored[name]
            given = [one.header.path, *(each.path for each in loras if name in each.deltas)]
            cast = f" as {str(tensor.dtype).removeprefix('torch.')}"
            raise MinicosError(
                f"{' with '.join(map(str, given))}: {one.key} holds NaN or infinity"
                f"{'' if tensor.dtype == one.dtype else cast}. "
                "Download the file again or use a wider dtype."
            )
        if check_finite and name.endswith("weight") and tensor.ndim > 1 and _hollow(tensor):
            hollow.append(stored[name])
        _assign(module, name, tensor)
    if hollow:
        warn(
            f"{hollow[0].header.path}: {hollow[0].key} holds zeros alone, and is one of "
            f"{len(hollow)} such tensors. Unless the model is untrained, a download was "
            "interrupted: compare its checksum, or download it again"
        )
    module.requires_grad_(False).eval()
    return read


def stored_bytes(source: Source, part: str = "") -> Counter[torch.dtype]:
    """Bytes of each dtype in the files of `source`, from their headers."""
    found: Counter[torch.dtype] = Counter()
    for info in tensors(read_part(source, part)).values():
        if info.dtype in DTYPES:
            found[DTYPES[info.dtype]] += info.bytes
    return found


def open_tensors(header: Header) -> Callable[[str], Tensor]:
    """The function that maps a tensor of a file into memory, by its key. Nothing in the file is
    executed.
    """
    path = header.path
    if header.gguf:
        return gguf.opened(header)
    if header.archive:
        with reading(path, "cannot be opened as tensors only", "Download or convert it."):
            if path.suffix == ".safetensors":  # torch looks at the suffix of a path
                with path.open("rb") as file:
                    content = torch.load(file, map_location="cpu", weights_only=True)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found = tensor_table(path, content, Tensor)
    else:
        with reading(path):
            opened = safe_open(path, "pt")

    def read(key: str) -> Tensor:
        with reading(path):
            if path.stat().st_size != header.size:  # reading beyond the end would crash
                raise MinicosError(
                    f"{path} has become shorter or longer while it was read. Download it again."
                )
            name = header.section + key
            return found[name] if header.archive else opened.get_tensor(name)

    return read


class PinnedCopies:
    """Copies pieces of host memory to a card through two pinned buffers: one is filled while the
    other is copied. A call waits until the buffer's last piece has left, so where computation
    should go on meanwhile, a thread makes it (`stream.CudaCopyQueue`).
    """

    def __init__(self, device: torch.device):
        self.device, self._turn = device, 0
        self._buffers = [_pinned(PINNED) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]

    def __call__(self, piece: Tensor) -> Tensor:
        """The piece on the card; it must not be larger than a buffer."""
        self._turn = turn = 1 - self._turn
        self._copied[turn].synchronize()
        buffer = self._buffers[turn][: piece.nbytes]
        buffer.copy_(piece.reshape(-1).view(torch.uint8))
        there = buffer.to(self.device, non_blocking=True).view(piece.dtype).view(piece.shape)
        self._copied[turn].record(torch.cuda.current_stream(self.device))
        return there


def _pinned(size: int) -> Tensor:
    """`size` bytes of pinned memory, or ordinary memory and a warning if the system refuses."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warn(f"host memory cannot be pinned ({reason}), so loading takes longer")
        return torch.empty(size, dtype=torch.uint8)


@torch.no_grad()
def _fill(target: Tensor, one: Stored, factor: Stored | None, bring: PinnedCopies | None) -> Tensor:
    """`target`, filled with a tensor of a file, unpacked and cast on the target's device."""
    source = one.read(one.key)
    if factor is None and bring is None:
        return target.copy_(source)
    shape = (len(source), -1) if factor and source.ndim else (-1, 1)
    rows, into = source.reshape(shape), target.view(shape)
    scale = None
    if factor is not None:  # one number for all rows, or one for each
        scale = factor.read(factor.key).float().reshape(-1, 1).expand(len(rows), 1)
        if rows[scale[:, 0] == 0].float().any():  # a row of zeros may have any factor
            raise MinicosError(
                f"{factor.header.path}: {factor.key} holds 0, which makes nothing of numbers in "
                f"{one.key}. Download the file again."
            )
        scale = scale.to(target.device)
    width = max(1, rows.shape[1])
    step = max(1, PIECE // width if bring is None else PINNED // (width * source.itemsize))
    for begin in range(0, len(rows), step):
        here = slice(begin, begin + step)
        piece = rows[here] if bring is None else bring(rows[here])
        if scale is not None:
            piece = piece.float() * scale[here]
        into[here].copy_(piece)
    return target


def _finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. A sum shows this at the speed of memory; elements
    are checked only if the sum is not finite.

    The sum has the tensor's own dtype, since torch would copy the tensor for another one.
    """
    if not tensor.is_floating_point():
        return True
    pieces = tensor.reshape(-1).split(2**24)
    wide = (p.float() if p.itemsize == 1 else p for p in pieces)  # fp8 has no arithmetic
    return all(bool(p.sum().isfinite() or p.isfinite().all()) for p in wide)


def _hollow(tensor: Tensor) -> bool:
    """Whether there are only zeros. The first number nearly always shows that there are others."""
    return not tensor.flatten()[:1].float().any() and not tensor.float().any()


def _plan(
    headers: Sequence[Header], rename: Callable[[str], str] | None, unused: tuple[str, ...]
) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Name in the module -> its tensor, and -> its factor."""
    rename = rename or renamer(tensors(headers))
    found: dict[str, dict[str, Stored]] = {WEIGHT: {}, FACTOR: {}}
    for header in headers:
        read = open_tensors(header)
        with reading(header.path, "has a damaged record _quantization_metadata"):
            records = table(header.metadata.get("_quantization_metadata", "{}")).get("layers", {})
            for layer, given in records.items():
                _check_format(header, f"{layer}.comfy_quant", dict(given))
        for key in header.tensors:
            one = Stored(header, key, read)
            with about(header.path):
                kind, plain = role(key)
                name = rename(plain) if kind in found else ""
            if kind == RECORD:
                _check_record(one)
            if not name or name.startswith(unused):
                continue
            if name in found[kind]:
                other = found[kind][name].header.path
                raise MinicosError(
                    f"{header.path}: {key} is {name}, which {other} holds too. Keep one of them."
                )
            found[kind][name] = one
    return found[WEIGHT], found[FACTOR]


def _check(
    module: nn.Module,
    expected: Mapping[str, Tensor],
    stored: Mapping[str, Stored],
    factors: Mapping[str, Stored],
    headers: Sequence[Header],
) -> None:
    """Compare the content of the files with what the module needs."""
    network = type(module).__name__
    for name, one in stored.items():
        path, shape, needed = one.header.path, one.info.shape, expected.get(name)
        if needed is None or shape != tuple(needed.shape):
            what = (
                f"is not part of this {network}"
                if needed is None
                else f"is {list(shape)}, and this {network} needs {list(needed.shape)}"
            )
            raise MinicosError(
                f"{path}: {one.key} {what}. `minicos inspect {path}` says which variant it is for."
            )
        if one.info.dtype not in DTYPES:
            raise MinicosError(
                f"{path}: {one.key} is stored as {one.info.dtype}, which minicos does not read. "
                "Get the model in bf16, fp16 or fp8."
            )
        _check_numbers(one, factors.get(name), needed.is_floating_point(), bool(factors))
    for name, factor in factors.items():
        if name not in stored:
            raise MinicosError(
                f"{factor.header.path}: {factor.key} is a factor of {name}, which is not there. "
                "Get the whole model."
            )
    missing = [name for name in expected if name not in stored]
    if missing:
        names = ", ".join(missing[:3])
        names += f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        where = ", ".join(str(header.path) for header in headers[:3]) or "no file at all"
        raise MinicosError(
            f"{where}: this {network} needs {names}, which is not there. Is a file incomplete or "
            "forgotten?"
        )


def _check_numbers(one: Stored, factor: Stored | None, floating: bool, others: bool) -> None:
    """Check that the stored numbers are weights, alone or with their factor."""
    where, kind = f"{one.header.path}: {one.key}", one.info.dtype
    if factor is None:
        if floating and not DTYPES[kind].is_floating_point:
            raise MinicosError(
                f"{where} holds integers ({kind}) and no factor (weight_scale) that makes weights "
                "of them. "
                "Get the model in bf16, fp16 or fp8."
            )
        if kind in NARROW and others and len(one.info.shape) == 2:
            raise MinicosError(
                f"{where} is {kind} without a factor, and other matrices have one (weight_scale). "
                "Get the whole model."
            )
        return
    rows = one.info.shape[0] if one.info.shape else 1
    plain = ("F16", "BF16", "F32", "F64")
    if kind not in (*NARROW, *plain) or factor.info.dtype not in plain:
        raise MinicosError(
            f"{where} is {kind} with factors in {factor.info.dtype}, a way of storing that minicos "
            "does not read. Get the model in bf16, fp16 or fp8."
        )
    if factor.info.elements != 1 and {factor.info.elements, factor.info.shape[0]} != {rows}:
        raise MinicosError(
            f"{where} has factors of shape {list(factor.info.shape)}: minicos reads one for a "
            f"matrix or one for each of its {rows} rows, not one for a block. Get the model in "
            "bf16, fp16 or plain fp8."
        )


def _check_record(one: Stored) -> None:
    """Check ComfyUI's record of how a quantised matrix is stored: JSON in a tensor of bytes."""
    if one.info.dtype != "U8" or one.info.elements > 10_000:
        raise MinicosError(
            f"{one.header.path}: {one.key} is not a record in JSON. Download it again."
        )
    with reading(one.header.path, f"has a damaged record {one.key}"):
        given = dict(json.loads(bytes(one.read(one.key).reshape(-1).tolist())))
    _check_format(one.header, one.key, given)


def _check_format(header: Header, key: str, given: Mapping[str, Any]) -> None:
    """Check a record, which may also be in the file's metadata (`recorded`)."""
    dtype = FORMATS.get(str(given.get("format")))
    weight = header.tensors.get(key.replace(".comfy_quant", ".weight"))  # or elsewhere
    more = sorted(key for key in given if given[key] and key not in HARMLESS)
    if dtype is None or more or (weight and weight.dtype != dtype):
        raise MinicosError(
            f"{header.path}: {key} says {', '.join([str(given.get('format')), *more])} of a "
            f"matrix in {weight.dtype if weight else 'another file'}, a way of storing that "
            "minicos does not read. Get the model in bf16, fp16 or fp8."
        )


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Assign a tensor to a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor
