"""Working memory: while an object is behind the wall, can its shape and colour be read out of the
hidden states of the tokens that cover it?

A ridge classifier (`tools/readout.py`) is trained on some puzzles and tested on others, layer by
layer and at three places (PLACES): where the object starts, in the given frame (the positive
control, since the object is visible there); behind the wall; and where it stops, in the last frame.
Controls: shuffled labels show chance; the patch embedding (layer -1) shows what those tokens
contain before any attention; and the latents of the drawn video show what the picture itself
reveals there, since the VAE sees across the edge of the wall.

The first frame with the object is an input at every step, so nothing has to be remembered: this
readout shows where the object is looked up, and `recall` tests what a model remembers.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from einops import rearrange
from torch import Tensor

from minicos.analysis.tools import cases, posterior
from minicos.analysis.tools.cases import Case
from minicos.hooks import Hooks, Site
from minicos.puzzles.draw import COLOURS, SHAPES
from minicos.puzzles.memory import Memory
from minicos.video_model import VideoModel
from minicos.wan import as_wan

EMBED = -1  # the layer before block 0: the patch embedding
PLACES = ("start, given frame", "behind the wall", "stop, last frame")


@dataclass
class Hidden:
    """A hook that stores the mean state over the tokens of each place: (step, layer) -> b places d;
    layer -1 is the patch embedding.
    """

    batch: Sequence[Case]
    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def hooks(self, steps: Sequence[int]) -> Hooks:
        """Hooks on every layer at these steps, in the prompted pass."""
        at = tuple(steps)
        watched = Hooks().on("embed", self, step=at, branch="cond")
        return watched.on("blocks.*", self, step=at, branch="cond")

    def __call__(self, x: Tensor, site: Site) -> None:
        layer = EMBED if site.name == "embed" else int(site.name.split(".")[1])
        self.states[site.step, layer] = _places(x.unflatten(1, site.grid), self.batch)


def _places(grid: Tensor, batch: Sequence[Case]) -> Tensor:
    """Mean over the cells of each place: b f h w d -> b places d.

    A cell is a token. The place behind the wall is in the latent frame around the middle of the
    video: the third of 4, with video frames 5 to 8. The object is out of sight in frame 6; in frame
    8 its edge is visible next to these cells.
    """
    rows = []
    for states, case in zip(grid, batch, strict=True):
        puzzle = _memory(case)
        behind = states[grid.shape[1] // 2]
        r, c = zip(*puzzle.hidden_cells(), strict=True)
        ends = (states[0][puzzle.mover.cell], states[-1][puzzle.stop])
        rows.append(torch.stack([ends[0], behind[list(r), list(c)].mean(0), ends[1]]))
    return torch.stack(rows)


def memories(wan: VideoModel, batch: Sequence[Case], at: Sequence[int]) -> dict[str, Tensor]:
    """The states of the tokens at each place, for a batch of `memory` puzzles.

    Returns:
        states: b steps layers places d, steps in the order of `at`, layers from -1.
        drawn: the same tokens of the drawn video's latent, b places d'.
        labels: b 2, see `labels`.
    """
    condition, hidden = cases.condition(wan, batch), Hidden(batch)
    steps = wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=hidden.hooks(at))
    deque(islice(steps, max(at) + 1), maxlen=0)
    states = [
        torch.stack([hidden.states[s, k] for k in range(EMBED, wan.depth)], dim=1) for s in at
    ]
    videos = torch.cat([posterior.answers(wan, _memory(case)) for case in batch])
    pf, ph, pw = as_wan(wan, "this study").cfg.patch_size
    grid = rearrange(
        videos, "b c (f pf) (h ph) (w pw) -> b f h w (c pf ph pw)", pf=pf, ph=ph, pw=pw
    )
    return {
        "states": torch.stack(states, dim=1),
        "drawn": _places(grid, batch),
        "labels": labels(batch),
    }


def labels(batch: Sequence[Case]) -> Tensor:
    """Shape and colour of the hidden object as numbers: b 2."""
    movers = [_memory(case).mover for case in batch]
    colours = tuple(COLOURS)
    return torch.tensor([(SHAPES.index(m.shape), colours.index(m.colour)) for m in movers])


def _memory(case: Case) -> Memory:
    """The puzzle of a case that hides an object. Raises ValueError for other cases."""
    if not isinstance(case.puzzle, Memory):
        raise ValueError(f"{case.prompt!r} hides nothing")
    return case.puzzle
