"""The energy of tokens: the Triton kernel against its reference, see `tests/on_device.py`."""

import inspect
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minicos.kernels import token_energy as module
from minicos.kernels.rows import options
from minicos.kernels.token_energy import stream_energy, token_energy
from torch import Tensor

from minicos import ops
from tests.golden import rel_max

# isort: skip  finds minicos.kernels
from tests.on_device import DEVICE, DTYPES, compiled, nan, on_device, ptx, randn, triton

seeds = st.integers(0, 2**31 - 1)


def energy(x: Tensor) -> Tensor:
    """token_energy(x), in fresh memory and over NaN: the same, so that no element was left
    unwritten.
    """
    fresh = token_energy(x)
    assert torch.equal(fresh, token_energy(x, nan(*x.shape[:-1])))
    return fresh


def error(actual: Tensor, x: Tensor) -> float:
    """The largest relative error against float64."""
    expected = x.double().square().sum(-1).sqrt()
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    return ((actual - expected).abs() / expected).max().item()


# -- in this process -------------------------------------------------------------------------------


@compiled
def test_kernels_are_imported_as_a_part_of_minicos_and_only_so(tmp_path):
    """From any folder; and a top-level `kernels`, if there is one, is the Hub's package and not
    this.
    """
    script = """if True:
        import importlib.util, pathlib, sys
        if importlib.util.find_spec("minicos") is None:
            sys.exit("not installed")
        import minicos.kernels
        assert not {"torch", "triton"} & set(sys.modules)
        top = importlib.util.find_spec("kernels")
        assert top is None or pathlib.Path(top.origin).read_bytes() != pathlib.Path(minicos.kernels.__file__).read_bytes()
        import minicos.kernels.token_energy
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    if run.stderr == "not installed\n":
        pytest.skip("minicos is not installed here (pip install -e .)")
    assert run.returncode == 0, run.stderr


@compiled
@pytest.mark.skipif(
    "nvidia" not in triton.backends.backends,
    reason="this Triton has no compiler for NVIDIA's cards",
)
@pytest.mark.parametrize(
    ("width", "pointer"), [(5120, "*bf16"), (1536, "*bf16"), (1536, "*fp32"), (130, "*fp32")]
)
def test_it_compiles_for_hopper_without_a_card(width, pointer, tmp_path, monkeypatch):
    """One load of 16 bytes per thread for every 8 (4) channels of an aligned row, and a
    correctly rounded root.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    aligned = ("x", "out", "x_batch", "x_token") if width % 16 == 0 else ("x", "out")
    asm = ptx(
        module._token_energy,
        {"x": pointer, "out": "*fp32"},
        {"out_token": 1},
        aligned,
        **options(width),
    )
    assert re.search(r"sqrt\.rn(\.ftz)?\.f32", asm)  # Triton 3.4 takes denormals for 0
    assert "fma" not in asm
    if width % 16 == 0:
        per_chunk = 1 if pointer == "*bf16" else 2
        assert (
            asm.count("ld.global.v4.b32")
            == asm.count("ld.global")
            == width // options(width)["chunk"] * per_chunk
        )


@compiled
def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"on cpu.*minicos\.ops\.token_energy"):
        token_energy(torch.ones(2, 8))


def test_signatures_are_the_references():
    assert inspect.signature(token_energy) == inspect.signature(ops.token_energy)


# -- token energy ----------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 24, 128, 130, 1536, 3072, 5120])
def test_energy_is_the_norm_of_every_token(width, dtype):
    x = randn(2, 2, width, seed=width, dtype=dtype)
    actual = energy(x)
    assert error(actual, x) < 3e-7  # measured 9.3e-8
    assert torch.allclose(
        actual, ops.token_energy(x), rtol=2e-6, atol=0
    )  # measured 7.5e-7, of which the reference's own error 7.3e-7


@on_device
@pytest.mark.parametrize(
    "shape", [(130,), (1, 5), (7, 5), (2, 1, 5), (3, 1, 2, 5), (2, 1, 3, 2, 5)]
)
def test_any_leading_shape(shape):
    x = randn(*shape)
    assert error(energy(x), x) < 3e-7


SLICES = {
    "tokens": lambda x: x[:, 1:4],
    "every other token": lambda x: x[:, ::2],
    "channels": lambda x: x[..., 3:130],
    "every other channel": lambda x: x[..., ::2],
    "tokens by batch": lambda x: x.transpose(0, 1),
    "channels by token": lambda x: x[..., :7].mT,
    "one axis more": lambda x: x.unflatten(-1, (4, 64))[:, 1:3, 1:],
}


@on_device
@pytest.mark.parametrize("name", SLICES)
def test_slices_are_read_by_their_strides(name):
    """Of a tensor that is NaN everywhere else."""
    x = SLICES[name](nan(2, 5, 256, dtype=torch.bfloat16))
    x.copy_(randn(*x.shape))
    assert error(energy(x), x) < 3e-7


@on_device
def test_one_token_seen_many_times_has_one_energy():
    x = randn(1, 1, 5).expand(3, 4, 5)
    actual = energy(x)
    assert error(actual, x) < 3e-7
    assert len(actual.unique()) == 1


@on_device
def test_offsets_pass_32_bits():
    """Three tokens 2^30 apart: the third lies 2^31 elements in. Of these 4 GiB, three pages are
    touched.
    """
    x = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 5), (2**30, 1))
    x.copy_(randn(3, 5))
    assert error(energy(x), x) < 3e-7
    assert error(energy(x[:, None]), x[:, None]) < 3e-7


@on_device
@pytest.mark.parametrize("energy", [ops.token_energy, token_energy])
@pytest.mark.parametrize(
    ("shape", "index"),
    [((2, 3, 2, 5), (1, 2)), ((2, 2, 3, 5), (1, slice(None), 2)), ((2, 5, 2, 3), (..., 1, 2))],
)
def test_out_is_written_and_its_neighbours_are_not(energy, shape, index):
    """A row of a buffer over (step, layer, b, l), (step, b, layer, l) and (b, l, step, layer)."""
    buffer, x = nan(*shape), randn(2, 5, 24)
    row = buffer[index]
    assert energy(x, row) is row
    assert torch.equal(row, energy(x))
    assert buffer.isfinite().sum() == row.numel()


@on_device
@pytest.mark.parametrize("energy", [ops.token_energy, token_energy])
@pytest.mark.parametrize("shape", [(2, 6), (2, 4), (5,), (1, 5), (2, 5, 1), ()])
def test_an_out_of_another_shape_is_refused(energy, shape):
    """And not resized over what follows it, or broadcast."""
    with pytest.raises(ValueError, match="out must be float32"):
        energy(randn(2, 5, 24), nan(*shape))


@on_device
@pytest.mark.parametrize("energy", [ops.token_energy, token_energy])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_out_of_another_dtype_is_refused(energy, dtype):
    with pytest.raises((ValueError, RuntimeError), match="out"):
        energy(randn(2, 5, 24), nan(2, 5, dtype=dtype))


@on_device
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_are_the_references(dtype):
    """Squares must fit float32: 1e19 does and 1e30 does not, 1e-30 vanishes, and inf and NaN are
    seen.
    """
    x = torch.ones(8, 130, dtype=dtype, device=DEVICE)
    x *= torch.tensor([0, 1e-30, 1e-18, 1, 1e17, 1e30, math.inf, math.nan], device=DEVICE)[:, None]
    actual, reference = token_energy(x), ops.token_energy(x)
    assert actual.tolist()[:2] == [0, 0]
    assert actual.isinf().tolist() == [False] * 5 + [True, True, False]
    assert torch.allclose(actual, reference, rtol=5e-7, atol=0, equal_nan=True)


@on_device
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 2, 5), (3, 0), (0, 0), (0,)])
def test_no_tokens_and_no_channels(shape):
    actual = energy(randn(*shape))
    assert actual.dtype == torch.float32
    assert torch.equal(actual, ops.token_energy(randn(*shape)))


@on_device
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.ones(2, 8, dtype=torch.float64), "float64"),
        (torch.ones(2, 8, dtype=torch.int32), "int32"),
        (torch.ones(()), "no axes"),
        (torch.ones(2, 8, requires_grad=True), "gradient"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(x, match):
    with pytest.raises((TypeError, ValueError), match=match):
        token_energy(x.to(DEVICE))


@on_device
@settings(max_examples=10)
@given(seeds, st.integers(1, 300), st.floats(-100, -0.01) | st.floats(0.01, 100))
def test_energy_scales_with_its_token_and_ignores_the_order_of_channels(seed, width, factor):
    x = randn(2, width, seed=seed)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    still = energy(x)
    assert torch.allclose(
        energy(factor * x), abs(factor) * still, rtol=1e-6, atol=0
    )  # measured 1.2e-7
    assert torch.allclose(energy(x[..., order]), still, rtol=1e-6, atol=0)  # measured 1.2e-7


# -- the three energies of a residual stream -------------------------------------------------------


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 1536])
def test_three_energies_of_a_stream(width, dtype):
    """That of the stream itself is bit for bit `token_energy`; slices are read by their strides."""
    x, before = (randn(10, width, seed=i, dtype=dtype)[::2] for i in (0, 1))
    mean, kept = randn(width, seed=2), (randn(width, seed=3) > -1).float()
    actual, expected = (op(x, before, mean, kept) for op in (stream_energy, ops.stream_energy))
    assert rel_max(actual, expected) < 1e-6  # measured 2.0e-7
    assert torch.equal(actual[0], token_energy(x))
    assert not stream_energy(x, x, mean, 0 * kept)[1:].any()
    assert stream_energy(x[:0], before[:0], mean, kept).shape == (3, 0)
    several = [torch.stack([y, 2 * y]) for y in (x, before, mean, kept)]
    assert torch.equal(stream_energy(*several)[:, 0], actual)
    assert rel_max(stream_energy(*several), ops.stream_energy(*several)) < 1e-6  # measured 2.0e-7


@on_device
@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"x": (1, 5, 8)}, "x must be ... l d"),
        ({"before": (4, 8)}, r"before must be float32 \(5, 8\)"),
        ({"mean": (1, 8)}, r"mean must be float32 \(8,\)"),
    ],
)
def test_three_energies_of_other_shapes_are_refused(changed, match):
    shapes = {"x": (5, 8), "before": (5, 8), "mean": (8,), "kept": (8,)} | changed
    with pytest.raises(ValueError, match=match):
        stream_energy(**{name: randn(*shape) for name, shape in shapes.items()})
