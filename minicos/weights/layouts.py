"""The locations of a model's parts, in all common layouts on disk.

    official     high_noise_model/, low_noise_model/ (Wan2.1 and TI2V-5B: one network in the folder
                 itself), Wan2.x_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth,
                 google/umt5-xxl/tokenizer.json, models_clip_*.pth (Wan2.1 image-to-video)
    diffusers    model_index.json, transformer/ (the high-noise expert!), transformer_2/, vae/,
                 text_encoder/, image_encoder/, tokenizer/
    single file  one network (ComfyUI, DiffSynth); other parts are named individually, see `PARTS`

An expert may be a LoRA on the other one, as in the model that comes with minicos; most of this
model's variants are LoRAs on it. `find` reads
headers alone and does not import torch, so that problems are reported before anything is loaded.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

from minicos.config import CLIPConfig, DiTConfig, Preset, TextConfig, VAEConfig, get_preset
from minicos.errors import MinicosError
from minicos.weights import hub, variants
from minicos.weights.configs import architecture, clip_config, official, text_config, vae_config
from minicos.weights.files import read_table, reading, regular
from minicos.weights.header import (
    ARCHIVES,
    MAC,
    Header,
    is_shard,
    read_headers,
    read_part,
    tensors,
    weight_files,
)
from minicos.weights.names import SECOND, lora_dialect, relative, sections
from minicos.weights.stated import FOLLOW, departures, stated

EMBEDDED = Path(__file__).parents[1] / "tiny" / "weights"
EMBEDDED_VARIANTS = EMBEDDED.with_name("variants")  # of the embedded model, one folder each
USUAL = {"distilled": "4step"}  # variant of the embedded model -> its preset, if not the first
PARTS = {  # parts that can be named individually
    "high": "the network for high noise, or the only one",
    "low": "the network for low noise, or a LoRA that makes it of the other",
    "vae": "the VAE",
    "text": "the text encoder",
    "tokenizer": "its tokenizer.json",
    "clip": "the image encoder of Wan2.1 image-to-video",
}
OFFICIAL: dict[str, tuple[str, ...]] = {
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
DIFFUSERS: dict[str, tuple[str, ...]] = {
    "high": ("transformer",),
    "low": ("transformer_2",),
    "vae": ("vae",),
    "text": ("text_encoder",),
    "clip": ("image_encoder",),
    "tokenizer": ("tokenizer/tokenizer.json",),
}
TOKENIZER = "MINICOS_UMT5_TOKENIZER"  # names a tokenizer.json, for layouts without one

LoraFile = str | Path | tuple[str | Path, float]  # with its strength
LoraFiles = Mapping[str, LoraFile | Sequence[LoraFile]]
ListedLoras = Mapping[str, Sequence[LoraFile]]
C = TypeVar("C", DiTConfig, VAEConfig, TextConfig, CLIPConfig)


@dataclass(frozen=True)
class Part(Generic[C]):
    """The files of one network, its configuration, and the LoRAs to merge into it with their
    strengths.
    """

    files: tuple[Path, ...]
    config: C
    loras: tuple[tuple[Path, float], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Every file that a model needs, and the identity of the model."""

    kind: str  # "official", "diffusers", "single file"
    variant: str
    experts: dict[str, Part[DiTConfig]]  # "high", and "low" if there are two
    vae: Part[VAEConfig]
    text: Part[TextConfig]
    tokenizer: Path
    clip: Part[CLIPConfig] | None = None  # if the variant has one
    notes: tuple[str, ...] = ()
    stated: dict[str, float] = field(default_factory=dict)  # in a diffusers folder: shift, boundary
    usual: str | None = None  # the default preset; None: the first

    def preset(self, name: str | None = None) -> Preset:
        """A preset of the variant, by default the `usual` one; "diffusers" is the first with the
        values of the folder.

        Raises:
            MinicosError: there is no such preset, or the folder contains no such values.
        """
        if name != FOLLOW:
            return get_preset(self.variant, name or self.usual)
        if not self.stated:
            raise MinicosError(
                "--preset diffusers follows a diffusers folder, and this model has no "
                "scheduler/scheduler_config.json"
                " with a flow_shift. Take another preset."
            )
        return get_preset(self.variant).changed(**self.stated)

    @property
    def depth(self) -> int:
        """The number of blocks of the network."""
        return self.experts["high"].config.num_layers

    @property
    def heads(self) -> int:
        """The number of heads of an attention."""
        return self.experts["high"].config.num_heads

    def check(self, frames: int, tile: int | None) -> None:
        """Raise MinicosError for a number of frames or tiles that the VAE does not support."""
        from minicos.condition import check_frames
        from minicos.tiles import check_side

        time, side, _ = self.vae.config.stride
        check_frames(frames, time)
        check_side(tile, side)

    def fingerprint(self) -> str:
        """A fingerprint of the weights: a hash of samples of every file and of the strengths of
        LoRAs.
        """
        networks: list[Part] = [*self.experts.values(), self.vae, self.text]
        samples = [*map(_samples, networks), sampled(self.tokenizer)]
        samples += [] if self.clip is None else [_samples(self.clip)]
        return sha256(b"".join(samples)).hexdigest()[:16]


def find(
    model: str | Path,
    *,
    variant: str | None = None,
    parts: Mapping[str, str | Path] | None = None,
    lora: LoraFiles | None = None,
    download: bool = False,
) -> Layout:
    """Find the files of a model from their headers.

    Args:
        model: "tiny" (the model inside the package), "tiny:NAME" (a variant of it, with its
            other parts from "tiny"), a folder, a file, an index of shards, or the id of a
            repository on the Hub.
        variant: the variant if shapes cannot identify it, see `variants.resolve`.
        parts: name (see `PARTS`) -> file or folder, replacing that part of the model.
        lora: expert -> a file, a pair of file and strength, or a list of these; a model with one
            network has only "high".
        download: fetch a repository of the Hub that is not in the cache.

    Raises:
        MinicosError: a file or part, which the message names, is missing, damaged, of another
            model, or ambiguous.
    """
    if not isinstance(lora, Mapping | None):
        raise MinicosError(f'lora is a dictionary, such as {{"high": [file]}}, not {lora!r:.80}')
    loras = {name: _several(given) for name, given in (lora or {}).items()}
    path = locate(model, download)
    seen = _survey(
        path, {**(_shared(path) if path.parent == EMBEDDED_VARIANTS else {}), **(parts or {})}
    )
    name, notes = variants.resolve(seen.evidence, variant or hub.KNOWN.get(str(model)))
    networks = _experts(seen, name, loras)
    cfg = networks["high"].config
    vae, text = _part(seen, "vae"), _part(seen, "text")
    says = stated(path, len(networks)) if seen.kind == "diffusers" else {}
    notes = (*notes, *_sampled_large(name, variant), *departures(name, says))
    layout = Layout(
        kind=seen.kind,
        variant=name,
        experts=networks,
        vae=Part(_files(vae), vae_config(vae, _json(seen.places["vae"]))),
        text=Part(_files(text), text_config(text, cfg.text_len)),
        tokenizer=_tokenizer(seen.places.get("tokenizer"), path),
        clip=_clip(seen) if cfg.images else None,
        notes=(*notes, *_mismatches(seen, loras)),
        stated=says,
        usual=USUAL.get(path.name) if path.parent == EMBEDDED_VARIANTS else None,
    )
    _fit(layout)
    return layout


def locate(model: str | Path, download: bool = False) -> Path:
    """The path of a model: the embedded one, a file or folder, or a repository in the Hub's cache
    (downloaded on request).
    """
    if model == "tiny":
        return EMBEDDED
    if isinstance(model, str) and model.startswith("tiny:"):
        return _embedded_variant(model)
    with reading(model, "is not a path", "Give a folder, a file, or the id of a repository."):
        if model == "":  # e.g. from an unset shell variable; Path turns it into "."
            raise MinicosError(
                "--model is empty. Give a folder, a file, or the id of a repository."
            )
        path = Path(model)
        if path.exists():
            return path
    if address := re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", str(model)):
        raise MinicosError(
            f"{model} is an address. A repository of the Hub goes by its id: {address[1]}"
        )
    if not isinstance(model, str) or not hub.is_id(model):
        raise MinicosError(
            f"{model} is not a folder with a model. `--model tiny` is the one that comes with "
            "minicos."
        )
    return hub.fetch(model) if download else hub.cached(model)


def embedded_variants() -> tuple[str, ...]:
    """The values of NAME in "tiny:NAME": the variants of the embedded model in the package."""
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


def _shared(variant: Path) -> dict[str, Path]:
    """The parts of the embedded model that a variant of it does not replace."""
    there, own = _there(EMBEDDED, OFFICIAL), _there(variant, OFFICIAL)
    return {name: there[name] for name in ("vae", "text", "tokenizer") if name not in own}


def dit_config(model: str | Path) -> DiTConfig:
    """The shapes of a model's transformer, from its headers; other parts of the model may be
    missing.
    """
    seen = _survey(locate(model), {})
    evidence = seen.evidence
    possible = variants.likely(evidence)
    name = possible[0] if possible else variants.resolve(evidence)[0]  # raises if none is possible
    place = next(iter(seen.places[expert] for expert in evidence.experts))
    return variants.configure(name, evidence.shapes, _json(place), str(place))


def places(model: Path) -> tuple[str, dict[str, Path]]:
    """The kind of a layout, and the paths of its parts. Missing networks are omitted."""
    with reading(model):
        if not model.is_dir():
            # the other parts next to it, under their official names
            beside = {k: v for k, v in _there(model.parent, OFFICIAL).items() if k not in SIDES}
            return "single file", beside | _within(model)
        if (model / "model_index.json").exists() or (model / "transformer").is_dir():
            return "diffusers", _there(model, DIFFUSERS)
        found = _there(model, OFFICIAL)
        if "high" not in found and "low" not in found:
            endings = (".safetensors", *(f".{ending}" for ending in ARCHIVES))
            weights = [
                p for p in model.iterdir() if p.suffix in endings and not p.name.startswith(MAC)
            ]
            others = [p for p in weights if p not in found.values()]
            if others or not weights:
                found[claim(model) or "high"] = others[0] if len(others) == 1 else model
        return "official", found


def _within(file: Path) -> dict[str, Path]:
    """The parts in one file, which may contain several networks, even both experts."""
    names = sections(keys := tensors(read_headers(file)))
    if names.get("high") != names.get("low"):
        return dict.fromkeys(names, file)
    own = claim(file) or SIDES[all(key.startswith(SECOND) for key in keys)]
    return dict.fromkeys([own, *(names.keys() - set(SIDES))], file)


def claim(path: Path) -> str | None:
    """The expert that the name of a file, or of its folder, indicates: high_noise, HighNoise,
    -HIGH_, _high_, H-, HN, h_noise, hi_noise and so on.
    """
    there = path.parent.name
    folder = {e for e in SIDES if re.fullmatch(rf"{e}|.*{e}[ _-]?noise.*", there, re.I)}
    words = WORD.findall(path.name)
    own = {
        name
        for word, after in pairwise([*words, ""])
        if (
            name := SHORT.get(word)
            or SHORT.get(word.lower())
            or SHORT.get(f"{word}{after}".lower(), word.lower().removesuffix("noise"))
        )
        in SIDES
        and after.lower() not in OTHERWISE
    }
    claims = own or folder
    return claims.pop() if len(claims) == 1 else None


SIDES = ("high", "low")
SHORT = {"H": "high", "L": "low"} | {  # "h" alone may be a size: clip_vision_h
    **dict.fromkeys(("hn", "hnoise", "hinoise"), "high"),
    **dict.fromkeys(("ln", "lnoise", "lonoise"), "low"),
}
# H100 is one word, and HighNoise is two
WORD = re.compile(r"(?<![A-Za-z])[HL]\d+(?![A-Za-z\d])|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", re.ASCII)
# Words after "high" or "low" that show that noise is not meant: low_vram, high-res ...
OTHERWISE = (
    *("vram", "ram", "mem", "memory", "res", "resolution", "rank", "quality", "detail", "fps"),
    *("poly", "contrast", "light", "angle", "speed", "end", "step", "steps", "key"),
    *("motion", "heels", "kick", "cut", "rise", "school", "five", "frequency", "definition"),
)


def evidence(
    model: Path, kind: str, at: Mapping[str, Path], shapes: variants.Architecture
) -> variants.Evidence:
    """What the files of a layout tell about the model, in addition to the network's shapes."""
    there = tuple(name for name in ("high", "low") if name in at)
    index = _json(model, "model_index.json") if kind == "diffusers" else {}
    second = index.get("transformer_2")
    second = bool(second[0]) if isinstance(second, list) and second else bool(second)
    named = ("low" in there) or second or any(claim(at[name]) for name in there)
    classes = [_json(at[name]).get("_class_name") for name in there] + [index.get("_class_name")]
    chrono = any(str(name).startswith("ChronoEdit") for name in classes)  # of diffusers
    whole = kind == "diffusers" or (kind == "official" and "vae" in at)
    family = "ChronoEdit-14B" if chrono else _large_frames(model, at, shapes)
    return variants.Evidence(str(model), shapes, there, named, whole, family)


def _large_frames(model: Path, at: Mapping[str, Path], shapes: variants.Architecture) -> str | None:
    """Wan2.1-I2V-14B-720P if the name of its folder or file contains 720p: the content does not
    tell.
    """
    names = [path.name for path in (model, *(at[name] for name in ("high", "low") if name in at))]
    fits = "Wan2.1-I2V-14B" in variants.fitting(shapes)
    return (
        "Wan2.1-I2V-14B-720P" if fits and any(re.search("720p", n, re.I) for n in names) else None
    )


# -- the steps of `find` ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Survey:
    """A model's parts before the model is identified."""

    model: Path
    kind: str
    places: dict[str, Path]
    networks: dict[str, tuple[Header, ...]]  # expert -> headers
    base: tuple[Header, ...]  # of a network that is no LoRA
    evidence: variants.Evidence


def _survey(model: Path, parts: Mapping[str, str | Path]) -> _Survey:
    kind, own = places(model)
    found = dict(own)
    for name, given in parts.items():
        if name not in PARTS:
            raise MinicosError(
                f"--part {name}={given}: there is no part {name!r}. Take one of {', '.join(PARTS)}."
            )
        with reading(given, "is not a path", f"Give a file or folder: --part {name}=FILE."):
            found[name] = Path(given)
            if not found[name].exists():
                raise MinicosError(
                    f"{given} does not exist: --part {name}={given}. Check the path."
                )
    networks = {name: read_part(found[name], name) for name in SIDES if name in found}
    if not networks:
        raise MinicosError(
            f"{model} holds no transformer: high_noise_model/, transformer/ or "
            "diffusion_pytorch_model*.safetensors. "
            "Check the path, or name it: --part high=FILE."
        )
    bases = {name: headers for name, headers in networks.items() if not _is_lora(headers)}
    if not bases and model.parent == EMBEDDED_VARIANTS:
        bases = {"high": read_part(EMBEDDED / OFFICIAL["high"][0], "high")}
    if not bases:
        raise MinicosError(
            f"{found['high' if 'high' in networks else 'low']} is a LoRA: give the model it is "
            "for, and it by --lora."
        )
    shapes = {name: _architecture(found[name], headers) for name, headers in bases.items()}
    first = next(iter(shapes.values()))
    if any(other != first for other in shapes.values()):
        differ = next(k for k in first if first[k] != shapes["low"].get(k))
        raise MinicosError(
            f"{model}: its experts are of two models ({differ} {first[differ]} and "
            f"{shapes['low'].get(differ)}). "
            "Give the two experts of one."
        )
    about = evidence(model, kind, own | {name: found[name] for name in networks}, first)
    return _Survey(model, kind, found, networks, next(iter(bases.values())), about)


def _architecture(path: Path, headers: Sequence[Header]) -> dict[str, Any]:
    """The architecture of a transformer. Raises MinicosError if it is not one, or has unknown
    parts.
    """
    known = relative(tensors(headers))
    if known is not None:
        raise MinicosError(
            f"{path} is {known}, a network with parts that minicos does not have. "
            "Take the text-to-video or image-to-video model."
        )
    told = architecture(official(headers))
    if not told:
        shard = " It is one shard of several: give the folder." if is_shard(path) else ""
        raise MinicosError(
            f"{path} is not a Wan network in any layout known here (the name of a tensor: "
            f"{next(iter(tensors(headers)), 'none'):.80}).{shard} Try `minicos inspect`."
        )
    return told


def _experts(seen: _Survey, variant: str, lora: ListedLoras) -> dict[str, Part[DiTConfig]]:
    """The networks of an identified model, each with its LoRAs; a single one is called "high"."""
    names = ("high", "low")[: len(seen.networks)]
    for name in set(lora) - set(names):
        advice = (
            f"{variant} has one network: --lora high=FILE" if name == "low" else "Take high or low"
        )
        raise MinicosError(f"--lora {name}=...: there is no expert {name!r}. {advice}.")
    experts, sources = {}, []
    for name, (there, headers) in zip(names, seen.networks.items(), strict=True):
        place = seen.places[there]
        config = variants.configure(variant, seen.evidence.shapes, _json(place), str(place))
        loras = tuple(_with_strength(one) for one in lora.get(name, ()))
        if _is_lora(headers):
            loras, headers = (*((header.path, 1.0) for header in headers), *loras), seen.base
        experts[name] = Part(_files(headers), config, loras)
        sources.append(([(sampled(one.path), one.section) for one in headers], loras))
    if len(sources) == 2 and sources[0] == sources[1]:
        raise MinicosError(
            f"{seen.model}: both experts are the same network. Name the other: --part low=FILE."
        )
    return experts


def _sampled_large(name: str, asked: str | None) -> tuple[str, ...]:
    """A note on settings that were chosen because of a name."""
    if asked is not None or name != "Wan2.1-I2V-14B-720P":
        return ()
    return (
        "taken for the 720p model by its name: shift 5, frames of 1280x720 pixels (--variant "
        "Wan2.1-I2V-14B has those of 480p)",
    )


def _mismatches(seen: _Survey, lora: ListedLoras) -> tuple[str, ...]:
    """A note for each file whose name indicates the other expert."""
    used = [(name, seen.places[name]) for name in seen.networks]
    used += [(name, _with_strength(one)[0]) for name, many in lora.items() for one in many]
    return tuple(
        f"{path.name} is used for {name} noise, and its name says {claim(path)} noise: check which "
        "is which"
        for name, path in used
        if len(seen.networks) == 2 and claim(path) not in (None, name)
    )


def _fit(layout: Layout) -> None:
    """Raise MinicosError if parts of different models are combined."""
    cfg, vae, text = layout.experts["high"].config, layout.vae, layout.text
    if vae.config.z_dim != cfg.out_dim:
        need = {16: "Wan2.1_VAE", 48: "Wan2.2_VAE"}.get(cfg.out_dim, "its own VAE")
        raise MinicosError(
            f"{vae.files[0]} has {vae.config.z_dim} latent channels, and {layout.variant} has "
            f"{cfg.out_dim}. "
            f"Give {need}: --part vae=FILE."
        )
    if text.config.dim != cfg.text_dim:
        raise MinicosError(
            f"{text.files[0]} makes text of width {text.config.dim}, and {layout.variant} reads "
            f"{cfg.text_dim}. "
            "Give its own text encoder: --part text=FILE."
        )
    clip = layout.clip
    if clip is not None and (clip.config.dim, clip.config.tokens * cfg.images) != (
        cfg.image_dim,
        cfg.image_tokens,
    ):
        raise MinicosError(
            f"{clip.files[0]} makes {clip.config.tokens} rows of width {clip.config.dim} of an "
            "image, and "
            f"{layout.variant} reads {cfg.image_tokens // cfg.images} of {cfg.image_dim}. "
            "Give its own image encoder: --part clip=FILE."
        )


def _part(seen: _Survey, name: str) -> tuple[Header, ...]:
    if name not in seen.places:
        tables: dict[str, dict[str, tuple[str, ...]]] = {
            "official": OFFICIAL,
            "diffusers": DIFFUSERS,
        }
        usual = tables.get(seen.kind, {}).get(name, ())
        names = f" ({' or '.join(usual)})" if usual else ""
        cached = seen.model.parent.name == hub.SNAPSHOTS
        raise MinicosError(
            f"{seen.model} comes without {PARTS[name]}{names}. Name it: --part {name}=FILE"
            f"{', or fetch the rest of the repository: --download' * cached}."
        )
    return read_part(seen.places[name], name)


def _clip(seen: _Survey) -> Part[CLIPConfig]:
    headers = _part(seen, "clip")
    return Part(_files(headers), clip_config(headers, _json(seen.places["clip"])))


def _tokenizer(path: Path | None, model: Path) -> Path:
    """The tokenizer.json: the part or the folder's own, else the environment's, else that of
    google/umt5-xxl in the Hub's cache.
    """
    if path is not None:
        return regular(path / "tokenizer.json" if path.is_dir() else path)
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
        f"{model} comes without a tokenizer.json, and neither {TOKENIZER} nor the Hub cache of "
        "google/umt5-xxl has one. "
        "Get one with `hf download google/umt5-xxl tokenizer.json`, or name one: --part "
        "tokenizer=FILE."
    )


def _there(model: Path, names: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    found = {part: [model / name for name in names[part]] for part in names}
    return {  # links to files that are missing count, and are refused by name
        part: there[0]
        for part, paths in found.items()
        if (there := [path for path in paths if path.exists() or path.is_symlink()])
    }


def _files(headers: Sequence[Header]) -> tuple[Path, ...]:
    return tuple(header.path for header in headers)


def _is_lora(headers: Sequence[Header]) -> bool:
    return lora_dialect(tensors(headers)) is not None


def _several(given: Any) -> Sequence[LoraFile]:
    """The LoRAs of an expert as a list."""
    pair = isinstance(given, tuple) and len(given) == 2 and not isinstance(given[1], str | Path)
    return [given] if isinstance(given, str | Path) or pair else list(given)


def _with_strength(given: LoraFile) -> tuple[Path, float]:
    path, strength = given if isinstance(given, tuple) else (given, 1.0)
    with reading(path, "is not the path of a LoRA", "Give a file, or a pair of file and strength."):
        if not Path(path).exists():
            raise MinicosError(f"the LoRA {path} does not exist. Check the path.")
        (file,) = weight_files(Path(path))  # a folder of PEFT or diffusers holds one
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise MinicosError(f"the strength of the LoRA {path} is {strength!r:.40}: take a number.")
    return file, float(strength)


def _samples(part: Part) -> bytes:
    pieces = [sampled(path) for path in part.files]
    pieces += [sampled(path) + repr(float(strength)).encode() for path, strength in part.loras]
    return b"".join(pieces)


def sampled(path: Path, pieces: int = 16, length: int = 1 << 16) -> bytes:
    """A hash of a file's size and of pieces from its first to its last byte, at most one megabyte
    in total.
    """
    digest = sha256()
    with reading(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8, "little"))
        for i in range(pieces):
            file.seek(max(0, size - length) * i // (pieces - 1))
            digest.update(file.read(length))
    return digest.digest()


def _json(place: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON table next to a network's files; empty if there is none."""
    path = (place if place.is_dir() else place.parent) / name
    return read_table(path) if path.exists() or path.is_symlink() else {}
