"""Checkpoints: recognised by their headers alone, in any layout; renamed by tables;
refused where damaged.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minicos.errors import MinicosError
from minicos.weights.header import read_header, read_headers, weight_files
from minicos.weights.inspect import describe, inspect
from minicos.weights.names import (
    DIT_DIFFUSERS,
    FOREIGN,
    inverse,
    layout,
    lora_dialect,
    renamer,
    translate,
)
from tests.checkpoints import MANIFESTS, manifest

# --------------------------------------------------------------------------------------------------
# names

OFFICIAL_AND_FOREIGN = [
    ("official.Wan2.2-I2V-A14B.high_noise_model", "diffusers.Wan2.2-I2V-A14B.transformer"),
    ("official.Wan2.2-I2V-A14B.low_noise_model", "diffusers.Wan2.2-I2V-A14B.transformer_2"),
    ("official.Wan2.2-T2V-A14B.high_noise_model", "diffusers.Wan2.2-T2V-A14B.transformer"),
    ("official.Wan2.2-T2V-A14B.low_noise_model", "diffusers.Wan2.2-T2V-A14B.transformer_2"),
    ("official.Wan2.2-TI2V-5B", "diffusers.Wan2.2-TI2V-5B.transformer"),
    ("official.Wan2.1-T2V-1.3B", "diffusers.Wan2.1-T2V-1.3B.transformer"),
    ("official.Wan2.1-T2V-14B", "diffusers.Wan2.1-T2V-14B.transformer"),
    ("official.Wan2.1-I2V-14B", "diffusers.Wan2.1-I2V-14B.transformer"),
    ("official.Wan2.1-FLF2V-14B-720P", "diffusers.Wan2.1-FLF2V-14B-720P.transformer"),
    ("official.Wan2.1_VAE", "diffusers.Wan2.1.vae"),
    ("official.Wan2.2_VAE", "diffusers.Wan2.2-TI2V-5B.vae"),
    ("official.models_t5_umt5-xxl-enc-bf16", "diffusers.umt5-xxl.text_encoder"),
]


@pytest.mark.parametrize(("official", "foreign"), OFFICIAL_AND_FOREIGN)
def test_names_map_onto_the_real_files(official, foreign):
    ours, theirs = manifest(official), manifest(foreign)
    table = FOREIGN[layout(theirs)][1]
    assert {translate(key, table): shape for key, shape in ours.items()} == theirs
    rename = renamer(theirs)
    assert {rename(key): shape for key, shape in theirs.items()} == ours
    for prefix in ("", "model.", "diffusion_model.", "model.diffusion_model."):
        rename = renamer(prefix + key for key in ours)
        assert {rename(prefix + key) for key in ours} == set(ours)


def test_tables_are_one_to_one():
    for _, table in FOREIGN.values():
        assert len(inverse(table)) == len(table)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "foo",
        "blocks.x.attn1.to_q.weight",
        "blocks.0.attn1.to_q.gate",
        "blocks.0.attn1.to_q.weight.1",
    ],
)
def test_a_key_of_no_table_is_an_error_that_names_it(key):
    with pytest.raises(MinicosError, match=repr(key)):
        translate(key, inverse(DIT_DIFFUSERS))


# --------------------------------------------------------------------------------------------------
# headers


def test_header_of_a_real_file(tmp_path):
    tensors = {
        "b": torch.zeros(2, 3, dtype=torch.bfloat16),
        "a": torch.zeros(()),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert {k: (i.dtype, i.shape) for k, i in header.tensors.items()} == {
        "a": ("F32", ()),
        "b": ("BF16", (2, 3)),
        "empty": ("F32", (0, 4)),
    }
    assert header.metadata == {"format": "pt"}
    assert header.size == (tmp_path / "a.safetensors").stat().st_size


def raw(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a file of weights"),
        (b"\x80\x02}q\x00.", "a bare pickle"),
        (b"PK\x03\x04" + b"\0" * 40, "not a whole PyTorch archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (struct.pack("<Q", 2**60) + b"{}", "not a whole safetensors file"),
        (struct.pack("<Q", 99_000_000) + b"{}", "not a whole safetensors file"),
        (raw(b'{"a":'), "JSON"),
        (raw(b'{"a":\xff}'), "not a whole safetensors file"),
        (raw(b"{" + b'"a":{' * 100_000), "JSON"),
        (raw(b'{"a":' + b"9" * 5000 + b"}"), "JSON"),
        (raw(b"{" + b" " * 2**25), "has a header of 33,554,433 bytes"),
        (raw({"__metadata__": {"a": 1}}), "expected a string"),
        (raw({"a": 1}), "JSON"),
        (raw({"a": entry("F33")}), "F33"),
        (raw({"a": entry(["F32"])}), "JSON"),
        (raw({"a": entry(shape=[-4])}), "-4"),
        (raw({"a": entry(shape=[2**64])}), "JSON"),
        (raw({"a": entry(shape=[4] + [1] * 100)}), "101 axes"),
        (raw({"a" * 2000: entry()}), "a name of 2000 letters"),
        (raw({"a": entry(offsets=[0, 16, 32])}), "JSON"),
        (raw({"a": entry(offsets=[16, 0])}), "invalid offset"),
        (raw({"a": entry(shape=[5])}), "invalid shape"),
        (raw({"a": entry(shape=[1], offsets=[12, 16])}), "invalid offset"),
        (raw({"a": entry(), "b": entry()}), "invalid offset"),
        (raw({"a": entry()}, b"\0" * 15), "cut off"),
        (raw({"a": entry()}, b"\0" * 17), "longer"),
    ],
)
def test_bad_headers_are_explained(tmp_path, content, says):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(MinicosError, match=says) as error:
        inspect(path)
    assert "bad.safetensors" in str(error.value)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(
        {"a.weight": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.bfloat16)},
        path,
        metadata={"x": "y"},
    )
    return path.read_bytes()


@given(data=st.data())
@settings(
    max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_files_raise_nothing_else(tmp_path, small_file, data):
    content = bytearray(small_file)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(content[:end]) + data.draw(st.binary(max_size=3)))
    try:
        checkpoint = inspect(path)
    except MinicosError:
        return
    load_file(path)  # the library accepts what is accepted here
    assert describe(checkpoint)


@given(content=st.binary(max_size=200))
@settings(
    max_examples=100, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_arbitrary_bytes_raise_nothing_else(tmp_path, content):
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MinicosError, match=name):
            inspect(tmp_path / name)


# --------------------------------------------------------------------------------------------------
# folders


def index_of(folder: Path, name: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    return folder


def test_an_index_may_not_leave_its_folder(tmp_path):
    outside = tmp_path / "secret.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    for name in (
        "../secret.safetensors",
        str(outside),
        "x/../../secret.safetensors",
        "C:\\secret",
        "..\\secret",
        "\\\\host\\x",
        "a\0b",
    ):
        with pytest.raises(MinicosError, match="outside its folder"):
            weight_files(index_of(tmp_path / "model", name))
    (tmp_path / "model" / "link.safetensors").symlink_to(outside)
    with pytest.raises(MinicosError, match="a link that leaves its folder"):
        weight_files(index_of(tmp_path / "model", "link.safetensors"))


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    blob, snapshot = (
        tmp_path / "hub" / "blobs" / "0123",
        tmp_path / "hub" / "snapshots" / "rev" / "transformer",
    )
    blob.parent.mkdir(parents=True)
    index_of(snapshot, "a.safetensors")
    save_file({"a": torch.zeros(1)}, blob)
    (snapshot / "a.safetensors").symlink_to(Path("../../../blobs/0123"))
    assert [*weight_files(snapshot)] == [snapshot / "a.safetensors"]
    (snapshot / "a.safetensors").unlink()
    (snapshot / "a.safetensors").symlink_to(tmp_path / "hub" / "other")
    with pytest.raises(MinicosError, match="a link that leaves"):
        weight_files(snapshot)


def test_folders_that_cannot_be_understood(tmp_path):
    with pytest.raises(MinicosError, match="does not exist"):
        inspect(tmp_path / "nothing")
    with pytest.raises(MinicosError, match="holds no weights"):
        inspect(tmp_path)
    with pytest.raises(MinicosError, match=r"gone\.safetensors is missing"):
        inspect(index_of(tmp_path / "a", "gone.safetensors"))
    for text in (
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": []}}',
    ):
        (tmp_path / "a" / "m.safetensors.index.json").write_text(text)
        with pytest.raises(MinicosError, match="index"):
            inspect(tmp_path / "a")
    for name in ("high_lora", "low_lora"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        MinicosError, match=r"high_lora\.safetensors, low_lora\.safetensors\. Name the one"
    ):
        inspect(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    for name in ("x", "y"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(
        '{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'
    )
    with pytest.raises(MinicosError, match="another shard"):
        inspect(tmp_path)


def test_an_index_and_its_shards_list_the_same_keys(tmp_path):
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "x.safetensors")
    for index, says in (
        ({"a": "x.safetensors"}, "only the file has c"),
        (dict.fromkeys("abc", "x.safetensors"), "only the index has b"),
    ):
        text = json.dumps({"weight_map": index})
        (tmp_path / "m.safetensors.index.json").write_text(text)
        with pytest.raises(MinicosError, match=f"disagree: {says}"):
            read_headers(tmp_path)


def test_networks_are_no_loras():
    for name in MANIFESTS:
        assert bool(lora_dialect(manifest(name))) == name.startswith("lora.")
