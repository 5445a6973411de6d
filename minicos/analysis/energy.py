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
    """Token energy of every block, step and branch of the first sample: arrays, a sheet (layers x frames) and curves."""

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
        branches = list(saved[0])
        run.save_tensors("energy.safetensors", {b: torch.stack([s[b] for s in saved if b in s]) for b in branches})
        names = []
        for index in (i for i in self.chosen if i < len(saved)):
            names.append(f"energy/step_{index:02d}.png")
            energy = saved[index]["cond"].numpy()
            figures.heat_sheet(
                run.path(names[-1]),
                energy,
                rows=[f"layer {i}" for i in range(len(energy))],
                columns=[f"latent frame {f}" for f in range(energy.shape[1])],
                title=f"Token energy at step {index}; colours span each layer",
            )
        figures.curves(
            run.path("energy_layers.png"),
            {f"step {i}": saved[i]["cond"].flatten(1).mean(1).numpy() for i in self.chosen if i < len(saved)},
            x="layer",
            y="mean token energy",
            title="Energy across layers, conditional branch",
        )
        return [*names, "energy_layers.png", "energy.safetensors"]


def contrast(energy: np.ndarray) -> np.ndarray:
    """Energies (f h w) scaled to 0..1 between their 1st and 99th percentile, as the sheets show them."""
    low, high = np.percentile(energy, [1, 99])
    return np.clip((energy - low) / max(high - low, 1e-12), 0, 1)
