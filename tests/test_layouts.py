"""One argument opens every layout that people have on disk, and what is missing, mixed or
ambiguous is named.
"""

import json
import math
import os
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicos import config
from minicos.errors import MinicosError
from minicos.open import load
from minicos.tiny.lora import save_lora
from minicos.vae import VAE as VAENetwork
from minicos.weights import header, layouts, lora
from minicos.weights.layouts import find
from minicos.weights.names import DIT_DIFFUSERS, UMT5_TRANSFORMERS, VAE_DIFFUSERS, translate
from minicos.weights.stated import departures, stated
from tests.checkpoints import fp8_rule, manifest, sparse, write_shards, write_sparse

DIT = "diffusion_pytorch_model"
T5, VAE = "models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
HEADS = {"num_heads": 4, "text_len": 16}

# -- the same small model in each layout -----------------------------------------------------------


@pytest.fixture(scope="module")
def networks(toy):
    """The tensors of a small model with two experts, under their official names."""
    high = load_file(toy / f"high_noise_model/{DIT}.safetensors")
    draw = torch.Generator().manual_seed(1)
    low = {
        k: v + (0.1 * v.float().std().nan_to_num() * torch.randn(v.shape, generator=draw)).half()
        for k, v in high.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        thin = VAENetwork(
            config.VAEConfig(dim=4, dim_mult=(1, 1, 2, 4))
        )  # two residual blocks a stage: diffusers counts on it
    return {
        "high": high,
        "low": low,
        "vae": thin.half().state_dict(),
        "text": load_file(toy / f"{T5}.safetensors"),
    }


@pytest.fixture(scope="module")
def twin(toy, networks, tmp_path_factory):
    """That model as a plain official folder."""
    folder = tmp_path_factory.mktemp("twin")
    shutil.copytree(toy, folder, dirs_exist_ok=True)
    save(folder / "low_noise_model", networks["low"])
    save(folder, networks["vae"], stem=VAE)
    (folder / "low_noise_model/config.json").write_text(json.dumps(HEADS))
    return folder


def save(folder, tensors, shards: int = 1, stem: str = DIT) -> None:
    """A network as one file, or as shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors")
        return
    weight_map = {
        key: f"{stem}-{1 + i % shards:05}-of-{shards:05}.safetensors"
        for i, key in enumerate(tensors)
    }
    for name in sorted(set(weight_map.values())):
        save_file(
            {key: tensors[key] for key, file in weight_map.items() if file == name}, folder / name
        )
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def official(folder, networks, tokenizer):
    for name in ("high", "low"):
        save(folder / f"{name}_noise_model", networks[name], 3)
        (folder / f"{name}_noise_model/config.json").write_text(json.dumps(HEADS))
    torch.save(networks["vae"], folder / f"{VAE}.pth")
    torch.save(networks["text"], folder / f"{T5}.pth")
    (folder / TOKENIZER).parent.mkdir(parents=True)
    shutil.copy(tokenizer, folder / TOKENIZER)
    return {"model": folder}


def diffusers(folder, networks, tokenizer):
    """As the Wan-AI/*-Diffusers repositories and the merged VBVR-Wan2.2: transformer is the
    high-noise expert.
    """

    def foreign(name, table):
        return {translate(key, table): tensor for key, tensor in networks[name].items()}

    for name, subfolder in (("high", "transformer"), ("low", "transformer_2")):
        save(folder / subfolder, foreign(name, DIT_DIFFUSERS), 2)
        about = {
            "_class_name": "WanTransformer3DModel",
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "eps": 1e-6,
        }
        (folder / subfolder / "config.json").write_text(json.dumps(about))
    save(folder / "vae", foreign("vae", VAE_DIFFUSERS))
    (folder / "vae/config.json").write_text(
        json.dumps({"latents_mean": config.VAE21_MEAN, "latents_std": config.VAE21_STD})
    )
    save(folder / "text_encoder", foreign("text", UMT5_TRANSFORMERS), 2, stem="model")
    (folder / "tokenizer").mkdir()
    shutil.copy(tokenizer, folder / "tokenizer/tokenizer.json")
    transformer = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": transformer, "transformer_2": transformer}
    (folder / "model_index.json").write_text(json.dumps(index))
    return {"model": folder}


def comfy(folder, networks, tokenizer):
    for name in ("high", "low"):
        tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in networks[name].items()}
        save(folder, tensors, stem=f"wan2.2_i2v_{name}_noise_14B_fp16")
    save(folder, networks["vae"], stem="wan_2.1_vae")
    text = {translate(key, UMT5_TRANSFORMERS): tensor for key, tensor in networks["text"].items()}
    save(folder, text | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, stem="umt5_xxl_fp16")
    parts = {"low": "wan2.2_i2v_low_noise_14B_fp16", "vae": "wan_2.1_vae", "text": "umt5_xxl_fp16"}
    parts = {name: folder / f"{stem}.safetensors" for name, stem in parts.items()}
    return {
        "model": folder / "wan2.2_i2v_high_noise_14B_fp16.safetensors",
        "parts": parts | {"tokenizer": tokenizer},
    }


def diffsynth(folder, networks, tokenizer):
    """Files with their official names, next to each other; the VAE with a prefix, inside a
    table.
    """
    save(folder, networks["high"], stem="a_high_noise")
    save(folder, networks["low"], stem="b_low_noise")
    torch.save(
        {"model_state": {f"model.{k}": v for k, v in networks["vae"].items()}},
        folder / f"{VAE}.pth",
    )
    torch.save(networks["text"], folder / f"{T5}.pth")
    high, low = folder / "a_high_noise.safetensors", folder / "b_low_noise.safetensors"
    return {
        "model": str(low),
        "parts": {"high": str(high), "tokenizer": tokenizer},
    }  # the other way round


def run(wan) -> list[torch.Tensor]:
    """Three steps, the last by the low-noise expert, and the video: everything that a model's
    files decide.
    """
    wan = wan.with_preset(steps=3)
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    steps = list(wan.sample(wan.condition("solve the maze", picture, frames=5), seed=0))
    assert [step.expert for step in steps] == ["high", "high", "low"]
    return [*(step.velocity for step in steps), torch.from_numpy(wan.decode(steps[-1].next))]


@pytest.fixture(scope="module")
def expected(twin):
    return run(load(twin, device="cpu"))


@pytest.mark.parametrize("layout", [official, diffusers, comfy, diffsynth])
def test_every_layout_gives_the_same_numbers(layout, networks, toy, expected, tmp_path):
    given = layout(tmp_path, networks, toy / TOKENIZER)
    found = layouts.find(**given)
    assert found.kind == {official: "official", diffusers: "diffusers"}.get(layout, "single file")
    assert found.variant == "tiny"
    assert {part.config for part in found.experts.values()} == {config.VARIANTS["tiny"]}
    assert (
        "high_noise" in str(found.experts["high"].files[0])
        or found.experts["high"].files[0].parent.name == "transformer"
    )
    assert all(
        torch.equal(a, b) for a, b in zip(run(load(**given, device="cpu")), expected, strict=True)
    )


def test_fp8_scaled_files_are_the_numbers_they_stand_for(networks, toy, tmp_path):
    """As ComfyUI writes them: fp8 matrices with a factor each, and a marker. The same files
    with factor * fp8 are equal.
    """
    given, plain = comfy(tmp_path, networks, toy / TOKENIZER), tmp_path / "plain"
    for path in (given["model"], given["parts"]["low"], given["parts"]["text"]):
        scaled = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
        meant = {}
        for key, tensor in load_file(path).items():
            scaled[key] = meant[key] = tensor
            if tensor.ndim == 2 and re.search(
                r"(attn|ffn|head)\S*\.\w+\.weight|SelfAttention\.[qkvo]|Dense.*\.w", key
            ):
                factor = tensor.float().abs().max() / 448
                scaled[key] = (tensor.float() / factor).to(torch.float8_e4m3fn)
                scaled[f"{key.removesuffix('weight')}scale_weight"] = factor
                # double, so that it is cast, too: a view of float32 in the file may lie unaligned,
                # and sums then round differently
                meant[key] = (scaled[key].float() * factor).double()
        save_file(scaled, path)
        save(plain, meant, stem=path.stem)
    same = {"model": plain / given["model"].name, "parts": dict(given["parts"])}
    same["parts"] |= {name: plain / given["parts"][name].name for name in ("low", "text")}
    a, b = (run(load(**each, device="cpu")) for each in (given, same))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_parts_take_the_place_of_a_folders_own(twin, networks, expected, tmp_path):
    save(tmp_path, networks["high"], stem="other_low_noise")
    other = tmp_path / "other_low_noise.safetensors"
    swapped = layouts.find(twin, parts={"high": twin / "low_noise_model", "low": other})
    assert swapped.experts["low"].files == (other,)
    assert swapped.fingerprint() != layouts.find(twin).fingerprint()
    first = run(load(twin, parts={"high": twin / "low_noise_model", "low": other}, device="cpu"))[0]
    assert not torch.equal(first, expected[0])


# -- the real models, at their true size -----------------------------------------------------------

WHOLE = {  # variant -> how many networks, and which VAE
    "Wan2.2-I2V-A14B": (2, "Wan2.1"),
    "Wan2.2-T2V-A14B": (2, "Wan2.1"),
    "Wan2.2-TI2V-5B": (1, "Wan2.2"),
    "Wan2.1-T2V-1.3B": (1, "Wan2.1"),
    "Wan2.1-T2V-14B": (1, "Wan2.1"),
    "Wan2.1-I2V-14B": (1, "Wan2.1"),
    "Wan2.1-FLF2V-14B": (1, "Wan2.1"),
}
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"


def write_official(folder, variant: str):
    count, vae = WHOLE[variant]
    published = variant.replace("FLF2V-14B", "FLF2V-14B-720P")
    for name in ("high_noise_model", "low_noise_model") if count == 2 else (".",):
        key = f"official.{published}.{name}" if count == 2 else f"official.{published}"
        write_shards(folder / name, manifest(key), 3, last=name[:1].encode())
    write_sparse(folder / f"{vae}_VAE.safetensors", manifest(f"official.{vae}_VAE"))
    write_sparse(folder / f"{T5}.safetensors", manifest(f"official.{T5}"), "BF16")
    if "Wan2.1-I2V" in variant or "FLF2V" in variant:
        write_sparse(folder / f"{CLIP}.safetensors", manifest(f"official.{CLIP}.visual"))
    (folder / TOKENIZER).parent.mkdir(parents=True)
    (folder / TOKENIZER).write_text("{}")
    return folder


def write_diffusers(folder, variant: str, index: bool = True):
    count, _ = WHOLE[variant]
    published = variant.replace("FLF2V-14B", "FLF2V-14B-720P")
    for name in ("transformer", "transformer_2")[:count]:
        write_shards(
            folder / name, manifest(f"diffusers.{published}.{name}"), 3, last=name[-1:].encode()
        )
        heads = config.VARIANTS[variant].num_heads
        (folder / name / "config.json").write_text(
            json.dumps({"num_attention_heads": heads, "eps": 1e-6})
        )
    vae = "Wan2.2-TI2V-5B" if "5B" in variant else "Wan2.1"
    write_sparse(folder / f"vae/{DIT}.safetensors", manifest(f"diffusers.{vae}.vae"))
    write_shards(folder / "text_encoder", manifest("diffusers.umt5-xxl.text_encoder"), 2)
    if "Wan2.1-I2V" in variant or "FLF2V" in variant:
        write_sparse(
            folder / "image_encoder/model.safetensors",
            manifest("diffusers.Wan2.1-I2V.image_encoder.CLIPVisionModel"),
        )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    there = ["diffusers", "WanTransformer3DModel"]
    if index:
        text = json.dumps(
            {"transformer": there, "transformer_2": there if count == 2 else [None, None]}
        )
        (folder / "model_index.json").write_text(text)
    return folder


@sparse
@pytest.mark.parametrize("write", [write_official, write_diffusers])
@pytest.mark.parametrize("variant", WHOLE)
def test_every_variant_is_told_by_its_folder(variant, write, tmp_path):
    write(tmp_path, variant)
    begin = time.process_time()
    found = layouts.find(tmp_path)
    assert time.process_time() - begin < 2  # measured 0.05 to 0.2 s
    count, vae = WHOLE[variant]
    assert found.variant == variant
    assert set(found.experts) == {"high", "low"} if count == 2 else {"high"}
    assert all(part.config == config.VARIANTS[variant] for part in found.experts.values())
    assert found.vae.config == (config.VAE22 if vae == "Wan2.2" else config.VAEConfig())
    assert found.text.config == config.TextConfig()
    assert (found.clip is not None) == ("Wan2.1-I2V" in variant or "FLF2V" in variant)
    assert [
        name
        for name in config.FINETUNES
        if config.FINETUNES[name] == variant and name not in str(found.notes)
    ] == []
    assert bool(found.notes) == (variant in config.FINETUNES.values())
    for name in config.FINETUNES:
        if config.FINETUNES[name] == variant:
            assert layouts.find(tmp_path, variant=name).variant == name
        else:
            with pytest.raises(
                MinicosError,
                match=f"has not the shapes of {name}: it can be .*{variant}|{name} has two experts",
            ):
                layouts.find(tmp_path, variant=name)


@sparse
def test_chronoedit_is_named_by_its_config(tmp_path):
    write_diffusers(tmp_path, "Wan2.1-I2V-14B")
    (tmp_path / "transformer/config.json").write_text(
        json.dumps({"_class_name": "ChronoEditTransformer3DModel"})
    )
    assert layouts.find(tmp_path).variant == "ChronoEdit-14B"


# -- what is missing or ambiguous ------------------------------------------------------------------


def rest(folder) -> dict:
    """The other parts of a model of Wan2.1 shapes, as options."""
    vae = write_sparse(folder / "vae.safetensors", manifest("official.Wan2.1_VAE"))
    text = write_sparse(folder / "t5.safetensors", manifest(f"official.{T5}"), "BF16")
    (folder / "tokenizer.json").write_text("{}")
    return {"vae": vae, "text": text, "tokenizer": folder / "tokenizer.json"}


@sparse
def test_a_lone_text_to_video_file_can_be_two_things(tmp_path):
    shapes, parts = manifest("official.Wan2.1-T2V-14B"), rest(tmp_path)
    file = write_sparse(tmp_path / "wan_t2v_14B.safetensors", shapes)
    with pytest.raises(
        MinicosError,
        match=r"one expert of Wan2.2-T2V-A14B .*--part low=FILE.* or Wan2.1-T2V-14B .*--variant Wan2.1-T2V-14B",
    ):
        layouts.find(file, parts=parts)
    assert layouts.find(file, parts=parts, variant="Wan2.1-T2V-14B").variant == "Wan2.1-T2V-14B"
    low = write_sparse(tmp_path / "second.safetensors", shapes, last=b"x")
    assert layouts.find(file, parts=parts | {"low": low}).variant == "Wan2.2-T2V-A14B"
    assert layouts.find(file, parts=parts | {"low": low}, variant="Wan2.2-T2V-A14B-4step").experts[
        "low"
    ].files == (low,)
    with pytest.raises(
        MinicosError, match=r"there are two experts, and Wan2.1-T2V-14B has one network"
    ):
        layouts.find(file, parts=parts | {"low": low}, variant="Wan2.1-T2V-14B")
    with pytest.raises(MinicosError, match="both experts are the same network"):
        layouts.find(
            file, parts=parts | {"low": write_sparse(tmp_path / "again.safetensors", shapes)}
        )
    with pytest.raises(MinicosError, match=r"nothing in its files tells them apart"):
        layouts.find(
            write_shards(tmp_path / "shards", shapes, 2), parts=parts
        )  # a VAE by name makes no whole folder
    high = write_sparse(tmp_path / "wan2.2_t2v_low_noise_14B.safetensors", shapes)
    with pytest.raises(
        MinicosError,
        match=r"only one is here \(the low-noise one\). Name the other: --part high=FILE",
    ):
        layouts.find(high, parts=parts)


@sparse
@pytest.mark.parametrize(
    ("write", "folder", "missing"),
    [
        (write_official, "low_noise_model", "low"),
        (write_official, "high_noise_model", "high"),
        (write_diffusers, "transformer_2", "low"),
        (write_diffusers, "transformer", "high"),
    ],
)
@pytest.mark.parametrize("variant", ["Wan2.2-I2V-A14B", "Wan2.2-T2V-A14B"])
def test_a_missing_expert_is_named(write, folder, missing, variant, tmp_path):
    write(tmp_path, variant)
    shutil.move(tmp_path / folder, tmp_path / "elsewhere")
    with pytest.raises(
        MinicosError,
        match=f"{variant} has two experts, and only one is here.*--part {missing}=FILE",
    ):
        layouts.find(tmp_path)
    assert layouts.find(tmp_path, parts={missing: tmp_path / "elsewhere"}).variant == variant
    assert (
        layouts.dit_config(tmp_path) == config.VARIANTS[variant]
    )  # hook points need no second expert


@sparse
def test_experts_of_two_models_are_refused(tmp_path):
    for other, differs in (
        ("Wan2.2-I2V-A14B.low_noise_model", "in_dim 16 and 36"),
        ("Wan2.1-T2V-1.3B", "dim 5120 and 1536"),
    ):
        folder = write_official(tmp_path / other, "Wan2.2-T2V-A14B")
        shutil.rmtree(folder / "low_noise_model")
        low = write_sparse(tmp_path / f"{other}.safetensors", manifest(f"official.{other}"))
        with pytest.raises(MinicosError, match=f"experts are of two models .{differs}"):
            layouts.find(folder, parts={"low": low})


@sparse
def test_parts_of_another_model_are_refused(tmp_path):
    write_official(tmp_path, "Wan2.1-T2V-1.3B")
    vae = write_sparse(tmp_path / "wan2.2_vae.safetensors", manifest("official.Wan2.2_VAE"))
    with pytest.raises(
        MinicosError,
        match=r"wan2.2_vae.safetensors has 48 latent channels, and Wan2.1-T2V-1.3B has 16",
    ):
        layouts.find(tmp_path, parts={"vae": vae})
    with pytest.raises(MinicosError, match=r"t5.*safetensors is not a VAE of Wan"):
        layouts.find(tmp_path, parts={"vae": tmp_path / f"{T5}.safetensors"})
    with pytest.raises(MinicosError, match=r"VAE.* is not a UMT5 encoder"):
        layouts.find(tmp_path, parts={"text": tmp_path / f"{VAE}.safetensors"})
    for part in ("high", "low"):
        with pytest.raises(MinicosError, match=r"VAE\.safetensors is not a Wan network"):
            layouts.find(tmp_path, parts={part: tmp_path / f"{VAE}.safetensors"})
    other = {
        k: tuple(2 * n if n == 1536 else n for n in s)
        for k, s in manifest("official.Wan2.1-T2V-1.3B").items()
    }
    found = layouts.find(tmp_path, parts={"high": write_sparse(tmp_path / "x.safetensors", other)})
    assert found.variant == "like Wan2.1-T2V-14B"
    assert (found.experts["high"].config.dim, found.experts["high"].config.num_heads) == (3072, 24)
    assert "of no published model" in found.notes[0]
    other["patch_embedding.weight"] = (3072, 48, 1, 2, 2)
    with pytest.raises(MinicosError, match="takes 48 input channels and gives 16"):
        layouts.find(tmp_path, parts={"high": write_sparse(tmp_path / "y.safetensors", other)})


def test_what_downloads_and_macos_leave_next_to_weights(networks, tmp_path):
    official(tmp_path, networks, os.devnull)
    folder = tmp_path / "low_noise_model"
    (folder / f"{DIT}.safetensors.index.json").unlink()
    for shard in list(folder.glob("*.safetensors")):
        shard.with_name(f"._{shard.name}").write_bytes(b"\0\5\x16\7")
    layouts.find(tmp_path)
    left = shard.with_name(f"{shard.name}.aria2")
    left.touch()
    with pytest.raises(
        MinicosError, match=f"{shard} is not complete: its download left {left.name}"
    ):
        layouts.find(tmp_path)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(MinicosError, match=f"{tmp_path} cannot be read: Permission denied"):
        header.weight_files(tmp_path)


def test_an_index_that_does_not_agree_with_its_shards(networks, tmp_path):
    official(tmp_path, networks, os.devnull)
    index = tmp_path / f"low_noise_model/{DIT}.safetensors.index.json"
    text = json.loads(index.read_text())
    files = sorted(set(text["weight_map"].values()))
    text["weight_map"]["patch_embedding.weight"] = next(
        f for f in files if f != text["weight_map"]["patch_embedding.weight"]
    )
    index.write_text(json.dumps(text))
    with pytest.raises(
        MinicosError,
        match=r"safetensors and its index disagree: only .* has patch_embedding\.weight",
    ):
        layouts.find(tmp_path)


def test_the_tokenizer_is_looked_for_in_order(networks, toy, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    given = comfy(tmp_path, networks, toy / TOKENIZER)
    del given["parts"]["tokenizer"]
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.delenv(layouts.TOKENIZER, raising=False)
    with pytest.raises(
        MinicosError, match=f"neither {layouts.TOKENIZER} nor the Hub cache .*--part tokenizer=FILE"
    ):
        layouts.find(**given)
    snapshot = cache / "models--google--umt5-xxl/snapshots" / ("0" * 40)
    (cache / "models--google--umt5-xxl/refs").mkdir(parents=True)
    (cache / "models--google--umt5-xxl/refs/main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(toy / TOKENIZER, snapshot / "tokenizer.json")
    assert layouts.find(**given).tokenizer == snapshot / "tokenizer.json"
    monkeypatch.setenv(layouts.TOKENIZER, str(toy / TOKENIZER))
    assert layouts.find(**given).tokenizer == toy / TOKENIZER
    given["parts"]["tokenizer"] = snapshot
    assert layouts.find(**given).tokenizer == snapshot / "tokenizer.json"
    monkeypatch.setenv(layouts.TOKENIZER, "gone.json")
    del given["parts"]["tokenizer"]
    with pytest.raises(
        MinicosError, match=f"gone.json does not exist, and {layouts.TOKENIZER} names it"
    ):
        layouts.find(**given)


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.fixture
def as_a14b(monkeypatch):
    """The small model's shapes under the name of the real one."""
    monkeypatch.setitem(config.VARIANTS, "Wan2.2-I2V-A14B", config.VARIANTS["tiny"])
    monkeypatch.delitem(config.VARIANTS, "tiny")


def test_vbvr_is_the_base_and_two_loras(as_a14b, twin, networks, toy, tmp_path):
    """VBVR-Wan2.2 comes merged in the layout of diffusers, and as two LoRA files for
    Wan2.2-I2V-A14B: the same numbers.
    """
    draw, merged, files = torch.Generator().manual_seed(2), dict(networks), {}
    for name in ("high", "low"):
        deltas = {
            f"blocks.{i}.{module}.weight": lora.LowRank(
                torch.randn(128, 2, generator=draw), torch.randn(2, 128, generator=draw)
            )
            for i in range(3)
            for module in ("self_attn.q", "cross_attn.o")
        }
        files[name] = tmp_path / f"{name}_noise_lora.safetensors"
        save_lora(files[name], deltas)
        one = lora.read(files[name])
        merged[name] = {k: one.merge(k, v.float()) for k, v in networks[name].items()}
    (tmp_path / "VBVR").mkdir()
    whole = load(
        **diffusers(tmp_path / "VBVR", merged, toy / TOKENIZER), variant="VBVR-Wan2.2", device="cpu"
    )
    both = load(
        twin,
        variant="VBVR-Wan2.2",
        lora={"high": [files["high"]], "low": [(files["low"], 1.0)]},
        device="cpu",
    )
    plain = load(twin, device="cpu")
    assert (plain.variant, both.variant, both.preset) == (
        "Wan2.2-I2V-A14B",
        "VBVR-Wan2.2",
        config.get_preset("VBVR-Wan2.2"),
    )
    assert "VBVR-Wan2.2" in plain.notes[0]
    for name in ("high", "low"):
        state = both.experts[name].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in whole.experts[name].state_dict().items())
        assert not torch.equal(
            state["blocks.0.self_attn.q.weight"], plain.experts[name].blocks[0].self_attn.q.weight
        )
    assert (
        str(both.loras[1])
        == "low: low_noise_lora.safetensors: 6 tensors changed (diffsynth, rank 2, strength 1)"
    )
    half = layouts.find(twin, lora={"high": [files["high"]], "low": [(files["low"], 0.5)]})
    one = layouts.find(twin, lora={"high": [files["high"]]})
    assert len({plain.weights, both.weights, half.fingerprint(), one.fingerprint()}) == 4


def test_a_lora_for_another_network_is_refused_before_weights_are_read(twin, tmp_path, monkeypatch):
    save_lora(
        tmp_path / "a.safetensors",
        {"blocks.0.ffn.0.weight": lora.LowRank(torch.ones(9, 2), torch.ones(2, 128))},
    )
    monkeypatch.setattr("minicos.open.load_into", None)
    with pytest.raises(
        MinicosError, match=r"a\.safetensors: the change of blocks\.0\.ffn\.0\.weight is \(9, 128\)"
    ):
        load(twin, lora={"low": [tmp_path / "a.safetensors"]}, device="cpu")
    with pytest.raises(MinicosError, match=re.escape("no expert 'model'. Take high or low")):
        layouts.find(twin, lora={"model": [tmp_path / "a.safetensors"]})
    with pytest.raises(MinicosError, match=r"a\.safetensors is a LoRA: give the model it is for"):
        layouts.find(tmp_path / "a.safetensors")


@sparse
def test_comfy_files_of_true_size(tmp_path):
    """fp8_scaled experts, a T5 that carries a sentencepiece model, and the VAE, by name."""
    shapes, parts = manifest("comfy_fp8_scaled.Wan2.2-I2V-A14B.derived"), rest(tmp_path)
    high = write_sparse(
        tmp_path / "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", shapes, fp8_rule
    )
    low = write_sparse(
        tmp_path / "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors", shapes, fp8_rule, last=b"x"
    )
    text = manifest("diffusers.umt5-xxl.text_encoder") | {"spiece_model": (4_548_313,)}
    text |= {
        key.replace(".weight", ".scale_weight"): () for key in text if ".SelfAttention.q." in key
    }
    parts["text"] = write_sparse(
        tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        text,
        lambda key, shape: "F32" if not shape else "U8",
    )
    found = layouts.find(high, parts=parts | {"low": low})
    assert (found.variant, found.kind) == ("Wan2.2-I2V-A14B", "single file")
    assert found.text.config == config.TextConfig()
    with pytest.raises(MinicosError, match=r"comes without the VAE. Name it: --part vae=FILE"):
        layouts.find(high, parts={"low": low})


# -- variants of the embedded model ----------------------------------------------------------------


def test_a_variant_of_the_embedded_model_has_its_vae_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "EMBEDDED_VARIANTS", tmp_path)
    with pytest.raises(MinicosError, match=r"no variant tiny:mid: .*\(none in this"):
        layouts.find("tiny:mid")
    for name in ("high_noise_model", f"{T5}.safetensors"):
        copy = shutil.copytree if name == "high_noise_model" else shutil.copy
        (tmp_path / "mid").mkdir(exist_ok=True)
        copy(layouts.EMBEDDED / name, tmp_path / "mid" / name)
    (tmp_path / "notes").mkdir()
    assert layouts.embedded_variants() == ("mid",)
    found, whole = layouts.find("tiny:mid"), layouts.find("tiny")
    assert (found.variant, set(found.experts)) == ("tiny", {"high"})
    assert (found.vae, found.tokenizer) == (whole.vae, whole.tokenizer)
    assert found.text.files == (tmp_path / "mid" / f"{T5}.safetensors",)
    assert found.fingerprint() != whole.fingerprint()
    for name in ("tiny:", "tiny:notes", "tiny:../weights"):
        with pytest.raises(MinicosError, match="tiny:mid"):
            layouts.find(name)


def test_a_variant_can_be_a_lora_on_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "EMBEDDED_VARIANTS", tmp_path)
    monkeypatch.setattr(layouts, "USUAL", {"quick": "4step"})
    high = tmp_path / "quick/high_noise_model"
    high.mkdir(parents=True)
    shutil.copy(layouts.EMBEDDED / "low_noise_model/lora.safetensors", high)
    shutil.copy(layouts.EMBEDDED / "high_noise_model/config.json", high)
    quick, whole = layouts.find("tiny:quick"), layouts.find("tiny")
    assert quick.experts["high"].files == whole.experts["high"].files
    assert quick.experts["high"].loras == ((high / "lora.safetensors", 1.0),)
    assert (quick.text, quick.vae, quick.tokenizer) == (whole.text, whole.vae, whole.tokenizer)
    assert quick.fingerprint() != whole.fingerprint()
    assert [f.preset().steps for f in (quick, whole)] == [4, 20]
    assert quick.preset("tiny").steps == 20
    again = layouts.find("tiny:quick", lora={"high": whole.experts["low"].loras[0][0]})
    assert len(again.experts["high"].loras) == 2

    told = json.loads((high / "config.json").read_text())
    for given, causal in ((True, True), (False, False)):
        (high / "config.json").write_text(json.dumps(told | {"frame_causal": given}))
        assert layouts.find("tiny:quick").experts["high"].config.frame_causal == causal
    (high / "config.json").write_text(json.dumps(told | {"frame_causal": "yes"}))
    with pytest.raises(MinicosError, match="says frame_causal 'yes', no bool"):
        layouts.find("tiny:quick")


# -- sampling settings in a diffusers folder -------------------------------------------------------


def says(folder, shift=None, boundary=None):
    (folder / "scheduler").mkdir(exist_ok=True)
    config = {} if shift is None else {"flow_shift": shift}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
    return folder


def test_what_a_folder_states_is_read_and_noted_where_it_differs(tmp_path):
    assert stated(tmp_path, 2) == {}
    assert stated(says(tmp_path, 3.0, 0.9), 2) == {"shift": 3.0, "boundary": 0.9}
    assert stated(tmp_path, 1) == {"shift": 3.0}
    (note,) = departures("Wan2.2-I2V-A14B", {"shift": 3.0, "boundary": 0.9})
    assert (
        note
        == "the folder states shift 3 (the preset has 5.0); the preset wins, --preset diffusers does not"
    )
    assert departures("Wan2.2-I2V-A14B", {"shift": 5.0, "boundary": 0.9}) == ()


@pytest.mark.parametrize("value", [0, -3, math.nan, math.inf, True, "5", [5]])
def test_a_shift_that_is_none_is_refused_by_file_and_key(value, tmp_path):
    with pytest.raises(MinicosError, match=r"scheduler_config\.json"):
        stated(says(tmp_path, value), 1)


@sparse
def test_the_preset_of_a_diffusers_folder_follows_it(tmp_path):
    write_diffusers(tmp_path, "Wan2.2-I2V-A14B")
    plain = find(tmp_path, variant="Wan2.2-I2V-A14B")
    with pytest.raises(MinicosError, match="no scheduler"):
        plain.preset("diffusers")
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"boundary_ratio": 0.85}
    says(tmp_path, 3.0)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    layout = find(tmp_path, variant="Wan2.2-I2V-A14B")
    assert layout.preset() == config.get_preset("Wan2.2-I2V-A14B")
    assert layout.preset("diffusers") == layout.preset().changed(shift=3.0, boundary=0.85)
    assert any("the folder states shift 3" in note for note in layout.notes)
