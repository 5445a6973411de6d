"""Sizes and lengths there and back, and the tree that the scorer takes."""

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicos.errors import MinicosError
from minicos.media import load_video
from minicos.vbvr import cases, tree
from minicos.vbvr.fit import Fit, fit, in_time, made_frames, resize
from tests.vbvr_samples import bench, clip, sample

SIDES = st.integers(100, 1100)


@given(height=SIDES, width=SIDES, area=st.none() | st.integers(20_000, 400_000))
@settings(max_examples=60, deadline=None)
def test_nothing_is_squashed_and_little_is_cut(height, width, area):
    if max(height, width) > 3 * min(height, width):
        return
    one = fit((height, width), 16, area)
    assert not one.made[0] % 16 and not one.made[1] % 16
    assert one.made[0] * one.made[1] <= (area or 1.05 * height * width + 1)
    top, left, bottom, right = one.box
    scales = one.made[0] / (bottom - top), one.made[1] / (right - left)
    assert max(scales) / min(scales) < 1 + 1.1 / min(bottom - top, right - left)
    assert 0 <= one.cut < 0.1  # .061 is the worst of 4,000 random sizes


@pytest.mark.parametrize(
    ("given", "made"),
    [((1024, 1024), (1024, 1024)), ((400, 400), (400, 400)), ((397, 594), (384, 576))],
)
def test_sizes_of_the_benchmark(given, made):
    assert fit(given).made == made
    assert fit(given).cut < 0.01


def test_a_picture_too_thin():
    with pytest.raises(MinicosError, match="--area"):
        fit((20, 5000), 16, 4096)


def test_back_undoes_forward_and_fills_what_was_cut():
    picture, one = clip(1, 100, 171)[0], fit((100, 171))
    assert one.cut > 0
    back = one.back(one.forward(picture)[None], picture)[0]
    assert back.shape == picture.shape
    assert np.abs(back.astype(int) - picture).mean() < 1.5  # .09 measured
    top, _, _, right = one.box
    assert (back[:top] == picture[:top]).all() and (back[:, right:] == picture[:, right:]).all()


def test_whole_factors_repeat_pixels_exactly():
    small = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), dtype=np.uint8)
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    assert (resize(small, (64, 128)) == large).all() and (resize(large, (16, 32)) == small).all()
    assert Fit((64, 128), (16, 32)).cut == 0


@given(count=st.integers(1, 200), stride=st.sampled_from([4, 8]))
def test_lengths(count, stride):
    made = made_frames(count, stride)
    assert made % stride == 1 and count <= made < count + stride
    back = in_time(np.arange(made)[:, None, None, None], count).ravel()
    assert back[0] == 0 and (count == 1 or back[-1] == made - 1)
    assert (np.diff(back) >= 1).all()
    assert made_frames(count, stride, stride + 1) <= stride + 1


def test_the_tree_and_its_videos(tmp_path):
    found = cases.read(bench(tmp_path / "data", 1))
    out = tmp_path / "out"
    for one in found.samples:
        tree.write_truth(tree.folder(out, "truth"), one)
        tree.write_static(tree.folder(out, "static"), one)
    name = found.samples[0].name
    file = out / "truth" / f"{name}.mp4"
    assert sorted(
        p.relative_to(out / "truth").as_posix() for p in (out / "truth").rglob("*.mp4")
    ) == [f"{one.name}.mp4" for one in found.samples]
    with av.open(str(file)) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        keys = [i for i, frame in enumerate(video.decode(video=0)) if frame.key_frame]
    assert keys[0] == 0 and max(np.diff([*keys, 9])) <= 16
    written, truth = load_video(file), clip(9, 48, 64)
    assert written.shape == truth.shape
    noise = np.square(written.astype(float) - truth).mean(axis=(1, 2, 3))
    assert (
        10 * np.log10(255**2 / noise) > 26
    ).all()  # 27.7 dB, for colour edges at half resolution
    static = load_video(tree.path(out / "static", name)).astype(int)
    assert len(static) == 9 and np.abs(static - truth[0]).mean() < 3  # 1.4 levels measured


def test_odd_sizes_and_other_sizes_of_the_true_video(tmp_path):
    sample(tmp_path / "data" / "x" / "00000", size=(47, 65))
    (one,) = cases.read(tmp_path / "data").samples
    tree.write_truth(tmp_path / "out", one)
    assert load_video(tree.path(tmp_path / "out", one.name)).shape == (9, 48, 66, 3)


def test_names_that_leave_the_tree(tmp_path):
    for name in ("../x", "/x", ""):
        with pytest.raises(ValueError, match="not a name"):
            tree.path(tmp_path, name)


def test_truth_needs_a_true_video(tmp_path):
    sample(tmp_path / "x" / "00000")
    (one,) = cases.read(tmp_path, truth=False).samples
    with pytest.raises(MinicosError, match="ground_truth"):
        tree.write_truth(tmp_path / "out", one)
