"""`mirror`: the end is the flipped picture, pieces have no symmetry, pairs are held out."""

import numpy as np
import pytest

from minicos import puzzles
from minicos.puzzles.mirror import AXES, HELD_OUT, PIECES, boxes


@pytest.mark.parametrize("seed", range(12))
def test_the_end_is_the_flipped_picture(seed):
    p = puzzles.FAMILIES["mirror"].draw(seed)
    cy, cx = p.centre
    reach = min(cy, cx, 64 - cy, 64 - cx) - 2  # square about the centre, inside the border
    around = (slice(cy - reach, cy + reach), slice(cx - reach, cx + reach))
    first = p.first_frame()[around]
    for axis, flipped in (("left right", first[:, ::-1]), ("top bottom", first[::-1])):
        end = p.draw(AXES.index(axis))[-1][around]
        assert np.abs(end.astype(int) - flipped).max() <= 1


@pytest.mark.parametrize("piece", PIECES)
def test_no_flip_or_half_turn_maps_a_piece_to_itself(piece):
    for pose in range(8):
        here = set(boxes(piece, pose))
        for y, x in ((1, -1), (-1, 1), (-1, -1)):
            assert {(y * cy, x * cx, h, w) for cy, cx, h, w in here} != here


def test_held_out_pairs_are_named_out_of_domain_alone():
    drawn = {
        name: {puzzles.FAMILIES[name].draw(seed).composition for seed in range(150)}
        for name in ("mirror-one", "mirror-new")
    }
    assert drawn["mirror-one"].isdisjoint(HELD_OUT) and drawn["mirror-new"] == HELD_OUT
    assert len(drawn["mirror-one"]) == len(PIECES) * len(AXES) - len(HELD_OUT)
