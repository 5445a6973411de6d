"""Tiny random pipelines of the peers, from the goldens: diffusers' own answers for their weights.

A golden holds what a pipeline was given (`given.*`, a picture and rows of text), every latent of
its own guided run of four steps (`loop.*`; `full.*` under all terms of LTX-2's guidance), in the
pipeline's coordinates as b c f h w, and what blocks return in a prompted pass at step 1 (`out.*`).
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

import minicos
from minicos.peers.peer import Peer
from tests import golden

NAMES = ("cogvideox15", "hunyuan15", "hunyuan_concat", "hunyuan_replace", "ltx2", "ltx23")
STEPS = 4
WORDS = ["<pad>", "</s>", "<unk>", "solve", "the", "maze", "go", "to", "blue", "goal", "bad"]


def tensors(name: str) -> dict[str, Tensor]:
    return golden.read(f"peer_{name}")


@cache
def _parts(name: str) -> dict[str, Any]:
    facts = golden.info(f"peer_{name}")
    weights = golden.read(f"peer_{name}.weights")
    classes = _classes(facts["pipeline"])
    parts: dict[str, Any] = {}
    for part, config in facts["configs"].items():
        kind = classes[part]
        made = getattr(kind, "from_config", lambda c, kind=kind: kind(kind.config_class(**c)))
        parts[part] = made(config)
        if part != "scheduler":
            mine = {k.removeprefix(f"{part}."): v for k, v in weights.items()}
            parts[part].load_state_dict({k: mine[k] for k in parts[part].state_dict()})
            parts[part].eval()
    return parts


def _classes(pipeline: str) -> dict[str, Any]:
    """The parts of a pipeline, each with its class, the first one if it may have several."""
    diffusers = pytest.importorskip("diffusers")
    hints = get_type_hints(getattr(diffusers, pipeline).__init__)
    return {part: (get_args(kind) or (kind,))[0] for part, kind in hints.items()}


def pipeline(name: str) -> Any:
    """The pipeline of a golden. Its networks are shared: do not change them."""
    diffusers = pytest.importorskip("diffusers")
    kind = golden.info(f"peer_{name}")["pipeline"]
    parts = dict.fromkeys(_classes(kind)) | _parts(name)
    if kind.startswith("LTX2"):
        parts["vae"].use_framewise_encoding = parts["vae"].use_framewise_decoding = False
        parts["audio_vae"] = _audio_vae(diffusers)
    if kind.startswith("HunyuanVideo15"):
        transformers = pytest.importorskip("transformers")
        side = parts["image_encoder"].config.image_size
        pictures = transformers.SiglipImageProcessor(size={"height": side, "width": side})
        parts |= {"guider": diffusers.ClassifierFreeGuidance(), "feature_extractor": pictures}
    return getattr(diffusers, kind)(**parts)


def _audio_vae(diffusers: Any) -> Any:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )


def embed(name: str) -> Any:
    """Rows of text of the golden in the place of a text encoder. "" and "bad" have those of the
    negative prompt or, where the golden has none, the prompt's with the sign changed.
    """
    given = {k.removeprefix("given."): v for k, v in tensors(name).items() if "given." in k}

    def rows(texts: list[str]) -> Mapping[str, Any]:
        kinds = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
        kinds += ("prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
        found = {k: given[k] for k in kinds if k in given}
        if texts[0] in ("", "bad"):
            other = {k: given.get(f"negative_{k}", -v) for k, v in found.items()}
            found |= {k: v for k, v in other.items() if "mask" not in k or f"negative_{k}" in given}
        return {k: v.repeat(len(texts), *[1] * (v.ndim - 1)) for k, v in found.items()}

    return rows


def saved(where: Path) -> Path:
    """The tiny CogVideoX1.5 with a T5 of its own, as a folder of diffusers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    torch.manual_seed(3)
    pipe = pipeline("cogvideox15")
    text = transformers.T5EncoderModel(config).eval()
    pipe.register_modules(text_encoder=text, tokenizer=_words(transformers))
    pipe.save_pretrained(where)
    return where


def saved_ltx2(where: Path) -> Path:
    """The tiny LTX-2 with a Gemma and a vocoder of its own, as its repositories have it: under the
    name of the pipeline without a first frame.
    """
    diffusers, transformers = map(pytest.importorskip, ("diffusers", "transformers"))
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    words = transformers.Gemma3TextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,  # three states of 16, as the golden's connectors take
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    seen = transformers.SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(3)
    both = transformers.Gemma3Config(text_config=words, vision_config=seen)
    pipe = diffusers.LTX2Pipeline(**pipeline("ltx2").components)
    pipe.register_modules(
        text_encoder=transformers.Gemma3ForConditionalGeneration(both).eval(),
        tokenizer=_words(transformers),
        vocoder=LTX2Vocoder(in_channels=16, hidden_channels=32),
    )
    pipe.save_pretrained(where)
    return where


def _words(transformers: Any) -> Any:
    """A tokenizer of `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=226,
    )


def with_text_encoders(pipe: Any) -> Any:
    """HunyuanVideo's pipeline with a tiny LLaVA and CLIP of random weights: words one by one, and
    as many rows of the picture as the real ones have.
    """
    transformers = pytest.importorskip("transformers")
    config = pipe.transformer.config
    rows = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
        projection_dim=8,
    )
    words = transformers.LlamaConfig(
        hidden_size=config.text_embed_dim,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=200,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    both = transformers.LlavaConfig(
        vision_config=rows, text_config=words, image_token_index=3, pad_token_id=0
    )
    pooled = transformers.CLIPTextConfig(
        hidden_size=config.pooled_projection_dim,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=200,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    tokenizer = _tokenizer(transformers, _template())
    pipe.register_modules(
        text_encoder=transformers.LlavaForConditionalGeneration(both).eval(),
        tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModel(pooled).eval(),
        tokenizer_2=tokenizer,
        image_processor=transformers.CLIPImageProcessor(size=48, crop_size=48),
    )
    return pipe


def with_text_encoders_15(pipe: Any) -> Any:
    """HunyuanVideo-1.5's pipeline with a tiny Qwen2.5-VL and ByT5 of random weights."""
    transformers = pytest.importorskip("transformers")
    config = pipe.transformer.config
    tokenizer = _tokenizer(transformers, pipe.system_message)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    words = transformers.Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_embed_dim,
        intermediate_size=16,
        num_hidden_layers=4,  # the pipeline takes the state before the last two
        num_attention_heads=1,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    letters = transformers.T5Config(
        vocab_size=384, d_model=config.text_embed_2_dim, d_kv=4, d_ff=8, num_layers=1, num_heads=1
    )
    torch.manual_seed(3)
    pipe.register_modules(
        text_encoder=transformers.Qwen2_5_VLTextModel(words).eval(),
        tokenizer=tokenizer,
        text_encoder_2=transformers.T5EncoderModel(letters).eval(),
        tokenizer_2=transformers.ByT5Tokenizer(),
    )
    return pipe


def _template() -> str:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
        DEFAULT_PROMPT_TEMPLATE,
    )

    return DEFAULT_PROMPT_TEMPLATE["template"]


def _tokenizer(transformers: Any, template: str) -> Any:
    """Words and signs of a template of HunyuanVideo's, and some of a prompt."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<image>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eot_id|>", "<unk>"]
    split = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    text = template + "a ball rolls to the left bad solve maze"
    found = [word for word, _ in split.pre_tokenize_str(text)]
    known = {word: i for i, word in enumerate(dict.fromkeys([*special, *found]))}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[3:7],
        model_max_length=77,
    )


def peer(name: str, **changes: Any) -> Peer:
    """The model of a golden as its own run was made."""
    facts = golden.info(f"peer_{name}")
    pipe = pipeline(name)
    model = minicos.from_diffusers(pipe, embed=embed(name))
    assert isinstance(model, Peer)
    given = {"steps": STEPS, "size": tuple(facts["size"]), "frames": facts["frames"], "area": None}
    given |= {"guidance": facts["guidance"]}
    if name.startswith("ltx"):
        given |= {"fps": 25, "image_crf": 0, "stg": 0.0, "modality": 1.0, "rescale": 0.0}
        given |= {"audio_guidance": None}
    return model.with_preset(**{**given, **changes})


def picture(name: str) -> Tensor:
    """The golden's first frame: 3 H W in [0, 1]."""
    image = tensors(name)["given.image"]
    return image if image.ndim == 3 else image[0]


def conditioned(name: str, model: Peer | None = None, **more: Any) -> tuple[Peer, Any]:
    """The model of a golden, or this one, and the golden's condition."""
    model = peer(name) if model is None else model
    return model, model.condition("solve the maze", picture(name), **more)
