"""Images and videos on disk, through PyAV alone.

Two forms of pixels are used in minicos. On disk side: numpy uint8, frames first and colours last (f h w 3), as every
player and plot wants them. On the network's side: float32 tensors, colours first (3 f h w), in [-1, 1]. `to_uint8` and
`to_float` are the bridge. Videos are written frame by frame from any iterator, so a decoder can stream to disk.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from minicos.errors import MinicosError
from minicos.runs import replace_file

# How libswscale converts colours: bilinear (2) with accurate rounding (0x40000) and full chroma resolution, both ways
# (0x2000, 0x4000). So a PNG reads exactly, and a JPEG within 3 levels of what libjpeg makes of it.
EXACT = 0x40000 | 0x2000 | 0x4000 | 2
# Numbers of FFmpeg's enumerations. YUV is read by the matrix that a file names, and by BT.601 where it names none.
BT709, BT601, MATRICES = 1, 5, (1, 4, 5, 6, 7, 9)
LIMITED, FULL = 1, 2
X264 = {
    "preset": "medium",
    "x264-params": "mbtree=0",
}  # with mbtree, equal frames do not always make equal files
IMAGES = {".png": ("png", "rgb24"), ".jpg": ("mjpeg", "yuvj444p"), ".jpeg": ("mjpeg", "yuvj444p")}


def to_uint8(video: Tensor) -> np.ndarray:
    """Video (3 f h w) in [-1, 1] -> uint8 (f h w 3), as the official code does: clamp, scale to 255, drop the fraction."""
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
    """Image file (png, jpg, webp ...) -> float32 (3 h w) in [0, 1]; transparency is dropped.

    Raises MinicosError where the file is missing or is not an image.
    """
    frame = next(_decode(Path(path), "an image"))
    return torch.from_numpy(frame).permute(2, 0, 1).float().div(255)


def load_video(path: str | Path) -> np.ndarray:
    """Video file -> all frames, uint8 (f h w 3). Raises MinicosError where it is missing, damaged or empty."""
    return np.stack(list(_decode(Path(path), "a video")))


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 (h w 3) as .png (exact) or .jpg, in one step."""
    path, image = Path(path), _pixels(image, 3, path)
    if path.suffix.lower() not in IMAGES:
        raise MinicosError(
            f"{path}: images are written as {', '.join(IMAGES)}. Give the name one of these endings."
        )
    codec, pixel_format = IMAGES[path.suffix.lower()]
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width, encoder.pix_fmt = *image.shape[:2], pixel_format
    encoder.time_base = Fraction(1)
    if codec == "mjpeg":
        encoder.color_range = FULL
        encoder.qmin = encoder.qmax = 2
    frame = av.VideoFrame.from_ndarray(image).reformat(format=pixel_format, interpolation=EXACT)
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    replace_file(path, lambda temporary: temporary.write_bytes(b"".join(map(bytes, packets))))


def save_video(
    path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float, crf: int = 12
) -> None:
    """Write uint8 frames as H.264 in MP4 (yuv420p, BT.709), in one step.

    `frames` is (f h w 3), or an iterator of frames (h w 3) or chunks (f h w 3): each is encoded and forgotten. Odd sizes
    grow by one repeated row or column, since 4:2:0 needs even ones. Raises MinicosError where there is no frame, a frame
    has another size or type, or the disk refuses.
    """
    path = Path(path)
    replace_file(path, lambda temporary: _encode(temporary, path, frames, fps, crf))


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
                encoder.gop_size = 16  # a player can jump to any second
                encoder.colorspace = encoder.color_primaries = encoder.color_trc = BT709
                encoder.color_range = LIMITED
            if frame.shape != shape:
                raise MinicosError(
                    f"{path}: a frame of {frame.shape} after frames of {shape}. Save frames of one size."
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
    """Frames of a file, uint8 (h w 3). The file is handed over open and may open no other: no name is a URL, a pattern or a playlist."""
    if not path.is_file():
        raise MinicosError(f"{path} does not exist or is not a file. Give the path of {what}.")
    count = 0
    try:
        with (
            path.open("rb") as file,
            av.open(file, options={"protocol_whitelist": "data"}) as container,
        ):
            if not container.streams.video:
                raise MinicosError(f"{path} holds no pictures. Give the path of {what}.")
            for frame in container.decode(video=0):
                count += 1
                matrix = frame.colorspace if frame.colorspace in MATRICES else BT601
                yield frame.to_ndarray(
                    format="rgb24",
                    src_colorspace=matrix,
                    dst_colorspace=matrix,
                    interpolation=EXACT,
                )
    except (av.FFmpegError, OSError) as error:
        raise MinicosError(
            f"{path} cannot be read as {what}: {error.strerror or error}. Save it again, e.g. as png or mp4."
        ) from error
    if not count:
        raise MinicosError(f"{path} holds no frames. Give the path of {what}.")


def _single(frames: Iterable[np.ndarray], path: Path) -> Iterator[np.ndarray]:
    """Single frames (h w 3) from frames and chunks of frames."""
    for piece in frames:
        if np.ndim(piece) == 4:
            yield from (_pixels(frame, 3, path) for frame in piece)
        else:
            yield _pixels(piece, 3, path)


def _pixels(array: np.ndarray, dims: int, path: Path) -> np.ndarray:
    """The array, contiguous, where it is uint8 (h w 3) and not empty."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or not array.size:
        raise MinicosError(
            f"{path}: pixels are uint8 (h w 3), not {array.dtype} {array.shape}. Convert with to_uint8."
        )
    return np.ascontiguousarray(array)
