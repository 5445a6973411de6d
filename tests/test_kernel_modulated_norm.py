"""Layer norm and modulation: the Triton kernel against its reference, see `tests/on_device.py`."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicos import ops
from tests.golden import rel_max

from tests.on_device import (  # isort: skip  finds minicos.kernels
    DEVICE,
    DTYPES,
    ROUNDED,
    VIEWS,
    compiled,
    differing,
    far_apart,
    modulations,
    on_device,
    poisoned,
    ptx,
    randn,
    tokens,
    triton,
    view,
)
from minicos.kernels import modulated_norm as module
from minicos.kernels.modulated_norm import modulated_norm
from minicos.kernels.rows import options

seeds = st.integers(0, 2**31 - 1)
EPS = 1e-6


# -- in this process -------------------------------------------------------------------------------


@compiled
@pytest.mark.skipif(
    "nvidia" not in triton.backends.backends,
    reason="this Triton has no compiler for NVIDIA's cards",
)
@pytest.mark.parametrize(
    ("width", "residual"), [(5120, "*fp32"), (3072, "*bf16"), (1536, "*bf16"), (1536, "*fp32")]
)
def test_it_compiles_for_hopper_without_a_card(residual, width, tmp_path, monkeypatch):
    """One read of the row in loads of 16 bytes, stores of 16 bytes, and nothing through shared
    memory but two sums.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"x": residual, "scale": "*fp32", "shift": "*fp32", "out": "*bf16", "eps": "fp32"}
    strides = ("x_batch", "x_token", "scale_batch", "scale_time", "shift_batch", "shift_time")
    aligned = ("x", "scale", "shift", "out", *strides)
    asm = ptx(module._modulated_norm, types, {}, aligned, **options(width))
    chunks = width // options(width)["chunk"]
    wide = {"*fp32": 2, "*bf16": 1}[residual]  # accesses of 16 bytes for eight channels
    assert asm.count("ld.global.v4.b32") == asm.count("ld.global") == chunks * (wide + 4)
    assert asm.count("st.global.v4.b32") == asm.count("st.global") == chunks
    assert "st.shared.v" not in asm
    assert "fma" not in asm


@compiled
def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"x is on cpu.*minicos\.ops\.modulated_norm"):
        modulated_norm(torch.ones(1, 2, 8), torch.ones(1, 1, 8), torch.ones(1, 1, 8), EPS)


def test_signatures_are_the_references():
    assert inspect.signature(modulated_norm) == inspect.signature(ops.modulated_norm)


# -- the norm --------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("width", [1, 5, 24, 130, 1536, 3072, 5120])
def test_the_norm_in_float32(width, g):
    x, (scale, shift, *_) = randn(2, tokens(width), width), modulations(2, g, width)
    actual, expected = (
        poisoned(modulated_norm, x, scale, shift, EPS),
        ops.modulated_norm(x, scale, shift, EPS),
    )
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    assert rel_max(actual, expected) < 2e-6  # measured 1.6e-7


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 130, 1536])
def test_every_dtype_in_and_out(width, dtype):
    x, (scale, shift, *_) = randn(2, 4, width, dtype=dtype), modulations(2, 2, width)
    for out in DTYPES:
        actual, expected = (
            poisoned(modulated_norm, x, scale, shift, EPS, out),
            ops.modulated_norm(x, scale, shift, EPS, out),
        )
        assert actual.dtype == out
        assert (
            rel_max(actual.float(), expected.float()) < 2e-2
        )  # measured 8.5e-3, of bfloat16 in the interpreter


@on_device
@pytest.mark.parametrize("dtype", ROUNDED)
def test_it_rounds_where_the_reference_does(dtype):
    """To x's dtype before the modulation: without that, results differ everywhere; with it,
    where a sum of a row has another last bit.
    """
    x, (scale, shift, *_) = randn(2, 2, 1536, dtype=dtype), modulations(2, 2, 1536)
    expected = ops.modulated_norm(x, scale, shift, EPS)
    assert differing(modulated_norm(x, scale, shift, EPS), expected) < 0.01  # measured 0
    assert differing(ops.modulated_norm(x.float(), scale, shift, EPS), expected) > 0.9
    actual = modulated_norm(x, scale, shift, EPS, dtype)
    assert differing(actual, expected.to(dtype)) < 0.01  # measured 0
    assert torch.equal(actual, modulated_norm(x, scale, shift, EPS).to(dtype))


@on_device
@pytest.mark.parametrize("name", VIEWS)
def test_slices_are_read_by_their_strides(name):
    x = view(name)
    scale, shift = view(name, seed=1)[:, :2], view(name, seed=2)[:, :2]
    actual = poisoned(modulated_norm, x, scale, shift, EPS)
    assert torch.equal(actual, modulated_norm(*(t.clone() for t in (x, scale, shift)), EPS))
    assert rel_max(actual, ops.modulated_norm(x, scale, shift, EPS)) < 2e-6  # measured 1.4e-7


@on_device
def test_offsets_pass_32_bits():
    x, (scale, shift, *_) = far_apart(1, 3, 5), modulations(1, 3, 5)
    assert torch.equal(
        modulated_norm(x, scale, shift, EPS), modulated_norm(x.clone(), scale, shift, EPS)
    )


@on_device
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_the_references(dtype):
    """A row of zeros has the norm 0, one whose squares pass float32 too; inf and NaN are seen."""
    size = torch.tensor([0, 1e-30, 1e-18, 1, 1e17, 1e30, math.inf, math.nan], device=DEVICE)
    x = (randn(1, 8, 130) * size[:, None]).to(dtype)
    scale, shift, *_ = modulations(1, 1, 130)
    actual, expected = (
        norm(x, scale, shift, EPS)[0] for norm in (modulated_norm, ops.modulated_norm)
    )
    assert torch.equal(actual[[0, 5]], shift[0].expand(2, -1))  # PyTorch 2.8 gives NaN for row 5
    assert actual.isnan().any(1).tolist() == [False] * 6 + [True] * 2
    assert torch.allclose(
        actual[:5], expected[:5], rtol=0, atol=0.1 if dtype == torch.bfloat16 else 5e-6
    )


@on_device
@settings(max_examples=10)
@given(seeds, st.integers(2, 300), st.integers(-1000, 1000), st.sampled_from([0.25, 1.0, 8.0]))
def test_a_norm_ignores_offset_and_scale_of_its_row(seed, width, offset, factor):
    """Whole numbers, so that the offset itself costs nothing."""
    x = (
        torch.randint(-50, 50, (1, 2, width), generator=torch.Generator().manual_seed(seed))
        .to(DEVICE)
        .float()
    )
    x[..., 0] = 99  # a row of equal numbers has no norm to compare
    scale, shift, *_ = modulations(1, 1, width, seed=seed % 1000)
    still = modulated_norm(x, scale, shift, EPS)
    assert (
        rel_max(modulated_norm(factor * (x + offset), scale, shift, EPS), still) < 4e-6
    )  # measured 7.5e-7
    zeros = torch.zeros_like(scale)
    normed = modulated_norm(x, zeros, zeros, EPS).double()
    assert normed.mean(-1).abs().max() < 1e-5  # measured 8e-8
    assert (normed.square().mean(-1) - 1).abs().max() < 1e-5  # measured 2.2e-7


@on_device
@settings(max_examples=10)
@given(seeds, st.integers(1, 300))
def test_equal_rows_have_equal_bits(seed, width):
    x, (scale, shift, *_) = (
        randn(1, 1, width, seed=seed),
        modulations(1, 1, width, seed=seed % 1000),
    )
    rows = modulated_norm(x.expand(2, 2, -1), *(m.expand(2, 2, -1) for m in (scale, shift)), EPS)
    assert torch.equal(rows, modulated_norm(x, scale, shift, EPS).expand_as(rows))


@on_device
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_norm(shape):
    m = randn(shape[0], 1, shape[2])
    assert modulated_norm(randn(*shape), m, m, EPS, torch.bfloat16).shape == shape


# -- refused ---------------------------------------------------------------------------------------

ROW = torch.ones(2, 6, 8)


@on_device
@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"x": ROW.double()}, "x is torch.float64; the kernel takes float32, bfloat16 and float16"),
        ({"x": ROW[0]}, "x must be b l d"),
        ({"x": ROW.clone().requires_grad_()}, "no gradient; pass x.detach"),
        (
            {"scale": ROW[:, :2]},
            r"shift must be float32 \(2, 2, 8\) on .*, not float32 \(2, 3, 8\)",
        ),
        ({"shift": ROW[:, :3, :7]}, r"shift must be float32 \(2, 3, 8\)"),
        ({"scale": ROW[:, :4]}, "6 tokens are not equally many for each of 4 timesteps"),
        ({"scale": ROW[:, :3].bfloat16()}, "scale must be float32 .* not bfloat16"),
        ({"dtype": torch.int32}, "writes float32, bfloat16 and float16, not torch.int32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(changed, match):
    given = {"x": ROW, "scale": ROW[:, :3], "shift": ROW[:, :3], "eps": EPS} | changed
    given = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    with pytest.raises((TypeError, ValueError), match=match):
        modulated_norm(**given)
