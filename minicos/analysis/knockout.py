"""Attention knockout (Geva et al., arXiv:2304.14767): what if information could not flow from one
set of tokens to another? The queries of a target do not see the keys of a source.

    cut = Flow(Tokens(frames=(0,)), Tokens(frames=(2,)))  # nothing from latent frame 0 to 2
    Knockout(cut, layers=range(6), steps=range(5), branch="cond").intervention()

The softmax runs over the remaining keys exactly; a query without any gets zeros (`attend`). Only
the direct path in these layers is cut: the source can still reach the target through a third token,
or in another layer. To cut those paths too, also cut the flow to all other tokens
(`Tokens(...).others`), in all layers.

A knockout is an intervention made of hooks, so it can be combined with noise, swaps and ensembles.
A model supports it through the hook points `blocks.i.self_attn.allowed` and
`blocks.i.cross_attn.allowed`. Where text and video attend jointly, the text's rows are keys of
self-attention: `Flow(Text(), joint=True)`.

Control: `knockout.control(seed)` forbids the same number of keys to the same queries, drawn at
random from all keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from minicos.analysis.tools.interventions import Interventions
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site

Grid = tuple[int, int, int]  # f h w of the tokens
DRAWN = 1 << 24  # random numbers drawn at once: 134 MB


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a video: whole latent frames, or the same rows and columns in each."""

    frames: tuple[int, ...] | None = None  # frames of the token grid, from 0; None: all
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None
    where: Tensor | None = None  # bool f h w (or 1 along an axis): only tokens where it is true
    outside: bool = False  # all other tokens instead

    @property
    def others(self) -> "Tokens":
        """All tokens except these."""
        return replace(self, outside=not self.outside)

    def on(self, grid: Grid) -> Tensor:
        """bool f*h*w. Raises MinicosError for a frame, row or column outside the grid."""
        found = torch.ones(grid, dtype=torch.bool)
        for axis, name in enumerate(("frames", "rows", "columns")):
            chosen, size = getattr(self, name), grid[axis]
            if chosen is None:
                continue
            if missing := [i for i in chosen if not 0 <= i < size]:
                raise MinicosError(
                    f"there is no {name[:-1]} {missing[0]}: this video has {name} 0 to {size - 1}"
                    f" of tokens (a grid of {'x'.join(map(str, grid))})"
                )
            line = torch.zeros(size, dtype=torch.bool)
            line[list(chosen)] = True
            found &= line.view([-1 if a == axis else 1 for a in range(3)])
        if self.where is not None:
            found &= self.where.cpu().expand(grid)
        return (~found if self.outside else found).flatten()


@dataclass(frozen=True)
class Text:
    """Rows of the text: tokens of the prompt, and the padding after it."""

    rows: tuple[int, ...] | None = None  # None: all

    def on(self, count: int) -> Tensor:
        """bool t."""
        found = torch.zeros(count, dtype=torch.bool)
        if self.rows is not None and not all(0 <= i < count for i in self.rows):
            raise MinicosError(
                f"text rows {list(self.rows)}: this model reads rows 0 to {count - 1}"
            )
        found[slice(None) if self.rows is None else list(self.rows)] = True
        return found


class Cut(Protocol):
    """Defines which keys are forbidden to which queries."""

    @property
    def attention(self) -> str:
        """The sub-layer that is cut: "self_attn" or "cross_attn"."""
        ...

    @property
    def text(self) -> bool:
        """Whether its keys are the text's."""
        ...

    def forbidden(self, queries: Tensor, grid: Grid, keys: int) -> Tensor:
        """bool r t, for the queries with these indices (r, int64, on any device) and all keys."""
        ...


@dataclass(frozen=True)
class Flow:
    """Cut the flow from a source (keys) to a target (queries)."""

    source: Tokens | Text
    target: Tokens = Tokens()
    joint: bool = False  # text and video attend jointly

    @property
    def attention(self) -> str:
        return "cross_attn" if self.text and not self.joint else "self_attn"

    @property
    def text(self) -> bool:
        return isinstance(self.source, Text)

    def forbidden(self, queries: Tensor, grid: Grid, keys: int) -> Tensor:
        source = self.source.on(keys) if isinstance(self.source, Text) else self.source.on(grid)
        device = queries.device
        return self.target.on(grid).to(device)[queries, None] & source.to(device)


@dataclass(frozen=True)
class Causal:
    """Cut the flow from every latent frame to earlier ones: tokens see their own and earlier
    frames only.
    """

    attention: str = "self_attn"
    text: bool = False

    def forbidden(self, queries: Tensor, grid: Grid, keys: int) -> Tensor:
        size = grid[1] * grid[2]
        key = torch.arange(keys, device=queries.device)
        return queries[:, None] // size < key // size


@dataclass(frozen=True)
class Scattered:
    """The control of another cut: the same queries lose as many keys, drawn at random."""

    cut: Cut
    seed: int = 0

    @property
    def attention(self) -> str:
        return self.cut.attention

    @property
    def text(self) -> bool:
        return self.cut.text

    def forbidden(self, queries: Tensor, grid: Grid, keys: int) -> Tensor:
        parts = queries.split(max(1, DRAWN // keys))
        return torch.cat([self._drawn(part, grid, keys) for part in parts])

    def _drawn(self, queries: Tensor, grid: Grid, keys: int) -> Tensor:
        count = self.cut.forbidden(queries, grid, keys).sum(1, keepdim=True)  # r 1
        drawn = scrambled(
            queries[:, None] * keys + torch.arange(keys, device=queries.device), self.seed
        )
        limit = drawn.sort(1).values.gather(1, (count - 1).clamp(min=0))
        return (drawn <= limit) & (count > 0)


@dataclass(frozen=True)
class Knockout:
    """A cut, with its layers, steps and branch; None means all."""

    cut: Cut
    layers: Sequence[int] | None = None
    steps: Sequence[int] | None = None
    branch: str | None = None  # "cond" | "uncond"

    def hooks(self) -> Hooks:
        """Hooks that forbid these keys."""
        point = f"blocks.*.{self.cut.attention}.allowed"
        return NO_HOOKS.on(
            point, self._forbid, step=self.steps, branch=self.branch, layers=self.layers
        )

    def intervention(self) -> Interventions:
        """This knockout as one of several interventions in a run."""
        return Interventions(self.hooks())

    def control(self, seed: int = 0) -> "Knockout":
        """The same number of pairs: each query loses as many keys, drawn at random from all."""
        return replace(self, cut=Scattered(self.cut, seed))

    def pairs(self, grid: Grid, keys: int | None = None) -> int:
        """The number of forbidden pairs of query and key; `keys` text rows, None: the tokens."""
        return sum(int(part.sum()) for part in self._parts(self.cut, grid, keys))

    def cuts(self, grid: Grid, keys: int | None = None) -> bool:
        """Whether any pair is forbidden."""
        cut = self.cut.cut if isinstance(self.cut, Scattered) else self.cut  # same number of pairs
        return any(bool(part.any()) for part in self._parts(cut, grid, keys))

    def _parts(self, cut: Cut, grid: Grid, keys: int | None) -> Iterator[Tensor]:
        count = grid[0] * grid[1] * grid[2]
        for queries in torch.arange(count).split(1024):
            yield cut.forbidden(queries, grid, keys or count)

    def _forbid(self, allowed: Tensor, site: Site) -> Tensor | None:
        count, keys = site.grid[0] * site.grid[1] * site.grid[2], allowed.shape[3]
        text = self.cut.attention == "cross_attn"
        queries = torch.arange(count if text else keys, device=allowed.device)
        first, last, _ = site.video.indices(len(queries))  # video and text may attend jointly
        queries = queries[site.tokens] - first
        if last - first != count or len(queries) != allowed.shape[2]:
            raise MinicosError(
                f"{site.name} has {allowed.shape[2]} queries and {keys} keys, of which"
                f" {last - first} are called the video's, and the video has {count} tokens"
            )
        inside = (queries >= 0) & (queries < count)
        key = torch.arange(keys, device=allowed.device)
        columns = key if text else key[first:last]
        if self.cut.text and not text:
            columns = torch.cat([key[:first], key[last:]])
        forbidden = torch.zeros_like(allowed[0, 0])
        found = self.cut.forbidden(queries[inside], site.grid, len(columns))
        forbidden[inside.nonzero(), columns] = found
        if not forbidden.any():
            return None
        if allowed.stride(0) == allowed.stride(1) == 0:  # equal for all samples and heads
            return (allowed[:1, :1] & ~forbidden).expand_as(allowed)
        return allowed & ~forbidden


def scrambled(x: Tensor, seed: int) -> Tensor:
    """A pseudo-random int64 for each value of x and each seed: the finalizer of splitmix64, which
    is one-to-one, so different values stay different.
    """
    x = x + (((seed + 1) * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63))
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        upper = (x >> shift) & ((1 << (64 - shift)) - 1)  # torch shifts signed numbers
        x = (x ^ upper) * factor
    return x
