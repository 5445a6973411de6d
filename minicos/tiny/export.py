"""Write the trained networks as a folder in the official layout, in float16, which
`minicos.load("tiny")` opens."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree

import torch
from safetensors.torch import save_file
from torch import Tensor

from minicos.config import DiTConfig
from minicos.runs import replace_file, write_json
from minicos.text import Tokenizer
from minicos.tiny import train_dit, train_vae
from minicos.tiny.lora import save_lora


def export(
    folder: Path,
    weights: Path,
    tokenizer: Tokenizer,
    stage: str = "dit/averaged",
    share: float = 1.0,
) -> None:
    """Write the checkpoints of `folder` and the tokenizer to `weights`; without `low` the model has
    one expert.

    Args:
        stage: the checkpoint of the network: "dit/averaged", or an earlier one such as
            "dit/averaged-4000".
        share: of the trained decoder in the average with the one that it began as.
    """
    words = (folder / "tokenizer.json").read_bytes()
    replace_file(weights / "google/umt5-xxl/tokenizer.json", lambda path: path.write_bytes(words))
    vae = train_vae.averaged(folder, share)
    half(weights / "Wan2.1_VAE.safetensors", vae.state_dict(), asdict(vae.cfg))
    networks(weights, train_dit.finished(folder, tokenizer, stage))
    low = weights / "low_noise_model"
    if (folder / "low" / "averaged.safetensors").exists():
        save_updates(folder, "low", low)
    elif low.exists():
        rmtree(low)  # of another high-noise expert
    told(weights)


def export_variant(folder: Path, weights: Path, tokenizer: Tokenizer, stage: str) -> None:
    """What a variant has of its own: one expert, for a stage of `train_dit.LORAS` as a LoRA on the
    embedded model's; and the text encoder if that was trained too."""
    high, name = weights / "high_noise_model", stage.partition("/")[0]
    if high.exists():
        rmtree(high)  # no file of an earlier form may stay
    if how := train_dit.LORAS.get(name):
        save_updates(folder, name, high)
        configure(high, replace(train_dit.CFG, frame_causal=how.frame_causal))
        return told(weights)
    student, base = (train_dit.finished(folder, tokenizer, s) for s in (stage, "dit/averaged"))
    own, known = student.text.state_dict(), base.text.state_dict()
    networks(weights, student, text=any(not own[name].equal(known[name]) for name in own))
    told(weights)


def networks(weights: Path, student: train_dit.Student, text: bool = True) -> None:
    """Write the transformer and, with `text`, the text encoder."""
    high = weights / "high_noise_model"
    half(high / "diffusion_pytorch_model.safetensors", student.dit.state_dict())
    configure(high, student.dit.cfg)
    if text:
        path = weights / "models_t5_umt5-xxl-enc-bf16.safetensors"
        half(path, student.text.state_dict(), asdict(student.text.cfg))


def save_updates(folder: Path, stage: str, to: Path) -> None:
    """The LoRA of a stage, in float16."""
    save_lora(to / "lora.safetensors", train_dit.trained_updates(folder, stage), torch.float16)


def configure(network: Path, cfg: DiTConfig) -> None:
    """Write the config.json of a transformer, with the official fields; `frame_causal`, which is
    not one of them, only where it is true."""
    config = {"_class_name": "WanModel", "model_type": "i2v"} | {
        name: getattr(cfg, name)
        for name in (
            *("dim", "eps", "ffn_dim", "freq_dim", "in_dim"),
            *("num_heads", "num_layers", "out_dim", "text_len"),
        )
    }
    config |= {"frame_causal": True} if cfg.frame_causal else {}
    write_json(network / "config.json", dict(sorted(config.items())))


def told(weights: Path) -> None:
    total = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    print(f"{weights}: {total / 1e6:.2f} MB")


def half(path: Path, tensors: dict[str, Tensor], config: dict | None = None) -> None:
    """A safetensors file in float16, with the configuration in its metadata where the official
    layout has no place for it."""
    small = {k: v.half().contiguous() for k, v in tensors.items()}
    metadata = {"config": json.dumps(config)} if config else None
    replace_file(path, lambda temporary: save_file(small, temporary, metadata=metadata))
