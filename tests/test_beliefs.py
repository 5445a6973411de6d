"""The beliefs of the ideal observer, when an answer is decided, and the three behaviours:
identities, and what readouts can find.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicos import puzzles
from minicos.analysis import belief, commitment, counts
from minicos.analysis.behaviours import courses
from minicos.analysis.behaviours.memory import memories
from minicos.analysis.tools import cases, posterior, stats
from minicos.analysis.tools.observer import Observer
from minicos.analysis.tools.readout import RIDGES, readout
from minicos.open import load
from minicos.puzzles.draw import BLOCK, CELL


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def wan(toy):
    return load(toy, device="cpu").with_preset("cos", steps=3, guidance={"high": 1.0, "low": 1.0})


# -- the ideal observer ----------------------------------------------------------------------------


@settings(max_examples=30)
@given(r=st.integers(1, 5), sigma=st.floats(0.02, 1), seed=st.integers(0, 99))
def test_weights_are_bayes_rule(r, sigma, seed):
    z = rand(r, 2, 3, 2, 2, seed=seed)
    x = (1 - sigma) * z[0] + sigma * rand(2, 3, 2, 2, seed=seed + 100)
    w = posterior.weights(x, sigma, z)
    likelihood = (
        torch.distributions.Normal((1 - sigma) * z.double(), sigma)
        .log_prob(x.double())
        .flatten(1)
        .sum(1)
    )
    assert w.sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.allclose(w, likelihood.softmax(0), atol=1e-12)  # measured 3e-16


def test_weights_at_the_ends_of_the_schedule():
    z = rand(4, 2, 3, 2, 2)
    assert torch.equal(
        posterior.weights(rand(2, 3, 2, 2, seed=1), 1.0, z), torch.full((4,), 0.25).double()
    )
    sure = posterior.weights((1 - 1e-3) * z[2] + 1e-3 * rand(2, 3, 2, 2, seed=1), 1e-3, z)
    assert torch.equal(sure, torch.tensor([0, 0, 1, 0]).double())


@settings(max_examples=30)
@given(r=st.integers(1, 5), seed=st.integers(0, 99))
def test_coefficients_of_a_mixture_are_the_mixtures(r, seed):
    z, a = rand(r, 2, 3, 2, 2, seed=seed).double(), rand(r, seed=seed + 100).double()
    a = a - a.mean() + 1 / r  # sums to 1; some are negative
    assert torch.allclose(
        posterior.coefficients(posterior.mean(a, z), z), a, atol=1e-12
    )  # measured 2e-14


def test_outside_is_what_no_mixture_shows():
    z, x = rand(3, 2, 3, 2, 2), rand(2, 3, 2, 2, seed=1)
    mixture = posterior.mean(torch.tensor([0.2, 0.5, 0.3]).double(), z)
    found = belief.belief(x, mixture, 0.8, z)
    assert found.outside < 1e-12
    assert found.departure > 0
    beside = belief.belief(x, x, 0.8, z)
    inside = (posterior.mean(beside.shown, z) - posterior.mean(beside.ideal, z)).square().sum()
    unit = torch.pdist(z.double().flatten(1)).square().mean()
    assert beside.departure == pytest.approx(beside.outside + (inside / unit).item())  # Pythagoras
    ideal = belief.belief(x, posterior.mean(beside.ideal, z), 0.8, z)
    assert ideal.departure < 1e-12
    even = belief.belief(x, z.mean(0), 0.8, z)
    assert even.departure == pytest.approx(even.prior, rel=1e-5)  # z.mean in float32 on one side
    assert belief.belief(0.2 * z[0] + 0.8 * x, z[1], 1e-6, z).departure > 0.3
    with pytest.raises(ValueError, match="one answer"):
        belief.belief(x, x, 0.8, z[:1])


def test_a_distance_of_one_is_another_answer():
    z = rand(2, 2, 3, 2, 2)
    assert belief.belief(z[0], z[1], 1e-3, z).departure == pytest.approx(1)


def test_answers_alive():
    assert posterior.effective(torch.full((3,), 1 / 3)) == pytest.approx(3)
    assert posterior.effective(torch.tensor([1.0, 0.0])) == 1
    assert (
        posterior.effective(torch.tensor([1.5, -0.5])) == 1
    )  # negative coefficients do not count as alive


def test_beliefs_of_a_run(wan):
    batch = cases.held_out("maze", 2, size=3, keep=cases.ambiguous)
    found = belief.beliefs(wan, batch)
    assert {tuple(v.shape) for v in found.values()} == {(2, 3)}
    several = [len(case.puzzle.candidates) for case in batch]
    assert found["ideal"][:, 0].tolist() == pytest.approx(several)  # pure noise tells nothing
    assert found["prior"][:, 0].abs().max() < 1e-12
    assert (found["departure"] >= found["outside"] - 1e-9).all()
    assert found["final"].isnan().all()  # random weights answer nothing


# -- commitment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [2, 3, 5])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_commitment_is_unbiased_and_one_where_completions_agree(several, count):
    """Over all that completions drawn at random can answer, its mean is 0, for any count."""
    draws = torch.randint(several, (20_000, count), generator=torch.Generator().manual_seed(0))
    mean = commitment.commitment(draws, several).mean().item()
    assert mean == pytest.approx(0, abs=0.03)  # measured .012 at most
    one = torch.full((4,), several - 1)
    assert commitment.commitment(one, several).item() == pytest.approx(1)
    invalid = torch.cat([one, torch.tensor([-1, -2])])  # these also count
    assert commitment.commitment(invalid, several).item() == pytest.approx(1)


def test_slopes_by_hand():
    solved = np.array([[0.0, 0, 1], [1, 1, 1], [1, 0, 0]])
    assert counts.slopes(solved, (1, 2, 4)) == pytest.approx([0.5, 0, -0.5])
    assert counts.steepest((1, 2, 4)) == pytest.approx(0.5)
    assert counts.steepest((1, 4, 20)) == pytest.approx(0.237, abs=1e-3)
    assert counts.steepest((4,)) is None and np.isnan(counts.slopes(solved[:, :1], (4,))).all()


def test_one_valid_completion_or_one_answer_says_nothing():
    assert commitment.commitment(torch.tensor([0, -1, -3]), 2).isnan()
    assert commitment.commitment(torch.tensor([0, 0]), 1).isnan()


def test_corrections_by_hand():
    answers = np.array([[[-2, -2], [0, -2]], [[0, 1], [-1, 0]], [[-2, -1], [0, 0]]])
    ends = np.array([0, -2, -1])  # valid, a foil, nothing clear
    assert commitment.corrected(answers, ends).tolist() == [[1, 0.5], [-1, -0.5], [0, 0]]


def test_independent_errors_are_no_corrections():
    rng = np.random.default_rng(0)
    answers = np.where(rng.random((4000, 1, 1)) < 0.2, -2, 0)
    ends = np.where(rng.random(4000) < 0.2, -2, 0)
    wrong = (answers[:, 0, 0] < -1) & (ends >= 0)
    assert wrong.mean() > 0.12  # wrong early, right late, without any correction
    assert abs(commitment.corrected(answers, ends).mean()) < 0.02


def test_renoising_keeps_the_estimate_alone(wan):
    """A network that answers noise - x0 gives x0 back: x0 = x - sigma v."""
    condition = wan.condition("solve the maze", torch.rand(3, 32, 48))
    _, step = (s for _, s in zip(range(2), wan.sample(condition, seed=0), strict=False))
    first, second = commitment.renoise(step, [5, 6])
    assert not torch.equal(first, second)
    eps = torch.randn(step.x.shape, generator=torch.Generator().manual_seed(5))
    again = first - step.sigma_map * (eps - step.x0)
    assert (again - step.x0).abs().max() < 1e-5 * step.x0.abs().max()
    same = commitment.renoise(
        SimpleNamespace(x=step.x, x0=step.x0, sigma_map=0 * step.sigma_map), [5]
    )[0]
    assert torch.equal(same, step.x0)  # an imposed frame stays


def test_completions_of_a_network_that_knows_nothing(wan):
    batch = cases.held_out("maze", 1, size=3, keep=cases.ambiguous)
    found = commitment.completions(wan, batch, (2, 0), count=2)
    assert found["answers"].shape == (1, 2, 2)
    assert (found["answers"] == -1).all() and (found["ends"] == -1).all()
    condition = wan.condition("solve the maze", torch.rand(3, 32, 32))
    noise = wan.noise(condition, 0)
    *_, last = wan.sample(condition, noise=noise)
    assert torch.equal(commitment.complete(wan, condition, noise, 0), last.next)


# -- perception before action ----------------------------------------------------------------------


def test_where_and_how_by_hand():
    found = {
        "wrong": np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], bool),
        "leads": np.array([[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]),
        "right": np.array([True, True, False]),
    }
    where, how = courses.decided(found)
    assert where[:2].tolist() == [2, 0]
    assert how[:2].tolist() == [1, 3]
    assert np.isnan(where[2]) and np.isnan(how[2])  # a video that is not right


def test_the_leading_hypothesis_is_the_nearest():
    z = rand(4, 2, 3, 2, 2)
    assert [courses.leading(z[i] + 0.1 * rand(2, 3, 2, 2, seed=9), z) for i in range(4)] == [
        0,
        1,
        2,
        3,
    ]


def test_hypotheses_are_valid_answers_and_then_other_prompts(wan):
    puzzle = puzzles.make("mark", 0, size=3)
    z = courses.hypotheses(wan, puzzle)
    assert len(z) == len(puzzle.items)
    assert torch.equal(z[:1], posterior.answers(wan, puzzle))


def test_an_ideal_observer_is_never_wrong_where(wan):
    batch = cases.held_out("mark", 2, size=3)
    found = courses.follow(Observer.of(wan), batch)
    assert not found["wrong"].any()
    assert courses.follow(wan, batch)["wrong"].shape == (2, 3)


def test_settling():
    far = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    assert stats.settled(far).tolist() == [4, 0, 5]


# -- working memory --------------------------------------------------------------------------------


def test_a_readout_finds_a_linear_code_and_no_shuffled_one():
    draw = np.random.default_rng(0)
    told = torch.from_numpy(draw.integers(0, 4, 400))
    x = rand(4, 128)[told] * 0.5 + rand(400, 128, seed=1)
    found, left_out = readout(x[:300], told[:300], x[300:], 4)
    right = (found == told[300:]).double().mean().item()
    assert right > 0.9  # measured 1.00, and 0.997 left out
    assert abs(left_out - right) < 0.1  # what the training rows promise holds
    shuffled = torch.from_numpy(draw.permutation(told[:300].numpy()))
    found, left_out = readout(x[:300], shuffled, x[300:], 4)
    assert (
        found == told[300:]
    ).double().mean() < 0.4  # measured 0.25, which is chance; its deviation is 0.04
    assert left_out < 0.4  # measured 0.30


def test_rows_left_out_are_left_out():
    x, told = rand(12, 5), torch.arange(12) % 3
    _, promised = readout(x, told, x, 3)
    pinned = RIDGES
    rates = []
    for (
        ridge
    ) in pinned:  # the closed form leaves centre and scale as they are, and so does this loop
        z = ((x - x.mean(0)) / x.std(0)).double()
        z = torch.cat([z, torch.ones(12, 1)], 1)
        penalty = torch.diag(torch.tensor([ridge] * 5 + [0.0])).double()
        y = torch.nn.functional.one_hot(told, 3).double()
        out = []
        for i in range(12):
            rest = torch.arange(12) != i
            out.append(
                z[i] @ torch.linalg.solve(z[rest].T @ z[rest] + penalty, z[rest].T @ y[rest])
            )
        out = torch.stack(out)
        rates.append(
            ((out - y).square().sum().item(), (out.argmax(1) == told).double().mean().item())
        )
    assert promised == min(rates)[1]


def test_what_the_tokens_behind_the_wall_hold(wan):
    batch = cases.held_out("memory", 3, size=4)
    found = memories(wan, batch, (1, 0))
    assert found["states"].shape == (3, 2, 13, 3, 128)
    assert found["drawn"].shape == (3, 3, 64)
    single = memories(wan, batch[1:2], (0,))
    assert torch.allclose(found["states"][1, 1], single["states"][0, 0], atol=1e-4)
    assert found["labels"].shape == (3, 2)


@pytest.mark.parametrize("size", [3, 4])
def test_hidden_cells_are_the_movers_lane_under_the_block(size):
    directions = set()
    for seed in range(60):
        puzzle = puzzles.make("memory", seed, size=size)
        (r0, c0), (r1, c1) = puzzle.mover.cell, puzzle.stop
        directions.add((np.sign(r1 - r0), np.sign(c1 - c0)))
        block = (puzzle.first_frame() == BLOCK).all(-1)
        covered = {
            (r, c)
            for r in range(size)
            for c in range(size)
            if block[r * CELL + 2 : (r + 1) * CELL - 2, c * CELL + 2 : (c + 1) * CELL - 2].all()
        }
        lane = {cell for cell in covered if (cell[0] == r0 if r0 == r1 else cell[1] == c0)}
        assert set(puzzle.hidden_cells()) == lane
        assert lane
    assert len(directions) == 4


def test_answers_that_are_mixtures_of_others_are_not_weighed():
    z = torch.randn(4, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert posterior.apart(z) and posterior.apart(z[:2])
    mixed = torch.cat([z, z[:1] + z[1:2] - z[2:3] + 0.001 * z[3:]])
    assert not posterior.apart(mixed)
