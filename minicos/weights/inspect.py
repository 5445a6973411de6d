"""What is this file? Told from headers in a fraction of a second, without torch and without reading a weight.

`inspect(path)` takes whatever people have on disk: an official folder with its two experts, a diffusers folder, a folder of
shards, a single file from ComfyUI, a LoRA, a VAE. The names of the tensors tell the kind and the layout, their shapes tell
the architecture, and the architecture tells the variant. Where shapes cannot tell two variants apart, both are named;
folder and file names are used for one thing only: which expert, the high-noise one or the low-noise one, this is.
"""

import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minicos.config import VARIANTS, DiTConfig
from minicos.errors import MinicosError
from minicos.weights.header import Header, TensorInfo, is_archive, read_header, weight_files
from minicos.weights.names import LORA_KEY, NO_WEIGHTS, layout, lora_dialect, lora_module, renamer, strip

EXPERT_FOLDERS = {
    "official": {"high": "high_noise_model", "low": "low_noise_model"},
    "diffusers": {"high": "transformer", "low": "transformer_2"},
}
T2V_14B = "Wan2.2-T2V-A14B or Wan2.1-T2V-14B"  # equal names and shapes; two experts tell them apart

ARCHITECTURES: dict[str, DiTConfig] = {  # variant -> shapes
    **{name: cfg for name, cfg in VARIANTS.items() if name not in ("Wan2.2-T2V-A14B", "Wan2.1-T2V-14B")},
    T2V_14B: VARIANTS["Wan2.2-T2V-A14B"],
}
OTHERS = (  # not diffusion transformers: variant, a name that only it has, and the first size of that tensor
    ("Wan2.1_VAE", "decoder.upsamples.14.residual.0.gamma", 96),
    ("VAE like Wan2.1_VAE", "decoder.upsamples.0.residual.0.gamma", None),
    ("Wan2.2_VAE", "decoder.upsamples.0.upsamples.0.residual.0.gamma", 1024),
    ("VAE like Wan2.2_VAE", "decoder.upsamples.0.upsamples.0.residual.0.gamma", None),
    ("UMT5-XXL encoder", "blocks.23.attn.q.weight", 4096),
    ("encoder like UMT5-XXL", "blocks.0.attn.q.weight", None),
    ("CLIP image encoder", "visual.transformer.0.attn.to_qkv.weight", None),
    ("CLIP image encoder", "visual.transformer.0.attn.to_qkv.0.weight", None),
)


@dataclass(frozen=True)
class Checkpoint:
    """What `inspect` found. Counts are over all files; `parts` says which files make up which network."""

    path: str
    variant: str  # "Wan2.2-I2V-A14B", "Wan2.1_VAE", "LoRA", ... or "unknown"
    layout: str  # "official", "comfy", "comfy_fp8_scaled", "diffusers", "transformers", "pytorch", "lora:<dialect>"
    expert: str | None  # "high", "low", "high and low"; None where nothing says so
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]  # dtype -> tensors
    architecture: dict[str, int]  # fields of DiTConfig, read from shapes; for a LoRA its rank
    parts: dict[str, tuple[str, ...]]  # "high", "low" or "model" -> files
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Part:
    """One network: what its files say together."""

    variant: str
    layout: str
    expert: str | None
    headers: tuple[Header, ...]
    architecture: dict[str, int]
    notes: tuple[str, ...]


def inspect(path: str | Path) -> Checkpoint:
    """Say what a file or folder of weights is. Raises MinicosError where it is missing, damaged or not weights."""
    path = Path(path)
    parts = {name: _network(where, name) for name, where in _networks(path).items()}
    notes = [note for part in parts.values() for note in part.notes]
    first = next((part for part in parts.values() if part.variant != "LoRA"), next(iter(parts.values())))
    for name, part in parts.items():
        if part.variant == "LoRA" and part is not first:
            notes.append(f"its {name}-noise expert is a LoRA of rank {part.architecture.get('rank')} on the other one")
        elif part.architecture != first.architecture:
            raise MinicosError(f"{path}: its two experts differ in shape. Put the experts of one model there.")
    headers = [header for part in parts.values() for header in part.headers]
    tensors = [info for header in headers for info in header.tensors.values()]
    variant, experts = first.variant, [part.expert for part in parts.values() if part.expert]
    if variant == T2V_14B and experts:
        variant = "Wan2.2-T2V-A14B"
    return Checkpoint(
        path=str(path),
        variant=variant,
        layout=first.layout,
        expert=" and ".join(experts) or None,
        tensors=len(tensors),
        parameters=sum(info.elements for info in tensors),
        bytes=sum(header.size for header in headers),
        dtypes=dict(Counter(info.dtype for info in tensors).most_common()),
        architecture=first.architecture,
        parts={name: tuple(str(header.path) for header in part.headers) for name, part in parts.items()},
        notes=tuple(dict.fromkeys(notes)),
    )


def describe(checkpoint: Checkpoint) -> str:
    """The checkpoint in a few lines for people."""
    files = [file for names in checkpoint.parts.values() for file in names]
    rows = {
        "variant": checkpoint.variant,
        "layout": checkpoint.layout,
        "expert": checkpoint.expert,
        "tensors": f"{checkpoint.tensors:,} ({', '.join(f'{n:,} {dtype}' for dtype, n in checkpoint.dtypes.items())})",
        "parameters": f"{checkpoint.parameters:,}" if checkpoint.parameters else None,
        "architecture": ", ".join(f"{k} {v}" for k, v in checkpoint.architecture.items()),
        "size": f"{checkpoint.bytes:,} bytes in {len(files)} file{'s' * (len(files) > 1)}",
    }
    lines = [checkpoint.path, *(f"  {name:<13}{value}" for name, value in rows.items() if value)]
    return "\n".join([*lines, *(f"  note: {note}" for note in checkpoint.notes)])


def _networks(path: Path) -> dict[str, Path]:
    """The networks of a path: two experts where its folders are there, else one."""
    for folders in EXPERT_FOLDERS.values():
        found = {expert: path / name for expert, name in folders.items() if (path / name).is_dir()}
        if len(found) == 2:
            return found
        if found:
            return {"model": next(iter(found.values()))}
    return {"model": path}


def _network(path: Path, name: str) -> _Part:
    files = weight_files(path)
    archives = [file for file in files if is_archive(file)]
    if archives:
        return _archive(archives[0])
    headers = tuple(read_header(file) for file in files)
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for key, info in header.tensors.items():
            if key in tensors:
                raise MinicosError(f"{header.path}: {key} stands in another shard too. Download the shards again.")
            tensors[key] = info
    expert = name if name in ("high", "low") else _expert(path)
    kind = lora_dialect(tensors)
    if kind:
        return _Part("LoRA", f"lora:{kind}", expert, headers, _lora(tensors), ())
    found, notes = layout(tensors), ()
    try:
        rename = renamer(tensors)
        official = {rename(key): info for key, info in tensors.items() if key not in NO_WEIGHTS}
    except MinicosError as error:
        official, notes = tensors, (str(error),)
    if found == "official" and any(strip(key) != key for key in tensors):
        found = "comfy"
    if "scaled_fp8" in tensors or any(key.endswith((".scale_weight", ".weight_scale")) for key in tensors):
        found = "comfy_fp8_scaled"
    architecture = _architecture(official)
    variant = _variant(official, architecture)
    if variant == "unknown" and found == "official" and not architecture:
        found = "unknown"
    if variant == "unknown" and re.search(r"-\d{5}-of-\d{5}", path.name):
        notes = (*notes, "this is one shard of several: give the folder")
    if variant in ARCHITECTURES:
        architecture["num_heads"] = ARCHITECTURES[variant].num_heads
        notes = (*notes, *_incomplete(official, architecture["num_layers"]))
    return _Part(variant, found.split()[0], expert, headers, architecture, notes)


def _architecture(official: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The fields of DiTConfig that shapes tell (all but the number of heads); empty where this is no transformer."""
    modules = ("patch_embedding", "text_embedding.0", "time_embedding.0", "blocks.0.ffn.0", "head.head")
    shapes = [official[f"{name}.weight"].shape for name in modules if f"{name}.weight" in official]
    if [len(shape) for shape in shapes] != [5, 2, 2, 2, 2]:
        return {}
    patch, text, time, ffn, head = shapes
    return {
        "in_dim": patch[1],
        "out_dim": head[0] // max(1, patch[2] * patch[3] * patch[4]),
        "dim": patch[0],
        "ffn_dim": ffn[0],
        "num_layers": 1 + max(int(match[1]) for name in official if (match := re.match(r"blocks\.(\d{1,6})\.", name))),
        "text_dim": text[1],
        "freq_dim": time[1],
        "image_tokens": 514 if "img_emb.emb_pos" in official else 257 * ("img_emb.proj.0.weight" in official),
    }


def _variant(official: Mapping[str, TensorInfo], architecture: Mapping[str, int]) -> str:
    for name, cfg in ARCHITECTURES.items():
        if architecture and all(getattr(cfg, k) == v for k, v in architecture.items()):
            return name
    for name, marker, size in OTHERS:
        shape = official[marker].shape if marker in official and not architecture else None
        if shape is not None and (size is None or shape[:1] in ((size,), ())):  # an archive does not tell its shapes
            return name
    return "unknown"


def _incomplete(official: Mapping[str, TensorInfo], layers: int) -> tuple[str, ...]:
    """A note where a transformer lacks tensors: 15 outside the blocks, 27 in each; with CLIP 8 (9) and 5 more."""
    clip = "img_emb.proj.0.weight" in official
    expected = 15 + 27 * layers + (8 + 5 * layers + ("img_emb.emb_pos" in official) if clip else 0)
    found = sum(not re.search(r"\.(scale_weight|weight_scale|scale_input|input_scale)$", name) for name in official)
    return (
        ()
        if found == expected
        else (f"it has {found} tensors where {expected} are expected: the file is not complete",)
    )


def _lora(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Rank, and width and depth of the network that a LoRA is for."""
    found = {"rank": 0, "dim": 0, "num_layers": 0}
    for key, info in tensors.items():
        match = LORA_KEY.fullmatch(key)
        module = match and lora_module(match[1])
        if not module:
            continue
        if match[2] in ("lora_A", "lora_down") and len(info.shape) == 2:
            found["rank"] = max(found["rank"], info.shape[0])
            if module.endswith("self_attn.q"):
                found["dim"] = info.shape[1]
        if layer := re.match(r"blocks\.(\d{1,6})\.", module):
            found["num_layers"] = max(found["num_layers"], int(layer[1]) + 1)
    return {name: value for name, value in found.items() if value}


def _expert(path: Path) -> str | None:
    """Which expert the name of a file or of its folder claims to be."""
    claims = {
        e for e in ("high", "low") if re.search(rf"{e}[_-]?noise", f"{path.parent.name}/{path.name}", re.IGNORECASE)
    }
    return claims.pop() if len(claims) == 1 else None


STORAGES = {"FloatStorage": "F32", "BFloat16Storage": "BF16", "HalfStorage": "F16", "DoubleStorage": "F64"}


def _archive(path: Path) -> _Part:
    """A PyTorch file: a zip of a pickle and raw tensors. The pickle is read as a list of words and never executed."""
    note = "PyTorch archive; it is opened with weights_only=True on load"
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(e for e in archive.infolist() if e.filename.endswith("/data.pkl"))
            with archive.open(entry) as file:
                pickle = file.read(1 << 24)
            sizes = [e.file_size for e in archive.infolist() if re.search(r"/data/\d+$", e.filename)]
        words = [arg for op, arg, _ in pickletools.genops(pickle) if isinstance(arg, str)]
    except Exception as error:  # zipfile and pickletools raise a dozen kinds on damaged files
        raise MinicosError(f"{path} is not a PyTorch archive ({error or 'no data.pkl'}). Download it again.") from error
    names = {strip(word): TensorInfo("?", ()) for word in words}
    kinds = {STORAGES[last] for word in words for last in word.split()[-1:] if last in STORAGES}
    dtype = kinds.pop() if len(kinds) == 1 else "?"
    width = {"F64": 8, "F32": 4}.get(dtype, 2)
    tensors = {str(i): TensorInfo(dtype, (size // width if dtype != "?" else 0,)) for i, size in enumerate(sizes)}
    header = Header(path, path.stat().st_size, tensors, {})
    return _Part(_variant(names, {}), "pytorch", _expert(path), (header,), {}, (note,))
