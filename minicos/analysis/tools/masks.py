"""Pixel masks on a coarser grid: that of the latent, or that of the network's tokens."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def on_grid(mask: np.ndarray, grid: tuple[int, int, int]) -> Tensor:
    """A mask of pixels, bool (F H W) or of one picture (H W), on a grid f h w: true if any pixel of
    the cell is true.

    Video frame 0 is grid frame 0, and the other frames are divided evenly, as in the VAE.
    """
    f, h, w = grid
    pixels = torch.from_numpy(np.ascontiguousarray(mask))
    if pixels.ndim == 2:
        pixels = pixels.expand(f, -1, -1)
    cells = F.adaptive_max_pool2d(pixels[:, None].float(), (h, w))[:, 0] > 0
    stride = (len(cells) - 1) // max(1, f - 1)
    later = [cells[1 + stride * i : 1 + stride * (i + 1)].any(0) for i in range(f - 1)]
    return torch.stack([cells[0], *later])
