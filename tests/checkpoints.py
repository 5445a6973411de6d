"""Checkpoints for tests: the names and shapes of the real files, and files of their true size
with nothing in them.
"""

import gzip
import json
import math
import os
import struct
from pathlib import Path

import pytest

from minicos.weights.header import BITS
from tests import golden

MANIFESTS = json.loads(gzip.decompress((golden.FOLDER / "manifests.json.gz").read_bytes()))


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as in the real file. Stored as patterns with a layer slot."""
    rows = MANIFESTS[name]
    return {
        p if i is None else p.replace("{}", str(i), 1): tuple(s)
        for p, s, layers in rows
        for i in layers or [None]
    }


def write_sparse(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype="F32", last: bytes = b""
) -> Path:
    """A safetensors file of true size whose tensors are one hole, but for its `last` bytes; `dtype`
    is a name or a function of key and shape."""
    header, end = {}, 0
    for key, shape in shapes.items():
        kind = dtype(key, shape) if callable(dtype) else dtype
        begin, end = end, end + math.prod(shape) * BITS[kind] // 8
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        file.seek(-len(last), 2)
        file.write(last)
    return path


def write_shards(
    folder: Path, shapes: dict[str, tuple[int, ...]], count: int, last: bytes = b""
) -> Path:
    """A folder of true-size shards with their index, named as diffusers and the official
    repositories name them.
    """
    keys, weight_map = list(shapes), {}
    for i in range(count):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        part = keys[i * len(keys) // count : (i + 1) * len(keys) // count]
        write_sparse(folder / name, {key: shapes[key] for key in part}, last=last)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def fp8_rule(key: str, shape: tuple[int, ...]) -> str:
    """The dtypes of ComfyUI's fp8_scaled files."""
    if key.endswith((".scale_weight", ".scale_input")):
        return "F32"
    return "F8_E4M3" if len(shape) == 2 or key == "scaled_fp8" else "F16"


sparse = pytest.mark.skipif(os.name != "posix", reason="files with holes are a matter of POSIX")
