"""Headers of weight files and folders of shards, read with the standard library alone (PyTorch files: see archive.py).

A safetensors file is eight bytes (the length of a header), the header (JSON: name -> dtype, shape, byte range), and the
tensors' bytes. Everything that a checkpoint says about itself therefore stands in its first few kilobytes; here it is
read and checked, so that a truncated, foreign or damaged file is told apart before anything is loaded. Nothing read here
can make the program reserve more memory than the file is long.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from minicos.errors import MinicosError

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
ARCHIVES = ("pth", "pt", "bin")
USUAL = (
    "diffusion_pytorch_model",
    "model",
)  # how official, diffusers and transformers folders call a network's file
MAX_HEADER = 100_000_000  # the limit of the safetensors library
FOREIGN = {
    b"PK\x03\x04": "a zip archive (PyTorch?), not safetensors. Give it the ending .pth if it is one",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself. Run `git lfs pull` where it came from",
    b"GGUF": "a GGUF file. Get the safetensors version",
    b"<": "a web page, not safetensors. Download the file itself",
    b"\x80": "a pickle, not safetensors. Give it the ending .pth if it comes from PyTorch",
}


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # as safetensors spells it: "F32", "BF16", ...
    shape: tuple[int, ...]
    begin: int = 0  # where its bytes start, counted from the end of the header

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What one safetensors file says about itself."""

    path: Path
    size: int  # bytes of the file
    tensors: dict[str, TensorInfo]  # in the order of their bytes
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, checked against the file. Raises MinicosError saying what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(24)
            length = int.from_bytes(head[:8], "little")
            if head[8:9] != b"{" or length > MAX_HEADER:
                what = next(
                    (what for magic, what in FOREIGN.items() if head.startswith(magic)), None
                )
                raise MinicosError(
                    f"{path} is {what or 'not a safetensors file. Download it again'}."
                )
            if 8 + length > size:
                raise MinicosError(
                    f"{path} is cut off inside its header ({size:,} bytes). Download it again."
                )
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise MinicosError(
            f"{path} cannot be read: {error.strerror or error}. Check the path."
        ) from error
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("it is not a table")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are not strings")
        tensors, end = _tensors(entries)
    except (ValueError, RecursionError) as error:
        raise MinicosError(
            f"{path} has a damaged safetensors header: {error}. Download it again."
        ) from error
    if 8 + length + end != size:
        what = "cut off" if 8 + length + end > size else "longer than its header says"
        raise MinicosError(
            f"{path} is {what}: {size:,} bytes instead of {8 + length + end:,}. Download it again."
        )
    return Header(path, size, tensors, metadata)


def weight_files(path: str | Path) -> list[Path]:
    """The files of one network: the file itself, or a folder's shards (by its index) or its only weights file.

    Raises MinicosError where nothing or more than one candidate is there, a shard is missing, or an index names a file
    outside its folder.
    """
    return list(_shards(Path(path)))


def read_headers(path: str | Path) -> tuple[Header, ...]:
    """The headers of one network's files, held against the index of its shards, if there is one.

    Raises MinicosError as `weight_files` and `read_header` do, where a tensor stands in two shards, and where the index
    and the shards disagree.
    """
    from minicos.weights.archive import read_archive  # which reads its Header from here

    shards = _shards(Path(path))
    headers = tuple(
        read_archive(file) if is_archive(file) else read_header(file) for file in shards
    )
    seen: dict[str, Path] = {}
    for header, promised in zip(headers, shards.values(), strict=True):
        for key in header.tensors:
            if key in seen:
                raise MinicosError(
                    f"{header.path}: {key} stands in another shard too. Download the shards again."
                )
            seen[key] = header.path
        wrong = sorted(promised ^ set(header.tensors)) if promised is not None else []
        if wrong:
            where = "the index" if wrong[0] in promised else "the file"
            raise MinicosError(
                f"{header.path} and its index disagree: only {where} has {wrong[0]}. Download both again."
            )
    return headers


def tensors(headers: Iterable[Header]) -> dict[str, TensorInfo]:
    """All tensors of a network's files."""
    return {key: info for header in headers for key, info in header.tensors.items()}


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """The files of `weight_files`, with the keys that an index promises in each."""
    if path.is_file():
        return {path: None}
    if not path.is_dir():
        raise MinicosError(f"{path} does not exist. Check the path.")
    for endings in (("safetensors.index.json",), ("safetensors",), ARCHIVES):
        found = sorted(p for ending in endings for p in path.glob(f"*.{ending}"))
        usual = [
            p
            for p in found
            if p.name.split(".")[0] in USUAL and p.name.count(".") == endings[0].count(".") + 1
        ]
        found = usual if len(usual) == 1 else found
        if found:
            break
    if not found:
        raise MinicosError(f"{path} holds no weights (*.safetensors, *.pth). Check the path.")
    if len(found) > 1:
        names = ", ".join(p.name for p in found[:4]) + (" ..." if len(found) > 4 else "")
        raise MinicosError(
            f"{path} holds several files of weights: {names}. Name the one you mean."
        )
    return _indexed(found[0]) if found[0].suffix == ".json" else {found[0]: None}


def is_archive(path: Path) -> bool:
    """Is this one of PyTorch's own files, by its name?"""
    return path.suffix[1:] in ARCHIVES


def is_pointer(head: bytes) -> bool:
    """Do these first bytes belong to a Git LFS pointer?"""
    return head.startswith(b"version https://git-lfs")


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """The shards that an index names, and the keys of each."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MinicosError(
            f"{index} is not an index of shards: {error!r}. Download it again."
        ) from error
    if not names or not all(isinstance(name, str) for name in names):
        raise MinicosError(f"{index} names no files. Download it again.")
    return {
        _shard(index, name): {key for key, file in weight_map.items() if file == name}
        for name in names
    }


def _shard(index: Path, name: str) -> Path:
    """The file that an index names, where it is there and lies inside the index's folder.

    Links are followed within the folder and, since the Hugging Face cache is made of them, into that cache's `blobs`.
    """
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if (
        PurePosixPath(name).is_absolute()
        or PureWindowsPath(name).drive
        or name[:1] in "/\\"
        or ".." in parts
        or "\0" in name
    ):
        raise MinicosError(
            f"{index} names {name!r}, outside its folder. Do not use this checkpoint."
        )
    file, home = index.parent / name, index.parent.resolve()
    snapshots = next((p for p in home.parents if p.name == "snapshots"), None)
    allowed = [home, *([snapshots.parent / "blobs"] if snapshots else [])]
    if not any(file.resolve().is_relative_to(folder) for folder in allowed):
        raise MinicosError(
            f"{file} is a link that leaves its folder. Replace it by the file itself."
        )
    if not file.is_file():
        raise MinicosError(f"{file} is missing, and {index.name} needs it. Download it.")
    return file


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _tensors(entries: dict[str, Any]) -> tuple[dict[str, TensorInfo], int]:
    """Checked entries in the order of their bytes, and where those end. Raises ValueError."""
    ranges = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise ValueError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or len(shape) > 32:
            raise ValueError(f"{name!r} has an impossible shape or byte range")
        info = TensorInfo(dtype, tuple(shape), offsets[0])
        if info.elements * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
            raise ValueError(f"{name!r} is {dtype} {shape} and has {offsets[1] - offsets[0]} bytes")
        ranges.append((offsets[0], offsets[1], name, info))
    ranges.sort(key=lambda r: r[:2])
    end = 0
    for begin, stop, name, _ in ranges:
        if begin != end:
            raise ValueError(f"the bytes of {name!r} do not follow those before it")
        end = stop
    return {name: info for _, _, name, info in ranges}, end


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
