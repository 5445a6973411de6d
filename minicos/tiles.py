"""Frames cut into overlapping tiles, so that a large video passes through the VAE within little
memory.

Cut in space and never in time: every tile streams through the clip, chunk by chunk, with a memory
of its own (`vae.Stream`). Neighbours share a quarter of a tile and fade into one another across it,
so no seam is seen. To the network each tile is a frame of its own: attention of the middle block
sees one tile only, so the result is close to that of whole frames, not equal.

What it is for: the memory of a decoder takes 8.7 GB at 1280x720 (Wan2.1_VAE; 6.4 GB at 1280x704
with Wan2.2_VAE) in float32, that of one tile of 256 pixels 0.6 GB (0.5 GB), and activations shrink
alike.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from minicos.errors import MinicosError

Span = tuple[int, int]  # first place, and the one after the last


class Tiles:
    """One pass of a clip through the encoder or the decoder, in tiles. A frame that fits into one
    tile is not cut, bit for bit.

    While a tile waits for its next chunk, its memory lies on the host: the device holds that of one
    tile, and one chunk. That costs a copy there and back for every tile and chunk, fewer with
    longer chunks.
    """

    def __init__(self, size: tuple[int, int], side: int | None, stride: int):
        """
        size    height and width of the latents
        side    of the square tiles, in pixels; None cuts nothing. MinicosError unless it is a
                multiple of the stride, two or more
        stride  pixels per latent
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
        """layer(x, memory) for the next chunk x (b c f h w); `before` and `after` are places per
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
    """Raise MinicosError unless tiles can have this side: a multiple of the stride, two or more.
    None: no tiles.
    """
    if side is not None and (side % stride or side < 2 * stride):
        raise MinicosError(
            f"tiles of {side} pixels: take a multiple of {stride}, {2 * stride} or more, e.g. 512"
        )


def spans(length: int, side: int, overlap: int) -> list[Span]:
    """Spans of `side` places, evenly spread over 0..length, of which neighbours share `overlap`
    or more.
    """
    if length <= side:
        return [(0, length)]
    steps = math.ceil((length - side) / (side - overlap))
    starts = [round(i * (length - side) / steps) for i in range(steps + 1)]
    return [(start, start + side) for start in starts]


def fade(span: Span, length: int, overlap: int, factor: int) -> Tensor:
    """Weights of a span, `factor` for each place: 1, falling linearly over `overlap` places
    where it borders on another span.
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
