"""Token energy, y[b, l] = sqrt(sum over d of x[b, l, d]^2), and the three energies of a residual
stream: Triton kernels for `minicos.measures.token_energy` and `stream_energy`.

One program per token, which reads its row once. The three energies cost two reads: the stream after
a block and before it.

Rounding: square, sum and root are each rounded to float32. Values are not rescaled, so squares must
fit into float32: a channel beyond 1.8e19 gives inf, and one below 2.6e-23 counts as zero. The
reference behaves in the same way, except for d = 1, where it uses |x|.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import at, check, expect, launch, load, place, square_sum


@torch.compiler.disable
def token_energy(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The L2 norm of every token over its channels, accumulated in float32: (... l d) -> (... l)
    float32, in `out` if given. No gradient.

    x may be a slice of a larger tensor. It is copied only if its channels are not adjacent in
    memory, or if the axes before l cannot be viewed as one; such an `out` is an error.
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


@torch.compiler.disable
def stream_energy(x: Tensor, before: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """||x||, ||(x - mean) kept|| and ||x - before|| of every token: x and before ... l d, mean and
    kept ... d float32 -> 3 ... l float32. No gradient. One launch for each index before l.
    """
    op = "stream_energy"
    check(op, x=x, before=before, mean=mean, kept=kept)
    if x.ndim > 2 and len(x) == len(before) == len(mean) == len(kept) > 0:
        every = zip(x, before, mean, kept, strict=True)
        return torch.stack([stream_energy(*one) for one in every], dim=1)
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be ... l d, not {tuple(x.shape)}")
    expect(op, "before", before, before.dtype, x.shape, x.device)
    for name, row in (("mean", mean), ("kept", kept)):
        expect(op, name, row, torch.float32, x.shape[1:], x.device)
    out = torch.empty(3, len(x), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out.zero_()
    rows = (y for each in (x[None], before[None], mean, kept) for y in at(each))
    launch(_stream_energy, x, *rows, out, len(x))
    return out


@triton.jit
def _stream_energy(
    x,
    x_batch,
    x_token,
    before,
    before_batch,
    before_token,
    mean,
    mean_batch,
    mean_token,
    kept,
    kept_batch,
    kept_token,
    out,
    tokens,
    width: tl.constexpr,
    chunk: tl.constexpr,
):
    _, token = place(tokens)
    row = load(x + token * x_token, width, chunk)
    old = load(before + token * before_token, width, chunk)
    mean, kept = load(mean, width, chunk), load(kept, width, chunk)
    centred = ()
    update = ()
    for i in tl.static_range(len(row)):
        centred += ((row[i] - mean[i]) * kept[i],)
        update += (row[i] - old[i],)
    tl.store(out + token, tl.sqrt_rn(square_sum(row)))
    tl.store(out + tokens + token, tl.sqrt_rn(square_sum(centred)))
    tl.store(out + 2 * tokens + token, tl.sqrt_rn(square_sum(update)))
