"""What a sweep of swaps says (`swap_study.sweep`): a table with intervals, the layer where the answer turns, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from minicos.analysis import figures
from minicos.analysis.stats import Interval, bootstrap
from minicos.analysis.swap import EMBED
from minicos.analysis.swap_pairs import NEITHER, UNREAD, A, B
from minicos.analysis.swap_study import Arm, Plan, named
from minicos.runs import Run


def table(plan: Plan, results: Mapping[Arm | None, Mapping[str, np.ndarray]], pictures: int) -> list[dict]:
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
                    name: over(found["answer"][:, j] == k) for name, k in (("A", A), ("B", B), ("neither", NEITHER))
                }
            lines.append(line)
    return lines


def turns(plan: Plan, results: Mapping[Arm | None, Mapping[str, np.ndarray]], pictures: int) -> list[dict]:
    """For each arm without a control, the layer at which the answer turns: by `flip` and, where pictures are read, by the rate of A."""
    lines = []
    for arm in plan.arms:
        if arm.control is None:
            found, line = results[arm], {"arm": arm.name}
            line["flip"] = crossing(plan.layers, by_picture(found["flip"], pictures), 0.0)
            if (found["answer"] != UNREAD).all():
                line["A"] = crossing(plan.layers, by_picture(found["answer"] == A, pictures), 0.5)
            lines.append(line)
    return lines


def by_picture(values: np.ndarray, pictures: int) -> np.ndarray:
    """Rows (pictures, or twice as many: both directions) averaged over directions, so that a picture counts once."""
    return np.asarray(values, dtype=np.float64).reshape(-1, pictures, *values.shape[1:]).mean(0)


def crossing(
    layers: Sequence[int], curves: np.ndarray, level: float, *, seed: int = 0, resamples: int = 10_000
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


def draw(plan: Plan, results: Mapping[Arm | None, Mapping[str, np.ndarray]], pictures: int, run: Run) -> list[str]:
    """The pictures: flip (and rates) over layers with controls, layers x ranges as a map, the first pair's last frames."""
    lines, names = table(plan, results, pictures), []
    measures = [("flip", "flip: −1 stays B, +1 becomes A")]
    measures += [("A", "rate of A's answer")] * ("A" in lines[0])
    for arm in plan.arms:
        if arm.control is None:
            mine = [arm, *(replace(arm, control=control) for control in plan.controls)]
            for measure_, label in measures:
                curves = {
                    a.control or plan.what: [(x["layer"], x[measure_]) for x in lines if x["arm"] == a.name]
                    for a in mine
                }
                names.append(f"{measure_}_{arm.file}.png")
                figures.errorbars(
                    run.path(names[-1]),
                    {
                        name: [(layer, i.effect, i.low, i.high) for layer, i in points]
                        for name, points in curves.items()
                    },
                    x="layer (−1: patch embedding)" if EMBED in plan.layers else "layer",
                    y=label,
                    level={"flip": 0.0, "A": 0.5}[measure_],
                    title=f"{plan.what} of A put into B, {arm.name}; 95 % over {pictures} pictures",
                )
    effects = [arm for arm in plan.arms if arm.control is None]
    layers = [named(k) for k in plan.layers]
    if len(effects) > 1:
        for measure_, label in measures:
            values = [[x[measure_].effect for x in lines if x["arm"] == arm.name] for arm in effects]
            names.append(f"{measure_}_map.png")
            figures.matrix(
                run.path(names[-1]), np.array(values), rows=[arm.name for arm in effects], columns=layers,
                limits={"flip": (-1, 1), "A": (0, 1)}[measure_], title=f"{plan.what} of A put into B at a layer (across): {label}",
            )  # fmt: skip
    plain = run.load_tensors("last/undisturbed.safetensors")
    shown = figures.evenly(len(plan.layers), 12)
    images = []
    for arm in effects:
        last = run.load_tensors(f"last/{arm.file}.safetensors")
        images.append([plain["b"], *(last[f"layer_{layers[i]}"] for i in shown), plain["a"]])
    figures.sheet(
        run.path("last_frames.png"), [[image.numpy() for image in row] for row in images],
        rows=[arm.name for arm in effects], columns=["B", *(layers[i] for i in shown), "A"],
        title="Last frames: B undisturbed, B with A's state at a layer, A undisturbed",
    )  # fmt: skip
    return ["last_frames.png", *names]
