"""Identify a file of weights from its headers, in a fraction of a second, without torch and without
reading tensors.

`inspect(path)` accepts an official folder with its two experts, a diffusers folder, a folder of
shards, a single file from ComfyUI, a LoRA, or a VAE. Names of tensors identify the kind and the
layout, their shapes the architecture, and `variants` lists all models that this can be. Names of
folders and files are used only to tell the high-noise expert from the low-noise one.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minicos.config import VARIANTS
from minicos.errors import MinicosError, printable
from minicos.weights import configs, layouts, variants
from minicos.weights.header import Header, TensorInfo, is_shard, read_headers, read_part, tensors
from minicos.weights.names import (
    FACTORS,
    UNREAD,
    UNUSED,
    VALUES,
    article,
    layout,
    lora_dialect,
    lora_key,
    quantised,
    relative,
    renamer,
    sections,
    strip,
    weights,
)


class Other(NamedTuple):
    """A network that is not a diffusion transformer, recognised by official tensor names."""

    kind: str
    marker: str  # a tensor that no other kind has
    published: str = ""  # name of the published one
    proof: tuple[str, int] = ("", 0)  # a tensor of that one, and the length of its first axis


OTHERS = (
    Other(
        "VAE like Wan2.1_VAE",
        "decoder.upsamples.0.residual.0.gamma",
        "Wan2.1_VAE",
        ("decoder.upsamples.14.residual.0.gamma", 96),
    ),
    Other(
        "VAE like Wan2.2_VAE",
        "decoder.upsamples.0.upsamples.0.residual.0.gamma",
        "Wan2.2_VAE",
        ("decoder.upsamples.0.upsamples.0.residual.0.gamma", 1024),
    ),
    Other(
        "encoder like UMT5-XXL",
        "blocks.0.attn.q.weight",
        "UMT5-XXL encoder",
        ("blocks.23.attn.q.weight", 4096),
    ),
    Other("CLIP image encoder", "visual.transformer.0.attn.proj.weight"),
)


@dataclass(frozen=True)
class Checkpoint:
    """The result of `inspect`. Counts cover all files; `parts` lists those of each network."""

    path: str
    variant: str  # "Wan2.2-I2V-A14B", "Wan2.1_VAE", "LoRA", ... or "unknown"
    # "official", "comfy", "comfy_fp8_scaled", "diffusers", "transformers", "pytorch",
    # "lora:<dialect>"
    layout: str
    expert: str | None  # "high", "low", "high and low"; None if unknown
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]  # dtype -> number of tensors
    architecture: dict[str, int]  # fields of DiTConfig, read from shapes; for a LoRA its rank
    parts: dict[str, tuple[str, ...]]  # "high", "low" or "model" -> files
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Part:
    """One network, described by all of its files."""

    variant: str
    layout: str
    expert: str | None
    headers: tuple[Header, ...]
    architecture: dict[str, int]
    notes: tuple[str, ...]


def inspect(path: str | Path) -> Checkpoint:
    """Identify a file or folder of weights. Raises MinicosError if it is missing, damaged or not
    weights.
    """
    path = Path(path)
    kind, places = layouts.places(path)
    found = {name: places[name] for name in ("high", "low") if name in places} or {"high": path}
    parts = {name: _network(name, where) for name, where in found.items()}
    notes = [note for part in parts.values() for note in part.notes]
    first = next(
        (part for part in parts.values() if part.variant != "LoRA"), next(iter(parts.values()))
    )
    for name, part in parts.items():
        if part.variant == "LoRA" and part is not first:
            notes.append(
                f"its {name}-noise expert is a LoRA of rank {part.architecture.get('rank')} on the "
                "other one"
            )
        elif part.architecture != first.architecture:
            raise MinicosError(
                f"{path}: its two experts differ in shape. Put the experts of one model there."
            )
    headers = [header for part in parts.values() for header in part.headers]
    infos = [info for header in headers for info in header.tensors.values()]
    variant, architecture = first.variant, dict(first.architecture)
    if variant == "transformer":
        evidence = layouts.evidence(path, kind, found | places, architecture)
        variant, more = _named(evidence)
        notes += more
        likely = variants.likely(evidence)
        if likely:
            architecture["num_heads"] = VARIANTS[likely[0]].num_heads
    experts = (
        list(parts) if len(parts) > 1 else [part.expert for part in parts.values() if part.expert]
    )
    return Checkpoint(
        path=str(path),
        variant=variant,
        layout=first.layout,
        expert=" and ".join(experts) or None,
        tensors=len(infos),
        parameters=sum(info.elements for info in infos),
        bytes=sum({header.path: header.size for header in headers}.values()),
        dtypes=dict(Counter(info.dtype for info in infos).most_common()),
        architecture={
            k: v for k, v in architecture.items() if k not in ("patch_size", "image_dim")
        },
        parts={
            name if len(parts) > 1 else "model": tuple(str(header.path) for header in part.headers)
            for name, part in parts.items()
        },
        notes=tuple(dict.fromkeys(notes)),
    )


def _named(evidence: variants.Evidence) -> tuple[str, list[str]]:
    """The variants that a transformer can be, with notes on alternatives and on what is missing."""
    possible = variants.likely(evidence)
    if len(possible) > 1:
        return " or ".join(possible), []
    try:
        variant, notes = variants.resolve(evidence)
    except MinicosError as error:
        said = str(error).removeprefix(f"{evidence.where}: ").removeprefix(f"{evidence.where} ")
        return (possible or ["unknown"])[0], [said]
    return variant, list(notes)


def describe(checkpoint: Checkpoint) -> str:
    """The checkpoint in a few lines for people."""
    files = {file for names in checkpoint.parts.values() for file in names}
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in checkpoint.dtypes.items())
    rows = {
        "variant": checkpoint.variant,
        "layout": checkpoint.layout,
        "expert": checkpoint.expert,
        "tensors": f"{checkpoint.tensors:,} ({dtypes})",
        "parameters": f"{checkpoint.parameters:,}" if checkpoint.parameters else None,
        "architecture": ", ".join(f"{k} {v}" for k, v in checkpoint.architecture.items()),
        "size": f"{checkpoint.bytes:,} bytes in {len(files)} file{'s' * (len(files) > 1)}",
    }
    lines = [checkpoint.path, *(f"  {name:<13}{value}" for name, value in rows.items() if value)]
    return "\n".join(map(printable, [*lines, *(f"  note: {note}" for note in checkpoint.notes)]))


def _network(name: str, path: Path) -> _Part:
    """The description of one network's files; `name` is that of an expert."""
    headers, expert = read_part(path, name), layouts.claim(path)
    found = tensors(headers)
    if kind := lora_dialect(found):
        what, about = _lora_kind(found)
        return _Part(what, f"lora:{kind}", expert, headers, _lora(found), about)
    official, notes = _renamed(found)
    architecture = configs.architecture({key: info.shape for key, info in official.items()})
    variant = "transformer" if architecture else _other(official)
    known = relative(found)
    stored = next(filter(None, map(quantised, found)), None)
    if stored is not None:
        variant, architecture = f"a network stored as {stored}", {}
        notes = ["this way of storing is not read: get the model in bf16, fp16 or fp8"]
    elif known is not None:
        variant, architecture = known, {}
        notes = [f"it is {known}, with parts that minicos does not have, so it cannot be opened"]
    archive, inside = headers[0].archive, headers[0].section
    names = sorted(set(sections(tensors(read_headers(path))).values())) if inside else []
    fp8 = any(info.dtype.startswith("F8") for info in found.values())
    remarks = {
        "PyTorch archive; it is opened with weights_only=True on load": archive,
        f"one file of several networks ({', '.join(names)}): only transformers count": inside,
        "fp8 is expanded when it is read: once, or with --residency disk at each use": fp8,
        "this is one shard of several: give the folder": variant == "unknown" and is_shard(path),
    }
    notes += [note for note, holds in remarks.items() if holds]
    if architecture and known is None:
        notes += _incomplete(official, architecture["num_layers"])
    named = "pytorch" if archive else _layout(found, variant != "unknown")
    return _Part(variant, named, expert, headers, architecture, tuple(notes))


def _renamed(found: Mapping[str, TensorInfo]) -> tuple[Mapping[str, TensorInfo], list[str]]:
    """The weights under their official names; unchanged, with a note, if a name has none."""
    try:
        rename = renamer(found)
        return {rename(name): found[key] for key, name in weights(found).items()}, []
    except MinicosError as error:
        return {strip(key): info for key, info in found.items()}, [str(error)]


def _layout(found: Mapping[str, TensorInfo], known: bool) -> str:
    """The naming and storage format of the tensors; official names of an unknown network are not a
    layout.
    """
    if any(key.endswith(tuple(VALUES)) for key in found):
        return "quanto"
    if any(strip(key) == "scaled_fp8" or key.endswith((*FACTORS, *UNUSED)) for key in found):
        integers = any(info.dtype == "I8" for info in found.values())
        return "int8_scaled" if integers else "comfy_fp8_scaled"
    if (named := layout(found)) != "official":
        return named.split()[0]  # of "diffusers VAE"
    if any(strip(key) != key for key in found):
        return "comfy"
    return "official" if known else "unknown"


def _other(official: Mapping[str, TensorInfo]) -> str:
    """The name of a network that is not a diffusion transformer."""
    for other in OTHERS:
        if other.marker in official:
            tensor, size = other.proof
            exact = tensor in official and official[tensor].shape[:1] == (size,)
            return other.published if exact else other.kind
    return "unknown"


def _incomplete(official: Mapping[str, TensorInfo], layers: int) -> list[str]:
    """A note if a transformer lacks tensors or has too many: 15 outside the blocks and 27 in each;
    with CLIP 8 (9) and 5 more.
    """
    clip = "img_emb.proj.0.weight" in official
    expected = 15 + 27 * layers + (8 + 5 * layers + ("img_emb.emb_pos" in official) if clip else 0)
    if len(official) == expected:
        return []
    less = "the file is not complete"
    more = "a relative of Wan with parts that minicos does not know, or a part of a larger network"
    reason = less if len(official) < expected else more
    return [f"it has {len(official)} tensors where {expected} are expected: {reason}"]


def _lora_kind(found: Mapping[str, TensorInfo]) -> tuple[str, tuple[str, ...]]:
    """ "LoRA" or the actual kind of the file, with notes on experts and on keys of unknown
    networks.
    """
    keys = {key: lora_key(key) for key in found}
    known = [key for key in keys.values() if key is not None]
    pieces, both = {key.piece for key in known}, len({key.low for key in known}) == 2
    unread, other = sorted(pieces & set(UNREAD)), relative((*found, "patch_embedding.weight"))
    kinds = article(", ".join(UNREAD[kind] for kind in unread) or "LoRA")
    strange = [key for key, parsed in keys.items() if parsed is None]
    remarks = {
        f"{kinds} is not read: merge it into the model with the tool that made it": unread,
        "it is for both experts: give it as --lora high=FILE low=FILE": both,
        f"it changes parts of {other}, which minicos does not have": other,
        f"{len(strange)} keys are of no network known here, e.g. {''.join(strange[:1])}": strange
        and not other,
    }
    notes = [note for note, holds in remarks.items() if holds]
    wide = found.get("diffusion_model.patch_embedding.lora_A.weight")
    if wide and wide.shape[1:2] > (36,):
        return "control LoRA", (*notes, "it widens the input of the network, which is not read")
    for form, start in (("LoKr", "lokr_"), ("LoHa", "hada_")):
        if any(piece.startswith(start) for piece in pieces):
            notes.append(f"a LoRA of the form {form}")
    return (UNREAD[unread[0]] if unread else "LoRA"), tuple(notes)


def _lora(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Rank of a LoRA, and width and depth of the network that it is for."""
    named = [(key, info.shape) for name, info in tensors.items() if (key := lora_key(name))]
    down = [(key.module, shape) for key, shape in named if key.piece == "down" and len(shape) == 2]
    widths = [width for module, (_, width) in down if module.endswith("self_attn.q")]
    layers = {key.module.split(".")[1] for key, _ in named if key.module.startswith("blocks.")}
    numbers = [int(layer) for layer in layers if layer.isdecimal() and len(layer) <= 6]
    found = {
        "rank": max((rank for _, (rank, _) in down), default=0),
        "dim": widths[-1] if widths else 0,
        "num_layers": 1 + max(numbers, default=-1),
    }
    return {name: value for name, value in found.items() if value}
