"""CLIP's image encoder, whose features condition the image-to-video networks of Wan2.1 (official
wan/modules/clip.py).

A ViT-H/14: the picture, resized to 224 x 224 pixels, is cut into 16 x 16 patches. These and a class
token pass through residual blocks of attention and feed-forward. The features are the input of the
last of its 32 blocks, so that block and all later layers are not built, although they are in the
file (`CLIP.unused`), as is CLIP's text encoder. Module and attribute names are those of the
official checkpoint.

The official code runs it in float16 (weights, matrix products, residual stream; norms in float32).
Here it runs in the dtype of its weights: `minicos.load` uses float16 if the other networks are
bfloat16, which is the default on a card, and float32 if they are float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minicos.config import CLIPConfig
from minicos.dit import LayerNorm
from minicos.ops import attention
from minicos.weights.header import read_part, tensors
from minicos.weights.load import load_into
from minicos.weights.names import layout

# Mean and deviation of the colours in CLIP's training data.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5  # of the layer norms


class Attention(nn.Module):
    """Attention between all rows of an image."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.to_qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.proj = nn.Linear(cfg.dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x), "b m (s n k) -> s b n m k", s=3, n=self.num_heads)
        return self.proj(rearrange(attention(q, k, v), "b n m k -> b m (n k)"))


class Block(nn.Module):
    """Attention and a feed-forward, each on a normed input with a residual connection."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(cfg.dim, EPS), LayerNorm(cfg.dim, EPS)
        self.attn = Attention(cfg)
        self.mlp = nn.Sequential(
            nn.Linear(cfg.dim, 4 * cfg.dim), nn.GELU(), nn.Linear(4 * cfg.dim, cfg.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """The image tower up to the input of its last block."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            3, cfg.dim, cfg.patch_size, stride=cfg.patch_size, bias=False
        )
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, cfg.dim) / cfg.dim**0.5)
        self.pos_embedding = nn.Parameter(torch.randn(1, cfg.tokens, cfg.dim) / cfg.dim**0.5)
        self.pre_norm = LayerNorm(cfg.dim, EPS)
        self.transformer = nn.Sequential(*(Block(cfg) for _ in range(cfg.num_layers - 1)))

    def forward(self, pixels: Tensor) -> Tensor:  # b 3 h w -> b m d
        """Normalised pixels (b 3 h w) -> features (b m d)."""
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        x = (
            torch.cat([self.cls_embedding.expand(len(patches), -1, -1), patches], dim=1)
            + self.pos_embedding
        )
        return self.transformer(self.pre_norm(x))


class CLIP(nn.Module):
    """The image encoder: `features = clip(image)`."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.cfg = cfg
        self.visual = VisionTransformer(cfg)

    @property
    def unused(self) -> tuple[str, ...]:
        """Prefixes of tensors that are in the file but not used."""
        last_block = f"visual.transformer.{self.cfg.num_layers - 1}."
        return "textual.", "log_scale", "visual.head", "visual.post_norm.", last_block

    def forward(self, image: Tensor) -> Tensor:
        """Features of images (b 3 H W) in [-1, 1] of any size: b m d float32. The first row belongs
        to the class token, which stands for the whole image.
        """
        weight = self.visual.patch_embedding.weight
        return self.visual(pixels(image, self.cfg.image_size).to(weight)).float()


def pixels(image: Tensor, size: int) -> Tensor:
    """Images (b 3 H W) in [-1, 1] as input of CLIP: resized bicubically to (b 3 size size), without
    antialiasing or crop, and normalised.

    Source: wan/modules/clip.py, CLIPModel.visual. diffusers scales the shorter side and crops
    instead, which gives different features.
    """
    image = F.interpolate(image.float(), size=(size, size), mode="bicubic") * 0.5 + 0.5
    mean, std = (torch.tensor(x, device=image.device).view(3, 1, 1) for x in (MEAN, STD))
    return (image - mean) / std


def load_clip(
    source: Path | Sequence[Path],
    cfg: CLIPConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> CLIP:
    """Load the encoder from an official file, or from one of transformers' `CLIPVisionModel`.
    Raises MinicosError as `load_into` does.
    """
    files = [source] if isinstance(source, Path) else list(source)
    with torch.device("meta"):
        clip = CLIP(cfg)
    foreign = layout(tensors(read_part(files, "clip"))) != "official"
    if foreign:
        _take_apart(clip)
    load_into(clip, files, part="clip", dtype=dtype, device=device, unused=clip.unused)
    if foreign:
        _put_together(clip)
    return clip


def _take_apart(clip: CLIP) -> None:
    """Give a network on the meta device the parameters of transformers' files: separate q, k and v,
    and flat embeddings.
    """
    visual: Any = clip.visual
    dim = clip.cfg.dim
    with torch.device("meta"):
        visual.cls_embedding = nn.Parameter(torch.empty(dim))
        visual.pos_embedding = nn.Parameter(torch.empty(clip.cfg.tokens, dim))
        for block in visual.transformer:
            block.attn.to_qkv = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))


def _put_together(clip: CLIP) -> None:
    """Restore the official parameters, now with weights."""

    def frozen(x: Tensor) -> nn.Parameter:
        return nn.Parameter(x, requires_grad=False)

    visual: Any = clip.visual
    dim = clip.cfg.dim
    visual.cls_embedding = frozen(visual.cls_embedding.view(1, 1, -1))
    visual.pos_embedding = frozen(visual.pos_embedding[None])
    for block in visual.transformer:
        parts = block.attn.to_qkv
        with torch.device("meta"):
            block.attn.to_qkv = nn.Linear(dim, 3 * dim)
        block.attn.to_qkv.weight = frozen(torch.cat([part.weight for part in parts]))
        block.attn.to_qkv.bias = frozen(torch.cat([part.bias for part in parts]))
