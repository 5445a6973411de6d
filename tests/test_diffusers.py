"""diffusers' networks with the same random weights, as `minicos verify` builds them."""

from dataclasses import replace

import pytest
import torch

from minicos.config import VAE22, VARIANTS, VAEConfig, get_preset
from minicos.dit import DiT
from minicos.vae import VAE
from minicos.verify import diffusers_dit, diffusers_vae
from minicos.weights.names import renamer
from tests.golden import rel_max

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

DIT = {  # changes of the small network
    "narrow heads": {"num_heads": 3, "dim": 48},
    "wide head": {"num_heads": 1, "dim": 128, "num_layers": 1},
    "image channels": {"in_dim": 9, "num_layers": 3},
    "long text": {"text_len": 40, "ffn_dim": 100},
    "image branch": {
        "in_dim": 9,
        "image_tokens": 257,
        "image_dim": 12,
        "text_len": 512,
    },  # they hard-code the 512
    "two images": {"in_dim": 9, "image_tokens": 514, "image_dim": 12, "text_len": 512},
}


@pytest.mark.parametrize("exact_time", [False, True])
@pytest.mark.parametrize("changes", DIT.values(), ids=DIT)
def test_velocity(changes, exact_time, small_dit):
    """The one systematic difference is their time sinusoid, which is built in float32."""
    ours = small_dit(seed=7, **changes)
    theirs, cfg = diffusers_dit(ours, exact_time), ours.cfg
    draw = torch.Generator().manual_seed(8)
    x, y = (
        torch.randn(2, 4, 3, 6, 10, generator=draw),
        torch.randn(2, cfg.in_dim - 4, 3, 6, 10, generator=draw),
    )
    text, t = torch.randn(2, cfg.text_len, 8, generator=draw), torch.tensor([937.25, 41.0])
    clip = torch.randn(2, cfg.image_tokens, cfg.image_dim, generator=draw) if cfg.images else None
    velocity = ours(x, t, text, y if cfg.in_dim > 4 else None, clip)
    each = (
        None if clip is None else clip.reshape(-1, 257, cfg.image_dim)
    )  # they take one image after the other
    expected = theirs(torch.cat([x, y], dim=1), t, text, each).sample
    assert rel_max(velocity, expected) < (1e-6 if exact_time else 2e-5)  # measured 0, 8.1e-6


@pytest.fixture(scope="module")
def wide() -> DiT:
    """Two blocks as wide as those of Wan2.1-T2V-1.3B: 118 million random weights, which the peer
    shares.
    """
    with torch.device("meta"):
        network = DiT(replace(VARIANTS["Wan2.1-T2V-1.3B"], num_layers=2)).requires_grad_(False)
    network.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(10)
    for name, p in network.named_parameters():
        scale = (
            0.3 if p.ndim == 1 or "modulation" in name else (3 / p[0].numel()) ** 0.5
        )  # uniform with variance 1 / width
        p.uniform_(-scale, scale, generator=draw)
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
    return network


@pytest.mark.parametrize(
    ("exact_time", "tolerance"), [(False, 2e-5), (True, 1e-6)]
)  # measured 4.5e-6, 0
def test_velocity_at_real_width(exact_time, tolerance, wide):
    draw = torch.Generator().manual_seed(11)
    x, t = torch.randn(1, 16, 2, 6, 8, generator=draw), torch.tensor([873.0])
    text = torch.randn(1, 512, 4096, generator=draw)
    text[:, 40:] = 0
    expected = diffusers_dit(wide, exact_time)(x, t, text).sample
    assert rel_max(wide(x, t, text), expected) < tolerance


def test_velocity_where_frames_have_their_own_timestep(small_dit):
    """They take one timestep per token, we take one per frame."""
    ours = small_dit(seed=7)
    theirs = diffusers_dit(ours)
    draw = torch.Generator().manual_seed(8)
    x, text = torch.randn(2, 4, 3, 4, 6, generator=draw), torch.randn(2, 5, 8, generator=draw)
    t = torch.tensor([[0.0, 500, 900], [0.0, 31.5, 31.5]])
    assert (
        rel_max(ours(x, t, text), theirs(x, t.repeat_interleave(6, dim=1), text).sample) < 8e-7
    )  # measured 2.0e-7


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_time_positions_of_chronoedit(frames, small_dit):
    """Two latent frames stand at 0 and 7 (their `rope_temporal_skip_len` 8), other numbers at 0,
    1, 2 ...
    """
    ours = small_dit(seed=7, image_tokens=257, image_dim=12, text_len=512)
    ours.time_skip = get_preset("ChronoEdit-14B").time_skip
    theirs = diffusers_dit(ours)
    draw = torch.Generator().manual_seed(8)
    x, clip = (
        torch.randn(1, 4, frames, 4, 6, generator=draw),
        torch.randn(1, 257, 12, generator=draw),
    )
    text, t = torch.randn(1, 512, 8, generator=draw), torch.tensor([500.0])
    assert (
        rel_max(ours(x, t, text, None, clip), theirs(x, t, text, clip).sample) < 1e-6
    )  # measured 0


VAES = {
    "official topology": VAEConfig(dim=16),
    "other statistics": VAEConfig(
        dim=16, z_dim=2, dim_mult=(1, 2, 2, 4), mean=(0.5, -1.0), std=(3.0, 0.5)
    ),
    "time first": VAEConfig(dim=16, dim_mult=(1, 1, 2, 2), temporal_downsample=(True, True, False)),
    "official topology, 2.2": replace(VAE22, dim=16, dec_dim=24),
    "narrow and time first, 2.2": VAEConfig(
        dim=8,
        z_dim=2,
        temporal_downsample=(True, True, False),
        dec_dim=12,
        patch_size=2,
        stage_shortcuts=True,
        mean=(0.5, -1.0),
        std=(3.0, 0.5),
    ),
}


@pytest.mark.parametrize("cfg", VAES.values(), ids=VAES)
def test_vae(cfg):
    ours, draw = VAE(cfg).requires_grad_(False), torch.Generator().manual_seed(9)
    for name, p in ours.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        p.copy_(
            1 + 0.2 * noise
            if name.endswith("gamma")
            else noise * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
        )
    theirs = diffusers_vae(ours)
    assert set(map(renamer(theirs.state_dict()), theirs.state_dict())) == set(ours.state_dict())
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (cfg.mean, cfg.std))

    _, height, width = (side * n for side, n in zip(cfg.stride, (1, 2, 3), strict=True))
    video = torch.rand(2, 3, 9, height, width, generator=draw) * 2 - 1
    assert (
        rel_max(ours.encode(video), (theirs.encode(video).latent_dist.mode() - mean) / std) < 2e-6
    )  # measured 6.3e-7
    z = torch.randn(2, cfg.z_dim, 3, 2, 3, generator=draw)
    assert rel_max(ours.decode(z), theirs.decode(z * std + mean).sample) < 1e-5  # measured 3.4e-6
