"""Reading a checkpoint into a network: strict, one tensor at a time.

The network is built without memory (`with torch.device("meta")`). First the headers of all files are held against its
parameters, so that a wrong file fails before anything is read; then each tensor is read, unpacked if it is fp8_scaled,
changed by the LoRAs in float32, cast, and put in place. Never are there more than the finished weights and one tensor.
Tensors that need no change stay views of the file (memory-mapped), which costs no memory at all on a CPU.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minicos.errors import MinicosError
from minicos.weights.header import is_archive, read_header, weight_files
from minicos.weights.lora import Lora
from minicos.weights.names import NO_WEIGHTS, renamer

Source = str | Path | Sequence[str | Path]
SCALES = (".scale_weight", ".weight_scale")  # one factor per fp8 matrix; the two after them concern fp8 activations
UNUSED = (".scale_input", ".input_scale")


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
    read: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]


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
) -> Loaded:
    """Give every parameter and buffer of `module` (usually on the meta device) its tensor from `source`.

    `source` is a file (.safetensors, .pth), a folder of shards, or a list of files. `rename` maps a key to the module's
    name for it; by default the naming is recognised (official, ComfyUI, diffusers, transformers). `dtype` is one dtype,
    a function of the official name, or None to keep what is stored. LoRAs are merged in float32 before the cast.
    `unused`: how the names begin of tensors that the source holds and the module knowingly does without.
    The module ends in eval mode, without gradients.

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

    for file, plan in zip(files, plans, strict=True):
        scales = dict(_scales(file, rename, plan))
        for key, tensor in file.read(plan):
            name = plan[key]
            wanted = (dtype(name) if callable(dtype) else dtype) or (
                tensor.dtype if name not in scales else torch.float32
            )
            if name in scales:
                tensor = tensor.to(device).float() * scales[name].to(device)
            for one in loras:
                if name in one.deltas:
                    tensor = one.merge(name, tensor.to(device).float())
            tensor = tensor.to(device=device, dtype=wanted)
            if check_finite and tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise MinicosError(f"{file.path}: {key} holds NaN or infinity. Download it again or use a wider dtype.")
            _assign(module, name, tensor)
    module.requires_grad_(False).eval()
    return Loaded(
        files=tuple(str(file.path) for file in files),
        tensors=len(expected),
        parameters=sum(torch.Size(shape).numel() for shape in expected.values()),
        merged=len({name for one in loras for name in one.deltas}),
    )


def _paths(source: Source) -> list[Path]:
    return weight_files(source) if isinstance(source, str | Path) else [Path(path) for path in source]


def _open(path: Path) -> _File:
    """What a file holds and how to read it; no tensor is read yet."""
    if is_archive(path):
        tensors = _unpack(path)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return _File(path, shapes, lambda keys: ((key, tensors[key]) for key in keys))
    header = read_header(path)

    def read(keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        try:
            with safe_open(path, "pt") as file:
                for key in keys:
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise MinicosError(f"{path} cannot be read: {error}. Download it again.") from error

    return _File(path, {k: info.shape for k, info in header.tensors.items()}, read)


def _unpack(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch archive, mapped into memory; nothing in it is executed (weights_only)."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises anything from KeyError to UnpicklingError here
        reason = str(error).strip().split("\n")[0]
        raise MinicosError(f"{path} cannot be opened as tensors only: {reason}. Download or convert it.") from error
    if isinstance(tensors, dict) and set(tensors) == {"model_state"}:  # DiffSynth's VAE files
        tensors = tensors["model_state"]
    if not isinstance(tensors, dict):
        raise MinicosError(f"{path} holds a {type(tensors).__name__}, not a table of tensors. Save its state_dict.")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise MinicosError(f"{path}: {key!r} is a {type(tensor).__name__}, not a tensor. Save only the state_dict.")
    return tensors


def _plan(file: _File, rename: Callable[[str], str], unused: tuple[str, ...]) -> dict[str, str]:
    """Key -> name in the module, for the keys of a file that are weights."""
    aside = (*SCALES, *UNUSED)
    try:
        names = {key: rename(key) for key in file.shapes if key not in NO_WEIGHTS and not key.endswith(aside)}
    except MinicosError as error:
        raise MinicosError(f"{file.path}: {error}") from error
    return {key: name for key, name in names.items() if not name.startswith(unused)}


def _scales(file: _File, rename: Callable[[str], str], plan: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Name -> factor of the fp8 matrices of a file."""
    for key, tensor in file.read([key for key in file.shapes if key.endswith(SCALES)]):
        name = rename(key.rpartition(".")[0] + ".weight")
        if name not in plan.values() or tensor.numel() != 1:
            raise MinicosError(f"{file.path}: {key} {tuple(tensor.shape)} is no factor of a matrix. Download it again.")
        yield name, tensor.float()


def _check(module: nn.Module, expected: Mapping[str, tuple], files: Sequence[_File], plans: Sequence[dict]) -> None:
    """Hold what the files promise against what the module needs."""
    network, seen = type(module).__name__, {}
    for file, plan in zip(files, plans, strict=True):
        for key, name in plan.items():
            if name not in expected:
                raise MinicosError(f"{file.path}: {key} is not part of this {network}. {_advice(file.path)}")
            if name in seen:
                raise MinicosError(f"{file.path}: {key} is {name}, which {seen[name]} holds too. Keep one of them.")
            if file.shapes[key] != expected[name]:
                shapes = f"{list(file.shapes[key])}, and this {network} needs {list(expected[name])}"
                raise MinicosError(f"{file.path}: {key} is {shapes}. {_advice(file.path)}")
            seen[name] = file.path
    missing = [name for name in expected if name not in seen]
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
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
