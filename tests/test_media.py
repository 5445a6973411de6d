"""Pixels on disk and in the network: exact where the format is, close where it is not, and clear
about bad files.
"""

import zlib

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from minicos.errors import MinicosError
from minicos.media import (
    as_image,
    load_image,
    load_video,
    save_image,
    save_video,
    to_float,
    to_uint8,
)

Y, X = np.mgrid[:48, :64]
SMOOTH = np.stack([X * 3, Y * 4, X + Y], -1).astype(np.uint8)  # h w 3
COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (255, 255, 0),
    (128, 64, 200),
]


def flat(height: int, width: int) -> np.ndarray:
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in COLOURS])


def levels(a, b) -> int:
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def image(path) -> np.ndarray:
    return load_image(path).mul(255).round().byte().permute(1, 2, 0).numpy()


@given(pixels=hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_png_is_exact(tmp_path, pixels):
    path = tmp_path / "50%d [1]:x.png"  # FFmpeg would read some of this as a pattern
    save_image(path, pixels)
    read = load_image(path)
    assert read.dtype == torch.float32
    assert torch.equal(read, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def test_jpeg_is_close_and_upper_case_endings_work(tmp_path):
    save_image(tmp_path / "a.JPG", SMOOTH)
    assert levels(image(tmp_path / "a.JPG"), SMOOTH) <= 6


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_images_read_as_pillow_reads_them(tmp_path, mode):
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(SMOOTH).convert(mode).save(tmp_path / "a.png")
    assert levels(image(tmp_path / "a.png"), pillow.open(tmp_path / "a.png").convert("RGB")) == 0


@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpegs_read_nearly_as_pillow_reads_them(tmp_path, subsampling):
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(SMOOTH).save(tmp_path / "a.jpg", quality=95, subsampling=subsampling)
    assert levels(image(tmp_path / "a.jpg"), pillow.open(tmp_path / "a.jpg")) <= 4


def test_video_keeps_colours_and_grows_odd_sizes_by_repetition(tmp_path):
    save_video(tmp_path / "v.mp4", flat(33, 49), fps=16)
    read = load_video(tmp_path / "v.mp4")
    assert read.shape == (len(COLOURS), 34, 50, 3)
    assert read.dtype == np.uint8
    assert levels(read, flat(34, 50)) <= 2


def test_videos_without_a_named_matrix_are_read_as_bt601(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in flat(32, 48):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(frame).reformat(format="yuv420p", dst_colorspace=5)
                )
            )
        container.mux(stream.encode(None))
    assert levels(load_video(tmp_path / "v.mp4"), flat(32, 48)) <= 2


@pytest.mark.parametrize(
    "pieces",
    [lambda v: v, iter, lambda v: iter([v[:1], v[1:5], v[5:]])],
    ids=["array", "frames", "chunks"],
)
def test_video_from_frames_or_chunks(tmp_path, pieces):
    video = np.stack(
        [np.clip(SMOOTH.astype(int) + 4 * i, 0, 255).astype(np.uint8) for i in range(9)]
    )
    save_video(tmp_path / "v.mp4", pieces(video), fps=16)
    read = load_video(tmp_path / "v.mp4")
    assert read.shape == video.shape
    assert np.abs(read.astype(int) - video).mean() < 2
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert (
            stream.codec_context.name,
            stream.codec_context.pix_fmt,
            float(stream.average_rate),
        ) == ("h264", "yuv420p", 16)


def test_a_video_whose_frames_fail_leaves_nothing(tmp_path):
    def frames():
        yield SMOOTH
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        save_video(tmp_path / "v.mp4", frames(), fps=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "no frame"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no frame"),
        (np.zeros((2, 4, 4, 3)), "uint8"),
        (np.zeros((2, 4, 4, 1), np.uint8), "uint8"),
        (np.zeros((2, 4, 0, 3), np.uint8), "uint8"),
        ([SMOOTH, SMOOTH[:24]], "one size"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, frames, says):
    with pytest.raises(MinicosError, match=says) as error:
        save_video(tmp_path / "v.mp4", frames, fps=16)
    assert "v.mp4" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_image_is_refused(tmp_path):
    for name, pixels in (
        ("a.png", SMOOTH / 255),
        ("a.png", SMOOTH[..., :1]),
        ("a.tiff", SMOOTH),
        ("a", SMOOTH),
    ):
        with pytest.raises(MinicosError, match=name):
            save_image(tmp_path / name, pixels)


PLAYLIST = (
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
)


@pytest.mark.parametrize(
    "content", [None, b"", b"hello", "png", "mp4", PLAYLIST, b"ffconcat version 1.0\nfile v.mp4\n"]
)
@pytest.mark.parametrize("load", [load_image, load_video])
def test_bad_files_are_named(tmp_path, monkeypatch, load, content):
    save_image(tmp_path / "a.png", SMOOTH)
    save_video(tmp_path / "v.mp4", flat(32, 48), fps=16)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad"
    if content in ("png", "mp4"):
        whole = (tmp_path / {"png": "a.png", "mp4": "v.mp4"}[content]).read_bytes()
        path.write_bytes(whole[: len(whole) * 3 // 5])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(MinicosError, match="bad"):
        load(path)
    with pytest.raises(MinicosError, match="does not exist"):
        load("http://127.0.0.1:9/a.png")


def test_sound_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(MinicosError, match="no pictures"):
        load_video(tmp_path / "a.wav")


def test_to_uint8_is_the_official_rule():
    """wan/utils/utils.py: clamp to [-1, 1], to [0, 1], times 255, fraction dropped."""
    video = (
        torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, -1).expand(3, 2, 4, -1)
    )
    assert to_uint8(video).shape == (2, 4, 7, 3)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 63, 127, 254, 255, 255]
    assert to_uint8(video.bfloat16()).dtype == np.uint8


def test_to_float_and_back_loses_one_level_at_most():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    video = to_float(frames)
    assert (video.shape, video.dtype) == ((3, 1, 16, 16), torch.float32)
    assert (video.min(), video.max()) == (-1, 1)
    assert levels(to_uint8(video), frames) <= 1


# -- pictures from cameras, browsers and notebooks -------------------------------------------------


def test_photos_are_turned_upright(tmp_path):
    """EXIF orientation 6: the camera was held upright, and the picture is to be turned
    clockwise.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(SMOOTH).save(tmp_path / name, exif=exif, quality=95, lossless=True)
        assert image(tmp_path / name).shape == (64, 48, 3)
        assert levels(image(tmp_path / name), np.rot90(SMOOTH, -1)) <= 4


@pytest.mark.parametrize("ending", ["webp", "gif", "png"])
def test_of_an_animation_the_first_frame_is_taken_and_said(tmp_path, ending):
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 255, 128)]
    path = tmp_path / f"a.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    with pytest.warns(UserWarning, match=rf"a\.{ending} holds 3 pictures"):
        assert levels(image(path), 0) == 0


def test_sixteen_bits_become_eight(tmp_path):
    grey = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert levels(image(tmp_path / "a.png")[..., 0], np.round(grey / 257)) <= 1
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(MinicosError, match=r"a\.tiff holds floating-point"):
        load_image(tmp_path / "a.tiff")


def test_pictures_beyond_a_size_are_refused_before_they_are_decoded(tmp_path):
    for side in (12_000, 20_000):  # beyond the second, Pillow itself refuses to open
        save_image(tmp_path / "bomb.png", SMOOTH)
        data = (tmp_path / "bomb.png").read_bytes()
        head = b"IHDR" + side.to_bytes(4) * 2 + data[24:29]
        png = data[:12] + head + zlib.crc32(head).to_bytes(4) + data[33:]
        (tmp_path / "bomb.png").write_bytes(png)
        with pytest.raises(MinicosError, match=r"bomb\.png has .*more than 134 megapixels"):
            load_image(tmp_path / "bomb.png")


def test_a_video_whose_frames_change_their_size_is_refused(tmp_path):
    pieces = []
    for size in ((32, 48), (48, 32)):
        with av.open(str(tmp_path / "one.h264"), "w", format="h264") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for frame in flat(*size):
                container.mux(
                    stream.encode(av.VideoFrame.from_ndarray(frame).reformat(format="yuv420p"))
                )
            container.mux(stream.encode(None))
        pieces.append((tmp_path / "one.h264").read_bytes())
    (tmp_path / "two.h264").write_bytes(b"".join(pieces))
    with pytest.raises(MinicosError, match=r"two\.h264.*change their size"):
        load_video(tmp_path / "two.h264")


def test_a_picture_in_any_form(tmp_path):
    save_image(tmp_path / "a.png", SMOOTH)
    want = load_image(tmp_path / "a.png")
    for form in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        SMOOTH,
        Image.fromarray(SMOOTH),
        want,
    ):
        assert torch.equal(as_image(form), want)
    for form in ([SMOOTH, tmp_path / "a.png"], np.stack([SMOOTH] * 2)):
        assert torch.equal(as_image(form), torch.stack([want] * 2))
    for form in (3, None, [], [SMOOTH, SMOOTH[1:]], SMOOTH / 255, SMOOTH[..., 0], b"png"):
        with pytest.raises(MinicosError, match="image"):
            as_image(form)


HARM = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "drop", "insert")), st.floats(0, 1), st.integers(0, 255)
    ),
    min_size=1,
    max_size=6,
)
FORMATS = ("png", "jpg", "webp", "gif", "bmp", "tiff")


def harmed(data: bytes, harm: list[tuple[str, float, int]]) -> bytes:
    """A file with bytes changed, cut off, left out or put in."""
    for what, where, value in harm:
        at = int(where * (len(data) - 1)) if data else 0
        data = {
            "flip": data[:at] + bytes([value]) + data[at + 1 :],
            "cut": data[: at + 1],
            "drop": data[:at] + data[at + 1 + value :],
            "insert": data[:at] + bytes([value]) * (value + 1) + data[at:],
        }[what]
    return data


@given(form=st.sampled_from(FORMATS), harm=HARM)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_open_or_are_refused(tmp_path, form, harm):
    whole = tmp_path / f"whole.{form}"
    if not whole.exists():
        Image.fromarray(SMOOTH).save(whole)
    (tmp_path / "harmed").write_bytes(harmed(whole.read_bytes(), harm))
    try:
        picture = load_image(tmp_path / "harmed")
    except MinicosError as error:
        assert "harmed" in str(error)
    else:
        assert picture.shape[0] == 3


def test_pictures_of_a_phone(tmp_path):
    """An iPhone's HEIF holds tiles, the first of which is not the picture; its JPEG, a second
    picture that is no animation.
    """
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(MinicosError, match=r"a\.heic is a HEIF picture.* Save it as png"):
        load_image(tmp_path / "a.heic")
    picture = Image.new("RGB", (32, 24), (200, 10, 10))
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture])
    picture.save(tmp_path / "a.ico")
    for name, count in (("a.jpg", 2), ("a.ico", 2)):
        with pytest.warns(UserWarning, match=f"{name} holds {count} pictures: the first is taken"):
            load_image(tmp_path / name)


def test_a_picture_that_the_system_does_not_give(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.png"))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(MinicosError, match=r"a\.png cannot be read: Permission denied\. Check"):
        load_image(tmp_path / "a.png")


def test_pictures_that_would_be_taken_for_something_else(tmp_path):
    picture = Image.fromarray(SMOOTH)
    picture.save(tmp_path / "a.pdf")  # with a JPEG in it
    with pytest.raises(MinicosError, match=r"a\.pdf is not an image, though there is one in it"):
        load_image(tmp_path / "a.pdf")
    picture.save(tmp_path / "raw.tiff", tiffinfo={254: 1})  # as cameras mark their previews
    with pytest.raises(MinicosError, match=r"raw\.tiff begins with a preview"):
        load_image(tmp_path / "raw.tiff")
    Image.fromarray(X.astype(np.int32) * 2000).save(tmp_path / "wide.tiff")
    with pytest.raises(MinicosError, match=r"wide\.tiff holds numbers from 0 to 126000"):
        load_image(tmp_path / "wide.tiff")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_told(tmp_path, mode):
    picture = Image.fromarray(SMOOTH).convert(mode)
    opaque, clear = ({"transparency": bytes([a] * 256)} if mode == "P" else {} for a in (255, 0))
    picture.save(tmp_path / "a.png", **opaque)
    whole = load_image(tmp_path / "a.png")
    if mode != "P":
        picture.putalpha(0)
    picture.save(tmp_path / "a.png", **clear)
    with pytest.warns(UserWarning, match=r"a\.png is transparent in places"):
        assert torch.equal(load_image(tmp_path / "a.png"), whole)
