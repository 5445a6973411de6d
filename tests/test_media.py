"""Pixels on disk and in the network: exact where the format is, close where it is not, and clear about bad files."""

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minicos.errors import MinicosError
from minicos.media import load_image, load_video, save_image, save_video, to_float, to_uint8

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
