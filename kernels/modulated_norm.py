"""Layer norm and modulation, y = (x - mean) / sqrt(variance + eps) (1 + scale) + shift: the Triton
kernel for `minicos.ops.modulated_norm`.

One program per token. It reads its row of x and, of scale and shift, the rows of its timestep; it
writes y in the dtype of the following matrix product, so that no cast is needed.

Rounding follows the reference: the norm, computed in float32, to x's dtype; modulated in float32,
and then to `dtype`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import at, check, launch, load, normed, place, rounded, served, store, traced, writable


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """layer_norm(x) (1 + scale) + shift, rounded to `dtype`: x b l d, scale and shift b g d float32
    -> b l d. No gradient.
    """
    check("modulated_norm", x=x, scale=scale, shift=shift)
    writable("modulated_norm", dtype)
    each = served("modulated_norm", x, scale=scale, shift=shift)
    return _run(x, scale, shift, each, eps, dtype)


def _empty(
    x: Tensor, scale: Tensor, shift: Tensor, each: int, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@traced("modulated_norm", _empty)
def _run(
    x: Tensor, scale: Tensor, shift: Tensor, each: int, eps: float, dtype: torch.dtype
) -> Tensor:
    out = _empty(x, scale, shift, each, eps, dtype)
    launch(_modulated_norm, x, *at(x), *at(scale), *at(shift), out, x.shape[1], each, eps)
    return out


@triton.jit
def _modulated_norm(
    x,
    x_batch,
    x_token,
    scale,
    scale_batch,
    scale_time,
    shift,
    shift_batch,
    shift_time,
    out,
    tokens,
    each,
    eps,
    width: tl.constexpr,
    chunk: tl.constexpr,
):
    batch, token = place(tokens)
    scale += batch * scale_batch + token // each * scale_time
    shift += batch * shift_batch + token // each * shift_time
    row = normed(load(x + batch * x_batch + token * x_token, width, chunk), eps, width, chunk)
    store(
        out + (batch * tokens + token) * width,
        modulated(row, x, scale, shift, False, width, chunk),
        width,
        chunk,
    )


@triton.jit
def modulated(
    row, like, scale, shift, affine: tl.constexpr, width: tl.constexpr, chunk: tl.constexpr
):
    """A normed row: rounded like `like` and modulated, or affine and then rounded."""
    scale, shift = load(scale, width, chunk), load(shift, width, chunk)
    y = ()
    for i in tl.static_range(len(row)):
        if affine:
            y += (rounded(row[i] * scale[i] + shift[i], like),)
        else:
            y += (rounded(row[i], like) * (1 + scale[i]) + shift[i],)
    return y
