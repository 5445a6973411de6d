"""The VAE against diffusers' AutoencoderKLWan with the same weights: encoding in float32, decoding
in float32, in bfloat16 and, on a card, with TF32 convolutions, which is the default there.

On a card, A14B's VAE at 832x480x81 with random weights; on a CPU, the embedded one at 64x64x13, and
both published ones with random weights at 64x64x5. TF32 is on for both sides in the lines that name
it, and off for both in all others. "dB" is the PSNR of pixels that ours decodes in bfloat16 or with
TF32, relative to float32: always of a drawn puzzle by the embedded VAE, since the PSNR of an
untrained one says little.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minicos import puzzles
from minicos.bench.measure import Line, alternate, attempt, ceilings, rate
from minicos.config import TINY_VAE, VAE22, VAEConfig
from minicos.media import to_float
from minicos.open import load
from minicos.precision import tf32_convolutions, without_tf32
from minicos.vae import VAE
from minicos.verify import diffusers_vae

FLOAT32, BFLOAT16, TF32 = "float32", "bfloat16", "TF32"  # ways to encode or decode


@dataclass(frozen=True)
class Subject:
    """A VAE and its inputs."""

    name: str
    vae: VAE
    video: Tensor  # 1 3 F H W in [-1, 1]
    latent: Tensor  # 1 c f h w


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    repeats = 2 if quick else 3 if device.type == "cuda" else 15
    s = subject(device, quick)
    known = s if quick else embedded(device)
    for what, way in ways(device):
        name = f"{what}, {s.name}" + f", {way}" * (way != FLOAT32)
        yield attempt(name, partial(_measured, name, s, what, way, repeats, known))
    if device.type == "cpu" and not quick:  # small pictures at the width of the published ones
        for version, cfg in (("2.1", VAEConfig()), ("2.2", VAE22)):
            _, sh, sw = cfg.stride
            s = random_subject(f"VAE {version} 64x64x5", cfg, (2, 64 // sh, 64 // sw), device)
            for what in ("encode", "decode"):
                name = f"{what}, {s.name}"
                yield attempt(name, partial(_measured, name, s, what, FLOAT32, 9, s))


def ways(device: torch.device) -> tuple[tuple[str, str], ...]:
    """What is measured and how: TF32 exists on a card."""
    found = (("encode", FLOAT32), ("decode", FLOAT32), ("decode", BFLOAT16))
    return (*found, ("decode", TF32)) if device.type == "cuda" else found


@without_tf32()
def _measured(name: str, s: Subject, what: str, way: str, repeats: int, known: Subject) -> Line:
    """`known` is decoded for the PSNR."""
    dtype = torch.bfloat16 if way == BFLOAT16 else torch.float32
    sides = encoders(s) if what == "encode" else decoders(s, dtype)
    if way != FLOAT32:
        name += f", {loss(known, way):.1f} dB"
    device = s.latent.device
    with tf32_convolutions(way == TF32):
        ours, theirs = alternate(
            *sides, device=device, repeats=repeats, label=name if device.type == "cuda" else ""
        )
    operations = flops(s, what)
    # products have no ceiling in TF32: they are never computed in it
    share = None if way == TF32 else ceilings(device, dtype).of_matmul(operations, ours)
    return Line(name, ours, "diffusers", theirs, share, rate(operations, ours))


Sides = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # ours, theirs


def encoders(s: Subject) -> Sides:
    theirs: Any = diffusers_vae(s.vae)
    return lambda: s.vae.encode(s.video), lambda: theirs.encode(s.video).latent_dist.mode()


def decoders(s: Subject, dtype: torch.dtype) -> Sides:
    """Theirs receives the result of our operations before the decoder."""
    ours = deepcopy(s.vae)
    theirs: Any = nn.Module.to(diffusers_vae(s.vae), dtype)  # its own `to` warns about nothing
    ours.decoder.to(dtype)
    mean, std = (
        s.latent.new_tensor(v).view(1, -1, 1, 1, 1) for v in (s.vae.cfg.mean, s.vae.cfg.std)
    )
    z = (s.latent * std + mean).to(dtype)
    return lambda: ours.decode(s.latent), lambda: theirs.decode(z).sample


@without_tf32()
def loss(s: Subject, way: str) -> float:
    """PSNR in dB of a decoding in bfloat16 or with TF32, relative to float32."""
    vae = deepcopy(s.vae)
    if way == BFLOAT16:
        vae.decoder.to(torch.bfloat16)
    with tf32_convolutions(way == TF32):
        found = vae.decode(s.latent)
    return psnr(found, s.vae.decode(s.latent))


def psnr(found: Tensor, expected: Tensor) -> float:
    """PSNR in dB of pixels in [-1, 1]."""
    return (10 * torch.log10(4 / (found - expected).square().mean())).item()


def flops(s: Subject, what: str) -> int:
    """The operations that torch counts on the meta device; a product and a sum count as two."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = VAE(s.vae.cfg).requires_grad_(False)
        twin.encode(s.video.to("meta")) if what == "encode" else twin.decode(s.latent.to("meta"))
    return counter.get_total_flops()


def subject(device: torch.device, quick: bool = False) -> Subject:
    if quick:
        return random_subject("quick", replace(TINY_VAE, dim=4), (2, 2, 3), device)
    if device.type == "cpu":
        return embedded(device)
    return random_subject("A14B 832x480x81", VAEConfig(), (21, 60, 104), device)


def embedded(device: torch.device) -> Subject:
    """The embedded model's VAE, and a drawn puzzle."""
    vae, (puzzle, *_) = load("tiny", device=device).vae, puzzles.distinct("maze", 1, 4, "test")
    video = to_float(puzzle.draw(0))[None].to(device)
    return Subject("tiny 64x64x13", vae, video, vae.encode(video))


def random_subject(
    name: str, cfg: VAEConfig, size: tuple[int, int, int], device: torch.device
) -> Subject:
    """Random weights, a random video and random latents of this size."""
    draw, (f, h, w), (t, sh, sw) = torch.Generator(device).manual_seed(0), size, cfg.stride
    shape = 1, 3, t * (f - 1) + 1, sh * h, sw * w
    video = torch.rand(shape, generator=draw, device=device) * 2 - 1
    latent = torch.randn(1, cfg.z_dim, f, h, w, generator=draw, device=device)
    return Subject(name, random_vae(cfg, device), video, latent)


def random_vae(cfg: VAEConfig, device: torch.device) -> VAE:
    """A VAE with random weights, scaled so that activations stay near 1."""
    with torch.device(device):
        vae = VAE(cfg).requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)
    for name, p in vae.named_parameters():
        noise = torch.randn(p.shape, generator=draw, device=device)
        size = 0.1 if p.ndim == 1 else p[0].numel() ** -0.5
        p.copy_(1 + 0.2 * noise if name.endswith("gamma") else size * noise)
    return vae
