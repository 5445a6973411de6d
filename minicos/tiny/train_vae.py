"""Train the embedded VAE: the official Wan2.1 topology with 1.9 M parameters, on drawn puzzles.

Recipe (each point measured on a prototype): small crops of whole clips first and full clips in the
last quarter; MSE + 0.3 L1 + 1e-5 KL; Muon on convolution kernels; wide first convolutions, residual
branches that start small, a narrow posterior.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minicos.config import TINY_VAE
from minicos.puzzles import FRAMES, Puzzle, draw, timeline
from minicos.runs import read_json, replace_file, write_json
from minicos.tiny import optim
from minicos.tiny.mixture import Source, sources, unseen
from minicos.vae import VAE, Attention, ResidualBlock

CROP = 32  # pixels
USUAL = (4, FRAMES)  # shape of most clips: the one that is compiled
# Kinds with small figures or fast objects, which the decoder learns last (oracle .38 to .84 after
# 3,500 steps, where all others had .94 or more): it sees them this many times as often as the DiT.
FINE, OFTEN = ("sequence", "pick", "balls", "reveal", "memory", "slide", "tour"), 3.0


def initialise(vae: VAE) -> None:
    """Keep variance through the convolutions, start residual branches small, and start the
    posterior narrow (log-variance -6)."""
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight.data.mul_(3**0.5)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.residual[6].weight.data.mul_(0.1)  # type: ignore[operator]
        if isinstance(module, Attention):
            module.proj.weight.data.mul_(0.1)
    with torch.no_grad():
        vae.conv1.bias[vae.cfg.z_dim :] = -6.0  # type: ignore[index]


def clip(rng: np.random.Generator, alike: Sequence[Source]) -> np.ndarray:
    """A random training video of one of these sources: uint8 (frames, h, w, 3)."""
    source = pick(rng, alike)
    puzzle = source.family.draw(int(rng.integers(2**31)), split="train")
    return film(puzzle, int(rng.integers(len(puzzle.candidates))), source.frames)


def pick(rng: np.random.Generator, table: Sequence[Source]) -> Source:
    """A random source, with the DiT's training frequencies."""
    shares = np.array([source.share for source in table])
    return table[int(rng.choice(len(table), p=shares / shares.sum()))]


def film(puzzle: Puzzle, i: int, frames: int) -> np.ndarray:
    """Answer i in this number of frames: uint8 (frames, h, w, 3)."""
    if frames == puzzle.frames:
        return puzzle.draw(i)
    if frames == 1:
        return puzzle.first_frame()[None]
    return draw.to_uint8(puzzle.render(i, timeline(frames)))


def crops(rng: np.random.Generator, n: int) -> Tensor:
    """n crops of CROP pixels through all 13 frames, in [-1, 1]  (n 3 13 CROP CROP)."""
    out, alike = [], [source for source in sources() if source.frames == FRAMES]
    for _ in range(n):
        video = clip(rng, alike)
        top, left = (int(rng.integers(0, s - CROP + 1)) for s in video.shape[1:3])
        out.append(video[:, top : top + CROP, left : left + CROP])
    return to_tensor(np.stack(out))


def to_tensor(videos: np.ndarray) -> Tensor:
    """uint8 (n f h w 3) -> float in [-1, 1] (n 3 f h w)."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def batch(seed: int, step: int, steps: int) -> Tensor:
    """The training batch of a step: 8 crops, or a few full clips of one shape in the last
    quarter."""
    rng = np.random.default_rng((seed, step))
    return crops(rng, 8) if step < 0.75 * steps else full_clips(rng)


def full_clips(rng: np.random.Generator, tokens: int = 192) -> Tensor:
    """Whole clips of one shape, with about this number of tokens, in [-1, 1]  (n 3 f h w)."""
    table = [
        replace(one, share=one.share * OFTEN) if one.family.puzzle.kind in FINE else one
        for one in (*sources(), *unseen())
    ]
    one = pick(rng, table)
    alike = [source for source in table if source.shape == one.shape]
    n = max(1, round(tokens / one.tokens))
    return to_tensor(np.stack([clip(rng, alike) for _ in range(n)]))


def loss(vae: VAE, video: Tensor, generator: torch.Generator, compiled: bool = False) -> Tensor:
    """Reconstruction from a sampled latent, plus a little KL to keep the latents compact."""
    encode, decode = COMPILED if compiled else EAGER
    mu, logvar = vae.conv1(encode(vae, video), {}).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator).to(mu)
    error = decode(vae, vae.conv2(z, {})).float() - video
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean()
    return (error**2).mean() + 0.3 * error.abs().mean() + 1e-5 * kl


EAGER = (lambda vae, video: vae.encoder(video, {}), lambda vae, z: vae.decoder(z, {}))
COMPILED = tuple(
    torch.compile(f, dynamic=False) for f in EAGER
)  # needs a C++ compiler, and minutes at first


def statistics(vae: VAE, seed: int = 1, clips: int = 96) -> dict[str, list[float]]:
    """Mean and deviation of every latent channel, by which the DiT's latents are normalised."""
    rng, table = np.random.default_rng((seed, 2**20)), sources()
    with torch.no_grad():
        each = [
            vae.posterior(to_tensor(clip(rng, table)[None]))[0].transpose(0, 1).flatten(1)
            for _ in range(clips)
        ]
    mu = torch.cat(each, dim=1)  # c, everything else
    return {
        "mean": [round(v, 4) for v in mu.mean(1).tolist()],
        "std": [round(v, 4) for v in mu.std(1).tolist()],
    }


def train(
    folder: Path, *, steps: int, seed: int, device: str = "cpu", compiled: bool = False
) -> None:
    """First stage, into `folder`/vae, resuming."""
    torch.manual_seed(seed)
    vae = VAE(TINY_VAE)
    initialise(vae)
    vae.to(device)
    opts = optim.optimisers(vae, lambda name, p: p.ndim >= 4, muon_lr=4e-3, adam_lr=2e-3)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with optim.autocast(device):
            return loss(vae, batch(seed, step, steps).to(device), generator, compiled)

    optim.train(
        vae, loss_at, opts, steps=steps, warmup=50, decay=0.6, ema=0.998, folder=folder / "vae"
    )


def train_decoder(
    folder: Path, *, steps: int, seed: int, device: str = "cpu", compiled: bool = False
) -> None:
    """Second stage: the decoder alone, so that latents already in use stay valid; full clips, into
    `folder`/decoder.

    A little noise (0.02 of their deviation) is added to the latents, since the DiT that will
    produce them is not exact either.
    """
    vae = finished(folder).to(device)
    vae.decoder.requires_grad_(True)
    vae.conv2.requires_grad_(True)
    opts = optim.optimisers(vae, lambda name, p: p.ndim >= 4, muon_lr=2e-3, adam_lr=1e-3)
    blur = 0.02 * torch.tensor(vae.cfg.std, device=device).view(1, -1, 1, 1, 1)

    def loss_at(step: int) -> Tensor:
        video = full_clips(np.random.default_rng((seed + 1, step))).to(device)
        usual = (video.shape[3] // draw.CELL, video.shape[2]) == USUAL
        encode, decode = COMPILED if compiled and usual else EAGER
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with optim.autocast(device):
            with torch.no_grad():
                mu = vae.conv1(encode(vae, video), {}).chunk(2, dim=1)[0].float()
                z = mu + blur * torch.randn(mu.shape, generator=generator).to(mu)
            error = decode(vae, vae.conv2(z, {})).float() - video
        # the fourth power counts the few pixels that are far off: these fail the scorers
        return (error**2).mean() + 0.3 * error.abs().mean() + 4 * (error**4).mean()

    optim.train(
        vae, loss_at, opts, steps=steps, warmup=50, decay=0.8, ema=0.995, folder=folder / "decoder"
    )


def adopt(folder: Path, vae: VAE) -> None:
    """Use a trained VAE as the first stage of `folder`, with the statistics that normalise its
    latents."""
    (folder / "vae").mkdir(parents=True, exist_ok=True)
    statistics = {"mean": list(vae.cfg.mean), "std": list(vae.cfg.std)}
    write_json(folder / "vae" / "statistics.json", statistics)
    tensors = {name: value.contiguous() for name, value in vae.state_dict().items()}
    replace_file(folder / "vae" / "averaged.safetensors", lambda path: save_file(tensors, path))


def averaged(folder: Path, share: float) -> VAE:
    """The VAE of `folder` with weights between those that the second stage began with (share 0) and
    those that it ended with (1). An average of both keeps what either of them draws better."""
    vae = finished(folder)
    first = load_file(folder / "vae" / "averaged.safetensors")
    last = vae.state_dict()
    vae.load_state_dict({name: first[name].lerp(last[name], share) for name in last})
    return vae


def finished(folder: Path) -> VAE:
    """The VAE of `folder`, with the statistics of its latents, taken once, and the decoder of the
    second stage if that has begun."""
    first, second = (
        folder / "vae" / "averaged.safetensors",
        folder / "decoder" / "averaged.safetensors",
    )
    vae = VAE(TINY_VAE).requires_grad_(False)
    vae.load_state_dict(load_file(first))
    known = folder / "vae" / "statistics.json"
    if not known.exists():
        write_json(known, statistics(vae))
    told = read_json(known)
    vae.cfg = replace(vae.cfg, mean=tuple(told["mean"]), std=tuple(told["std"]))
    if second.exists():
        vae.load_state_dict(load_file(second))
    return vae
