"""diffusers' networks with the same random weights, under the names that `minicos.weights.names` translates to."""

from dataclasses import replace

import pytest
import torch

from minicos.config import VAE22, VAEConfig, preset
from minicos.dit import DiT
from minicos.ops import sinusoid
from minicos.vae import VAE
from minicos.weights.names import DIT_DIFFUSERS, VAE22_DIFFUSERS, VAE_DIFFUSERS, renamer, translate
from tests.golden import rel_max

diffusers = pytest.importorskip("diffusers")

DIT = {  # changes of the small network
    "narrow heads": {"num_heads": 3, "dim": 48},
    "wide head": {"num_heads": 1, "dim": 128, "num_layers": 1},
    "image channels": {"in_dim": 9, "num_layers": 3},
    "long text": {"text_len": 40, "ffn_dim": 100},
    "image branch": {"in_dim": 9, "image_tokens": 257, "image_dim": 12, "text_len": 512},  # they hard-code the 512
    "two images": {"in_dim": 9, "image_tokens": 514, "image_dim": 12, "text_len": 512},
}


def their_dit(ours: DiT, network=diffusers.WanTransformer3DModel):
    cfg = ours.cfg
    theirs = network(
        num_attention_heads=cfg.num_heads, attention_head_dim=cfg.head_dim, in_channels=cfg.in_dim, out_channels=cfg.out_dim,
        text_dim=cfg.text_dim, freq_dim=cfg.freq_dim, ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, eps=cfg.eps, rope_max_seq_len=32,
        image_dim=cfg.image_dim if cfg.images else None, added_kv_proj_dim=cfg.dim if cfg.images else None,
        pos_embed_seq_len=cfg.image_tokens if cfg.images == 2 else None,
    )  # fmt: skip
    theirs.load_state_dict({translate(name, DIT_DIFFUSERS): p for name, p in ours.state_dict().items()})
    return theirs.eval().requires_grad_(False)


@pytest.mark.parametrize("exact_time", [False, True])
@pytest.mark.parametrize("changes", DIT.values(), ids=DIT)
def test_velocity(changes, exact_time, small_dit):
    """The one systematic difference is their time sinusoid, which is built in float32."""
    ours = small_dit(seed=7, **changes)
    theirs, cfg = their_dit(ours), ours.cfg
    if exact_time:
        theirs.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, cfg.freq_dim).float()
    draw = torch.Generator().manual_seed(8)
    x, y = torch.randn(2, 4, 3, 6, 10, generator=draw), torch.randn(2, cfg.in_dim - 4, 3, 6, 10, generator=draw)
    text, t = torch.randn(2, cfg.text_len, 8, generator=draw), torch.tensor([937.25, 41.0])
    clip = torch.randn(2, cfg.image_tokens, cfg.image_dim, generator=draw) if cfg.images else None
    velocity = ours(x, t, text, y if cfg.in_dim > 4 else None, clip)
    each = None if clip is None else clip.reshape(-1, 257, cfg.image_dim)  # they take one image after the other
    expected = theirs(torch.cat([x, y], dim=1), t, text, each).sample
    assert rel_max(velocity, expected) < (1e-6 if exact_time else 2e-5)  # measured 0, 8.1e-6


def test_velocity_where_frames_have_their_own_timestep(small_dit):
    """They are told one timestep per token, we one per frame."""
    ours = small_dit(seed=7)
    theirs = their_dit(ours)
    theirs.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, ours.cfg.freq_dim).float()
    draw = torch.Generator().manual_seed(8)
    x, text = torch.randn(2, 4, 3, 4, 6, generator=draw), torch.randn(2, 5, 8, generator=draw)
    t = torch.tensor([[0.0, 500, 900], [0.0, 31.5, 31.5]])
    assert rel_max(ours(x, t, text), theirs(x, t.repeat_interleave(6, dim=1), text).sample) < 8e-7  # measured 2.0e-7


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_time_positions_of_chronoedit(frames, small_dit):
    """Two latent frames stand at 0 and 7 (their `rope_temporal_skip_len` 8), other numbers at 0, 1, 2 ..."""
    ours = small_dit(seed=7, image_tokens=257, image_dim=12, text_len=512)
    ours.time_skip = preset("ChronoEdit-14B").time_skip
    theirs = their_dit(ours, diffusers.ChronoEditTransformer3DModel)
    theirs.condition_embedder.timesteps_proj.forward = lambda t: sinusoid(t, ours.cfg.freq_dim).float()
    draw = torch.Generator().manual_seed(8)
    x, clip = torch.randn(1, 4, frames, 4, 6, generator=draw), torch.randn(1, 257, 12, generator=draw)
    text, t = torch.randn(1, 512, 8, generator=draw), torch.tensor([500.0])
    assert rel_max(ours(x, t, text, None, clip), theirs(x, t, text, clip).sample) < 1e-6  # measured 0


VAES = {
    "official topology": VAEConfig(dim=16),
    "other statistics": VAEConfig(dim=16, z_dim=2, dim_mult=(1, 2, 2, 4), mean=(0.5, -1.0), std=(3.0, 0.5)),
    "time first": VAEConfig(dim=16, dim_mult=(1, 1, 2, 2), temporal_downsample=(True, True, False)),
    "official topology, 2.2": replace(VAE22, dim=16, dec_dim=24),
    "narrow and time first, 2.2": VAEConfig(
        dim=8, z_dim=2, temporal_downsample=(True, True, False), dec_dim=12, patch_size=2, stage_shortcuts=True,
        mean=(0.5, -1.0), std=(3.0, 0.5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("cfg", VAES.values(), ids=VAES)
def test_vae(cfg):
    ours, draw = VAE(cfg).requires_grad_(False), torch.Generator().manual_seed(9)
    for name, p in ours.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        p.copy_(1 + 0.2 * noise if name.endswith("gamma") else noise * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
    theirs = diffusers.AutoencoderKLWan(
        base_dim=cfg.dim, z_dim=cfg.z_dim, dim_mult=list(cfg.dim_mult), num_res_blocks=cfg.num_res_blocks,
        temperal_downsample=list(cfg.temporal_downsample), latents_mean=list(cfg.mean), latents_std=list(cfg.std),
        decoder_base_dim=cfg.dec_dim, is_residual=cfg.stage_shortcuts, patch_size=cfg.patch_size if cfg.patch_size > 1 else None,
        in_channels=3 * cfg.patch_size**2, out_channels=3 * cfg.patch_size**2,
    )  # fmt: skip
    table = VAE22_DIFFUSERS if cfg.stage_shortcuts else VAE_DIFFUSERS
    theirs.load_state_dict({translate(name, table): p for name, p in ours.state_dict().items()})
    assert set(map(renamer(theirs.state_dict()), theirs.state_dict())) == set(ours.state_dict())
    theirs.eval().requires_grad_(False)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (cfg.mean, cfg.std))

    _, height, width = (side * n for side, n in zip(cfg.stride, (1, 2, 3), strict=True))
    video = torch.rand(2, 3, 9, height, width, generator=draw) * 2 - 1
    assert rel_max(ours.encode(video), (theirs.encode(video).latent_dist.mode() - mean) / std) < 2e-6  # measured 6.3e-7
    z = torch.randn(2, cfg.z_dim, 3, 2, 3, generator=draw)
    assert rel_max(ours.decode(z), theirs.decode(z * std + mean).sample) < 1e-5  # measured 3.4e-6
