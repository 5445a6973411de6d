"""`shell`: each swap has frames of its own, and it alone says where the ball goes."""

from itertools import product

import numpy as np
import pytest

from minicos import puzzles
from minicos.errors import MinicosError
from minicos.puzzles import draw
from minicos.puzzles.base import timeline
from minicos.puzzles.shell import PAIRS, Answer


def some(name, n=6, split="test"):
    return [puzzles.FAMILIES[name].draw(seed, split) for seed in range(n)]


def test_frames_and_answers_follow_from_the_number_of_swaps():
    for name, s, k in (
        ("shell-short", 1, 2),
        ("shell", 2, 4),
        ("shell-one", 2, 1),
        ("shell-long", 3, 8),
    ):
        for p in some(name):
            assert (p.depth, p.ambiguity, p.frames) == (s, k, 4 * s + 9)
            assert {swaps for swaps, _ in p.candidates} <= set(product(range(2), repeat=s))
    for knobs in (puzzles.Knobs(s=6), puzzles.Knobs(s=2, k=3)):
        with pytest.raises(MinicosError, match="shell has 1"):
            puzzles.make("shell", 0, knobs=knobs)


def test_between_the_swaps_no_frame_tells_where_the_ball_is():
    for p in some("shell-long"):
        videos = np.stack([p.draw(i) for i in range(len(p.candidates))])
        rests = range(4, p.frames - 4, 4)
        assert (videos[:, rests] == videos[:1, [4]]).all()
        before_lift = [Answer(swaps, ball) for (swaps, _), ball in product(p.candidates, range(3))]
        hidden = timeline(p.frames)[: p.frames - 4]
        for a, b in zip(before_lift[::3], before_lift[1::3], strict=True):
            assert (p.animate(a, hidden) == p.animate(b, hidden)).all()


def test_swaps_are_read_one_by_one():
    for p in some("shell"):
        (first, _), video = p.candidates[0], p.draw(0)
        stays = video.copy()
        stays[9:13] = video[8]  # the second swap does not take place
        assert "swap 2" in p.score(stays).detail and p.score(stays).checks["swaps"] == 0.5
        other = p.draw([swaps for swaps, _ in p.candidates].index((first[0], 1 - first[1])))
        mixed = np.concatenate([video[:9], other[9:13], video[13:]])
        assert "the ball is under cup" in p.score(mixed).detail


def test_named_swaps_must_be_the_ones_that_are_named():
    for p in some("shell-one"):
        (swaps, _), *none = p.candidates
        assert not none and " ".join(PAIRS[swap] for swap in swaps) in p.prompt
        others = [s for s in product(range(2), repeat=2) if s != swaps]
        for other in others:
            video = p.animate(Answer(other, p._follow(other)), timeline(p.frames))
            assert "the cups swap" in p.score(draw.to_uint8(video)).detail
