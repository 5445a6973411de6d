"""Residual addition, x + gate y: the Triton kernel for `minicos.ops.gated_add`, optionally with the
energy of the sum.

One program per token. It reads its rows of x and y and, of gate, the row of its timestep; it writes
the sum in the dtype of the residual stream, and on request its norm, without reading it again.

Rounding follows the reference: product and sum each to float32, then to `dtype`, so the bits are
equal. The energy is that of the rounded sum, which the next block sees, computed as in
`token_energy`.
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
    served,
    square_sum,
    store,
    traced,
    writable,
)


def gated_add(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    dtype: torch.dtype = torch.float32,
    energy: Tensor | None = None,
) -> Tensor:
    """x + gate y, rounded to `dtype`: x and y b l d, gate b g d float32 -> b l d. No gradient.

    `energy`, if given, receives the token energy of the result: b l float32, which may be a row of
    a larger buffer.
    """
    check("gated_add", x=x, y=y, gate=gate)
    writable("gated_add", dtype)
    each = served("gated_add", x, gate=gate)
    expect("gated_add", "y", y, y.dtype, x.shape, x.device)
    if energy is None:
        return _run(x, y, gate, each, dtype)
    expect("gated_add", "energy", energy, torch.float32, x.shape[:2], x.device)
    return _with_energy(x, y, gate, each, dtype, energy)


def _empty(x: Tensor, y: Tensor, gate: Tensor, each: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@traced("gated_add", _empty)
def _run(x: Tensor, y: Tensor, gate: Tensor, each: int, dtype: torch.dtype) -> Tensor:
    return _launched(x, y, gate, each, dtype, None)


@torch.compiler.disable  # no network asks for it; a graph would have to know that it is written
def _with_energy(
    x: Tensor, y: Tensor, gate: Tensor, each: int, dtype: torch.dtype, energy: Tensor
) -> Tensor:
    return _launched(x, y, gate, each, dtype, energy if x.numel() else energy.zero_())


def _launched(
    x: Tensor, y: Tensor, gate: Tensor, each: int, dtype: torch.dtype, energy: Tensor | None
) -> Tensor:
    out = _empty(x, y, gate, each, dtype)
    strides = (0, 0) if energy is None else energy.stride()
    launch(_gated_add, x, *at(x), *at(y), *at(gate), out, energy, *strides, x.shape[1], each)
    return out


@triton.jit
def _gated_add(
    x,
    x_batch,
    x_token,
    y,
    y_batch,
    y_token,
    gate,
    gate_batch,
    gate_time,
    out,
    energy,
    energy_batch,
    energy_token,
    tokens,
    each,
    width: tl.constexpr,
    chunk: tl.constexpr,
):
    batch, token = place(tokens)
    x += batch * x_batch + token * x_token
    y += batch * y_batch + token * y_token
    gate += batch * gate_batch + token // each * gate_time
    row = added(x, y, gate, out, width, chunk)
    store(out + (batch * tokens + token) * width, row, width, chunk)
    if energy is not None:
        tl.store(energy + batch * energy_batch + token * energy_token, tl.sqrt_rn(square_sum(row)))


@triton.jit
def added(x, y, gate, like, width: tl.constexpr, chunk: tl.constexpr):
    """x + gate y, or x + y if gate is None, rounded like `like`."""
    x, y = load(x, width, chunk), load(y, width, chunk)
    if gate is not None:
        gate = load(gate, width, chunk)
    row = ()
    for i in tl.static_range(len(x)):
        row += (rounded(x[i] + (y[i] if gate is None else y[i] * gate[i]), like),)
    return row
