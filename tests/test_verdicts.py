"""Every headline can come out either way: synthetic measurements in which its claim is true, false,
and undecidable go through the functions that the studies use, to its verdict.
"""

import json
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from minicos.analysis import behaviours, belief, commitment, counts, energy, plant, recall, steps
from minicos.analysis.behaviours import courses
from minicos.analysis.claims import CLAIMS
from minicos.analysis.ensemble import study as ensemble
from minicos.analysis.ensemble.share import Ensemble
from minicos.analysis.noise import study as noise
from minicos.analysis.reproduce import parts
from minicos.analysis.result import Number, Result, markdown
from minicos.analysis.tools import cases, stats
from minicos.analysis.tools.observer import IDEAL, NETWORK
from minicos.analysis.verdicts import (
    FIELDS,
    LEVEL,
    NOT,
    OPEN,
    SUPPORTED,
    Claim,
    Need,
    judge,
    main,
    table,
    verdict,
)
from minicos.runs import write_json

N = 100
HEADLINES = [claim for claim in CLAIMS if claim.headline]


def number(value: float, low: float, high: float, p: float = nan, n: int = N) -> Number:
    return Number("effect", value, low, high, n, p=p)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (number(0.3, 0.2, 0.4, 0.001), SUPPORTED),
        (number(0.3, 0.2, 0.4, 0.06), OPEN),  # not after the correction
        (number(0.3, -0.1, 0.7, 0.03), OPEN),
        (number(0.02, 0.01, 0.03, 0.001), NOT),  # present, but too small to matter
        (number(-0.3, -0.4, -0.2, 0.001), NOT),
        (number(0.0, -0.02, 0.02, 1.0), NOT),
        (number(0.05, -0.1, 0.2, 0.4), OPEN),
        (number(nan, nan, nan, nan), OPEN),
        (number(nan, nan, nan, 0.001, 0), OPEN),
    ],
)
def test_verdicts_by_hand(found, expected):
    assert verdict(found, found.p, least=0.1) == expected


def claim(name: str, headline: bool = True, **rest) -> Claim:
    return Claim(name, "Fig. 1", "a/b", name, 0.1, "nothing", headline=headline, **rest)


def test_headlines_are_corrected_together_and_other_lines_are_not():
    numbers = [Number(str(k), 0.3, 0.1, 0.5, N, p=0.02) for k in range(4)]
    result = {"a/b": Result("x", {}, numbers)}
    claims = [claim("0"), claim("1"), claim("2"), claim("3", headline=False)]
    found = judge(claims, result, {"a/b": "minicos x"})
    assert [f.p for f in found] == pytest.approx([0.06, 0.06, 0.06, 0.02])
    assert [f.verdict for f in found] == [OPEN, OPEN, OPEN, SUPPORTED]
    (alone,) = judge(claims[:1], result, {"a/b": "minicos x"})
    assert alone.verdict == SUPPORTED
    assert judge(claims, {}, {}) == []  # what was not made is not judged


def test_a_need_that_is_missed_leaves_it_open_and_says_why():
    numbers = [Number("0", 0.3, 0.2, 0.4, N, p=0.001), Number("solved", 0.99, 0.9, 1, N)]
    result = {"a/b": Result("x", {}, numbers)}
    full = claim("0", needs=(Need("solved", 0.05, 0.95, "no room"),))
    (found,) = judge([full], result, {"a/b": "minicos x"})
    assert found.verdict == OPEN
    assert found.line()["control"] == "nothing; no room (0.99)"


def test_a_flipped_claim_is_about_the_opposite_sign():
    result = {"a/b": Result("x", {}, [Number("0", -0.3, -0.4, -0.2, N, p=0.001)])}
    (found,) = judge([claim("0", flipped=True)], result, {"a/b": "minicos x"})
    line = found.line()
    assert (line["effect"], line["low"], line["high"]) == (0.3, 0.2, 0.4)
    assert line["verdict"] == SUPPORTED and tuple(line) == FIELDS and line["ideal"] == "n/a"


def test_each_figure_and_table_of_the_paper_has_a_line():
    papers = " ".join(claim.paper for claim in CLAIMS)
    for name in ("Figs 1, 2", "2e, f", "3b", "3c", "4a, b", "4c, d", "Fig. 5", "6a", "6b"):
        assert name in papers, name
    for name in ("Table 1", "App. A", "App. B", "App. C"):
        assert name in papers, name
    assert 12 <= len(HEADLINES) <= 20
    known = {f"{name}/{part.name}" for name, some in parts(N).items() for part in some}
    assert {claim.part for claim in CLAIMS} <= known


def test_the_table_of_a_report(tmp_path, capsys):
    lines = [
        dict.fromkeys(FIELDS, 0) | {"claim": "it | does", "headline": head, "effect": 0.25}
        for head in (True, False)
    ]
    write_json(tmp_path / "claims.json", lines)
    assert main([str(tmp_path / "claims.json")]) == 0
    assert capsys.readouterr().out.count("it \\| does") == 1
    assert main([str(tmp_path / "claims.json"), "--all"]) == 0
    assert capsys.readouterr().out.count("it \\| does") == 2
    assert main([str(tmp_path / "none.json")]) == 2
    (tmp_path / "other.json").write_text(json.dumps([{"a": 1}]))
    assert main([str(tmp_path / "other.json")]) == 2
    assert main([]) == 2


def test_reports_are_compared_claim_by_claim(tmp_path, capsys):
    """As after runs under other seeds and thread counts: exit 1 where they disagree."""
    line = dict.fromkeys(FIELDS, 0) | {"claim": "it does", "headline": True, "verdict": SUPPORTED}
    other = line | {"claim": "nor that", "headline": False}
    made = {"a": [line, other], "b": [line, other | {"verdict": OPEN}], "c": []}
    files = [str(tmp_path / f"{name}.json") for name in made]
    for file, lines in zip(files, made.values(), strict=True):
        write_json(Path(file), lines)
    assert main(files[:2]) == 0  # the line that differs is not a headline
    assert "| it does |" in capsys.readouterr().out
    assert main([*files[:2], "--all"]) == 1
    assert f"{SUPPORTED} \\| {OPEN} | NO |" in capsys.readouterr().out
    assert main([files[0], files[2]]) == 1
    assert "not made" in capsys.readouterr().out


def test_what_an_ideal_observer_shows_as_well_is_said():
    """A headline with its number is the difference to it, or names it in its control."""
    for claim in HEADLINES:
        if claim.ideal is not None and not claim.number.endswith("minus ideal observer"):
            assert "an ideal observer" in claim.control, claim.text


# -- every headline, on synthetic measurements -----------------------------------------------------
#
# `effect` is the size of what is claimed in the claim's own unit, `n` how many puzzles are seen.

Draw = Callable[[np.random.Generator, float, int], list[Number]]


def _coins(rng: np.random.Generator, rate: float, *shape: int) -> np.ndarray:
    return (rng.random(shape) < np.clip(rate, 0, 1)).astype(float)


def _around(rng: np.random.Generator, mean: float, *shape: int, scale: float = 0.3) -> np.ndarray:
    return rng.normal(mean, scale, shape)


def _belief(rng, effect, n):
    """Both effects of `belief`: answers alive, and the lean at step 0."""
    arms = {}
    for who, more in ((NETWORK, effect), (IDEAL, 0.0)):
        shown = _around(rng, 1.2 + more, n, 4)
        shown[:, -1] = 1
        first, other = _coins(rng, 0.5 + more, n, 4), _coins(rng, 0.5, n, 4)
        rest = dict.fromkeys(("ideal", "departure", "outside", "prior"), _around(rng, 1, n, 4))
        arms[who] = {"shown": shown, "leads": first, "other": other, **rest}
    some = cases.held_out("mark", 1, size=3) * n
    return belief.numbers(some, arms, np.ones(n))


def _steps(rng, effect, n):
    settled = {}
    for who, more in ((NETWORK, effect), (IDEAL, 0.0)):
        first = np.round(_around(rng, 5, n, 1, scale=1))
        late = first + np.round(_around(rng, more, n, 1, scale=0.8))
        settled[who, steps.SEVERAL] = settled[who, steps.ONE] = np.hstack([first, first, late])
    return steps.numbers(settled)


def _solved(rng, slope: float, n: int) -> np.ndarray:
    return np.hstack([_coins(rng, 0.45 + slope * k, n, 1) for k in (0, 1, 2, 3, 4.32)])


COUNTS = (1, 2, 4, 8, 20)


def _chains(rng, effect, n):
    ours, theirs = _solved(rng, effect, n), _solved(rng, 0.0, n)
    found = counts.numbers({NETWORK: ours}, COUNTS, {})
    return [*found, counts.against(ours, theirs, COUNTS, "twins")]


def _choices(rng, effect, n):
    solved = {NETWORK: _solved(rng, effect, n), IDEAL: _solved(rng, 0.0, n)}
    return counts.numbers(solved, COUNTS, {})


def _commitment(rng, effect, n):
    found = {}
    for who, more in ((NETWORK, effect), (IDEAL, 0.0)):
        first = rng.integers(0, 2, (n, 3, 2))
        same = _coins(rng, more, n, 1, 1) > 0
        first[:, 1:] = np.where(same, first[:, 1:, :1], first[:, 1:])
        found[who] = commitment.measures(first, np.zeros(n, int), [2] * n)
    return commitment.numbers(found, (0, 2, 4))


def _corrected(rng, effect, n):
    found = {}
    for who, more in ((NETWORK, effect), (IDEAL, 0.0)):
        answers = np.where(_coins(rng, 0.1 + more, n, 1, 1) > 0, -2, 0)
        ends = np.where(_coins(rng, 0.1, n) > 0, -2, 0)
        found[who] = commitment.measures(answers, ends, [1] * n)
    return commitment.numbers(found, (3,))


def _planted(rng, effect, n):
    found = {
        who: {"repaired": _coins(rng, 0.4 + effect, n, 3), "switched": _coins(rng, 0.4, n, 3)}
        for who in (NETWORK, IDEAL)
    }
    return plant.numbers(found, (2, 4, 6), np.linspace(1, 0, 11).tolist())


def _recall(rng, effect, n):
    plain = _coins(rng, 0.8, n)
    arms = {name: plain * _coins(rng, 0.6, n) for name in ("backward", "both", "random", "causal")}
    arms |= {"nothing cut": plain, "forward": plain * _coins(rng, 0.6 - effect / 0.8, n)}
    return recall.numbers(arms, arms)


def _where(rng, effect, n):
    found = {}
    for who, more in ((NETWORK, effect), (IDEAL, 0.0)):
        how = np.clip(np.round(_around(rng, 2 + more, n, scale=1)), 0, 9)
        late = np.arange(10)[None] >= how[:, None]
        wrong = np.zeros((n, 10), bool)
        found[who] = {"wrong": wrong, "leads": late.astype(int), "right": np.ones(n, bool)}
    return courses.numbers("goal", found)


class _Noised:
    """What `noise.numbers` needs of a measurement."""

    noised, boundary, puzzles, pictured = np.array([0, 7]), None, False, (0,)
    runs: ClassVar[dict[str, None]] = {"clean": None}

    def __init__(self, rng, effect, n):
        step, frame = _around(rng, 0.6 + effect, n), _around(rng, 0.6, n)
        edges = dict.fromkeys(("null", "seed 1"), np.zeros(n))
        self.finals = {"step 0": step, "step 7": step, "frame 1": frame, **edges}

    def names(self, kind):
        return [name for name in self.finals if name.startswith(f"{kind} ")]

    def final(self, name):
        return self.finals[name]

    def dose(self, name):
        return np.ones(len(self.finals[name]))

    def untouched(self, name):
        return None

    def passes(self, kind="step"):
        return 0, 0


def _noise(rng, effect, n):
    return noise.numbers(_Noised(rng, effect, n), _Noised(rng, 0.0, n))


def _energy(rng, effect, n):
    ours, blind = _around(rng, 0.7, n, 1, 3, 12, scale=0.1), _around(rng, 0.5, n, 1, 3, 12)
    ours[..., -4:] += effect
    shown = _around(rng, 0.7, n, 1, scale=0.1)
    return energy.numbers({"auroc": ours, "estimate": shown}, {"auroc": blind}, (5,))


def _swap(rng, effect, n):
    rate, control = _coins(rng, 0.3 + effect, n), _coins(rng, 0.3, n)
    names = [c.number for c in HEADLINES if c.part == "swap/when"]
    return [stats.difference(name, rate, control, "wrong donor", "share") for name in names]


def _ensemble(rng, effect, n):
    arms = {
        name: Ensemble((6,), seeds=3)
        for name in ("override 20-29 @0", "override 20-29 @0-1", "update 20-29 @0-1")
    }
    plain = _coins(rng, 0.5, n, 3)
    better = np.clip(plain + _coins(rng, 2 * max(effect, 0), n, 1), 0, 1)
    best = np.where(better[:, 0] > plain[:, 0], plain.argmax(1), 0)
    data = {"plain.solved": plain, "plain.vote": best, "plain.early": best}
    data |= dict.fromkeys(("plain.passes", "plain.early.passes", "plain.apart"), np.ones(n))
    if effect > 0.2:  # choosing among three can gain at most what one of them solves
        data["plain.solved"] = np.hstack([plain[:, :1], np.ones((n, 1)), plain[:, 1:2]])
        data["plain.vote"] = data["plain.early"] = np.ones(n, int)
    for name in arms:
        data[f"{name}.solved"] = better[:, :1]
        data |= {f"{name}.passes": np.ones(n), f"{name}.moved": np.ones((n, 1))}
    table = ensemble.rows(data, arms, list(arms))
    found = ensemble.numbers(table, "override 20-29 @0", "fixed", "override 20-29 @0")
    first = np.zeros(n, int)
    observer = {"plain.solved": np.ones((n, 3)), "plain.vote": first, "plain.early": first}
    return found + ensemble.ideal_numbers(observer)


DRAWS: dict[str, tuple[Draw, float]] = {  # of each part: how it is drawn, and an effect that is big
    "belief/mazes": (_belief, 0.4),
    "steps/mazes": (_steps, 2.0),
    "counts/chains": (_chains, 0.1),
    "counts/choices": (_choices, 0.1),
    "commitment/mazes": (_commitment, 0.8),
    "correction/completions": (_corrected, 0.4),
    "correction/planted": (_planted, 0.5),
    "memory/reveal": (_recall, 0.4),
    "perception/goals": (_where, 3.0),
    "noise/paper": (_noise, 0.5),
    "energy/mark": (_energy, 0.2),
    "swap/when": (_swap, 0.6),
    "ensemble/mixed": (_ensemble, 0.4),
}


def _judged(part: str, effect: float, n: int, seed: int) -> dict[str, str]:
    draw, _ = DRAWS[part]
    numbers = draw(np.random.default_rng(seed), effect, n)
    result = {part: Result("x", {}, numbers)}
    mine = [claim for claim in HEADLINES if claim.part == part]
    return {f.claim.text: f.verdict for f in judge(mine, result, {part: "minicos x"})}


def test_every_headline_is_drawn():
    assert {claim.part for claim in HEADLINES} == set(DRAWS)
    assert behaviours is not None and 0 < LEVEL < 0.1


@pytest.mark.parametrize("part", DRAWS)
def test_a_claim_that_is_true_is_supported(part):
    found = _judged(part, DRAWS[part][1], 400, seed=1)
    assert set(found.values()) == {SUPPORTED}, found


@pytest.mark.parametrize("part", DRAWS)
def test_a_claim_that_is_false_is_not(part):
    found = _judged(part, 0.0, 8000, seed=2)
    assert set(found.values()) == {NOT}, found


@pytest.mark.parametrize("part", DRAWS)
def test_a_handful_of_puzzles_decides_nothing(part):
    """If the truth is exactly the smallest effect that matters."""
    least = min(claim.least for claim in HEADLINES if claim.part == part)
    found = [_judged(part, least, 6, seed) for seed in range(8)]
    open_ = [verdict == OPEN for some in found for verdict in some.values()]
    assert np.mean(open_) > 0.6, found


def test_the_readme_prints_the_claims_that_were_measured():
    root = Path(__file__).parents[1]
    lines = json.loads((root / ".github/claims.json").read_text("utf-8"))
    assert {tuple(line) for line in lines} == {FIELDS}
    control = {claim.text: claim.control for claim in CLAIMS}
    assert {line["claim"] for line in lines} == set(control)
    assert all(line["control"].startswith(control[line["claim"]]) for line in lines)
    printed = markdown(table([line for line in lines if line["headline"]]))
    for place in ("README.md", ".github/report.md"):
        assert printed in (root / place).read_text("utf-8"), place
