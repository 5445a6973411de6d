"""What a checkpoint is, from headers: every variant and layout at its true size, in files
that are mostly holes.
"""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minicos.config import VARIANTS
from minicos.errors import MinicosError
from minicos.tiny.lora import save_lora
from minicos.weights import layouts, lora
from minicos.weights.inspect import describe, inspect
from minicos.weights.load import load_into
from tests.checkpoints import fp8_rule, manifest, sparse, write_shards, write_sparse

T2V = "Wan2.2-T2V-A14B or Wan2.1-T2V-14B"
SINGLE = [
    ("official.Wan2.2-I2V-A14B.high_noise_model", "Wan2.2-I2V-A14B", "official"),
    ("official.Wan2.2-T2V-A14B.low_noise_model", T2V, "official"),
    ("official.Wan2.1-T2V-14B", T2V, "official"),
    ("official.Wan2.2-TI2V-5B", "Wan2.2-TI2V-5B", "official"),
    ("official.Wan2.1-T2V-1.3B", "Wan2.1-T2V-1.3B", "official"),
    ("official.Wan2.1-I2V-14B", "Wan2.1-I2V-14B", "official"),
    ("official.Wan2.1-FLF2V-14B-720P", "Wan2.1-FLF2V-14B", "official"),
    ("diffusers.Wan2.2-I2V-A14B.transformer", "Wan2.2-I2V-A14B", "diffusers"),
    ("diffusers.Wan2.2-T2V-A14B.transformer_2", T2V, "diffusers"),
    ("diffusers.Wan2.2-TI2V-5B.transformer", "Wan2.2-TI2V-5B", "diffusers"),
    ("diffusers.Wan2.1-T2V-1.3B.transformer", "Wan2.1-T2V-1.3B", "diffusers"),
    ("diffusers.Wan2.1-T2V-14B.transformer", T2V, "diffusers"),
    ("diffusers.Wan2.1-I2V-14B.transformer", "Wan2.1-I2V-14B", "diffusers"),
    ("diffusers.Wan2.1-FLF2V-14B-720P.transformer", "Wan2.1-FLF2V-14B", "diffusers"),
    ("comfy_fp8_scaled.Wan2.2-I2V-A14B.derived", "Wan2.2-I2V-A14B", "comfy_fp8_scaled"),
    ("official.Wan2.1_VAE", "Wan2.1_VAE", "official"),
    ("official.Wan2.2_VAE", "Wan2.2_VAE", "official"),
    ("diffusers.Wan2.1.vae", "Wan2.1_VAE", "diffusers"),
    ("diffusers.Wan2.2-TI2V-5B.vae", "Wan2.2_VAE", "diffusers"),
    ("official.models_t5_umt5-xxl-enc-bf16", "UMT5-XXL encoder", "official"),
    ("diffusers.umt5-xxl.text_encoder", "UMT5-XXL encoder", "transformers"),
    (
        "official.models_clip_open-clip-xlm-roberta-large-vit-huge-14.visual",
        "CLIP image encoder",
        "official",
    ),
    (
        "official.models_clip_open-clip-xlm-roberta-large-vit-huge-14.full",
        "CLIP image encoder",
        "official",
    ),
    ("diffusers.Wan2.1-I2V.image_encoder.CLIPVisionModel", "CLIP image encoder", "transformers"),
    ("lora.diffsynth.Wan2.2-I2V-A14B.rank32.derived", "LoRA", "lora:diffsynth"),
    ("lora.lightx2v_4step.Wan2.2-I2V-A14B.rank64.derived", "LoRA", "lora:lightx2v"),
    ("lora.peft_diffusers.Wan2.2-I2V-A14B.rank32.derived", "LoRA", "lora:peft"),
]
NOTED = {  # notes: what else a single file may be, or what it lacks
    "Wan2.2-I2V-A14B": ("has two experts", "--part low=FILE"),
    "Wan2.1-I2V-14B": ("have the same shapes",),
}


def test_inspect_imports_neither_torch_nor_numpy():
    script = "import sys, minicos.weights.inspect; print(sorted({'torch', 'numpy', 'av'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@sparse
@pytest.mark.parametrize(
    ("name", "variant", "found_layout"), SINGLE, ids=[name for name, *_ in SINGLE]
)
def test_single_files_of_true_size(tmp_path, name, variant, found_layout):
    shapes = manifest(name)
    path = write_sparse(tmp_path / "x.safetensors", shapes, fp8_rule if "fp8" in name else "F32")
    begin = time.process_time()
    found = inspect(path)
    assert time.process_time() - begin < 1
    assert (found.variant, found.layout, found.expert) == (variant, found_layout, None)
    assert (found.tensors, found.parameters) == (len(shapes), sum(map(math.prod, shapes.values())))
    assert found.bytes == path.stat().st_size
    assert found.parts == {"model": (str(path),)}
    for part in NOTED.get(variant, ()):
        assert part in str(found.notes)
    assert not found.notes or variant in NOTED
    if variant.startswith("Wan2.2-I2V"):
        assert found.architecture["num_heads"] == 40
        assert found.architecture["ffn_dim"] == 13824
    if variant == "LoRA":
        assert found.architecture == {
            "rank": 64 if "lightx2v" in name else 32,
            "dim": 5120,
            "num_layers": 40,
        }
    assert json.loads(json.dumps(found.to_json()))["variant"] == variant
    assert variant in describe(found)


@sparse
@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (
            ("high_noise_model", "low_noise_model"),
            ("official.Wan2.2-{}-A14B.high_noise_model", "official.Wan2.2-{}-A14B.low_noise_model"),
        ),
        (
            ("transformer", "transformer_2"),
            ("diffusers.Wan2.2-{}-A14B.transformer", "diffusers.Wan2.2-{}-A14B.transformer_2"),
        ),
    ],
    ids=["official", "diffusers"],
)
@pytest.mark.parametrize("kind", ["I2V", "T2V"])
def test_folders_of_two_experts_of_true_size(tmp_path, folders, names, kind):
    for folder, name in zip(folders, names, strict=True):
        write_shards(tmp_path / folder, manifest(name.format(kind)), 6)
        (tmp_path / folder / "config.json").write_text("{}")
    begin = time.process_time()
    found = inspect(tmp_path)
    assert time.process_time() - begin < 1
    assert (found.variant, found.expert, found.tensors) == (
        f"Wan2.2-{kind}-A14B",
        "high and low",
        2190,
    )
    assert found.parameters == 2 * {"I2V": 14_288_901_184, "T2V": 14_288_491_584}[kind]
    assert [len(found.parts[expert]) for expert in ("high", "low")] == [6, 6]
    assert all(folders[1] in file for file in found.parts["low"])
    assert "in 12 files" in describe(found)

    shard = next((tmp_path / folders[0]).glob("*.safetensors"))
    assert any("one shard" in note for note in inspect(shard).notes)
    shard.unlink()
    with pytest.raises(MinicosError, match=f"{shard.name} is missing"):
        inspect(tmp_path)


@sparse
def test_names_of_files_and_folders_tell_the_expert(tmp_path):
    shapes = manifest("official.Wan2.2-T2V-A14B.high_noise_model")
    write_shards(tmp_path / "high_noise_model", shapes, 2)
    for path, expert in (
        (tmp_path / "high_noise_model", "high"),
        (tmp_path, "high"),
        (
            write_sparse(tmp_path / "a" / "wan2.2_t2v_Low-Noise_14B.safetensors", shapes, "F16"),
            "low",
        ),
    ):
        found = inspect(path)
        assert (found.variant, found.expert) == ("Wan2.2-T2V-A14B", expert)


@sparse
def test_experts_of_different_models_are_an_error(tmp_path):
    write_sparse(
        tmp_path / "high_noise_model" / "a.safetensors",
        manifest("official.Wan2.2-T2V-A14B.high_noise_model"),
    )
    write_sparse(
        tmp_path / "low_noise_model" / "a.safetensors",
        manifest("official.Wan2.2-I2V-A14B.low_noise_model"),
    )
    with pytest.raises(MinicosError, match="differ in shape"):
        inspect(tmp_path)


@sparse
def test_an_incomplete_file_is_noted(tmp_path):
    shapes = manifest("official.Wan2.1-T2V-1.3B")
    del shapes["blocks.3.norm3.bias"]
    found = inspect(write_sparse(tmp_path / "x.safetensors", shapes))
    assert found.variant == "Wan2.1-T2V-1.3B"
    assert found.notes == ("it has 824 tensors where 825 are expected: the file is not complete",)


def test_unknown_weights_are_called_unknown(tmp_path):
    save_file({"foo": torch.zeros(1)}, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert (found.variant, found.layout, found.architecture) == ("unknown", "unknown", {})


def test_pytorch_archives_are_recognised_and_never_executed(tmp_path):
    shapes = manifest("official.Wan2.1_VAE")
    zero = torch.zeros(())
    torch.save(
        {key: zero.expand(shape) for key, shape in shapes.items()}, tmp_path / "Wan2.1_VAE.pth"
    )
    with pytest.raises(MinicosError, match="shorter than its tensors"):
        inspect(tmp_path)
    for wrap in (
        lambda table: table,
        lambda table: {"model_state": {f"model.{k}": v for k, v in table.items()}},
    ):
        tensors = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}
        torch.save(wrap(tensors), tmp_path / "Wan2.1_VAE.pth")
        found = inspect(tmp_path)
        assert (found.variant, found.layout, found.tensors) == ("Wan2.1_VAE", "pytorch", 194)
        assert found.parameters == sum(map(math.prod, shapes.values())) == 126_892_531
        assert found.dtypes == {"F16": 194}
        assert "weights_only=True" in describe(found)

    torch.save(
        {"a": nn.Parameter(torch.zeros(2, 3)), "b": torch.zeros(4).long()}, tmp_path / "small.pth"
    )
    assert inspect(tmp_path / "small.pth").dtypes == {"F32": 1, "I64": 1}
    torch.save({"a": Evil(str(tmp_path / "boom"))}, tmp_path / "evil.pth")
    with pytest.raises(
        MinicosError, match=r"evil\.pth cannot be opened as tensors only: it holds .*open"
    ):
        inspect(tmp_path / "evil.pth")
    with pytest.raises(MinicosError, match=r"evil\.pth cannot be opened as tensors only"):
        load_into(nn.Identity(), tmp_path / "evil.pth")
    assert not (tmp_path / "boom").exists()


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@sparse
def test_an_expert_may_be_a_lora_on_the_other(tmp_path):
    """As in the model that comes with minicos."""
    shapes = manifest("official.Wan2.2-I2V-A14B.high_noise_model")
    write_sparse(tmp_path / "high_noise_model" / "a.safetensors", shapes)
    delta = lora.LowRank(torch.zeros(5120, 3), torch.zeros(3, 5120))
    save_lora(
        tmp_path / "low_noise_model" / "lora.safetensors", {"blocks.0.self_attn.q.weight": delta}
    )
    found = inspect(tmp_path)
    assert (found.variant, found.expert, found.layout) == (
        "Wan2.2-I2V-A14B",
        "high and low",
        "official",
    )
    assert found.architecture["num_layers"] == 40
    assert found.notes[0] == "its low-noise expert is a LoRA of rank 3 on the other one"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer",
        ),
        (
            "a.pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer",
        ),
        ("a.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
        ("a.pth", b"<!DOCTYPE html><html>", "is a web page"),
        ("a.safetensors", b"", "is not a file of weights"),
        ("a.pth", b"PK\x03\x04" + bytes(90), "is not a whole PyTorch archive"),
        ("a.gguf", b"GGUF" + bytes(90), "is a GGUF file"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MinicosError, match=rf"{name} {says}"):
        inspect(tmp_path / name)


@sparse
def test_a_file_that_was_cut_off(tmp_path):
    path = write_sparse(tmp_path / "x.safetensors", manifest("official.Wan2.1-T2V-1.3B"))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(
        MinicosError, match=r"not a whole safetensors file \(5,67\d,\d+,\d+ bytes\): it is cut off"
    ):
        inspect(path)


@sparse
def test_a_network_of_another_family_is_unknown(tmp_path):
    shapes = {f"double_blocks.{i}.img_attn.qkv.weight": (9216, 3072) for i in range(20)}
    found = inspect(write_sparse(tmp_path / "flux.safetensors", shapes))
    assert (found.variant, found.layout) == ("unknown", "unknown")
    other = {
        k: tuple(2 * n if n == 5120 else n for n in s)
        for k, s in manifest("official.Wan2.1-T2V-14B").items()
    }
    found = inspect(write_sparse(tmp_path / "wide.safetensors", other))
    assert (found.variant, found.architecture["dim"]) == ("like Wan2.1-T2V-14B", 10240)


@sparse
def test_whole_folders_of_one_network(tmp_path):
    """As Wan-AI publishes Wan2.1 and TI2V-5B: the network's shards next to VAE and text encoder;
    and as diffusers has it.
    """
    for published, variant in (
        ("Wan2.1-T2V-14B", "Wan2.1-T2V-14B"),
        ("Wan2.2-TI2V-5B", "Wan2.2-TI2V-5B"),
    ):
        folder = write_shards(tmp_path / published, manifest(f"official.{published}"), 3)
        write_sparse(
            folder / f"{published[:6]}_VAE.safetensors", manifest(f"official.{published[:6]}_VAE")
        )
        assert inspect(folder).variant == variant
        assert layouts.dit_config(folder) == VARIANTS[variant]
    folder = tmp_path / "diffusers"
    write_shards(folder / "transformer", manifest("diffusers.Wan2.1-T2V-14B.transformer"), 3)
    (folder / "model_index.json").write_text('{"transformer_2": [null, null]}')
    assert inspect(folder).variant == "Wan2.1-T2V-14B"
    (folder / "model_index.json").write_text(
        '{"transformer_2": ["diffusers", "WanTransformer3DModel"]}'
    )
    found = inspect(folder)
    assert (found.variant, len(found.parts)) == ("Wan2.2-T2V-A14B", 1)
    assert "--part low=FILE" in found.notes[0]
