"""The tree of videos that the benchmark's scorer takes: OUT/<condition>/<split>/<task>/NNNNN.mp4.

A video is H.264, yuv420p, with a short GOP (the scorer seeks every frame), in the size of its
sample's first frame. Its first frame is that picture, since many of the scorer's rules compare with
it. With clean estimates of denoising steps, each step has a tree of its own:
OUT/<condition>/steps/step_007/<split>/...

The functions that write a video take `save`, which makes files appear atomically (see
`runs.replace_file`).
"""

from pathlib import Path, PurePosixPath

import numpy as np

from minicos.errors import MinicosError, SampleError
from minicos.media import Save, load_video, save_video
from minicos.runs import replace_file
from minicos.vbvr.cases import Sample, load_picture
from minicos.vbvr.fit import Fit, fit, in_time, made_frames, resize

FPS = 16  # not read by the scorer
STEP, STRIDE = 16, 4  # Wan's: sides are multiples of 16 pixels, frames are 4 n + 1


def folder(out: Path, condition: str, step: int | None = None) -> Path:
    """The root of one condition's tree, or of the clean estimates of one of its steps."""
    root = out / condition
    return root if step is None else root / "steps" / f"step_{step:03d}"


def path(root: Path, name: str) -> Path:
    """The path of the video of the sample `name`, which need not exist. Raises ValueError for a
    name that leaves the tree.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise ValueError(f"{name!r} is not a name of a sample")
    return root.joinpath(*parts[:-1], f"{parts[-1]}.mp4")


def write(
    root: Path,
    sample: Sample,
    video: np.ndarray,
    fit: Fit,
    frames: int | None,
    save: Save = replace_file,
) -> None:
    """Write a model's video uint8 (f *fit.made 3) as the sample's, in its size and with `frames`
    frames (None: all).
    """
    picture = load_picture(sample)
    video = fit.back(video if frames is None else in_time(video, frames), picture)
    video[0] = picture
    save_video(path(root, sample.name), video, FPS, save=save)


def write_static(root: Path, sample: Sample, save: Save = replace_file) -> None:
    """The static baseline: the first frame, as long as the truth."""
    picture = load_picture(sample)
    frames = (picture for _ in range(sample.frames or 33))
    save_video(path(root, sample.name), frames, FPS, save=save)


def write_truth(root: Path, sample: Sample, save: Save = replace_file) -> None:
    """The baseline of right answers: the true video, converted like a model's to a size and length
    that Wan makes (`STEP`, `STRIDE`) and back. Raises SampleError for a sample without one, or with
    one that cannot be read or converted.
    """
    if sample.truth is None:
        raise SampleError(
            f"{sample.name} has no ground_truth.mp4. Leave the condition `truth` out."
        )
    try:
        video, way = load_video(sample.truth), fit(sample.size, STEP)
    except MinicosError as error:
        raise SampleError(str(error)) from error
    seen = way.forward(resize(video, sample.size))
    made = in_time(seen, made_frames(len(video), STRIDE))
    write(root, sample, made, way, len(video), save)
