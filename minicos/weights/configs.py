"""The configurations of networks, from the shapes of their tensors and from a config.json or a
file's metadata.

Every value from a file is typed and bounded here before it is used. The number of layers is counted
from the names that exist, never taken from a number in a name, and metadata must agree with the
shapes.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from minicos.config import VAE22, CLIPConfig, DiTConfig, TextConfig, VAEConfig
from minicos.errors import MinicosError
from minicos.weights.files import about, reading, table
from minicos.weights.header import Header, tensors
from minicos.weights.names import renamer, weights

Shapes = Mapping[str, tuple[int, ...]]
HEAD = 128  # width of a head in all published transformers; for CLIP see `clip_config`
WIDEST = 1 << 20  # largest axis that becomes a field of a configuration


def official(headers: Iterable[Header]) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of a network's tensors. Raises MinicosError for a key of no known
    network.
    """
    headers = tuple(headers)
    found = tensors(headers)
    with about(headers[0].path):
        rename = renamer(found)
        return {rename(name): found[key].shape for key, name in weights(found).items()}


def count(names: Iterable[str], prefix: str) -> int:
    """The number of prefix0., prefix1., prefix2., ... that exist without a gap."""
    there = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    return next(number for number in itertools.count() if str(number) not in there)


def architecture(shapes: Shapes) -> dict[str, Any]:
    """The fields of DiTConfig that follow from the shapes of official names: all except heads, text
    length and eps. {} if this is not a DiT.
    """
    modules = (
        "patch_embedding",
        "text_embedding.0",
        "time_embedding.0",
        "blocks.0.ffn.0",
        "head.head",
    )
    found = [shapes.get(f"{name}.weight", ()) for name in modules]
    if [len(shape) for shape in found] != [5, 2, 2, 2, 2]:
        return {}
    patch, text, time, ffn, head = found
    position, image = shapes.get("img_emb.emb_pos", ()), shapes.get("img_emb.proj.0.weight")
    fields: dict[str, Any] = {
        "in_dim": patch[1],
        "out_dim": head[0] // max(1, math.prod(patch[2:])),
        "dim": patch[0],
        "ffn_dim": ffn[0],
        "num_layers": count(shapes, "blocks."),
        "text_dim": text[1],
        "freq_dim": time[1],
    }
    if not all(0 < n <= WIDEST for n in (*fields.values(), *patch[2:])):
        return {}
    tokens = CLIPConfig().tokens
    fields |= {"patch_size": tuple(patch[2:]), "image_tokens": tokens if image else 0}
    if image and len(position) == 3:
        fields["image_tokens"] = position[1]
    if image and len(image) == 1:
        fields["image_dim"] = image[0]
    return fields


def dit_config(shapes: Mapping[str, Any], given: Mapping[str, Any], where: str) -> DiTConfig:
    """The configuration of a transformer that is not a published one.

    Args:
        shapes: its `architecture`.
        given: its config.json, in official or diffusers spelling: heads, eps and text length; width
            and depth, where stated, must be those of the weights.

    Raises:
        MinicosError: the number of heads is missing or does not divide the width, or config.json
            and weights differ in another size.
    """
    dim, heads = shapes["dim"], given.get("num_heads", given.get("num_attention_heads"))
    if heads is None and dim % HEAD:
        raise MinicosError(
            f"{where}: a network of width {dim} needs a config.json that says how many heads it "
            "has "
            "(num_heads or num_attention_heads). Put one next to the weights."
        )
    sizes = {
        **{name: shapes[name] for name in ("dim", "ffn_dim", "num_layers")},
        "window_size": [-1, -1],  # attention sees everything
    }
    if wrong := [name for name in sizes if given.get(name, sizes[name]) != sizes[name]]:
        raise MinicosError(
            f"{where}: its config.json says {wrong[0]} {given[wrong[0]]!r:.40}, and this network "
            f"has {sizes[wrong[0]]}. Is a file missing, or is it the config.json of another one?"
        )
    fields = {
        **shapes,
        "num_heads": dim // HEAD if heads is None else heads,
        **{name: given[name] for name in ("eps", "text_len") if given.get(name) is not None},
    }
    eps, length = fields.get("eps", 1e-6), fields.get("text_len", 512)
    heads = fields["num_heads"]
    whole = all(type(n) is int and 0 < n <= 1 << 16 for n in (heads, length))
    if not whole or not isinstance(eps, float) or not 0 < eps < 1:
        raise MinicosError(
            f"{where}: its config.json has impossible values (heads {heads!r}, text_len "
            f"{length!r}, "
            f"eps {eps!r}). Download it again."
        )
    with reading(where, "has a config.json that does not fit its weights"):
        return DiTConfig(**fields)


def vae_config(headers: Sequence[Header], given: Mapping[str, Any] = {}) -> VAEConfig:
    """The configuration of a VAE: from shapes, with the statistics of its metadata or of a
    config.json.

    Raises:
        MinicosError: it is not a VAE of Wan, metadata and shapes disagree, or the statistics are
            not one finite number per channel with positive deviations.
    """
    path, shapes = headers[0].path, official(headers)
    with reading(path, "is not a VAE of Wan", "`minicos inspect` says what it is."):
        newer = "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes
        told = _vae22(shapes) if newer else _vae21(shapes)
        cfg = replace(VAE22 if told["z_dim"] == VAE22.z_dim else VAEConfig(), **told)
    about = _metadata(headers, asdict(cfg), free=("mean", "std"))
    about |= {
        ours: given[theirs]
        for ours, theirs in (("mean", "latents_mean"), ("std", "latents_std"))
        if given.get(theirs) is not None
    }
    statistics = {name: about.get(name, getattr(cfg, name)) for name in ("mean", "std")}
    for name, values in statistics.items():
        usable = isinstance(values, list | tuple) and all(_number(value) for value in values)
        low = 0 if name == "std" else -math.inf
        if not usable or len(values) != cfg.z_dim or not all(low < v < math.inf for v in values):
            raise MinicosError(
                f"{path}: the statistics of its latents ({name}) must be {cfg.z_dim} finite numbers"
                f"{', each above 0' * (name == 'std')}, and are {values!r:.80}. "
                "Download the VAE and its config.json again."
            )
    mean, std = (tuple(float(v) for v in statistics[name]) for name in ("mean", "std"))
    return replace(cfg, mean=mean, std=std)


def text_config(headers: Sequence[Header], text_len: int) -> TextConfig:
    """The configuration of a text encoder, from its shapes; `text_len` is the transformer's."""
    shapes = official(headers)
    if "token_embd.weight" in shapes:
        raise MinicosError(
            f"{headers[0].path} is a text encoder under llama.cpp's names, which minicos does not "
            "read. Take umt5_xxl in safetensors or .pth."
        )
    with reading(headers[0].path, "is not a UMT5 encoder", "`minicos inspect` says what it is."):
        vocab_size, dim = shapes["token_embedding.weight"]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        cfg = TextConfig(
            vocab_size=vocab_size,
            dim=dim,
            dim_attn=shapes["blocks.0.attn.q.weight"][0],
            dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
            num_heads=num_heads,
            num_buckets=num_buckets,
            text_len=text_len,
            num_layers=count(shapes, "blocks."),
        )
        sizes = vocab_size, dim, cfg.dim_attn, cfg.dim_ffn, num_heads
        if not all(0 < n <= WIDEST for n in sizes) or cfg.dim_attn % num_heads:
            raise ValueError(f"its sizes are {sizes}")
        if not 4 <= num_buckets < 512 or num_buckets % 4:
            raise ValueError(f"it has {num_buckets} buckets of distances")
        return cfg


def clip_config(headers: Sequence[Header], given: Mapping[str, Any] = {}) -> CLIPConfig:
    """The configuration of an image encoder, from its shapes. The number of heads is from its
    metadata, a config.json, or the published model.
    """
    shapes = official(headers)
    with reading(
        headers[0].path, "is not CLIP's image encoder", "`minicos inspect` says what it is."
    ):
        dim, _, patch, _ = shapes["visual.patch_embedding.weight"]
        tokens = shapes["visual.pos_embedding"][-2]
        side, blocks = math.isqrt(tokens - 1), count(shapes, "visual.transformer.")
        told = {"image_size": side * patch, "patch_size": patch, "dim": dim}
        if not 0 < dim <= WIDEST or side * side + 1 != tokens or not blocks:
            raise ValueError(f"its sizes are {told} and {blocks} layers")
        published, about = CLIPConfig(), _metadata(headers, told, free=("num_heads", "num_layers"))
        # The last layer is not used, and some files omit it.
        whole = published.num_layers if blocks == published.num_layers - 1 else blocks
        layers = about.get("num_layers", given.get("num_hidden_layers", whole))
        heads = about.get("num_heads", given.get("num_attention_heads"))
        heads = heads or max(1, dim * published.num_heads // published.dim)
        if type(heads) is not int or heads < 1 or dim % heads or layers not in (blocks, blocks + 1):
            raise ValueError(f"it has {heads!r:.40} heads and {layers!r:.40} layers for {told}")
        return CLIPConfig(**told, num_heads=heads, num_layers=layers)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _metadata(
    headers: Sequence[Header], told: Mapping[str, Any], free: tuple[str, ...]
) -> dict[str, Any]:
    """The `free` fields of the configuration in a file's metadata; all other fields must agree with
    the shapes.
    """
    text = headers[0].metadata.get("config")
    if text is None:
        return {}
    path = headers[0].path
    with reading(path, "has a configuration in its metadata that cannot be read"):
        given = table(text)
    for name, value in given.items():
        known = told.get(name)
        same = tuple(value) == known if isinstance(value, list) else value == known
        if name in told and name not in free and not same:
            raise MinicosError(
                f"{path}: its metadata say {name} {value!r:.60}, and its shapes {known!r}. "
                "Download it again."
            )
    return {name: given[name] for name in free if name in given}


def _vae21(shapes: Shapes) -> dict[str, Any]:
    """The fields of VAEConfig that follow from shapes, for Wan2.1: the encoder is a flat list of
    residual blocks, with a resampler at the end of each stage.
    """
    name = "encoder.downsamples"
    depth = count(shapes, f"{name}.")
    resamplers = [i for i in range(depth) if f"{name}.{i}.resample.1.weight" in shapes]
    per_stage = resamplers[0] if resamplers else depth  # residual blocks in each
    starts = range(0, depth, per_stage + 1)
    dim = shapes["encoder.conv1.weight"][0]
    return _checked_vae(
        {
            "dim": dim,
            "z_dim": shapes["conv2.weight"][0],
            "dim_mult": tuple(shapes[f"{name}.{i}.residual.6.weight"][0] // dim for i in starts),
            "num_res_blocks": per_stage,
            "temporal_downsample": tuple(
                f"{name}.{i + per_stage}.time_conv.weight" in shapes for i in starts[:-1]
            ),
        }
    )


def _vae22(shapes: Shapes) -> dict[str, Any]:
    """The same for Wan2.2: a list of stages, each with residual blocks and, except in the last, a
    resampler.
    """
    name = "encoder.downsamples"
    stages = range(count(shapes, f"{name}."))
    blocks = sum(f"{name}.0.downsamples.{i}.residual.6.weight" in shapes for i in range(9))
    first = shapes["encoder.conv1.weight"]
    mult = tuple(
        shapes[f"{name}.{i}.downsamples.0.residual.6.weight"][0] // first[0] for i in stages
    )
    return _checked_vae(
        {
            "dim": first[0],
            "z_dim": shapes["conv2.weight"][0],
            "dim_mult": mult,
            "num_res_blocks": blocks,
            "temporal_downsample": tuple(
                f"{name}.{i}.downsamples.{blocks}.time_conv.weight" in shapes for i in stages[:-1]
            ),
            "dec_dim": shapes["decoder.conv1.weight"][0] // mult[-1],
            "patch_size": round((first[1] / 3) ** 0.5),
            "stage_shortcuts": True,
        }
    )


def _checked_vae(told: dict[str, Any]) -> dict[str, Any]:
    """The fields, if their sizes are sensible. Raises ValueError otherwise."""
    single = (told.get(n, 1) for n in ("dim", "z_dim", "num_res_blocks", "dec_dim", "patch_size"))
    if not told["dim_mult"] or not all(0 < n <= WIDEST for n in (*single, *told["dim_mult"])):
        raise ValueError(f"its sizes are {told}")
    return told
