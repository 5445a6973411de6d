"""Token energy, y[b, l] = sqrt(sum over d of x[b, l, d]^2): the Triton twin of `minicos.ops.token_energy`.

One program per token. It reads its row once, in equal power-of-two chunks (5120 = 5 x 1024, 1536 = 3 x 512, and a masked
tail where no such cut exists); every lane sums its own squares and the lanes are added at the end, so that all loads are
in flight together. No atomics: equal rows of a tensor get equal bits, on every run.

Rounding: x is widened to float32 on load, which is exact; square, sum and root are each rounded to float32 (no fused
multiply-add, whose default changes between Triton's versions). Nothing is rescaled, so squares must fit float32: a
channel beyond 1.8e19 gives inf and one below 2.6e-23 counts as nothing. So in the reference, but for d = 1: it takes |x|.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # channels loaded at a time, at most
WARP = 256  # channels per warp and chunk: 8 a thread, which for bfloat16 is one 16-byte load, the widest there is


def token_energy(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The L2 norm of every token over its channels, accumulated in float32: (... l d) -> (... l) float32, in `out` where given.

    x may be a slice of a larger tensor. It is copied first only if its channels are not adjacent in memory, or if the axes
    before l cannot be viewed as one; such an `out` is an error. There is no gradient.
    """
    _check(x, out)
    if out is None:
        out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out.zero_()  # no tokens, or tokens without channels
    tokens, width = (1, *x.shape)[-2:]
    rows = x.reshape(-1, tokens, width)  # b l d
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    energy = out.view(-1, tokens)  # b l: a view or an error, never a copy
    chunk = _chunk(width)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        _token_energy[(energy.numel(),)](
            rows, energy, tokens, *rows.stride()[:2], *energy.stride(), width, chunk,
            num_warps=max(1, chunk // WARP), enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _token_energy(x, out, tokens, x_batch, x_token, out_batch, out_token, width: tl.constexpr, chunk: tl.constexpr):
    row = tl.program_id(0)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)  # offsets pass 2^31 elements
    x += batch * x_batch + token * x_token
    squares = tl.zeros([chunk], tl.float32)
    for start in tl.static_range(0, width, chunk):
        channel = start + tl.arange(0, chunk)
        value = tl.load(x + channel, mask=channel < width, other=0.0).to(tl.float32)
        squares += value * value
    tl.store(out + batch * out_batch + token * out_token, tl.sqrt_rn(tl.sum(squares, 0)))


def _chunk(width: int) -> int:
    """The largest power of two up to CHUNK that divides the width, if it fills a warp; otherwise the first that covers it."""
    divisor = min(width & -width, CHUNK)
    return divisor if divisor >= WARP else min(triton.next_power_of_2(width), CHUNK)


def _check(x: Tensor, out: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"token_energy: x is {x.dtype}; the kernel takes float32, bfloat16 and float16")
    if x.ndim == 0:
        raise ValueError("token_energy: x has no axes; the last one is the channels")
    if not x.is_cuda and isinstance(_token_energy, triton.JITFunction):
        raise ValueError(
            f"token_energy: x is on {x.device}, and this kernel runs on a GPU; elsewhere use minicos.ops.token_energy"
            " (to try the kernel on a CPU, set TRITON_INTERPRET=1 before Python starts)"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("token_energy: the kernel has no gradient; pass x.detach(), or use minicos.ops.token_energy")
    if out is not None and (out.dtype, out.shape, out.device) != (torch.float32, x.shape[:-1], x.device):
        raise ValueError(
            f"token_energy: out must be float32 {tuple(x.shape[:-1])} on {x.device},"
            f" not {out.dtype} {tuple(out.shape)} on {out.device}"
        )
