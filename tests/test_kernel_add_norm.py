"""The residual addition with the next norm: the Triton kernel against its reference, see
`tests/on_device.py`.
"""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
from minicos.kernels import add_norm as module
from minicos.kernels.add_norm import add_modulated_norm, gated_add_norm
from minicos.kernels.gated_add import gated_add
from minicos.kernels.modulated_norm import modulated_norm
from minicos.kernels.rows import options

seeds = st.integers(0, 2**31 - 1)
EPS = 1e-6
NORMS = {"affine": "gated_add_norm", "modulated": "add_modulated_norm"}
TWINS = {"affine": gated_add_norm, "modulated": add_modulated_norm}
norms = pytest.mark.parametrize("norm", NORMS)


def reference(norm: str):
    return getattr(ops, NORMS[norm])


def inputs(width: int, norm: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """The arguments of an operation: x, y, gate, weight, bias, eps, or x, y, scale, shift, eps."""
    x, y = (randn(2, tokens(width), width, seed=seed + i, dtype=dtype) for i in range(2))
    gate, scale, shift, *_ = modulations(2, 2, width, seed=seed % 1000)
    return (
        (x, y, gate, scale[0, 0], shift[0, 0], EPS)
        if norm == "affine"
        else (x, y, scale, shift, EPS)
    )


# -- in this process -------------------------------------------------------------------------------


@compiled
@pytest.mark.skipif(
    "nvidia" not in triton.backends.backends,
    reason="this Triton has no compiler for NVIDIA's cards",
)
@norms
@pytest.mark.parametrize(
    ("width", "residual"), [(5120, "*fp32"), (3072, "*bf16"), (1536, "*bf16"), (1536, "*fp32")]
)
def test_it_compiles_for_hopper_without_a_card(residual, width, norm, tmp_path, monkeypatch):
    """x and y are read once; loads and stores of 16 bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        "x": residual,
        "y": "*bf16",
        "gate": "*fp32",
        "scale": "*fp32",
        "shift": "*fp32",
        "out": residual,
        "norm": "*bf16",
    }
    strides = ("x_batch", "x_token", "y_batch", "y_token", "gate_batch", "gate_time")
    aligned = (*types, *strides, "scale_batch", "scale_time", "shift_batch", "shift_time")
    constants = {"affine": norm == "affine"}
    asm = ptx(module._add_norm, types | {"eps": "fp32"}, constants, aligned, **options(width))
    chunks = width // options(width)["chunk"]
    wide = {"*fp32": 2, "*bf16": 1}[residual]  # accesses of 16 bytes for eight channels
    assert asm.count("ld.global.v4.b32") == asm.count("ld.global") == chunks * (wide + 1 + 3 * 2)
    assert asm.count("st.global.v4.b32") == asm.count("st.global") == chunks * (wide + 1)
    assert "fma" not in asm


@compiled
@norms
def test_a_tensor_on_the_cpu_is_refused(norm):
    x, row = torch.ones(1, 2, 8), torch.ones(8)
    given = {"affine": (x, x, x, row, row, EPS), "modulated": (x, x, x, x, EPS)}[norm]
    with pytest.raises(ValueError, match=rf"x is on cpu.*minicos\.ops\.{NORMS[norm]}"):
        TWINS[norm](*given)


@norms
def test_signatures_are_the_references(norm):
    assert inspect.signature(TWINS[norm]) == inspect.signature(reference(norm))


# -- sum and norm ----------------------------------------------------------------------------------


@on_device
@norms
@pytest.mark.parametrize("width", [1, 5, 24, 130, 1536, 3072, 5120])
def test_sum_and_norm_in_float32(width, norm):
    given = inputs(width, norm)
    stream, normed = poisoned(TWINS[norm], *given)
    stream_reference, normed_reference = reference(norm)(*given)
    assert stream.is_contiguous()
    assert normed.is_contiguous()
    assert torch.equal(stream, stream_reference)
    assert rel_max(normed, normed_reference) < 2e-6  # measured 2.1e-7


@on_device
@norms
@pytest.mark.parametrize("residual", DTYPES)
@pytest.mark.parametrize("width", [130, 1536])
def test_every_dtype_in_and_out(width, residual, norm):
    given = inputs(width, norm, torch.bfloat16)
    for dtype in DTYPES:
        outs, references = (op(*given, residual, dtype) for op in (TWINS[norm], reference(norm)))
        for actual, expected, kind in zip(outs, references, (residual, dtype), strict=True):
            assert actual.dtype == kind
            assert (
                rel_max(actual.float(), expected.float()) < 2e-2
            )  # measured 1.4e-2, of bfloat16 in the interpreter


@on_device
@norms
@pytest.mark.parametrize("dtype", ROUNDED)
def test_it_rounds_where_the_reference_does(dtype, norm):
    """The sum before it is normed, the norm before it is modulated or after weight and bias:
    each left out shows everywhere.
    """
    given = inputs(1536, norm, dtype)
    for out in (torch.float32, dtype):
        stream, normed = TWINS[norm](*given, dtype, out)
        expected_stream, expected = reference(norm)(*given, dtype, out)
        assert torch.equal(stream, expected_stream)
        assert differing(normed, expected) < 0.01  # measured 2.2e-4
        _, unrounded = reference(norm)(*given, torch.float32, out)
        assert differing(unrounded, expected) > 0.05


@on_device
@settings(max_examples=6)
@given(seeds, st.integers(1, 300), st.sampled_from(DTYPES))
def test_it_is_the_sum_and_then_the_norm(seed, width, residual):
    """Bit for bit what two launches give; and an affine norm is a modulation by weight - 1, but
    for the last bits.
    """
    x, y, scale, shift, eps = inputs(width, "modulated", torch.bfloat16, seed=seed)
    stream, normed = add_modulated_norm(x, y, scale, shift, eps, residual, torch.bfloat16)
    assert torch.equal(stream, gated_add(x, y, torch.ones_like(scale), residual))
    assert torch.equal(normed, modulated_norm(stream, scale, shift, eps, torch.bfloat16))
    x, y, gate, weight, bias, eps = inputs(width, "affine", torch.bfloat16, seed=seed)
    stream, _ = gated_add_norm(x, y, gate, weight, bias, eps, residual)
    assert torch.equal(stream, gated_add(x, y, gate, residual))
    _, affine = gated_add_norm(x, y, gate, weight, bias, eps)
    same = (row.expand(2, 1, -1) for row in (weight - 1, bias))
    assert (
        rel_max(affine, modulated_norm(gated_add(x, y, gate), *same, eps)) < 1e-6
    )  # measured 1.2e-7


@on_device
@norms
@pytest.mark.parametrize("name", VIEWS)
def test_slices_are_read_by_their_strides(name, norm):
    x, y = view(name), view(name, seed=1)
    gate, scale, shift = (view(name, seed=s)[:, :2] for s in (2, 3, 4))
    given = (x, y, gate, scale[0, 0], shift[0, 0]) if norm == "affine" else (x, y, scale, shift)
    outs = poisoned(TWINS[norm], *given, EPS)
    assert all(map(torch.equal, outs, TWINS[norm](*(t.clone() for t in given), EPS)))
    assert rel_max(outs[1], reference(norm)(*given, EPS)[1]) < 2e-6  # measured 1.6e-7


@on_device
@norms
def test_offsets_pass_32_bits(norm):
    x, (gate, scale, shift, *_) = far_apart(1, 3, 5), modulations(1, 3, 5)
    rest = (gate, scale[0, 0], shift[0, 0], EPS) if norm == "affine" else (scale, shift, EPS)
    far, near = TWINS[norm](x, x, *rest), TWINS[norm](x.clone(), x.clone(), *rest)
    assert all(map(torch.equal, far, near))


@on_device
@norms
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_add(shape, norm):
    x, m, row = randn(*shape), randn(shape[0], 1, shape[2]), randn(shape[2])
    rest = (m, row, row) if norm == "affine" else (m, m)
    stream, normed = TWINS[norm](x, x, *rest, EPS, torch.float16, torch.bfloat16)
    assert stream.shape == normed.shape == shape


# -- refused ---------------------------------------------------------------------------------------

ROW = torch.ones(2, 6, 8)
EITHER = [
    ({"x": ROW.double()}, "x is torch.float64; the kernel takes float32, bfloat16 and float16"),
    ({"x": ROW[0], "y": ROW[0]}, "x must be b l d"),
    ({"y": ROW[:, :5]}, r"y must be float32 \(2, 6, 8\)"),
    ({"residual_dtype": torch.float64}, "writes float32, bfloat16 and float16, not torch.float64"),
    ({"dtype": torch.float64}, "writes float32, bfloat16 and float16, not torch.float64"),
]
AFFINE = [
    ({"gate": ROW[:, :3].half()}, "gate must be float32 .* not float16"),
    ({"weight": ROW[:, :3]}, r"weight must be float32 \(8,\) on .*, not float32 \(2, 3, 8\)"),
    ({"bias": ROW[0, 0, :7]}, r"bias must be float32 \(8,\)"),
    ({"weight": ROW[0, 0].clone().requires_grad_()}, "no gradient; pass weight.detach"),
]
MODULATED = [
    ({"scale": ROW[:, :2]}, r"shift must be float32 \(2, 2, 8\) on .*, not float32 \(2, 3, 8\)"),
    ({"shift": ROW[:, :3].half()}, "shift must be float32 .* not float16"),
    ({"shift": ROW[0, 0]}, r"shift must be float32 \(2, 3, 8\) on .*, not float32 \(8,\)"),
]


def on_its_device(value):
    return value.to(DEVICE) if isinstance(value, Tensor) else value


@on_device
@pytest.mark.parametrize(("changed", "match"), EITHER + AFFINE)
def test_what_gated_add_norm_cannot_do_is_refused(changed, match):
    given = {
        "x": ROW,
        "y": ROW,
        "gate": ROW[:, :3],
        "weight": ROW[0, 0],
        "bias": ROW[0, 0],
        "eps": EPS,
    }
    with pytest.raises((TypeError, ValueError), match=match):
        gated_add_norm(**{name: on_its_device(value) for name, value in (given | changed).items()})


@on_device
@pytest.mark.parametrize(("changed", "match"), EITHER + MODULATED)
def test_what_add_modulated_norm_cannot_do_is_refused(changed, match):
    given = {"x": ROW, "y": ROW, "scale": ROW[:, :3], "shift": ROW[:, :3], "eps": EPS}
    with pytest.raises((TypeError, ValueError), match=match):
        add_modulated_norm(
            **{name: on_its_device(value) for name, value in (given | changed).items()}
        )
