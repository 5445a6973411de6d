"""The numbers behind claims, against textbook forms and known answers."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicos.analysis.tools import stats


def latents(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        n, 2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(seed)
    )  # n b c f h w


def test_distance_is_zero_for_the_same_and_one_for_another_seed():
    runs = list(latents(40))
    unit = stats.yardstick(runs)
    assert (stats.distance(stats.squared(runs[0], runs[0]), unit) == 0).all()
    pairs = combinations(runs, 2)
    each = torch.stack([stats.distance(stats.squared(a, b), unit) for a, b in pairs])
    torch.testing.assert_close(each.mean(0), torch.ones(2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_distance_looks_at_the_chosen_frames_only():
    a, b, c = latents(3)
    unit = stats.yardstick([a, b, c])
    changed = b.clone()
    changed[:, :, 2] += 1
    before, after = stats.squared(a, b), stats.squared(a, changed)
    some = [0, 1, 3]
    assert torch.equal(stats.distance(before, unit, some), stats.distance(after, unit, some))
    assert (stats.distance(before, unit) != stats.distance(after, unit)).all()


def test_one_run_is_no_yardstick():
    with pytest.raises(ValueError, match="two seeds"):
        stats.yardstick(list(latents(1)))


def naive_cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Song et al. 2012, eq. 5, with the n x n matrices written out."""

    def hsic(k, m):
        n, one = len(k), torch.ones(len(k), dtype=k.dtype)
        k, m = k - k.diag().diag(), m - m.diag().diag()
        total = (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    k, m = (x.double() @ x.double().T for x in (a, b))
    return (hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()).item()


@settings(max_examples=25)
@given(
    n=st.integers(4, 20),
    p=st.integers(1, 9),
    q=st.integers(1, 9),
    seed=st.integers(0, 99),
    mean=st.floats(-3, 3),
)
def test_cka_without_the_large_matrix(n, p, q, seed, mean):
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(n, p, generator=draw) + mean
    b = torch.randn(n, q, generator=draw) + a[:, :1]
    expected = naive_cka(a, b)
    if np.isfinite(expected):
        assert stats.cka(a, b) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_cka_of_a_turned_cloud_is_one_and_of_unrelated_clouds_zero():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(64, 128, generator=draw)
    turned = 3 * a @ torch.linalg.qr(torch.randn(128, 128, generator=draw))[0] + 5
    assert stats.cka(a, turned) == pytest.approx(1, abs=1e-5)
    unrelated = [
        stats.cka(torch.randn(64, 128, generator=draw), torch.randn(64, 128, generator=draw))
        for _ in range(50)
    ]
    assert abs(np.mean(unrelated)) < 0.02  # measured 0.003; the biased estimator gives .65


def test_auroc():
    assert stats.auroc(np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1])) == 1
    assert stats.auroc(np.array([1, 1, 1, 1]), np.array([0, 1, 0, 1])) == 0.5
    rng = np.random.default_rng(0)
    values, positive = rng.integers(0, 6, 60), rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in values[positive] for b in values[~positive]]
    assert stats.auroc(values, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(stats.auroc(values, np.zeros(60)))


def test_paired_is_the_interval_of_the_differences():
    a, b = np.random.default_rng(0).random((2, 50))
    assert stats.paired(a, b) == stats.average(a - b, signed=True)
    assert stats.paired(a, a).low < 0 < stats.paired(a, a).high


def test_the_interval_of_a_share_lies_within_its_scale():
    values = [1, 1, 0.5, 1, 1, 1]
    assert stats.mean("some", values).high > 1
    found = stats.mean("some", values, unit="share")
    assert found.high == 1 and 0 < found.low < found.value


def test_what_has_no_value_is_left_out():
    assert stats.average(np.array([1.0, np.nan, 0.0])).n == 2
    assert stats.average(np.array([np.nan])).n == 0
    assert stats.unpaired([np.nan], [1.0]).n == 0


def test_the_same_test_for_different_puzzles():
    rng = np.random.default_rng(0)
    pairs = [stats.p_unpaired(*rng.normal(0, 1, (2, 20)), resamples=300) for _ in range(150)]
    assert 0.01 < np.mean(np.array(pairs) < 0.05) < 0.10  # measured .047
    assert stats.p_unpaired(rng.normal(1, 1, 40), rng.normal(0, 1, 50), resamples=2000) < 0.001


def test_p_value_under_the_null_is_uniform_and_under_an_effect_small():
    rng = np.random.default_rng(0)
    null = [stats.p_value(d, resamples=500) for d in rng.normal(0, 1, (200, 30))]
    assert 0.01 < np.mean(np.array(null) < 0.05) < 0.10  # measured .045
    assert stats.p_value(rng.normal(1, 1, 50)) < 0.001
    assert stats.p_value(np.zeros(10)) == 1


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9]) == [0.9]
    assert stats.holm([]) == []


def test_resolvable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    effect = stats.resolvable(1.0, 100)
    found = np.mean(
        [abs(x.mean()) > 1.96 * x.std(ddof=1) / 10 for x in rng.normal(effect, 1, (2000, 100))]
    )
    assert found == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("n", "banded"), [(5, False), (6, True)])
def test_a_curve_of_few_cases_has_no_band(n, banded):
    curve = stats.curve("c", np.random.default_rng(0).random((n, 4)), range(4))
    assert len(curve.value) == 4
    assert len(curve.low) == len(curve.high) == (4 if banded else 0)
