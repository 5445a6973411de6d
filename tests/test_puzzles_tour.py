"""`tour`: legs avoid other points, orders are distinguished, and some are held out."""

from itertools import combinations, permutations

import pytest

from minicos import puzzles
from minicos.errors import MinicosError
from minicos.puzzles.tour import HELD_OUT, _clear


@pytest.mark.parametrize(
    ("name", "s", "k"), [("tour", 3, 6), ("tour-one", 3, 1), ("tour-short", 2, 1)]
)
def test_depth_and_answers(name, s, k):
    for seed in range(5):
        p = puzzles.FAMILIES[name].draw(seed)
        assert (p.depth, p.ambiguity, p.frames) == (s, k, 4 * s + 5)
        assert all(set(order) == set(p.colours) for order in p.candidates)


def test_a_point_on_a_leg_is_not_clear():
    assert not _clear([(0, 0), (0, 2), (0, 1)]) and not _clear([(0, 0), (2, 2), (1, 1)])
    assert _clear([(0, 0), (0, 2), (2, 1)])


def test_every_wrong_order_is_read_as_what_it_is():
    p = puzzles.FAMILIES["tour-one"].draw(3, "test")
    for q in p.variants():
        score = p.score(q.draw(0))
        assert not score.solved and p.foils[score.foil] == q.order


def test_orders_are_held_out():
    named = [puzzles.FAMILIES["tour-one"].draw(seed).composition for seed in range(200)]
    held = [puzzles.FAMILIES["tour-new"].draw(seed).composition for seed in range(40)]
    every = {
        " ".join(o)
        for c in combinations(("red", "blue", "pink", "black"), 3)
        for o in permutations(c)
    }
    assert set(held) == HELD_OUT and set(named) == every - HELD_OUT
    with pytest.raises(MinicosError, match="2 to 4"):
        puzzles.make("tour", 0, knobs=puzzles.Knobs(s=5))
