"""Names of parameters: the official ones, which minicos itself uses, and foreign ones, each a table with a layer slot.

A table maps official module paths to foreign ones; `{}` stands for the number of the layer. `translate` looks up a key
with or without its last word (`weight`, `bias`, `gamma`). A key that is in no table is an error, never a guess.
No torch here: `minicos inspect` uses these tables too.
"""

import re
from collections.abc import Callable, Iterable

from minicos.errors import MinicosError

# Put before the names of a network by ComfyUI and others; the last, in the files of transformers, before those of CLIP.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "vision_model.")
LEAVES = ("weight", "bias", "gamma")

# The diffusion transformer: official WanModel -> diffusers WanTransformer3DModel.
DIT_DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "blocks.{}.modulation": "blocks.{}.scale_shift_table",
    **{
        f"blocks.{{}}.{attention}.{official}": f"blocks.{{}}.{foreign}.{leaf}"
        for attention, foreign in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for official, leaf in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    },
    "blocks.{}.norm3": "blocks.{}.norm2",  # the affine norm before cross-attention; the other two have no parameters
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    # Wan2.1 image-to-video only:
    "blocks.{}.cross_attn.k_img": "blocks.{}.attn2.add_k_proj",
    "blocks.{}.cross_attn.v_img": "blocks.{}.attn2.add_v_proj",
    "blocks.{}.cross_attn.norm_k_img": "blocks.{}.attn2.norm_added_k",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}  # fmt: skip

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_RESAMPLE = {"resample.1": "resample.1", "time_conv": "time_conv"}
_ATTENTION = {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"}


def _under(official: str, foreign: str, leaves: dict[str, str]) -> dict[str, str]:
    return {f"{official}.{a}": f"{foreign}.{b}" for a, b in leaves.items()}


def decoder_layers(res_blocks: int) -> dict[str, str]:
    """The table of the decoder of a VAE of Wan2.1: official, one flat list; diffusers, groups with an upsampler at their end."""
    group = (
        res_blocks + 2
    )  # a decoder has one residual block more than the encoder, and the upsampler
    table: dict[str, str] = {}
    for i in range(4 * group - 1):
        foreign = f"decoder.up_blocks.{i // group}"
        last = i % group == group - 1
        inside = (
            (f"{foreign}.upsamplers.0", _RESAMPLE)
            if last
            else (f"{foreign}.resnets.{i % group}", _RESIDUAL)
        )
        table |= _under(f"decoder.upsamples.{i}", *inside)
    return table


# The VAEs: official WanVAE_ -> diffusers AutoencoderKLWan. What both generations share:
_VAE = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        a: b
        for side in ("encoder", "decoder")
        for a, b in {
            f"{side}.conv1": f"{side}.conv_in",
            **_under(f"{side}.middle.0", f"{side}.mid_block.resnets.0", _RESIDUAL),
            **_under(f"{side}.middle.1", f"{side}.mid_block.attentions.0", _ATTENTION),
            **_under(f"{side}.middle.2", f"{side}.mid_block.resnets.1", _RESIDUAL),
            f"{side}.head.0": f"{side}.norm_out",
            f"{side}.head.2": f"{side}.conv_out",
        }.items()
    },
}
# Wan2.1 and Wan2.2-A14B. The encoder's flat list keeps its numbers; the decoder's flat list of 15 becomes four groups of
# three residual blocks, with an upsampler between them.
VAE_DIFFUSERS = {
    **_VAE,
    **_under("encoder.downsamples.{}", "encoder.down_blocks.{}", _RESIDUAL | _RESAMPLE),
    **decoder_layers(res_blocks=2),
}
# Wan2.2-TI2V-5B: stages of two residual blocks and a downsampler, and of three and an upsampler.
VAE22_DIFFUSERS = {
    **_VAE,
    **{
        a: b
        for side, way, blocks in (("encoder", "down", 2), ("decoder", "up", 3))
        for i in range(blocks + 1)
        for a, b in _under(
            f"{side}.{way}samples.{{}}.{way}samples.{i}",
            f"{side}.{way}_blocks.{{}}." + (f"resnets.{i}" if i < blocks else f"{way}sampler"),
            _RESIDUAL if i < blocks else _RESAMPLE,
        ).items()
    },
}
# Wan2.2-TI2V-5B: stages of two residual blocks and a downsampler, and of three and an upsampler.
VAE22_DIFFUSERS = {
    **_VAE,
    **{
        a: b
        for side, way, blocks in (("encoder", "down", 2), ("decoder", "up", 3))
        for i in range(blocks + 1)
        for a, b in _under(
            f"{side}.{way}samples.{{}}.{way}samples.{i}",
            f"{side}.{way}_blocks.{{}}." + (f"resnets.{i}" if i < blocks else f"{way}sampler"),
            _RESIDUAL if i < blocks else _RESAMPLE,
        ).items()
    },
}

# The text encoder: official T5Encoder -> transformers UMT5EncoderModel.
_BLOCK = "encoder.block.{}.layer"
UMT5_TRANSFORMERS = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.{}.norm1": f"{_BLOCK}.0.layer_norm",
    "blocks.{}.norm2": f"{_BLOCK}.1.layer_norm",
    **{f"blocks.{{}}.attn.{x}": f"{_BLOCK}.0.SelfAttention.{x}" for x in "qkvo"},
    "blocks.{}.pos_embedding.embedding": f"{_BLOCK}.0.SelfAttention.relative_attention_bias",
    "blocks.{}.ffn.gate.0": f"{_BLOCK}.1.DenseReluDense.wi_0",
    "blocks.{}.ffn.fc1": f"{_BLOCK}.1.DenseReluDense.wi_1",
    "blocks.{}.ffn.fc2": f"{_BLOCK}.1.DenseReluDense.wo",
}

# The image encoder: official XLMRobertaCLIP (its tower) -> transformers CLIPVisionModel. There q, k and v are matrices of their
# own; the official to_qkv holds their rows one after the other (`minicos.clip` puts them together).
_LAYER = "encoder.layers.{}"
CLIP_TRANSFORMERS = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding": "embeddings.patch_embedding",
    "visual.pre_norm": "pre_layrnorm",
    **_under(
        "visual.transformer.{}",
        _LAYER,
        {
            "norm1": "layer_norm1",
            **{f"attn.to_qkv.{i}": f"self_attn.{x}_proj" for i, x in enumerate("qkv")},
            "attn.proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp.0": "mlp.fc1",
            "mlp.2": "mlp.fc2",
        },
    ),
    "visual.post_norm": "post_layernorm",
}

# layout -> (a key that no layout below it has, its table)
FOREIGN = {
    "diffusers": ("condition_embedder.time_proj.weight", DIT_DIFFUSERS),
    "diffusers VAE 2.2": ("decoder.up_blocks.0.upsampler.resample.1.weight", VAE22_DIFFUSERS),
    "diffusers VAE": ("post_quant_conv.weight", VAE_DIFFUSERS),
    "transformers": ("encoder.final_layer_norm.weight", UMT5_TRANSFORMERS),
    "transformers CLIP": ("pre_layrnorm.weight", CLIP_TRANSFORMERS),
}
# Keys that are no weights: a marker of ComfyUI, its copy of the tokenizer, and a second name of `shared.weight`.
NO_WEIGHTS = ("scaled_fp8", "spiece_model", "encoder.embed_tokens.weight")
FP8_FACTORS = (
    ".scale_weight",
    ".weight_scale",
    ".scale_input",
    ".input_scale",
)  # beside each matrix of a fp8_scaled file


def inverse(table: dict[str, str]) -> dict[str, str]:
    """The table from foreign names to official ones."""
    return {foreign: official for official, foreign in table.items()}


def translate(key: str, table: dict[str, str]) -> str:
    """`key` by `table`, e.g. blocks.3.attn1.to_q.weight -> blocks.3.self_attn.q.weight; MinicosError if it is not there."""
    module, _, leaf = key.rpartition(".")
    for stem, tail in ((key, ""), (module, f".{leaf}" if leaf in LEAVES else None)):
        layer = re.search(r"(?:^|\.)(\d+)(?=\.)", stem)
        slotted = f"{stem[: layer.start(1)]}{{}}{stem[layer.end(1) :]}" if layer else stem
        for found in (table.get(stem), table.get(slotted)):
            if found is not None and tail is not None:
                return found.replace("{}", layer[1] if layer else "") + tail
    raise MinicosError(
        f"the key {key!r} belongs to no known network. `minicos inspect` says what this file is."
    )


def strip(key: str) -> str:
    """`key` without the prefix of ComfyUI and others, if it has one."""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def is_weight(key: str) -> bool:
    """Is this key a tensor of the network, and not something that stands beside it?"""
    return key not in NO_WEIGHTS and not key.endswith(FP8_FACTORS)


def layout(keys: Iterable[str]) -> str:
    """How the keys of a network are named: "official" or one of FOREIGN."""
    stripped = {strip(key) for key in keys}
    return next((name for name, (marker, _) in FOREIGN.items() if marker in stripped), "official")


def renamer(keys: Iterable[str]) -> Callable[[str], str]:
    """The function from these keys' naming to the official one. It raises MinicosError on a key that it does not know."""
    found = layout(keys)
    if found == "official":
        return strip
    table = inverse(FOREIGN[found][1])
    return lambda key: translate(strip(key), table)


# LoRA files. The table of dialects stands in lora.py; here are only their names.
LORA_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
)
LORA_KEY = re.compile(
    r"(.+)\.(?:(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(alpha)|(diff|diff_b|diff_m))"
)
MUSUBI = {
    official.replace(".", "_"): official for official in DIT_DIFFUSERS
}  # musubi writes _ for every dot


def lora_dialect(keys: Iterable[str]) -> str | None:
    """Which producer's spelling these keys have: "diffsynth", "lightx2v", "comfy", "peft", "musubi"; None: this is no LoRA."""
    keys = list(keys)
    if not any(match and not match[3] for match in map(LORA_KEY.fullmatch, keys)):
        return None
    if any(key.startswith("lora_unet_") for key in keys):
        return "musubi"
    if any(".lora_A.default." in key for key in keys):
        return "diffsynth"
    if any(".lora_A." in key for key in keys):
        return "peft"
    return "comfy" if any(key.endswith(".alpha") for key in keys) else "lightx2v"


def lora_module(module: str) -> str | None:
    """The official name of a module as any LoRA dialect spells it; None where it belongs to no known network."""
    if module.startswith("lora_unet_"):
        flat = re.sub(r"^lora_unet_+", "", module)
        layer = re.match(r"blocks_(\d+)_", flat)
        name = MUSUBI.get(flat.replace(f"blocks_{layer[1]}_", "blocks_{}_", 1) if layer else flat)
        return name and name.replace("{}", layer[1] if layer else "")
    for prefix in LORA_PREFIXES:
        module = module.removeprefix(prefix)
    if not re.search(r"attn[12]|ffn\.net|condition_embedder|proj_out", module):
        return module
    try:
        return translate(module, inverse(DIT_DIFFUSERS))
    except MinicosError:
        return None
