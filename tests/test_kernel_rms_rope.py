"""RMS norm and rotation of q and k: the Triton kernel against its reference, see
`tests/on_device.py`.
"""

import inspect
import math

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
    on_device,
    poisoned,
    ptx,
    randn,
    tokens,
    triton,
    view,
)
from minicos.kernels import rms_rope as module
from minicos.kernels.rms_rope import rms_norm, rms_rope
from minicos.kernels.rows import options

seeds = st.integers(0, 2**31 - 1)
EPS = 1e-6


def grid(width: int) -> tuple[int, int, int]:
    return 2, tokens(width) // 2, 1


def inputs(
    width: int,
    heads: int,
    dtype: torch.dtype = torch.float32,
    weight: torch.dtype = torch.float32,
    seed: int = 0,
):
    """q, k, their weights, angles, heads, eps."""
    q, k = (randn(2, tokens(width), width, seed=seed + i, dtype=dtype) for i in range(2))
    weights = (randn(width, seed=seed + i, dtype=weight) for i in (2, 3))
    return q, k, *weights, angles(width // heads, grid(width)), heads, EPS


def angles(head: int, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    cos, sin = ops.rope(grid, head)
    return cos.to(DEVICE), sin.to(DEVICE)


# -- in this process -------------------------------------------------------------------------------


@compiled
@pytest.mark.skipif(
    "nvidia" not in triton.backends.backends,
    reason="this Triton has no compiler for NVIDIA's cards",
)
@pytest.mark.parametrize(
    ("width", "one"), [(5120, {}), (3072, {}), (1536, {}), (1536, {"tokens": 1})]
)
def test_it_compiles_for_hopper_without_a_card(width, one, tmp_path, monkeypatch):
    """Every load and store has 16 bytes, and pairs are separated in registers: shared memory
    sees the two sums only.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = dict.fromkeys(("q", "k", "q_out", "k_out"), "*bf16")
    tables = dict.fromkeys(("q_weight", "k_weight", "cos", "sin"), "*fp32")
    aligned = (*rows, *tables, "q_batch", "q_token", "k_batch", "k_token")
    asm = ptx(
        module._rms_rope,
        rows | tables | {"eps": "fp32"},
        {"head": 128} | one,
        aligned,
        **options(width),
    )
    chunks = width // options(width)["chunk"]
    row, weight, cosines, sines = 1, 2, 1, 1  # accesses of 16 bytes for eight channels
    loads = 2 * chunks * (row + weight + cosines + sines)
    assert asm.count("ld.global.v4.b32") == asm.count("ld.global") == loads
    assert asm.count("st.global.v4.b32") == asm.count("st.global") == 2 * chunks
    assert "st.shared.v" not in asm
    assert "fma" not in asm


@compiled
def test_a_tensor_on_the_cpu_is_refused():
    q, weight = torch.ones(1, 2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"q is on cpu.*minicos\.ops\.rms_rope"):
        rms_rope(q, q, weight, weight, ops.rope((1, 1, 2), 4), 2, EPS)


def test_signatures_are_the_references():
    assert inspect.signature(rms_rope) == inspect.signature(ops.rms_rope)


# -- the rotation ----------------------------------------------------------------------------------

SHAPES = [
    (2, 1),
    (6, 3),
    (24, 2),
    (24, 1),
    (130, 5),
    (256, 4),
    (1536, 12),
    (3072, 24),
    (5120, 40),
]  # width, heads


@on_device
@pytest.mark.parametrize(("width", "heads"), SHAPES)
def test_q_and_k_in_float32(width, heads):
    given = inputs(width, heads)
    for actual, expected in zip(poisoned(rms_rope, *given), ops.rms_rope(*given), strict=True):
        assert actual.shape == (2, heads, tokens(width), width // heads)
        assert actual.is_contiguous()
        assert rel_max(actual, expected) < 1e-6  # measured 1.9e-7


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize(("width", "heads"), [(24, 2), (1536, 12)])
def test_every_dtype_of_rows_and_weights(width, heads, weight, dtype):
    given = inputs(width, heads, dtype, weight)
    for actual, expected in zip(poisoned(rms_rope, *given), ops.rms_rope(*given), strict=True):
        assert actual.dtype == dtype
        assert (
            rel_max(actual.float(), expected.float()) < 3e-2
        )  # measured 1.4e-2, of bfloat16 in the interpreter


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_the_norm_of_one_tensor(weight, dtype):
    """As cross-attention asks for it: rounded to a dtype, or to that of the product."""
    x, w = randn(1, 6, 24, dtype=dtype)[:, ::2], randn(24, seed=1, dtype=weight)
    for wanted in (None, torch.float32, torch.float16):
        actual, expected = (op(x, w, EPS, wanted) for op in (rms_norm, ops.rms_norm))
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert rel_max(actual.float(), expected.float()) < 3e-2  # of bfloat16 in the interpreter
    if dtype == weight == torch.float32:
        assert rel_max(rms_norm(x, w, EPS), ops.rms_norm(x, w, EPS)) < 1e-6


@on_device
def test_the_norm_of_a_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="x must be b l d"):
        rms_norm(randn(4, 8), randn(8), EPS)
    with pytest.raises(ValueError, match=r"weight must be float32 \(8,\)"):
        rms_norm(randn(1, 4, 8), randn(7), EPS)


@on_device
@pytest.mark.parametrize("dtype", ROUNDED)
def test_it_rounds_where_the_reference_does(dtype):
    """Before the weight, after it if it is of the same dtype, and at the end: each left out
    shows in many elements.
    """
    for weight in (torch.float32, dtype):
        q, k, *rest = given = inputs(1536, 12, dtype, weight)
        expected = ops.rms_rope(*given)
        for a, b in zip(rms_rope(*given), expected, strict=True):
            assert differing(a, b) < 0.01  # measured 5.4e-5
        late = [turned.to(dtype) for turned in ops.rms_rope(q.float(), k.float(), *rest)]
        assert all(differing(a, b) > 0.1 for a, b in zip(late, expected, strict=True))


@on_device
@pytest.mark.parametrize("name", VIEWS)
def test_slices_are_read_by_their_strides(name):
    q, k = view(name), view(name, seed=1)
    weights = randn(2, 2 * q.shape[2], seed=2)[:, ::2]
    table = angles(q.shape[2] // 2, (q.shape[1], 1, 1))
    actual = poisoned(rms_rope, q, k, *weights, tuple(a.mT.contiguous().mT for a in table), 2, EPS)
    assert all(
        map(torch.equal, actual, rms_rope(q.clone(), k.clone(), *weights.clone(), table, 2, EPS))
    )
    for a, expected in zip(actual, ops.rms_rope(q, k, *weights, table, 2, EPS), strict=True):
        assert rel_max(a, expected) < 1e-6  # measured 1.4e-7


@on_device
def test_offsets_pass_32_bits():
    q, weight = far_apart(1, 3, 12), randn(12)
    far, near = (
        rms_rope(x, x, weight, weight, angles(6, (3, 1, 1)), 2, EPS) for x in (q, q.clone())
    )
    assert all(map(torch.equal, far, near))


@on_device
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_extremes_are_the_references():
    """A row of zeros stays one, and one whose squares pass float32 becomes one; inf and NaN are
    seen.
    """
    size = torch.tensor([0, 1e-30, 1e-18, 1, 1e17, 1e30, math.inf, math.nan], device=DEVICE)
    q, weight = randn(1, 8, 130) * size[:, None], randn(130, seed=1)
    given = (q, q, weight, weight, angles(26, (2, 2, 2)), 5, EPS)
    actual, expected = (
        op(*given)[0][0].transpose(0, 1).flatten(1) for op in (rms_rope, ops.rms_rope)
    )  # l d
    assert (actual[[0, 5]] == 0).all()
    assert actual.isnan().any(1).tolist() == [False] * 6 + [True] * 2
    assert torch.allclose(actual[:6], expected[:6], rtol=0, atol=5e-6)


@on_device
@settings(max_examples=10)
@given(
    seeds, st.tuples(*[st.integers(1, 2)] * 3), st.sampled_from([4, 6, 16, 26]), st.integers(1, 4)
)
def test_a_rotation_keeps_the_norm_of_every_head(seed, grid, head, heads):
    """And at the first token, where every angle is 0, it is the norm alone; q and k do not see
    each other.
    """
    q, k = (randn(1, math.prod(grid), heads * head, seed=seed + i) for i in range(2))
    weights = [randn(heads * head, seed=seed + i) for i in (2, 3)]
    turned = rms_rope(q, k, *weights, angles(head, grid), heads, EPS)
    for y, x, weight in zip(turned, (q, k), weights, strict=True):
        still = ops.rms_norm(x, weight, EPS).unflatten(2, (heads, head)).transpose(1, 2)
        assert rel_max(y.norm(dim=-1), still.norm(dim=-1)) < 1e-6  # measured 1.6e-7
        assert rel_max(y[:, :, 0], still[:, :, 0]) < 1e-6  # measured 1.4e-7
    swapped = rms_rope(k, q, *reversed(weights), angles(head, grid), heads, EPS)
    assert all(map(torch.equal, turned, reversed(swapped)))


@on_device
@pytest.mark.parametrize("shape", [(0, 6, 8), (2, 0, 8)])
def test_no_tokens(shape):
    q, weight, table = randn(*shape), randn(8), angles(4, (shape[1], 1, 1))
    assert all(
        y.shape == (shape[0], 2, shape[1], 4) for y in rms_rope(q, q, weight, weight, table, 2, EPS)
    )


# -- refused ---------------------------------------------------------------------------------------

ROW, WEIGHT = torch.ones(2, 6, 8), torch.ones(8)


@on_device
@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"q": ROW.double()}, "q is torch.float64; the kernel takes float32, bfloat16 and float16"),
        ({"q": ROW[0]}, "q must be b l d, with d in 2 heads of pairs"),
        ({"heads": 3}, r"q must be b l d, with d in 3 heads of pairs, not \(2, 6, 8\)"),
        ({"heads": 8}, "with d in 8 heads of pairs"),
        ({"k": ROW.half()}, r"k must be float32 \(2, 6, 8\) on .*, not float16"),
        ({"k": ROW[:, :5]}, r"k must be float32 \(2, 6, 8\)"),
        ({"q_weight": WEIGHT[:7]}, r"q_weight must be float32 \(8,\)"),
        ({"k_weight": WEIGHT.half()}, r"k_weight must be float32 \(8,\) on .*, not float16"),
        ({"k_weight": WEIGHT.clone().requires_grad_()}, "no gradient; pass k_weight.detach"),
        ({"angles": ops.rope((5, 1, 1), 4)}, r"cosines must be float32 \(6, 2\)"),
        (
            {"angles": (torch.ones(6, 2), torch.ones(6, 2).double())},
            r"sines must be float32 \(6, 2\) on .*, not float64",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(changed, match):
    usual = {
        "q": ROW,
        "k": ROW,
        "q_weight": WEIGHT,
        "k_weight": WEIGHT,
        "angles": ops.rope((3, 2, 1), 4),
        "heads": 2,
        "eps": EPS,
    }
    given = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in (usual | changed).items()
    }
    with pytest.raises((TypeError, ValueError), match=match):
        rms_rope(**given)
