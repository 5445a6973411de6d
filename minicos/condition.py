"""What a video is conditioned on: a prompt and, for image-to-video, a first and perhaps a last
frame.

Wan receives a first frame in one of two ways.

- Channel concatenation (I2V-A14B): the network's input is [latent, mask, latent of the image
  followed by grey frames] along the channels. Wan2.1 adds CLIP features of the image for
  cross-attention.
- Imposition (TI2V-5B): the first latent frame *is* the image's latent at every step, and the
  timestep of its tokens is 0.

Sources: wan/image2video.py, wan/first_last_frame2video.py (Wan2.1) and wan/textimage2video.py. The
preset decides how an image is resized (`config.RESIZE`), since the official code and DiffSynth
differ: `frame_size` computes the size, `fit` resizes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, SupportsIndex

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minicos.config import MOST_FRAMES, RESIZE
from minicos.errors import MinicosError
from minicos.indices import MOST, numbers
from minicos.vae import VAE


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Condition:
    """Everything that stays the same from step to step, as far as the loop needs it. Subclasses add
    what the network of a model family needs; they are dataclasses with `eq=False`, like this one.
    """

    shape: tuple[int, int, int, int, int]  # b c f h w of the latents
    first: Tensor | None = None  # b c 1 h w  latent imposed on frame 0

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = [f"{k} {tuple(x.shape)}" for k, x in values.items() if isinstance(x, Tensor)]
        absent = ", ".join(k for k, x in values.items() if x is None)
        return (
            f"{type(self).__name__} for latents {tuple(self.shape)}\n"
            f"  {', '.join(given) or 'no tensors'}\n  without {absent or 'nothing'}"
        )

    def __eq__(self, other: object) -> bool:
        """Whether the two have the same content; tensors on two devices differ."""
        return type(self) is type(other) and _equal(vars(self), vars(other))

    def __hash__(self) -> int:
        return hash(tuple(self.shape))

    def impose(self, x: Tensor) -> Tensor:
        """x with its first frame replaced by the imposed one, if there is one: b c f h w."""
        return x if self.first is None else torch.cat([self.first.to(x), x[:, :, 1:]], dim=2)

    def per_frame(self, value: float, device: torch.device | None = None) -> Tensor:
        """sigma or timestep of every frame, with 0 for an imposed frame: 1 1 f 1 1 float32, or
        1 1 1 1 1 if all are equal.
        """
        if self.first is None:
            return torch.full((1, 1, 1, 1, 1), value, dtype=torch.float32, device=device)
        out = torch.full((1, 1, self.shape[2], 1, 1), value, dtype=torch.float32, device=device)
        out[:, :, 0] = 0
        return out

    def take(self, index: Tensor | Sequence[int]) -> Self:
        """The samples in `index`, in that order; samples may repeat.

        Raises:
            MinicosError: a sample is not a whole number.
            IndexError: there is no such sample.
        """
        samples, count = range(self.shape[0]), self.shape[0]
        index = torch.tensor([samples[i] for i in numbers("a sample", index)], dtype=torch.long)
        batched = {
            field.name: x[index.to(x.device)]
            for field in fields(self)
            if isinstance(x := getattr(self, field.name), Tensor) and len(x) == count
        }
        return replace(self, shape=(len(index), *self.shape[1:]), **batched)

    def __getitem__(self, index: int | slice) -> Self:
        """One sample as a batch of one, or several samples: `condition[0]`, `condition[2:]`."""
        return self.take(range(self.shape[0])[index] if isinstance(index, slice) else [index])

    def repeat(self, count: SupportsIndex) -> Self:
        """Every sample `count` times in succession, e.g. to run many seeds of one prompt.

        Raises:
            MinicosError: `count` is not a whole number above 0, or is absurd.
        """
        (times,) = numbers("a number of repetitions", [count])
        if not 1 <= times * self.shape[0] <= MOST:
            raise MinicosError(f"{self.shape[0]} samples {times} times: take 1 to {MOST} in all")
        return self.take([i for i in range(self.shape[0]) for _ in range(times)])

    def same_but_text(self, other: "Condition") -> bool:
        """Whether the two differ at most in a prompt that enters the network through
        cross-attention alone.

        False if unknown, as in this base class. Callers then run a pass for each of the two
        conditions, although one pass might serve both.
        """
        return False


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class WanCondition(Condition):
    """The condition of a Wan model; made by `Wan.condition`."""

    text: Tensor  # b t d'  rows of the prompt, zero beyond its length
    text_null: Tensor | None = None  # b t d'  rows of the negative prompt, for guidance
    y: Tensor | None = None  # b 20 f h w  mask (4) and image latent (16), concatenated behind x
    clip: Tensor | None = None  # b m d'  CLIP features of the image, or of first and last

    def branch(self, name: str) -> Tensor:
        """The text rows of "cond" or "uncond". Raises MinicosError without a negative prompt."""
        if name == "cond":
            return self.text
        if self.text_null is None:
            raise MinicosError(
                "guidance needs a negative prompt, and this condition has none: make it again "
                "under the preset that guides"
            )
        return self.text_null

    def same_but_text(self, other: Condition) -> bool:
        if not isinstance(other, WanCondition):
            return False
        return replace(self, text=other.text) == other


def _equal(x: Any, y: Any) -> bool:
    """Whether two values are equal, tables and lists of tensors included."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return (x.device, x.dtype) == (y.device, y.dtype) and torch.equal(x, y)
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        return x.keys() == y.keys() and all(_equal(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_equal, x, y))
    return x is y or x == y


def frame_size(
    image_hw: tuple[int, int],
    area: int | None,
    stride: int = 8,
    patch: int = 2,
    rule: str = "bicubic",
) -> tuple[int, int]:
    """Height and width in pixels of a video that begins with an image; both are multiples of
    stride * patch.

    With an area, the result has the image's aspect ratio and about that many pixels. It is rounded
    down (image2video.py), or for `rule` "crop" it is the pair of multiples within the area whose
    ratio is nearest (best_output_size of wan/utils/utils.py). With `area` None the image keeps its
    size, which for `rule` "pil" is rounded up (DiffSynth).

    Raises:
        MinicosError: there is no such size.
    """
    height, width = image_hw
    step = stride * patch
    if area is None and rule == "pil":
        return math.ceil(height / step) * step, math.ceil(width / step) * step
    if area is None:
        if height % step or width % step:
            good = (max(1, round(height / step)) * step, max(1, round(width / step)) * step)
            raise MinicosError(
                f"the image has {width}x{height} pixels; both sides must be multiples of {step}, "
                f"e.g. {good[1]}x{good[0]}"
            )
        return height, width
    if rule == "crop":
        size = _best_output_size(width, height, step, area)
    else:
        ratio = height / width
        high, wide = math.sqrt(area * ratio), math.sqrt(area / ratio)
        size = _whole(high, stride, patch), _whole(wide, stride, patch)
    if not all(size):
        raise MinicosError(
            f"an image of {width}x{height} pixels is too long and thin for an area of {area} pixels"
        )
    return size


def _whole(side: float, stride: int, patch: int) -> int:
    """A side in pixels, rounded down to whole patches of latents."""
    return round(side // stride // patch * patch) * stride


def _best_output_size(width: int, height: int, step: int, area: int) -> tuple[int, int]:
    """Fit a size into the area by rounding either width or height down first, and choose the better
    aspect ratio; 0, 0 if neither works.

    The order of operations is that of the official code, because its roundings matter.
    """
    ratio = width / height
    columns = (area * ratio) ** 0.5
    rows = area / columns
    wide = int(columns // step * step)
    high = int(rows // step * step)
    if not wide or not high:
        return 0, 0
    by_width = int(area / wide // step * step), wide
    by_height = high, int(area / high // step * step)
    if not by_width[0] or not by_height[1]:
        return 0, 0

    def error(size: tuple[int, int]) -> float:
        found = size[1] / size[0]
        return max(ratio / found, found / ratio)

    return by_width if error(by_width) < error(by_height) else by_height


def fit(image: Tensor, size: tuple[int, int], rule: str = "bicubic") -> Tensor:
    """Resize an image (b 3 h w) in [0, 1] to a frame (b 3 *size) in [-1, 1] on the host, by a rule
    of `config.RESIZE`.

    "pil" and "crop" work with 8 bits per colour, as the codes that they reproduce do: they round
    the input to 256 levels, and so the result.

    Raises:
        MinicosError: there is no such rule.
    """
    image = image.cpu().float()
    if rule == "bicubic":
        return resize(image * 2 - 1, *size)
    if rule == "pil":
        levels = [_pil(one, size, Image.Resampling.BICUBIC) for one in image]
    elif rule == "crop":
        h, w = image.shape[-2:]
        (height, width), (top, left) = cover((h, w), size)
        larger = [_pil(one, (height, width), Image.Resampling.LANCZOS) for one in image]
        levels = [one[:, top : top + size[0], left : left + size[1]] for one in larger]
    else:
        raise MinicosError(
            f"there is no way to resize called {rule!r}: take one of {', '.join(RESIZE)}"
        )
    return torch.stack(levels).float().div(255).sub(0.5).div(0.5)


def cover(
    image_hw: tuple[int, int], size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest size with the image's aspect ratio that covers `size`, and top and left of the
    centre crop (textimage2video.py).
    """
    scale = max(size[1] / image_hw[1], size[0] / image_hw[0])
    height, width = (round(side * scale) for side in image_hw)
    return (height, width), ((height - size[0]) // 2, (width - size[1]) // 2)


def _pil(image: Tensor, size: tuple[int, int], resampling: Image.Resampling) -> Tensor:
    """PIL's antialiased resize with 8 bits per colour: (3 h w) in [0, 1] -> uint8 (3 *size)."""
    levels = image.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    resized = Image.fromarray(levels).resize(size[::-1], resampling)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic without antialiasing or crop, as in the official code: (b 3 h w) in [-1, 1] ->
    (b 3 height width).
    """
    return F.interpolate(image, size=(height, width), mode="bicubic")


def crop_like(image: Tensor, other: Tensor) -> Tensor:
    """The largest centre crop of `image` (b 3 h w) with the aspect ratio of `other` (b 3 h' w').

    The comments of first_last_frame2video.py describe this for a last frame whose size differs
    from the first one's. The code there skips the resize and exchanges width and height, which
    distorts the picture; minicos deviates from it deliberately.
    """
    (height, width), (h, w) = image.shape[-2:], other.shape[-2:]
    rows, columns = min(height, round(width * h / w)), min(width, round(height * w / h))
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[..., top : top + max(rows, 1), left : left + max(columns, 1)]


def known_frames(shape: tuple[int, ...], last: bool = False) -> Tensor:
    """The mask channels (1 4 f h w): 1 where a video frame is known, with one channel for each of
    the four frames in a latent frame.

    The first latent frame holds only the first video frame and is known in all four channels. In
    the last one, only the last frame can be known.
    """
    mask = torch.zeros(1, 4, *shape[2:])
    mask[:, :, 0] = 1
    if last:
        mask[:, 3, -1] = 1
    return mask


def image_channels(vae: VAE, image: Tensor, frames: int, last: Tensor | None = None) -> Tensor:
    """The channels y for concatenation: first and perhaps last frame (b 3 H W) in [-1, 1] ->
    (b 20 f H/8 W/8). Unknown frames are mid-grey.

    Raises:
        MinicosError: `frames` is not 4n + 1, or is less than 5 with a last frame.
    """
    check_frames(frames, vae.cfg.stride[0])
    if last is not None and frames == 1:
        raise MinicosError("1 frame: a first and a last one need 5 or more")
    ends = [part.unsqueeze(2) for part in (image, last) if part is not None]
    grey = image.new_zeros(*image.shape[:2], frames - len(ends), *image.shape[2:])
    latent = vae.encode(torch.cat([ends[0], grey, *ends[1:]], dim=2))
    mask = known_frames(latent.shape, last is not None).to(latent)
    return torch.cat([mask.expand(len(latent), -1, -1, -1, -1), latent], dim=1)


def check_size(height: int, width: int, step: int) -> None:
    """Raise MinicosError unless both sides of a frame are multiples of `step` pixels."""
    if height % step or width % step:
        raise MinicosError(f"a size of {height}x{width}: both sides must be multiples of {step}")


def check_frames(frames: int, stride: int = 4) -> None:
    """Raise MinicosError unless frames = stride * n + 1 and at most MOST_FRAMES."""
    if not isinstance(frames, SupportsIndex):
        raise MinicosError(f"{frames!r} frames: it must be a whole number, {stride}n + 1")
    if frames < 1 or frames % stride != 1:
        below = max(1, (frames - 1) // stride * stride + 1)
        raise MinicosError(
            f"{frames} frames: the model makes {stride}n + 1 frames, e.g. {below} or "
            f"{below + stride}"
        )
    if frames > MOST_FRAMES:
        raise MinicosError(f"{frames} frames: a video has at most {MOST_FRAMES}")
