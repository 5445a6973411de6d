"""Activations on disk, memory-mapped as rows for a sparse autoencoder; `minicos capture` does it
for folders of pictures."""

from pathlib import Path

import torch

import minicos
from minicos import activations
from minicos.analysis.result import Curve
from minicos.analysis.tools import cases, figures

wan, folder = minicos.load("tiny"), Path("sae_export")
wanted = activations.Wanted(("blocks.3", "blocks.8"), steps=(2, 10))
for i, case in enumerate(cases.held_out("maze", 6)):
    condition, about = cases.condition(wan, [case]), {"sample": case.prompt}
    activations.capture(wan, condition, wanted, folder, i, seed=i, about=about)
activations.index(folder, wanted, {"model": "tiny"})
rows = {name: activations.Activations(folder).rows(name, step=10)[0] for name in wanted.points}
curves = []
for name, x in rows.items():
    shares = torch.linalg.svdvals(x.float() - x.float().mean(0)).square().cumsum(0)
    found = (shares / shares[-1])[:64].tolist()
    label = f"{name}: {len(x)} rows"
    curves.append(Curve(label, range(1, 65), found, x_label="principal directions"))
path, y = Path("sae_export.png"), "share of variance"
print(figures.lines(path, curves, y=y, title="What is on disk"))
