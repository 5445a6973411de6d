"""What all puzzles share: the timeline, the masks, and the frame of scoring."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

import numpy as np

from . import draw

FRAMES = 13
LIMIT = 80.0  # largest deviation (RGB, 0..441, see draw.deviation) between a frame and the one it should be


@dataclass(frozen=True)
class Score:
    """Verdict on one video.

    `answer` is the index of the candidate its last frame shows, None if it shows none; `detail` says why the video is
    not solved and is empty when it is.
    """

    solved: bool
    answer: int | None = None
    detail: str = ""


def timeline(frames: int = FRAMES) -> np.ndarray:
    """Progress of the answer at every frame, 0..1: constant speed, done one frame before the end. (frames,)"""
    return np.minimum(np.arange(frames, dtype=np.float32) / np.float32(frames - 2), 1)


@dataclass(frozen=True)
class Puzzle:
    """A picture, a prompt, and the videos that answer it.

    Subclasses say what the picture holds (fields), what the answers are (`candidates`) and how each looks at a given
    progress (`render`); drawing, masks and scoring follow from these.
    """

    size: int  # cells along a side

    kind: ClassVar[str]
    sizes: ClassVar[tuple[int, ...]]
    frames: ClassVar[int] = FRAMES

    @classmethod
    def sample(cls, rng: Random, size: int) -> Self:
        """A random puzzle of this kind."""
        raise NotImplementedError

    @property
    def prompt(self) -> str:
        """What is asked."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Canonical name of the picture; the prompt is not part of it."""
        raise NotImplementedError

    @property
    def candidates(self) -> tuple:
        """Every valid answer."""
        raise NotImplementedError

    def backdrop(self) -> np.ndarray:
        """The picture without its objects: floor, grid and walls. float32 (h, w, 3)"""
        raise NotImplementedError

    def render(self, i: int, progress: np.ndarray) -> np.ndarray:
        """Candidate i at each value of `progress` (n,) in 0..1, as float32 (n, h, w, 3) in 0..255."""
        raise NotImplementedError

    def variants(self) -> tuple[Self, ...]:
        """The same picture with every other prompt it admits."""
        return ()

    def draw(self, i: int) -> np.ndarray:
        """The video of candidate i: uint8 (13, h, w, 3). Frame 0 is the same for every candidate."""
        return draw.to_uint8(self.render(i, timeline()))

    def first_frame(self) -> np.ndarray:
        """The picture: uint8 (h, w, 3)."""
        return self._still(0, 0.0)

    def foreground(self) -> np.ndarray:
        """Where the objects of frame 0 are (not floor, grid or walls): bool (h, w)."""
        return draw.differs(self.first_frame(), draw.to_uint8(self.backdrop()))

    def answer_mask(self, i: int) -> np.ndarray:
        """Where the video of candidate i differs visibly from frame 0: bool (13, h, w)."""
        return draw.differs(self.draw(i), self.first_frame())

    def score(self, video: np.ndarray) -> Score:
        """Judge a video uint8 (f, h, w, 3), f >= 5.

        Three frames are looked at. The first must be this picture. The last must be the last frame of one candidate,
        everywhere and not just on average: that is the answer. The middle one (f // 2) must be on the way there, so a
        video that jumps to its answer, or turns back, is not solved.
        """
        side = self.size * draw.CELL
        if (
            video.ndim != 4
            or video.shape[1:] != (side, side, 3)
            or len(video) < 5
            or video.dtype != np.uint8
        ):
            raise ValueError(
                f"a video is uint8 (f >= 5, {side}, {side}, 3); this one is {video.dtype} {video.shape}"
            )
        if detail := self._mismatch(video[0], self.first_frame()):
            return Score(False, None, f"first frame: {detail}")
        answer, detail = self._read(video[-1])
        if answer is None:
            return Score(False, None, f"last frame: {detail}")
        if detail := self._mismatch(video[-1], self._still(answer, 1.0)):
            return Score(False, None, f"last frame: {detail}")
        middle = len(video) // 2
        if detail := self._halfway(video[middle], answer, float(timeline(len(video))[middle])):
            return Score(False, answer, f"frame {middle}: {detail}")
        return Score(True, answer)

    def matches(self, video: np.ndarray) -> np.ndarray:
        """Which candidates every frame of a video uint8 (f, h, w, 3) could come from: bool (f, candidates).

        A frame matches where it looks, up to blur and noise, like the candidate's video at the same time. Stricter than `score`,
        which leaves the pace of some answers open, and looser: frames need not agree with each other.
        """
        times = timeline(len(video))
        truth = [draw.to_uint8(self.render(i, times)) for i in range(len(self.candidates))]
        return np.stack([draw.deviation(video, t).max(axis=(1, 2)) < LIMIT for t in truth], axis=1)

    # -- what subclasses may sharpen --

    def _read(self, frame: np.ndarray) -> tuple[int | None, str]:
        """Which candidate's last frame `frame` shows, or (None, why not)."""
        errors = [_error(frame, self._still(i, 1.0)) for i in range(len(self.candidates))]
        return int(np.argmin(errors)), ""

    def _halfway(self, frame: np.ndarray, answer: int, progress: float) -> str:
        """Why `frame` is not on the way to `answer`; empty when it is."""
        ways = [_error(frame, self._still(i, progress)) for i in range(len(self.candidates))]
        ends = [_error(frame, self._still(answer, end)) for end in (0.0, 1.0)]
        return "" if ways[answer] <= min(ways + ends) else "not on the way to the answer"

    def _still(self, i: int, progress: float) -> np.ndarray:
        """One frame of candidate i: uint8 (h, w, 3)."""
        return draw.to_uint8(self.render(i, np.array([progress], np.float32)))[0]

    @staticmethod
    def _mismatch(frame: np.ndarray, expected: np.ndarray) -> str:
        """Where two frames disagree, in words; empty when they agree up to blur and noise."""
        apart = draw.deviation(frame, expected)
        if apart.max() < LIMIT:
            return ""
        row, col = (int(k) // draw.CELL for k in np.unravel_index(apart.argmax(), apart.shape))
        return f"cell ({row}, {col}) does not look as it should (deviation {apart.max():.0f}, limit {LIMIT:.0f})"


def _error(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of squared differences of two uint8 pictures."""
    return float(np.square(a.astype(np.float32) - b).sum())
