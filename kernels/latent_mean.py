"""The mean over seeds, h <- (1 - alpha) h + alpha mean(h): the Triton kernel for
`minicos.measures.latent_mean`.

One program per case and BLOCK elements: it loads that block of every seed, with all loads in flight
together, holds the seeds in registers and writes each back. So x is read once and the result
written once, also if both are the same tensor. More than about 16 seeds do not fit into registers
and spill: correct, but slower.

Rounding: x is widened to float32, which is exact. Seeds are added in order, divided and blended,
with every operation rounded to float32 (no fused multiply-add), and rounded once to x's dtype when
they are stored. In float32 this equals the reference on a CPU bit for bit. On a GPU the reference
multiplies by 1 / seeds instead of dividing, and may differ in the last bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import check, expect

BLOCK = 1024  # elements of a seed: 16 bytes per thread in bfloat16, the widest load


@torch.compiler.disable
def latent_mean(x: Tensor, seeds: int, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """(1 - alpha) h + alpha mean(h) over the seeds of each case: (case seed) ... -> the same shape
    and dtype, in `out` if given. No gradient.

    With alpha = 0 or seeds = 1 nothing is launched, and the result is x, bit for bit. x may be a
    slice of a larger tensor: it is copied only if its last axis is not adjacent in memory, or if
    the axes before it, except the first, cannot be viewed as one. `out` may be x itself, and must
    not overlap it otherwise.
    """
    check("latent_mean", x=x)
    if seeds < 1 or len(x) % seeds:
        raise ValueError(f"latent_mean: {len(x)} rows are not whole cases of {seeds} seeds")
    if out is not None:
        expect("latent_mean", "out", out, x.dtype, x.shape, x.device)
    if seeds == 1 or alpha == 0:
        return x if out is None or out is x else out.copy_(x)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    whole = x[0].is_contiguous() and out[0].is_contiguous()  # then a seed is one long row
    shape = (len(x), 1, -1) if whole else (len(x), -1, x.shape[-1])  # (case seed) l d
    rows, result = (y.reshape(shape) for y in (x, out))
    rows, result = (y if y.stride(-1) == 1 else y.contiguous() for y in (rows, result))
    length, width = rows.shape[1:]
    programs = len(x) // seeds * length * triton.cdiv(width, BLOCK)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be x's
        _latent_mean[(programs,)](
            rows,
            result,
            1 - alpha,
            alpha,
            length,
            width,
            *rows.stride()[:2],
            *result.stride()[:2],
            seeds,
            BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out if result.data_ptr() == out.data_ptr() else out.copy_(result.view(out.shape))


@triton.jit
def _latent_mean(
    x,
    out,
    own,
    shared,
    length,
    width,
    x_row,
    x_token,
    out_row,
    out_token,
    seeds: tl.constexpr,
    block: tl.constexpr,
):
    blocks = tl.cdiv(width, block)
    program = tl.program_id(0)
    row = program // blocks
    case, token = (
        (row // length).to(tl.int64),
        (row % length).to(tl.int64),
    )  # offsets pass 2^31 elements
    channel = (program % blocks).to(tl.int64) * block + tl.arange(0, block)
    x += case * seeds * x_row + token * x_token + channel
    out += case * seeds * out_row + token * out_token + channel
    total = tl.zeros([block], tl.float32)
    held = ()
    for _ in tl.static_range(seeds):
        value = tl.load(x, mask=channel < width, other=0.0).to(tl.float32)
        total += value
        held = held + (value,)  # noqa: RUF005  Triton has no unpacking
        x += x_row
    mean = tl.div_rn(total, tl.full([block], seeds, tl.float32))
    for seed in tl.static_range(seeds):
        tl.store(out, own * held[seed] + shared * mean, mask=channel < width)
        out += out_row
