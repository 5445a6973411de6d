"""The reference mathematics against independent formulations, most of them in complex or float64
arithmetic.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minicos import ops, precision
from tests.golden import rel_max

GRIDS = [(1, 1, 1), (3, 2, 5), (2, 7, 3)]
seeds = st.integers(0, 2**31 - 1)
grids = st.tuples(*[st.integers(1, 5)] * 3)
widths = st.sampled_from([2, 4, 6, 10, 16, 24, 32, 64, 128])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- time and position -----------------------------------------------------------------------------


@given(st.floats(0, 1000), st.sampled_from([2, 16, 256]))
def test_sinusoid_is_cosines_then_sines_of_falling_frequencies(t, dim):
    expected = [
        f(t * 10000 ** (-j / (dim // 2))) for f in (math.cos, math.sin) for j in range(dim // 2)
    ]
    actual = ops.sinusoid(torch.tensor(t, dtype=torch.float64), dim)
    assert actual.dtype == torch.float64
    error = (actual - torch.tensor(expected, dtype=torch.float64)).abs().max()
    assert error < 1e-12  # measured 1.2e-16; another last bit of a frequency would make 2e-13


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_sinusoid_does_not_depend_on_the_dtype_of_the_timestep(dtype):
    t = torch.tensor([[999, 0], [41, 500]])
    assert torch.equal(ops.sinusoid(t.to(dtype), 256), ops.sinusoid(t.double(), 256))


def turns(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """The official rotation as complex float64 numbers, (l, k/2): model.py, rope_params and
    rope_apply, written out.
    """
    pairs = head_dim // 2
    third = pairs // 3
    tokens = [
        [
            n * 10000 ** (-j / share)
            for n, share in zip((f, h, w), (pairs - 2 * third, third, third), strict=True)
            for j in range(share)
        ]
        for f in range(grid[0])
        for h in range(grid[1])
        for w in range(grid[2])
    ]
    angle = torch.tensor(tokens, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle)


@given(grids, widths)
def test_rope_is_the_complex_rotation_of_the_official_code(grid, head_dim):
    cos, sin = ops.rope(grid, head_dim)
    expected = turns(grid, head_dim)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.allclose(
        cos.double(), expected.real, rtol=0, atol=1e-7
    )  # measured 3.0e-8: half a unit of float32
    assert torch.allclose(sin.double(), expected.imag, rtol=0, atol=1e-7)  # measured 3.0e-8


def test_rope_with_a_time_skip_moves_the_second_of_two_frames():
    far, near = ops.rope((2, 3, 2), 24, time_skip=7), ops.rope((8, 3, 2), 24)
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, torch.cat([b[:6], b[-6:]]))
    for frames in (1, 3):
        grid = (frames, 3, 2)
        assert all(map(torch.equal, ops.rope(grid, 24, time_skip=7), ops.rope(grid, 24)))


def test_rope_needs_float64_at_distant_frames():
    """Angles built in float32 are off by 4e-5 at frame 1000."""
    cos, _ = ops.rope((1001, 1, 1), 128)
    expected = turns((1001, 1, 1), 128).real
    assert (cos.double() - expected).abs().max() < 1e-7  # measured 3.0e-8


@given(grids, st.sampled_from([6, 16, 24]), st.integers(1, 3), seeds)
def test_rms_rope_turns_interleaved_pairs_of_each_head(grid, head_dim, heads, seed):
    q, k = (randn(2, math.prod(grid), heads * head_dim, seed=seed + i) for i in range(2))
    weights = [randn(heads * head_dim, seed=seed + i) for i in (2, 3)]
    turned = ops.rms_rope(q, k, *weights, ops.rope(grid, head_dim), heads, 1e-6)
    for actual, x, weight in zip(turned, (q, k), weights, strict=True):
        normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        pairs = torch.view_as_complex(normed.view(2, -1, heads, head_dim // 2, 2))
        expected = (
            torch.view_as_real(pairs * turns(grid, head_dim)[None, :, None])
            .flatten(-2)
            .transpose(1, 2)
        )
        assert actual.shape == (2, heads, math.prod(grid), head_dim)
        assert rel_max(actual, expected) < 1e-6  # measured 2.0e-7


@given(grids, seeds)
def test_rms_rope_preserves_the_norm_of_every_head(grid, seed):
    x, weight = randn(1, math.prod(grid), 48, seed=seed), randn(48, seed=seed + 1)
    turned, _ = ops.rms_rope(x, x, weight, weight, ops.rope(grid, 16), 3, 1e-6)
    still = ops.rms_norm(x, weight, 1e-6).view(1, -1, 3, 16).transpose(1, 2)
    assert rel_max(turned.norm(dim=-1), still.norm(dim=-1)) < 8e-7  # measured 1.6e-7


def test_scores_depend_on_relative_positions_only():
    """The same query and key everywhere: their product at two tokens depends on the offset
    between them.
    """
    grid = (3, 4, 5)
    x = [randn(1, 1, 32, seed=s).expand(1, 60, 32) for s in (0, 1)]
    q, k = ops.rms_rope(*x, torch.ones(32), torch.ones(32), ops.rope(grid, 32), 1, 1e-6)
    score = (q[0, 0] @ k[0, 0].T).view(*grid, *grid)
    assert (
        score[:2, :3, :4, :2, :3, :4] - score[1:, 1:, 1:, 1:, 1:, 1:]
    ).abs().max() < 2e-5  # measured 4.8e-6
    assert score.std() > 1  # and it does depend on it


# -- norms and modulation --------------------------------------------------------------------------


def test_rms_norm_rounds_before_the_weight():
    """bf16(bf16(x / rms) * weight), as the official code: one rounding less gives other numbers."""
    x, weight = randn(64, 96, dtype=torch.bfloat16), randn(96, seed=1, dtype=torch.bfloat16)
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    actual = ops.rms_norm(x, weight, 1e-6)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, unit.bfloat16() * weight)
    assert not torch.equal(actual, (unit * weight).bfloat16())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 4e-7),
        (torch.bfloat16, 6e-3),
    ],  # measured 9.3e-8 and 1.9e-3, half a unit of bfloat16
)
def test_layer_norm_is_computed_in_float32_and_rounded_once(dtype, tolerance):
    x, weight, bias = 3 + randn(8, 64, dtype=dtype), randn(64, seed=1), randn(64, seed=2)
    y = x.double()
    y = (y - y.mean(-1, keepdim=True)) / (
        y.var(-1, correction=0, keepdim=True) + 1e-6
    ).sqrt() * weight + bias
    actual = ops.layer_norm(x, 1e-6, weight, bias)
    assert actual.dtype == dtype
    assert rel_max(actual.double(), y) < tolerance


@pytest.mark.parametrize("g", [1, 3])
def test_modulated_norm_and_gated_add_serve_each_timestep_its_own_tokens(g):
    x, y, scale, shift = (randn(2, rows, 16, seed=s) for s, rows in enumerate((12, 12, g, g)))
    normed, added = ops.modulated_norm(x, scale, shift, 1e-6), ops.gated_add(x, y, scale)
    for i in range(2):
        for j in range(12):
            own = j * g // 12  # l/g consecutive tokens share a timestep
            row = (
                torch.nn.functional.layer_norm(x[i, j], (16,), eps=1e-6) * (1 + scale[i, own])
                + shift[i, own]
            )
            assert torch.allclose(normed[i, j], row, rtol=0, atol=1e-6)  # measured 0
            assert torch.allclose(
                added[i, j], x[i, j] + y[i, j] * scale[i, own], rtol=0, atol=1e-6
            )  # measured 0
    assert normed.shape == added.shape == x.shape


def test_modulation_is_float32_whatever_the_residual_stream():
    x, m = randn(1, 6, 8, dtype=torch.bfloat16), randn(1, 1, 8)
    assert ops.modulated_norm(x, m, m, 1e-6).dtype == torch.float32
    assert ops.gated_add(x, x, m).dtype == torch.float32


@given(
    seeds,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_norms_and_sums_round_to_what_the_next_layer_takes(seed, residual, dtype):
    """The same bits as a cast afterwards, wherever the residual stream comes from."""
    x, y = randn(2, 6, 8, seed=seed, dtype=residual), randn(2, 6, 8, seed=seed + 1, dtype=dtype)
    gate, scale, shift = (randn(2, 3, 8, seed=seed + i) for i in (2, 3, 4))
    assert torch.equal(
        ops.modulated_norm(x, scale, shift, 1e-6, dtype),
        ops.modulated_norm(x, scale, shift, 1e-6).to(dtype),
    )
    stream, normed = ops.add_modulated_norm(x, y, scale, shift, 1e-6, residual, dtype)
    assert torch.equal(stream, (x.float() + y.float()).to(residual))
    assert torch.equal(normed, ops.modulated_norm(stream, scale, shift, 1e-6).to(dtype))
    weight, bias = scale[0, 0], shift[0, 0]
    stream, normed = ops.gated_add_norm(x, y, gate, weight, bias, 1e-6, residual, dtype)
    assert torch.equal(stream, ops.gated_add(x, y, gate, residual))
    exact = x.float() + y.float() * gate.repeat_interleave(2, dim=1)
    assert torch.equal(stream, exact.to(residual))
    assert torch.equal(normed, ops.layer_norm(stream, 1e-6, weight, bias).to(dtype))


def test_the_energy_of_a_sum_is_that_of_what_is_kept():
    x, y, gate = (
        randn(2, 6, 8, dtype=torch.bfloat16),
        randn(2, 6, 8, seed=1),
        randn(2, 3, 8, seed=2),
    )
    energy = torch.full((2, 6), math.nan)
    kept = ops.gated_add(x, y, gate, torch.bfloat16, energy)
    assert torch.equal(energy, ops.token_energy(kept))
    assert not torch.equal(energy, ops.token_energy(ops.gated_add(x, y, gate)))


@given(seeds)
def test_one_timestep_equals_the_same_timestep_for_every_frame(seed):
    x, y, scale, shift = (randn(2, n, 8, seed=seed + s) for s, n in enumerate((12, 12, 1, 1)))
    scales, shifts = scale.expand(2, 4, 8), shift.expand(2, 4, 8)
    assert torch.equal(
        ops.modulated_norm(x, scale, shift, 1e-6), ops.modulated_norm(x, scales, shifts, 1e-6)
    )
    assert torch.equal(ops.gated_add(x, y, scale), ops.gated_add(x, y, scales))


# -- attention and energy --------------------------------------------------------------------------


@given(seeds, st.integers(1, 6), st.integers(1, 9))
def test_attention_is_softmax_of_scaled_scores_over_all_keys(seed, tokens, rows):
    q, k, v = (randn(2, 3, n, 8, seed=seed + i) for i, n in enumerate((tokens, rows, rows)))
    weights = (q.double() @ k.double().mT / math.sqrt(8)).softmax(-1)
    assert rel_max(ops.attention(q, k, v), weights @ v.double()) < 1e-6  # measured 2.5e-7


@given(seeds, st.floats(-100, -0.01) | st.floats(0.01, 100))
def test_token_energy_scales_with_its_token_and_ignores_rotations(seed, factor):
    x = randn(2, 5, 16, seed=seed)
    energy = ops.token_energy(x)
    turn = torch.linalg.qr(randn(16, 16, seed=seed + 1))[0]
    assert energy.shape == (2, 5)
    assert torch.allclose(
        ops.token_energy(factor * x), abs(factor) * energy, rtol=1e-6
    )  # measured 2.3e-7
    assert torch.allclose(ops.token_energy(x @ turn), energy, rtol=1.5e-6)  # measured 3.1e-7
    assert torch.allclose(energy.square().sum(), x.square().sum(), rtol=1e-6)  # measured 2.0e-7


def test_token_energy_of_bfloat16_is_accumulated_in_float32():
    """In bfloat16 a sum of ones stops at 256."""
    energy = ops.token_energy(torch.ones(1, 4096, dtype=torch.bfloat16))
    assert energy.dtype == torch.float32
    assert energy.item() == 64


def test_ops_are_values_that_a_model_can_be_given():
    other = replace(ops.REFERENCE, attention=lambda q, k, v: q)
    assert ops.Ops() == ops.REFERENCE
    assert other.attention is not ops.attention
    assert other.self_attention is ops.self_attention


@precision.without_tf32()
def convolutions(fail: bool = False) -> str:
    if fail:
        raise ValueError(torch.backends.cudnn.allow_tf32)
    return torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("before", [True, False])
def test_without_tf32_and_as_it_was_before(before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    assert convolutions() is False
    assert torch.backends.cudnn.allow_tf32 is before
    with pytest.raises(ValueError, match="False"):
        convolutions(fail=True)
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("before", [True, False])
def test_tf32_where_it_is_chosen_and_as_it_was_before(before, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with precision.undisturbed(), precision.tf32_convolutions(True):
        assert torch.backends.cudnn.allow_tf32 is True
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch 2.8 has only the older switch"
)
def test_without_tf32_where_the_newer_switch_is_used():
    """In a process of its own: torch does not go back to its older switch."""
    code = (
        "import torch, contextlib; from minicos.precision import without_tf32; conv = "
        "torch.backends.cudnn.conv\n"
        "for kind in ('ieee', 'tf32'):\n"
        "    conv.fp32_precision = kind\n"
        "    with without_tf32(): inside = conv.fp32_precision\n"
        "    print(inside, conv.fp32_precision)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    lines = done.stdout.split("\n")
    assert lines[0] == "ieee ieee", done.stderr
    assert lines[1] in ("ieee tf32", "none tf32"), done.stderr
