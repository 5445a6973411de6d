"""Which tokens have the most energy in each layer? The L2 norm of every token after every block
(paper, Sec. 5.1 and Fig. 6a).

The paper's interpretation: early layers attend to the whole picture and its background, later ones
to the objects of the task. A hook on `blocks.*` computes everything, for several blocks of a small
video at once, so watching a layer costs one to three numbers per token:

    raw       || h_k ||, the paper's. Dominated by a few massive channels, which are the same on
              every token
    centred   the same without the mean token and without channels above 100 times the median one,
              divided by the median token's
    update    || h_k - h_(k-1) ||, what the block added; h_(-1) is the patch embedding

At the chosen steps it also computes the first three principal components over tokens, and the
largest channels. Nothing synchronises with the card while it computes: results stay there until the
step has ended, and are then copied in one transfer. Mean token, channel sizes and principal axes
are estimated from at most 4,096 evenly spaced tokens, which in a small video is all of them.

If a puzzle knows which pixels matter, `within` turns the picture into a number: the AUROC of energy
against a mask, inside each frame; .5 means that energy is uninformative. The clean estimate of the
same step, which looks into no layer, is the baseline.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.options import EnergyOptions
from minicos.analysis.result import Curve, Number, Result, write
from minicos.analysis.tools import cases, controls, figures, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.masks import on_grid
from minicos.analysis.tools.record import Saved, seen, to_host
from minicos.analysis.tools.stats import auroc, massive
from minicos.hooks import Hooks, Site
from minicos.ops import REFERENCE, Ops
from minicos.runs import Progress, Run
from minicos.sample import Step
from minicos.video_model import VideoModel

FORMS = ("raw", "centred", "update")
CHANNELS = 8  # number of largest channels to keep
SAMPLE = 4096  # most tokens for means and axes
TOGETHER = 3 << 18  # bytes of streams up to which blocks wait for each other: a core's cache
BASIS = 12  # directions in which the three components are searched
ROUNDS = 4  # of the search; in each, a direction of twice the variance gains a factor of four


@dataclass(frozen=True)
class Energy:
    """Token energy of every block, step and branch of the first sample: arrays, sheets (frames x
    layers), curves, components.
    """

    chosen: Sequence[int]  # steps drawn as sheets; numbers are kept for all steps
    behind: Callable[[int], range] = figures.four_each  # frames of the video, for labels
    sheets: Sequence[str] = ("centred", "raw", "update", "components")  # to draw, in this order
    ops: Ops = REFERENCE  # the model's operations: `wan.ops`
    sigmas: Sequence[float] | None = None  # noise levels of the run, for an axis of steps
    name: str = "energy"
    # "cond.forms": the energies of the layers, on the device until the step has ended
    _kept: dict[str, list[Tensor]] = field(default_factory=dict)
    # by branch: the last block, and the streams (l d) after the blocks that are not computed yet,
    # behind the one that entered the first of them
    _streams: dict[str, tuple[Site, list[Tensor]]] = field(default_factory=dict)

    def hooks(self) -> Hooks:
        """Hooks on every block, in every pass."""
        return Hooks().on("embed", self._begin).on("blocks.*", self._record)

    def _begin(self, x: Tensor, site: Site) -> None:
        for name in [name for name in self._kept if name.startswith(f"{site.branch}.")]:
            del self._kept[name]
        self._streams[site.branch] = site, [x[0].detach()]

    def _record(self, x: Tensor, site: Site) -> None:
        _, streams = self._streams[site.branch]
        streams.append(x[0].detach())
        self._streams[site.branch] = site, streams
        if sum(h.nbytes for h in streams) > TOGETHER:
            self._compute(site.branch)

    def _compute(self, branch: str) -> None:
        """Compute all that waits. Blocks of a small video are computed together: one by one, a
        CPU would be busy with calling operations, not with numbers.
        """
        site, streams = self._streams[branch]
        self._streams[branch] = site, streams[-1:]
        if len(streams) == 2:  # of a large video: no copies
            before, h = (x[None] for x in streams)
        else:
            every = torch.stack(streams)
            before, h = every[:-1], every[1:]  # n l d
        values = {"forms": forms(h, before, self.ops).transpose(0, 1).unflatten(2, site.grid)}
        if site.step in self.chosen:
            size, index = sample(h).abs().mean(1).topk(min(CHANNELS, h.shape[2]))
            values |= {"size": size, "channel": index.int()}
            if "components" in self.sheets:
                coordinates, axes = sketch(h)
                values |= {"coordinates": coordinates.unflatten(1, site.grid), "axes": axes}
        for name, value in values.items():
            self._kept.setdefault(f"{branch}.{name}", []).append(value)

    def keep(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        """ "cond.raw" ...: layer f h w; at the chosen steps "cond.components": layer f h w 3,
        "cond.size", "cond.channel": layer 8.
        """
        for branch, (_, streams) in self._streams.items():
            if len(streams) > 1:
                self._compute(branch)
        kept = to_host({name: torch.cat(layers) for name, layers in self._kept.items()})
        self._kept.clear()
        self._streams.clear()
        for name in [*kept]:
            branch, what = name.split(".")
            if what == "forms":
                each = kept.pop(name).unbind(1)  # layer f h w
                kept |= {f"{branch}.{k}": x.clone() for k, x in zip(FORMS, each, strict=True)}
            elif what == "coordinates":
                z, axes = kept.pop(name), kept.pop(f"{branch}.axes")  # layer f h w k, layer d k
                rgb = principal(z.flatten(1, 3), axes).view(*z.shape[:-1], 3)
                kept[f"{branch}.components"] = rgb
        return kept

    def draw(self, saved: Saved, run: Run) -> list[str]:
        """Sheets of the chosen steps, curves over layers and frames, and energy.safetensors."""
        kept = (key.removesuffix(".raw") for step in saved for key in step if key.endswith(".raw"))
        branches = sorted(set(kept))  # files do not preserve an order
        whole = {f"{b}.{form}": _whole(saved, f"{b}.{form}") for b in branches for form in FORMS}
        run.save_tensors("energy.safetensors", whole)
        chosen = [i for i in self.chosen if i < len(saved)]
        sheets = [
            self._sheets(saved[i], b, i, run)
            for b in branches
            for i in chosen
            if f"{b}.raw" in saved[i]
        ]
        for b in branches:
            self._curves(whole[f"{b}.raw"], b, chosen, run)
        drawn = [
            f"energy_{what}_{b}.png" for b in branches for what in ("layers", "steps", "frames")
        ]
        return [*(name for names in sheets for name in names), *drawn, "energy.safetensors"]

    def numbers(self, saved: Saved) -> list[Number]:
        """Where the prompted pass is busiest: the layer, and the share of the first frame."""
        if not any("cond.raw" in step for step in saved):
            return []
        raw = _whole(saved, "cond.raw").nan_to_num().mean((0, 3, 4))  # layer f
        depth, latents = raw.shape
        share = float(raw[:, 0].sum() / raw.sum())
        return [
            Number(
                "layer with the largest tokens",
                int(raw.mean(1).argmax()),
                unit="layer",
                note=f"mean of all steps; layers 0 to {depth - 1}",
            ),
            Number(
                "token energy in the first frame of tokens",
                share,
                unit="share",
                note=f"{1 / latents:.3g} if all frames were alike; "
                f"video: {figures.frame_name(self.behind(0))}",
            ),
        ]

    def _curves(self, raw: Tensor, branch: str, chosen: Sequence[int], run: Run) -> None:
        """Curves of mean energy (step layer f h w) over layers, steps and frames."""
        depth, latents = raw.shape[1:3]
        where = "" if branch == "cond" else ", unprompted branch"
        figures.lines(
            run.path(f"energy_layers_{branch}.png"),
            [
                Curve(
                    f"step {i}", range(depth), raw[i].flatten(1).mean(1).tolist(), (), (), "layer"
                )
                for i in chosen
            ],
            y="mean L2 norm of a token",
            title=f"Raw token energy across layers{where}",
        )
        figures.grid(
            run.path(f"energy_steps_{branch}.png"),
            raw.mean((2, 3, 4)).T.numpy(),
            x="denoising step",
            y="layer",
            bar="mean L2 norm of a token",
            title=f"Raw token energy{where}",
            sigmas=self.sigmas,
        )
        every = raw.mean((0, 3, 4))  # layer f
        figures.lines(
            run.path(f"energy_frames_{branch}.png"),
            [
                Curve(f"layer {k}", range(latents), every[k].tolist(), (), (), "latent frame")
                for k in figures.evenly(depth, 8)
            ],
            y="mean L2 norm of a token, all steps",
            title=f"Raw token energy across frames{where}",
        )

    def _sheets(self, step: Mapping[str, Tensor], branch: str, index: int, run: Run) -> list[str]:
        """One sheet for each form and one for the components: video frames down, layers across."""
        names = []
        video = seen(run, index)
        for form in self.sheets:
            values = step.get(f"{branch}.{form}")
            if values is None:
                continue
            names.append(f"energy/{form}_{branch}_step_{index:02d}.png")
            frames = [self.behind(f) for f in range(values.shape[1])]
            rows = [figures.frame_name(some) for some in frames]
            beneath = figures.under(video, [some[-1] if some else 0 for some in frames])
            columns = [f"layer {k}" for k in range(len(values))]
            where = "" if branch == "cond" else ", unprompted branch"
            title = f"{TITLES[form]}, step {index}{where}: video frames (down), layers (across)"
            array = values.numpy().swapaxes(0, 1)  # f layer h w, and of components a last axis of 3
            if form == "components":
                _components(run.path(names[-1]), array, rows, columns, title)
                continue
            ends = np.percentile(array, [1, 99])
            limits = (float(ends[0]), float(ends[1])) if form == "centred" else None
            figures.maps(
                run.path(names[-1]),
                array,
                rows=rows,
                columns=columns,
                title=title,
                bar=BARS[form],
                beneath=beneath,
                limits=limits,
            )
        return names


def _components(
    path: Path, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str
) -> None:
    """Components (f layer h w 3) as colours, scaled separately for each layer."""
    r, c = figures.evenly(len(rows), figures.ROWS), figures.evenly(len(columns), figures.COLUMNS)
    painted = {k: figures.colours(values[:, k]) for k in c}
    images = [[painted[k][i] for k in c] for i in r]
    names = [rows[i] for i in r], [columns[k] for k in c]
    figures.sheet(path, images, rows=names[0], columns=names[1], title=title)


TITLES = {
    "raw": "Raw token energy",
    "centred": "Centred token energy",
    "update": "What each block writes",
    "components": "Three principal components as red, green and blue, grey: the mean token",
}
BARS = {
    "raw": "L2 norm of a token",
    "centred": "L2 norm of a token without the mean, over the median token's",
    "update": "L2 norm of what the block adds to a token",
}


def sample(h: Tensor) -> Tensor:
    """At most SAMPLE evenly spaced tokens of h (... l d): float32."""
    return h[..., :: -(-h.shape[-2] // SAMPLE), :].float()


def forms(h: Tensor, before: Tensor, ops: Ops = REFERENCE) -> Tensor:
    """Token energy in each of FORMS: h is the stream after a block, `before` the stream before it
    (... l d) -> 3 ... l float32. Leading axes are samples, or blocks.
    """
    some = sample(h)
    energies = ops.stream_energy(h, before, some.mean(-2), (~massive(some)).float())
    energies[1] /= energies[1].median(-1, keepdim=True).values.clamp_min(1e-12)
    return energies


def sketch(h: Tensor) -> tuple[Tensor, Tensor]:
    """The directions in which tokens h (... l d) vary most: coordinates on a few directions
    (... l k), and the directions, orthonormal (... d k). By subspace iteration from fixed random
    directions (Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4).
    """
    some = sample(h)
    some = some - some.mean(-2, keepdim=True)
    source = h.device if h.is_cuda else torch.device("cpu")
    draw = torch.Generator(source).manual_seed(0)
    size = h.shape[-1], min(BASIS, h.shape[-1])
    axes = torch.randn(size, generator=draw, device=source).to(h.device)
    for _ in range(ROUNDS):
        axes = torch.linalg.qr(some.mT @ (some @ axes)).Q
    return h.float() @ axes, axes


def principal(coordinates: Tensor, axes: Tensor) -> Tensor:
    """Tokens on their first three principal axes, from the results of `sketch`: ... l 3 float32.
    The largest entry of each axis is positive.
    """
    z = coordinates - coordinates.mean(-2, keepdim=True)
    _, turn = torch.linalg.eigh(z.mT @ z)
    turn = turn[..., -3:].flip(-1)
    axes = axes @ turn
    sign = axes.gather(-2, axes.abs().argmax(-2, keepdim=True)).sign()
    return z @ (turn * sign)


def components(h: Tensor) -> Tensor:
    """Tokens h (l d) on approximately their first three principal axes: l 3 float32. They hold
    0.9998 of the variance of the exact components, and 0.999 if computed from a sample (the worst
    of 140 and of 12 random spectra without a gap; a test draws others).
    """
    return principal(*sketch(h))


def _whole(saved: Saved, name: str) -> Tensor:
    """An array over all steps, with NaN where guidance 1 skipped the branch, so that the step axis
    stays complete.
    """
    some = next(step[name] for step in saved if name in step)
    return torch.stack([step.get(name, torch.full_like(some, torch.nan)) for step in saved])


# -- the question, on puzzles ----------------------------------------------------------------------


def within(energy: Tensor, mask: Tensor) -> float:
    """AUROC of energy (f h w) against a mask of tokens (bool f h w) inside each frame after the
    given one, averaged over the frames that contain both kinds; NaN if none does.

    Computed within frames because across frames the given one would decide alone: its tokens are
    different, and none of them belongs to the answer.
    """
    pairs = zip(energy[1:], mask[1:], strict=True)
    found = [auroc(e.numpy(), m.numpy()) for e, m in pairs if 0 < int(m.sum()) < m.numel()]
    return sum(found) / len(found) if found else float("nan")


def changed(x0: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The distance of a clean estimate (c f h w) to its own first frame at every token: f h w of
    the token grid, the L2 norm over the token's latents.
    """
    apart = (x0 - x0[:, :1]).float().square().sum(0)
    patches = apart.unflatten(1, (grid[1], -1)).unflatten(3, (grid[2], -1))
    return patches.sum((2, 4)).sqrt()


def measure(wan: VideoModel, at: Sequence[int], batch: Sequence[Case]) -> dict[str, Tensor]:
    """AUROC within frames (`within`) against the cells of the first answer, at the steps `at`.

    Returns:
        auroc: of token energy, b step form layer.
        estimate: of the step's own clean estimate, b step.
    """
    found: dict[int, list[Tensor]] = {step: [] for step in at}
    shown: dict[int, Tensor] = {}
    before: dict[str, Tensor] = {}
    condition = cases.condition(wan, batch)
    grid = wan.grid(condition.shape)
    masks = [on_grid(cases.known(case).answer_mask(0), grid) for case in batch]

    def begin(x: Tensor, site: Site) -> None:
        before["stream"] = x

    def compare(x: Tensor, site: Site) -> None:
        energies = forms(x, before["stream"], wan.ops).transpose(0, 1).unflatten(2, grid).cpu()
        rows = [
            [within(energy, mask) for energy in each]
            for each, mask in zip(energies, masks, strict=True)
        ]
        found[site.step].append(torch.tensor(rows))
        before["stream"] = x

    hooks = Hooks().on("embed", begin, step=tuple(at), branch="cond")
    hooks = hooks.on("blocks.*", compare, step=tuple(at), branch="cond")
    steps = wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=hooks)
    for step in islice(steps, max(at) + 1):
        if step.index in at:
            pairs = zip(step.x0_cond.cpu(), masks, strict=True)
            shown[step.index] = torch.tensor([within(changed(x0, grid), m) for x0, m in pairs])
    return {
        "auroc": torch.stack([torch.stack(found[step], dim=2) for step in at], dim=1),
        "estimate": torch.stack([shown[step] for step in at], dim=1),
    }


def study(wan: VideoModel, run: Run, options: EnergyOptions) -> Result:
    """AUROC of the answer's cells in early and late layers, compared with the step's own estimate
    and with an untrained network.
    """
    at = options.at or (wan.preset.steps // 2,)
    work = cases.batches(cases.chosen(options))
    untrained = partial(measure, controls.untrained(wan), at)
    with Progress(2 * len(work), "energy") as bar:
        trained = cases.collect(run, "trained", work, partial(measure, wan, at), bar)
        random = cases.collect(run, "untrained", work, untrained, bar)
    depth = trained["auroc"].shape[3]
    curves = []
    for s, step in enumerate(at):
        for k, form in enumerate(FORMS):
            for name, found in ((form, trained), (f"{form}, untrained", random)):
                title = name if len(at) == 1 else f"{name}, step {step}"
                values = found["auroc"][:, s, k]
                curves.append(stats.curve(title, values, range(depth), "layer", "AUROC"))
    shown = float(np.nanmean(trained["estimate"]))
    figures.lines(
        run.path("auroc.png"),
        curves,
        y="AUROC within frames",
        title=f"Does token energy single out the answer? {len(trained['auroc'])} puzzles",
        levels={"blind": 0.5, "the estimate itself": shown},
    )
    made = numbers(trained, random, at)
    return write(run, Result("energy", run.settings, made, curves=curves, files=["auroc.png"]))


def numbers(
    trained: Mapping[str, np.ndarray], random: Mapping[str, np.ndarray], at: Sequence[int]
) -> list[Number]:
    """For every form of energy (`measure`): late layers compared with the step's own estimate, with
    early layers and with an untrained network.
    """
    third = max(1, trained["auroc"].shape[3] // 3)
    out = []
    for s, step in enumerate(at):
        for k, form in enumerate(FORMS):
            ours, others = trained["auroc"][:, s, k], random["auroc"][:, s, k]  # n layer
            early, late = ours[:, :third].mean(1), ours[:, -third:].mean(1)
            what = f"AUROC within frames, {form} energy, step {step}, late third of layers"
            blind = others[:, -third:].mean(1)
            shown = trained["estimate"][:, s]
            against = {
                "minus the estimate's own": (shown, "the step's own clean estimate"),
                "minus the early third": (early, "early third"),
                "trained minus untrained": (blind, "untrained network"),
            }
            out.append(stats.mean(what, late, "0.5: blind", "AUROC"))
            out += [
                stats.difference(f"{what}: {name}", late, values, note, "AUROC")
                for name, (values, note) in against.items()
            ]
    return out
