"""The gated residual addition: the Triton kernel against its reference, see `tests/on_device.py`."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicos import ops

from tests.on_device import (  # isort: skip  finds minicos.kernels
    DEVICE,
    DTYPES,
    ROUNDED,
    VIEWS,
    compiled,
    far_apart,
    for_hopper,
    modulations,
    nan,
    on_device,
    poisoned,
    randn,
    tokens,
    triton,
    view,
)
from minicos.kernels import gated_add as module
from minicos.kernels import token_energy as energies
from minicos.kernels.gated_add import gated_add
from minicos.kernels.rows import options
from minicos.kernels.token_energy import token_energy

seeds = st.integers(0, 2**31 - 1)


def inputs(
    width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, gate."""
    x, y = (randn(2, tokens(width), width, seed=seed + i, dtype=dtype) for i in range(2))
    return x, y, modulations(2, 2, width, seed=seed)[2]


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
    """Loads and stores of 16 bytes; and the energy's lanes are added as `token_energy` adds
    them, whatever else is loaded.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"x": residual, "y": "*bf16", "gate": "*fp32", "out": residual, "energy": "*fp32"}
    strides = (
        "x_batch",
        "x_token",
        "y_batch",
        "y_token",
        "gate_batch",
        "gate_time",
        "energy_batch",
    )
    asm = for_hopper(
        module._gated_add, types, {"energy_token": 1}, (*types, *strides), **options(width)
    )
    wide = {"*fp32": 2, "*bf16": 1}  # accesses of 16 bytes for eight channels
    chunks = width // options(width)["chunk"]
    assert (
        asm["ptx"].count("ld.global.v4.b32")
        == asm["ptx"].count("ld.global")
        == chunks * (wide[residual] + 1 + 2)
    )
    assert (
        asm["ptx"].count("st.global.v4.b32")
        == asm["ptx"].count("st.global") - 1
        == chunks * wide[residual]
    )
    assert "fma" not in asm["ptx"]
    types = {"x": residual, "out": "*fp32"}
    alone = for_hopper(
        energies._token_energy,
        types,
        {"out_token": 1},
        ("x", "out", "x_batch", "x_token"),
        **options(width),
    )
    assert reduction(asm["ttgir"]) == reduction(alone["ttgir"])


def reduction(ttgir: str) -> str:
    """The tensor that is summed over the threads, and how they hold it."""
    (name,) = {
        line.split("(tensor<")[1].split(">")[0]
        for line in ttgir.split("\n")
        if "}) : (tensor<" in line
    }
    size, layout = name.split(", ")
    return size + next(
        line.removeprefix(layout) for line in ttgir.split("\n") if line.startswith(f"{layout} = ")
    )


@compiled
def test_a_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"x is on cpu.*minicos\.ops\.gated_add"):
        gated_add(*[torch.ones(1, 2, 8)] * 3)


def test_signatures_are_the_references():
    assert inspect.signature(gated_add) == inspect.signature(ops.gated_add)


# -- the sum ---------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, *ROUNDED])
@pytest.mark.parametrize("width", [1, 5, 24, 130, 1536, 3072, 5120])
def test_the_sum_is_the_references_bit_for_bit(width, dtype):
    x, y, gate = inputs(width, dtype)
    for residual in (torch.float32, *ROUNDED):
        actual, expected = (
            poisoned(gated_add, x, y, gate, residual),
            ops.gated_add(x, y, gate, residual),
        )
        assert actual.dtype == residual
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)
    if dtype != torch.float32:
        assert torch.equal(gated_add(x.float(), y, gate), ops.gated_add(x.float(), y, gate))


@on_device
@pytest.mark.parametrize("width", [130, 1536])
def test_bfloat16_is_read_exactly_and_written_within_its_last_place(width):
    x, y, gate = inputs(width, torch.bfloat16)
    assert torch.equal(gated_add(x, y, gate), ops.gated_add(x, y, gate))
    actual, expected = gated_add(x, y, gate, torch.bfloat16).float(), ops.gated_add(x, y, gate)
    assert (
        (actual - expected).abs() <= 2**-7 * expected.abs()
    ).all()  # cut off by the interpreter, rounded by a GPU


@on_device
@pytest.mark.parametrize("name", VIEWS)
def test_slices_are_read_by_their_strides(name):
    x, y = view(name), view(name, seed=1)
    gate = nan(x.shape[0], 2, 6, 2 * x.shape[2])[:, :, 1, ::2]
    gate.copy_(randn(*gate.shape))
    actual = poisoned(gated_add, x, y, gate)
    assert actual.isfinite().all()
    assert torch.equal(actual, ops.gated_add(x, y, gate))
    assert torch.equal(
        gated_add(x[:1, :1].expand_as(x), y, gate), ops.gated_add(x[:1, :1], y, gate)
    )


@on_device
def test_offsets_pass_32_bits():
    x = far_apart(1, 3, 5)
    y, gate = randn(1, 3, 5, seed=1), randn(1, 3, 5, seed=2)
    assert torch.equal(gated_add(x, y, gate), ops.gated_add(x, y, gate))
    turned = gated_add(x.transpose(0, 1), y.transpose(0, 1), gate.transpose(0, 1))
    assert torch.equal(turned, ops.gated_add(x, y, gate).transpose(0, 1))


@on_device
@settings(max_examples=10)
@given(seeds, st.integers(1, 300), st.sampled_from([torch.float32, *ROUNDED]))
def test_a_gate_of_zero_adds_nothing_and_a_gate_of_one_everything(seed, width, dtype):
    x, y, gate = inputs(width, dtype, seed=seed)
    assert torch.equal(gated_add(x, y, 0 * gate, dtype), x)
    whole = gated_add(x, y, 0 * gate + 1, dtype)
    assert torch.equal(whole, (x.float() + y.float()).to(dtype))
    assert torch.equal(gated_add(x, y, gate[:, :1]), gated_add(x, y, gate[:, :1].expand_as(x)))


@on_device
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_add(shape):
    x, energy = randn(*shape), nan(*shape[:2])
    gate = randn(shape[0], 1, shape[2])
    assert gated_add(x, x, gate, torch.bfloat16, energy).shape == shape
    assert torch.equal(energy, torch.zeros_like(energy))


# -- its energy ------------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("residual", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 130, 1536, 5120])
def test_energy_is_that_of_the_sum_as_it_is_kept(width, residual):
    """In the row of a buffer over (layer, b, l), whose other rows stay as they are."""
    x, y, gate = inputs(width, torch.bfloat16)
    buffer = nan(3, *x.shape[:2])
    kept = gated_add(x.to(residual), y, gate, residual, buffer[1])
    assert torch.equal(kept, gated_add(x.to(residual), y, gate, residual))
    assert torch.equal(buffer[1], token_energy(kept))
    assert buffer.isfinite().sum() == buffer[1].numel()


# -- refused ---------------------------------------------------------------------------------------

ROW = torch.ones(2, 6, 8)


@on_device
@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"x": ROW.double()}, "x is torch.float64; the kernel takes float32, bfloat16 and float16"),
        ({"x": ROW[0]}, "x must be b l d"),
        ({"y": ROW[:, :5]}, r"y must be float32 \(2, 6, 8\) on .*, not float32 \(2, 5, 8\)"),
        ({"y": ROW.clone().requires_grad_()}, "no gradient; pass y.detach"),
        ({"gate": ROW[:, :3].half()}, r"gate must be float32 \(2, 3, 8\) on .*, not float16"),
        ({"gate": ROW[:, :4]}, "6 tokens are not equally many for each of 4 timesteps"),
        ({"gate": ROW[:1, :3]}, "gate must be"),
        ({"dtype": torch.float64}, "writes float32, bfloat16 and float16, not torch.float64"),
        ({"energy": torch.ones(2, 5)}, r"energy must be float32 \(2, 6\)"),
        (
            {"energy": torch.ones(2, 6).half()},
            r"energy must be float32 \(2, 6\) on .*, not float16",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(changed, match):
    given = {"x": ROW, "y": ROW, "gate": ROW[:, :3]} | changed
    given = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    with pytest.raises((TypeError, ValueError), match=match):
        gated_add(**given)
