"""At which layer does a prompt become an answer? Swaps over layers, with their controls (paper,
Sec. 5.2 and Fig. 6b).

`states` defines what is swapped, `pairs` the donors of the controls. A curve over layers ends at A
by construction: the finding is where it turns, that is, where `flip` crosses 0 and the rate of A
crosses 1/2.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from minicos.analysis.options import SwapOptions
from minicos.analysis.outline import Outline
from minicos.analysis.result import Curve, Interval, Number, Result, Row, write
from minicos.analysis.swap import pairs, pictures
from minicos.analysis.swap.measure import Results, measure_all
from minicos.analysis.swap.pairs import NEITHER, UNREAD, A, B
from minicos.analysis.swap.plan import Arm, Plan, layer_name, plan
from minicos.analysis.tools import stats
from minicos.runs import Run
from minicos.video_model import VideoModel

LEVELS = {"flip": 0.0, "A": 0.5}  # the value above which a run counts as turned
NAMES = {"flip": "latents lie half-way to A (flip = 0)", "A": "half of the runs show A's answer"}
AGAINST = {
    "wrong": "another picture's A",
    "shuffled": "another picture's prompt",
    "random": "a random direction of equal norm",
}


def check(wan: Outline, options: SwapOptions) -> None:
    """Raise MinicosError for what cannot be done, before anything runs."""
    plan(wan, options).check(pairs.chosen(options))


def study(wan: VideoModel, run: Run, options: SwapOptions) -> Result:
    """Every arm of the options' plan: the layer where the answer turns, controls, the table over
    layers, pictures.
    """
    made, planned = pairs.chosen(options), plan(wan, options)
    planned.check(made)
    pictured = len(made) if options.one_way else len(made) // 2
    results = measure_all(wan, run, planned, made)
    curves = {
        (arm, measure): stats.curve(arm.name, values, planned.layers_of(arm), "layer")
        for arm in planned.arms
        for measure, values in measures(results[arm], pictured).items()
    }
    return write(
        run,
        Result(
            "swap",
            run.settings,
            numbers(planned, results, pictured),
            {"layers": rows(planned, results, pictured)},
            [
                Curve(f"{c.name}: {measure}", c.x, c.value, c.low, c.high, c.x_label)
                for (_, measure), c in curves.items()
            ],
            pictures.draw(planned, curves, run),
        ),
    )


def measures(found: Mapping[str, np.ndarray], pictured: int) -> dict[str, np.ndarray]:
    """`flip` and, if pictures are judged, whether they show A: (pictures layers)."""
    out = {"flip": by_picture(found["flip"], pictured)}
    if (found["answer"] != UNREAD).all():
        out["A"] = by_picture(found["answer"] == A, pictured)
    return out


def rows(planned: Plan, results: Results, pictured: int) -> list[Row]:
    """A row for each arm and layer: means with intervals over pictures."""

    def over(values: np.ndarray) -> Interval:
        return stats.average(by_picture(values, pictured))

    out: list[Row] = []
    for arm in planned.arms:
        found = results[arm]
        answers = {"A": A, "B": B, "neither": NEITHER} if "A" in measures(found, pictured) else {}
        out += [
            {
                "arm": arm.name,
                "layer": layer_name(layer),
                "flip": over(found["flip"][:, j]),
                **{name: over(found["answer"][:, j] == code) for name, code in answers.items()},
                "off axis": float(found["off_axis"][:, j].mean()),
                "leverage": float(found["leverage"][:, j].mean()),
                "largest change": float(found["changed"][:, j].max()),
            }
            for j, layer in enumerate(planned.layers_of(arm))
        ]
    return out


def numbers(planned: Plan, results: Results, pictured: int) -> list[Number]:
    """The findings: where the answer turns, the controls, shorter ranges of steps, the undisturbed
    runs.
    """
    plain, out = results[None], []
    for arm in planned.effects:
        found = measures(results[arm], pictured)
        if len(planned.layers) > 1:
            out += [
                Number.of(
                    f"layer at which {NAMES[measure]}, {arm.name}",
                    crossing(planned.layers, values, LEVELS[measure]),
                    unit="layer",
                    note=planned.last,
                )
                for measure, values in reversed(found.items())
            ]
        out += _controls(planned, results, arm, pictured)
    longest = max(planned.effects, key=lambda arm: len(arm.steps))
    for arm in planned.effects:
        if arm.donor == longest.donor and len(arm.steps) < len(longest.steps):
            for layer in planned.compared:
                a, b = (_at(planned, results, one, layer, pictured) for one in (arm, longest))
                title = f"{_what(a)} at layer {layer_name(layer)}: {arm.name} minus {longest.name}"
                out.append(stats.difference(title, *_arms(a, b), longest.name))
    for name, code in (("a", A), ("b", B)):
        if (plain[f"{name}.answer"] != UNREAD).all():
            right = by_picture(plain[f"{name}.answer"] == code, pictured)
            title = f"undisturbed runs of {name.upper()} that show {name.upper()}'s answer"
            out.append(stats.mean(title, right, unit="share"))
    return out


def _controls(planned: Plan, results: Results, arm: Arm, pictured: int) -> list[Number]:
    """One arm compared with each of its controls, at the control's layers; and its size and
    off-axis share there.
    """
    out = []
    for layer in planned.compared:
        own = _at(planned, results, arm, layer, pictured)
        where = f"at layer {layer_name(layer)}, {arm.name}"
        out.append(stats.mean(f"{_what(own)} {where}", _arms(own, own)[0]))
        for control in planned.controls:
            other = _at(planned, results, arm.under(control), layer, pictured)
            if control == "null":
                title = f"largest change by the null swap {where}"
                out.append(stats.mean(title, other["changed"], "exactly 0"))
            else:
                title = f"{_what(own)} {where}: own donor minus {AGAINST[control]}"
                out.append(stats.difference(title, *_arms(own, other), AGAINST[control]))
        out.append(stats.mean(f"off-axis share {where}", own["off_axis"], "0: between A and B"))
        note = "how far the first swapped step moves the latent, of its norm"
        out.append(stats.mean(f"leverage {where}", own["leverage"], note))
    return out


def _at(
    planned: Plan, results: Results, arm: Arm, layer: int, pictured: int
) -> dict[str, np.ndarray]:
    """The measurements of an arm at one layer, a number for each picture."""
    j = planned.layers_of(arm).index(layer)
    found = results[arm]
    at = {name: values[:, j] for name, values in measures(found, pictured).items()}
    rest = ("off_axis", "leverage", "changed")
    return at | {name: by_picture(found[name][:, j], pictured) for name in rest}


def _what(at: Mapping[str, np.ndarray]) -> str:
    return "rate of A's answer" if "A" in at else "flip"


def _arms(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The headline measure of both: the rate of A if pictures are judged, else flip."""
    key = "A" if "A" in a else "flip"
    return a[key], b[key]


def by_picture(values: np.ndarray, pictured: int) -> np.ndarray:
    """Rows (pictures, or twice as many with both directions) averaged over directions, so that each
    picture counts once.
    """
    return np.asarray(values, dtype=np.float64).reshape(-1, pictured, *values.shape[1:]).mean(0)


def crossing(layers: Sequence[int], curves: np.ndarray, level: float) -> Interval:
    """The layer at which the mean of curves (n layers) first reaches `level`, interpolated linearly
    between layers; inf if it never does.

    The interval is that of the mean curve over resampled rows, one row per puzzle. It extends at
    least to the neighbouring layers, since nothing is known between measured layers.
    """
    means = np.concatenate([curves.mean(0)[None], stats.resampled(len(curves)) @ curves])
    at = _crossing(layers, means, level)
    low, high = np.quantile(at[1:], [0.025, 0.975], method="nearest")
    if np.isfinite(at[0]) and len(layers) > 1:
        known = np.asarray(layers, dtype=np.float64)
        low = min(low, known[known < at[0]].max(initial=known[0]))
        high = max(high, known[known > at[0]].min(initial=known[-1]))
    return Interval(float(at[0]), float(low), float(high), len(curves))


def _crossing(layers: Sequence[int], curves: np.ndarray, level: float) -> np.ndarray:
    """For each curve (rows layers), the layer where it first reaches `level`."""
    x = np.asarray(layers, dtype=np.float64)
    reached = curves >= level
    first = reached.argmax(1)
    row, before = np.arange(len(curves)), np.maximum(first - 1, 0)
    high, low = curves[row, first], curves[row, before]
    share = np.where(first > 0, (high - level) / np.where(high > low, high - low, 1), 0)
    return np.where(reached.any(1), x[first] - share * (x[first] - x[before]), np.inf)
