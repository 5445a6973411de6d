"""Where the parts of a model lie, in every layout that people have on disk.

official     high_noise_model/, low_noise_model/ (Wan2.1 and TI2V-5B: one network beside the rest), Wan2.x_VAE.pth,
             models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/tokenizer.json, models_clip_*.pth (Wan2.1 image-to-video)
diffusers    model_index.json, transformer/ (the high-noise expert!), transformer_2/, vae/, text_encoder/, image_encoder/, tokenizer/
single file  one network (ComfyUI, DiffSynth); its other parts are named one by one, see `PARTS`

An expert may be a LoRA on the other one, as in the model that comes with minicos. `find` reads headers alone and imports no
torch, so that whatever can be refused is refused before anything is loaded.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from minicos.config import VAE22, CLIPConfig, DiTConfig, TextConfig, VAEConfig
from minicos.errors import MinicosError
from minicos.weights import hub, variants
from minicos.weights.header import Header, is_archive, read_headers, tensors
from minicos.weights.names import is_weight, lora_dialect, renamer

EMBEDDED = Path(__file__).parents[1] / "tiny" / "weights"
EMBEDDED_VARIANTS = EMBEDDED.with_name("variants")  # of the embedded model: a folder each
PARTS = {  # what can be named one by one
    "high": "the network for high noise, or the only one",
    "low": "the network for low noise, or a LoRA that makes it of the other",
    "vae": "the VAE",
    "text": "the text encoder",
    "tokenizer": "its tokenizer.json",
    "clip": "the image encoder of Wan2.1 image-to-video",
}
OFFICIAL = {
    "high": ("high_noise_model",),
    "low": ("low_noise_model",),
    "vae": tuple(
        f"{stem}{ending}"
        for stem in ("Wan2.2_VAE", "Wan2.1_VAE")
        for ending in (".safetensors", ".pth")
    ),
    "text": ("models_t5_umt5-xxl-enc-bf16.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"),
    "clip": tuple(
        f"models_clip_open-clip-xlm-roberta-large-vit-huge-14{ending}"
        for ending in (".safetensors", ".pth")
    ),
    "tokenizer": ("google/umt5-xxl/tokenizer.json",),
}
DIFFUSERS = {
    "high": ("transformer",),
    "low": ("transformer_2",),
    "vae": ("vae",),
    "text": ("text_encoder",),
    "clip": ("image_encoder",),
    "tokenizer": ("tokenizer/tokenizer.json",),
}
TOKENIZER = "MINICOS_UMT5_TOKENIZER"  # names a tokenizer.json, for layouts that come without one

LoraFiles = Mapping[str, Sequence[str | Path | tuple[str | Path, float]]]


@dataclass(frozen=True)
class Part:
    """The files of one network, its configuration, and the LoRAs to merge into it, each with its strength."""

    files: tuple[Path, ...]
    config: DiTConfig | VAEConfig | TextConfig | CLIPConfig | None = None
    loras: tuple[tuple[Path, float], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Every file that a model needs, and what the model is."""

    kind: str  # "official", "diffusers", "single file"
    variant: str
    experts: dict[str, Part]  # "high", and "low" where there are two
    vae: Part
    text: Part
    tokenizer: Path
    clip: Part | None = None  # where the variant has one
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Tells these weights from others: a hash of samples of every file and of the strengths of LoRAs."""
        digest = sha256()
        for part in (
            *self.experts.values(),
            self.vae,
            self.text,
            Part((self.tokenizer,)),
            self.clip or Part(()),
        ):
            for path in part.files:
                digest.update(_sample(path))
            for path, strength in part.loras:
                digest.update(_sample(path) + repr(float(strength)).encode())
        return digest.hexdigest()[:16]


def find(
    model: str | Path,
    *,
    variant: str | None = None,
    parts: Mapping[str, str | Path] | None = None,
    lora: LoraFiles | None = None,
    download: bool = False,
) -> Layout:
    """The files of a model, told from their headers.

    model     "tiny" (the one inside the package), "tiny:NAME" (a variant of it: its networks, the rest from "tiny"), a folder, a file,
              or the id of a repository on the Hub
    variant   what shapes cannot tell, see `variants.resolve`
    parts     name (see `PARTS`) -> file or folder; takes the place of what the model has there
    lora      expert -> files, or pairs of file and strength; a model of one network is its own "high" expert
    download  fetch a repository of the Hub that is not in the cache
    Raises MinicosError naming the file or part that is missing, damaged, of another model, or ambiguous.
    """
    path = locate(model, download)
    seen = _survey(
        path, {**(_shared() if path.parent == EMBEDDED_VARIANTS else {}), **(parts or {})}
    )
    name, notes = variants.resolve(seen.evidence, variant or hub.KNOWN.get(str(model)))
    networks = _experts(seen, name, lora or {})
    cfg = networks["high"].config
    vae, text = _part(seen, "vae"), _part(seen, "text")
    layout = Layout(
        kind=seen.kind,
        variant=name,
        experts=networks,
        vae=Part(_files(vae), vae_config(vae, _json(seen.places["vae"]))),
        text=Part(_files(text), text_config(text, cfg.text_len)),
        tokenizer=_tokenizer(seen.places.get("tokenizer"), path),
        clip=_clip(_part(seen, "clip")) if cfg.images else None,
        notes=notes,
    )
    _fit(layout)
    return layout


def locate(model: str | Path, download: bool = False) -> Path:
    """Where a model lies: the embedded one, a file or folder, or a repository in the Hub's cache (or, if so wanted, fetched)."""
    if model == "tiny":
        return EMBEDDED
    if isinstance(model, str) and model.startswith("tiny:"):
        return _embedded_variant(model)
    path = Path(model)
    if path.exists():
        return path
    if not isinstance(model, str) or not hub.is_id(model):
        raise MinicosError(
            f"{model} is not a folder with a model. `--model tiny` is the one that comes with minicos."
        )
    return hub.fetch(model) if download else hub.cached(model)


def embedded_variants() -> tuple[str, ...]:
    """What "tiny:NAME" can open: the variants of the embedded model that come with the package."""
    folders = sorted(EMBEDDED_VARIANTS.iterdir()) if EMBEDDED_VARIANTS.is_dir() else []
    return tuple(path.name for path in folders if (path / "high_noise_model").is_dir())


def _embedded_variant(model: str) -> Path:
    name, there = model.removeprefix("tiny:"), embedded_variants()
    if name not in there:
        listed = ", ".join(f"tiny:{one}" for one in there) or "none in this version"
        raise MinicosError(
            f"there is no variant {model}: take tiny, or one of its variants ({listed})."
        )
    return EMBEDDED_VARIANTS / name


def _shared() -> dict[str, Path]:
    """The parts that variants of the embedded model have from it."""
    return {name: EMBEDDED / OFFICIAL[name][0] for name in ("vae", "text", "tokenizer")}


def dit_config(model: str | Path) -> DiTConfig:
    """The shapes of a model's transformer. Reads its headers only; the rest of the model need not be there."""
    evidence = _survey(locate(model), {}).evidence
    possible = variants.likely(evidence)
    name = possible[0] if possible else variants.resolve(evidence)[0]  # which says what is wrong
    return variants.VARIANTS[name]


def places(model: Path) -> tuple[str, dict[str, Path]]:
    """The kind of a layout, and where it has its parts. A network that is not there is left out."""
    if model.is_file():
        return "single file", {claim(model) or "high": model, **_rest(model.parent)}
    if (model / "model_index.json").exists() or (model / "transformer").is_dir():
        return "diffusers", _there(model, DIFFUSERS)
    found = _there(model, OFFICIAL)
    if "high" not in found and "low" not in found and model.is_dir():
        weights = [p for p in model.iterdir() if p.suffix == ".safetensors" or is_archive(p)]
        others = [p for p in weights if p not in found.values()]
        if others or not weights:
            found[claim(model) or "high"] = others[0] if len(others) == 1 else model
    return "official", found


def claim(path: Path) -> str | None:
    """Which expert the name of a file or of its folder claims to be."""
    name = f"{path.parent.name}/{path.name}"
    claims = {e for e in ("high", "low") if re.search(rf"{e}[_-]?noise", name, re.IGNORECASE)}
    return claims.pop() if len(claims) == 1 else None


def evidence(
    model: Path, kind: str, at: Mapping[str, Path], shapes: variants.Architecture
) -> variants.Evidence:
    """What the places of a layout say about the model, beside the shapes of its network."""
    there = tuple(name for name in ("high", "low") if name in at)
    index = _json(model, "model_index.json") if kind == "diffusers" else {}
    second = index.get("transformer_2") or [None]
    named = ("low" in there) or bool(second[0]) or any(claim(at[name]) for name in there)
    classes = [str(_json(at[name]).get("_class_name")) for name in there] + [
        str(index.get("_class_name"))
    ]
    chrono = any(name.startswith("ChronoEdit") for name in classes)  # of diffusers
    whole = kind == "diffusers" or (kind == "official" and "vae" in at)
    return variants.Evidence(
        str(model), shapes, there, named, whole, "ChronoEdit-14B" if chrono else None
    )


def official(headers: Iterable[Header]) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of a network's tensors. Raises MinicosError where a key belongs to no known network."""
    headers = tuple(headers)
    weights = {key: info.shape for key, info in tensors(headers).items() if is_weight(key)}
    rename = renamer(weights)
    try:
        return {rename(key): shape for key, shape in weights.items()}
    except MinicosError as error:
        raise MinicosError(f"{headers[0].path}: {error}") from error


def vae_config(headers: Sequence[Header], given: Mapping[str, Any] = {}) -> VAEConfig:
    """The configuration of a VAE: from its file's metadata or from its shapes, with the statistics of a config.json."""
    if metadata := _metadata(headers, VAEConfig):
        return metadata
    shapes = official(headers)
    statistics = {
        ours: tuple(given[theirs])
        for ours, theirs in (("mean", "latents_mean"), ("std", "latents_std"))
        if theirs in given
    }
    try:
        told = (
            _vae22(shapes)
            if "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes
            else _vae21(shapes)
        )
        return replace(VAE22 if told["z_dim"] == VAE22.z_dim else VAEConfig(), **told, **statistics)
    except (LookupError, ValueError, ArithmeticError) as error:
        raise MinicosError(
            f"{headers[0].path} is not a VAE of Wan: {error}. Try `minicos inspect`."
        ) from error


def text_config(headers: Sequence[Header], text_len: int) -> TextConfig:
    """The configuration of a text encoder, from its shapes; `text_len` is the transformer's."""
    shapes = official(headers)
    try:
        vocab_size, dim = shapes["token_embedding.weight"]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        return TextConfig(
            vocab_size=vocab_size,
            dim=dim,
            dim_attn=shapes["blocks.0.attn.q.weight"][0],
            dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
            num_heads=num_heads,
            num_buckets=num_buckets,
            text_len=text_len,
            num_layers=1
            + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        )
    except (LookupError, ValueError) as error:
        raise MinicosError(
            f"{headers[0].path} is not a UMT5 encoder: {error}. Try `minicos inspect`."
        ) from error


# -- the steps of `find` ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Survey:
    """A model's parts before it is known what they make."""

    model: Path
    kind: str
    places: dict[str, Path]
    networks: dict[str, tuple[Header, ...]]  # expert -> headers
    evidence: variants.Evidence


def _survey(model: Path, parts: Mapping[str, str | Path]) -> _Survey:
    kind, own = places(model)
    found = dict(own)
    for name, path in parts.items():
        if name not in PARTS:
            raise MinicosError(f"there is no part {name!r}: take one of {', '.join(PARTS)}.")
        if not Path(path).exists():
            raise MinicosError(f"{path} does not exist: --part {name}={path}. Check the path.")
        found[name] = Path(path)
    networks = {name: read_headers(found[name]) for name in ("high", "low") if name in found}
    if not networks:
        raise MinicosError(
            f"{model} holds no transformer: high_noise_model/, transformer/ or diffusion_pytorch_model*.safetensors. "
            "Check the path, or name it: --part high=FILE."
        )
    bases = {name: headers for name, headers in networks.items() if not _is_lora(headers)}
    if not bases:
        raise MinicosError(
            f"{found['high' if 'high' in networks else 'low']} is a LoRA: give the model it is for, and it by --lora."
        )
    shapes = {name: variants.architecture(official(headers)) for name, headers in bases.items()}
    for name, told in shapes.items():
        if not told:
            raise MinicosError(
                f"{found[name]} is not a Wan network in any layout known here. Try `minicos inspect`."
            )
    first = next(iter(shapes.values()))
    if any(other != first for other in shapes.values()):
        differ = next(k for k in first if first[k] != shapes["low"].get(k))
        raise MinicosError(
            f"{model}: its experts are of two models ({differ} {first[differ]} and {shapes['low'].get(differ)}). "
            "Give the two experts of one."
        )
    given = {name: found[name] for name in networks}
    return _Survey(model, kind, found, networks, evidence(model, kind, own | given, first))


def _experts(seen: _Survey, variant: str, lora: LoraFiles) -> dict[str, Part]:
    """The networks of a model that is known, each with its LoRAs; an only one is called "high"."""
    names = ("high", "low")[: len(seen.networks)]
    for name in set(lora) - set(names):
        advice = (
            f"{variant} has one network: --lora high=FILE" if name == "low" else "take high or low"
        )
        raise MinicosError(f"there is no expert {name!r} for a LoRA: {advice}.")
    base = next(headers for headers in seen.networks.values() if not _is_lora(headers))
    experts = {}
    for name, (there, headers) in zip(names, seen.networks.items(), strict=True):
        config = variants.configure(variant, _json(seen.places[there]), str(seen.places[there]))
        loras = tuple(_with_strength(one) for one in lora.get(name, ()))
        if _is_lora(headers):
            loras, headers = (*((header.path, 1.0) for header in headers), *loras), base
        experts[name] = Part(_files(headers), config, loras)
    samples = [
        b"".join(map(_sample, part.files)) + repr(part.loras).encode() for part in experts.values()
    ]
    if len(samples) == 2 and samples[0] == samples[1]:
        raise MinicosError(
            f"{seen.model}: both experts are the same network. Name the other: --part low=FILE."
        )
    return experts


def _fit(layout: Layout) -> None:
    """Raise MinicosError where parts of two models were put together."""
    cfg, vae, text = layout.experts["high"].config, layout.vae, layout.text
    if vae.config.z_dim != cfg.out_dim:
        need = {16: "Wan2.1_VAE", 48: "Wan2.2_VAE"}.get(cfg.out_dim, "its own VAE")
        raise MinicosError(
            f"{vae.files[0]} has {vae.config.z_dim} latent channels, and {layout.variant} has {cfg.out_dim}. "
            f"Give {need}: --part vae=FILE."
        )
    if text.config.dim != cfg.text_dim:
        raise MinicosError(
            f"{text.files[0]} makes text of width {text.config.dim}, and {layout.variant} reads {cfg.text_dim}. "
            "Give its own text encoder: --part text=FILE."
        )


def _part(seen: _Survey, name: str) -> tuple[Header, ...]:
    if name not in seen.places:
        usual = {"official": OFFICIAL, "diffusers": DIFFUSERS}.get(seen.kind, {}).get(name, ())
        names = f" ({' or '.join(usual)})" if usual else ""
        raise MinicosError(
            f"{seen.model} comes without {PARTS[name]}{names}. Name it: --part {name}=FILE."
        )
    return read_headers(seen.places[name])


def _clip(headers: tuple[Header, ...]) -> Part:
    """The image encoder; its configuration is the official one unless the file carries another."""
    return Part(_files(headers), _metadata(headers, CLIPConfig) or CLIPConfig())


def _tokenizer(path: Path | None, model: Path) -> Path:
    """The tokenizer.json: the part or the folder's own, else the environment's, else that of google/umt5-xxl in the Hub's cache."""
    if path is not None:
        return path / "tokenizer.json" if path.is_dir() else path
    if named := os.environ.get(TOKENIZER):
        if Path(named).is_file():
            return Path(named)
        raise MinicosError(
            f"{named} does not exist, and {TOKENIZER} names it. Correct that variable."
        )
    try:
        cached = hub.cached("google/umt5-xxl") / "tokenizer.json"
    except MinicosError:
        cached = Path()
    if cached.is_file():
        return cached
    raise MinicosError(
        f"{model} comes without a tokenizer.json, and neither {TOKENIZER} nor the Hub cache of google/umt5-xxl has one. "
        "Get one with `hf download google/umt5-xxl tokenizer.json`, or name one: --part tokenizer=FILE."
    )


def _there(model: Path, names: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    return {
        part: next(model / name for name in options if (model / name).exists())
        for part, options in names.items()
        if any((model / name).exists() for name in options)
    }


def _rest(folder: Path) -> dict[str, Path]:
    """The parts other than networks that lie beside a file under their official names."""
    return {
        part: path for part, path in _there(folder, OFFICIAL).items() if part not in ("high", "low")
    }


def _files(headers: Sequence[Header]) -> tuple[Path, ...]:
    return tuple(header.path for header in headers)


def _is_lora(headers: Sequence[Header]) -> bool:
    return lora_dialect(tensors(headers)) is not None


def _with_strength(given: str | Path | tuple[str | Path, float]) -> tuple[Path, float]:
    path, strength = given if isinstance(given, tuple) else (given, 1.0)
    if not Path(path).is_file():
        raise MinicosError(f"the LoRA {path} does not exist or is not a file. Check the path.")
    return Path(path), float(strength)


def _sample(path: Path, pieces: int = 16, length: int = 1 << 16) -> bytes:
    """A hash of a file's size and of pieces from its first to its last byte: a megabyte at most, however large it is."""
    digest = sha256()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8, "little"))
        for i in range(pieces):
            file.seek(max(0, size - length) * i // (pieces - 1))
            digest.update(file.read(length))
    return digest.digest()


def _json(place: Path, name: str = "config.json") -> dict[str, Any]:
    """A table beside a network's files; empty where there is none."""
    path = (place.parent if place.is_file() else place) / name
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MinicosError(f"{path} is not a table in JSON: {error}. Download it again.") from error


def _metadata(headers: Sequence[Header], cls: type) -> Any:
    """The configuration that a file carries in its metadata; None where it has none."""
    text = headers[0].metadata.get("config")
    if text is None:
        return None
    try:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in given.items() if k in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise MinicosError(
            f"{headers[0].path}: the configuration in its metadata cannot be read ({error}). Download it again."
        ) from error


def _vae21(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of VAEConfig that shapes tell. Wan2.1: the encoder is a flat list of residual blocks, a resampler ending each stage."""
    name = "encoder.downsamples"
    depth = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith(name))
    per_stage = min(
        i for i in range(depth) if f"{name}.{i}.resample.1.weight" in shapes
    )  # residual blocks in each
    starts = range(0, depth, per_stage + 1)
    dim = shapes["encoder.conv1.weight"][0]
    return {
        "dim": dim,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": tuple(shapes[f"{name}.{i}.residual.6.weight"][0] // dim for i in starts),
        "num_res_blocks": per_stage,
        "temporal_downsample": tuple(
            f"{name}.{i + per_stage}.time_conv.weight" in shapes for i in starts[:-1]
        ),
    }


def _vae22(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The same of Wan2.2: a list of stages, each of residual blocks and, but for the last, a resampler."""
    name = "encoder.downsamples"
    stages = range(1 + max(int(key.split(".")[2]) for key in shapes if key.startswith(name)))
    blocks = sum(f"{name}.0.downsamples.{i}.residual.6.weight" in shapes for i in range(9))
    dim = shapes["encoder.conv1.weight"][0]
    mult = tuple(shapes[f"{name}.{i}.downsamples.0.residual.6.weight"][0] // dim for i in stages)
    return {
        "dim": dim,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": mult,
        "num_res_blocks": blocks,
        "temporal_downsample": tuple(
            f"{name}.{i}.downsamples.{blocks}.time_conv.weight" in shapes for i in stages[:-1]
        ),
        "dec_dim": shapes["decoder.conv1.weight"][0] // mult[-1],
        "patch_size": round((shapes["encoder.conv1.weight"][1] / 3) ** 0.5),
        "stage_shortcuts": True,
    }
