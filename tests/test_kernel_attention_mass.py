"""The mass of attention: the Triton kernels against their references, see `tests/on_device.py`."""

import inspect
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minicos.kernels import attention_mass as module
from minicos.kernels.attention_mass import attention_mass, attention_mass_sampled
from torch import Tensor

from minicos import measures, ops
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
EXACT = (
    2e-6 if INTERPRETED else 2e-5
)  # a GPU's ex2 is approximate, and so are its tensor cores' sums: not measured
STRIDES = ("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory of the kernels is NaN, so elements that they do not write show."""
    monkeypatch.setattr(
        module.torch,
        "empty",
        lambda *shape, dtype, device: torch.full(shape, torch.nan, dtype=dtype, device=device),
    )
    monkeypatch.setattr(module.torch, "empty_like", partial(torch.full_like, fill_value=torch.nan))


def exact(q: Tensor, k: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Both masses in float64, from standard parts: attention to values that say which frame a key is
    in, and the gradient of any values.
    """
    q, k = q.double(), k.double()
    length, keys = q.shape[2], k.shape[2]
    key_frames = frames if keys == length else 1
    v = torch.eye(key_frames, dtype=torch.float64, device=q.device).repeat_interleave(
        keys // key_frames, 0
    )
    v = v.expand(*q.shape[:2], -1, -1).contiguous().requires_grad_()
    heads = F.scaled_dot_product_attention(q, k, v)  # b n l f'
    received = torch.autograd.grad(heads.sum(), v)[0][..., 0]
    return received, heads.detach().unflatten(2, (frames, -1)).mean(3)


def error(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The largest error of each, over its largest value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == torch.float32
    return max(
        ((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)
    )


def heads(
    b: int,
    n: int,
    length: int,
    width: int,
    keys: int | None = None,
    dtype=torch.float32,
    seed: int = 0,
):
    return randn(b, n, length, width, seed=seed, dtype=dtype), randn(
        b, n, keys or length, width, seed=seed + 1, dtype=dtype
    )


# -- in this process -------------------------------------------------------------------------------


def compile_for_hopper(kernel, pointer: str, width: int, fixed: dict[str, int]) -> str:
    tiles = dict(module.TILES_32 if pointer == "*fp32" else module.TILES_16)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")} | {
        "enable_fp_fusion": True
    }
    types = {"q": pointer, "k": pointer, "scale": "fp32"}
    types |= {
        name: "*fp32"
        for name in ("lse", "received", "parts", "variance")
        if name in kernel.arg_names
    }
    constants = (
        fixed
        | tiles
        | {"width": width, "depth": max(16, triton.next_power_of_2(width)), "widen": False}
    )
    return ptx(
        kernel,
        types,
        constants,
        ("q", "k", "lse", *(STRIDES if width % 16 == 0 else ())),
        **options,
    )


KERNELS = {
    "lse": ("_log_sum_exp", {"keys": 32760}),
    "480p": (
        "_mass",
        {
            "size": 1560,
            "frames": 21,
            "key_size": 1560,
            "key_frames": 21,
            "blocks": 13,
            "sampled": False,
        },
    ),
    "720p": (
        "_mass",
        {
            "size": 3600,
            "frames": 21,
            "key_size": 3600,
            "key_frames": 21,
            "blocks": 29,
            "sampled": False,
        },
    ),
    "text": (
        "_mass",
        {
            "size": 1560,
            "frames": 21,
            "key_size": 512,
            "key_frames": 1,
            "blocks": 4,
            "sampled": False,
        },
    ),
    "sampled": (
        "_mass",
        {
            "size": 64,
            "frames": 21,
            "key_size": 1560,
            "key_frames": 21,
            "blocks": 13,
            "sampled": True,
        },
    ),
}


@compiled
@pytest.mark.skipif(
    "nvidia" not in triton.backends.backends,
    reason="this Triton has no compiler for NVIDIA's cards",
)
@pytest.mark.parametrize(
    ("name", "pointer", "width"),
    [
        *((name, "*bf16", 128) for name in KERNELS),
        *(("lse", *other) for other in (("*bf16", 24), ("*fp16", 64), ("*fp32", 128))),
        *(("480p", *other) for other in (("*bf16", 24), ("*fp16", 64), ("*fp32", 128))),
    ],
)
def test_it_compiles_for_hopper_without_a_card(name, pointer, width, tmp_path, monkeypatch):
    """16 bits: on the tensor cores, with loads that run ahead where rows are aligned. float32:
    no TF32. No atomics anywhere.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, fixed = KERNELS[name]
    asm = compile_for_hopper(getattr(module, kernel), pointer, width, fixed)
    assert ("wgmma.mma_async" in asm) == (pointer != "*fp32")
    assert ("cp.async.cg" in asm) == (pointer != "*fp32" and width % 16 == 0)
    assert "ex2.approx" in asm
    assert not re.search(r"tf32|\b(atom|red)\.", asm)


@compiled
def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(ValueError, match=r"on cpu.*minicos\.ops\.attention_mass "):
        attention_mass(*heads_on_the_cpu(), 2)
    with pytest.raises(ValueError, match=r"on cpu.*minicos\.ops\.attention_mass_sampled "):
        attention_mass_sampled(*heads_on_the_cpu(), 2, torch.zeros(1, 1, 2, 2, dtype=torch.int64))


def heads_on_the_cpu() -> tuple[Tensor, Tensor]:
    return torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8)


@pytest.mark.parametrize("twin", [attention_mass, attention_mass_sampled])
def test_signatures_are_the_references_and_with_kernels_swaps_them_in(twin):
    assert inspect.signature(twin) == inspect.signature(getattr(ops, twin.__name__))
    assert getattr(ops.REFERENCE.with_kernels(), twin.__name__) is twin


# -- exact -----------------------------------------------------------------------------------------

# b n l k t, frames, of 16 bits (tiles of 128 by 64) and, a third as long, of 32 (32 by 32)
SHAPES = [
    (2, 2, 6, 16, None, 3),
    (1, 1, 1, 8, None, 1),
    (1, 1, 4, 24, None, 4),  # frames of one token
    (1, 1, 130, 128, None, 1),  # one frame, two tiles and a bit
    (1, 1, 2 * 133, 64, None, 2),  # frames of no whole number of tiles
    (1, 1, 3 * 64, 24, None, 3),
    (1, 2, 2 * 35, 24, 77, 2),  # a text
    (1, 1, 5, 128, 140, 1),
]
SHORT = [
    (2, 2, 6, 16, None, 3),
    (1, 1, 34, 128, None, 1),
    (1, 1, 2 * 37, 64, None, 2),
    (1, 1, 2 * 32, 5, None, 2),
    (1, 2, 2 * 7, 24, 35, 2),
]
LISTS = {torch.float32: SHORT, torch.bfloat16: SHAPES, torch.float16: SHAPES[::3]}
CASES = [(*s, d) for d in DTYPES for s in LISTS[d]]
cases = pytest.mark.parametrize(("b", "n", "length", "width", "keys", "frames", "dtype"), CASES)


@on_device
@cases
def test_masses_are_exact(b, n, length, width, keys, frames, dtype):
    """Also in bfloat16, whose products float32 holds exactly."""
    q, k = heads(b, n, length, width, keys, dtype)
    actual = attention_mass(q, k, frames)
    assert error(actual, exact(q, k, frames)) < EXACT  # measured 4.6e-7
    assert error(actual, ops.attention_mass(q, k, frames)) < EXACT  # measured 2.9e-7
    assert all(map(torch.equal, actual, attention_mass(q, k, frames)))  # every run the same


@on_device
@cases
def test_the_forwards_logarithms_are_taken(b, n, length, width, keys, frames, dtype):
    q, k = heads(b, n, length, width, keys, dtype)
    _, lse = measures.attention_with_lse(q, k, k)
    assert (
        lse - (q.double() @ k.double().mT * width**-0.5).logsumexp(-1)
    ).abs().max() < 1e-4  # measured 2.9e-5, the CPU's in 16 bits
    assert error(attention_mass(q, k, frames, lse), exact(q, k, frames)) < 1e-4  # measured 4.5e-6
    twice = lse + torch.log(torch.tensor(2.0))
    half = tuple(x / 2 for x in attention_mass(q, k, frames, lse))
    assert error(attention_mass(q, k, frames, twice.mT.contiguous().mT), half) < EXACT
    assert error(ops.attention_mass(q, k, frames, twice), half) < EXACT


SLICES = {
    "heads of a projection": lambda x: (
        x.transpose(1, 2).flatten(2).clone().unflatten(2, (-1, 24)).transpose(1, 2)
    ),
    "some heads": lambda x: torch.stack([x, nan(*x.shape, dtype=x.dtype)], 2).flatten(1, 2)[:, ::2],
    "channels": lambda x: torch.cat([nan(*x.shape, dtype=x.dtype), x], -1)[..., 24:],
    "every other channel": lambda x: torch.stack([x, nan(*x.shape, dtype=x.dtype)], -1)[..., 0],
    "every other row": lambda x: torch.stack([x, nan(*x.shape, dtype=x.dtype)], 3).flatten(2, 3)[
        :, :, ::2
    ],
    "rows between others": lambda x: F.pad(x, (0, 0, 3, 5), value=torch.nan)[:, :, 3:-5],
    "one head": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@on_device
@pytest.mark.parametrize("name", SLICES)
def test_slices_are_read_by_their_strides(name, dtype=torch.bfloat16):
    """Surrounded by NaN, which a masked row or column must not admit."""
    q, k = heads(2, 2, 70, 24, dtype=dtype)
    sliced = SLICES[name](q), SLICES[name](k)
    if name == "one head":
        q, k = (x.contiguous() for x in sliced)
    assert all(map(torch.equal, attention_mass(*sliced, 2), attention_mass(q, k, 2)))
    rows = measures.stratified(q, 2, 5, torch.Generator().manual_seed(0))
    sampled, expected = (attention_mass_sampled(*pair, 2, rows) for pair in (sliced, (q, k)))
    assert all(map(torch.equal, (*sampled[0], *sampled[1]), (*expected[0], *expected[1])))


@on_device
def test_offsets_pass_32_bits():
    """Rows 2^29 apart: the last lies past 2^31 elements. Of these 5 GiB, six pages are touched
    by each.
    """
    q, k = heads(1, 1, 6, 8, dtype=torch.bfloat16)
    far = [q.new_empty(5 * 2**29 + 8).as_strided(q.shape, (0, 0, 2**29, 1)) for _ in "qk"]
    for x, y in zip(far, (q, k), strict=True):
        x.copy_(y)
    assert all(map(torch.equal, attention_mass(*far, 3), attention_mass(q, k, 3)))


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_and_zero_rows(dtype):
    """Zero rows attend evenly; rows of 1e3 to one key alone; neither disturbs the others."""
    q, k = heads(1, 1, 80, 24, dtype=dtype)
    q[:, :, 3], q[:, :, 40:44], k[:, :, 7] = 0, q[:, :, 40:44] * 1000, 0
    received, between = attention_mass(q, k, 2)
    assert (
        error((received, between), exact(q, k, 2)) < 5e-4
    )  # measured 7.4e-5: scores of thousands, each to 1e-7 of itself
    assert torch.allclose(received.sum(-1), torch.tensor(80.0, device=DEVICE), rtol=1e-5)
    nothing = torch.zeros_like(q)
    received, between = attention_mass(nothing, k, 2)
    assert torch.allclose(received, torch.ones_like(received), rtol=1e-6)
    assert torch.allclose(between, torch.full_like(between, 0.5), rtol=1e-6)


@on_device
@settings(max_examples=8)
@given(numbers, st.integers(1, 3), st.integers(1, 30), st.sampled_from([8, 24]), st.booleans())
def test_masses_are_conserved_and_follow_their_keys(seed, frames, size, width, half):
    q, k = heads(
        1, 1, frames * size, width, dtype=torch.bfloat16 if half else torch.float32, seed=seed
    )
    received, between = attention_mass(q, k, frames)
    assert torch.allclose(
        received.sum(-1), torch.tensor(float(frames * size), device=DEVICE), rtol=EXACT
    )  # measured 1.2e-7
    assert torch.allclose(
        between.sum(-1), torch.ones((), device=DEVICE), rtol=EXACT
    )  # measured 2.4e-7
    inside = received.unflatten(2, (frames, size)).sum(
        -1
    )  # the same mass of a key frame for every query
    assert torch.allclose(between.sum(2) * size, inside, rtol=EXACT)
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    moved = (
        k.unflatten(2, (frames, size))[:, :, order].flip(3).flatten(2, 3)
    )  # frames permuted, and keys within
    received_moved, between_moved = attention_mass(q, moved, frames)
    followed = received.unflatten(2, (frames, size))[:, :, order].flip(3).flatten(2)
    assert torch.allclose(received_moved, followed, rtol=EXACT, atol=1e-6)
    assert torch.allclose(between_moved, between[..., order], rtol=EXACT, atol=1e-6)


# -- a sample --------------------------------------------------------------------------------------


@on_device
@cases
def test_a_sample_is_the_references(b, n, length, width, keys, frames, dtype):
    q, k = heads(b, n, length, width, keys, dtype)
    for queries in {min(length // frames, count) for count in (2, 70)}:
        rows = measures.stratified(q, frames, queries, torch.Generator().manual_seed(0))
        masses, errors = attention_mass_sampled(q, k, frames, rows)
        expected, expected_errors = ops.attention_mass_sampled(q, k, frames, rows)
        assert error(masses, expected) < EXACT  # measured 5.8e-7
        for actual, reference, mass in zip(errors, expected_errors, expected, strict=True):
            assert ((actual - reference).abs() <= 1e-3 * (reference + mass)).all()  # as documented
        assert queries < length // frames or not any(e.any() for e in errors)


@on_device
@pytest.mark.parametrize(
    ("q", "k", "frames", "lse", "match"),
    [
        (torch.ones(1, 1, 4, 8).double(), torch.ones(1, 1, 4, 8).double(), 2, None, "float64"),
        (torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8).bfloat16(), 2, None, "bfloat16"),
        (torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 7), 2, None, "b n l k"),
        (torch.ones(1, 4, 8), torch.ones(1, 4, 8), 2, None, "b n l k"),
        (torch.ones(1, 1, 0, 8), torch.ones(1, 1, 4, 8), 1, None, "none empty"),
        (
            torch.ones(1, 1, 4, 8),
            torch.ones(1, 1, 4, 8),
            3,
            None,
            "4 queries are not 3 equal frames",
        ),
        (
            torch.ones(1, 1, 4, 8),
            torch.ones(1, 1, 4, 8),
            2,
            torch.ones(1, 1, 4).double(),
            "lse must be float32",
        ),
        (
            torch.ones(1, 1, 4, 8),
            torch.ones(1, 1, 4, 8),
            2,
            torch.ones(1, 1, 3),
            "lse must be float32",
        ),
        (torch.ones(1, 1, 4, 8, requires_grad=True), torch.ones(1, 1, 4, 8), 2, None, "gradient"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(q, k, frames, lse, match):
    with pytest.raises((TypeError, ValueError), match=match):
        attention_mass(q.to(DEVICE), k.to(DEVICE), frames, None if lse is None else lse.to(DEVICE))
