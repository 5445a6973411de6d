"""`reveal`: the hidden stays hidden, dwell follows the prompt, pairs are held out."""

from itertools import pairwise

import numpy as np
import pytest

from minicos import puzzles
from minicos.errors import MinicosError
from minicos.puzzles import draw
from minicos.puzzles.base import timeline
from minicos.puzzles.reveal import HELD_OUT, LEANS, LOOKS, SIDES


def some(name, n=8, split="test"):
    return [puzzles.FAMILIES[name].draw(seed, split) for seed in range(n)]


def shown(p, answer, side):
    """In which frames the whole object of `answer` is in the cell at one end of the lane."""
    video, blank = p.draw(p.candidates.index(answer)), draw.to_uint8(p.animate(None, timeline()))
    return [
        draw.likeness(frame, p._place(side), empty)[1] < LEANS[0]
        and draw.likeness(frame, p._place(side), empty)[0] == answer[0]
        for frame, empty in zip(video, blank, strict=True)
    ]


def test_no_answer_shows_in_frame_0_nor_in_the_hidden_latent_frames():
    for p in some("reveal"):
        frames = [0, *(4 * k - j for k in p.hidden for j in range(4))]
        blank = draw.to_uint8(p.animate(None, timeline()))
        for i in range(len(p.candidates)):
            assert (p.draw(i)[frames] == blank[frames]).all()


def test_the_longer_reveal_is_the_one_that_the_prompt_names():
    for p in some("reveal", 30):
        first, second = (sum(shown(p, p.candidates[0], side)) for side in (p.side, SIDES[p.side]))
        assert {"equal": first == second, "first": first > second, "second": first < second}[
            p.dwell
        ]
        assert p.prompt.endswith("longer") == (p.dwell == "second")


def test_a_picture_admits_as_many_objects_as_its_prompt():
    for name, k in (("reveal", 24), ("reveal-colour", 4), ("reveal-one", 1), ("reveal-new", 1)):
        assert {p.ambiguity for p in some(name)} == {k}
    with pytest.raises(MinicosError, match="24, 4 or 1"):
        puzzles.make("reveal", 0, knobs=puzzles.Knobs(k=6))


def test_held_out_pairs_are_named_out_of_domain_alone():
    assert {p.named for p in some("reveal-one", 200, "train")}.isdisjoint(HELD_OUT)
    assert {p.named for p in some("reveal-new", 40)} == HELD_OUT


def test_pink_is_named_only_where_the_embedded_vae_draws_it():
    named = {(p.dwell, p.named) for p in some("reveal-one", 300) if "pink" in p.named}
    assert named == {("equal", f"pink {shape}") for shape in ("triangle", "cross")}
    assert {p.dwell for p in some("reveal-colour", 200) if "pink" in p.named} == {"equal"}
    assert {p.dwell for p in some("reveal", 80)} == {"equal", "first", "second"}


@pytest.mark.parametrize("blend", [2, 3, 4, 24])
def test_a_blend_of_objects_is_none(blend):
    rng = np.random.default_rng(0)
    for name in ("reveal", "reveal-colour"):
        for p in some(name, 5):
            picks = rng.permutation(len(p.candidates))[:blend]
            mean = np.mean([p.draw(int(i)) for i in picks], axis=0)
            score = p.score(draw.to_uint8(mean))
            assert not score.solved and score.answer is None


def test_objects_that_differ_are_named():
    p = some("reveal", 1)[0]
    for a, b in pairwise(LOOKS):
        score = p.score(draw.to_uint8(p.animate((a, b), timeline())))
        assert score.detail == f"both reveals: {a} has become {b}" and not score.checks["same"]


def test_what_comes_out_on_the_wrong_side_first_is_remembered_all_the_same():
    for p in some("reveal", 6):
        (turned,) = p.variants()
        score = p.score(turned.draw(3))
        assert not score.solved and score.detail == "first reveal: is on the other side"
        assert score.checks["same"] == 1 and score.checks["way"] == 0
        a, b = LOOKS[0], LOOKS[5]
        assert not p.score(draw.to_uint8(turned.animate((a, b), timeline()))).checks["same"]


def test_a_reveal_is_judged_where_it_is_clearest():
    """Frames of the first reveal that show two objects do no harm if another one shows one."""
    for p in some("reveal", 6):
        video, other = p.draw(0), p.draw(7)
        still = [k for k, there in enumerate(shown(p, p.candidates[0], p.side)) if there]
        for k in still[1:]:
            video[k] = draw.to_uint8((video[k].astype(np.float32) + other[k]) / 2)
        assert p.score(video).solved
        k = still[0]
        video[k] = draw.to_uint8((video[k].astype(np.float32) + other[k]) / 2)
        assert "first reveal" in p.score(video).detail
