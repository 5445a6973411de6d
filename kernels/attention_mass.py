"""Where attention goes, p = softmax(q k^T / sqrt(k)) summed over queries: Triton kernels for
`minicos.measures.attention_mass` and `attention_mass_sampled`, without the l x l matrix.

There are two kernels. `_log_sum_exp` iterates over keys for a block of queries, with a running
maximum; it is skipped if the forward pass provides its logarithms. `_mass` then holds a block of
keys and iterates over queries, frame by frame: p is known immediately, its sums over queries are
kept in registers, and at the end of each query frame the block's part of the frame-by-frame matrix
is stored. Blocks of keys do not cross frames (the last of a frame is masked: 1,560 = 12 x 128 +
24), so the matrix is a small sum over blocks in order. There are no atomics, so every run gives
equal bits.

Rounding: products of 16-bit inputs are exact and accumulated in float32 on the tensor cores;
float32 inputs are multiplied in float32, not in TF32. Everything else is float32, with exp2 for
exp.

Tiles, for an H200 and heads of 128 in 16 bits: 128 keys by 64 queries. Each program reads all
queries of its head from the L2 cache, and 128 keys perform 128 operations per byte, as many as
FlashAttention's 128 queries; 64 would be limited by that cache, and 256 would mask an eighth of
each 1,560-token frame. The tile is transposed (keys are rows), since sums along a row then stay
within four threads. The keys and three stages of 64 queries take 80 KB of shared memory, so two
programs share a multiprocessor: one multiplies while the other computes exponentials, which take as
many cycles. This is calculated, not measured. In float32, where Triton unrolls the product, tiles
are 32 by 32, since larger ones spill registers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import check, expect

# rows that a program holds, and rows per iteration
TILES_16 = {"held": 128, "walked": 64, "num_warps": 8, "num_stages": 3}
TILES_32 = {"held": 32, "walked": 32, "num_warps": 8, "num_stages": 1}
LOG2E = tl.constexpr(math.log2(math.e))


@torch.compiler.disable
def attention_mass(
    q: Tensor, k: Tensor, frames: int, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mass received by every key and from frame to frame: q b n l k, k b n t k -> (b n t, b n f
    f'), float32. No gradient.

    As in the reference, keys are divided into frames if there are as many as queries, otherwise
    (text) they are one frame; lse, if given, is log sum exp(q k^T / sqrt(k)), natural, b n l
    float32. q and k are read by their strides, and copied only if the numbers of a head are not
    adjacent in memory. Compiled once for each shape of video.
    """
    _check("attention_mass", q, k, frames, lse)
    key_frames = frames if k.shape[2] == q.shape[2] else 1
    received, parts, _ = _launch(q, k, lse, frames, key_frames, sampled=False)
    return received, parts.sum(3).mT / (q.shape[2] // frames)


@torch.compiler.disable
def attention_mass_sampled(
    q: Tensor, k: Tensor, frames: int, rows: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Estimates of `attention_mass` from the queries `rows` (b n f r) of every frame, and their
    standard errors, as in the reference.

    The variance of a key's mass is computed from sums and sums of squares, so an error below a
    thousandth of the mass is not resolved.
    """
    _check("attention_mass_sampled", q, k, frames, None)
    key_frames = frames if k.shape[2] == q.shape[2] else 1
    size, count = q.shape[2] // frames, rows.shape[-1]
    left = (1 - count / size) / count
    drawn = q.unflatten(2, (frames, -1)).gather(
        3, rows.unsqueeze(-1).expand(-1, -1, -1, -1, q.shape[-1])
    )
    received, parts, variance = _launch(
        drawn.flatten(2, 3), k, None, frames, key_frames, sampled=True
    )
    share = parts.sum(3).unflatten(-1, (frames, count)).transpose(2, 3)  # b n f f' r
    return (
        (received * (size / count), share.mean(-1)),
        (
            (variance * (size**2 * left)).sqrt(),
            (share.var(-1, correction=min(1, count - 1)) * left).sqrt(),
        ),
    )


def _launch(
    q: Tensor, k: Tensor, lse: Tensor | None, frames: int, key_frames: int, sampled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass of keys (b n t), of blocks of keys (b n f' block f, or per query), and the variance of a
    key's mass over a frame's queries, summed over frames (b n t; only if sampled)."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (b, n, length, width), keys = q.shape, k.shape[2]
    strides = (*q.stride()[:3], *k.stride()[:3])
    fixed = {
        "width": width,
        "depth": max(16, triton.next_power_of_2(width)),
        "widen": not isinstance(
            _mass, triton.JITFunction
        ),  # the interpreter's bfloat16 is not a number
        **(TILES_32 if q.dtype == torch.float32 else TILES_16),
        "enable_fp_fusion": True,
    }
    scale = width**-0.5 * LOG2E.value
    size, key_size = length // frames, keys // key_frames
    blocks = triton.cdiv(key_size, fixed["held"])
    received = torch.empty(b, n, keys, dtype=torch.float32, device=q.device)
    variance = torch.empty_like(received) if sampled else received
    parts = torch.empty(
        b,
        n,
        key_frames,
        blocks,
        length if sampled else frames,
        dtype=torch.float32,
        device=q.device,
    )
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be q's
        if lse is None:
            lse = torch.empty(b, n, length, dtype=torch.float32, device=q.device)
            _log_sum_exp[(b * n * triton.cdiv(length, fixed["held"]),)](
                q, k, lse, scale, n, *strides, length, keys, **fixed
            )
        _mass[(b * n * key_frames * blocks,)](
            q,
            k,
            lse.contiguous(),
            received,
            parts,
            variance,
            scale,
            n,
            *strides,
            size,
            frames,
            key_size,
            key_frames,
            blocks,
            sampled,
            **fixed,
        )
    return received, parts, variance


@triton.jit
def _tile(
    x,
    first,
    stride,
    rows: tl.constexpr,
    end,
    width: tl.constexpr,
    depth: tl.constexpr,
    widen: tl.constexpr,
):
    """Rows first, first + 1, ... of x, zero from row `end` on: rows depth."""
    row, channel = tl.arange(0, rows)[:, None], tl.arange(0, depth)[None, :]
    first = tl.full([], first, tl.int64)  # offsets pass 2^31 elements
    tile = tl.load(
        x
        + first * stride
        + (row.to(tl.int64) * stride + channel),  # the bracket stays as a program walks
        mask=(first + row < end) & (channel < width),
        other=0.0,
    )
    return tile.to(tl.float32) if widen else tile


@triton.jit
def _log_sum_exp(
    q,
    k,
    lse,
    scale,
    heads,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    length,
    keys: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
    held: tl.constexpr,
    walked: tl.constexpr,
    widen: tl.constexpr,
):
    blocks = tl.cdiv(length, held)
    head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * held
    batch, n = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    q += batch * q_batch + n * q_head
    k += batch * k_batch + n * k_head
    query = _tile(q, first, q_row, held, length, width, depth, widen)
    top = tl.full([held], float("-inf"), tl.float32)
    total = tl.zeros([held], tl.float32)
    for start in range(0, keys, walked):
        key = _tile(k, start, k_row, walked, keys, width, depth, widen)
        s = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # held walked
        s = tl.where((start + tl.arange(0, walked) < keys)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    row = first + tl.arange(0, held)
    tl.store(
        lse + head.to(tl.int64) * length + row, (top + tl.log2(total)) / LOG2E, mask=row < length
    )


@triton.jit
def _mass(
    q,
    k,
    lse,
    received,
    parts,
    variance,
    scale,
    heads,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    size: tl.constexpr,
    frames: tl.constexpr,
    key_size: tl.constexpr,
    key_frames: tl.constexpr,
    blocks: tl.constexpr,
    sampled: tl.constexpr,
    width: tl.constexpr,
    depth: tl.constexpr,
    held: tl.constexpr,
    walked: tl.constexpr,
    widen: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head, block = program // (key_frames * blocks), program % (key_frames * blocks)
    batch, n = head // heads, head % heads
    q += batch * q_batch + n * q_head
    k += batch * k_batch + n * k_head
    lse += head * frames * size
    inside = block % blocks * held  # of the key frame
    first = block // blocks * key_size + inside
    key = _tile(k, first, k_row, held, first - inside + key_size, width, depth, widen)
    own = inside + tl.arange(0, held) < key_size
    total = tl.zeros([held], tl.float32)
    spread = tl.zeros([held], tl.float32)
    for frame in range(frames):
        sums = tl.zeros([held], tl.float32)
        squares = tl.zeros([held], tl.float32)
        for start in range(0, size, walked):
            row = frame * size + start + tl.arange(0, walked)
            seen = start + tl.arange(0, walked) < size
            query = _tile(
                q, frame * size + start, q_row, walked, (frame + 1) * size, width, depth, widen
            )
            log = (
                tl.load(lse + row, mask=seen, other=float("inf")) * LOG2E
            )  # exp2(-inf) is 0: rows beyond the frame
            p = tl.exp2(
                tl.dot(key, tl.trans(query), input_precision="ieee") * scale - log[None, :]
            )  # held walked
            sums += tl.sum(p, 1)
            if sampled:
                squares += tl.sum(p * p, 1)
                tl.store(
                    parts + program * frames * size + row,
                    tl.sum(tl.where(own[:, None], p, 0.0), 0),
                    mask=seen,
                )
        total += sums
        if sampled:
            spread += tl.maximum(squares - sums * sums / size, 0.0) / max(size - 1, 1)
        else:
            tl.store(parts + program * frames + frame, tl.sum(tl.where(own, sums, 0.0), 0))
    column = head * key_frames * key_size + first + tl.arange(0, held)
    tl.store(received + column, total, mask=own)
    if sampled:
        tl.store(variance + column, spread, mask=own)


def _check(name: str, q: Tensor, k: Tensor, frames: int, lse: Tensor | None) -> None:
    check(name, q=q, k=k)
    if q.dtype != k.dtype:
        raise TypeError(
            f"{name}: q is {q.dtype} and k {k.dtype}; the kernel takes two of one dtype"
        )
    if (
        q.ndim != 4
        or k.ndim != 4
        or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3])
        or 0 in q.shape + k.shape
    ):
        raise ValueError(
            f"{name}: q is {tuple(q.shape)} and k {tuple(k.shape)}; they must be b n l k and b n t "
            "k, none empty"
        )
    if frames < 1 or q.shape[2] % frames:
        raise ValueError(f"{name}: {q.shape[2]} queries are not {frames} equal frames")
    if lse is not None:
        expect(name, "lse", lse, torch.float32, q.shape[:3], q.device)
