"""The numbers behind every claim: how far apart two runs are, and how certain a mean is.

Distances are between latents or hidden states, means are over puzzles. A headline is a paired
difference: both arms of a comparison use the same puzzles and the same noise. Intervals are those
of `intervals`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import erfc, nan
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.result import Curve, Interval, Number
from minicos.analysis.tools import intervals

Values = Sequence[float] | np.ndarray  # one for each puzzle
Array = TypeVar("Array", Tensor, np.ndarray)

MANY = 2000  # number of puzzles above which tests use the normal limit

# -- how far apart ---------------------------------------------------------------------------------


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of two latents (b c f h w) in every latent frame: b f, float64."""
    return (a.double() - b.double()).square().sum(dim=(1, 3, 4))


def yardstick(estimates: Sequence[Tensor]) -> Tensor:
    """Mean squared distance between runs of independent seeds, per frame (b f): the unit of D, "as
    different as another seed".

    `estimates` are the clean estimates (b c f h w) of at least two seeds at one step.
    """
    if len(estimates) < 2:
        raise ValueError("a yardstick needs the runs of two seeds or more")
    return torch.stack([squared(a, b) for a, b in combinations(estimates, 2)]).mean(0)


def distance(apart: Array, unit: Array, frames: Sequence[int] | None = None) -> Array:
    """D between runs: 0 the same, 1 as different as another seed.

    This is the primary measure. Latents of two runs share their coordinates, so a measure that is
    invariant to rotation has no advantage.

    Args:
        apart: squared distances per latent frame (`squared`), ... f.
        unit: those of independent seeds (`yardstick`, or a pooled mean), ... f.
        frames: use only these frames (imposed ones should be excluded); None: all.

    Returns:
        D, of shape ...
    """
    chosen = slice(None) if frames is None else list(frames)
    return apart[..., chosen].sum(-1) / unit[..., chosen].sum(-1)


def cka(a: Tensor, b: Tensor) -> float:
    """Debiased linear CKA of two sets of n paired rows, a (n p) and b (n q): 1 for equal geometry,
    about 0 for unrelated rows.

    Uses the unbiased HSIC estimator (Song et al. 2012, eq. 5) in feature space, so no n x n matrix
    is formed. The biased estimator gives .65 for independent Gaussians at n = 64, p = 128. The
    paper's "CKA dissimilarity" is interpreted as 1 - CKA.
    """
    a, b = a.double(), b.double()
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA needs the same rows twice, four or more: {len(a)} and {len(b)}")
    # centring changes nothing in exact arithmetic, and improves accuracy
    a, b = a - a.mean(0), b - b.mean(0)
    return (_hsic(a, b) / (_hsic(a, a) * _hsic(b, b)).clamp_min(0).sqrt()).item()


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased HSIC for the kernels a a^T and b b^T without their diagonals, up to the factor 1 /
    (n (n - 3)).
    """
    n, na, nb = len(a), a.square().sum(1), b.square().sum(1)
    rows_a, rows_b = a @ a.sum(0) - na, b @ b.sum(0) - nb  # row sums of the two kernels
    trace = (a.T @ b).square().sum() - (na * nb).sum()
    return (
        trace
        + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (rows_a * rows_b).sum()
    )


def massive(h: Tensor) -> Tensor:
    """Channels of tokens h (... l d) whose mean size is above 100 times the median channel's: bool
    ... d. They are few, and nearly equal on all tokens.
    """
    size = h.abs().mean(-2)
    return size > 100 * size.median(-1, keepdim=True).values


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive has a larger value than a negative (ties count half); NaN if
    one kind is missing.
    """
    values, positive = np.ravel(values), np.ravel(positive).astype(bool)
    up, down = int(positive.sum()), int((~positive).sum())
    if not up or not down:
        return float("nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # 1..n, ties sharing their mean rank
    return float((ranks[positive].sum() - up * (up + 1) / 2) / (up * down))


def settled(far: np.ndarray) -> np.ndarray:
    """The step from which on the run stays near: far bool (n N ...) -> n ..., from 0 (never far) to
    N (far until the end).
    """
    return np.where(far.any(1), far.shape[1] - far[:, ::-1].argmax(1), 0)


# -- how certain -----------------------------------------------------------------------------------


def resampled(n: int, *, seed: int = 0, resamples: int = 10_000) -> np.ndarray:
    """The weight of each of n cases in resampled means: resamples n. Used for the position of a
    peak or of a crossing, for which there is no formula.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


def average(values: Values, span: float | None = None, *, signed: bool = False) -> Interval:
    """The mean of `values`, one for each puzzle, with its interval (`intervals.interval`); NaN
    values are excluded.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"one number for each puzzle, not {values.shape}")
    values = values[np.isfinite(values)]
    return (
        intervals.interval(values, span, signed=signed)
        if len(values)
        else Interval(nan, nan, nan, 0)
    )


def paired(a: Values, b: Values) -> Interval:
    """The mean difference a - b on the same puzzles."""
    return average(np.subtract(a, b, dtype=np.float64), signed=True)


def unpaired(a: Values, b: Values, span: float | None = None) -> Interval:
    """The mean of a minus the mean of b, for different puzzles; n is the smaller number of them."""
    arms = [np.asarray(values, dtype=np.float64) for values in (a, b)]
    arms = [arm[np.isfinite(arm)] for arm in arms]
    n = min(map(len, arms))
    if not n:
        return Interval(nan, nan, nan, 0)
    if span is None and all(np.isin(arm, (0, 1)).all() for arm in arms):
        (x, y), (p, q) = (int(arm.sum()) for arm in arms), map(len, arms)
        low, high = intervals.two_proportions(x, p, y, q)
    else:
        low, high = intervals.apart(*(average(arm, span) for arm in arms))
    return Interval(float(arms[0].mean() - arms[1].mean()), low, high, n)


def mean(
    name: str, values: Values, note: str = "", unit: str = "", span: float | None = None
) -> Number:
    """The mean over puzzles as a finding; n is the number of values. A share has an interval within
    0 to 1.
    """
    found = average(values, span)
    if unit == "share" and found.n:
        found = replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return Number.of(name, found, unit=unit, note=note)


def difference(
    name: str, a: Values, b: Values, note: str = "", unit: str = "", span: float | None = None
) -> Number:
    """The mean of a - b on the same puzzles as a finding, with its p value and the smallest
    difference that this number of puzzles can resolve.
    """
    d = np.subtract(a, b, dtype=np.float64)
    seen = d[np.isfinite(d)]
    # no power is claimed if all puzzles give the same difference: scatter that was not observed is
    # not zero
    scatter = float(seen.std()) if len(seen) else 0.0
    power = resolvable(scatter, len(seen)) if scatter > 0 else nan
    p = p_value(seen) if len(seen) else nan
    found = Number.of(name, average(d, span, signed=True), unit=unit, note=note)
    return replace(found, resolvable=power, p=p)


def between(
    name: str, a: Values, b: Values, note: str = "", unit: str = "", span: float | None = None
) -> Number:
    """The mean of a minus the mean of b, for different puzzles, as a finding with its p value."""
    found = Number.of(name, unpaired(a, b, span), unit=unit, note=note)
    return replace(found, p=p_unpaired(a, b)) if found.n else found


def compared(
    name: str, arms: Mapping[str, Values], note: str = "", unit: str = "", span: float | None = None
) -> list[Number]:
    """An effect (one number for each puzzle, 0: none) for each model: the network first and, if it
    was run, the ideal observer, with their paired difference.
    """
    found = [
        difference(f"{name}: {who}", values, np.zeros(len(values)), note, unit, span)
        for who, values in arms.items()
    ]
    if len(arms) > 1:
        (ours, a), (theirs, b) = arms.items()
        found.append(difference(f"{name}: {ours} minus {theirs}", a, b, theirs, unit, span))
    return found


def curve(
    name: str,
    values: np.ndarray,
    x: Sequence[float] | np.ndarray,
    x_label: str = "",
    unit: str = "",
) -> Curve:
    """Means over cases along an axis with their intervals: values (cases x); cases with a NaN are
    excluded.

    With five cases or fewer there are no intervals: whether values repeat would decide how wide
    they are, so a band would jump from point to point.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values).all(1)]
    found = [average(column) for column in values.reshape(len(values), len(x)).T]
    bands = found if len(values) > intervals.LEVELS else []
    return Curve(
        name,
        tuple(float(at) for at in x),
        tuple(at.value for at in found),
        tuple(at.low for at in bands),
        tuple(at.high for at in bands),
        x_label,
        unit,
    )


def p_value(differences: Values, *, seed: int = 0, resamples: int = 10_000) -> float:
    """Two-sided sign-flip test of paired differences: how often random signs give a mean at least
    this large. Exact (McNemar's test) if they are -1, 0 or 1; the normal limit for more than MANY
    puzzles.
    """
    d = np.asarray(differences, dtype=np.float64)
    if np.isin(d, (-1, 0, 1)).all():
        return intervals.mcnemar(int((d == 1).sum()), int((d == -1).sum()))
    if len(d) > MANY:
        return _normal(d.sum() / np.square(d).sum() ** 0.5)
    signs = np.random.default_rng(seed).integers(0, 2, (resamples, len(d))) * 2 - 1
    return float((1 + (np.abs(signs @ d) >= np.abs(d.sum()) - 1e-12).sum()) / (1 + resamples))


def p_unpaired(a: Values, b: Values, *, seed: int = 0, resamples: int = 10_000) -> float:
    """Two-sided permutation test of two means: how often puzzles assigned at random to the two arms
    differ at least as much; the normal limit for more than MANY puzzles.
    """
    arms = [np.asarray(values, dtype=np.float64) for values in (a, b)]
    arms = [arm[np.isfinite(arm)] for arm in arms]
    pooled, n, seen = np.concatenate(arms), len(arms[0]), abs(arms[0].mean() - arms[1].mean())
    if len(pooled) > MANY:
        scatter = pooled.std() * (1 / n + 1 / len(arms[1])) ** 0.5
        return _normal(seen / scatter) if scatter else 1.0
    rng = np.random.default_rng(seed)
    sums = np.array([rng.permutation(pooled)[:n].sum() for _ in range(resamples)])
    apart = np.abs(sums / n - (pooled.sum() - sums) / len(arms[1]))
    return float((1 + (apart >= seen - 1e-12).sum()) / (1 + resamples))


def _normal(z: float) -> float:
    """Two-sided p value of a standard normal."""
    return erfc(abs(float(z)) / 2**0.5)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction: p values that may be compared with one level although several hypotheses
    were tested.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def resolvable(deviation: float, n: int) -> float:
    """The smallest true mean difference that n puzzles detect with 80 % power at the 5 % level,
    given the standard deviation of one difference.
    """
    return 2.802 * deviation / n**0.5  # 1.960 + 0.842
