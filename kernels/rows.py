"""The common parts of the element-wise kernels, with one program per row, which is read once and
kept in registers; and the checks of their arguments.

A row of d channels is divided into equal power-of-two chunks (5120 = 5 x 1024, 1536 = 3 x 512, or a
masked tail if there is no such division), and represented as a tuple of them, so all loads are in
flight together and a norm's second pass reads no memory. Channels are widened to float32 on load,
which is exact. Sums run over the chunks in each lane and over the lanes at the end. There are no
atomics, so equal rows get equal bits, on every run. The functions are compiled without fused
multiply-add, whose default differs between versions of Triton: each product and sum is rounded as
in the reference.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # most channels loaded at a time
# channels per warp and chunk: 8 per thread, which in bfloat16 is one 16-byte load, the widest
WARP = 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# -- on the device ---------------------------------------------------------------------------------


@triton.jit
def place(tokens):
    """Batch and token of this program, in 64 bits, since offsets exceed 2^31 elements."""
    row = tl.program_id(0)
    return (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)


@triton.jit
def load(x, width: tl.constexpr, chunk: tl.constexpr):
    """The row at x, as a tuple of chunks in float32; zero beyond the width."""
    row = ()
    for start in tl.static_range(0, width, chunk):
        channel = start + tl.arange(0, chunk)
        row += (tl.load(x + channel, mask=channel < width, other=0.0).to(tl.float32),)
    return row


@triton.jit
def store(out, row, width: tl.constexpr, chunk: tl.constexpr):
    """Write the row to out, rounded to its dtype."""
    for i in tl.static_range(len(row)):
        channel = i * chunk + tl.arange(0, chunk)
        tl.store(out + channel, row[i].to(out.dtype.element_ty), mask=channel < width)


@triton.jit
def rounded(x, like):
    """x in float32, after rounding to the dtype that the pointer `like` points to."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def lane_sum(x):
    """The sum of a chunk. Eight neighbours are added first: a thread holds four or eight channels,
    depending on the dtypes of its kernel, and the order of additions, hence the last bit, must not
    depend on that."""
    for _ in tl.static_range(3):
        if x.shape[0] > 1:
            even, odd = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
            x = even + odd
    return tl.sum(x, 0)


@triton.jit
def square_sum(row):
    squares = row[0] * row[0]
    for i in tl.static_range(1, len(row)):
        squares += row[i] * row[i]
    return lane_sum(squares)


@triton.jit
def normed(row, eps, width: tl.constexpr, chunk: tl.constexpr):
    """(row - mean) / sqrt(variance + eps), with the variance of the centred row, so that a common
    offset does not reduce precision.
    """
    total = row[0]
    for i in tl.static_range(1, len(row)):
        total += row[i]
    mean = tl.div_rn(lane_sum(total), width)
    centred = ()
    for i in tl.static_range(len(row)):
        inside = i * chunk + tl.arange(0, chunk) < width
        centred += (tl.where(inside, row[i] - mean, 0.0),)
    scale = tl.rsqrt(tl.div_rn(square_sum(centred), width) + eps)
    y = ()
    for i in tl.static_range(len(row)):
        y += (centred[i] * scale,)
    return y


# -- on the host -----------------------------------------------------------------------------------


def traced(name: str, like: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Make a function a single operation of the graph under `torch.compile`; without it, the
    function is called normally.

    Args:
        like: returns empty tensors for the results, from the same arguments, for the compiler.
    """

    def decorate(function: Callable) -> Callable:
        op = torch.library.custom_op(f"minicos::{name}", function, mutates_args=())
        op.register_fake(like)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return (op if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return decorate


def launch(kernel: triton.JITFunction, x: Tensor, *arguments: object, **constants: object) -> None:
    """Launch one program for each row of x; none if x is empty."""
    if x.numel():
        with torch.cuda.device_of(
            x
        ):  # Triton launches on the current device, which need not be x's
            kernel[(x.numel() // x.shape[-1],)](*arguments, **constants, **options(x.shape[-1]))


def options(width: int) -> dict[str, int]:
    """The launch options of a kernel for rows of this width. A chunk is the largest power of two up
    to CHUNK that divides the width, if it fills a warp; otherwise the first that covers it, or
    CHUNK.
    """
    divisor = min(width & -width, CHUNK)
    chunk = divisor if divisor >= WARP else min(triton.next_power_of_2(width), CHUNK)
    return {
        "width": width,
        "chunk": chunk,
        "num_warps": max(1, chunk // WARP),
        "enable_fp_fusion": False,
    }


def at(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A tensor in the form that a kernel takes: its start, and the strides of its rows over the
    batch and over tokens or timesteps.

    Both strides are 0 for a single row shared by all (d), and for None. The tensor is copied only
    if its channels are not adjacent.
    """
    if x is None:
        return None, 0, 0
    x = x if x.stride(-1) == 1 else x.contiguous()
    return (x, x.stride(0), x.stride(1)) if x.ndim == 3 else (x, 0, 0)


def check(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that no kernel can compute with."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first, device = next((name, x.device) for name, x in given.items())
    for name, x in given.items():
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} is {x.dtype}; the kernel takes float32, bfloat16 and float16"
            )
        if not x.is_cuda and isinstance(place, triton.JITFunction):
            raise ValueError(
                f"{op}: {name} is on {x.device}, and this kernel runs on a GPU; elsewhere use "
                f"minicos.ops.{op}"
                " (to try the kernel on a CPU, set TRITON_INTERPRET=1 before Python starts)"
            )
        if x.device != device:
            raise ValueError(
                f"{op}: {first} is on {device} and {name} on {x.device}; move them to one device"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: the kernel has no gradient; pass {name}.detach(), or use minicos.ops.{op}"
            )


def expect(
    op: str, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Refuse a tensor of another dtype or shape, or on another device."""
    if (x.dtype, tuple(x.shape), x.device) != (dtype, tuple(shape), device):
        wanted, found = (str(d).removeprefix("torch.") for d in (dtype, x.dtype))
        raise ValueError(
            f"{op}: {name} must be {wanted} {tuple(shape)} on {device}, not {found} "
            f"{tuple(x.shape)} on {x.device}"
        )


def writable(op: str, *dtypes: torch.dtype) -> None:
    """Refuse result dtypes that no kernel writes."""
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise TypeError(f"{op}: the kernel writes float32, bfloat16 and float16, not {dtype}")


def served(op: str, x: Tensor, **modulations: Tensor | None) -> int:
    """The number of consecutive tokens of x (b l d) per timestep; refuses an x or modulations (b g
    d, float32) of other shapes.
    """
    if x.ndim != 3:
        raise ValueError(f"{op}: x must be b l d, not {tuple(x.shape)}")
    given = {name: m for name, m in modulations.items() if m is not None}
    times = ([m.shape[1] for m in given.values() if m.ndim == 3] or [1])[0]
    if x.shape[1] % max(1, times):
        raise ValueError(
            f"{op}: {x.shape[1]} tokens are not equally many for each of {times} timesteps"
        )
    for name, m in given.items():
        expect(op, name, m, torch.float32, (x.shape[0], times, x.shape[2]), x.device)
    return max(1, x.shape[1] // max(1, times))
