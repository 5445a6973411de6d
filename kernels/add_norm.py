"""A residual addition and the norm of the sum: Triton kernels for `gated_add_norm` and
`add_modulated_norm` in `minicos.ops`.

One program per token. The norm is computed on the sum in registers, so the residual stream is read
once and written once. The norm is affine (before cross-attention), or modulated by the rows of the
token's timestep (before the feed-forward).

Rounding follows the reference: the sum, computed in float32, to `residual_dtype`; the norm is that
of the rounded sum. A norm that is modulated is rounded to `residual_dtype` first, an affine one
after weight and bias; the result to `dtype`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_add import added
from .modulated_norm import modulated
from .rows import at, check, expect, launch, normed, place, served, store, traced, writable


def gated_add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """x + gate y, rounded to `residual_dtype`, and its affine norm, rounded to `dtype`: b l d each.
    No gradient.

    x and y are b l d; gate is b g d, weight and bias are d, all three float32.
    """
    op = "gated_add_norm"
    check(op, x=x, y=y, gate=gate, weight=weight, bias=bias)
    writable(op, residual_dtype, dtype)
    expect(op, "y", y, y.dtype, x.shape, x.device)
    each = served(op, x, gate=gate)
    for name, p in (("weight", weight), ("bias", bias)):
        expect(op, name, p, torch.float32, x.shape[2:], x.device)
    return _run(x, y, gate, weight, bias, each, eps, residual_dtype, dtype)


def add_modulated_norm(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """x + y, rounded to `residual_dtype`, and its modulated norm, rounded to `dtype`: b l d each.
    No gradient.

    x and y are b l d; scale and shift are b g d float32.
    """
    op = "add_modulated_norm"
    check(op, x=x, y=y, scale=scale, shift=shift)
    writable(op, residual_dtype, dtype)
    expect(op, "y", y, y.dtype, x.shape, x.device)
    each = served(op, x, scale=scale, shift=shift)
    return _run(x, y, None, scale, shift, each, eps, residual_dtype, dtype)


def _empty(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    each: int,
    eps: float,
    residual_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out, norm = (torch.empty(x.shape, dtype=d, device=x.device) for d in (residual_dtype, dtype))
    return out, norm


@traced("add_norm", _empty)
def _run(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    each: int,
    eps: float,
    residual_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """With a gate the norm is affine, with weight `scale` and bias `shift`; else modulated."""
    out, norm = _empty(x, y, gate, scale, shift, each, eps, residual_dtype, dtype)
    rows = (*at(x), *at(y), *at(gate), *at(scale), *at(shift))
    launch(_add_norm, x, *rows, out, norm, x.shape[1], each, eps, affine=gate is not None)
    return out, norm


@triton.jit
def _add_norm(
    x,
    x_batch,
    x_token,
    y,
    y_batch,
    y_token,
    gate,
    gate_batch,
    gate_time,
    scale,
    scale_batch,
    scale_time,
    shift,
    shift_batch,
    shift_time,
    out,
    norm,
    tokens,
    each,
    eps,
    affine: tl.constexpr,
    width: tl.constexpr,
    chunk: tl.constexpr,
):
    batch, token = place(tokens)
    x += batch * x_batch + token * x_token
    y += batch * y_batch + token * y_token
    if gate is not None:
        gate += batch * gate_batch + token // each * gate_time
    scale += batch * scale_batch + token // each * scale_time
    shift += batch * shift_batch + token // each * shift_time
    start = (batch * tokens + token) * width

    row = added(x, y, gate, out, width, chunk)
    store(out + start, row, width, chunk)
    row = normed(row, eps, width, chunk)
    store(norm + start, modulated(row, out, scale, shift, affine, width, chunk), width, chunk)
