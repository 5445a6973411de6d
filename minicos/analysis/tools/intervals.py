"""95 % intervals with correct coverage: exact or score methods, never of width zero.

A bootstrap resamples the observations. If 25 puzzles all agree, it gives an interval of width zero,
and for rare events it covers the truth only half of the time. Instead:

    proportion       of n trials: Clopper and Pearson 1934, exact
    paired           two proportions of the same puzzles, +1, 0, -1 for each: Tango 1998, score
    two_proportions  of different puzzles: Newcombe 1998, method 10, Wilson's intervals combined
    mean             of other values: Student's t; if only a few distinct values were observed, at
                     least as wide as for an event that n trials may have missed

`interval` chooses the method by the values. The coverage of each is simulated in
`tests/test_intervals.py`.
"""

from collections.abc import Callable
from fractions import Fraction
from math import comb, lgamma, sqrt

import numpy as np

from minicos.analysis.result import Interval

Z = 1.959964  # the 97.5 % point of the normal distribution
LEVELS = 5  # with so few distinct values, rare ones may be hidden
Bounds = tuple[float, float]


def interval(values: np.ndarray, span: float | None = None, *, signed: bool = False) -> Interval:
    """The mean of one value for each puzzle (n,), with the appropriate interval.

    Args:
        span: length of the scale of the values. None: values that are all 0 or 1 are a proportion,
            all -1, 0 or 1 a paired difference of proportions, and others have a scale as long as
            their range, or 1.
        signed: whether the values are differences, which might be negative although none is.

    Raises:
        ValueError: the values have another shape, are empty, or are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"one finite number for each puzzle, not {values.shape}")
    n = len(values)
    if span is None and not signed and np.isin(values, (0, 1)).all():
        low, high = proportion(int(values.sum()), n)
    elif span is None and np.isin(values, (-1, 0, 1)).all():
        low, high = paired(int((values == 1).sum()), int((values == -1).sum()), n)
    else:
        low, high = mean(values, span)
    return Interval(float(values.mean()), low, high, n)


def proportion(successes: int, n: int) -> Bounds:
    """The exact interval of `successes` in n trials; its coverage is at least 95 %."""
    k = np.arange(n + 1)
    log_ways = np.array([float(_log_comb(n, int(i))) for i in k])

    def at_least(p: float) -> float:  # successes or more
        return float(np.exp(log_ways + _powers(k, n, p))[successes:].sum())

    def at_most(p: float) -> float:  # successes or fewer
        return float(np.exp(log_ways + _powers(k, n, p))[: successes + 1].sum())

    low = 0.0 if successes == 0 else _root(lambda p: at_least(p) - 0.025, 0.0, 1.0)
    high = 1.0 if successes == n else _root(lambda p: 0.025 - at_most(p), 0.0, 1.0)
    return low, high


def paired(up: int, down: int, n: int) -> Bounds:
    """The interval of (up - down) / n, where `up` of n puzzles went from 0 to 1 and `down` from 1
    to 0: all differences d that the score test of Tango (Statistics in Medicine 17, 1998) does not
    reject.
    """

    def statistic(d: float) -> float:
        a = 2 * n
        b = -up - down + (2 * n - up + down) * d
        c = -down * d * (1 - d)
        fewer = max((sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a), 0.0)
        variance = n * (2 * fewer + d * (1 - d))
        return (up - down - n * d) / sqrt(max(variance, 1e-12))

    seen = (up - down) / n
    low = -1.0 if down == n else _root(lambda d: Z - statistic(d), -1 + 1e-9, seen)
    high = 1.0 if up == n else _root(lambda d: -Z - statistic(d), seen, 1 - 1e-9)
    return low, high


def wilson(successes: int, n: int) -> Bounds:
    """The score interval of `successes` in n trials."""
    rate, z2 = successes / n, Z**2 / n
    half = Z * sqrt((rate * (1 - rate) + z2 / 4) / n)
    return (rate + z2 / 2 - half) / (1 + z2), (rate + z2 / 2 + half) / (1 + z2)


def two_proportions(a: int, n: int, b: int, m: int) -> Bounds:
    """The interval of a / n - b / m, for different puzzles."""
    return apart(Interval(a / n, *wilson(a, n), n), Interval(b / m, *wilson(b, m), m))


def apart(a: Interval, b: Interval) -> Bounds:
    """The interval of the difference of two independent numbers, from the interval of each."""
    difference = a.value - b.value
    low = difference - sqrt((a.value - a.low) ** 2 + (b.high - b.value) ** 2)
    high = difference + sqrt((a.high - a.value) ** 2 + (b.value - b.low) ** 2)
    return low, high


def mean(values: np.ndarray, span: float | None = None) -> Bounds:
    """The interval of the mean of values on a scale of length `span`; a single value: the scale."""
    n, seen = len(values), np.unique(values.round(12))  # ignore differences in the last bits
    span = span or float(np.ptp(seen)) or 1.0
    middle = float(values.mean())
    if n == 1:
        return middle - span, middle + span
    half = student(n - 1) * float(values.std(ddof=1)) / sqrt(n)
    if len(seen) <= LEVELS:
        half = max(half, span * (1 - 0.025 ** (1 / n)))
    return middle - half, middle + half


def student(df: int) -> float:
    """The 97.5 % point of Student's t with df >= 1 degrees of freedom: exact for 1 and 2, then the
    Cornish-Fisher expansion (within .01 at 3, .0001 at 10).
    """
    if df == 1:
        return 12.706205
    if df == 2:
        return 4.302653
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df**k for k, term in enumerate(terms, start=1))


def mcnemar(up: int, down: int) -> float:
    """Two-sided exact p value of `up` against `down` changes under equal probabilities."""
    n, k = up + down, min(up, down)
    below = sum(comb(n, i) for i in range(k + 1))  # integers, too large for a float
    return min(1.0, float(Fraction(2 * below, 2**n)))


def _log_comb(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _powers(k: np.ndarray, n: int, p: float) -> np.ndarray:
    """log(p^k (1 - p)^(n - k)) with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        yes, no = k * np.log(p), (n - k) * np.log1p(-p)
    return np.where(k == 0, 0.0, yes) + np.where(k == n, 0.0, no)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """The zero of an increasing function between low and high, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
