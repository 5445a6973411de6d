"""Token energy, y[b, l] = sqrt(sum over d of x[b, l, d]^2): the Triton twin of
`minicos.measures.token_energy`.

One program per token, which reads its row once.

Rounding: square, sum and root are each rounded to float32. Nothing is rescaled, so squares must fit
float32: a channel beyond 1.8e19 gives inf and one below 2.6e-23 counts as nothing. So in the
reference, but for d = 1: it takes |x|.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import at, check, expect, launch, load, place, square_sum


@torch.compiler.disable
def token_energy(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The L2 norm of every token over its channels, accumulated in float32: (... l d) -> (... l)
    float32, in `out` where given.

    x may be a slice of a larger tensor. It is copied first only if its channels are not adjacent in
    memory, or if the axes before l cannot be viewed as one; such an `out` is an error. There is no
    gradient.
    """
    check("token_energy", x=x)
    if x.ndim == 0:
        raise ValueError("token_energy: x has no axes; the last one is the channels")
    if out is None:
        out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    expect("token_energy", "out", out, torch.float32, x.shape[:-1], x.device)
    if x.numel() == 0:
        return out.zero_()  # no tokens, or tokens without channels
    tokens, width = (1, *x.shape)[-2:]
    rows = x.reshape(-1, tokens, width)  # b l d
    energy = out.view(-1, tokens)  # b l: a view or an error, never a copy
    launch(_token_energy, rows, *at(rows), energy, *energy.stride(), tokens)
    return out


@triton.jit
def _token_energy(
    x, x_batch, x_token, out, out_batch, out_token, tokens, width: tl.constexpr, chunk: tl.constexpr
):
    batch, token = place(tokens)
    row = load(x + batch * x_batch + token * x_token, width, chunk)
    tl.store(out + batch * out_batch + token * out_token, tl.sqrt_rn(square_sum(row)))
