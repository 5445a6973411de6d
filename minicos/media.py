"""Images and videos on disk. Pillow reads pictures, as in the official code; PyAV does the rest.

Pixels have two forms. On disk: numpy uint8 with frames first and colours last (f h w 3), as players
and plots expect. In networks: float32 tensors with colours first (3 f h w), in [-1, 1]. `to_uint8`
and `to_float` convert between them. Videos are written frame by frame from any iterator, so a
decoder can stream to disk.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minicos.checks import check_numbers
from minicos.config import MOST_PIXELS
from minicos.errors import MinicosError, warn
from minicos.runs import replace_file

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # others may start programs
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # in tiles
JPEG = b"\xff\xd8"  # its first bytes; FFmpeg looks for them anywhere in a file
SUBFILE = 254  # tag of a TIFF: 1 for a smaller version of another picture in the file
MOST_OF_A_VIDEO = 1 << 30  # of all frames: 3 GB, e.g. 2,688 frames of 832x480
TOO_MANY = f"more than {MOST_PIXELS // 10**6} megapixels. Make it smaller first."
# Colour conversion of libswscale: bilinear (2) with accurate rounding (0x40000) and full chroma
# resolution, both ways (0x2000, 0x4000). PNG files thus keep pixels exactly.
EXACT = 0x40000 | 0x2000 | 0x4000 | 2
# Constants of FFmpeg. YUV is read by the matrix that a file names, or by BT.601 if it names none.
BT709, BT601, MATRICES = 1, 5, (1, 4, 5, 6, 7, 9)
LIMITED, FULL = 1, 2
X264 = {
    "preset": "medium",
    "x264-params": "mbtree=0",
}  # with mbtree, equal frames do not always make equal files
IMAGES = {".png": ("png", "rgb24"), ".jpg": ("mjpeg", "yuvj444p"), ".jpeg": ("mjpeg", "yuvj444p")}


Save = Callable[[Path, Callable[[Path], object]], object]  # as `runs.replace_file`
Picture = str | Path | Image.Image | np.ndarray | Tensor | Sequence["Picture"]  # see `as_image`


def to_uint8(video: Tensor) -> np.ndarray:
    """Video (3 f h w) in [-1, 1] -> uint8 (f h w 3), as in the official code: clamp, scale to 255,
    truncate.
    """
    pixels = video.detach().float().clamp(-1, 1).add(1).div(2).mul(255)
    return pixels.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def to_float(frames: np.ndarray) -> Tensor:
    """Frames uint8 (f h w 3) -> float32 video (3 f h w) in [-1, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(frames))
        .permute(3, 0, 1, 2)
        .float()
        .div(255)
        .sub(0.5)
        .div(0.5)
    )


def load_image(path: str | Path) -> Tensor:
    """Read an image file (png, jpg, webp ...), or the first frame of a video: float32 (3 h w) in
    [0, 1].

    Applies the EXIF orientation, drops transparency, with a warning, and reduces 16 bits to 8. For
    an animation the first frame is read, with a warning.

    Raises:
        MinicosError: the file is missing, damaged, not an image, or has more than `MOST_PIXELS`.
    """
    path = Path(path)
    _check_there(path, "an image")
    with _reading(str(path)):
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is lower
                with Image.open(file, formats=PICTURES) as picture:
                    return _from_pillow(picture, str(path))
        except UnidentifiedImageError:
            frame = next(_decode(path, "an image"))
            return torch.from_numpy(frame).permute(2, 0, 1).float().div(255)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what Pillow raises into MinicosError."""
    try:
        yield
    except MinicosError:
        raise
    except Image.DecompressionBombError as error:
        raise MinicosError(f"{name} has {TOO_MANY}") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ...
        if isinstance(error, OSError) and error.errno:  # not of Pillow but of the system
            raise MinicosError(
                f"{name} cannot be read: {error.strerror}. Check the path."
            ) from error
        reason = str(error) or type(error).__name__
        raise MinicosError(
            f"{name} cannot be read as an image: {reason}. Save it again, e.g. as png."
        ) from error


def as_image(picture: "Picture") -> Tensor:
    """A picture in any common form as float (3 h w), or several as (b 3 h w), in [0, 1].

    Args:
        picture: a path, a PIL image, a uint8 array (h w 3) or (b h w 3), a list of these in one
            size, or a float tensor (3 h w) or (b 3 h w), which is returned unchanged.

    Raises:
        MinicosError: `picture` is something else.
    """
    if isinstance(picture, Tensor):
        check_numbers(picture, "an image")
        return picture
    if isinstance(picture, str | Path):
        return load_image(picture)
    if isinstance(picture, Image.Image):
        with _reading("the image"):
            return _from_pillow(picture, "the image")
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    if isinstance(picture, list | tuple) and picture:
        each = [as_image(one) for one in picture]
        if len({one.shape for one in each}) > 1 or each[0].ndim != 3:
            shapes = ", ".join(str(tuple(one.shape)) for one in each)
            raise MinicosError(f"images of several prompts have one size, not {shapes}")
        return torch.stack(each)
    raise MinicosError(
        "an image is a path, a PIL image, an array uint8 (h w 3) or a tensor float (3 h w), not "
        f"{type(picture).__name__}"
    )


def _from_array(pixels: np.ndarray) -> Tensor:
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise MinicosError(
            f"an image as an array is uint8 (h w 3) or (b h w 3), not {pixels.dtype} {pixels.shape}"
        )
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3).float().div_(255)


def _from_pillow(picture: Image.Image, name: str) -> Tensor:
    """A PIL image, perhaps not decoded yet -> float32 (3 h w) in [0, 1]."""
    _check_size(picture.width, picture.height, name)
    if (count := getattr(picture, "n_frames", 1)) > 1:
        warn(f"{name} holds {count} pictures: the first is taken")
        picture.seek(0)
    if getattr(picture, "tag_v2", {}).get(SUBFILE, 0) & 1:  # of a TIFF
        raise MinicosError(
            f"{name} begins with a preview, as a camera's raw picture does. Save it as png or jpg."
        )
    if picture.mode == "F":
        raise MinicosError(f"{name} holds floating-point numbers. Save it with 8 bits per colour.")
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        grey = np.asarray(upright)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise MinicosError(
                f"{name} holds numbers from {grey.min()} to {grey.max()}, more than 16 bits of "
                "grey. Save it with 8 bits per colour."
            )
        upright = Image.fromarray((grey.astype(np.float32) / 257).round().astype(np.uint8))
    if "transparency" in upright.info or "A" in upright.getbands():
        upright = upright.convert("RGBA")
        if upright.getchannel("A").getextrema() != (255, 255):
            warn(f"{name} is transparent in places: they are taken in the colours they would have")
    return _from_array(np.asarray(upright.convert("RGB")))


def _check_there(path: Path, what: str) -> None:
    try:
        there = path.is_file()
    except OSError:  # its name is too long
        there = False
    if not there:
        remedy = f"Give the path of {what}."
        if re.match(r"\w+:/", str(path)):  # Path leaves one stroke of two
            remedy = f"Addresses are not fetched: download it, and give the path of {what}."
        raise MinicosError(f"{path} does not exist or is not a file. {remedy}")


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MOST_PIXELS:
        raise MinicosError(f"{name} has {width}x{height} pixels, {TOO_MANY}")


def load_video(path: str | Path) -> np.ndarray:
    """Read all frames of a video file: uint8 (f h w 3).

    Raises:
        MinicosError: the file is missing, damaged or empty, its frames change size, or they have
            more than `MOST_OF_A_VIDEO` pixels in total.
    """
    frames: list[np.ndarray] = []
    for frame in _decode(Path(path), "a video"):
        if frames and frame.shape != frames[0].shape:
            raise MinicosError(f"{path}: its frames change their size. Save it in one size.")
        frames.append(frame)
        if len(frames) * frame.size > 3 * MOST_OF_A_VIDEO:
            raise MinicosError(
                f"{path} has more than {MOST_OF_A_VIDEO // 10**6} megapixels in all its frames. "
                "Make it shorter or smaller first."
            )
    return np.stack(frames)


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 (h w 3) as .png (exact) or .jpg, atomically."""
    path, image = Path(path), _pixels(image, 3, path)
    if path.suffix.lower() not in IMAGES:
        raise MinicosError(
            f"{path}: images are written as {', '.join(IMAGES)}. Give the name one of these "
            "endings."
        )
    codec, pixel_format = IMAGES[path.suffix.lower()]
    encoder: Any = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width, encoder.pix_fmt = *image.shape[:2], pixel_format
    encoder.time_base = Fraction(1)
    if codec == "mjpeg":
        encoder.color_range = FULL
        encoder.qmin = encoder.qmax = 2
    frame = av.VideoFrame.from_ndarray(image).reformat(format=pixel_format, interpolation=EXACT)
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    replace_file(path, lambda temporary: temporary.write_bytes(b"".join(map(bytes, packets))))


def save_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    crf: int = 12,
    save: Save = replace_file,
) -> None:
    """Write uint8 frames as H.264 in MP4 (yuv420p, BT.709), atomically.

    Args:
        frames: an array (f h w 3), or an iterator of frames (h w 3) or chunks (f h w 3), each of
            which is encoded and then discarded. Odd sizes are padded by one repeated row or column,
            since 4:2:0 needs even sizes.
        save: writes the file, as `runs.replace_file` does.

    Raises:
        MinicosError: there is no frame, a frame has another size or type, or the disk refuses.
    """
    path = Path(path)
    if not math.isfinite(fps) or fps <= 0:
        raise MinicosError(f"{path}: a video has a finite number of frames a second, not {fps}.")
    save(path, lambda temporary: _encode(temporary, path, frames, fps, crf))


def _encode(
    temporary: Path, path: Path, frames: Iterable[np.ndarray], fps: float, crf: int
) -> None:
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream, shape = None, None
        for frame in _single(frames, path):
            if stream is None:
                shape = frame.shape
                stream = container.add_stream(
                    "libx264", rate=rate, options={"crf": str(crf), **X264}
                )
                stream.height, stream.width, stream.pix_fmt = (
                    shape[0] + shape[0] % 2,
                    shape[1] + shape[1] % 2,
                    "yuv420p",
                )
                encoder = stream.codec_context
                encoder.gop_size = 16  # so that players can seek to any second
                encoder.colorspace = encoder.color_primaries = encoder.color_trc = BT709
                encoder.color_range = LIMITED
            if frame.shape != shape:
                raise MinicosError(
                    f"{path}: a frame of {frame.shape} after frames of {shape}. Save frames of one "
                    "size."
                )
            even = np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(even)
            picture = picture.reformat(
                format="yuv420p",
                src_colorspace=BT709,
                dst_colorspace=BT709,
                dst_color_range=LIMITED,
                interpolation=EXACT,
            )
            container.mux(stream.encode(picture))
        if stream is None:
            raise MinicosError(f"{path}: there is no frame to save. Give at least one.")
        container.mux(stream.encode(None))


def _decode(path: Path, what: str) -> Iterator[np.ndarray]:
    """Frames of a file, uint8 (h w 3). FFmpeg receives the open file and may open no other, so a
    name is never taken for a URL, a pattern or a playlist.
    """
    _check_there(path, what)
    count = 0
    try:
        with path.open("rb") as file:
            kind = file.read(12)
        if kind[4:8] == b"ftyp" and kind[8:] in HEIF:
            raise MinicosError(
                f"{path} is a HEIF picture (.heic), which minicos does not read. Save it as png or "
                "jpg."
            )
        with (
            path.open("rb") as file,
            av.open(file, "r", options={"protocol_whitelist": "data"}) as container,
        ):
            if container.format.name == "mjpeg" and not kind.startswith(JPEG):
                raise MinicosError(
                    f"{path} is not {what}, though there is one in it, as in a PDF. Save that as "
                    "png or jpg."
                )
            codec = container.streams.video[0].codec_context if container.streams.video else None
            if len(container.streams.video) > 1 and what == "an image":
                warn(f"{path} holds {len(container.streams.video)} pictures: the first is taken")
            if codec is None:  # no video stream, or one of an unknown kind
                raise MinicosError(f"{path} holds no pictures. Give the path of {what}.")
            _check_size(codec.width, codec.height, str(path))
            for frame in container.decode(video=0):
                count += 1
                _check_size(frame.width, frame.height, str(path))
                matrix = frame.colorspace if frame.colorspace in MATRICES else BT601
                yield frame.to_ndarray(
                    format="rgb24",
                    src_colorspace=matrix,
                    dst_colorspace=matrix,
                    interpolation=EXACT,
                )
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, MinicosError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise MinicosError(
            f"{path} cannot be read as {what}: {reason}. Save it again, e.g. as png or mp4."
        ) from error
    if not count:
        raise MinicosError(f"{path} holds no frames. Give the path of {what}.")


def _single(frames: Iterable[np.ndarray], path: Path) -> Iterator[np.ndarray]:
    """Single frames (h w 3) from an iterator of frames and chunks of frames."""
    for piece in frames:
        if np.ndim(piece) == 4:
            yield from (_pixels(frame, 3, path) for frame in piece)
        else:
            yield _pixels(piece, 3, path)


def _pixels(array: np.ndarray, dims: int, path: Path) -> np.ndarray:
    """The array, contiguous, if it is a non-empty uint8 (h w 3)."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or not array.size:
        raise MinicosError(
            f"{path}: pixels are uint8 (h w 3), not {array.dtype} {array.shape}. Convert with "
            "to_uint8."
        )
    return np.ascontiguousarray(array)
