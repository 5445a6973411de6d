"""GGUF files: dequantised as they are read, refused in a sentence where that cannot be."""

import struct
import sys

import numpy as np
import pytest
import torch

from minicos.errors import MinicosError
from minicos.open import load_dit
from minicos.weights import gguf
from minicos.weights.header import read_header
from minicos.weights.inspect import inspect


@pytest.fixture
def stored(small_dit, tmp_path):
    """A network, and its weights as ComfyUI-GGUF stores them."""
    gguf = pytest.importorskip("gguf")
    network = small_dit(dim=64, ffn_dim=64, text_dim=32, num_heads=1)
    path = tmp_path / "wan-Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in network.state_dict().items():
        values = tensor.numpy()
        if values.ndim > 4:  # which the format cannot express
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(values.shape[0], -1)
        wide = values.ndim == 2 and values.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if wide else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return network, path


def test_weights_are_those_of_the_package(stored, tmp_path):
    gguf = pytest.importorskip("gguf")
    network, path = stored
    (tmp_path / "config.json").write_text('{"num_heads": 1, "text_len": 5}')
    read = load_dit(path).state_dict()
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, ours in network.state_dict().items():
        one = reader[name]
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type)))
        if one.tensor_type.name == "Q8_0":
            expected = expected.to(torch.bfloat16).float()
        assert torch.equal(read[name], expected.view(ours.shape)), name
        assert (read[name] - ours).abs().max() <= 0.01 * ours.abs().max(), name
    assert read["patch_embedding.weight"].ndim == 5


def test_inspect(stored):
    _, path = stored
    told = inspect(path)
    assert told.architecture["dim"] == 64 and told.dtypes.keys() == {"BF16", "F32"}


def test_a_damaged_file(stored):
    _, path = stored
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(MinicosError, match="is a GGUF file that cannot be read"):
        read_header(path)


@pytest.mark.parametrize("inner", [0, 8, 9], ids=["numbers", "texts", "arrays"])
def test_a_file_that_claims_more_than_it_holds(inner, tmp_path):
    """The package would count to 2**60 behind the end of the file."""
    array = struct.pack("<QcIIQ", 1, b"a", 9, inner, 2**60)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    (tmp_path / "a.gguf").write_bytes(head + array + bytes(96))
    with pytest.raises(MinicosError, match="a GGUF file that cannot be read: it is cut off"):
        read_header(tmp_path / "a.gguf")


def test_a_header_of_many_values(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    values = b"".join(struct.pack("<Q7sII", 7, b"%07d" % i, 4, i) for i in range(3000))
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 3000)
    (tmp_path / "a.gguf").write_bytes(head + values + bytes(96))
    assert not read_header(tmp_path / "a.gguf").tensors  # four values each
    monkeypatch.setattr(gguf, "MOST", 10_000)
    with pytest.raises(MinicosError, match="more than 10,000 values before its tensors"):
        read_header(tmp_path / "a.gguf")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(90))
    with pytest.raises(MinicosError, match=r"pip install 'minicos\[gguf\]'"):
        read_header(tmp_path / "a.gguf")
