"""From a sample's size and length to sizes that a model supports, and back, without distortion or
letterboxing.

A model makes sides that are multiples of its step (16 pixels for Wan) and 4n + 1 frames; samples
have any size (594 x 397) and length (58 frames). A picture is scaled by one factor until it covers
the nearest supported size, and the few overhanging rows or columns are cropped. The model's video
is scaled back by the same factor and drawn over the sample's first frame, which fills the cropped
part. The number of frames is rounded up to 4n + 1, as in the benchmark's own inference, and reduced
again by taking the nearest frames, including first and last.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from minicos.errors import MinicosError

MOST_CUT = 0.2  # of a picture; the most for 4,000 random sizes of 100 to 1,100 pixels is .061
SMALLEST = 0.5  # of the wanted area: the smallest size that may be chosen for its aspect ratio


@dataclass(frozen=True)
class Fit:
    """The conversion between pictures of size `given` and videos of size `made`, (height, width)
    each.
    """

    given: tuple[int, int]
    made: tuple[int, int]

    @property
    def scale(self) -> float:
        """Made pixels per given pixel, the same along both sides."""
        return max(m / g for m, g in zip(self.made, self.given, strict=True))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The part of the given picture that the model sees: top, left, bottom, right in its
        pixels.
        """
        spans = []
        for given, made in zip(self.given, self.made, strict=True):
            length = min(given, round(made / self.scale))
            begin = (given - length) // 2
            spans.append((begin, begin + length))
        (top, bottom), (left, right) = spans
        return top, left, bottom, right

    @property
    def cut(self) -> float:
        """The share of the picture that the model does not see."""
        top, left, bottom, right = self.box
        return 1 - (bottom - top) * (right - left) / math.prod(self.given)

    def forward(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 (f *given 3), or one (*given 3), in the size that the model makes."""
        top, left, bottom, right = self.box
        return resize(frames[..., top:bottom, left:right, :], self.made)

    def back(self, frames: np.ndarray, picture: np.ndarray) -> np.ndarray:
        """A model's frames uint8 (f *made 3) in the sample's size, drawn over its first frame uint8
        (*given 3).
        """
        top, left, bottom, right = self.box
        out = np.repeat(picture[None], len(frames), axis=0)
        out[:, top:bottom, left:right] = resize(frames, (bottom - top, right - left))
        return out


def fit(given: tuple[int, int], step: int = 16, area: int | None = None) -> Fit:
    """The size that a model makes for a picture of size `given` (height, width).

    Among the sizes from half of the area upwards, chooses the one that loses least of the picture,
    with a penalty of a tenth of a point per 1 % that it is smaller (or larger).

    Args:
        step: both sides are multiples of it.
        area: most pixels; None: about the picture's own size.

    Raises:
        MinicosError: the picture is too long and thin.
    """
    height, width = given
    most = area or math.ceil(1.05 * height * width)
    wanted = min(height * width, area or height * width)
    best, least = None, math.inf
    for columns in range(step, most // step + 1, step):
        ideal = columns * height / width
        for rows in {math.floor(ideal / step) * step, math.ceil(ideal / step) * step}:
            if rows < step or not SMALLEST * wanted <= rows * columns <= most:
                continue
            one = Fit(given, (rows, columns))
            overhang = 1 - rows * columns / (one.scale**2 * height * width)
            loss = overhang + 0.1 * abs(math.log(rows * columns / wanted))
            if loss < least:
                best, least = one, loss
    if best is None or best.cut > MOST_CUT:
        raise MinicosError(
            f"a picture of {width}x{height} pixels cannot be brought to multiples of {step} within "
            f"{most} pixels"
            " without losing much of it. Give it another shape, or allow more with --area."
        )
    return best


def made_frames(given: int, stride: int = 4, most: int | None = None) -> int:
    """The number of frames that a model makes for a clip of `given` frames: the next stride * n +
    1, limited to `most` (which must have that form).
    """
    frames = math.ceil((given - 1) / stride) * stride + 1
    return frames if most is None else min(frames, most)


def in_time(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` evenly spaced frames of a video (f h w 3), the nearest ones, with first and last."""
    if len(frames) == count:
        return frames
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 (f h w 3), or one (h w 3), as (... *size 3): Lanczos to shrink, bicubic to
    enlarge. For a whole factor, pixels are repeated, or averaged in blocks, which are exact
    inverses.
    """
    if frames.ndim == 3:
        return resize(frames[None], size)[0]
    height, width = frames.shape[1:3]
    if (height, width) == tuple(size):
        return frames
    if size[0] < height:
        whole = height % size[0] == 0 and width * size[0] == height * size[1]
        way = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
    else:
        whole = size[0] % height == 0 and width * size[0] == height * size[1]
        way = Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC
    pictures = (Image.fromarray(frame).resize(size[::-1], way) for frame in frames)
    return np.stack([np.asarray(picture) for picture in pictures])
