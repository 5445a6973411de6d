"""The base class of all puzzles: timeline, drawing, masks, and the frame of scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any, ClassVar, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw

FRAMES = 13
LIMIT = 80.0  # largest deviation (RGB, 0..441, see draw.deviation) from the expected frame
LEAN = 0.3  # largest share of the way from its answer to any other picture for a frame
WEIGHTS = {"start": 0.1, "kept": 0.1, "way": 0.1}  # the rules of the last frame share the rest
CATEGORIES = (
    "abstraction",
    "knowledge",
    "perception",
    "spatiality",
    "transformation",
    "memory",
    "physics",
)


@dataclass(frozen=True)
class Knobs:
    """The difficulty of a puzzle; None leaves a knob to the family's own distribution.

    Attributes:
        k: number of valid answers (1: exactly one; each kind defines larger values).
        s: serial depth: length of the chain of steps that depend on each other.
        d: number of distractors.
    """

    k: int | None = None
    s: int | None = None
    d: int | None = None

    def check(self, kind: str, *known: str) -> None:
        """Raise MinicosError if a knob is set that `kind` does not have."""
        for name, value in vars(self).items():
            if value is not None and name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise MinicosError(f"{kind} has no knob {name}: {has}")


FREE = Knobs()  # every knob left to the family


@dataclass(frozen=True)
class Score:
    """The verdict on one video.

    Attributes:
        solved: the strict verdict: first frame, last frame and the way there are all right.
        answer: index of the candidate that the last frame shows, None if it shows none of the list.
        detail: why the video is not solved; empty if it is.
        foil: index of the foil that the last frame shows, None if it shows none.
        score: graded, 0..1: the weighted mean of `checks`.
        checks: each rule, 0..1: start, kept, way (.1 each), and the rules of the last frame (.7 in
            total).
    """

    solved: bool
    answer: int | None = None
    detail: str = ""
    foil: int | None = None
    score: float = 0.0
    checks: Mapping[str, float] = field(default_factory=dict)


def timeline(frames: int = FRAMES) -> np.ndarray:
    """Progress of the answer at every frame, 0..1, done one frame before the end. (frames,)"""
    return np.minimum(np.arange(frames, dtype=np.float32) / np.float32(frames - 2), 1)


@dataclass(frozen=True)
class Puzzle:
    """A picture, a prompt, and the videos that answer it.

    Subclasses define the content of the picture (fields), the valid answers (`candidates`) and
    plausible wrong ones (`foils`), and the appearance of an answer at a given progress (`animate`).
    Drawing, masks and scoring follow. An answer is any hashable value: a route, a cell, a board.
    """

    size: int  # cells along a side

    kind: ClassVar[str]
    category: ClassVar[str]  # one of CATEGORIES
    sizes: ClassVar[tuple[int, ...]]
    prompts: ClassVar[tuple[str, ...]]  # every possible prompt of this kind
    frames: ClassVar[int] = FRAMES
    limit: ClassVar[float] = LIMIT
    held_out: ClassVar[frozenset[str]] = frozenset()  # compositions that never occur in training

    # -- defined by subclasses --

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        """A random puzzle of this kind. Raises MinicosError for knobs that the kind lacks."""
        raise NotImplementedError

    @property
    def prompt(self) -> str:
        """The question."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Canonical name of the picture; the prompt is not part of it."""
        raise NotImplementedError

    @property
    def candidates(self) -> tuple[Any, ...]:
        """The valid answers, or some of very many (`ambiguity` is their number)."""
        raise NotImplementedError

    @property
    def foils(self) -> tuple[Any, ...]:
        """Plausible answers that are wrong, of the same type as `candidates`."""
        return ()

    def backdrop(self) -> np.ndarray:
        """The picture without its objects: floor, grid and walls. float32 (h, w, 3)"""
        raise NotImplementedError

    def animate(self, answer: Any, progress: np.ndarray) -> np.ndarray:
        """An answer at each value of `progress` (n,) in 0..1, as float32 (n, h, w, 3) in 0..255."""
        raise NotImplementedError

    def variants(self) -> tuple[Self, ...]:
        """The same picture with every other possible prompt."""
        return ()

    @property
    def composition(self) -> str | None:
        """What this puzzle combines, if some combinations are held out."""
        return None

    @property
    def legible(self) -> bool:
        """Whether the embedded VAE can draw the answers so that a scorer can read them. Families
        hold no other puzzles.
        """
        return True

    @property
    def ambiguity(self) -> int:
        """k: the number of valid answers."""
        return len(self.candidates)

    @property
    def depth(self) -> int:
        """s: the serial depth."""
        return 1

    @property
    def distractors(self) -> int:
        """d: the number of distractors."""
        return 0

    @property
    def hidden(self) -> tuple[int, ...]:
        """Latent frames after the first in which all answers look the same, so they need not
        distinguish them.
        """
        return ()

    # -- drawing --

    def render(self, i: int, progress: np.ndarray) -> np.ndarray:
        """Answer i, see `animate`; from len(candidates) on, i counts foils."""
        return self.animate((*self.candidates, *self.foils)[i], progress)

    def draw(self, i: int) -> np.ndarray:
        """The video of answer i (see `render`): uint8 (frames, h, w, 3).
        Frame 0 is the same for every answer.
        """
        return draw.to_uint8(self.render(i, timeline(self.frames)))

    def first_frame(self) -> np.ndarray:
        """The picture: uint8 (h, w, 3)."""
        return self._still(self.candidates[0], 0.0).copy()

    def foreground(self) -> np.ndarray:
        """Where the objects of frame 0 are (not floor, grid or walls): bool (h, w)."""
        return draw.differs(self.first_frame(), draw.to_uint8(self.backdrop()))

    def answer_mask(self, i: int) -> np.ndarray:
        """Where the video of answer i differs visibly from frame 0: bool (frames, h, w)."""
        return draw.differs(self.draw(i), self.first_frame())

    # -- scoring --

    def score(self, video: np.ndarray) -> Score:
        """Judge a video uint8 (f, h, w, 3), f >= 5.

        The verdict considers three frames. The first must be this picture. The last must be the
        last frame of one valid answer, everywhere and not just on average, and clearly of no other
        (where it is not clear, the frame before it tells which, since answers are done by then).
        The middle one (f // 2) must be on the way there, so a video that jumps to its answer, or
        turns back, is not solved. The graded score considers two more frames.
        """
        self._check_video(video)
        start = self._mismatch(video[0], self.first_frame())
        answer, end, clear = self._end(video)
        nearest = self._nearest(video[-1]) if answer is None else answer
        ways = [self._way(video, frame, nearest) for frame in _between(len(video))]
        detail = start and f"first frame: {start}"
        detail = detail or (end and f"last frame: {end}") or ways[len(ways) // 2]
        checks = {
            "start": float(not start),
            "kept": self._kept(video[-1], nearest),
            "way": float(np.mean([not way for way in ways])),
            **self.rules(clear),
        }
        return self._verdict(answer, detail, checks)

    def _end(self, video: np.ndarray) -> tuple[Any | None, str, np.ndarray]:
        """The answer that a video ends with, or None; why it is not valid; and the frame that
        shows it.
        """
        last, unclear = video[-1], ""
        for frame in (last, video[-2]):
            answer, why = self.read(frame)
            if answer is not None:
                why = why or self.wrong(answer) or self._mismatch(last, self._still(answer, 1.0))
                return answer, why and (unclear or why), frame
            unclear = unclear or why
        return None, unclear, last

    def matches(self, video: np.ndarray) -> np.ndarray:
        """The candidates that every frame of a video uint8 (f, h, w, 3) could come from: bool (f,
        candidates).

        A frame matches if it looks, up to blur and noise, like the candidate's video at the same
        time. This is stricter than `score`, which leaves the pace of some answers open, and looser:
        frames need not agree with each other.
        """
        times = timeline(len(video))
        truth = [draw.to_uint8(self.render(i, times)) for i in range(len(self.candidates))]
        return np.stack([draw.deviation(video, t).max(axis=(1, 2)) < LIMIT for t in truth], axis=1)

    # -- refined by some subclasses --

    def read(self, frame: np.ndarray) -> tuple[Any | None, str]:
        """The answer that `frame` shows as a last frame, valid or not, or None; and the reason if
        it is None or not valid.
        """
        answers = (*self.candidates, *self.foils)
        ends = [self._still(answer, 1.0) for answer in answers]
        shown = clearest(frame, [*ends, self.first_frame()])
        if shown is None or shown == len(answers):
            return None, "shows no answer clearly"
        return answers[shown], ""

    def wrong(self, answer: Any) -> str:
        """Why an answer is not valid; empty if it is."""
        return "" if answer in self.candidates else "shows a wrong answer"

    def rules(self, last: np.ndarray) -> dict[str, float]:
        """Named checks of the last frame, each 0..1, equally weighted: 0 for the first frame
        unchanged, 1 for an answer.

        By default one: the share of the change to the nearest valid answer that is there.
        """
        first = self.first_frame()
        ends = [self._still(answer, 1.0) for answer in self.candidates]
        return {"end": max(_share(last, first, end) for end in ends)}

    def halfway(self, frame: np.ndarray, answer: Any, progress: float) -> str:
        """Why `frame` is not on the way to `answer`; empty if it is."""
        answers = {*self.candidates, answer}
        way = _error(frame, self._still(answer, progress))
        others = [_error(frame, self._still(a, progress)) for a in answers if a != answer]
        ends = [_error(frame, self._still(answer, end)) for end in (0.0, 1.0)]
        return "" if way <= min(others + ends) else "not on the way to the answer"

    # -- helpers --

    def _verdict(self, answer: Any | None, detail: str, checks: Mapping[str, float]) -> Score:
        """The score of a video that shows `answer`, fails because of
        `detail` (if any) and passes `checks`.
        """
        return Score(
            solved=not detail,
            answer=_index(self.candidates, answer),
            detail=detail,
            foil=_index(self.foils, answer),
            score=_weighted(checks),
            checks=checks,
        )

    def _check_video(self, video: np.ndarray) -> None:
        side = self.size * draw.CELL
        if (
            video.ndim != 4
            or video.shape[1:] != (side, side, 3)
            or len(video) < 5
            or video.dtype != np.uint8
        ):
            shape = f"uint8 (f >= 5, {side}, {side}, 3)"
            raise MinicosError(f"a video is {shape}; this one is {video.dtype} {video.shape}")

    def _still(self, answer: Any, progress: float) -> np.ndarray:
        """One frame of an answer: uint8 (h, w, 3), read-only."""
        return _drawn(self, answer, float(progress))

    def _nearest(self, frame: np.ndarray) -> Any:
        """The candidate whose last frame is nearest to `frame`."""
        return min(self.candidates, key=lambda answer: _error(frame, self._still(answer, 1.0)))

    def _way(self, video: np.ndarray, frame: int, answer: Any) -> str:
        """Why a frame of a video is not on the way to `answer`, and which; empty when it is."""
        detail = self.halfway(video[frame], answer, float(timeline(len(video))[frame]))
        return detail and f"frame {frame}: {detail}"

    def _kept(self, last: np.ndarray, answer: Any) -> float:
        """The unchanged share of everything that `answer` leaves unchanged."""
        end = self._still(answer, 1.0)
        alone = ~draw.differs(end, self.first_frame())
        return float((draw.deviation(last, end) < LIMIT)[alone].mean())

    @classmethod
    def _mismatch(cls, frame: np.ndarray, expected: np.ndarray) -> str:
        """Where two frames disagree, in words; empty if they agree up to blur and noise."""
        apart = draw.deviation(frame, expected)
        if apart.max() < cls.limit:
            return ""
        row, col = (int(k) // draw.CELL for k in np.unravel_index(apart.argmax(), apart.shape))
        far = f"deviation {apart.max():.0f}, limit {cls.limit:.0f}"
        return f"cell ({row}, {col}) does not look as it should ({far})"


@lru_cache(2048)  # 25 MB; a study scores many videos of one puzzle
def _drawn(puzzle: Puzzle, answer: Any, progress: float) -> np.ndarray:
    frame = draw.to_uint8(puzzle.animate(answer, np.array([progress], np.float32)))[0]
    frame.flags.writeable = False
    return frame


def clearest(frame: np.ndarray, pictures: Sequence[np.ndarray]) -> int | None:
    """Which of several distinct pictures a frame shows. None if it leans to another by more than
    LEAN.
    """
    best = int(np.argmin([_error(frame, picture) for picture in pictures]))
    seen, *coarse = (_coarse(picture) for picture in (frame, *pictures))
    leans = [draw.lean(seen, coarse[best], p) for i, p in enumerate(coarse) if i != best]
    return best if max(leans) <= LEAN else None


def _between(frames: int) -> tuple[int, int, int]:
    """The frames at a quarter, half and three quarters of a video, before the answer ends."""
    return frames // 4, frames // 2, min(3 * (frames - 1) // 4, frames - 3)


def _coarse(picture: np.ndarray) -> np.ndarray:
    """Mean over 4x4 pixels of a picture (h, w, 3): colours that bleed over an
    outline, as in H.264, are kept together.
    """
    h, w, _ = picture.shape
    return picture.reshape(h // 4, 4, w // 4, 4, 3).mean(axis=(1, 3), dtype=np.float32)


def _index(answers: tuple[Any, ...], answer: Any) -> int | None:
    return answers.index(answer) if answer in answers else None


def _weighted(checks: Mapping[str, float]) -> float:
    """Mean of the checks: those in WEIGHTS by weight, the others in equal parts of the rest."""
    rules = [value for name, value in checks.items() if name not in WEIGHTS]
    frame = sum(weight * checks[name] for name, weight in WEIGHTS.items())
    return float(frame + (1 - sum(WEIGHTS.values())) * np.mean(rules))


def _share(frame: np.ndarray, first: np.ndarray, end: np.ndarray) -> float:
    """The share of the change from `first` to `end` in `frame`, 0..1, by squared error."""
    return max(0.0, 1 - _error(frame, end) / _error(first, end))


def _error(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of squared differences of two uint8 pictures."""
    return float(np.square(a.astype(np.float32) - b).sum())
