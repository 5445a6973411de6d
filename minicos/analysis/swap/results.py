"""What a sweep of swaps says (`swap_study.sweep`): a table with intervals, the layer where the answer turns, pictures."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from minicos.analysis.swap.pairs import NEITHER, UNREAD, A, B
from minicos.analysis.swap.states import EMBED
from minicos.analysis.swap.study import Arm, Plan, Results, layer_name
from minicos.analysis.tools import figures
from minicos.analysis.tools.stats import Interval, bootstrap
from minicos.runs import Run

MEASURES = {  # what is drawn: its label, the height at which a run counts as turned, and its limits
    "flip": ("flip: −1 stays B, +1 becomes A", 0.0, (-1, 1)),
    "A": ("rate of A's answer", 0.5, (0, 1)),
}


def table(plan: Plan, results: Results, pictures: int) -> list[dict]:
    """A line for each arm and layer: means with intervals over pictures (rows beyond `pictures` are the same ones turned)."""

    def over(values: np.ndarray) -> Interval:
        return bootstrap(by_picture(values, pictures))

    lines = []
    for arm in plan.arms:
        found = results[arm]
        scored = bool((found["answer"] != UNREAD).all())
        for j, layer in enumerate(plan.layers_of(arm)):
            line = {"arm": arm.name, "layer": layer, "flip": over(found["flip"][:, j])}
            line |= {name: float(np.mean(found[name][:, j])) for name in ("off_axis", "leverage")}
            line["changed"] = float(found["changed"][:, j].max())
            if scored:
                line |= {
                    name: over(found["answer"][:, j] == k)
                    for name, k in (("A", A), ("B", B), ("neither", NEITHER))
                }
            lines.append(line)
    return lines


def turns(plan: Plan, results: Results, pictures: int) -> list[dict]:
    """For each arm without a control, the layer at which the answer turns: by `flip` and, where pictures are read, by the rate of A."""
    lines = []
    for arm in plan.effects:
        answer, curves = results[arm]["answer"], {"flip": results[arm]["flip"]}
        if (answer != UNREAD).all():
            curves["A"] = answer == A
        at = {
            name: crossing(plan.layers, by_picture(each, pictures), MEASURES[name][1])
            for name, each in curves.items()
        }
        lines.append({"arm": arm.name, **at})
    return lines


def by_picture(values: np.ndarray, pictures: int) -> np.ndarray:
    """Rows (pictures, or twice as many: both directions) averaged over directions, so that a picture counts once."""
    return np.asarray(values, dtype=np.float64).reshape(-1, pictures, *values.shape[1:]).mean(0)


def crossing(
    layers: Sequence[int],
    curves: np.ndarray,
    level: float,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> Interval:
    """The layer at which the mean of curves (n layers) first reaches `level`, between layers by a straight line; inf where never.

    The interval is that of the mean curve over resampled rows, one row for each puzzle.
    """
    n, rng = len(curves), np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    at = _crossing(layers, np.concatenate([curves.mean(0)[None], counts @ curves / n]), level)
    low, high = np.quantile(at[1:], [0.025, 0.975], method="nearest")
    return Interval(float(at[0]), float(low), float(high), n)


def _crossing(layers: Sequence[int], curves: np.ndarray, level: float) -> np.ndarray:
    """For each curve (rows layers), the layer where it first reaches `level`."""
    x = np.asarray(layers, dtype=np.float64)
    reached = curves >= level
    first = reached.argmax(1)
    row, before = np.arange(len(curves)), np.maximum(first - 1, 0)
    high, low = curves[row, first], curves[row, before]
    share = np.where(first > 0, (high - level) / np.where(high > low, high - low, 1), 0)
    return np.where(reached.any(1), x[first] - share * (x[first] - x[before]), np.inf)


def draw(plan: Plan, results: Results, pictures: int, run: Run) -> list[str]:
    """The pictures: flip (and rates) over layers with controls, layers x ranges as a map, the first pair's last frames."""
    lines = table(plan, results, pictures)
    measured = [measure for measure in MEASURES if measure in lines[0]]
    names = [
        _curves(plan, lines, pictures, run, arm, measure)
        for arm in plan.effects
        for measure in measured
    ]
    if len(plan.effects) > 1:
        names += [_map(plan, lines, run, measure) for measure in measured]
    return [_last_frames(plan, run), *names]


def _curves(
    plan: Plan, lines: Sequence[dict], pictures: int, run: Run, arm: Arm, measure: str
) -> str:
    """A measure over layers, beside its controls."""
    label, level, _ = MEASURES[measure]
    curves = {}
    for control in (None, *plan.controls):
        mine = [line for line in lines if line["arm"] == replace(arm, control=control).name]
        found = [(line["layer"], line[measure]) for line in mine]
        curves[control or plan.what] = [(layer, i.value, i.low, i.high) for layer, i in found]
    name = f"{measure}_{arm.file}.png"
    figures.errorbars(
        run.path(name),
        curves,
        x="layer (−1: patch embedding)" if EMBED in plan.layers else "layer",
        y=label,
        level=level,
        title=f"{plan.what} of A put into B, {arm.name}; 95 % over {pictures} pictures",
    )
    return name


def _map(plan: Plan, lines: Sequence[dict], run: Run, measure: str) -> str:
    """A measure over layers and ranges of steps."""
    label, _, limits = MEASURES[measure]
    rows = [arm.name for arm in plan.effects]
    values = [[line[measure].value for line in lines if line["arm"] == row] for row in rows]
    name = f"{measure}_map.png"
    figures.matrix(
        run.path(name),
        np.array(values),
        rows=rows,
        columns=[layer_name(k) for k in plan.layers],
        limits=limits,
        title=f"{plan.what} of A put into B at a layer (across): {label}",
    )
    return name


def _last_frames(plan: Plan, run: Run) -> str:
    """What the first pair's videos end with, from B to A."""
    plain = run.load_tensors("last/undisturbed.safetensors")
    layers = [layer_name(plan.layers[i]) for i in figures.evenly(len(plan.layers), 12)]
    images = []
    for arm in plan.effects:
        last = run.load_tensors(f"last/{arm.file}.safetensors")
        images.append([plain["b"], *(last[f"layer_{layer}"] for layer in layers), plain["a"]])
    figures.sheet(
        run.path("last_frames.png"),
        [[image.numpy() for image in row] for row in images],
        rows=[arm.name for arm in plan.effects],
        columns=["B", *layers, "A"],
        title="Last frames: B undisturbed, B with A's state at a layer, A undisturbed",
    )
    return "last_frames.png"
