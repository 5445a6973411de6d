"""The pictures of a swap study: measures over layers with their controls, layers x ranges of steps
as a map, and the first pair's last frames.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from minicos.analysis.result import Curve
from minicos.analysis.swap.plan import Arm, Plan, layer_name
from minicos.analysis.swap.states import EMBED
from minicos.analysis.tools import figures
from minicos.analysis.tools.shown import list_videos
from minicos.runs import Run

Curves = Mapping[tuple[Arm, str], Curve]  # of each arm and measure, over layers
LABELS = {"flip": "flip: −1 stays B, +1 becomes A", "A": "rate of A's answer"}
TURNED = {"flip": {"half-way": 0.0}, "A": {"half": 0.5}}
LIMITS = {"flip": (-1.0, 1.0), "A": (0.0, 1.0)}


def draw(planned: Plan, curves: Curves, run: Run) -> list[str]:
    """Write the pictures; returns their names, the one to open first at the front."""
    measured = [measure for measure in LABELS if (planned.effects[0], measure) in curves]
    names = [_curves(planned, curves, run, arm, m) for arm in planned.effects for m in measured]
    if len(planned.effects) > 1:
        names += [_map(planned, curves, run, measure) for measure in measured]
    return [_last_frames(planned, run), *names]


def _curves(planned: Plan, curves: Curves, run: Run, arm: Arm, measure: str) -> str:
    """A measure over layers, with its controls."""
    label = "layer (−1: patch embedding)" if EMBED in planned.layers else "layer"
    shown = {planned.what: arm} | {control: arm.under(control) for control in planned.controls}
    name = f"{measure}_{arm.file}.png"
    figures.lines(
        run.path(name),
        [replace(curves[one, measure], name=title, x_label=label) for title, one in shown.items()],
        y=LABELS[measure],
        title=f"{planned.what} of A put into B, {arm.name}",
        levels=TURNED[measure],
    )
    return name


def _map(planned: Plan, curves: Curves, run: Run, measure: str) -> str:
    """A measure over layers and ranges of steps."""
    name = f"{measure}_map.png"
    figures.matrix(
        run.path(name),
        np.array([curves[arm, measure].value for arm in planned.effects]),
        rows=[arm.name for arm in planned.effects],
        columns=[layer_name(k) for k in planned.layers],
        limits=LIMITS[measure],
        x="layer",
        bar=LABELS[measure],
        title=f"{planned.what} of A put into B at a layer (across): {LABELS[measure]}",
    )
    return name


def _last_frames(planned: Plan, run: Run) -> str:
    """What the first pair's videos end with, from B to A."""
    plain = run.load_tensors("last/undisturbed.safetensors")
    layers = [layer_name(planned.layers[i]) for i in figures.evenly(len(planned.layers), 12)]
    images = []
    for arm in planned.effects:
        last = run.load_tensors(f"last/{arm.file}.safetensors")
        images.append([plain["b"], *(last[f"layer_{layer}"] for layer in layers), plain["a"]])
    figures.sheet(
        run.path("last_frames.png"),
        [[image.numpy() for image in row] for row in images],
        rows=[arm.name for arm in planned.effects],
        columns=["B", *layers, "A"],
        title="Last frames: B undisturbed, B with A's state at a layer, A undisturbed",
    )
    _videos(planned, run)
    return "last_frames.png"


def _videos(planned: Plan, run: Run) -> None:
    """List the first pair's videos for the page: B, A's state at some layers in B, A."""
    listed = {"videos/undisturbed/b.mp4": "B undisturbed", "videos/undisturbed/a.mp4": "A"}
    shown = [planned.layers[i] for i in figures.evenly(len(planned.layers), 12)]
    for arm in planned.effects[-1:]:  # usually the longest range of steps
        for k in shown:
            name = layer_name(k)
            listed[f"videos/{arm.file}/layer_{name}.mp4"] = f"B with A's layer {name}"
    list_videos(run, listed)
