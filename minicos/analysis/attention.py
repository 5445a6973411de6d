"""Where does attention go? The mass that every token receives, and the flow between frames (ours).

With p = softmax(q k^T / sqrt(k)): the received mass of a key is the sum of p over queries (the mean
token receives 1), and the matrix M[a, b] is the share of frame a's attention that goes to frame b
(rows sum to 1). Both are exact and need no l x l matrix (`ops.attention_mass`). With `queries`,
that many random queries of every frame represent all of them: unbiased, with standard errors, at a
fraction of the cost (`ops.attention_mass_sampled`). The log sum exp of the scores of self-attention
is taken from the forward pass (hook point `lse`) if available, which halves the number of products;
otherwise it is computed. Cross-attention is analysed as well: prompts shorter than the text length
are padded with zero rows, to which the network attends like to any other row. The mass on padding
is shown next to the mass on words.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.options import AttentionOptions
from minicos.analysis.result import Curve, Number, Result, write
from minicos.analysis.tools import cases, controls, figures, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.record import Saved, seen, to_host
from minicos.attend import pattern, thin
from minicos.attention import WITH_LSE
from minicos.condition import WanCondition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.measures import stratified
from minicos.ops import REFERENCE, Ops
from minicos.runs import Progress, Run
from minicos.sample import Step
from minicos.video_model import VideoModel

PARTS = ("self_attn", "cross_attn")  # sub-layers with attention


def attentions(
    use: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Site], None],
    layers: Sequence[int] | None = None,
    *,
    step: tuple[int, ...],
    branch: str = "cond",
    lse: bool = False,
    within: Sequence[str] = PARTS,
) -> Hooks:
    """Hooks that call `use(q, k, allowed, lse, site)` for these sub-layers in these layers (None:
    all), with heads on axis 1.

    `allowed` is the mask of keys left by an intervention (bool, broadcast to b n l t), or None if
    all are allowed. `lse` is the log sum exp of the scores of self-attention (b n l) if requested
    and all keys are allowed, else None.
    """
    held: dict[str, Tensor] = {}
    parts: list[Tensor] = []  # of `allowed`, which arrives in blocks of queries in a long video

    def hold(x: Tensor, site: Site) -> None:
        held[site.name.rpartition(".")[2]] = x

    def collect(allowed: Tensor, site: Site) -> None:
        parts.append(thin(allowed))
        if sum(part.shape[2] for part in parts) < held["q"].shape[2]:
            return
        free = not any(any(part.stride()) for part in parts)  # still one expanded value
        b, n = (max(part.shape[axis] for part in parts) for axis in (0, 1))
        left = None if free else torch.cat([p.expand(b, n, -1, -1) for p in parts], dim=2)
        parts.clear()
        if left is None and lse and ".self_attn." in site.name:
            return  # `finish` follows
        use(held["q"], held["k"], left, None, site)
        held.clear()

    def finish(logs: Tensor, site: Site) -> None:
        if held:  # unless an intervention has finished it already
            use(held["q"], held["k"], None, logs, site)
            held.clear()

    hooks = NO_HOOKS
    for layer in ("*",) if layers is None else layers:
        for name in within:
            for part, hook in (("q", hold), ("k", hold), ("allowed", collect)):
                hooks = hooks.on(f"blocks.{layer}.{name}.{part}", hook, step=step, branch=branch)
        if lse:
            hooks = hooks.on(f"blocks.{layer}.self_attn.lse", finish, step=step, branch=branch)
    return hooks


def gives_lse(model: VideoModel) -> bool:
    """Whether the model's self-attention returns log sum exp as a by-product."""
    return model.ops.self_attention in WITH_LSE


def mass(
    ops: Ops, q: Tensor, k: Tensor, frames: int, allowed: Tensor | None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ops.attention_mass`, restricted to the allowed keys if there is a mask."""
    if allowed is None:
        return ops.attention_mass(q, k, frames, lse)
    key_frames = frames if k.shape[2] == q.shape[2] else 1
    queries = (x.unflatten(2, (frames, -1)).unbind(2) for x in (q, allowed))
    each = [pattern(query, k, seen).sum(2) for query, seen in zip(*queries, strict=True)]  # b n t
    size = q.shape[2] // frames
    between = [received.unflatten(2, (key_frames, -1)).sum(-1) / size for received in each]
    return torch.stack(each).sum(0), torch.stack(between, dim=2)


PAIRS = 400  # most cells of `pairs`


def pairs(
    q: Tensor, k: Tensor, grid: tuple[int, int, int], allowed: Tensor | None = None
) -> Tensor:
    """Attention between the cells of a grid of at most `PAIRS` cells, averaged over the heads of
    the first sample: f h w f h w. Used to show where one token attends.

    The middle token of each cell is the query (q 1 n l k, k 1 n l k); keys are limited to the
    allowed ones and summed over cells, so the shares of a row sum to 1. If there are no more tokens
    than cells, each cell is a token, and the numbers are the attention pattern.
    """
    coarse = _coarse(grid)
    place = [torch.arange(n, device=q.device) * c // n for n, c in zip(grid, coarse, strict=True)]
    f, h, w = torch.meshgrid(*place, indexing="ij")
    cell = ((f * coarse[1] + h) * coarse[2] + w).flatten()  # of each token
    order = cell.argsort(stable=True)
    count = cell.bincount()
    middle = order[count.cumsum(0) - count + count // 2]
    seen = None if allowed is None else allowed[:, :, middle]
    p = pattern(q[:, :, middle], k, seen)[0].mean(0)  # cells l
    shares = p.new_zeros(len(count), len(count)).index_add_(1, cell, p)
    return shares.view(*coarse, *coarse)


def _coarse(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """A grid of at most `PAIRS` cells: at most seven frames, sides in the original proportion."""
    f, h, w = grid
    if f * h * w <= PAIRS:
        return grid
    f = min(f, 7)
    scale = min(1.0, (PAIRS / (f * h * w)) ** 0.5)
    h = max(1, int(h * scale))
    return f, h, max(1, min(int(w * scale), PAIRS // (f * h)))


@dataclass(frozen=True)
class Attention:
    """Attention received by tokens, between frames, and on text rows, for the first sample at the
    chosen layers and steps.
    """

    layers: Sequence[int]
    chosen: Sequence[int]  # steps
    heads: Sequence[int] | None = None  # heads to average; None: all
    branch: str = "cond"
    words: int | None = None  # rows of the prompt; all others are padding
    queries: int | None = None  # random queries per frame; None: all, also if keys are cut
    behind: Callable[[int], range] = figures.four_each  # frames of the video, for labels
    ops: Ops = REFERENCE  # the model's operations: `wan.ops`
    lse: bool = False  # taken from the forward pass: `gives_lse(wan)`
    parts: Sequence[str] = PARTS  # those of PARTS that the model has
    name: str = "attention"
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self) -> Hooks:
        """Hooks on queries and keys at the chosen layers and steps."""
        lse, at = self.lse and self.queries is None, tuple(self.chosen)
        return attentions(
            self._weigh, self.layers, step=at, branch=self.branch, lse=lse, within=self.parts
        )

    def _weigh(
        self, q: Tensor, k: Tensor, allowed: Tensor | None, lse: Tensor | None, site: Site
    ) -> None:
        heads = slice(None) if self.heads is None else list(self.heads)
        if allowed is not None:
            allowed = allowed.expand(*q.shape[:2], -1, -1)[:1, heads]
        q, k = q[:1, heads].detach(), k[:1, heads].detach()
        lse = None if lse is None else lse[:1, heads]
        _, layer, part, _ = site.name.split(".")
        text = part == "cross_attn"
        frames = 1 if text else site.grid[0]
        if not text and k.shape[2] != math.prod(site.grid):
            self._kept.update(self._joint(q, k, allowed, layer, site))
            return

        if not text:
            self._kept[f"pairs.{layer}"] = pairs(q, k, site.grid, allowed)

        def keep(received: Tensor, between: Tensor, name: str = "") -> None:
            if text:
                self._kept[f"text{name}.{layer}"] = received / q.shape[2]  # per query: sums to 1
            else:
                self._kept[f"received{name}.{layer}"] = received.view(site.grid)
                self._kept[f"between{name}.{layer}"] = between

        if self.queries is None or allowed is not None:
            received, between = mass(self.ops, q, k, frames, allowed, lse)
            keep(received[0].mean(0), between[0].mean(0))
            if self.queries is not None:  # exact in any case, since keys are cut
                keep(0 * received[0].mean(0), 0 * between[0].mean(0), "_error")
            return
        draw = torch.Generator().manual_seed(2000 * site.step + 2 * int(layer) + text)
        count = min(self.queries * site.grid[0], q.shape[2]) // frames
        rows = stratified(q, frames, count, draw)
        (received, between), errors = self.ops.attention_mass_sampled(q, k, frames, rows)
        keep(received[0].mean(0), between[0].mean(0))
        one, other = (error[0].square().sum(0).sqrt() / q.shape[1] for error in errors)
        keep(one, other, "_error")

    def _joint(
        self, q: Tensor, k: Tensor, allowed: Tensor | None, layer: str, site: Site
    ) -> dict[str, Tensor]:
        """The same for joint attention of text and video, for the queries of the video. Rows of
        "between" sum to 1 minus the share of the text.
        """
        if self.queries is not None:
            raise MinicosError("--queries: a sample of queries is not for joint attention")
        f, h, w = site.grid
        start, stop, _ = site.video.indices(k.shape[2])
        masses = []
        for rows in torch.arange(start, stop).view(f, -1):  # the queries of a frame
            seen = None if allowed is None else allowed[:, :, rows]
            masses.append(mass(self.ops, q[:, :, rows], k, 1, seen)[0][0].mean(0))
        every = torch.stack(masses)  # f j
        received = every.sum(0)
        return {
            f"received.{layer}": received[start:stop].view(site.grid),
            f"between.{layer}": every[:, start:stop].unflatten(1, (f, -1)).sum(-1) / (h * w),
            # per query
            f"text.{layer}": torch.cat([received[:start], received[stop:]]) / (f * h * w),
        }

    def keep(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        """ "received.3": f h w; "between.3": f f; "text.3": t; "pairs.3": see `pairs`. With a
        sample of queries also their errors, "received_error.3" ...
        """
        kept = to_host(self._kept)
        self._kept.clear()
        return {name: x.half() if name.startswith("pairs") else x for name, x in kept.items()}

    def draw(self, saved: Saved, run: Run) -> list[str]:
        """Sheets of received mass and of mass between frames, the share on padding, and
        attention.safetensors.
        """
        names = []
        shown = [i for i in self.chosen if i < len(saved)]
        columns = [f"layer {k}" for k in self.layers]
        for i in shown:
            received = np.stack([saved[i][f"received.{k}"].numpy() for k in self.layers], axis=1)
            frames = [self.behind(f) for f in range(len(received))]
            names.append(f"attention/received_step_{i:02d}.png")
            figures.maps(
                run.path(names[-1]),
                received,
                rows=[figures.frame_name(some) for some in frames],
                columns=columns,
                title=f"Attention received, step {i}: video frames (down), layers (across)"
                + self._accuracy(saved, [i], "received"),
                bar="attention that a token receives; mean token: 1",
                beneath=figures.under(seen(run, i), [some[-1] if some else 0 for some in frames]),
            )
        if shown:
            flows = [[saved[i][f"between.{k}"].numpy() for k in self.layers] for i in shown]
            figures.maps(
                run.path("attention_frames.png"),
                np.array(flows),
                rows=[f"step {i}" for i in shown],
                columns=columns,
                title="From which frame of tokens (down) to which (across) attention flows"
                + self._accuracy(saved, shown, "between"),
                bar="share of a frame's attention",
                limits=(0, 1),
            )
            names.append("attention_frames.png")
        padded = "cross_attn" in self.parts
        if shown and padded and (words := self.words) is not None:
            text = {
                i: [float(saved[i][f"text.{k}"][words:].sum()) for k in self.layers] for i in shown
            }
            figures.lines(
                run.path("attention_padding.png"),
                [Curve(f"step {i}", tuple(self.layers), text[i], x_label="layer") for i in shown],
                y="share of cross-attention",
                title=f"Mass on the zero-padded text rows ({self.words} rows are words)"
                + ("" if self.queries is None else f", from {self.queries} queries a frame"),
            )
            names.append("attention_padding.png")
        run.save_tensors(
            "attention.safetensors", {f"step{i}.{k}": v for i in shown for k, v in saved[i].items()}
        )
        return [*names, "attention.safetensors"]

    def numbers(self, saved: Saved) -> list[Number]:
        """Shares of attention, mean over the chosen steps, layers and heads."""
        shown = [saved[i] for i in self.chosen if i < len(saved)]
        between = [step[f"between.{k}"] for step in shown for k in self.layers]
        if not between or len(between[0]) < 2:
            return []
        first = torch.stack([flow[1:, 0].mean() for flow in between]).mean()
        even = f"{1 / len(between[0]):.3g} if all frames were alike"
        even += f"; video: {figures.frame_name(self.behind(0))}"
        name = "attention of later frames of tokens to the first"
        found = [Number(name, float(first), unit="share", note=even)]
        if "cross_attn" in self.parts and (words := self.words) is not None:
            text = [step[f"text.{k}"] for step in shown for k in self.layers]
            padded = torch.stack([row[words:].sum() for row in text]).mean()
            even = f"{1 - words / len(text[0]):.3g} if all rows were alike"
            name = "cross-attention on padded rows of the text"
            found.append(Number(name, float(padded), unit="share", note=even))
        return found

    def _accuracy(self, saved: Saved, steps: Sequence[int], what: str) -> str:
        """The part of a title that describes a sample of queries; "" if all were used."""
        if self.queries is None:
            return ""
        worst = max(float(saved[i][f"{what}_error.{k}"].max()) for i in steps for k in self.layers)
        return f"\n{self.queries} random queries a frame; standard errors up to {worst:.2g}"


# -- the question, on puzzles ----------------------------------------------------------------------


def measure(wan: VideoModel, at: Sequence[int], batch: Sequence[Case]) -> dict[str, Tensor]:
    """Attention at the steps `at`, averaged over heads, and the values of uniform attention.

    Returns:
        padding: share of cross-attention on the zero-padded text rows, b step layer.
        first: share of the later frames' self-attention on the given frame 0, b step layer.
        uniform_padding, uniform_first: the same under uniform attention, b.
    """
    condition = cases.condition(wan, batch)
    assert isinstance(condition, WanCondition)  # puzzles are answered by a network here
    words = condition.text.any(-1).sum(1)  # b
    found: dict[tuple[int, bool], list[Tensor]] = {
        (s, text): [] for s in at for text in (True, False)
    }

    def weigh(q: Tensor, k: Tensor, allowed: Tensor | None, lse: Tensor | None, site: Site) -> None:
        text = ".cross_attn." in site.name
        received, between = mass(wan.ops, q, k, 1 if text else site.grid[0], allowed, lse)
        if text:
            share = received.mean(1) / q.shape[2]  # b t, of one query
            padded = [row[w:].sum() for row, w in zip(share, words, strict=True)]
            found[site.step, text].append(torch.stack(padded))
        else:
            found[site.step, text].append(between.mean(1)[:, 1:, 0].mean(1))

    hooks = attentions(weigh, step=tuple(at), lse=gives_lse(wan))
    steps = wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=hooks)
    deque(islice(steps, max(at) + 1), maxlen=0)
    shares = {
        name: torch.stack([torch.stack(found[s, text], dim=1) for s in at], dim=1)
        for name, text in (("padding", True), ("first", False))
    }
    return shares | {
        "uniform_padding": 1 - words / condition.text.shape[1],
        "uniform_first": torch.full((len(batch),), 1 / condition.shape[2]),
    }


def study(wan: VideoModel, run: Run, options: AttentionOptions) -> Result:
    """Attention on padding and on the given frame, compared with uniform attention and with an
    untrained network.
    """
    at = options.at or (wan.preset.steps // 2,)
    work = cases.batches(cases.chosen(options))
    untrained = partial(measure, controls.untrained(wan), at)
    with Progress(2 * len(work), "attention") as bar:
        trained = cases.collect(run, "trained", work, partial(measure, wan, at), bar)
        random = cases.collect(run, "untrained", work, untrained, bar)
    numbers, curves = [], []
    for s, step in enumerate(at):
        for what, name in (
            ("cross-attention on padding rows", "padding"),
            ("attention of later frames on the given one", "first"),
        ):
            ours, others = trained[name][:, s], random[name][:, s]  # n layer
            even, where = trained[f"uniform_{name}"], f"{what}, step {step}"
            numbers += [
                stats.mean(where, ours.mean(1), f"uniform: {even.mean():.3f}", "share"),
                stats.difference(
                    f"{where}: minus uniform", ours.mean(1), even, "uniform attention", "share"
                ),
                stats.difference(
                    f"{where}: trained minus untrained",
                    ours.mean(1),
                    others.mean(1),
                    "untrained network",
                    "share",
                ),
            ]
            for network, values in (("", ours), (", untrained", others)):
                title = f"{name}{network}" if len(at) == 1 else f"{name}{network}, step {step}"
                curves.append(stats.curve(title, values, range(values.shape[1]), "layer", "share"))
    figures.lines(
        run.path("attention.png"),
        curves,
        y="share of attention",
        title="Attention on zero-padded text rows and on the given frame",
        levels={"padding, uniform": float(trained["uniform_padding"].mean())},
    )
    return write(
        run, Result("attention", run.settings, numbers, curves=curves, files=["attention.png"])
    )
