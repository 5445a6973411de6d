"""Frames cut into overlapping tiles, so that the VAE can process large videos in little memory.

Tiles are cut in space but not in time: every tile streams through the clip chunk by chunk, with its
own memory (`vae.Stream`). Neighbouring tiles share a quarter of a tile and are blended across it,
so no seam is visible. The network processes each tile as a separate frame: the attention of the
middle block sees one tile only, so the result is close to that of whole frames, but not equal.

The stream memory of a float32 decoder takes 8.7 GB at 1280x720 (Wan2.1_VAE; 6.4 GB at 1280x704
with Wan2.2_VAE), and that of one tile of 256 pixels 0.6 GB (0.5 GB). Activations shrink in the same
proportion.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from minicos.errors import MinicosError

Span = tuple[int, int]  # first position, and the one after the last


class Tiles:
    """One pass of a clip through the encoder or the decoder, in tiles. A frame that fits into one
    tile is not cut, and its result is bitwise that of whole frames.

    While a tile waits for its next chunk, its memory is kept on the host, so the device holds the
    memory of one tile at a time. This costs a copy in each direction for every tile and chunk;
    longer chunks need fewer.
    """

    def __init__(self, size: tuple[int, int], side: int | None, stride: int):
        """
        Args:
            size: height and width of the latents.
            side: side of the square tiles in pixels; None: no tiles.
            stride: pixels per latent.

        Raises:
            MinicosError: `side` is not a multiple of the stride, or less than two strides.
        """
        check_side(side, stride)
        self.size = size
        sides = [length if side is None else side // stride for length in size]
        self.overlap = max(1, min(sides) // 4)
        axes = [spans(length, s, self.overlap) for length, s in zip(size, sides, strict=True)]
        rows, columns = axes  # in latents
        self.windows: list[tuple[Span, Span]] = list(product(rows, columns))
        self.memories: list[dict[nn.Module, Tensor]] = [{} for _ in self.windows]

    def __call__(self, layer: Callable, x: Tensor, before: int = 1, after: int = 1) -> Tensor:
        """layer(x, memory) for the next chunk x (b c f h w); `before` and `after` are positions per
        latent in x and in the result.
        """
        if len(self.windows) == 1:
            return layer(x, self.memories[0])
        total = cover = x.new_zeros(())
        for (rows, columns), memory in zip(self.windows, self.memories, strict=True):
            move(memory, x.device)
            out = layer(x[..., place(rows, before), place(columns, before)], memory)
            move(memory, "cpu")
            if not total.ndim:
                total = out.new_zeros(*out.shape[:3], *(after * length for length in self.size))
                cover = torch.zeros_like(total[0, 0, 0])
            down, across = (
                fade(*axis, self.overlap, after)
                for axis in zip((rows, columns), self.size, strict=True)
            )
            weight = torch.outer(down, across).to(out)
            here = (..., place(rows, after), place(columns, after))
            total[here] += weight * out
            cover[here] += weight
        return total / cover


def check_side(side: int | None, stride: int) -> None:
    """Raise MinicosError unless tiles can have this side: a multiple of the stride, at least two
    strides. None: no tiles.
    """
    if side is not None and (side % stride or side < 2 * stride):
        raise MinicosError(
            f"tiles of {side} pixels: take a multiple of {stride}, {2 * stride} or more, e.g. 512"
        )


def spans(length: int, side: int, overlap: int) -> list[Span]:
    """Evenly spread spans of `side` positions in 0..length; neighbours share at least `overlap`."""
    if length <= side:
        return [(0, length)]
    steps = math.ceil((length - side) / (side - overlap))
    starts = [round(i * (length - side) / steps) for i in range(steps + 1)]
    return [(start, start + side) for start in starts]


def fade(span: Span, length: int, overlap: int, factor: int) -> Tensor:
    """Blending weights of a span, `factor` for each position: 1, falling linearly over `overlap`
    positions next to another span.
    """
    start, end = span
    rise = (torch.arange(factor * (end - start)) + 0.5) / (factor * overlap)
    weight = torch.ones_like(rise)
    if start > 0:
        weight = torch.minimum(weight, rise)
    if end < length:
        weight = torch.minimum(weight, rise.flip(0))
    return weight


def place(span: Span, factor: int) -> slice:
    return slice(factor * span[0], factor * span[1])


def move(memory: dict[nn.Module, Tensor], device: torch.device | str) -> None:
    for layer, past in memory.items():
        memory[layer] = past.to(device)
