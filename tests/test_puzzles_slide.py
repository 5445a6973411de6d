"""`slide`: orders are valid exactly where no two tiles overlap, and are read from the video."""

from itertools import permutations
from math import factorial

import numpy as np
import pytest

from minicos import puzzles
from minicos.errors import MinicosError
from minicos.puzzles import draw
from minicos.puzzles.base import timeline


@pytest.mark.parametrize(
    ("name", "s", "k"), [("slide", 3, 6), ("slide-one", 3, 1), ("slide-short", 2, 2)]
)
def test_depth_and_answers(name, s, k):
    for seed in range(6):
        p = puzzles.FAMILIES[name].draw(seed)
        assert (p.depth, p.ambiguity, p.frames) == (s, k, 4 * s + 5)
        assert len({*p.candidates, *p.foils}) == len(p.candidates) + len(p.foils)
    for knobs in (puzzles.Knobs(s=5), puzzles.Knobs(s=3, k=4), puzzles.Knobs(s=2, k=3)):
        with pytest.raises(MinicosError, match="slide "):
            puzzles.make("slide", 0, knobs=knobs)


def overlaps(p, order):
    """Whether two tiles overlap at some time, simulated in steps of a hundredth of a turn."""
    at = {tile.colour: np.array(tile.start, float) for tile in p.tiles}
    for tile in sorted(p.tiles, key=lambda tile: order.index(tile.colour)):
        path = np.linspace(tile.start, tile.home, 101)
        others = [place for colour, place in at.items() if colour != tile.colour]
        if any((np.abs(path - other).max(1) * draw.CELL < 12).any() for other in others):
            return True
        at[tile.colour] = np.array(tile.home, float)
    return False


def test_valid_orders_are_those_without_a_collision():
    for seed in range(40):
        p = puzzles.make("slide", seed)
        orders = list(permutations(tile.colour for tile in p.tiles))
        assert len(orders) == factorial(p.depth)
        assert [o for o in orders if not overlaps(p, o)] == list(p.candidates)


def test_the_order_is_read_and_judged():
    p = puzzles.FAMILIES["slide-one"].draw(2, "test")
    for foil in p.foils:
        score = p.score(draw.to_uint8(p.animate(foil, timeline(p.frames))))
        why = "a tile runs into another" if len(foil) == p.depth else "a tile does not move"
        assert score.detail == why and p.foils[score.foil] == foil
    at_once = p.draw(0)
    at_once[1:] = at_once[-1]
    assert "not clear in which order" in p.score(at_once).detail
