"""What is specific to each family: its rules, its foils, its reading."""

from itertools import permutations, product
from math import comb

import numpy as np
import pytest

from minicos import puzzles
from minicos.puzzles import FAMILIES, draw, figures, latin, maze, partner
from minicos.puzzles.count import Count
from minicos.puzzles.figures import TURNS, Figure
from minicos.puzzles.pick import Pick, Thing
from minicos.puzzles.sequence import Sequence
from minicos.puzzles.tictactoe import Move, TicTacToe


def last_frame(p, answer):
    return draw.to_uint8(p.animate(answer, np.ones(1, np.float32)))[0]


# -- maze ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maze", "maze-one", "maze-5x5"])
def test_decoys_are_dead_ends_and_a_short_cut_crosses_one_wall(name):
    for seed in range(8):
        p = FAMILIES[name].draw(seed)
        near = maze.neighbours(p.doors, p.size)
        for route in p.decoys:
            assert route[0] == p.start and len(near[route[-1]]) == 1 and route[-1] != p.red
            assert set(maze.edges_of(route)) <= p.doors
            assert not any(route[-1] in valid for valid in p.candidates)
        for route in p.shortcut:
            assert (route[0], route[-1]) == (p.start, p.red) and len(route) - 1 < p.depth
            assert len(set(maze.edges_of(route)) - p.doors) == 1


def test_a_mix_of_routes_is_none():
    for seed in range(8):
        p = FAMILIES["maze"].draw(seed)
        ways = [p.draw(i).astype(np.float32) for i in range(2)]
        for share in (0.4, 0.5, 0.6):
            mix = draw.to_uint8(share * ways[0] + (1 - share) * ways[1])
            assert not p.score(mix).solved


# -- latin -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(4, 576), (5, 161_280)])
def test_squares_are_all_and_latin(size, count):
    every = latin.squares(size).reshape(size, size, -1)
    assert every.shape[-1] == count == len(np.unique(every.reshape(size * size, -1), axis=1).T)
    values = np.arange(size)[:, None, None]
    assert (np.sort(every, axis=0) == values).all()
    assert (np.sort(every, axis=1) == values.transpose(1, 0, 2)).all()


def test_solutions_of_a_square_are_counted():
    rows = list(permutations(range(4)))
    for seed in range(5):
        p = puzzles.make("latin", seed, 4)
        fits = [
            [row for row in rows if all(g in (-1, v) for g, v in zip(given, row, strict=True))]
            for given in np.array(p.given).reshape(4, 4).tolist()
        ]
        boards = (
            b
            for b in product(*fits)
            if all(len(set(column)) == 4 for column in zip(*b, strict=True))
        )
        assert p.ambiguity == sum(1 for _ in boards)


def test_colouring_at_random_counts_nothing():
    rng = np.random.default_rng(0)
    values = []
    for seed in range(40):
        p = FAMILIES["latin-many"].draw(seed)
        board = tuple(v if v >= 0 else int(rng.integers(5)) for v in p.given)
        values.append(np.mean(list(p.rules(last_frame(p, board)).values())))
    assert (
        np.mean(values) < 0.15
    )  # .1: chance counts 0, and what is worse than chance is not negative


def test_any_solution_of_a_square_is_right_and_what_is_wrong_is_said():
    p = FAMILIES["latin-many"].draw(0)
    unlisted = next(b for b in map(_board, p._solutions) if b not in p.candidates)
    video = draw.to_uint8(p.animate(unlisted, puzzles.timeline()))
    score = p.score(video)
    assert score.solved and score.answer is None and score.score == pytest.approx(1)
    cell = next(i for i, v in enumerate(p.given) if v >= 0)
    changed = [(v + 1) % 5 if i == cell else v for i, v in enumerate(unlisted)]
    assert "was given in" in p.wrong(tuple(changed))
    assert "repeats a colour" in p.wrong(p.foils[0])


def _board(index):
    return tuple(latin.squares(5)[:, index].tolist())


# -- figures and sequence --------------------------------------------------------------------------


def test_every_figure_is_read_also_through_blur_and_noise():
    rng, floor = np.random.default_rng(0), draw.grid(3)
    for shape in TURNS:
        for level, turn in product(range(len(figures.RADII)), range(TURNS[shape])):
            for colour in draw.COLOURS:
                figure, canvas = Figure(shape, colour, level, turn), floor[None].copy()
                figures.put(canvas, figure, (1, 1))
                soft = 0.6 * canvas[0] + 0.4 * draw.box_blur(canvas[0], 3)
                seen = np.clip(soft + rng.normal(0, 5, soft.shape) + 0.5, 0, 255).astype(np.uint8)
                assert figures.read(seen, (1, 1), floor) == figure


def test_a_cell_that_is_empty_or_a_mix_shows_no_figure():
    floor = draw.grid(1)
    assert figures.read(draw.to_uint8(floor), (0, 0), floor) is None
    base = Figure("triangle", "blue", 2, 1)
    for other in (
        base._replace(level=1),
        base._replace(turn=2),
        base._replace(colour="sky"),
        Figure("half", "blue", 2, 1),
    ):
        pair = np.repeat(floor[None], 2, axis=0)
        figures.put(pair[:1], base, (0, 0))
        figures.put(pair[1:], other, (0, 0))
        for share in (0.4, 0.5, 0.6):
            mix = draw.to_uint8(share * pair[0] + (1 - share) * pair[1])
            assert figures.read(mix, (0, 0), floor) is None


def test_a_sequence_goes_on_by_its_rules():
    cells = tuple((1, c) for c in range(4))
    p = Sequence(4, Figure("half", "red", 0, 3), "sky", ("alternate", "grow"), cells, ())
    assert [p.item(i)[1:3] for i in range(4)] == [("red", 0), ("sky", 1), ("red", 2), ("sky", 3)]
    assert p.candidates == (Figure("half", "sky", 3, 3),)
    assert p.foils == (Figure("half", "red", 3, 3), Figure("half", "sky", 2, 3))
    q = Sequence(4, Figure("half", "red", 1, 3), "red", ("right",), cells, ())
    assert q.candidates == (Figure("half", "red", 1, 2),)
    assert [foil.turn for foil in q.foils] == [1, 3]
    assert q.score(q.draw(1)).checks["turn"] == 0 and q.score(q.draw(1)).checks["same"] == 1


def test_a_sequence_asks_only_for_what_the_embedded_vae_draws():
    answers = [FAMILIES["sequence"].draw(seed).candidates[0] for seed in range(60)]
    assert {figure.colour for figure in answers} == {*draw.COLOURS} - {"pink"}
    assert {figure.level for figure in answers} == {0, 1, 2, 3}
    assert 0 not in {figure.level for figure in answers if figure.shape == "circle"}
    assert "sky" not in {figure.colour for figure in answers if figure.shape == "half"}


# -- pick, partner, count, tictactoe ---------------------------------------------------------------


def test_pick_compares():
    things = tuple(Thing(Figure("cross", "red", level), 0, (0, level)) for level in range(3))
    asked = {
        rule: Pick(4, things, rule).target[1] for rule in ("smallest", "second largest", "largest")
    }
    assert asked == {"smallest": 0, "second largest": 1, "largest": 2}
    dots = tuple(Thing(Figure("circle", "red"), n, (1, n)) for n in (1, 3, 2))
    assert Pick(4, dots, "most dots").target == (1, 3)
    odd = (*(thing._replace(figure=things[0].figure) for thing in things[:2]), things[2])
    assert Pick(4, odd, "odd one").target == (0, 2)


def test_pick_asks_only_for_what_the_embedded_vae_can_mark():
    drawn = [FAMILIES["pick"].draw(seed) for seed in range(80)]
    asked = [q for p in drawn for q in (p, *p.variants())]
    marked = [thing for q in asked for thing in q.things if thing.cell == q.target]
    assert {thing.figure.colour for thing in marked} == {*draw.COLOURS} - {"pink"}
    assert {t.figure.level for t in marked if t.figure.shape == "circle"} == {0, 1, 2}
    assert {t.figure.level for t in marked if t.figure.shape != "circle"} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["pick", "partner"])
def test_variants_keep_what_is_held_out_out_of_training(name):
    for seed in range(40):
        p = FAMILIES[name].draw(seed)
        assert not {q.composition for q in (p, *p.variants())} & p.held_out


def test_a_thing_that_becomes_another_is_not_solved():
    p = Pick(4, tuple(Thing(Figure("half", "red", n), 0, (n, n)) for n in range(4)), "largest")
    q = Pick(
        4,
        (*p.things[:1], p.things[1]._replace(figure=Figure("cross", "red", 1)), *p.things[2:]),
        "largest",
    )
    video = np.concatenate([p.draw(0)[:7], q.draw(0)[7:]])
    assert "has become another" in p.score(video).detail


def test_facts_pair_everything_once():
    names = [name for pair in partner.FACTS for name in pair]
    assert len(set(names)) == len(names) == len(draw.SHAPES) * len(draw.COLOURS)
    assert all(partner.PARTNERS[partner.PARTNERS[name]] == name for name in names)


def test_count_counts_dots_in_all_cells_and_any_cells_are_right():
    p = Count(
        4, ((2, "red", (0, 0)), (1, "sky", (2, 2))), ((Figure("half", "red"), (3, 3)),), False
    )
    assert p.total == 3 and p.ambiguity == comb(13, 3) and len(p.candidates) == 24
    unlisted = next(c for c in _threes(p.free) if c not in p.candidates)
    score = p.score(draw.to_uint8(p.animate(unlisted, puzzles.timeline())))
    assert score.solved and score.answer is None
    assert "4 cells are full and there are 3 dots" in p.score(p.draw(24)).detail
    (q,) = p.variants()
    assert q.ambiguity == 1 and q.candidates == (((0, 1), (0, 2), (0, 3)),)
    shifted = len(q.candidates) + len(q.foils) - 1
    assert "not the first cells" in q.score(q.draw(shifted)).detail


def _threes(cells):
    return (tuple(sorted(three)) for three in permutations(cells, 3))


def test_a_winning_move_makes_three_in_a_row():
    moves = tuple(
        Move(side, cell)
        for side, cell in (
            ("circle", (0, 0)),
            ("circle", (0, 1)),
            ("cross", (1, 1)),
            ("cross", (2, 2)),
        )
    )
    p = TicTacToe(3, moves, ("red", "blue"), "circle")
    assert p.candidates == (Move("circle", (0, 2)),)
    assert Move("cross", (0, 2)) in p.foils and Move("circle", (1, 0)) in p.foils
