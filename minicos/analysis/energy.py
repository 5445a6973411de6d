"""Where is each layer busy? The L2 norm of every token after every block (paper, Sec. 5.1 and Fig. 6a).

The paper's reading: early layers attend to the whole picture and its background, later ones to the objects that the task is about.
The norm is taken on the spot by a hook on `blocks.*`, so that watching a layer costs one number per token.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minicos.analysis import figures
from minicos.analysis.observe import Saved
from minicos.hooks import Hooks, Site
from minicos.ops import token_energy
from minicos.runs import Run
from minicos.sample import Step


@dataclass(frozen=True)
class Energy:
    """Token energy of every block, step and branch of the first sample: arrays, a sheet (frames x layers) and curves."""

    chosen: Sequence[int]  # the steps drawn as sheets; numbers are kept of all
    name: str = "energy"
    _pass: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def hooks(self) -> Hooks:
        return Hooks().on("blocks.*", self._record)

    def _record(self, x: Tensor, site: Site) -> None:
        layer = int(site.name.split(".")[1])
        self._pass[site.branch][layer] = token_energy(x[0].detach()).view(site.grid)  # f h w

    def see(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        out = {branch: torch.stack([layers[i] for i in sorted(layers)]) for branch, layers in self._pass.items()}
        self._pass.clear()
        return out  # "cond", "uncond": layer f h w

    def draw(self, saved: Saved, run: Run) -> list[str]:
        branches = sorted({branch for step in saved for branch in step})
        run.save_tensors("energy.safetensors", {b: torch.stack([_branch(step, b) for step in saved]) for b in branches})
        chosen = [i for i in self.chosen if i < len(saved)]
        names = [f"energy/step_{index:02d}.png" for index in chosen]
        for index, name in zip(chosen, names, strict=True):
            energy = saved[index]["cond"].numpy()  # layer f h w
            layers = figures.evenly(len(energy), 12)
            heat = np.stack([figures.heat(energy[i]) for i in layers], axis=1)  # f layer h w 4
            figures.sheet(
                run.path(name),
                heat,
                rows=["frame 0", *(f"{4 * f - 3}-{4 * f}" for f in range(1, len(heat)))],
                columns=[f"layer {i}" for i in layers],
                title=f"Token energy at step {index}: video frames (down), layer (across); colours span each layer",
            )
        figures.curves(
            run.path("energy_layers.png"),
            {f"step {i}": saved[i]["cond"].flatten(1).mean(1).numpy() for i in chosen},
            x="layer",
            y="mean token energy",
            title="Energy across layers, conditional branch",
        )
        return [*names, "energy_layers.png", "energy.safetensors"]


def _branch(step: Mapping[str, Tensor], branch: str) -> Tensor:
    """Energies of a branch; NaN where guidance 1 has skipped it, so that the step axis stays whole."""
    return step.get(branch, torch.full_like(step["cond"], torch.nan))
