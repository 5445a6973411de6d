"""`balls`: motion keeps energy, balls never overlap, a puzzle has the hits that it should."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicos import puzzles
from minicos.puzzles.motion import ANGLES, HIGH, LOW, RADIUS, SPEED, Ball, move

UNTIL = 20.0
coordinates = st.integers(LOW + 1, HIGH - 1)


@st.composite
def some_balls(draw_from):
    spots = draw_from(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=4))
    apart = all(abs(complex(*a) - complex(*b)) > 2 * RADIUS for a, b in combinations(spots, 2))
    kept = spots if apart else spots[:1]
    return tuple(Ball("red", spot, draw_from(st.integers(0, ANGLES - 1))) for spot in kept)


def speeds(course):
    """The speed of each ball in each stretch that lasts (stretches, balls)."""
    waits = np.diff(course.times)
    lasts = waits > 1e-3
    return np.diff(course.places, axis=0)[lasts] / waits[lasts, None]


@settings(max_examples=60, deadline=None)
@given(some_balls())
def test_energy_is_kept_and_balls_stay_apart_and_inside(balls):
    course = move(balls, "bounce", UNTIL)
    # measured: 1.4e-12 in 2,000 random courses of 1 to 4 balls
    energy = np.square(np.abs(speeds(course))).sum(1)
    np.testing.assert_allclose(energy, len(balls) * SPEED**2, rtol=1e-9)
    places = course.at(np.linspace(0, UNTIL, 101))
    assert (places.real > LOW - 1e-9).all() and (places.real < HIGH + 1e-9).all()
    assert (places.imag > LOW - 1e-9).all() and (places.imag < HIGH + 1e-9).all()
    for i, j in combinations(range(len(balls)), 2):
        assert np.abs(places[:, i] - places[:, j]).min() > 2 * RADIUS - 1e-6


def test_head_on_balls_exchange_speeds():
    left, right = Ball("red", (30, 15), 0), Ball("blue", (30, 45), ANGLES // 2)
    (hit,) = (event for event in move((left, right), "bounce", 7).events if event.j >= 0)
    assert hit.wait == pytest.approx((30 - 2 * RADIUS) / (2 * SPEED)) and hit.share == 1
    ends = {rule: move((left, right), rule, 5).places[-1] for rule in ("bounce", "pass", "stop")}
    passed = ends[
        "pass"
    ]  # changing roles keeps balls two radii apart that would else be in one place
    assert ends["bounce"] == pytest.approx([passed[1] - 2 * RADIUS, passed[0] + 2 * RADIUS])
    assert ends["stop"] == pytest.approx([25 + 30j, 35 + 30j])


@pytest.mark.parametrize(("name", "s"), [("balls-one", 1), ("balls", 2), ("balls-three", 3)])
def test_hits_are_one_fewer_than_balls_and_form_a_chain(name, s):
    for seed in range(10):
        p = puzzles.FAMILIES[name].draw(seed)
        hits = [event for event in move(p.balls, "bounce", p.frames - 2).events if event.j >= 0]
        assert (p.depth, len(p.balls), len(hits)) == (s, s, s - 1)
        met = {hits[0].i} if hits else set()
        for hit in hits:
            assert {hit.i, hit.j} & met and hit.share >= 0.6
            met |= {hit.i, hit.j}


def test_a_ball_that_is_gone_double_or_late_is_not_solved():
    p = puzzles.FAMILIES["balls"].draw(0)
    video, until = p.draw(0), p.frames - 2
    places = move(p.balls, "bounce", until).at(np.arange(p.frames).clip(max=until))
    for wrong, why in ((5j, "5 px off"), (2j, "")):
        shift = np.array([wrong * (1 if places[-1, 0].imag < 32 else -1), 0])
        moved = p._scene(places + shift) + 0.5
        score = p.score(np.concatenate([video[:1], moved[1:].astype(np.uint8)]))
        assert (why in score.detail) if why else score.solved
    gone = video.copy()
    gone[-1] = np.where(p.answer_mask(0)[-1][..., None], p.backdrop(), video[-1])
    assert "not there" in p.score(gone).detail
    late = video[[0, 0, 0, 0, 1, 2, 3, 4, 6, 8, 10, 11, 12]]
    assert "frame 3" in p.score(late).detail and p.score(late).answer == 0


def test_a_ball_is_found_among_the_edges_of_others_but_not_half_faded():
    for seed in range(5):
        p = puzzles.family("balls-three").draw(seed)
        video = p.draw(0)
        speckled = video.copy()  # a fifth of a ball's area in its colour, scattered
        for k, ball in enumerate(p.balls):
            spots = range(3 + 5 * k, 60, 4)
            colour = video[0, int(ball.place.imag), int(ball.place.real)]
            speckled[:, 61 - k, spots] = colour
        assert p.score(speckled).checks["near"] == 1
        faded = (0.5 * video + 0.5 * p.backdrop()).astype(np.uint8)
        assert p.score(faded).checks["near"] == 0
