"""Names of parameters: the official ones, which minicos uses, and foreign ones, each as a table
with a layer slot.

A table maps official module paths to foreign ones; `{}` stands for the number of the layer.
`translate` looks up a key with or without its last word (`weight`, `bias`, `gamma`). A key that is
in no table is an error, never a guess. Does not import torch, for `minicos inspect`.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from minicos.errors import MinicosError

# Prefixes of networks in files of pipelines and trainers: of the only or the high-noise expert, and
# of the low-noise one.
FIRST = ("transformer.", "transformer_1.", "pipe.dit.", "dit.", "high_noise_model.")
SECOND = ("transformer_2.", "pipe.dit2.", "dit2.", "low_noise_model.")
# All prefixes of a network: also those of ComfyUI, DataParallel, torch.compile, averaged weights,
# trainers, and (CLIP) transformers.
PREFIXES = (
    *FIRST,
    *SECOND,
    *("diffusion_model.", "model.", "vision_model.", "pipe.", "module.", "_orig_mod."),
    *("generator.", "generator_ema.", "ema.", "ema_model.", "net.", "net_ema.", "network."),
    *("student.", "denoiser.", "backbone.", "unet.", "wan.", "wan_model.", "dit_model."),
    *("video_model.", "model_ema.", "state_dict.", "base_model."),
)
WRAPPED = (
    *("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module."),
)  # anywhere in a name
LEAVES = ("weight", "bias", "gamma")

# Prefixes of the networks in a file with several of them (ComfyUI's merged files).
SECTIONS = {
    "high": ("model.diffusion_model.", *FIRST, *SECOND),
    "low": ("model.diffusion_model.", *SECOND, *FIRST),
    "vae": ("vae.", "first_stage_model."),
    "text": (
        *("text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "text_encoders."),
        "text_encoder.",
    ),
    "clip": ("clip_vision.", "image_encoder."),
}

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
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    # the affine norm before cross-attention; the other two have no parameters
    "blocks.{}.norm3": "blocks.{}.norm2",
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
}

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
    """The table for the decoder of a Wan2.1 VAE: officially one flat list; in diffusers, groups
    that end with an upsampler.
    """
    group = res_blocks + 2  # one residual block more than in the encoder, and the upsampler
    table: dict[str, str] = {}
    for i in range(4 * group - 1):
        foreign = f"decoder.up_blocks.{i // group}"
        if i % group == group - 1:
            table |= _under(f"decoder.upsamples.{i}", f"{foreign}.upsamplers.0", _RESAMPLE)
        else:
            place = f"{foreign}.resnets.{i % group}"
            table |= _under(f"decoder.upsamples.{i}", place, _RESIDUAL)
    return table


# The VAEs: official WanVAE_ -> diffusers AutoencoderKLWan. Common to both generations:
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


def vae_table(res_blocks: int, stages: bool) -> dict[str, str]:
    """The table for a VAE with this number of residual blocks in each stage of its encoder.

    Args:
        stages: False for Wan2.1 and Wan2.2-A14B: the encoder's flat list keeps its numbers, the
            decoder's becomes four groups. True for Wan2.2-TI2V-5B: stages of residual blocks and a
            downsampler, and of one block more and an upsampler.
    """
    if not stages:
        encoder = _under("encoder.downsamples.{}", "encoder.down_blocks.{}", _RESIDUAL | _RESAMPLE)
        return {**_VAE, **encoder, **decoder_layers(res_blocks)}
    table = dict(_VAE)
    for side, way, blocks in (("encoder", "down", res_blocks), ("decoder", "up", res_blocks + 1)):
        for i in range(blocks + 1):
            last = i == blocks
            foreign = f"{way}sampler" if last else f"resnets.{i}"
            table |= _under(
                f"{side}.{way}samples.{{}}.{way}samples.{i}",
                f"{side}.{way}_blocks.{{}}.{foreign}",
                _RESAMPLE if last else _RESIDUAL,
            )
    return table


VAE_DIFFUSERS = vae_table(2, stages=False)
VAE22_DIFFUSERS = vae_table(2, stages=True)

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

# The image encoder: official XLMRobertaCLIP (its tower) -> transformers CLIPVisionModel, which has
# separate matrices q, k and v; the official to_qkv holds their rows one after the other
# (`minicos.clip` joins them).
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
# Kinds of keys. Apart from weights there are factors of quantised matrices, records of how they are
# stored, and keys that are not needed: factors of activations, a marker of ComfyUI and its copy of
# the tokenizer, a second name of `shared.weight`, and the parts of CLIP beyond its image tower.
WEIGHT, FACTOR, RECORD, ASIDE = "weight", "factor", "record", "aside"
FACTORS = {  # suffix of a factor -> suffix of its matrix
    ".scale_weight": ".weight",
    ".weight_scale": ".weight",
    ".weight._scale": ".weight",
}
VALUES = {".weight._data": ".weight"}  # optimum-quanto
RECORDS = (".comfy_quant",)
UNUSED = (".scale_input", ".input_scale", ".output_scale")
ALONE = (
    *("scaled_fp8", "spiece_model", "encoder.embed_tokens.weight", "visual_projection.weight"),
    *("text_projection.weight", "logit_scale", "embeddings.position_ids"),
)
QUANTISED = {  # suffixes that identify an unsupported storage format
    ".quant_state.bitsandbytes__nf4": "4-bit nf4 of bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "4-bit fp4 of bitsandbytes",
    ".absmax": "4-bit numbers of bitsandbytes",
    ".nested_absmax": "4-bit numbers of bitsandbytes",
    ".quant_map": "4-bit numbers of bitsandbytes",
    ".nested_quant_map": "4-bit numbers of bitsandbytes",
    ".SCB": "8-bit numbers of bitsandbytes",
    ".weight_format": "8-bit numbers of bitsandbytes",
    ".weight._shift": "numbers with an offset (optimum-quanto)",
    ".weight._data._data": "less than 8 bits (optimum-quanto)",
    ".weight_scale_2": "4-bit nvfp4",
    ".pre_quant_scale": "4-bit nvfp4",
    ".weight_codebook": "4-bit numbers of ComfyUI (w4a8)",
    ".weight_s_rel": "4-bit numbers of ComfyUI (w4a8)",
    ".int8_weight": "8-bit numbers of TurboDiffusion",
    ".weight_scale_inv": "fp8 with a factor for each block",
    ".qweight": "4-bit numbers of GPTQ, AWQ or SVDQuant",
    ".qzeros": "4-bit numbers of GPTQ or AWQ",
    ".wscales": "4-bit numbers of SVDQuant (Nunchaku)",
    ".smooth_factor": "4-bit numbers of SVDQuant (Nunchaku)",
    ".W_q": "numbers of HQQ",
    ".weight_qdata": "numbers of torchao",
    "._weight_qdata": "numbers of torchao",
    ".weight:qdata": "numbers of torchao",
    ".weight:int_data": "numbers of torchao",
}
_QUANTISED = re.compile(rf"({'|'.join(map(re.escape, QUANTISED))})(?:\.|$)")
# Networks that extend Wan with parts that minicos does not support: prefixes that only they have.
RELATIVES = {
    "vace_blocks.": "Wan-VACE",
    "vace_patch_embedding.": "Wan-VACE",
    "face_adapter.": "Wan2.2-Animate",
    "face_encoder.": "Wan2.2-Animate",
    "pose_patch_embedding.": "Wan2.2-Animate",
    "casual_audio_encoder.": "Wan2.2-S2V",
    "audio_injector.": "Wan2.2-S2V",
    "control_adapter.": "Wan-Fun-Camera",
    "ref_conv.": "Wan-Fun-Control",
    "audio_proj.": "a speaking Wan (MultiTalk, HuMo or a relative)",
    "audio_model.": "a speaking Wan (MultiTalk, HuMo or a relative)",
    "proj_model.": "FantasyTalking",
    "fps_embedding.": "SkyReels-V2 (diffusion forcing)",
    "controlnet_blocks.": "a ControlNet for Wan",
    "adapter.": "a Wan with an adapter",
    "motion_encoder.": "Wan2.2-Animate",
    "cond_encoder.": "Wan2.2-S2V",
    "frame_packer.": "Wan2.2-S2V",
    "dwpose_embedding.": "UniAnimate",
    "randomref_embedding_pose.": "UniAnimate",
    "text_encoder": "a pipeline with a text encoder",
    "lora_te": "a pipeline with a text encoder",
}
INSIDE = {  # likewise, anywhere in a name
    ".audio_cross_attn.": "a speaking Wan (MultiTalk or a relative)",
    ".k_audio.": "a speaking Wan (MultiTalk or a relative)",
    ".to_gate_compress.": "a Wan with video sparse attention (FastVideo)",
    ".local_attn.proj_l.": "a Wan with sparse and linear attention (TurboDiffusion)",
    ".cam_encoder.": "ReCamMaster",
    ".ip_adapter.": "a Wan with an adapter of pictures (Lynx or a relative)",
    ".ref_adapter.": "a Wan with an adapter of pictures (Lynx or a relative)",
    ".q_loras.": "Stand-In",
}


def inverse(table: dict[str, str]) -> dict[str, str]:
    """The table from foreign names to official ones."""
    return {foreign: official for official, foreign in table.items()}


def translate(key: str, table: dict[str, str]) -> str:
    """`key` translated by `table`, e.g. blocks.3.attn1.to_q.weight ->
    blocks.3.self_attn.q.weight. Raises MinicosError if it is not there.
    """
    module, _, leaf = key.rpartition(".")
    for stem, tail in ((key, ""), (module, f".{leaf}" if leaf in LEAVES else None)):
        layer = re.search(r"(?:^|\.)(\d+)(?=\.)", stem)
        slotted = f"{stem[: layer.start(1)]}{{}}{stem[layer.end(1) :]}" if layer else stem
        for found in (table.get(stem), table.get(slotted)):
            if found is not None and tail is not None:
                return found.replace("{}", layer[1] if layer else "") + tail
    raise MinicosError(
        f"the key {key!r} belongs to no network that minicos reads: the file is of a relative of "
        "Wan, or of another model."
    )


def strip(key: str) -> str:
    """`key` without what ComfyUI, trainers and wrappers add to the names of a network."""
    for wrapped in WRAPPED:
        key = key.replace(wrapped, "")
    while key.startswith(PREFIXES):
        key = key[len(next(prefix for prefix in PREFIXES if key.startswith(prefix))) :]
    return key


def quantised(key: str) -> str | None:
    """The unsupported storage format that a key indicates, or None."""
    found = _QUANTISED.search(key)
    return found and QUANTISED[found[1]]


def role(key: str) -> tuple[str, str]:
    """The kind of a key (WEIGHT, FACTOR, RECORD, ASIDE), and the weight that it is or belongs to.

    Raises:
        MinicosError: the key indicates an unsupported storage format.
    """
    if how := quantised(key):
        raise MinicosError(
            f"{key} tells that weights are stored as {how}, which minicos does not read. "
            "Get the model in bf16, fp16 or fp8."
        )
    for kind, endings in ((FACTOR, FACTORS), (WEIGHT, VALUES)):
        for ending, weight in endings.items():
            if key.endswith(ending):
                return kind, key.removesuffix(ending) + weight
    if key.endswith(RECORDS):
        return RECORD, key
    if key.endswith(UNUSED) or strip(key) in ALONE or key.startswith("text_model."):
        return ASIDE, key
    return WEIGHT, key


def weights(keys: Iterable[str]) -> dict[str, str]:
    """Key -> name of the weight, for keys of weights. Raises MinicosError as `role` does."""
    roles = {key: role(key) for key in keys}
    return {key: name for key, (kind, name) in roles.items() if kind == WEIGHT}


def relative(keys: Iterable[str]) -> str | None:
    """The name of a network that extends Wan with unsupported parts; None for others."""
    names = _lines(map(strip, keys))
    wan = "\npatch_embedding." in names
    for start, known in RELATIVES.items():
        if f"\n{start}" in names and (wan or "vace" in start):
            return known
    return next((what for word, what in INSIDE.items() if word in names), None)


def _lines(names: Iterable[str]) -> str:
    """The names, each on a line of its own, to be searched at once: files may have 100,000."""
    return "\n".join(["", *names])


def lacking(name: str) -> str:
    """What an error says about a parameter that a LoRA changes and the network lacks."""
    known = relative((name, "patch_embedding.weight"))
    if known is None:
        return "which this network lacks. Is the LoRA for another variant?"
    return f"a part of {known}, which this network is not. Take a LoRA for the network alone."


def stranger(key: str) -> str:
    """What an error says about a key of a LoRA file that is none of a LoRA for Wan."""
    known = relative((key, "patch_embedding.weight"))
    if known is None:
        return "is not a LoRA's, or its module is of no network known here"
    return f"is of {known}"


def article(kind: str) -> str:
    """The kind with "a" or "an"."""
    return f"{'an' if kind[0] in 'AIO' else 'a'} {kind}"


def sections(keys: Iterable[str]) -> dict[str, str]:
    """Part -> prefix of its tensors, in a file with several networks. {} for a file with one, and
    for a LoRA.
    """
    names = _lines(keys := list(keys))
    found = {
        part: next((start for start in starts if f"\n{start}" in names), None)
        for part, starts in SECTIONS.items()
    }
    there = {part: start for part, start in found.items() if start is not None}
    return there if len(set(there.values())) > 1 and not lora_dialect(keys) else {}


def section(keys: Iterable[str], part: str) -> str:
    """The prefix of a part's tensors in a file with several networks; "" for a file with one.

    Raises:
        MinicosError: a file with several networks lacks this one.
    """
    found = sections(keys)
    if not found or part not in SECTIONS:
        return ""
    if part not in found:
        names = ", ".join(sorted(set(found.values())))
        raise MinicosError(
            f"the file holds several networks ({names}) but none for {part}. "
            f"Name it: --part {part}=FILE."
        )
    return found[part]


def layout(keys: Iterable[str]) -> str:
    """The naming of a network's keys: "official" or one of FOREIGN."""
    stripped = {strip(key) for key in keys}
    return next((name for name, (marker, _) in FOREIGN.items() if marker in stripped), "official")


def renamer(keys: Iterable[str]) -> Callable[[str], str]:
    """The function from these keys' naming to the official one. It raises MinicosError for an
    unknown key.
    """
    keys = [strip(key) for key in keys]
    found = layout(keys)
    if found == "official":
        return strip
    foreign = FOREIGN[found][1]
    if found.startswith("diffusers VAE"):
        start = "decoder.up_blocks.0.resnets."
        blocks = {key[len(start) :].partition(".")[0] for key in keys if key.startswith(start)}
        foreign = vae_table(min(len(blocks), 16) - 1, stages=found.endswith("2.2"))
    table = inverse(foreign)
    return lambda key: translate(strip(key), table)


# LoRA files: the structure of their keys (for the tensors see lora.py).
LORA_PREFIXES = (*PREFIXES, "lora.")
FLAT = re.compile(  # with _ for every dot
    r"(?:lora_unet|lora_transformer(?:_[12](?=_blocks))?|lora_dit|lora_wan|lycoris)_+"
    r"(?:(?:diffusion_model|transformer|model|dit)_+)*(.+)"
)
LORA_PIECES = {  # suffix of a key -> role of its tensor
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
    "lora_mid": "mid",
    **dict.fromkeys(("alpha", "diff", "diff_b", "diff_m"), ""),
    **{"lora_alpha": "alpha", "network_alpha": "alpha", "lora_rank": ASIDE},
    **{"w_norm": "diff", "b_norm": "diff_b"},
    **dict.fromkeys((f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"), ""),
    **dict.fromkeys((f"lokr_w{i}{side}" for i in (1, 2) for side in ("", "_a", "_b")), ""),
    **dict.fromkeys(("hada_t1", "hada_t2", "lokr_t1", "lokr_t2"), "mid"),
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector", "magnitude"), "DoRA"),
    **dict.fromkeys(("reshape_weight", "lora_controlnet"), "control LoRA"),
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_R"), "OFT"),
    **dict.fromkeys(("boft_R", "boft_s"), "BOFT"),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"), "VeRA"),
    **dict.fromkeys(("ia3_l", "on_input"), "IA3"),
    **dict.fromkeys(("a1", "a2", "b1", "b2"), "GLoRA"),
    **dict.fromkeys(("lora_E", "ranknum"), "AdaLoRA"),
    **dict.fromkeys(("bone_block", "miss_block"), "MiSS"),
    **dict.fromkeys(("randlora_lambda", "randlora_gamma"), "RandLoRA"),
    **dict.fromkeys(("vblora_logits_A", "vblora_logits_B"), "VB-LoRA"),
    **{"hra_u": "HRA", "fourierft_spectrum": "FourierFT", "shira_weight": "SHiRA"},
    **{"c3a_kernel": "C3A", "waveft_spectrum": "WaveFT", "delora_lambda": "DeLoRA"},
    "set_weight": "set of whole weights",
    **{
        f"{piece}.{factor}": "quantised LoRA"
        for piece in ("lora_A", "lora_B", "lora_down", "lora_up")
        for factor in ("weight_scale", "scale_weight", "weight_scale_inv", "comfy_quant")
    },
}
# Unsupported kind of LoRA -> its name in messages. All kinds that are applied have short names.
_APPLIED = ("", "down", "up", "alpha", "diff", "diff_b", ASIDE)
UNREAD = {kind: kind for kind in LORA_PIECES.values() if kind not in _APPLIED}
UNREAD["mid"] = "LoRA in Tucker form"
_PIECES = "|".join(map(re.escape, sorted(LORA_PIECES, key=len, reverse=True)))
LORA_KEY = re.compile(rf"(.+)\.({_PIECES})(?:\.[\w-]+)??(?:\.(weight|bias))?")
# A parameter itself, which PEFT saves next to changes (modules_to_save, bias, base_layer).
ITSELF = re.compile(r"(.+?)(?:\.base_layer)?\.(?:weight|bias)")
# What LoRAs change that only some Wans have: an image branch (by names of modules), and input
# channels (those of text- and image-to-video networks).
IMAGES, INPUTS = "an image branch that this network lacks", "an input of another width"
IMAGE_BRANCH = ("img_emb.", "cross_attn.k_img.", "cross_attn.v_img.", "cross_attn.norm_k_img.")
INPUT, CHANNELS = "patch_embedding.weight", (16, 36)
WHOLE_PARAMETERS = ("modulation", "emb_pos")  # last words of parameters without a module
_FLAT = {
    name.replace(".", "_"): official
    for official, foreign in DIT_DIFFUSERS.items()
    for name in (foreign, official)
}


class LoraKey(NamedTuple):
    module: str  # by its official name
    piece: str  # "down", "up", "alpha", "diff", ..., or the name of an unsupported kind
    bias: bool  # whether it is the bias of this piece
    low: bool  # whether it is for the second expert, in a file for both


def lora_key(key: str) -> LoraKey | None:
    """The meaning of a key in a LoRA file; None if it has none, or its network is unknown."""
    match = LORA_KEY.fullmatch(key)
    if match is None and (itself := ITSELF.fullmatch(key)):
        whole = lora_module(itself[1]) or ""
        known = re.sub(r"\.\d+\.", ".{}.", whole, count=1) in DIT_DIFFUSERS
        return LoraKey(whole, LORA_PIECES["set_weight"], False, False) if known else None
    module = match and lora_module(match[1])
    if not match or not module:
        return None
    piece = LORA_PIECES[match[2]] or match[2]
    second = any(f".{start}" in f".{match[1]}." for start in (*SECOND, "lora_transformer_2_"))
    return LoraKey(module, piece, match[3] == "bias", second)


def lora_dialect(keys: Iterable[str]) -> str | None:
    """The producer's spelling of these keys; None if this is not a LoRA."""
    keys = list(keys)
    pieces = {match[2] for key in keys if (match := LORA_KEY.fullmatch(key))}
    pieces -= {"alpha", "lora_alpha", "network_alpha", "lora_rank"}
    glora = {"a1", "a2", "b1", "b2"}  # names that other networks may have, too
    if not pieces - {*glora, "magnitude"} and not glora <= pieces:
        return None
    if any(piece.startswith(("hada_", "lokr_")) for piece in pieces):
        return "lycoris"
    if any(FLAT.match(key) for key in keys):
        return "musubi"
    if any(".lora_A.default." in key for key in keys):
        return "diffsynth"
    if any(".lora_A." in key for key in keys):
        return "peft"
    return "comfy" if any(key.endswith(".alpha") for key in keys) else "lightx2v"


def lora_module(module: str) -> str | None:
    """The official name of a module in the spelling of any LoRA dialect; None if its network is
    unknown.
    """
    for wrapped in WRAPPED:
        module = module.replace(wrapped, "")
    while module.startswith(LORA_PREFIXES):
        module = module[len(next(p for p in LORA_PREFIXES if module.startswith(p))) :]
    module = module.removesuffix(".weight")  # FastVideo: to_q.weight.lora_A
    if flat := FLAT.fullmatch(module.replace(".", "_")):
        layer = re.match(r"blocks_(\d+)_", flat[1])
        slotted = flat[1].replace(f"blocks_{layer[1]}_", "blocks_{}_", 1) if layer else flat[1]
        name = _FLAT.get(slotted)
        return name and name.replace("{}", layer[1] if layer else "")
    if not re.search(r"attn[12]|ffn\.net|condition_embedder|proj_out|scale_shift_table", module):
        return module
    try:
        return translate(module, _DIFFUSERS_DIT)
    except MinicosError:
        return None


_DIFFUSERS_DIT = inverse(DIT_DIFFUSERS)
