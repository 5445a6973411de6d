"""RMS norm over the full width and the rotation of each head, for q and k in one launch, and the
norm of a single tensor, for cross-attention: Triton kernels for `minicos.ops.rms_rope` and
`rms_norm`.

One program per token. It reads its rows of q and k and the cosines and sines of its position, which
all heads share, and writes separate heads, b n l k, contiguous, as attention reads them. Channels
are loaded in order and pairs (x[2j], x[2j+1]) are separated in registers, so loads and stores stay
as wide as possible.

Rounding follows the reference: x / rms(x), computed in float32, to x's dtype; times the weight,
rounded to x's dtype if that is also the weight's, else to float32; rotated in float32, each product
and sum rounded; then to x's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import (
    at,
    check,
    expect,
    launch,
    load,
    place,
    rounded,
    square_sum,
    store,
    traced,
    writable,
)


def rms_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    angles: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q and k, normed and rotated: b l d -> b n l k each. Weights d, angles (cosines, sines) l k/2
    float32. No gradient.
    """
    check("rms_rope", q=q, k=k, q_weight=q_weight, k_weight=k_weight)
    if q.ndim != 3 or q.shape[2] % (2 * heads):
        raise ValueError(
            f"rms_rope: q must be b l d, with d in {heads} heads of pairs, not {tuple(q.shape)}"
        )
    _, tokens, width = q.shape
    expect("rms_rope", "k", k, q.dtype, q.shape, q.device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        expect("rms_rope", name, weight, q_weight.dtype, (width,), q.device)
    cos, sin = (a.to(q.device).contiguous() for a in angles)
    for name, a in (("cosines", cos), ("sines", sin)):
        expect("rms_rope", name, a, torch.float32, (tokens, width // heads // 2), q.device)
    return _run(q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, heads, eps)


def _empty(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = q.shape
    shape = batch, heads, tokens, width // heads
    q_out, k_out = (torch.empty(shape, dtype=q.dtype, device=q.device) for _ in range(2))
    return q_out, k_out


@traced("rms_rope", _empty)
def _run(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    turned = _empty(q, k, q_weight, k_weight, cos, sin, heads, eps)
    rows = (*at(q), *at(k), q_weight, k_weight, cos, sin, *turned)
    launch(_rms_rope, q, *rows, q.shape[1], eps, head=q.shape[2] // heads)
    return turned


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight, rounded to `dtype` (None: that of the product): b l d -> b l d, weight
    d. No gradient.
    """
    check("rms_norm", x=x, weight=weight)
    if x.ndim != 3:
        raise ValueError(f"rms_norm: x must be b l d, not {tuple(x.shape)}")
    expect("rms_norm", "weight", weight, weight.dtype, x.shape[2:], x.device)
    dtype = dtype or torch.promote_types(x.dtype, weight.dtype)
    writable("rms_norm", dtype)
    return _norm(x, weight.contiguous(), eps, dtype)


def _empty_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@traced("rms_norm", _empty_norm)
def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    out = _empty_norm(x, weight, eps, dtype)
    launch(_rms_norm, x, *at(x), weight, out, x.shape[1], eps)
    return out


@triton.jit
def _rms_norm(
    x, x_batch, x_token, weight, out, tokens, eps, width: tl.constexpr, chunk: tl.constexpr
):
    batch, token = place(tokens)
    row = weighted(x + batch * x_batch + token * x_token, weight, eps, width, chunk)
    store(out + (batch * tokens + token) * width, row, width, chunk)


@triton.jit
def weighted(x, weight, eps, width: tl.constexpr, chunk: tl.constexpr):
    """The row at x, normed, rounded to its dtype and multiplied by the weight."""
    row, factor = load(x, width, chunk), load(weight, width, chunk)
    scale = tl.rsqrt(tl.div_rn(square_sum(row), width) + eps)
    y = ()
    for i in tl.static_range(len(row)):
        product = rounded(row[i] * scale, x) * factor[i]
        if weight.dtype.element_ty == x.dtype.element_ty:
            product = rounded(product, x)
        y += (product,)
    return y


@triton.jit
def _rms_rope(
    q,
    q_batch,
    q_token,
    k,
    k_batch,
    k_token,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    k_out,
    tokens,
    eps,
    head: tl.constexpr,
    width: tl.constexpr,
    chunk: tl.constexpr,
):
    batch, token = place(tokens)
    cos += token * (head // 2)
    sin += token * (head // 2)
    q += batch * q_batch + token * q_token
    k += batch * k_batch + token * k_token
    start = batch * tokens * width + token * head  # b n l k
    apart = (
        tl.cast(tokens, tl.int64) * head
    )  # stride between heads; for Triton, a single token is a constant without `.to`
    turned(q, q_weight, cos, sin, q_out + start, apart, eps, head, width, chunk)
    turned(k, k_weight, cos, sin, k_out + start, apart, eps, head, width, chunk)


@triton.jit
def turned(
    x,
    weight,
    cos,
    sin,
    out,
    apart,
    eps,
    head: tl.constexpr,
    width: tl.constexpr,
    chunk: tl.constexpr,
):
    """Write the row at x, normed and rotated, to out, whose heads are `apart` elements apart."""
    row = weighted(x, weight, eps, width, chunk)
    for i in tl.static_range(len(row)):
        pair = i * (chunk // 2) + tl.arange(0, chunk // 2)
        c = tl.load(cos + pair % (head // 2), mask=pair < width // 2, other=0.0)
        s = tl.load(sin + pair % (head // 2), mask=pair < width // 2, other=0.0)
        even, odd = tl.split(tl.reshape(row[i], [chunk // 2, 2]))
        y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [chunk])
        channel = i * chunk + tl.arange(0, chunk)
        heads = out + (channel // head) * apart + channel % head
        tl.store(heads, y.to(out.dtype.element_ty), mask=channel < width)
