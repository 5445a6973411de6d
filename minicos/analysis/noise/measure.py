"""Measurements of noise: each edit of each case compared with the clean run of that case.

`measure` handles one edit of one batch, `measure_all` all edits that the options ask for (`edits`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minicos.analysis.noise.edit import Noise, follow
from minicos.analysis.options import NoiseOptions
from minicos.analysis.result import Number
from minicos.analysis.tools import cases, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.figures import evenly
from minicos.analysis.tools.record import Saved, entering, kept, record
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.puzzles import timeline
from minicos.runs import Progress, Run
from minicos.sample import Model, Step
from minicos.video_model import VideoModel

TOKENS = 1024  # most rows of a hidden state for CKA


@dataclass(frozen=True)
class Clean:
    """Records the clean estimate of each step of the clean run and, on request, the output of a
    block in the prompted pass.
    """

    layer: int | None
    name: str = "clean"
    _seen: list[Tensor] = field(default_factory=list)

    def hooks(self) -> Hooks:
        """Hooks on the chosen block, if there is one."""
        return (
            NO_HOOKS
            if self.layer is None
            else Hooks().on(f"blocks.{self.layer}", self._record, branch="cond")
        )

    def _record(self, h: Tensor, site: Site) -> None:
        self._seen.append(h[:, evenly(h.shape[1], TOKENS)].float())

    def keep(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        """ "x0": b c f h w; "hidden": b l d, at most TOKENS tokens."""
        kept = {"x0": step.x0}
        if self.layer is not None:
            kept["hidden"] = self._seen.pop()
        return kept

    def draw(self, saved: Saved, run: Run) -> list[str]:
        """Nothing."""
        return []

    def numbers(self, saved: Saved) -> list[Number]:
        """None."""
        return []


def measure(
    wan: VideoModel,
    condition: Condition,
    noise: Tensor,
    clean: Run,
    edit: Noise,
    layer: int | None = None,
    start: int | None = None,
) -> dict[str, Tensor]:
    """One edited run compared with the clean one in `clean`, from the first edited step on.

    The run starts there, or at an earlier step `start`, which gives the same numbers at a higher
    cost.

    Returns:
        squared: squared distance of the clean estimates, b N f; NaN before the edit.
        cka, hidden: 1 - debiased CKA over tokens, of the estimates and of the block's output, b N.
        injected: the dose, b f.
        final: latent of the video, b c f h w.
        passes: number of network passes, 0-dimensional.
    """
    n, first = len(wan.schedule()), min(edit.steps)
    start = first if start is None else start
    before = kept(clean, Clean.name, start - 1)["x0"].to(noise) if start else None
    x, state = entering(clean, start, noise)
    watch = Clean(layer)
    steps = follow(
        wan, condition, x, edit, start=start, state=state, x0=before, hooks=watch.hooks()
    )
    twins, passes = None, 0
    if wan.preset.solver != "euler" and edit.mode != "null" and edit.steps != (0,):
        beside = Clean(layer)
        null = replace(edit, mode="null")
        twins = follow(wan, condition, x, null, start=start, state=state, hooks=beside.hooks())
    b, _, f, _, _ = noise.shape
    out = {
        "squared": torch.full((b, n, f), torch.nan, dtype=torch.float64),
        "cka": torch.full((b, n), torch.nan),
    }
    if layer is not None:
        out["hidden"] = out["cka"].clone()
    injected = torch.zeros(b, f, dtype=torch.float64)
    for step, dose in steps:
        i, seen = step.index, watch.keep(step, clean)
        held = kept(clean, Clean.name, i) if twins is None else beside.keep(next(twins)[0], clean)
        injected += dose.cpu()
        passes += len(step.velocities) * (1 if twins is None else 2)
        if i < first:
            continue
        ours, theirs = seen["x0"], held["x0"].to(noise)
        out["squared"][:, i] = stats.squared(ours, theirs).cpu()
        free = (step.sigma_map > 0).flatten().expand(f)
        pairs = zip(ours[:, :, free], theirs[:, :, free], strict=True)
        out["cka"][:, i] = torch.tensor(
            [_apart(_tokens(wan, a), _tokens(wan, b)) for a, b in pairs]
        )
        if layer is not None:
            pairs = zip(seen["hidden"], held["hidden"].to(noise), strict=True)
            out["hidden"][:, i] = torch.tensor([_hidden(a, b) for a, b in pairs])
    return out | {"injected": injected, "final": step.next, "passes": torch.tensor(passes)}


def _tokens(wan: VideoModel, x0: Tensor) -> Tensor:
    """A latent (c f h w) as the network's tokens (l, c * patch)."""
    f, h, w = wan.grid((1, *x0.shape))
    return rearrange(x0, "c (f pf) (h ph) (w pw) -> (f h w) (c pf ph pw)", f=f, h=h, w=w)


def _hidden(ours: Tensor, theirs: Tensor) -> float:
    keep = ~stats.massive(theirs)  # they would dominate CKA
    return _apart(ours[:, keep], theirs[:, keep])


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """1 - CKA; exactly 0 for equal tensors."""
    return 0.0 if torch.equal(ours, theirs) else 1 - stats.cka(ours, theirs)


def edits(options: NoiseOptions, steps: int, imposed: Sequence[bool]) -> dict[str, Noise]:
    """The edits of a run of `steps` steps, by name. `imposed` says of each latent frame whether it
    is imposed.
    """
    at = tuple(range(steps)) if options.at is None else options.at
    if not at or not 0 <= min(at) <= max(at) < steps:
        raise MinicosError(
            f"noise at steps {', '.join(map(str, at))}: the run has steps 0 to {steps - 1}"
        )
    free = [f for f, fixed in enumerate(imposed) if not fixed]
    frames = free if options.frames is None else options.frames
    if fixed := [f for f in frames if f not in free]:
        raise MinicosError(
            f"latent frame {fixed[0]} is imposed or missing: take some of "
            f"{', '.join(map(str, free))}"
        )
    spread = options.match == "none" or options.mode == "add"
    cells = at if spread else tuple(at[i] for i in evenly(len(at), len(free)))
    dose = float(len(free)) if options.dose is None else options.dose
    edit = Noise(options.mode, (), dose=dose, seed=options.seed)
    return {
        "null": Noise("null", (at[len(at) // 2],)),
        **{
            f"seed {k}": Noise("replace", (0,), seed=options.seed + 10**8 * k)
            for k in range(1, options.others + 1)
        },
        **{f"step {s}": replace(edit, steps=(s,)) for s in at},
        **{f"frame {f}": replace(edit, steps=cells, frames=(f,)) for f in frames},
    }


@dataclass(frozen=True)
class Measured:
    """All measurements; the first axis of every array is the cases."""

    edits: Mapping[str, Noise]
    # of each edit and of "clean"; "final" is kept for the first batch only
    runs: Mapping[str, Mapping[str, np.ndarray]]
    sigmas: tuple[float, ...]
    boundary: int | None  # the first step of the low-noise expert, if there are two experts
    free: tuple[int, ...]  # latent frames that are not imposed
    pictured: tuple[int, ...]  # those that show a given picture: `Model.pictured`
    behind: tuple[range, ...]  # the video frames of each: `Model.frames_behind`
    moved: np.ndarray  # squared distance of the clean run's estimates to the last one  n N f

    def names(self, kind: str) -> list[str]:
        """The edits called "step ...", "frame ..." or "seed ..."."""
        return [name for name in self.edits if name.startswith(f"{kind} ")]

    @property
    def seen(self) -> tuple[int, ...]:
        """The latent frames that are not imposed and whose frames are in the video."""
        return tuple(f for f in self.free if self.behind[f])

    @property
    def noised(self) -> np.ndarray:
        """The steps of the edits called "step ..."."""
        return np.array([self.edits[name].steps[0] for name in self.names("step")], dtype=int)

    @property
    def puzzles(self) -> bool:
        """Whether the cases are puzzles, which know their answers."""
        return "solved" in self.runs["clean"]

    @property
    def unit(self) -> np.ndarray:
        """Squared distance to another seed at every step, per latent frame: N f, mean over cases
        and seeds.
        """
        return np.mean([self.runs[name]["squared"].mean(0) for name in self.names("seed")], axis=0)

    def d(self, name: str, frames: Sequence[int] | None = None) -> np.ndarray:
        """D of every step's estimate to the clean run's, over some latent frames (by default those
        that are not imposed and are in the video): n N.
        """
        frames = self.seen if frames is None else frames
        return stats.distance(self.runs[name]["squared"], self.unit, frames)

    @property
    def estimates(self) -> np.ndarray:
        """Convergence of the clean run: D of each step's estimate to the last one, n N."""
        return stats.distance(self.moved, self.unit[-1], self.seen)

    def final(self, name: str) -> np.ndarray:
        """D of the video's latent: n."""
        return self.d(name)[:, -1]

    def untouched(self, name: str) -> np.ndarray | None:
        """D of the video's latent over the frames that the edit did not change: n; None if there
        are none.
        """
        touched = self.edits[name].frames
        others = [] if touched is None else [f for f in self.seen if f not in touched]
        return self.d(name, others)[:, -1] if others else None

    def dose(self, name: str) -> np.ndarray:
        """Squared norm injected over the run, in latent frames of unit variance: n."""
        return self.runs[name]["injected"].sum(1)

    def shown(self, name: str, which: str) -> np.ndarray:
        """The video frames (bool F) that are "all", are "untouched" by the edit, or show the whole
        "answer".
        """
        count = self.runs["clean"]["right"].shape[1]
        if which == "all":
            return np.ones(count, bool)
        if which == "answer":
            return timeline(count) >= 1
        touched = self.edits[name].frames
        hidden = [i for f in (self.free if touched is None else touched) for i in self.behind[f]]
        return ~np.isin(np.arange(count), hidden)

    def passes(self, kind: str = "step") -> tuple[int, int]:
        """Network passes of the clean run and a sweep over the edits of a kind; and those of as
        many full runs as there are edits.
        """
        clean, names = int(self.runs["clean"]["passes"].sum()), self.names(kind)
        swept = sum(int(self.runs[name]["passes"].sum()) for name in names)
        return clean + swept, clean * len(names)


def measure_all(
    wan: VideoModel,
    chosen: Sequence[Case],
    run: Run,
    options: NoiseOptions,
    most: int = cases.MOST,
    bar: Progress | None = None,
) -> Measured:
    """Run and measure every edit of every case. Each edit of each batch is a file in `run`, so a
    killed study continues with the missing ones.
    """
    schedule = wan.schedule()
    parts: dict[str, list[dict[str, Tensor]]] = {}
    moved = []
    work = cases.batches(chosen, most)
    expected = ticks(wan, options)
    bar = bar or Progress(expected * len(work), "noise")
    for index, batch in enumerate(work):
        condition = cases.condition(wan, batch)
        noise = cases.noise(wan, condition, batch)
        imposed = (condition.per_frame(1.0).flatten().expand(noise.shape[2]) == 0).tolist()
        planned = edits(options, len(schedule), imposed)
        clean = run.inside(f"{index:03d}/clean")
        names = ["clean", *planned]
        bar.skip(expected - len(schedule) - len(planned))  # frames that are imposed
        for name in names:
            bar.begin()
            file = f"{index:03d}/{name.replace(' ', '_')}.safetensors"
            if not run.has(file):
                if name == "clean":
                    found = _clean(wan, condition, noise, clean, options.layer, bar)
                else:
                    edit = _of(planned[name], batch)
                    found = measure(wan, condition, noise, clean, edit, options.layer)
                run.save_tensors(file, found | _verdicts(wan, found["final"], batch))
            elif name == "clean":
                bar.skip(len(schedule))
            if name != "clean":  # its steps have been counted
                bar.tick()
            found = run.load_tensors(file)
            cases.log(run, name, sum(map(len, work[:index])), found)
            if index:
                del found["final"]  # one batch of videos is enough for pictures
            parts.setdefault(name, []).append(found)
        x0 = [kept(clean, Clean.name, i)["x0"] for i in range(len(schedule))]
        moved.append(torch.stack([stats.squared(x, x0[-1]) for x in x0], dim=1))
    bar.close()
    return Measured(
        planned,
        {
            name: {key: _joined([part[key] for part in some if key in part]) for key in some[0]}
            for name, some in parts.items()
        },
        schedule.sigmas,
        cases.boundary(wan),
        tuple(f for f, fixed in enumerate(imposed) if not fixed),
        wan.pictured(condition),
        tuple(wan.frames_behind(f) for f in range(len(imposed))),
        torch.cat(moved).numpy(),
    )


def ticks(wan: VideoModel, options: NoiseOptions) -> int:
    """How much a batch counts in the progress of a study: the steps of its clean run, its edits."""
    latents, steps = wan.latent_frames(wan.preset.frames), wan.preset.steps
    return steps + len(edits(options, steps, [False] * latents))


def _of(edit: Noise, batch: Sequence[Case]) -> Noise:
    """The edit with separate noise for each case: the edit's seed is added to the case's."""
    first = edit.seed if isinstance(edit.seed, int) else 0
    return replace(edit, seed=[first + case.seed for case in batch])


def _clean(
    wan: VideoModel,
    condition: Condition,
    noise: Tensor,
    clean: Run,
    layer: int | None,
    bar: Progress,
) -> dict[str, Tensor]:
    """The undisturbed run, saved step by step in `clean`: final latent and network passes."""
    final = record(wan, condition, clean, [Clean(layer)], noise, bar=bar)
    model: Model = wan
    experts = map(model.expert_name, model.schedule().timesteps)
    passes = sum(len(model.branches(expert, condition)) for expert in experts)
    return {"final": final, "passes": torch.tensor(passes)}


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return (torch.cat if parts[0].ndim else torch.stack)(list(parts)).numpy()


def _verdicts(wan: VideoModel, latent: Tensor, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Of puzzles alone: solved (b), the index of the answer or -1 (b), and which video frames show
    a valid answer (b F).
    """
    if batch[0].puzzle is None:
        return {}
    pairs = list(zip(map(cases.known, batch), wan.decode(latent), strict=True))
    verdicts = [puzzle.score(video) for puzzle, video in pairs]
    return {
        "solved": torch.tensor([v.solved for v in verdicts]),
        "answer": torch.tensor([-1 if v.answer is None else v.answer for v in verdicts]),
        "right": torch.from_numpy(
            np.stack([puzzle.matches(video).any(1) for puzzle, video in pairs])
        ),
    }
