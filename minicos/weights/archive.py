"""What a PyTorch file (.pth) holds, read without PyTorch and without executing anything.

Such a file is a zip: raw tensors beside a pickle that says how they are called and shaped. The pickle is run through an
interpreter that knows five words and refuses all others, so that a file holding anything but tensors is an error, and
what comes out is the same `Header` as that of a safetensors file.
"""

import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicos.errors import MinicosError
from minicos.weights.header import BITS, FOREIGN, Header, TensorInfo, is_pointer

MAX_PICKLE = 1 << 24  # bytes; the largest official one, of 784 tensors, has 300 thousand
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}


@dataclass(frozen=True)
class _Storage:
    entry: str
    dtype: str


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], *_: Any) -> TensorInfo:
    return TensorInfo(storage.dtype, tuple(size))


def _parameter(data: TensorInfo, *_: Any) -> TensorInfo:
    return data


WORDS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): name for name in STORAGES},
}


class _Reader(pickle._Unpickler):  # the one in Python: that in C reserves memory as a file asks
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in WORDS:
            raise MinicosError(f"it holds {module}.{name}, and not only tensors")
        return WORDS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, *_ = pid
        if kind != "storage" or name not in STORAGES:
            raise ValueError(f"a storage of the unknown kind {name!r}")
        return _Storage(str(key), STORAGES[name])


def read_archive(path: Path) -> Header:
    """The header of a .pth file. Raises MinicosError where it is missing, damaged, or holds anything but named tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise MinicosError(
            f"{path} cannot be read: {error.strerror or error}. Check the path."
        ) from error
    if is_pointer(head):
        raise MinicosError(f"{path} is {FOREIGN[b'version https://git-lfs']}.")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((e for e in archive.infolist() if e.filename.endswith("/data.pkl")), None)
            if entry is None or entry.file_size > MAX_PICKLE:
                raise ValueError("it has no data.pkl of a sensible size")
            with archive.open(entry) as file:
                content = _Reader(file).load()
        tensors = _table(content)
    except MinicosError as error:
        raise MinicosError(
            f"{path} cannot be opened as tensors only: {error}. Get or save its state_dict."
        ) from error
    except Exception as error:  # zipfile and pickle raise a dozen kinds on damaged files
        raise MinicosError(
            f"{path} is not a whole PyTorch archive ({error}). Download it again."
        ) from error
    if size * 8 < sum(info.elements * BITS[info.dtype] for info in tensors.values()):
        raise MinicosError(
            f"{path} is shorter than its tensors: {size:,} bytes. Download it again."
        )
    return Header(path, size, tensors, {})


def _table(content: Any) -> dict[str, TensorInfo]:
    if isinstance(content, dict) and set(content) == {"model_state"}:  # DiffSynth's VAE files
        content = content["model_state"]
    if not isinstance(content, dict):
        raise MinicosError(f"it holds a {type(content).__name__}, not a table of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, TensorInfo):
            raise MinicosError(f"{key!r} is a {type(value).__name__}, not a tensor")
    return dict(content)
