"""Tiles: they cover a frame, a single one changes nothing, and seams are invisible."""

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minicos.config import VAE22, VAEConfig
from minicos.errors import MinicosError
from minicos.tiles import Tiles, fade, spans
from minicos.vae import VAE
from tests import golden

CONFIGS = {"vae21": VAEConfig(dim=4), "vae22": replace(VAE22, dim=4, dec_dim=6)}
each = pytest.mark.parametrize("case", CONFIGS)


@cache
def vae(case: str) -> VAE:
    network = VAE(CONFIGS[case]).requires_grad_(False)
    network.load_state_dict(golden.read(f"{case}.weights"))
    return network


def smooth(network: VAE, frames: int, height: int, width: int) -> Tensor:
    """Latents that change slowly over the picture."""
    phase = 6.28 * torch.rand(
        network.cfg.z_dim, 1, 1, 1, generator=torch.Generator().manual_seed(0)
    )
    f, h, w = (torch.arange(float(n)) for n in (frames, height, width))
    return 0.7 * torch.sin(phase + 0.5 * f[:, None, None] + 0.25 * h[:, None] + 0.2 * w)[None]


# -- geometry --------------------------------------------------------------------------------------

sides = st.integers(2, 40)


@given(st.integers(1, 200), sides, st.data())
def test_spans_cover_everything_and_share_what_they_must(length, side, data):
    overlap = data.draw(st.integers(1, side - 1))
    found = spans(length, side, overlap)
    assert (found[0][0], found[-1][1]) == (0, length)
    for (start, end), (following, _) in pairwise(found):
        assert end - start == side
        assert end - following >= overlap
    fewer = len(found) - 1  # one span less could not reach
    assert len(found) == 1 or side + (fewer - 1) * (side - overlap) < length


@given(st.integers(2, 60), sides, st.integers(1, 4))
def test_fading_weighs_every_place_and_only_where_tiles_meet(length, side, factor):
    overlap = max(1, side // 4)
    found = spans(length, side, overlap)
    total = torch.zeros(factor * length)
    for start, end in found:
        weight = fade((start, end), length, overlap, factor)
        assert weight.min() > 0
        assert weight.max() <= 1
        total[factor * start : factor * end] += weight
    assert total.min() > 0.5
    assert total[0] == total[-1] == 1  # the border of the frame is not a seam
    assert len(found) > 1 or torch.equal(total, torch.ones_like(total))


def test_what_does_not_change_comes_back_unchanged():
    """Through a layer that does nothing but double the size, tiles put the same picture together
    again.
    """
    x = torch.randn(
        2, 3, 4, 17, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    tiles = Tiles((17, 23), 64, 8)
    assert len(tiles.windows) == 3 * 4
    doubled = tiles(
        lambda part, memory: part.repeat_interleave(2, -1).repeat_interleave(2, -2), x, after=2
    )
    assert (
        doubled - x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    ).abs().max() < 2e-15  # measured 4.5e-16


@pytest.mark.parametrize("side", [0, 8, 60, -64])
def test_tiles_must_divide(side):
    with pytest.raises(
        MinicosError, match=f"tiles of {side} pixels: take a multiple of 8, 16 or more"
    ):
        vae("vae21").stream(torch.zeros(1, 16, 1, 4, 4), tile=side)


# -- the networks ----------------------------------------------------------------------------------


@each
def test_one_tile_is_no_tile(case):
    network, stride = vae(case), CONFIGS[case].stride[1]
    z = smooth(network, 2, 2, 3)
    assert torch.equal(network.decode(z, tile=3 * stride), network.decode(z))
    video = network.decode(z)
    assert torch.equal(network.encode(video, tile=8 * stride), network.encode(video))


@each
def test_tiles_stream_through_time(case):
    """Pieces of a clip come one by one, as without tiles, and how many frames are taken at once
    does not matter.
    """
    network, stride = copy.deepcopy(vae(case)).double(), CONFIGS[case].stride[1]
    z = smooth(network, 3, 2, 5).double()
    pieces = list(network.stream(z, chunk=1, tile=4 * stride))
    assert [tuple(piece.shape) for piece in pieces] == [
        (1, 3, n, 2 * stride, 5 * stride) for n in (1, 4, 4)
    ]
    whole = network.decode(z, chunk=3, tile=4 * stride)
    assert (torch.cat(pieces, dim=2) - whole).abs().max() < 1e-12  # measured 3.5e-15
    encoded = (network.encode(whole, chunk, tile=4 * stride) for chunk in (4, 8))
    assert golden.rel_max(*encoded) < 1e-13  # measured 6.1e-16


@each
def test_no_seams(case):
    """Where two tiles meet, the difference from the whole frame steps no more than elsewhere; a
    hard cut steps far more.
    """
    network, stride = vae(case), CONFIGS[case].stride[1]
    z = smooth(network, 1, 8, 20)
    whole = network.decode(z)
    hard = torch.cat([network.decode(part) for part in z.split(10, dim=-1)], dim=-1)
    tiled = network.decode(z, tile=8 * stride)
    windows = Tiles((8, 20), 8 * stride, stride).windows
    borders = [stride * edge for _, columns in windows for edge in columns if 0 < edge < 20]
    assert len(borders) == 4

    def steps(video: Tensor) -> Tensor:
        error = video - whole
        return error.diff(dim=-1).square().mean((0, 1, 2, 3)).sqrt()

    def at(video: Tensor, columns: list[int]) -> float:
        return (
            steps(video)[[column - 1 for column in columns]].max() / steps(video).median()
        ).item()

    assert at(hard, [10 * stride]) > 6  # measured 31, 6.7
    assert at(tiled, borders) < 3  # measured 2.3, 1.2


@each
def test_encoding_in_tiles_is_close_to_whole_frames(case):
    network, stride = vae(case), CONFIGS[case].stride[1]
    video = network.decode(smooth(network, 2, 8, 12))
    whole, tiled = network.encode(video), network.encode(video, tile=8 * stride)
    assert tiled.shape == whole.shape
    assert 0 < golden.rel_l2(tiled, whole) < 0.1  # measured 0.034, 0.034; attention sees one tile
