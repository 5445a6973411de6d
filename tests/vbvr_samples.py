"""Small samples in the layout of VBVR-Bench, for the tests that need some."""

from pathlib import Path

import numpy as np

from minicos.media import save_image, save_video

TASKS = {
    "In-Domain_50": "O-18_glass_refraction_data-generator",
    "Out-of-Domain_50": "O-46_shape_sorter_data-generator",
}


def clip(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A square that moves over a smooth background: uint8 (frames height width 3)."""
    y, x = np.mgrid[:height, :width]
    back = np.stack([y * 200 // height, x * 200 // width, np.full_like(x, 90)], axis=-1)
    video = np.repeat(back[None], frames, axis=0).astype(np.uint8)
    side = max(4, min(height, width) // 5)
    for k in range(frames):
        left = (width - side) * k // max(1, frames - 1)
        top = (seed * 7) % (height - side)
        video[k, top : top + side, left : left + side] = (230, 40, 60)
    return video


def sample(folder: Path, frames: int = 9, size: tuple[int, int] = (48, 64), seed: int = 0) -> None:
    """One sample: first and last frame, true video, prompt."""
    video = clip(frames, *size, seed)
    folder.mkdir(parents=True)
    save_image(folder / "first_frame.png", video[0])
    save_image(folder / "final_frame.png", video[-1])
    save_video(folder / "ground_truth.mp4", video, 16)
    (folder / "prompt.txt").write_text("Move the square.\n", encoding="utf-8")


def bench(root: Path, each: int = 2) -> Path:
    """`each` samples of one task of either domain."""
    for split, task in TASKS.items():
        for index in range(each):
            sample(root / split / task / f"{index:05d}", seed=index)
    return root
