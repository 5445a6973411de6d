"""GGUF files, the quantised layout of llama.cpp and ComfyUI-GGUF, read by the `gguf` package (the
extra `minicos[gguf]`).

Tensors are dequantised one at a time, while a network is filled, and rounded to bfloat16; tensors
stored in float keep their dtype. Names are the official ones. ComfyUI-GGUF stores shapes that the
format cannot express (more than four axes) in the metadata. Only `opened` imports torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicos.errors import MinicosError
from minicos.weights.files import reading
from minicos.weights.header import Header, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # not quantised -> name in safetensors
# Values of a header; the largest published transformer has 10,000. The package takes 20 us each,
# and text encoders of llama.cpp, which are not read, have a vocabulary of a million.
MOST = 100_000
SHAPE = "comfy.gguf.orig_shape."


def read_gguf(path: Path, size: int) -> Header:
    """The header of a GGUF file; quantised tensors are listed as BF16, which they become. Raises
    MinicosError if the package is missing or the file damaged.
    """
    with _reading(path):
        reader = _open(path)
        infos = {
            t.name: TensorInfo(PLAIN.get(t.tensor_type.name, "BF16"), _shape(reader, t))
            for t in reader.tensors
        }
    return Header(path, size, infos, {}, gguf=True)


def opened(header: Header) -> Callable[[str], "Tensor"]:
    """The function that reads a tensor of the file by its key."""
    import torch
    from gguf.quants import dequantize

    path = header.path
    with _reading(path):
        reader = _open(path)
        found = {tensor.name: tensor for tensor in reader.tensors}

    def read(key: str) -> "Tensor":
        with _reading(path):
            one = found[header.section + key]
            shape = _shape(reader, one)
            if one.tensor_type.name in ("F32", "F16"):
                return torch.from_numpy(one.data.copy()).view(shape)
            values = torch.from_numpy(dequantize(one.data, one.tensor_type))
            return values.view(shape).to(torch.bfloat16)

    return read


def _reading(path: Path) -> Any:
    return reading(path, "is a GGUF file that cannot be read")


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MinicosError(
            f"{path} is a GGUF file, which needs the extra: `pip install 'minicos[gguf]'` "
            f"({str(error).splitlines()[0]}). Or get the safetensors version of the model."
        ) from error

    class Bounded(GGUFReader):
        """The package's reader goes on behind the end of a file, and would count to 2**60 there."""

        calls = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            # slices of a memmap take five times as long
            self.data = np.asarray(self.data)  # type: ignore[assignment]
            self.calls, found = self.calls + 1, super()._get(offset, dtype, count, *order, **named)
            if len(found) < count or self.calls > MOST:
                raise ValueError(
                    f"it is cut off, or has more than {MOST:,} values before its tensors, as text "
                    "encoders of llama.cpp, which minicos does not read"
                )
            return found

    return Bounded(path)


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """The shape in torch's order."""
    kept = reader.fields.get(SHAPE + tensor.name)
    sizes = reversed(tensor.shape.tolist()) if kept is None else kept.contents()
    return tuple(int(size) for size in sizes)
