"""Where the parts of a model lie in a folder. For now the official layout; others become one function each.

high_noise_model/   config.json, diffusion_pytorch_model*.safetensors          the expert for timesteps at and above the boundary
low_noise_model/    the same, or a LoRA on the high-noise expert (*lora*.safetensors)
Wan2.1_VAE.pth, or for TI2V-5B Wan2.2_VAE.pth      models_t5_umt5-xxl-enc-bf16.pth      google/umt5-xxl/tokenizer.json
models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth                        where the network has an image branch (Wan2.1)
"""

import json
import os
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

from minicos.config import VAE22, CLIPConfig, DiTConfig, TextConfig, VAEConfig
from minicos.errors import MinicosError
from minicos.weights.header import Header, is_archive, read_header, weight_files
from minicos.weights.names import lora_dialect


@dataclass(frozen=True)
class Expert:
    """The files of one network and the LoRA merged into it, if any."""

    files: tuple[Path, ...]
    config: DiTConfig
    lora: Path | None = None


@dataclass(frozen=True)
class Layout:
    """Every file that a model needs."""

    experts: dict[str, Expert]
    vae: Path
    text: Path
    tokenizer: Path
    clip: Path | None = None

    def fingerprint(self) -> str:
        """Tells these weights from others: a hash of the size and the last megabyte of every file."""
        digest = sha256()
        loras = [expert.lora for expert in self.experts.values() if expert.lora]
        others = [self.vae, self.text, self.tokenizer, *([self.clip] if self.clip else [])]
        for path in (*(p for e in self.experts.values() for p in e.files), *loras, *others):
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 2**20))
                digest.update(size.to_bytes(8, "little") + file.read())
        return digest.hexdigest()[:16]


def official(folder: Path) -> Layout:
    """The parts of an official folder. Raises MinicosError naming what is missing."""
    if not folder.is_dir():
        raise MinicosError(f"{folder} is not a folder with a model. `--model tiny` is the one that comes with minicos.")
    high = folder / "high_noise_model"
    base = _expert(high if high.is_dir() else folder)
    experts = {"high": base}
    low = folder / "low_noise_model"
    if low.is_dir():
        files = weight_files(low)
        is_lora = len(files) == 1 and not is_archive(files[0]) and lora_dialect(read_header(files[0]).tensors)
        experts["low"] = Expert(base.files, base.config, files[0]) if is_lora else _expert(low)
    return Layout(
        experts=experts,
        vae=_one(folder, "Wan2.1_VAE", "Wan2.2_VAE"),
        text=_one(folder, "models_t5_umt5-xxl-enc-bf16"),
        tokenizer=_found(folder / "google" / "umt5-xxl" / "tokenizer.json"),
        clip=_one(folder, "models_clip_open-clip-xlm-roberta-large-vit-huge-14") if base.config.image_tokens else None,
    )


def vae_config(path: Path) -> VAEConfig:
    """The configuration that a VAE file carries in its metadata, or the official one of its name."""
    return _from_metadata(path, VAEConfig, VAE22 if path.name.startswith("Wan2.2") else VAEConfig())


def text_config(path: Path) -> TextConfig:
    """The configuration that a text encoder's file carries in its metadata, or the official one."""
    return _from_metadata(path, TextConfig, TextConfig())


def clip_config(path: Path) -> CLIPConfig:
    """The configuration that CLIP's file carries in its metadata, or the official one."""
    return _from_metadata(path, CLIPConfig, CLIPConfig())


def dit_config(folder: Path, files: tuple[Path, ...]) -> DiTConfig:
    """The architecture of a network: widths from the shapes of its tensors, the number of heads and text rows from config.json."""
    shapes = {name: info.shape for path in files for name, info in read_header(path).tensors.items()}
    given = _config_json(folder)
    looks = shapes.get("img_emb.proj.0.weight")  # the image branch of Wan2.1
    image = {"image_dim": looks[0], "image_tokens": shapes.get("img_emb.emb_pos", (1, 257))[1]} if looks else {}
    try:
        width, inputs, *patch = shapes["patch_embedding.weight"]
        return DiTConfig(
            in_dim=inputs, out_dim=shapes["head.head.weight"][0] // (patch[0] * patch[1] * patch[2]), dim=width,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0], num_heads=given.get("num_heads", width // 128),
            num_layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
            text_dim=shapes["text_embedding.0.weight"][1], text_len=given.get("text_len", 512),
            freq_dim=shapes["time_embedding.0.weight"][1], eps=given.get("eps", 1e-6), patch_size=tuple(patch), **image,
        )  # fmt: skip
    except KeyError as error:
        raise MinicosError(
            f"{folder}: no tensor {error}; this is not a Wan network in the official layout. Try `minicos inspect`."
        ) from error
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise MinicosError(
            f"{folder}: config.json and tensors make no network ({error}). Download it again."
        ) from error


def _expert(folder: Path) -> Expert:
    single = folder / "diffusion_pytorch_model.safetensors"  # a lone expert may have other networks beside it
    files = (single,) if single.exists() else tuple(weight_files(folder))
    return Expert(files, dit_config(folder, files))


def _config_json(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise MinicosError(f"{path} is not a table in JSON: {error}. Download it again.") from error


def _from_metadata(path: Path, cls: type, official: VAEConfig | TextConfig):
    header: Header | None = None if is_archive(path) else read_header(path)
    text = header.metadata.get("config") if header else None
    if text is None:
        return official
    try:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in given.items() if k in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise MinicosError(
            f"{path}: the configuration in its metadata cannot be read ({error}). Download it again."
        ) from error


def _one(folder: Path, *stems: str) -> Path:
    for stem in stems:
        for ending in (".safetensors", ".pth"):
            path = folder / f"{stem}{ending}"
            if path.exists():
                return path
    raise MinicosError(
        f"{folder} has no {stems[0]}.safetensors or {stems[0]}.pth; it is part of every official Wan repository."
    )


def _found(path: Path) -> Path:
    if not path.exists():
        raise MinicosError(f"{path} is missing; it is part of every official Wan repository.")
    return path
