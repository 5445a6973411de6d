"""Files as published: LoRAs, quantised and merged checkpoints, relatives of Wan, and
networks of any size.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minicos.config import TINY_TEXT, VAEConfig
from minicos.dit import DiT
from minicos.errors import MinicosError
from minicos.open import load
from minicos.text import TextEncoder
from minicos.tiny import tokenizer
from minicos.vae import VAE
from minicos.weights import layouts, lora
from minicos.weights.header import read_header, weight_files
from minicos.weights.inspect import describe, inspect
from minicos.weights.load import load_into
from minicos.weights.names import DIT_DIFFUSERS, translate
from tests.fuzz_files import DIT, VAE_CONFIG

DRAW = torch.Generator()
Q = "blocks.0.self_attn.q"


def rand(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=DRAW.manual_seed(sum(shape)))


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: tensor.detach() for name, tensor in DiT(DIT).state_dict().items()}


def merged(network, path, **options) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each parameter."""
    with torch.device("meta"):
        dit = DiT(DIT)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.items()}
    save_file(network, base := path.with_name("base.safetensors"))
    load_into(dit, base, lora=lora.read(path, **options).fitted(shapes))
    added = {name: tensor - network[name] for name, tensor in dit.state_dict().items()}
    return {name: tensor for name, tensor in added.items() if tensor.any()}


def pair(module: str, a: str = "lora_down", b: str = "lora_up", rank: int = 2) -> dict:
    return {f"{module}.{a}.weight": rand(rank, 24), f"{module}.{b}.weight": rand(24, rank)}


def product(tensors: dict) -> torch.Tensor:
    down, up = tensors.values()
    return up @ down


# -- LoRAs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        *("diffusion_model.blocks.0.self_attn.q", "module.blocks.0.self_attn.q"),
        *("_orig_mod.blocks.0.self_attn.q", "blocks.0._orig_mod.self_attn.q"),
        *("pipe.dit.blocks.0.self_attn.q", "transformer.blocks.0.attn1.to_q"),
        *("lora_unet_blocks_0_self_attn_q", "lora_unet__blocks_0_attn1_to_q"),
        *("lora_transformer_blocks_0_attn1_to_q", "lycoris_blocks_0_self_attn_q"),
        *("base_model.model.transformer.blocks.0.attn1.to_q", "transformer_1.blocks.0.attn1.to_q"),
        *("lora_unet_blocks_0.self_attn.q", "lora_unet_diffusion_model_blocks_0_self_attn_q"),
        *("lycoris_transformer_blocks_0_attn1_to_q", "blocks.0.attn1.to_q.weight", f"wan.{Q}"),
    ],
)
def test_spellings_of_a_module(network, module, tmp_path):
    for ends in (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_A.x", "lora_B.x")):
        tensors = pair(module, *ends)
        save_file(tensors, path := tmp_path / "lora.safetensors")
        added = merged(network, path)
        assert set(added) == {f"{Q}.weight"}
        assert torch.allclose(added[f"{Q}.weight"], product(tensors), atol=1e-7)


def test_an_image_branch_that_the_network_lacks_is_left_out_and_counted(network, tmp_path):
    tensors = pair(f"diffusion_model.{Q}") | pair("diffusion_model.blocks.0.cross_attn.k_img")
    tensors |= {"diffusion_model.img_emb.proj.0.diff_b": rand(24)}
    tensors |= {"diffusion_model.blocks.1.cross_attn.norm_k_img.diff": rand(24)}
    save_file(tensors, path := tmp_path / "lora.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.items()}
    fitted = lora.read(path).fitted(shapes)
    assert set(fitted.deltas) == {f"{Q}.weight"}
    told = str(lora.Applied.of("high", fitted))
    assert "3 changes of an image branch that this network lacks" in told
    assert "(cross_attn.k_img, cross_attn.norm_k_img, img_emb)" in told  # as in the file
    save_file(pair("diffusion_model.blocks.7.self_attn.q"), path)
    with pytest.raises(MinicosError, match=r"blocks\.7\.self_attn\.q.*which this network lacks"):
        lora.read(path).fitted(shapes)


def test_biases_and_whole_differences(network, tmp_path):
    biased = pair("transformer.blocks.0.attn1.to_q", "lora_A", "lora_B")
    biased["transformer.blocks.0.attn1.to_q.lora_B.bias"] = rand(24)
    whole = {
        "blocks.0.modulation.diff": rand(1, 6, 24),
        "head.diff_m": rand(1, 2, 24),
        "blocks.1.norm3.diff": rand(24),
        "blocks.1.norm3.w_norm": rand(24),
        "transformer.blocks.1.scale_shift_table.diff": rand(1, 6, 24),
        "patch_embedding.diff_b": rand(24),
    }
    del whole["blocks.1.norm3.w_norm"]
    save_file(biased | whole, path := tmp_path / "lora.safetensors")
    added = merged(network, path, strength=0.5)
    expected = {
        f"{Q}.weight": product(dict(list(biased.items())[:2])),
        f"{Q}.bias": biased["transformer.blocks.0.attn1.to_q.lora_B.bias"],
        "blocks.0.modulation": whole["blocks.0.modulation.diff"],
        "head.modulation": whole["head.diff_m"],
        "blocks.1.norm3.weight": whole["blocks.1.norm3.diff"],
        "blocks.1.modulation": whole["transformer.blocks.1.scale_shift_table.diff"],
        "patch_embedding.bias": whole["patch_embedding.diff_b"],
    }
    assert set(added) == set(expected)
    for name, change in expected.items():
        assert torch.allclose(added[name], 0.5 * change, atol=1e-6), name


def test_alpha_for_each_layer(network, tmp_path):
    """alpha / rank from an alpha next to the matrices, from metadata with patterns, and from
    PEFT's adapter_config.json.
    """
    q, k = "transformer.blocks.0.attn1.to_q", "transformer.blocks.0.attn1.to_k"
    tensors = pair(q, "lora_A", "lora_B", 2) | pair(k, "lora_A", "lora_B", 4)
    about = {"r": 4, "lora_alpha": 8, "rank_pattern": {"blocks.0.attn1.to_q": 2}}
    plain = {
        "q": product({n: t for n, t in tensors.items() if n.startswith(q)}),
        "k": product({n: t for n, t in tensors.items() if n.startswith(k)}),
    }
    for pattern in ("blocks.0.attn1.to_q", "^blocks\\.0\\.attn1\\.to_q$", "to_q"):
        given = about | {"alpha_pattern": {pattern: 1}}
        metadata = {
            "lora_adapter_metadata": json.dumps({f"transformer.{n}": v for n, v in given.items()})
        }
        save_file(tensors, path := tmp_path / "lora.safetensors", metadata)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(given))
        for file in (path, tmp_path / "adapter_model.safetensors"):
            added = merged(network, file)
            assert torch.allclose(added[f"{Q}.weight"], 0.5 * plain["q"], atol=1e-7)
            assert torch.allclose(added["blocks.0.self_attn.k.weight"], 2 * plain["k"], atol=1e-7)
    for name in ("alpha", "lora_alpha", "network_alpha"):  # next to the matrices
        beside = {f"{q}.{name}": torch.tensor(1.0), f"{q}.lora_rank": torch.tensor(2)}
        save_file(tensors | beside, path)
        assert torch.allclose(merged(network, path)[f"{Q}.weight"], 0.5 * plain["q"], atol=1e-7)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(about | {"use_rslora": True})})
    assert torch.allclose(merged(network, path)[f"{Q}.weight"], 8 / 2**0.5 * plain["q"], atol=1e-6)


def test_convolutions_and_products_of_other_forms(network, tmp_path):
    patch = {
        "patch_embedding.lora_down.weight": rand(2, 36, 1, 2, 2),
        "patch_embedding.lora_up.weight": rand(24, 2, 1, 1, 1),
    }
    loha = {
        f"{Q}.hada_w1_a": rand(24, 2),
        f"{Q}.hada_w1_b": rand(2, 24),
        f"{Q}.hada_w2_a": rand(24, 3),
        f"{Q}.hada_w2_b": rand(3, 24),
        f"{Q}.alpha": torch.tensor(4.0),
    }
    k, v = "lycoris_blocks_0_self_attn_k", "lora_unet_blocks_0_self_attn_v"
    lokr = {
        f"{k}.lokr_w1": rand(4, 4),
        f"{k}.lokr_w2_a": rand(6, 2),
        f"{k}.lokr_w2_b": rand(2, 6),
        f"{k}.alpha": torch.tensor(1.0),
        f"{v}.lokr_w1": rand(3, 3),
        f"{v}.lokr_w2": rand(8, 8),
    }
    save_file(patch | loha | lokr, path := tmp_path / "lora.safetensors")
    added = merged(network, path)
    down, up = patch.values()
    a, b, c, d, _ = loha.values()
    expected = {
        "patch_embedding.weight": torch.einsum(
            "or...,r...->o...", up[:, :, 0, 0, 0], down.flatten(1)
        ).view(24, 36, 1, 2, 2),
        f"{Q}.weight": 2 * (a @ b) * (c @ d),
        "blocks.0.self_attn.k.weight": 0.5
        * torch.kron(lokr[f"{k}.lokr_w1"], lokr[f"{k}.lokr_w2_a"] @ lokr[f"{k}.lokr_w2_b"]),
        "blocks.0.self_attn.v.weight": torch.kron(lokr[f"{v}.lokr_w1"], lokr[f"{v}.lokr_w2"]),
    }
    assert set(added) == set(expected)
    for name, change in expected.items():
        assert torch.allclose(added[name], change, atol=1e-6), name
    found = inspect(path)
    assert (found.variant, found.layout) == ("LoRA", "lora:lycoris")
    assert {"a LoRA of the form LoKr", "a LoRA of the form LoHa"} <= set(found.notes)


@pytest.mark.parametrize(
    ("first", "second", "dot"),
    [
        ("transformer.", "transformer_2.", "."),
        ("diffusion_model.transformer_1.", "diffusion_model.transformer_2.", "."),
        ("lora_transformer_", "lora_transformer_2_", "_"),
    ],
)
def test_a_file_for_both_experts(network, first, second, dot, tmp_path):
    q, k = (f"blocks.0.attn1.to_{x}".replace(".", dot) for x in "qk")
    high, low = pair(first + q, "lora_A", "lora_B"), pair(second + k, "lora_A", "lora_B")
    save_file(high | low, path := tmp_path / "lora.safetensors")
    assert set(merged(network, path)) == {f"{Q}.weight"}
    assert set(merged(network, path, expert="low")) == {"blocks.0.self_attn.k.weight"}
    assert "2 tensors for the low-noise expert" in lora.read(path).notes[0]
    assert any("both experts" in note for note in inspect(path).notes)
    save_file(low, path)
    with pytest.raises(MinicosError, match=r"for the low-noise expert.*--lora low=FILE"):
        lora.read(path)


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "safetensors"])
def test_tensors_in_a_pickle(network, ending, tmp_path):
    """By content, not by name; wrapped in the tables that programs use."""
    tensors = pair(f"diffusion_model.{Q}")
    for content in (
        tensors,
        {"state_dict": tensors, "step": 3},
        {"generator": pair("x"), "generator_ema": tensors},
    ):
        torch.save(content, path := tmp_path / f"lora.{ending}")
        assert set(merged(network, path)) == {f"{Q}.weight"}
        assert inspect(path).variant == "LoRA"


@pytest.mark.parametrize(
    ("piece", "named"),
    [
        ({f"{Q}.lora_magnitude_vector": (24,)}, "DoRA"),
        ({f"{Q}.dora_scale": (24, 1)}, "DoRA"),
        ({"patch_embedding.reshape_weight": (5,)}, "control LoRA"),
        ({f"{Q}.oft_blocks": (2, 2, 2)}, "OFT"),
        ({f"{Q}.lora_mid.weight": (2, 2)}, "LoRA in Tucker form"),
        ({f"{Q}.lora_down.weight_scale": (1,)}, "quantised LoRA"),
        ({f"{Q}.lora_up.scale_weight": (1,)}, "quantised LoRA"),
        ({f"{Q}.{side}.weight": (2, 2) for side in ("a1", "a2", "b1", "b2")}, "GLoRA"),
        ({f"{Q}.on_input": (1,)}, "IA3"),
        ({f"{Q}.boft_R": (2, 2, 2, 2)}, "BOFT"),
        ({f"{Q}.lora_E": (2, 1)}, "AdaLoRA"),
        ({f"{Q}.bone_block": (2, 24)}, "MiSS"),
        ({f"base_model.model.{Q}.base_layer.weight": (24, 24)}, "set of whole weights"),
        ({"transformer.proj_out.bias": (64,)}, "set of whole weights"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_kinds_that_are_not_read_are_named(piece, named, alone, tmp_path):
    if alone and named in ("DoRA", "set of whole weights", "AdaLoRA"):
        pytest.skip("these come with a LoRA")
    tensors = {name: torch.ones(shape) for name, shape in piece.items()}
    save_file(tensors | ({} if alone else pair(Q)), path := tmp_path / "a.safetensors")
    with pytest.raises(
        MinicosError, match=rf"a\.safetensors is an? {named}.*Merge it into the model"
    ):
        lora.read(path)
    assert any(named in note for note in inspect(path).notes)
    assert inspect(path).variant == named


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: pair(Q) | {f"{Q}.alpha": torch.tensor(0.0)}, r"alpha of blocks\.0.* is 0\.0, not"),
        (lambda: pair(Q, rank=0), "ranks differ or are 0"),
        (lambda: {f"{Q}.lora_down.weight": rand(24, 2), f"{Q}.lora_up.weight": rand(2, 24)}, "is "),
    ],
)
def test_a_lora_that_would_change_nothing_or_something_else(network, change, says, tmp_path):
    save_file(change(), path := tmp_path / "a.safetensors")
    with pytest.raises(MinicosError, match=rf"a\.safetensors.*{says}"):
        merged(network, path)


def test_alphas_of_both_experts_in_the_metadata_of_one_file(network, tmp_path):
    """Each is for the keys with its own prefix; one alone is for both."""
    high = pair("transformer.blocks.0.attn1.to_q", "lora_A", "lora_B")
    low = pair("transformer_2.blocks.0.attn1.to_q", "lora_A", "lora_B")
    alphas = {"transformer.lora_alpha": 1, "transformer_2.lora_alpha": 8}
    metadata = {"lora_adapter_metadata": json.dumps(alphas)}
    save_file(high | low, path := tmp_path / "a.safetensors", metadata)
    for expert, tensors, scale in (("high", high, 0.5), ("low", low, 4.0)):
        added = merged(network, path, expert=expert)[f"{Q}.weight"]
        assert torch.allclose(added, scale * product(tensors), atol=1e-6)
    save_file(high, path, {"lora_adapter_metadata": '{"transformer.lora_alpha": 1}'})
    added = merged(network, path, expert="low")[f"{Q}.weight"]
    assert torch.allclose(added, 0.5 * product(high), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("diffusion_model.vace_blocks.0.self_attn.q", "Wan-VACE"),
        ("diffusion_model.face_adapter.fuser_blocks.0.linear1_kv", "Wan2.2-Animate"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "a pipeline with a text encoder"),
        ("text_encoder.encoder.block.0.layer.0.SelfAttention.q", "a pipeline with a text encoder"),
    ],
)
def test_a_lora_that_is_also_for_something_else(network, module, what, tmp_path):
    save_file(pair(f"diffusion_model.{Q}") | pair(module), path := tmp_path / "a.safetensors")
    with pytest.raises(MinicosError, match=rf"a\.safetensors changes .*, a part of {what}"):
        merged(network, path)


def test_a_key_of_a_relative_is_named_by_the_relative(tmp_path):
    save_file(pair(Q) | {"dwpose_embedding.0.weight": rand(2, 2)}, path := tmp_path / "a.pt")
    with pytest.raises(MinicosError, match=r"'dwpose_embedding\.0\.weight' is of UniAnimate"):
        lora.read(path)
    assert any("parts of UniAnimate" in note for note in inspect(path).notes)


@pytest.mark.parametrize("channels", [16, 36])
def test_a_lora_for_another_input_is_applied_but_for_its_input(network, channels, tmp_path):
    """Text-to-video LoRAs on image-to-video networks and the reverse, as ComfyUI does."""
    inputs = rand(24, channels, 1, 2, 2)
    tensors = pair(f"diffusion_model.{Q}") | {"diffusion_model.patch_embedding.diff": inputs}
    save_file(tensors, path := tmp_path / "a.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.items()}
    shapes["patch_embedding.weight"] = (24, 52 - channels, 1, 2, 2)
    fitted = lora.read(path).fitted(shapes)
    assert set(fitted.deltas) == {f"{Q}.weight"}
    (note,) = fitted.notes
    assert f"an input of another width ({channels} channels, not {52 - channels})" in note


def test_changes_of_convolutions_as_matrices(network, tmp_path):
    """As LyCORIS writes them: kernels flattened."""
    draw = [rand(24, 2), rand(2, 144), rand(24, 2), rand(2, 144)]
    w1, a, b = rand(4, 4), rand(6, 2), rand(2, 36)
    pieces = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
    forms = {
        "LoRA": dict(zip(("lora_up.weight", "lora_down.weight"), draw[:2], strict=True)),
        "LoHa": dict(zip(pieces, draw, strict=True)),
        "LoKr": {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b},
        "diff": {"diff": rand(24, 144)},
    }
    expected = {
        "LoRA": draw[0] @ draw[1],
        "LoHa": (draw[0] @ draw[1]) * (draw[2] @ draw[3]),
        "LoKr": torch.kron(w1, a @ b),
        "diff": rand(24, 144),
    }
    for form, tensors in forms.items():
        named = {f"lycoris_patch_embedding.{piece}": value for piece, value in tensors.items()}
        save_file(named, path := tmp_path / "a.safetensors")
        added = merged(network, path)["patch_embedding.weight"]
        assert torch.allclose(added, expected[form].view(24, 36, 1, 2, 2), atol=1e-6), form


def test_loha_and_lokr_of_peft_have_their_alpha_next_to_them(network, tmp_path):
    """alpha / r, also for two whole matrices, unlike LyCORIS."""
    module = "base_model.model.blocks.0.attn1.to_q"
    a, b, c, d = rand(24, 2), rand(2, 24), rand(24, 2), rand(2, 24)
    w1, w2, low = rand(4, 4), rand(6, 6), (rand(6, 2), rand(2, 6))
    forms = [
        ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, (a @ b) * (c @ d)),
        ({"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)),
        (
            {"lokr_w1": w1, "lokr_w2_a": low[0], "lokr_w2_b": low[1]},
            torch.kron(w1, low[0] @ low[1]),
        ),
    ]
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOKR", "r": 2, "alpha": 8}')
    for tensors, change in forms:
        named = {f"{module}.{piece}": value.clone() for piece, value in tensors.items()}
        save_file(named, path := tmp_path / "adapter_model.safetensors")
        assert torch.allclose(merged(network, path)[f"{Q}.weight"], 4 * change, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "loftq"])
def test_a_lora_on_a_changed_model_is_refused(start, tmp_path):
    """These starts of training change the weights below the LoRA, too."""
    save_file(pair(f"base_model.model.{Q}"), path := tmp_path / "adapter_model.safetensors")
    about = {"r": 2, "lora_alpha": 2, "init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(MinicosError, match=rf"LoRA on a changed model \({start} in adapter_config"):
        lora.read(path)


def test_the_folder_of_a_lora(tmp_path):
    save_file(pair(Q), file := tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    assert layouts._with_strength((tmp_path, 0.5)) == (file, 0.5)
    save_file(pair(Q), tmp_path / "other.safetensors")
    with pytest.raises(MinicosError, match=r"holds several files .*Name the one you mean"):
        layouts._with_strength(tmp_path)


def test_a_control_lora_is_named_by_its_width(network, tmp_path):
    wide = {
        "patch_embedding.lora_down.weight": rand(2, 52, 1, 2, 2),
        "patch_embedding.lora_up.weight": rand(24, 2, 1, 1, 1),
    }
    save_file(wide, path := tmp_path / "a.safetensors")
    with pytest.raises(MinicosError, match=r"is a control LoRA: it widens .* to 52 channels"):
        merged(network, path)


# -- quantised checkpoints -------------------------------------------------------------------------


def quantised(network, dtype, axis=None, scale="weight_scale", value="weight"):
    """Matrices in a narrow dtype with factors; and the numbers that they stand for."""
    top = 127 if dtype == torch.int8 else 448
    stored, meant = {}, dict(network)
    for name, tensor in network.items():
        if tensor.ndim != 2 or not name.endswith(".weight"):
            stored[name] = tensor
            continue
        size = tensor.abs().amax(axis, keepdim=True) if axis else tensor.abs().max()
        factor = size.clamp(min=1e-12) / top
        narrow = tensor / factor
        narrow = (narrow.round() if dtype == torch.int8 else narrow).to(dtype)
        stem = name.removesuffix("weight")
        stored |= {f"{stem}{value}": narrow, f"{stem}{scale}": factor}
        meant[name] = narrow.float() * factor
    return stored, meant


def loaded(*files) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        dit = DiT(DIT)
    load_into(dit, files if len(files) > 1 else files[0])
    return dit.state_dict()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("axis", [None, 1], ids=["a matrix", "a row"])
@pytest.mark.parametrize(
    "names",
    [("weight_scale", "weight"), ("scale_weight", "weight"), ("weight._scale", "weight._data")],
)
def test_factors_of_a_matrix_or_a_row(network, dtype, axis, names, tmp_path):
    stored, meant = quantised(network, dtype, axis, *names)
    save_file(stored, path := tmp_path / "a.safetensors")
    assert all(torch.equal(tensor, meant[name]) for name, tensor in loaded(path).items())


def test_factors_in_another_shard_and_records(network, tmp_path):
    stored, meant = quantised(network, torch.float8_e4m3fn, 1)
    record = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    stored |= {
        name.replace("weight_scale", "comfy_quant"): record.clone()
        for name in stored
        if name.endswith("_scale")
    }
    halves = [
        {n: t for n, t in stored.items() if n.endswith("scale") == half} for half in (True, False)
    ]
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"{i}.safetensors")
    found = loaded(tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    assert all(torch.equal(tensor, meant[name]) for name, tensor in found.items())
    odd = bytearray(b'{"format": "float8_e4m3fn", "convrot": true}')
    halves[1]["blocks.0.ffn.0.comfy_quant"] = torch.frombuffer(odd, dtype=torch.uint8).clone()
    save_file(halves[1], tmp_path / "1.safetensors")
    with pytest.raises(MinicosError, match="says float8_e4m3fn, convrot of a matrix in F8_E4M3"):
        loaded(tmp_path / "0.safetensors", tmp_path / "1.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: {n: t for n, t in s.items() if not n.endswith("_scale")},
            r"integers \(I8\) and no factor",
        ),
        (
            lambda s: s | {f"{Q}.weight_scale": torch.ones(24, 3)},
            "one for each of its 24 rows, not one for a block",
        ),
        (lambda s: s | {f"{Q}.weight.absmax": torch.ones(3)}, "4-bit numbers of bitsandbytes"),
        (
            lambda s: s | {f"{Q}.weight.quant_state.bitsandbytes__nf4": torch.ones(3)},
            "4-bit nf4 of bitsandbytes",
        ),
        (lambda s: s | {f"{Q}.weight_scale_2": torch.ones(1)}, "4-bit nvfp4"),
        (lambda s: s | {f"{Q}.W_q": torch.ones(1)}, "numbers of HQQ"),
        (lambda s: s | {f"{Q}.weight_qdata": torch.ones(1)}, "numbers of torchao"),
        (lambda s: s | {f"{Q}._weight_qdata": torch.ones(1)}, "numbers of torchao"),
        (lambda s: s | {f"{Q}.weight_codebook": torch.ones(16)}, "4-bit numbers of ComfyUI"),
        (lambda s: s | {f"{Q}.int8_weight": torch.ones(1)}, "8-bit numbers of TurboDiffusion"),
        (lambda s: s | {f"{Q}.weight_scale": torch.ones(24, 1).to(torch.uint8)}, "factors in U8"),
        (lambda s: s | {f"{Q}.weight._shift": torch.ones(24, 1)}, "numbers with an offset"),
        (
            lambda s: s | {f"{Q}.comfy_quant": torch.tensor([*b'{"format":"float8_e5m2"}']).byte()},
            "says float8_e5m2 of a matrix in I8",
        ),
    ],
)
def test_what_is_not_read_is_named(network, change, says, tmp_path):
    stored, _ = quantised(network, torch.int8, 1)
    save_file(change(stored), path := tmp_path / "a.safetensors")
    with pytest.raises(MinicosError, match=says):
        loaded(path)
    bits = says.split()[0] in ("4-bit", "8-bit", "numbers")  # told by names alone
    assert (says in inspect(path).variant) == bits


def test_records_of_comfyui_in_tensors_and_in_the_metadata(network, tmp_path):
    """What changes no number is accepted; rotated numbers would silently be others."""
    stored, plain = quantised(network, torch.int8, 1)
    usual = {"format": "int8_tensorwise", "per_row": True, "orig_shape": [24, 24], "convrot": False}
    rotated = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    for record, opens in ((usual, True), (rotated, False)):
        text = torch.tensor([*json.dumps(record).encode()]).byte()
        save_file(stored | {f"{Q}.comfy_quant": text}, inside := tmp_path / "a.safetensors")
        about = json.dumps({"format_version": "1.0", "layers": {Q: record}})
        metadata = {"_quantization_metadata": about}
        save_file(stored, beside := tmp_path / "b.safetensors", metadata)
        for path in (inside, beside):
            if opens:
                read = loaded(path)
                assert torch.equal(read[f"{Q}.weight"], plain[f"{Q}.weight"])
            else:
                with pytest.raises(MinicosError, match=r"q\.comfy_quant says .*convrot"):
                    loaded(path)
    for broken in ("{", '{"layers": [1]}', '{"layers": {"a": 1}}'):
        save_file(stored, path := tmp_path / "c.safetensors", {"_quantization_metadata": broken})
        with pytest.raises(MinicosError, match="damaged record _quantization_metadata"):
            loaded(path)


def test_shards_without_their_index(network, tmp_path):
    """All of them are read: to name one of them would not help."""
    names = list(network)
    for i, part in enumerate((names[::2], names[1::2])):
        tensors = {name: network[name] for name in part}
        save_file(tensors, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    read = loaded(*sorted(tmp_path.iterdir()))
    assert all(torch.equal(read[name], network[name]) for name in names)
    assert set(weight_files(tmp_path)) == set(tmp_path.iterdir())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with torch.device("meta"):
        dit = DiT(DIT)
    with pytest.raises(MinicosError, match="Is a file incomplete or forgotten"):
        load_into(dit, tmp_path)


def test_a_matrix_without_the_factor_that_others_have(network, tmp_path):
    stored, _ = quantised(network, torch.float8_e4m3fn)
    del stored[f"{Q}.weight_scale"]
    save_file(stored, path := tmp_path / "a.safetensors")
    with pytest.raises(
        MinicosError, match=r"F8_E4M3 without a factor, and other matrices have one"
    ):
        loaded(path)


# -- files of several networks, indices, relatives -------------------------------------------------


@pytest.fixture(scope="module")
def parts(network):
    """The tensors of a small model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, text = VAE(VAE_CONFIG), TextEncoder(replace(TINY_TEXT, num_layers=2))
    return {"dit": network, "vae": vae.state_dict(), "text": text.state_dict()}


def config_beside(folder, **more):
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": 16, **more}))
    tokenizer.build().save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_an_all_in_one_file_opens(parts, tmp_path):
    starts = {
        "dit": "model.diffusion_model.",
        "vae": "vae.",
        "text": "text_encoders.umt5xxl.transformer.",
    }
    tensors = {starts[p] + n: t.clone() for p, some in parts.items() for n, t in some.items()}
    save_file(
        tensors, path := tmp_path / "all.safetensors", {"config": json.dumps(asdict(VAE_CONFIG))}
    )
    words = config_beside(tmp_path)
    wan = load(path, parts={"tokenizer": words}, device="cpu")
    for part, module in (("dit", wan.experts["high"]), ("vae", wan.vae), ("text", wan.text)):
        found = module.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in parts[part].items())
    assert "one file of several networks" in describe(inspect(path))
    del tensors["vae.conv1.weight"]
    save_file({n: t for n, t in tensors.items() if not n.startswith("vae.")}, path)
    with pytest.raises(MinicosError, match="comes without the VAE"):
        load(path, parts={"tokenizer": words}, device="cpu")
    with pytest.raises(
        MinicosError, match=r"holds several networks .* none for vae.*--part vae=FILE"
    ):
        load(path, parts={"tokenizer": words, "vae": path}, device="cpu")


PREFIXES = (
    *("transformer.", "dit.", "pipe.dit.", "model.", "module.", "_orig_mod.", "diffusion_model."),
    *("model.diffusion_model.", "module._orig_mod.", "_forward_module.", "generator_ema.", "ema."),
    *("base_model.model.", "student.", "net.", "high_noise_model.", "model.wan_model."),
)


@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_prefixes_of_a_whole_checkpoint(network, names, tmp_path):
    config_beside(tmp_path)
    diffusers = {translate(name, DIT_DIFFUSERS): tensor for name, tensor in network.items()}
    tensors = network if names == "official" else diffusers
    for start in PREFIXES:
        save_file({start + n: t for n, t in tensors.items()}, path := tmp_path / "a.safetensors")
        assert inspect(path).variant == "like Wan2.2-I2V-A14B", start
        assert layouts.dit_config(path) == DIT
        assert all(torch.equal(t, network[n]) for n, t in loaded(path).items())
    save_file({f"critic.{n}": t for n, t in tensors.items()}, path)
    with pytest.raises(MinicosError, match=r"known here \(the name of a tensor: critic\."):
        layouts.dit_config(path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer.", "transformer_2."),
        ("pipe.dit.", "pipe.dit2."),
        ("high_noise_model.", "low_noise_model."),
    ],
)
def test_both_experts_in_one_file(parts, first, second, tmp_path):
    """Alone, and with the rest of a pipeline; and the low-noise one alone, which its keys name."""
    other = {name: tensor + 1 for name, tensor in parts["dit"].items()}
    tensors = {first + n: t for n, t in parts["dit"].items()}
    tensors |= {second + n: t for n, t in other.items()}
    rest = {"vae": ("vae.", "vae"), "text": ("text_encoder.", "t5")}
    given: dict = {"tokenizer": config_beside(tmp_path)}
    about = {"config": json.dumps(asdict(VAE_CONFIG))}
    for part, (_, name) in rest.items():
        save_file(parts[part], tmp_path / f"{name}.safetensors", about)
    beside = {part: tmp_path / f"{name}.safetensors" for part, (_, name) in rest.items()}
    within = {start + n: t for part, (start, _) in rest.items() for n, t in parts[part].items()}
    path = tmp_path / "all.safetensors"
    for content, named in ((tensors, given | beside), (tensors | within, given)):
        save_file({n: t.clone() for n, t in content.items()}, path, about)
        wan = load(path, parts=named, device="cpu")
        for expert, meant in (("high", parts["dit"]), ("low", other)):
            found = wan.experts[expert].state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in meant.items())
        found = inspect(path)
        assert (found.expert, found.tensors) == ("high and low", 2 * len(other))
        assert found.bytes == path.stat().st_size
    save_file({n: t for n, t in tensors.items() if n.startswith(second)}, path)
    assert set(layouts.places(path)[1]) >= {"low"}


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("vace_blocks.0.before_proj.weight", "Wan-VACE"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Wan2.2-Animate"),
        ("casual_audio_encoder.encoder.conv1_local.conv.weight", "Wan2.2-S2V"),
        ("control_adapter.conv.weight", "Wan-Fun-Camera"),
        ("ref_conv.weight", "Wan-Fun-Control"),
        ("blocks.0.audio_cross_attn.q_linear.weight", "a speaking Wan"),
        ("blocks.0.to_gate_compress.weight", "a Wan with video sparse attention"),
        ("blocks.0.self_attn.local_attn.proj_l.weight", "a Wan with sparse and linear"),
        ("blocks.0.cam_encoder.weight", "ReCamMaster"),
        ("blocks.0.cross_attn.ip_adapter.to_k_ip.weight", "a Wan with an adapter of pictures"),
        ("motion_encoder.enc.fc.0.weight", "Wan2.2-Animate"),
        ("cond_encoder.weight", "Wan2.2-S2V"),
    ],
)
@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_relatives_of_wan_are_named(network, start, name, names, tmp_path):
    if names == "diffusers":
        network = {translate(name, DIT_DIFFUSERS): tensor for name, tensor in network.items()}
    save_file(network | {start: rand(3)}, path := tmp_path / "a.safetensors")
    assert inspect(path).variant.startswith(name)
    assert "not complete" not in describe(inspect(path))
    with pytest.raises(MinicosError, match=rf"a\.safetensors is {name}"):
        layouts.dit_config(path)


def test_a_control_network_is_told_by_its_inputs(network, tmp_path):
    wide = network | {"patch_embedding.weight": rand(24, 52, 1, 2, 2)}
    save_file(wide, path := tmp_path / "a.safetensors")
    config_beside(tmp_path)
    with pytest.raises(MinicosError, match=r"takes 52 input channels.*Wan-Fun-Control"):
        layouts.dit_config(path)
    assert any("Wan-Fun-Control" in note for note in inspect(path).notes)


@pytest.mark.parametrize(
    "names",
    [
        (
            "diffusion_pytorch_model.safetensors.index.json",
            "diffusion_pytorch_model-{}.safetensors",
        ),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-{}.safetensors",
        ),
        (
            "diffusion_pytorch_model.fp16.safetensors.index.json",
            "diffusion_pytorch_model.fp16-{}.safetensors",
        ),
    ],
)
def test_indices_of_variants_and_the_index_given_as_the_model(network, names, tmp_path):
    index, shard = names
    files = {name: shard.format(f"{1 + i % 2:05}-of-00002") for i, name in enumerate(network)}
    for file in set(files.values()):
        save_file({n: t for n, t in network.items() if files[n] == file}, tmp_path / file)
    (tmp_path / index).write_text(json.dumps({"weight_map": files}))
    for source in (tmp_path, tmp_path / index):
        assert len(weight_files(source)) == 2
        assert all(torch.equal(t, network[n]) for n, t in loaded(source).items())
    save_file(network, tmp_path / "diffusion_pytorch_model.safetensors")
    if "fp16" in index:  # the plain file comes before a variant
        assert [*weight_files(tmp_path)] == [tmp_path / "diffusion_pytorch_model.safetensors"]


NAMES = {  # common names of the files of the two experts
    "high": (
        *(
            "wan2.2_i2v_high_noise_14B_fp16",
            "Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ",
            "lora_high",
        ),
        *(
            "Wan22-I2V-HighNoise-Q8",
            "Wan2.2-Highnoise",
            "wan22_HIGHNOISE",
            "high_noise_model",
            "H-wan",
        ),
        *(
            "wan2.2 high noise",
            "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step",
            "WAN22-HN_v1",
        ),
        *("wan_hn_v1", "wan_h_noise", "Hnoise_wan", "wan-hi-noise"),
        *("wan_14B_H", "wan22High", "HIGH-720p", "Wan2.2-Lightning_I2V-A14B-4steps-lora_HIGH_fp16"),
    ),
    "low": (
        *("wan2.2_i2v_low_noise_14B_fp16", "Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ", "lora_low"),
        *("wan22I2VLowNoise", "Wan2.2-Lownoise", "wan22_LOWNOISE", "low_noise_model", "L-wan"),
        *(
            "wan2.2 low noise",
            "wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step",
            "WAN22-LN_v1",
        ),
        *(
            *("wan_ln_v1", "wan_l_noise", "Lnoise_wan", "wan-lo-noise"),
            "wan22_L-e4m3fn",
            "wan22Low",
            "LOW-720p",
            "Wan2.2-Lightning_I2V-A14B-4steps-lora_LOW_fp16",
        ),
    ),
    None: (
        *(
            "low_vram_wan",
            "wan_low_rank",
            "wan_high_low",
            "highlights",
            "clip_vision_h",
            "wan_H100",
        ),
        *("below", "wan_L40_fp8", "High-res", "Wan2.1-I2V-14B", "low_fps", "wanHD", "slow-motion"),
        *("模型", "._-", "high_heels", "high-motion", "low_cut", "wan_h_14B", "wan_hi", "lo_fi"),
    ),
}


@pytest.mark.parametrize(
    ("expert", "name"), [(e, name) for e, many in NAMES.items() for name in many]
)
def test_names_that_claim_an_expert(name, expert, tmp_path):
    assert layouts.claim(tmp_path / "models" / f"{name}.safetensors") == expert
    for folder in ("high_noise_model", "HighNoise", "HIGH"):  # if the name itself does not tell
        there = layouts.claim(tmp_path / folder / f"{name}.safetensors")
        assert there == expert or (expert is None and there in ("high", None))
    assert layouts.claim(Path(name)) == expert  # a folder, or a name without an ending


@pytest.mark.parametrize("expert", ["high", "low"])
def test_experts_and_loras_whose_names_claim_the_other_side_are_noted(expert, tmp_path):
    other = "low" if expert == "high" else "high"
    (network,) = weight_files(layouts.locate("tiny") / "high_noise_model")
    save_file(pair(Q, rank=2), tmp_path / "lora")
    content = bytearray(network.read_bytes())
    content[-1] ^= 1
    (tmp_path / "second").write_bytes(content)

    def noted(name: str, **given) -> bool:
        said = f"{name} is used for {expert} noise, and its name says {other} noise"
        return any(said in note for note in layouts.find("tiny", **given).notes)

    for name in NAMES[other]:
        (path := tmp_path / f"{name}-lora.safetensors").symlink_to("lora")
        assert noted(path.name, lora={expert: [path]})
        assert not noted(path.name, lora={other: [path]})
        (path := tmp_path / f"{name}.safetensors").symlink_to(network)
        assert noted(path.name, parts={expert: path, other: tmp_path / "second"})
        assert not noted(path.name, parts={other: path, expert: tmp_path / "second"})


# -- networks of any size --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "like"),
    [
        ({}, "like Wan2.2-I2V-A14B"),
        ({"in_dim": 16}, "like Wan2.1-T2V-14B"),
        ({"in_dim": 8, "out_dim": 8}, "like Wan2.1-T2V-14B"),
        ({"image_tokens": 257, "image_dim": 16}, "like Wan2.1-I2V-14B"),
        ({"image_tokens": 514, "image_dim": 16}, "like Wan2.1-FLF2V-14B"),
        ({"num_layers": 3, "text_dim": 40, "freq_dim": 32}, "like Wan2.2-I2V-A14B"),
    ],
)
@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_a_network_of_any_size(change, like, names, tmp_path):
    cfg = replace(DIT, **change)
    tensors = DiT(cfg).state_dict()
    key = "num_heads" if names == "official" else "num_attention_heads"
    if names == "diffusers":
        tensors = {translate(name, DIT_DIFFUSERS): tensor for name, tensor in tensors.items()}
    save_file(tensors, path := tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({key: 2, "text_len": 16}))
    assert layouts.dit_config(path) == cfg
    assert layouts.dit_config(tmp_path) == cfg
    assert inspect(path).variant == like
    stated = {key: 2, "text_len": 16, "num_layers": cfg.num_layers + 1}
    (tmp_path / "config.json").write_text(json.dumps(stated))  # the last block is missing
    with pytest.raises(MinicosError, match=rf"says num_layers {cfg.num_layers + 1}, and this net"):
        layouts.dit_config(path)
    stated = {key: 2, "text_len": 16, "window_size": [3, 3]}  # local attention
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(
        MinicosError, match=r"window_size \[3, 3\], and this network has \[-1, -1\]"
    ):
        layouts.dit_config(path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MinicosError, match=r"width 24 needs a config\.json .* heads"):
        layouts.dit_config(path)


def test_a_whole_model_of_any_size_samples(parts, tmp_path):
    save_file(parts["dit"], tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(parts["vae"], vae := tmp_path / "Wan2.1_VAE.safetensors")
    save_file(parts["text"], text := tmp_path / "t5.safetensors")
    words = config_beside(tmp_path)
    given = {"vae": vae, "text": text, "tokenizer": words}
    wan = load(tmp_path / "diffusion_pytorch_model.safetensors", parts=given, device="cpu")
    assert (wan.variant, wan.preset.solver) == ("like Wan2.2-I2V-A14B", "unipc")
    wan = wan.with_preset("cos").with_preset(steps=2)
    condition = wan.condition("solve the maze", torch.full((3, 32, 32), 0.5), frames=5)
    *_, last = wan.sample(condition, seed=0)
    assert last.next.isfinite().all()
    asked = load(tmp_path, parts=given, device="cpu", variant="VBVR-Wan2.2")
    assert (asked.variant, asked.preset.solver) == ("like VBVR-Wan2.2", "euler")
    with pytest.raises(MinicosError, match=r"has not the inputs of Wan2\.1-T2V-14B"):
        load(tmp_path, parts=given, device="cpu", variant="Wan2.1-T2V-14B")


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_tiny_random_model_saved_by_diffusers(image, tmp_path):
    """Built and saved there, opened here, and compared layer by layer."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from minicos.verify import verify

    torch.manual_seed(0)
    clip = {"image_dim": 32, "added_kv_proj_dim": 24} if image else {}
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36 if image else 16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=40,
        num_layers=2,
        **clip,
    )
    torch.nn.init.normal_(network.scale_shift_table)
    vae = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
    text = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=TINY_TEXT.vocab_size,
            d_model=32,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    network.save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    text.save_pretrained(tmp_path / "text_encoder")
    if image:
        tower = transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=224,
            patch_size=14,
        )
        transformers.CLIPVisionModel(tower).save_pretrained(tmp_path / "image_encoder")
    (tmp_path / "tokenizer").mkdir()
    tokenizer.build().save(str(tmp_path / "tokenizer/tokenizer.json"))
    assert layouts.dit_config(tmp_path).num_heads == 2
    wan = load(tmp_path, device="cpu")
    assert wan.variant == ("like Wan2.1-I2V-14B" if image else "like Wan2.1-T2V-14B")
    # In a VAE of four channels some norms are of almost nothing: 5.3e-5 at one place, 1.3e-6 in l2.
    found = list(verify(wan, grid=(2, 2, 2), tolerance=1e-5))
    assert {part.name for part in found} >= {"text", "high", "vae"}
    assert [(part.name, part.parted) for part in found if part.parted] == []


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("newer", [False, True])
def test_a_vae_of_any_size(blocks, newer, tmp_path):
    """Official names and those of diffusers, whose decoder counts its residual blocks in groups."""
    from minicos.weights.configs import vae_config
    from minicos.weights.names import vae_table

    cfg = VAEConfig(dim=2, dim_mult=(1, 1, 2, 2), num_res_blocks=blocks)
    if newer:
        cfg = replace(cfg, dec_dim=3, patch_size=2, stage_shortcuts=True)
    tensors = VAE(cfg).state_dict()
    table = vae_table(blocks, stages=newer)
    for names in (tensors, {translate(name, table): tensor for name, tensor in tensors.items()}):
        save_file(names, path := tmp_path / "a.safetensors")
        assert vae_config([read_header(path)]) == cfg
        with torch.device("meta"):
            vae = VAE(cfg)
        load_into(vae, path)
        assert all(torch.equal(t, tensors[n]) for n, t in vae.state_dict().items())


@pytest.mark.parametrize(
    "values", [[0.0] * 15, [0.0] * 16, [-1.0] + [1.0] * 15, ["1"] * 16, 5, [1e999] * 16]
)
def test_statistics_of_latents_are_checked(parts, values, tmp_path):
    from minicos.weights.configs import vae_config

    save_file(parts["vae"], path := tmp_path / "a.safetensors")
    with pytest.raises(
        MinicosError, match=r"a\.safetensors: the statistics of its latents \(std\)"
    ):
        vae_config([read_header(path)], {"latents_std": values})
    for config in (
        {"dim": 10**18},
        {"num_res_blocks": 10**9},
        {"dim_mult": []},
        {"patch_size": "x"},
    ):
        save_file(parts["vae"], path, {"config": json.dumps(asdict(VAE_CONFIG) | config)})
        with pytest.raises(MinicosError, match="its metadata say"):
            vae_config([read_header(path)])
