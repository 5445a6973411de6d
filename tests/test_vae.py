"""The VAE against the official code, and what makes it stream: chunks do not matter, and nothing looks ahead."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicos.config import TINY_VAE, VAE21_MEAN, VAE21_STD, VAEConfig
from minicos.vae import VAE
from tests import golden
from tests.golden import rel_max

DATA = golden.read("vae21")
CFG = replace(
    golden.config(VAEConfig, "vae21"), temporal_downsample=tuple(golden.info("vae21")["config"]["temperal_downsample"])
)  # the official spelling
ARCHITECTURES = {
    "official": CFG,  # eight-fold in space, four-fold in time
    "shallow": replace(TINY_VAE, dim=4),
    "two-fold": VAEConfig(4, 2, (1, 2), num_res_blocks=1, temporal_downsample=(True,), mean=(0.0, 1.0), std=(1.0, 2.0)),
}


@cache
def vae(architecture: str = "official", dtype: torch.dtype = torch.float32) -> VAE:
    """The golden network, or a random one of another architecture. Shared: do not change it."""
    network = VAE(ARCHITECTURES[architecture]).requires_grad_(False).to(dtype)
    if architecture == "official":
        network.load_state_dict(golden.read("vae21.weights"))
        return network
    draw = torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        p.copy_(1 + 0.3 * noise if name.endswith("gamma") else noise * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
    return network


def video(network: VAE, latents: int, seed: int = 0, height: int = 2, width: int = 3) -> Tensor:
    """A random clip that has `latents` latent frames of height x width."""
    ft, fh, fw = network.cfg.stride
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 3, 1 + ft * (latents - 1), fh * height, fw * width, generator=draw)
    return (2 * pixels - 1).to(network.conv1.weight)


def latent(network: VAE, frames: int, seed: int = 0, height: int = 2, width: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, network.cfg.z_dim, frames, height, width, generator=draw).to(network.conv1.weight)


def each_architecture(dtype: torch.dtype):
    return pytest.mark.parametrize("network", [vae(name, dtype) for name in ARCHITECTURES], ids=ARCHITECTURES)


# -- the official outputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 8, 12])
def test_encoding_is_the_official_one(chunk):
    assert rel_max(vae().encode(DATA["in.video"], chunk), DATA["out.mu"]) < 8e-7  # measured 1.9e-7


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_decoding_is_the_official_one(chunk):
    assert rel_max(vae().decode(DATA["in.latent"], chunk), DATA["out.video"]) < 1e-5  # measured 3.3e-6


def test_epsilons_are_the_official_ones():
    """Weights scaled down until the epsilon of the norms shows: a wrong one is off by 5 % or more."""
    expected = golden.read("eps")
    weights = golden.read("vae21.weights")
    for pattern, factor in golden.info("eps")["config"]["scaling"]["vae21"]:
        base, exponent = factor.split("**")
        weights = {k: v * int(base) ** int(exponent) if re.search(pattern, k) else v for k, v in weights.items()}
    network = VAE(CFG).requires_grad_(False)
    network.load_state_dict(weights)
    assert rel_max(network.encode(DATA["in.video"][:, :, :1]), expected["vae21.mu"]) < 6e-7  # measured 1.4e-7
    assert rel_max(network.decode(DATA["in.latent"][:, :, :1]), expected["vae21.video"]) < 2.5e-6  # measured 6.0e-7


def test_latents_are_the_posterior_mean_normalised():
    mu, log_variance = vae().posterior(DATA["in.video"][:, :, :5])
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (VAE21_MEAN, VAE21_STD))
    assert rel_max(vae().encode(DATA["in.video"])[:, :, :2], (mu - mean) / std) < 1.5e-6  # measured 3.9e-7
    assert log_variance.shape == mu.shape
    assert rel_max(log_variance, mu) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes(architecture):
    network = vae(architecture)
    ft, fh, fw = network.cfg.stride
    assert (ft, fh, fw) == ((2, 2, 2) if architecture == "two-fold" else (4, 8, 8))
    assert network.encode(torch.zeros(2, 3, 1 + 2 * ft, 2 * fh, 3 * fw)).shape == (2, network.cfg.z_dim, 3, 2, 3)
    assert network.decode(torch.zeros(2, network.cfg.z_dim, 3, 2, 3)).shape == (2, 3, 1 + 2 * ft, 2 * fh, 3 * fw)


# -- chunks do not matter ----------------------------------------------------------------------------------------------
# In float64, where a wrong frame could not hide: convolutions of other sizes add in other orders, and in float32 a random
# decoder makes 2e-5 of that.


@each_architecture(torch.float64)
def test_encoding_does_not_depend_on_the_chunk(network):
    clip, ft = video(network, 7), network.cfg.stride[0]
    expected = network.encode(clip, ft)
    for times in (2, 3, 6):
        assert rel_max(network.encode(clip, times * ft), expected) < 5e-15  # measured 9.5e-16


@each_architecture(torch.float64)
def test_decoding_does_not_depend_on_the_chunk(network):
    z, ft = latent(network, 5), network.cfg.stride[0]
    expected = network.decode(z, 1)
    for chunk in (2, 3, 5, 99):
        pieces = list(network.stream(z, chunk))
        sizes = [ft * len(part) for part in torch.arange(5).split(chunk)]
        assert [p.shape[2] for p in pieces] == [sizes[0] - (ft - 1), *sizes[1:]]
        assert rel_max(torch.cat(pieces, dim=2), expected) < 1.5e-13  # measured 3.6e-14


plans = st.lists(st.integers(1, 4), min_size=1, max_size=4)  # latent frames of each chunk


@settings(max_examples=15)
@given(plans)
def test_any_plan_of_chunks_encodes_alike(plan):
    """The first chunk has one frame more, as the first latent frame stands for one picture."""
    network = vae("shallow", torch.float64)
    clip, stream = video(network, sum(plan), height=1, width=2), {}
    sizes = [4 * n - 3 * (i == 0) for i, n in enumerate(plan)]
    parts = [network.posterior(part, stream)[0] for part in clip.split(sizes, dim=2)]
    assert [p.shape[2] for p in parts] == plan
    assert rel_max(torch.cat(parts, dim=2), network.posterior(clip)[0]) < 5e-15  # measured 1.0e-15


@settings(max_examples=15)
@given(plans)
def test_any_plan_of_chunks_decodes_alike(plan):
    network = vae("shallow", torch.float64)
    z, stream = latent(network, sum(plan), height=1, width=2), {}
    parts = [network.decoder(part, stream) for part in z.split(plan, dim=2)]
    assert rel_max(torch.cat(parts, dim=2), network.decoder(z, {})) < 3e-13  # measured 6.4e-14


def test_nothing_is_left_behind_and_streams_do_not_meet():
    network, one, two = vae(), latent(vae(), 3, seed=1), latent(vae(), 3, seed=2)
    alone = network.decode(one), network.decode(two)
    together = list(zip(network.stream(one), network.stream(two), strict=True))
    for i in range(2):
        assert torch.equal(torch.cat([pair[i] for pair in together], dim=2), alone[i])
    assert torch.equal(network.encode(DATA["in.video"]), network.encode(DATA["in.video"]))


# -- nothing looks ahead -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3])  # in latent frames
@pytest.mark.parametrize("latents", [1, 2, 3])
@each_architecture(torch.float32)
def test_a_later_picture_never_changes_an_earlier_latent(network, latents, chunk):
    ft = network.cfg.stride[0]
    clip = video(network, 4)
    seen = 1 + ft * (latents - 1)  # the frames that the first `latents` latent frames stand for
    edited = clip.clone()
    edited[:, :, seen] *= -1  # the first frame that they do not
    before, after = network.encode(clip, chunk * ft), network.encode(edited, chunk * ft)
    assert torch.equal(before[:, :, :latents], after[:, :, :latents])
    assert not torch.equal(before[:, :, latents], after[:, :, latents])


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("frame", [1, 2, 3])
@each_architecture(torch.float32)
def test_a_later_latent_never_changes_an_earlier_picture(network, frame, chunk):
    z, ft = latent(network, 4), network.cfg.stride[0]
    edited = z.clone()
    edited[:, :, frame] *= -1
    before, after = network.decode(z, chunk), network.decode(edited, chunk)
    first = 1 + ft * (frame - 1)  # first picture of the edited latent frame
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first], after[:, :, first])


@each_architecture(torch.float64)
def test_the_first_latent_is_that_of_the_image_alone(network):
    clip = video(network, 3)
    assert rel_max(network.encode(clip)[:, :, :1], network.encode(clip[:, :, :1])) < 5e-15  # measured 0
    z = latent(network, 3)
    assert rel_max(network.decode(z)[:, :, :1], network.decode(z[:, :, :1])) < 1e-13  # measured 1.8e-14


def test_samples_of_a_batch_do_not_see_each_other():
    network = vae()
    clips = torch.cat([video(network, 2, seed=s) for s in range(2)])
    for i in range(2):
        assert rel_max(network.encode(clips)[i : i + 1], network.encode(clips[i : i + 1])) < 2e-6  # measured 5.5e-7


# -- edges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), "4 frames.*e.g. 5"),
        ((1, 3, 7, 16, 16), "7 frames.*e.g. 5"),
        ((1, 3, 5, 12, 16), "16x12 pixels"),
        ((1, 3, 5, 16, 20), "20x16 pixels"),
        ((1, 4, 5, 16, 16), "3 colour channels, not 4"),
    ],
)
def test_encoding_rejects_what_does_not_divide(shape, message):
    with pytest.raises(ValueError, match=message):
        vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("chunk", [-4, 0, 1, 6])
def test_encoding_rejects_chunks_that_cut_a_latent_frame(chunk):
    with pytest.raises(ValueError, match="multiple of 4"):
        vae().encode(DATA["in.video"], chunk)


def test_pixels_are_clamped():
    extreme = vae().decode(100 * latent(vae(), 2))
    assert extreme.min() == -1
    assert extreme.max() == 1
