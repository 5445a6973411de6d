"""What stands between two sub-layers, x <- x + y gate and the norm of that: the Triton twin of `minicos.ops.add_norm`.

One program per token: the sum is normed in registers, so the residual stream is read once and written once. The norm is modulated
by scale and shift, the rows of the token's timestep (ahead of the feed-forward), or affine (ahead of cross-attention).

Rounding, where the reference has it: the sum, computed in float32, to `residual`, and it is the rounded sum that is normed; a norm
to be modulated to `residual` before it is, an affine one after weight and bias; what the next matrix product takes to `dtype`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_add import added
from .modulated_norm import modulated
from .rows import at, check, expect, launch, normed, place, served, store, writable


@torch.compiler.disable
def add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """x + y gate, rounded to `residual`, and the norm of that, rounded to `dtype`: b l d each. There is no gradient.

    x and y b l d, gate b g d or None. scale and shift b g d modulate the norm; of shape d they are its weight and bias. All three float32.
    """
    check("add_norm", x=x, y=y, gate=gate, scale=scale, shift=shift)
    writable("add_norm", residual, dtype)
    expect("add_norm", "y", y, y.dtype, x.shape, x.device)
    affine = scale.ndim == 1
    each = served("add_norm", x, gate=gate, **({} if affine else {"scale": scale, "shift": shift}))
    for name, p in (("scale", scale), ("shift", shift)) if affine else ():
        expect("add_norm", name, p, torch.float32, x.shape[2:], x.device)
    out, norm = (torch.empty(x.shape, dtype=d, device=x.device) for d in (residual, dtype))
    rows = (*at(x), *at(y), *at(gate), *at(scale), *at(shift))
    launch(_add_norm, x, *rows, out, norm, x.shape[1], each, eps, affine=affine)
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
