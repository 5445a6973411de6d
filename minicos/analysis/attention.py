"""Where does attention go? The mass that every token receives, and from which frame to which it flows (ours).

With p = softmax(q k^T / sqrt(k)): a key's received mass is the sum of p over queries (the mean token gets 1), and the frame-by-frame
matrix M[a, b] is the share of frame a's attention that goes to frame b (rows sum to 1). Both are exact and need no l x l matrix
(`ops.attention_mass`). With `queries`, that many random ones of every frame stand for all: unbiased, with standard errors, at their
share of the cost (`ops.attention_mass_sampled`). Log sum exp of the scores is computed anew, half the products of an attention: the
forward's is not at a hook point, and to ask for it (`measures.attention_with_lse`) would take a whole one. Cross-attention is watched as
well: prompts shorter than the text length are padded with zero rows, the network attends to them like to any other, and the mass
that they receive is shown beside that of the words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.tools import figures
from minicos.analysis.tools.record import Saved
from minicos.condition import Condition
from minicos.hooks import Hooks, Site
from minicos.measures import stratified
from minicos.ops import REFERENCE, Ops
from minicos.runs import Run
from minicos.sample import Step


def words(condition: Condition, branch: str) -> int:
    """How many rows of the first sample's text are a prompt's; the rest are zero."""
    return int(condition.branch(branch)[0].any(-1).sum())


@dataclass(frozen=True)
class Attention:
    """Mass received by tokens, between frames and on text rows, of the first sample at the chosen layers and steps."""

    layers: Sequence[int]
    chosen: Sequence[int]  # steps
    heads: Sequence[int] | None = None  # their mean is kept; all by default
    branch: str = "cond"
    words: int | None = None  # rows of the prompt; the others are padding
    queries: int | None = None  # of every frame, at random; all by default
    ops: Ops = REFERENCE  # those of the model: `wan.ops`
    name: str = "attention"
    _query: dict[str, Tensor] = field(default_factory=dict)
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self) -> Hooks:
        hooks = Hooks()
        when = {"step": tuple(self.chosen), "branch": self.branch}
        for layer in self.layers:
            for part in ("self_attn", "cross_attn"):
                hooks = hooks.on(f"blocks.{layer}.{part}.q", self._hold, **when)
                hooks = hooks.on(f"blocks.{layer}.{part}.k", self._weigh, **when)
        return hooks

    def _hold(self, q: Tensor, site: Site) -> None:
        self._query["q"] = q[:1].detach()

    def _weigh(self, k: Tensor, site: Site) -> None:
        heads = slice(None) if self.heads is None else list(self.heads)
        q, k = self._query.pop("q")[:, heads], k[:1, heads].detach()
        _, layer, part, _ = site.name.split(".")
        text = part == "cross_attn"
        frames = 1 if text else site.grid[0]

        def keep(received: Tensor, between: Tensor, name: str = "") -> None:
            if text:
                self._kept[f"text{name}.{layer}"] = received / q.shape[2]  # of one query: sums to 1
            else:
                self._kept[f"received{name}.{layer}"] = received.view(site.grid)
                self._kept[f"between{name}.{layer}"] = between

        if self.queries is None:
            keep(*(mass[0].mean(0) for mass in self.ops.attention_mass(q, k, frames)))
        else:
            draw = torch.Generator().manual_seed(2000 * site.step + 2 * int(layer) + text)
            count = min(self.queries * site.grid[0], q.shape[2]) // frames
            masses, errors = self.ops.attention_mass_sampled(
                q, k, frames, stratified(q, frames, count, draw)
            )
            keep(*(mass[0].mean(0) for mass in masses))
            keep(*(error[0].square().sum(0).sqrt() / q.shape[1] for error in errors), name="_error")

    def keep(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        kept = dict(self._kept)
        self._kept.clear()
        return kept  # "received.3": f h w; "between.3": f f; "text.3": t; of a sample also "received_error.3" ...

    def draw(self, saved: Saved, run: Run) -> list[str]:
        names = []
        shown = [i for i in self.chosen if i < len(saved)]
        for i in shown:
            received = np.stack(
                [figures.heat(saved[i][f"received.{k}"].numpy()) for k in self.layers], axis=1
            )
            names.append(f"attention/received_step_{i:02d}.png")
            figures.sheet(
                run.path(names[-1]),
                received,
                rows=[f"latent {f}" for f in range(len(received))],
                columns=[f"layer {k}" for k in self.layers],
                title=f"Attention received, step {i}: latent frames (down), layers (across); colours span each layer"
                + self._accuracy(saved, [i], "received"),
            )
        if shown:
            flows = [
                [figures.heat(saved[i][f"between.{k}"].numpy(), 0, 1) for k in self.layers]
                for i in shown
            ]
            figures.sheet(
                run.path("attention_frames.png"),
                flows,
                rows=[f"step {i}" for i in shown],
                columns=[f"layer {k}" for k in self.layers],
                title="From which latent frame (down) to which (across) attention flows; black 0, pale yellow 1"
                + self._accuracy(saved, shown, "between"),
            )
            names.append("attention_frames.png")
        if shown and self.words is not None:
            padded = {
                f"step {i}": np.array(
                    [saved[i][f"text.{k}"][self.words :].sum() for k in self.layers]
                )
                for i in shown
            }
            figures.curves(
                run.path("attention_padding.png"),
                padded,
                x="layer",
                y="share of cross-attention",
                at=self.layers,
                title=f"Mass on the zero-padded text rows ({self.words} rows are words)"
                + ("" if self.queries is None else f", from {self.queries} queries a frame"),
            )
            names.append("attention_padding.png")
        run.save_tensors(
            "attention.safetensors", {f"step{i}.{k}": v for i in shown for k, v in saved[i].items()}
        )
        return [*names, "attention.safetensors"]

    def _accuracy(self, saved: Saved, steps: Sequence[int], what: str) -> str:
        """What a title says of a sample: "" where all queries were taken."""
        if self.queries is None:
            return ""
        worst = max(float(saved[i][f"{what}_error.{k}"].max()) for i in steps for k in self.layers)
        return f"\n{self.queries} random queries a frame; standard errors up to {worst:.2g}"
