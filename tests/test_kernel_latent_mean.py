"""The mean over seeds: the Triton kernel against its reference, see `tests/on_device.py`."""

import inspect
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minicos.kernels import latent_mean as module
from minicos.kernels.latent_mean import latent_mean
from torch import Tensor

from minicos import ops
from tests.on_device import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    compiled,
    nan,
    on_device,
    ptx,
    randn,
    triton,
)  # isort: skip  finds minicos.kernels

numbers = st.integers(0, 2**31 - 1)


def mean(x: Tensor, seeds: int, alpha: float = 1.0) -> Tensor:
    """latent_mean(x, ...), in fresh memory, over NaN and in place: the same, so that no element
    was left unwritten or read late.
    """
    fresh, own = latent_mean(x, seeds, alpha), x.clone()
    assert torch.equal(fresh, latent_mean(x, seeds, alpha, nan(*x.shape, dtype=x.dtype)))
    assert latent_mean(own, seeds, alpha, own) is own
    assert torch.equal(fresh, own)
    return fresh


def is_the_reference(actual: Tensor, x: Tensor, seeds: int, alpha: float) -> bool:
    """Bit for bit the reference on a CPU; but the interpreter truncates where it should round to
    16 bits, which is half an ulp more.
    """
    expected = ops.latent_mean(x.cpu(), seeds, alpha)
    if not INTERPRETED or x.dtype == torch.float32:
        return torch.equal(actual.cpu(), expected)
    return torch.allclose(actual, expected, rtol=2 * torch.finfo(x.dtype).eps, atol=0)


# -- in this process -------------------------------------------------------------------------------


@compiled
@pytest.mark.skipif(
    "nvidia" not in triton.backends.backends,
    reason="this Triton has no compiler for NVIDIA's cards",
)
@pytest.mark.parametrize(
    ("seeds", "pointer"), [(2, "*bf16"), (3, "*bf16"), (3, "*fp32"), (7, "*fp32")]
)
def test_it_compiles_for_hopper_without_a_card(seeds, pointer, tmp_path, monkeypatch):
    """Every seed is read once and written once, 16 bytes at a time; the division is correctly
    rounded and nothing is fused.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    asm = ptx(
        module._latent_mean,
        {"x": pointer, "out": pointer, "own": "fp32", "shared": "fp32"},
        {"seeds": seeds, "block": module.BLOCK},
        ("x", "out", "width", "x_row", "x_token", "out_row", "out_token"),
        num_warps=4,
        enable_fp_fusion=False,
    )
    per_seed = 1 if pointer == "*bf16" else 2
    for move in ("ld", "st"):
        assert asm.count(f"{move}.global.v4.b32") == asm.count(f"{move}.global") == seeds * per_seed
    assert re.search(r"div\.rn(\.ftz)?\.f32", asm)  # Triton 3.4 takes denormals for 0
    assert "fma" not in asm


@compiled
def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"on cpu.*minicos\.ops\.latent_mean"):
        latent_mean(torch.ones(2, 8), 2)


def test_signatures_are_the_references():
    assert inspect.signature(latent_mean) == inspect.signature(ops.latent_mean)


def test_with_kernels_swaps_it_in():
    assert ops.REFERENCE.with_kernels().latent_mean is latent_mean


# -- the mean --------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(3, 2, 5), (6, 1, 130), (6, 3), (3,), (6, 2, 2, 2, 5), (3, 3, 1), (3, 1, 1536), (3, 2, 5120)],
)
def test_it_is_the_reference(shape, dtype):
    x = randn(*shape, seed=len(shape), dtype=dtype)
    for alpha in (0.3, 1.0) if shape == (3, 2, 5) else (0.3,):
        assert is_the_reference(mean(x, 3, alpha), x, 3, alpha)


@on_device
@pytest.mark.parametrize("seeds", [2, 4, 7, 17])
def test_any_number_of_seeds(seeds):
    x = randn(2 * seeds, 3, 5)
    assert is_the_reference(mean(x, seeds, 0.7), x, seeds, 0.7)


SLICES = {
    "tokens": lambda x: x[:, 1:4],
    "every other token": lambda x: x[:, ::2],
    "channels": lambda x: x[..., 3:130],
    "every other channel": lambda x: x[..., ::2],
    "every other row": lambda x: x[::2],
    "tokens by row": lambda x: x[:4].transpose(0, 1)[:4],
    "channels by token": lambda x: x[..., :7].mT,
    "heads by token": lambda x: x.unflatten(-1, (4, 64)).transpose(1, 2),
    "one axis more": lambda x: x.unflatten(-1, (4, 64))[:, 1:3, 1:],
}


@on_device
@pytest.mark.parametrize("name", SLICES)
def test_slices_are_read_and_written_by_their_strides(name):
    """Of tensors that are NaN everywhere else; also in place."""
    x, out = (SLICES[name](nan(8, 5, 256)) for _ in range(2))
    x.copy_(randn(*x.shape))
    expected = ops.latent_mean(x.cpu(), 2, 0.3)
    assert torch.equal(latent_mean(x, 2, 0.3).cpu(), expected)
    assert latent_mean(x, 2, 0.3, out) is out
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(latent_mean(x, 2, 0.3, torch.empty_like(x)).cpu(), expected)
    assert torch.equal(latent_mean(x, 2, 0.3, x).cpu(), expected)


@on_device
def test_neighbours_of_out_are_not_written():
    buffer, x = nan(2, 4, 5, 24), randn(4, 5, 24)
    latent_mean(x, 2, 0.3, buffer[1])
    assert buffer[0].isnan().all()
    strided = nan(4, 5, 48)
    latent_mean(x, 2, 0.3, strided[..., 3:27])
    assert strided.isfinite().sum() == x.numel()


@on_device
def test_offsets_pass_32_bits():
    """Four seeds 2^30 apart: the third lies 2^31 elements in. Of these 8 GiB, four pages are
    touched.
    """
    x = torch.empty(3 * 2**30 + 8, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (4, 5), (2**30, 1)
    )
    x.copy_(randn(4, 5))
    expected = latent_mean(x.clone(), 2, 0.3)
    assert torch.equal(latent_mean(x, 2, 0.3, x), expected)


@on_device
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_extremes_are_the_references(alpha):
    """Sums must fit float32; zeros, huge values, inf and NaN come out as in the reference."""
    x = torch.ones(3, 8, device=DEVICE)
    x[1] *= torch.tensor([0, -0.0, 1e-42, 1e19, 3e38, math.inf, -math.inf, math.nan], device=DEVICE)
    x[0, 1] = x[2, 1] = -0.0
    x[0, 4] = 3e38
    assert torch.allclose(
        mean_of_nan(x, alpha), ops.latent_mean(x.cpu(), 3, alpha), rtol=0, atol=0, equal_nan=True
    )


def mean_of_nan(x: Tensor, alpha: float) -> Tensor:
    return latent_mean(x, 3, alpha, nan(*x.shape)).cpu()


@on_device
@pytest.mark.parametrize(("seeds", "alpha"), [(1, 0.3), (1, 1.0), (3, 0.0), (3, 0)])
def test_one_seed_and_no_mixing_launch_nothing(seeds, alpha, monkeypatch):
    """And are bitwise no-ops: x itself, or its bits in `out`, NaN included."""
    monkeypatch.setattr(module, "_latent_mean", None)
    x = randn(3, 2, 5)
    x[0, 0, 0] = math.nan
    assert latent_mean(x, seeds, alpha) is x
    assert latent_mean(x, seeds, alpha, x) is x
    out = torch.zeros_like(x)
    assert latent_mean(x, seeds, alpha, out) is out
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))


@on_device
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (3, 0)])
def test_no_rows_and_no_channels(shape):
    assert latent_mean(randn(*shape), 3, 0.5).shape == shape


@on_device
@pytest.mark.parametrize(
    ("x", "seeds", "out", "match"),
    [
        (torch.ones(2, 8, dtype=torch.float64), 2, None, "float64"),
        (torch.ones(4, 8), 3, None, "4 rows are not whole cases of 3"),
        (torch.ones(4, 8), 0, None, "not whole cases of 0"),
        (torch.ones(2, 8, requires_grad=True), 2, None, "gradient"),
        (torch.ones(2, 8), 2, torch.ones(2, 7), "out must be"),
        (torch.ones(2, 8), 2, torch.ones(2, 8, dtype=torch.bfloat16), "out must be"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(x, seeds, out, match):
    with pytest.raises((TypeError, ValueError), match=match):
        latent_mean(x.to(DEVICE), seeds, 0.5, None if out is None else out.to(DEVICE))


@on_device
@settings(max_examples=10)
@given(numbers, st.integers(2, 5), st.integers(1, 130), st.floats(0.1, 1))
def test_seeds_may_be_permuted_and_a_mean_of_means_is_itself(seed, seeds, width, alpha):
    x = randn(2 * seeds, 2, width, seed=seed)
    order = random.Random(seed).sample(range(seeds), seeds)
    permuted = x.unflatten(0, (2, seeds))[:, order].flatten(0, 1)
    expected = mean(x, seeds, alpha).unflatten(0, (2, seeds))[:, order].flatten(0, 1)
    assert torch.allclose(
        mean(permuted, seeds, alpha), expected, rtol=0, atol=2e-6
    )  # measured 2.4e-7
    once = mean(x, seeds)
    assert torch.equal(
        once.unflatten(0, (2, seeds)), once[::seeds, None].expand(2, seeds, 2, width)
    )
    assert torch.allclose(mean(once, seeds, alpha), once, rtol=4e-7, atol=0)
