"""Write the trained networks as a folder in the official layout, float16: what `minicos.load("tiny")` opens."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minicos.runs import replace_file, write_json
from minicos.text import Tokenizer
from minicos.tiny import train_dit, train_vae
from minicos.weights import lora


def export(folder: Path, weights: Path, tokenizer: Tokenizer) -> None:
    """From the checkpoints of `folder` to `weights`, the tokenizer's file included; without `low` the model has one expert."""
    words = (folder / "tokenizer.json").read_bytes()
    replace_file(weights / "google/umt5-xxl/tokenizer.json", lambda path: path.write_bytes(words))
    vae, student = train_vae.finished(folder), train_dit.finished(folder, tokenizer)
    cfg = student.dit.cfg
    high = weights / "high_noise_model"
    half(high / "diffusion_pytorch_model.safetensors", student.dit.state_dict())
    write_json(
        high / "config.json",
        {
            "_class_name": "WanModel",
            "dim": cfg.dim,
            "eps": cfg.eps,
            "ffn_dim": cfg.ffn_dim,
            "freq_dim": cfg.freq_dim,
            "in_dim": cfg.in_dim,
            "model_type": "i2v",
            "num_heads": cfg.num_heads,
            "num_layers": cfg.num_layers,
            "out_dim": cfg.out_dim,
            "text_len": cfg.text_len,
        },
    )
    if (folder / "low" / "averaged.safetensors").exists():
        lora.save(
            weights / "low_noise_model" / "lora.safetensors",
            train_dit.low_deltas(folder),
            torch.float16,
        )
    half(weights / "Wan2.1_VAE.safetensors", vae.state_dict(), asdict(vae.cfg))
    half(
        weights / "models_t5_umt5-xxl-enc-bf16.safetensors",
        student.text.state_dict(),
        asdict(student.text.cfg),
    )
    total = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    print(f"{weights}: {total / 1e6:.2f} MB")


def half(path: Path, tensors: dict[str, Tensor], config: dict | None = None) -> None:
    """A safetensors file in float16, with the configuration in its metadata where the official layout has no place for it."""
    small = {k: v.half().contiguous() for k, v in tensors.items()}
    metadata = {"config": json.dumps(config)} if config else None
    replace_file(path, lambda temporary: save_file(small, temporary, metadata=metadata))
