"""The headers of weight files, read in milliseconds and without torch: names, dtypes, shapes and
metadata.

safetensors files are read and validated by their library, PyTorch files by `archive`, GGUF files by
`gguf`. The first bytes of a file decide which it is, not its name. Also here: the files of one
network, which may be shards listed in an index.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import safe_open

from minicos.errors import MinicosError
from minicos.weights.files import TABLE, about, read_table, reading, regular
from minicos.weights.names import section

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
ARCHIVES = ("pth", "pt", "bin", "ckpt")  # suffixes of PyTorch files, to find them in a folder
USUAL = ("diffusion_pytorch_model", "model")  # names that official and diffusers folders use
MAC = "._"  # begins the names of what macOS notes beside each file on a foreign disk
ZIP = b"PK\x03\x04"
GGUF = b"GGUF"
FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself. Run `git lfs pull` where "
    "it came from",
    b"<": "a web page, not weights. Download the file itself",
    b"\x80": "a bare pickle, as of torch.save before 1.6, which minicos does not open. If it is "
    "yours, save its state_dict with safetensors or today's torch.save",
    b"7z\xbc\xaf": "a 7z archive, not weights. Unpack it",
    b"\x1f\x8b": "a gzip archive, not weights. Unpack it",
}
# Far beyond any published file. Headers are kept in memory, so there must be a limit.
MAX_TENSORS, MAX_AXES, MAX_NAME = 100_000, 16, 1000


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # in the spelling of safetensors: "F32", "BF16", ...
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * BITS.get(self.dtype, 8) // 8


@dataclass(frozen=True)
class Header:
    """The header of one file. `section` is the prefix that was removed from its keys (`select`)."""

    path: Path
    size: int  # bytes of the file
    tensors: dict[str, TensorInfo]  # in the order of the file
    metadata: dict[str, str]
    archive: bool = False  # whether it is a PyTorch file
    gguf: bool = False
    section: str = ""


def read_header(path: str | Path) -> Header:
    """The header of a weight file. Raises MinicosError with what is wrong with it, or with what it
    is instead.
    """
    from minicos.weights import archive, gguf  # which make a Header, too

    path = regular(path)
    if os.path.exists(f"{path}.aria2"):  # the file has its full size from the start
        raise MinicosError(
            f"{path} is not complete: its download left {path.name}.aria2. Finish it with aria2c, "
            "or delete that file if it is finished."
        )
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(24)
    if head.startswith(ZIP):
        return check_header(archive.read_archive(path, size))
    if head.startswith(GGUF):
        return check_header(gguf.read_gguf(path, size))
    if head[8:9] != b"{":
        kinds = (kind for magic, kind in FOREIGN.items() if head.startswith(magic))
        raise MinicosError(f"{path} is {next(kinds, 'not a file of weights. Download it again')}.")
    if (length := int.from_bytes(head[:8], "little")) > TABLE and length <= size:
        raise MinicosError(
            f"{path} has a header of {length:,} bytes, far beyond that of any network. Download it "
            "again."
        )
    wrong = f"is not a whole safetensors file ({size:,} bytes)"
    with reading(path, wrong), safe_open(path, "np") as opened:
        keys = getattr(opened, "offset_keys", opened.keys)()  # newer than safetensors 0.5
        if len(keys) > MAX_TENSORS:
            raise ValueError(f"it lists {len(keys):,} tensors")
        infos = {
            key: TensorInfo(found.get_dtype(), tuple(found.get_shape()))
            for key, found in ((key, opened.get_slice(key)) for key in keys)
        }
        return check_header(Header(path, size, infos, dict(opened.metadata() or {})))


def check_header(header: Header) -> Header:
    """The header, if its names and shapes have a sensible length. Raises MinicosError otherwise."""
    for key, info in header.tensors.items():
        if len(info.shape) > MAX_AXES or len(key) > MAX_NAME:
            raise MinicosError(
                f"{header.path}: {key[:80]} has {len(info.shape)} axes and a name of {len(key)} "
                "letters. "
                "This is not a network's tensor: download the file again."
            )
    return header


def read_headers(path: str | Path) -> tuple[Header, ...]:
    """The headers of one network's files, compared with the index of its shards if there is one.

    Raises:
        MinicosError: as for `weight_files` and `read_header`; or a tensor is in two shards, or the
            index and the shards disagree.
    """
    shards = weight_files(Path(path))
    headers = tuple(read_header(file) for file in shards)
    seen: dict[str, Path] = {}
    for header, promised in zip(headers, shards.values(), strict=True):
        for key in header.tensors:
            if key in seen:
                raise MinicosError(
                    f"{header.path}: {key} is in another shard too. Download the shards again."
                )
            seen[key] = header.path
        wrong = sorted(promised ^ set(header.tensors)) if promised is not None else []
        if wrong:
            where = "the index" if promised and wrong[0] in promised else "the file"
            raise MinicosError(
                f"{header.path} and its index disagree: only {where} has {wrong[0]}. Download both "
                "again."
            )
    return headers


def tensors(headers: Iterable[Header]) -> dict[str, TensorInfo]:
    """All tensors of a network's files."""
    return {key: info for header in headers for key, info in header.tensors.items()}


def select(headers: Iterable[Header], section: str) -> tuple[Header, ...]:
    """The headers with only the keys that begin with `section`, without that prefix."""
    return tuple(
        replace(
            header,
            tensors={
                key.removeprefix(section): info
                for key, info in header.tensors.items()
                if key.startswith(section)
            },
            section=header.section + section,
        )
        for header in headers
    )


def read_part(source: str | Path | Sequence[str | Path], part: str) -> tuple[Header, ...]:
    """The headers of one network in a file, a folder, or a list of files with several networks."""
    paths = source if not isinstance(source, str | Path) else ()
    headers = tuple(map(read_header, paths)) if paths else read_headers(Path(str(source)))
    found = tensors(headers)
    with about(headers[0].path):
        start = section(found, part)
    return select(headers, start) if start else headers


def weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The files of one network, each with the keys that an index lists for it: the file itself, or
    a folder's shards (by its index) or its only weight file.

    Raises:
        MinicosError: there is no candidate or more than one, a shard is missing, or an index names
            a file outside its folder.
    """
    with reading(path):
        folder = path.is_dir()
        if not folder and not path.exists() and not path.is_symlink():
            raise MinicosError(f"{path} does not exist. Check the path.")
    if not folder:
        return _indexed(path) if path.suffix == ".json" else {regular(path): None}
    found = _candidates(path)
    if not found:
        cache = "It is of the Hub's cache: give the id, owner/name."
        remedy = cache if (path / "snapshots").is_dir() else "Check the path."
        raise MinicosError(f"{path} holds no weights (*.safetensors, *.pth). {remedy}")
    if len(found) > 1 and all(map(is_shard, found)):  # without an index
        return dict.fromkeys(found)
    if len(found) > 1:
        names = ", ".join(p.name for p in found[:4]) + (" ..." if len(found) > 4 else "")
        raise MinicosError(
            f"{path} holds several files of weights: {names}. Name the one you mean."
        )
    return weight_files(found[0])


def _candidates(folder: Path) -> list[Path]:
    """The files of a folder that can be its network: plain ones before variants such as fp16,
    PyTorch files last.
    """
    index, variant, weights = (
        "*.safetensors.index.json",
        "*.safetensors.index.*.json",
        "*.safetensors",
    )
    archives = [f"*.{ending}" for ending in ARCHIVES]
    with reading(folder):
        os.listdir(folder)  # raises where glob finds nothing: without permission
        for pattern in (index, weights):
            plain = [path for path in folder.glob(pattern) if _plain(path.name)]
            if len(plain) == 1:
                return plain
        for patterns in ([index], [variant], [weights], ["*.bin.index.json"], archives):
            found = sorted(
                path
                for pattern in patterns
                for path in folder.glob(pattern)
                if not path.name.startswith(MAC)
            )
            plain = [path for path in found if _plain(path.name)]
            if found:
                return plain if len(plain) == 1 else found
    return []


def _plain(name: str) -> bool:
    """Whether this is the usual name of a network's file or index, without a variant."""
    stem, _, ending = name.partition(".")
    return stem in USUAL and (ending.removesuffix(".index.json") in ("safetensors", *ARCHIVES))


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """The shards that an index names, and the keys of each."""
    given = read_table(index).get("weight_map")
    if not isinstance(given, dict) or not given:
        raise MinicosError(f"{index} is not an index of shards (no weight_map). Name the weights.")
    shards: dict[str, set[str]] = {}
    for key, name in given.items():
        if not isinstance(name, str) or not name or len(name) > 255:
            raise MinicosError(f"{index} names no file for {key}. Download it again.")
        shards.setdefault(name, set()).add(key)
    return {_shard(index, name): shards[name] for name in sorted(shards)}


def _shard(index: Path, name: str) -> Path:
    """The file that an index names, if it exists and is inside the index's folder.

    Links may point inside the folder and, since the Hugging Face cache consists of them, into that
    cache's `blobs`.
    """
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive
    if absolute or name[:1] in "/\\" or ".." in parts or "\0" in name:
        raise MinicosError(
            f"{index} names {name!r}, outside its folder. Do not use this checkpoint."
        )
    file = index.parent / name
    with reading(file, "cannot be found"):
        home = index.parent.resolve()
        snapshots = next((p for p in home.parents if p.name == "snapshots"), None)
        allowed = [home, *([snapshots.parent / "blobs"] if snapshots else [])]
        if not any(file.resolve().is_relative_to(folder) for folder in allowed):
            raise MinicosError(
                f"{file} is a link that leaves its folder. Replace it by the file itself."
            )
        if not file.exists():
            raise MinicosError(f"{file} is missing, and {index.name} needs it. Download it.")
    return regular(file)


def is_shard(path: Path) -> bool:
    """Whether the name belongs to one of several shards."""
    return re.search(r"-\d{5}-of-\d{5}", path.name) is not None
