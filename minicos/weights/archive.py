"""The header of a PyTorch file (.pth, .pt), read without PyTorch and without executing anything.

Such a file is a zip with raw tensors and a pickle of their names and shapes. The pickle is run by
an interpreter that knows the words of `WORDS` and refuses all others; tables may have strings and
numbers as keys, nothing else. A file that holds anything except tensors and plain values is
therefore an error, and `torch.load(weights_only=True)` is called only for files that pass this
check. The result is a `Header`, as for a safetensors file.
"""

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from minicos.errors import MinicosError
from minicos.weights.files import about, reading
from minicos.weights.header import BITS, Header, TensorInfo

T = TypeVar("T")
# Bytes, also of the list of entries: read one instruction or entry at a time, within seconds. The
# largest official pickle has 300,000.
MAX_PICKLE = 1 << 22
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
    "UntypedStorage": "U8",
}
NEWER = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
# Tables in which programs store the tensors of a network. If there are several, the first in this
# order is used: averaged weights come first.
WRAPPERS = (
    *("generator_ema", "ema_model", "ema", "params_ema", "state_dict_ema"),
    *("generator", "model_state", "state_dict", "model_state_dict", "model", "module", "params"),
    *("network", "net", "weights", "lora", "lora_state_dict", "dit", "transformer", "vae"),
)


@dataclass(frozen=True)
class _Storage:
    entry: str
    dtype: str
    elements: int


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorInfo:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > 32:
        raise ValueError("a tensor without storage, or of an impossible shape")
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError(f"a tensor of the impossible shape {str(size)[:60]}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if prod(size) and last >= storage.elements:
        raise ValueError(f"a tensor of shape {size} in a storage of {storage.elements} numbers")
    return TensorInfo(storage.dtype, tuple(size))


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorInfo:
    """A tensor of a dtype without its own storage class, such as fp8, with one byte per element."""
    _, _, dtype, *_ = rest
    if dtype not in NEWER.values():
        raise ValueError(f"a tensor of the unknown dtype {str(dtype)[:60]!r}")
    return replace(_tensor(storage, offset, size, stride), dtype=dtype)


def _empty(*given: Any) -> dict:
    if given:
        raise ValueError("an OrderedDict made from a list")
    return {}


WORDS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _empty,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): tuple,
    **{("torch", name): name for name in STORAGES},
    ("torch.storage", "UntypedStorage"): "UntypedStorage",
    **{("torch", name): dtype for name, dtype in NEWER.items()},
}
# Anything that hashes, joins or builds something other than tables, lists and tuples of plain
# values is refused.
FORBIDDEN = {
    code[0]
    for code in (
        *(pickle.FROZENSET, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.NEXT_BUFFER, pickle.OBJ),
        *(pickle.READONLY_BUFFER, pickle.INST, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1),
        *(pickle.EXT2, pickle.EXT4, pickle.DICT, pickle.BYTEARRAY8, pickle.PERSID),
    )
}


class _Reader(pickle._Unpickler):
    """The unpickler written in Python; the one in C allocates whatever a file asks for."""

    stack: list[Any]
    pop_mark: Any
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in FORBIDDEN
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in WORDS:
            raise MinicosError(
                f"it holds {module}.{name}, and not only tensors. Save its state_dict alone."
            )
        return WORDS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _, elements = pid
        if kind != "storage" or name not in STORAGES or type(elements) is not int or elements < 0:
            raise ValueError(f"a storage of the unknown kind {str(name)[:60]!r}")
        return _Storage(str(key), STORAGES[name], elements)

    def load_build(self) -> None:
        self.stack.pop()  # the `_metadata` of a state_dict, of no use here
        if type(self.stack[-1]) is not dict:
            raise ValueError("a change of something that is not a table")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _put(self.stack[-1], items)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _put(table: Any, items: list[Any]) -> None:
    """Fill a table. Only strings and numbers are hashed, since hashing nested tuples can take
    forever.
    """
    if type(table) is not dict or not all(type(key) in (str, int) for key in items[::2]):
        raise ValueError("a table with a key that is neither a string nor a number")
    table.update(zip(items[::2], items[1::2], strict=True))


class _InPieces(io.BufferedReader):
    """A file of which nothing large is read at once, such as a list of millions of entries."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_PICKLE:
            raise ValueError(f"a list of its entries has {size:,} bytes")
        return super().read(size)


def read_archive(path: Path, size: int) -> Header:
    """The header of a PyTorch file. Raises MinicosError if it is damaged or holds anything except
    named tensors.
    """
    with (
        reading(path, "is not a whole PyTorch archive"),
        _InPieces(io.FileIO(path)) as pieces,
        zipfile.ZipFile(pieces) as archive,
    ):
        entry = next((e for e in archive.infolist() if e.filename.endswith("/data.pkl")), None)
        if entry is None or entry.file_size > MAX_PICKLE:
            raise MinicosError(
                f"{path} is a zip without PyTorch's data.pkl, or with one of no sensible size. If "
                "weights are packed in it, unpack it."
            )
        with archive.open(entry) as file, about(f"{path} cannot be opened as tensors only"):
            content = _Reader(file).load()
    tensors = table(path, content, TensorInfo)
    if size * 8 < sum(info.elements * BITS[info.dtype] for info in tensors.values()):
        raise MinicosError(
            f"{path} is shorter than its tensors: {size:,} bytes. Download it again."
        )
    return Header(path, size, tensors, {}, archive=True)


def table(path: Path, content: Any, kind: type[T]) -> dict[str, T]:
    """The tensors of an archive's content, which may be wrapped in tables (`WRAPPERS`). Raises
    MinicosError if there are none.

    Args:
        kind: the class of a tensor: TensorInfo here, torch.Tensor when the file is read.
    """
    for _ in range(4):
        if not isinstance(content, Mapping) or not content:
            break
        if any(isinstance(value, kind) for value in content.values()):
            return _only(path, content, kind)
        tables = [name for name, value in content.items() if isinstance(value, Mapping)]
        name = next((name for name in WRAPPERS if name in tables), None)
        if name is None and len(tables) != 1:
            names = ", ".join(f"{name!r}"[:60] for name in list(content)[:5])
            raise MinicosError(
                f"{path} holds no table of tensors but {names}. Save its state_dict alone."
            )
        content = content[tables[0] if name is None else name]
    raise MinicosError(
        f"{path} holds a {type(content).__name__.removesuffix('Info')}, not a table of tensors. "
        "Save its state_dict."
    )


def _only(path: Path, content: Mapping[Any, Any], kind: type[T]) -> dict[str, T]:
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, kind):
            raise MinicosError(
                f"{path}: {str(name)[:80]!r} is a {type(value).__name__}, not a tensor. "
                "Save only the state_dict."
            )
    return dict(content)
