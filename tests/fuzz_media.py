"""Targets of `tests.fuzz`: pictures and videos."""

import io
import random
import struct
import tempfile
import zlib
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

from minicos.media import load_image, load_video
from tests.fuzz import Opened, target
from tests.fuzz_files import flipped

SIZE = (24, 16)
PICTURES = {  # format -> modes of colour
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "1"),
    "TIFF": ("RGB", "RGBA", "L", "F", "I;16", "CMYK", "1"),
    "AVIF": ("RGB", "RGBA"),
}
ANIMATED = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")
VIDEOS = {  # container -> codec, format of pixels
    "mp4": ("libx264", "yuv420p"),
    "matroska": ("libx264", "yuv420p"),
    "avi": ("mjpeg", "yuvj420p"),
    "h264": ("libx264", "yuv420p"),
    "gif": ("gif", "rgb8"),
    "mpegts": ("mpeg2video", "yuv420p"),
}
FOREIGN = (
    b"",
    b"\0" * 100,
    b"<html><body>404</body></html>",
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
    b"P6 99999 99999 255\n",
    b"P5\n4 4\n255\n",
    b"YUV4MPEG2 W4 H4 F25:1\nFRAME\n",
    b"GIF89a" + b"\xff" * 40,
)


@cache
def picture(kind: str, mode: str, frames: int) -> bytes:
    colours = np.random.default_rng(0).integers(0, 256, (frames, *SIZE, 3), dtype=np.uint8)
    grey = {"F": "F", "I;16": "I;16"}.get(mode)
    if grey:
        made = [Image.fromarray(c[..., 0].astype("f4" if mode == "F" else "u2")) for c in colours]
    else:
        made = [Image.fromarray(c).convert(mode) for c in colours]
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # rotated
    more = {"save_all": True, "append_images": made[1:]} if frames > 1 else {}
    # Pillow's encoder crashes on a rotated AVIF animation
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") or (kind == "AVIF" and frames == 1):
        more["exif"] = exif
    made[0].save(file, kind, **more)
    return file.getvalue()


@cache
def video(container: str) -> bytes:
    codec, pixels = VIDEOS[container]
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=container) as file:
            stream = file.add_stream(codec, rate=8)
            stream.height, stream.width, stream.pix_fmt = 32, 32, pixels
            for frame in frames:
                made = av.VideoFrame.from_ndarray(frame).reformat(format=pixels)
                file.mux(stream.encode(made))
            file.mux(stream.encode(None))
        return path.read_bytes()


@target("picture")
def damaged_picture(draw: random.Random, folder: Path) -> Opened:
    """A picture or an animation, damaged, with a size that is not its own, or something else."""
    kind = draw.choice(list(PICTURES))
    frames = draw.choice((1, 1, 3)) if kind in ANIMATED else 1
    content = picture(kind, draw.choice(PICTURES[kind]), frames)
    match draw.randrange(8):
        case 0:
            content = draw.choice(FOREIGN)
        case 1:
            content = content[: draw.randrange(len(content))]
        case 2:
            content = resized(draw, content)
        case 3:
            content = video(draw.choice(list(VIDEOS)))
        case 4:
            content = content + content[draw.randrange(len(content)) :] * draw.choice((1, 50))
        case _:
            content = flipped(draw, content, 0, draw.choice((40, 200, None)))
    path = folder / f"a.{draw.choice((kind.lower(), 'png', 'txt', 'm3u8', 'svg'))}"
    path.write_bytes(content)
    return lambda: load_image(path)


def resized(draw: random.Random, content: bytes) -> bytes:
    """A PNG that claims another size, with a valid checksum; other files unchanged."""
    if not content.startswith(b"\x89PNG"):
        return content
    sides = (0, 1, 23, 10_000, 65_535, 2**31 - 1, 2**32 - 1)
    header = b"IHDR" + struct.pack(">II", draw.choice(sides), draw.choice(sides)) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@target("video")
def damaged_video(draw: random.Random, folder: Path) -> Opened:
    """A video, damaged, cut off, or two of them in one file."""
    content = video(draw.choice(list(VIDEOS)))
    match draw.randrange(6):
        case 0:
            content = content[: draw.randrange(len(content))]
        case 1:
            content = content + video(draw.choice(list(VIDEOS)))
        case 2:
            content = draw.choice((*FOREIGN, picture("GIF", "P", 3), picture("PNG", "RGB", 1)))
        case _:
            content = flipped(draw, content, 0, draw.choice((100, 1000, None)))
    path = folder / draw.choice(("a.mp4", "a.h264", "a.avi", "a.txt", "a.concat"))
    path.write_bytes(content)
    return lambda: load_video(path)
