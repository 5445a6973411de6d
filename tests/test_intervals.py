"""Intervals have their nominal coverage, and never width zero."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicos.analysis.tools import intervals, stats


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0, 0.3085), (5, 10, 0.1871, 0.8129), (6, 6, 0.5407, 1), (81, 263, 0.2527, 0.3676)],
)
def test_clopper_pearson_against_tables(k, n, low, high):
    assert intervals.proportion(k, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("n", [6, 25, 100])
@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.5, 0.9])
def test_a_proportion_covers_in_95_of_100_samples(n, p):
    """Not simulated: the sum over all outcomes."""
    covered = 0.0
    for k in range(n + 1):
        low, high = intervals.proportion(k, n)
        covered += (low <= p <= high) * comb(n, k) * p**k * (1 - p) ** (n - k)
    assert covered >= 0.95


def test_wilson_and_newcombe_against_published_examples():
    assert intervals.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    # Newcombe 1998, table II, example a, method 10
    assert intervals.two_proportions(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)


@pytest.mark.parametrize(("up", "down", "n"), [(9, 0, 44), (3, 8, 30), (0, 0, 25), (1, 1, 6)])
def test_the_ends_of_a_paired_interval_are_where_the_score_test_rejects(up, down, n):
    """With the likelihood maximised on a grid instead of by Tango's formula."""
    for end, z in zip(intervals.paired(up, down, n), (1.96, -1.96), strict=True):
        fewer = np.linspace(max(0, -end), (1 - end) / 2, 200_001)[1:-1]  # P(-1); P(+1) = + end
        rest = 1 - 2 * fewer - end
        with np.errstate(divide="ignore", invalid="ignore"):
            fit = up * np.log(fewer + end) + down * np.log(fewer) + (n - up - down) * np.log(rest)
        best = fewer[np.nanargmax(fit)]
        statistic = (up - down - n * end) / np.sqrt(n * (2 * best + end - end**2))
        assert statistic == pytest.approx(z, abs=2e-3)


@pytest.mark.parametrize(
    ("n", "up", "down"),
    [
        (25, 0.04, 0.0),
        (25, 0.03, 0.01),
        (25, 0.3, 0.1),
        (100, 0.01, 0.0),
        (100, 0.15, 0.08),
        (100, 0.0, 0.0),
    ],
)
def test_paired_differences_cover(n, up, down):
    """Where a percentile bootstrap covers .65, .53, ... of samples."""
    draws = np.random.default_rng(0).multinomial(n, [up, down, 1 - up - down], 2000)
    found = {(u, d): intervals.paired(u, d, n) for u, d, _ in set(map(tuple, draws.tolist()))}
    bounds = np.array([found[u, d] for u, d, _ in draws.tolist()])
    covered = np.mean((bounds[:, 0] <= up - down) & (up - down <= bounds[:, 1]))
    assert covered >= 0.93  # measured .938 to 1


def _normal(rng, shape):
    return rng.normal(0.3, 1, shape), 0.3


def _skewed(rng, shape):
    return rng.exponential(1, shape), 1.0


def _levels(rng, shape):
    return rng.choice([-1, -0.5, 0, 0.5, 1], shape, p=[0.05, 0.05, 0.7, 0.1, 0.1]), 0.1 - 0.05 / 2


def _rare(rng, shape):
    return rng.choice([0, 0.5, 1], shape, p=[0.97, 0.02, 0.01]), 0.02


@pytest.mark.parametrize("draw", [_normal, _skewed, _levels, _rare])
@pytest.mark.parametrize("n", [25, 100])
def test_means_cover(draw, n):
    values, truth = draw(np.random.default_rng(1), (1000, n))
    bounds = np.array([intervals.mean(row, 2.0 if draw is _levels else None) for row in values])
    covered = np.mean((bounds[:, 0] <= truth) & (truth <= bounds[:, 1]))
    assert covered >= 0.92  # measured .925 (exponential, n = 25) to 1


def test_proportions_of_different_puzzles_cover():
    rng = np.random.default_rng(2)
    a, b = rng.binomial(40, 0.9, 1000), rng.binomial(60, 0.97, 1000)
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    bounds = np.array([intervals.two_proportions(x, 40, y, 60) for x, y in pairs])
    assert np.mean((bounds[:, 0] <= -0.07) & (bounds[:, 1] >= -0.07)) >= 0.93  # measured .97


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=40),
    st.sampled_from([None, 2.0]),
)
def test_no_interval_has_width_zero_and_each_holds_its_mean(values, span):
    found = intervals.interval(np.array(values), span)
    assert found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high
    assert found.high - found.low > 1 / (2 * len(values))


def test_last_bits_make_no_interval_narrow():
    low, high = intervals.mean(np.array([0.0, 1e-17, 0.0, -1e-17]))
    assert high - low > 1


def test_values_decide_which_interval_it_is():
    ones, mixed = np.array([0.0, 1, 1]), np.array([-1.0, 0, 1])
    assert intervals.interval(ones).low == intervals.proportion(2, 3)[0]
    assert intervals.interval(mixed).low == intervals.paired(1, 1, 3)[0]
    assert intervals.interval(ones, signed=True).low == intervals.paired(2, 0, 3)[0]
    assert intervals.interval(ones, span=20).low == intervals.mean(ones, 20)[0]
    for wrong in (np.array([]), np.array([np.nan]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="one finite number"):
            intervals.interval(wrong)


@pytest.mark.parametrize(("df", "t"), [(1, 12.7062), (3, 3.1824), (10, 2.2281), (99, 1.9842)])
def test_student(df, t):
    assert intervals.student(df) == pytest.approx(t, abs=0.01)


def test_mcnemar_is_the_sign_flip_test_of_binary_differences():
    assert intervals.mcnemar(5, 0) == pytest.approx(0.0625)
    assert intervals.mcnemar(0, 0) == 1
    d = np.array([1] * 9 + [-1] * 2 + [0] * 20)
    assert stats.p_value(d) == pytest.approx(intervals.mcnemar(9, 2))
