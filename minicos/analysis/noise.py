"""What does noise do to a run, at which step, in which frame? (paper, Sec. 3.2 and Fig. 3)

The paper replaces latents by Gaussian noise, either all frames at one step ("noise at step") or one frame at every step ("noise at
frame"), and finds that a step is fragile and a frame is not. `Noise` does either, or any set of steps and latent frames, to the
latent *entering* a step, before the network sees it. With x0 the clean estimate of the step before, sigma the level of the latent
and eps fresh N(0, 1), it becomes

    replace   eps                                  the paper's; a reseed at step 0, later far more noise than the network is told
    renoise   (1 - sigma) x0 + sigma eps           on the schedule: what was believed stays, the noise is drawn again
    erase     (1 - sigma) mean(x0) + sigma eps     on the schedule: what was believed goes (mean over f h w, one value per channel)
    add       x + eps scaled to a total dose       the same squared norm for any set of steps and frames
    null      x, as a new tensor                   the control

Imposed frames (TI2V's first) are never touched. Under channel concatenation (I2V) frame 0 is a latent like the others and is
touched, but its picture still stands beside x in the condition: noise there asks whether the network copies it again.

Dose: the squared norm injected over the whole run, in units of one latent frame of unit variance. A step has f frames and a frame
has N steps, so the paper's two conditions differ in dose, and "a frame matters less" could be an artefact either way. Two ways to
match: `cells` (frame noise enters at as many steps as there are frames) and mode `add` (equal dose, spread evenly over the cells).

Measured on every later step's clean estimate, against the clean run: D (0 same, 1 another seed; `stats`) and 1 - debiased CKA over
tokens, on request also of one layer's hidden state; where a puzzle knows its answers, the verdict on the video, and the share of right
frames among all, those that were not touched, and those that show the whole answer.

Trivial by construction: `null` gives exactly 0 under Euler. `replace` at step 0 is another seed, D = 1 on average; at the last step the
video *is* noise, since one step cannot remove what it is not told of, so the frame that is noised at every step is lost in any model,
and only the frames beside it tell anything. Noise in the frames that are scored costs more score than noise elsewhere.
A step's sweep resumes from the saved clean run: noise at step s costs N - s passes. A multistep solver forgets its history at an edit,
which moves even an untouched run, so its edits are held against a run with the same restarts (twice the passes); take Euler.
The paper is silent on mode, level, CKA's rows and which frames: these readings are ours.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minicos.analysis import cases, stats
from minicos.analysis.cases import Case
from minicos.analysis.figures import evenly
from minicos.analysis.observe import Saved, entering, kept, observe
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.pipeline import Wan
from minicos.puzzles import timeline
from minicos.runs import Run, progress
from minicos.sample import Step

MODES = ("replace", "renoise", "erase", "add", "null")
TOKENS = 1024  # rows of a hidden state that CKA is taken over, at most

# -- the intervention -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Noise on the latents entering `steps`, in the latent frames `frames` (None: all). In a loop of one's own:

    edit = Noise("replace", steps=(10,))
    for step in wan.sample(condition, noise=edit(noise, 0, condition.per_frame(1.0))):
        step.next = edit.after(step)
    """

    mode: str
    steps: tuple[int, ...]
    frames: tuple[int, ...] | None = None
    dose: float = 1.0  # of `add` alone: squared norm in all, in latent frames of unit variance
    seed: int | Sequence[int] = 0  # one for each sample, or n for n, n + 1, ...

    def __post_init__(self):
        if self.mode not in MODES:
            raise MinicosError(f"no noise mode {self.mode!r}: take one of {', '.join(MODES)}")
        if not 0 < self.dose < math.inf:
            raise MinicosError(f"a dose of {self.dose}: it is a squared norm, above 0")

    def __call__(self, x: Tensor, index: int, sigma: Tensor, x0: Tensor | None = None) -> Tensor:
        """The latent (b c f h w) that enters step `index` instead of x; x itself where there is nothing to do.

        sigma   level of x in every frame, 0 where it is imposed  1 1 f 1 1 or 1 1 1 1 1
        x0      clean estimate of the step before (b c f h w); None before the first step, where nothing is believed yet
        """
        if index not in self.steps:
            return x
        if self.mode == "null":
            return x.clone()
        sigma = sigma.to(x.device)
        x0 = torch.zeros_like(x) if x0 is None else x0
        return torch.where(self._hit(x, sigma), self._noised(x, index, sigma, x0), x)

    def after(self, step: Step) -> Tensor:
        """The latent that enters the next step instead of `step.next`."""
        return self(step.next, step.index + 1, (step.sigma_map > 0) * step.sigma_next, step.x0)

    def _hit(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Which frames are touched: 1 1 f 1 1, bool."""
        f = x.shape[2]
        if outside := [i for i in self.frames or () if not 0 <= i < f]:
            raise MinicosError(f"no latent frame {outside[0]}: this run has frames 0 to {f - 1}")
        chosen = torch.zeros(f, dtype=torch.bool, device=x.device)
        chosen[list(range(f) if self.frames is None else self.frames)] = True
        return chosen.view(1, 1, f, 1, 1) & (sigma > 0)

    def _noised(self, x: Tensor, index: int, sigma: Tensor, x0: Tensor) -> Tensor:
        eps = self._draw(x, index)
        if self.mode == "replace":
            return eps
        if self.mode == "renoise":
            return (1 - sigma) * x0 + sigma * eps
        if self.mode == "erase":
            return (1 - sigma) * x0.mean(dim=(2, 3, 4), keepdim=True) + sigma * eps
        unit = eps / eps.square().mean(dim=(1, 3, 4), keepdim=True).sqrt()  # every frame's norm exactly as wanted
        return x + (self.dose / (len(self.steps) * self._hit(x, sigma).sum())).sqrt() * unit

    def _draw(self, x: Tensor, index: int) -> Tensor:
        """Fresh noise for each sample, depending on its seed and the step alone, and never the noise of another run's start."""
        seeds = range(self.seed, self.seed + len(x)) if isinstance(self.seed, int) else self.seed
        each = [torch.Generator().manual_seed((2**50 + 1000 * seed + index) % 2**63) for seed in seeds]
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in each]).to(x)


def follow(
    wan: Wan, condition: Condition, x: Tensor, edit: Noise, *, start: int = 0, memory: object = None,
    x0: Tensor | None = None, hooks: Hooks = NO_HOOKS,
) -> Iterator[tuple[Step, Tensor]]:  # fmt: skip
    """The run under `edit`, from the clean latent x that enters step `start`: each step, and the dose that entered it (b f)."""
    entered = edit(x, start, condition.per_frame(wan.schedule().sigmas[start]), x0)
    memory = memory if entered is x else None
    for step in wan.sample(condition, noise=entered, start=start, memory=memory, hooks=hooks):
        injected = stats.squared(entered, x) / x[0, :, 0].numel()
        x, step.next = step.next, edit.after(step)
        entered = step.next
        yield step, injected


# -- what is done -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which noise: at each of the steps `at` in all frames, and in each of the latent frames `frames` at several steps."""

    mode: str = "replace"
    at: tuple[int, ...] | None = None  # steps, None for all
    frames: tuple[int, ...] | None = None  # latent frames, None for all that are not imposed
    match: str = "cells"  # "cells": frame noise enters as many of the steps as there are frames; "none": all, as the paper has it
    dose: float | None = None  # of `add`, latent frames of unit variance; None for as many as there are frames
    layer: int | None = None  # also compare this block's output
    others: int = 2  # other seeds, for the yardstick
    seed: int = 0

    def edits(self, steps: int, imposed: Sequence[bool]) -> dict[str, Noise]:
        """The edits of a run of `steps` steps by name. `imposed`: for each latent frame, whether it is."""
        at = tuple(range(steps)) if self.at is None else self.at
        if not at or not 0 <= min(at) <= max(at) < steps:
            raise MinicosError(f"noise at steps {', '.join(map(str, at))}: the run has steps 0 to {steps - 1}")
        free = [f for f, fixed in enumerate(imposed) if not fixed]
        frames = free if self.frames is None else self.frames
        if fixed := [f for f in frames if f not in free]:
            raise MinicosError(
                f"latent frame {fixed[0]} is imposed or missing: take some of {', '.join(map(str, free))}"
            )
        spread = self.match == "none" or self.mode == "add"
        cells = at if spread else tuple(at[i] for i in evenly(len(at), len(free)))
        dose = float(len(free)) if self.dose is None else self.dose
        edit = Noise(self.mode, (), dose=dose, seed=self.seed)
        return {
            "null": Noise("null", (at[len(at) // 2],)),
            **{f"seed {k}": Noise("replace", (0,), seed=self.seed + 10**8 * k) for k in range(1, self.others + 1)},
            **{f"step {s}": replace(edit, steps=(s,)) for s in at},
            **{f"frame {f}": replace(edit, steps=cells, frames=(f,)) for f in frames},
        }


@dataclass(frozen=True)
class Clean:
    """What the clean run keeps of each step: the clean estimate, and where asked the prompted branch's output of a block."""

    layer: int | None
    name: str = "clean"
    _seen: list[Tensor] = field(default_factory=list)

    def hooks(self) -> Hooks:
        return NO_HOOKS if self.layer is None else Hooks().on(f"blocks.{self.layer}", self._record, branch="cond")

    def _record(self, h: Tensor, site: Site) -> None:
        self._seen.append(h[:, evenly(h.shape[1], TOKENS)].float())

    def see(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        kept = {"x0": step.x0}
        if self.layer is not None:
            kept["hidden"] = self._seen.pop()
        return kept

    def draw(self, saved: Saved, run: Run) -> list[str]:
        return []


def measure(
    wan: Wan, condition: Condition, noise: Tensor, clean: Run, edit: Noise, layer: int | None = None
) -> dict[str, Tensor]:
    """One edited run against the clean one in `clean`, from the first edited step on.

    squared (b N f)   squared distance of the clean estimates; NaN before the edit, where nothing was run
    cka, hidden (b N) 1 - debiased CKA over tokens, of the estimates and of the block's output
    injected (b f)    dose;  final (b c f h w): the video's latent;  passes: of the network, 0-dimensional
    """
    n, start = len(wan.schedule()), min(edit.steps)
    before = kept(clean, Clean.name, start - 1)["x0"].to(noise) if start else None
    x, memory = entering(clean, start, noise)
    watch = Clean(layer)
    steps = follow(wan, condition, x, edit, start=start, memory=memory, x0=before, hooks=watch.hooks())
    twins, passes = None, 0
    if wan.preset.solver != "euler" and edit.mode != "null" and edit.steps != (0,):
        beside = Clean(layer)
        null = replace(edit, mode="null")
        twins = follow(wan, condition, x, null, start=start, memory=memory, hooks=beside.hooks())
    b, _, f, _, _ = noise.shape
    out = {"squared": torch.full((b, n, f), torch.nan, dtype=torch.float64), "cka": torch.full((b, n), torch.nan)}
    if layer is not None:
        out["hidden"] = out["cka"].clone()
    injected = torch.zeros(b, f, dtype=torch.float64)
    for step, dose in steps:
        i, seen = step.index, watch.see(step, clean)
        held = kept(clean, Clean.name, i) if twins is None else beside.see(next(twins)[0], clean)
        injected += dose.cpu()
        passes += (1 + (step.velocity_uncond is not None)) * (1 if twins is None else 2)
        ours, theirs = seen["x0"], held["x0"].to(noise)
        out["squared"][:, i] = stats.squared(ours, theirs).cpu()
        free = (step.sigma_map > 0).flatten().expand(f)
        pairs = zip(ours[:, :, free], theirs[:, :, free], strict=True)
        out["cka"][:, i] = torch.tensor([_apart(_tokens(wan, a), _tokens(wan, b)) for a, b in pairs])
        if layer is not None:
            pairs = zip(seen["hidden"], held["hidden"].to(noise), strict=True)
            out["hidden"][:, i] = torch.tensor([_hidden(a, b) for a, b in pairs])
    return out | {"injected": injected, "final": step.next, "passes": torch.tensor(passes)}


def _tokens(wan: Wan, x0: Tensor) -> Tensor:
    """A latent (c f h w) as the network's tokens (l, c * patch)."""
    pf, ph, pw = wan.experts["high"].cfg.patch_size
    return rearrange(x0, "c (f pf) (h ph) (w pw) -> (f h w) (c pf ph pw)", pf=pf, ph=ph, pw=pw)


def _hidden(ours: Tensor, theirs: Tensor) -> float:
    keep = ~stats.massive(theirs)  # they would be all that CKA sees
    return _apart(ours[:, keep], theirs[:, keep])


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """1 - CKA, and exactly 0 for equal tensors."""
    return 0.0 if torch.equal(ours, theirs) else 1 - stats.cka(ours, theirs)


# -- a study: many edits of many cases --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """All that was measured; the first axis of every array is cases."""

    plan: Plan
    edits: Mapping[str, Noise]
    runs: Mapping[str, Mapping[str, np.ndarray]]  # of each edit and of "clean"; "final" holds the first batch alone
    sigmas: tuple[float, ...]
    handover: int | None  # the first step of the low-noise expert, where there are two
    free: tuple[int, ...]  # latent frames that are not imposed
    estimates: np.ndarray  # convergence of the clean run: D of each step's estimate to the last one  n N

    def names(self, kind: str) -> list[str]:
        """The edits called "step ...", "frame ..." or "seed ..."."""
        return [name for name in self.edits if name.startswith(f"{kind} ")]

    @property
    def puzzles(self) -> bool:
        """Whether the cases know their answers."""
        return "solved" in self.runs["clean"]

    @property
    def unit(self) -> np.ndarray:
        """Squared distance to another seed at every step, per latent frame: N f, mean over cases and seeds."""
        return np.mean([self.runs[name]["squared"].mean(0) for name in self.names("seed")], axis=0)

    def d(self, name: str, frames: Sequence[int] | None = None) -> np.ndarray:
        """D of every step's estimate to the clean run's, over some latent frames (by default all that are not imposed): n N."""
        chosen = list(self.free if frames is None else frames)
        return self.runs[name]["squared"][:, :, chosen].sum(2) / self.unit[:, chosen].sum(1)

    def final(self, name: str) -> np.ndarray:
        """D of the video's latent: n."""
        return self.d(name)[:, -1]

    def untouched(self, name: str) -> np.ndarray | None:
        """D of the video's latent over the frames that the edit left alone: n; None where there are none."""
        touched = self.edits[name].frames
        beside = [] if touched is None else [f for f in self.free if f not in touched]
        return self.d(name, beside)[:, -1] if beside else None

    def dose(self, name: str) -> np.ndarray:
        """Squared norm injected over the run, in latent frames of unit variance: n."""
        return self.runs[name]["injected"].sum(1)

    def shown(self, name: str, which: str) -> np.ndarray:
        """The video frames (bool F) that are "all", "untouched" by the edit, or show the whole "answer"."""
        count = self.runs["clean"]["right"].shape[1]
        if which == "all":
            return np.ones(count, bool)
        if which == "answer":
            return timeline(count) >= 1
        touched = self.edits[name].frames
        latent = (np.arange(count) + 3) // 4  # of the VAE: one frame, then four to a latent frame
        return ~np.isin(latent, self.free if touched is None else touched)

    def passes(self, kind: str = "step") -> tuple[int, int]:
        """Network passes of the clean run and a sweep over the edits of a kind; and of as many full runs as there are edits."""
        clean, names = int(self.runs["clean"]["passes"].sum()), self.names(kind)
        return clean + sum(int(self.runs[name]["passes"].sum()) for name in names), clean * len(names)


def study(wan: Wan, subjects: Sequence[Case], run: Run, plan: Plan, most: int = 25) -> Results:
    """Run and measure every edit of every case. Each edit of each batch is a file in `run`: killed and rerun, the rest is done."""
    schedule = wan.schedule()
    parts: dict[str, list[dict[str, Tensor]]] = {}
    estimates = []
    for index, batch in enumerate(work := cases.batches(subjects, most)):
        condition = cases.condition(wan, batch)
        noise = cases.noise(wan, condition, batch)
        imposed = (condition.per_frame(1.0).flatten().expand(noise.shape[2]) == 0).tolist()
        edits = plan.edits(len(schedule), imposed)
        clean = Run(run.path(f"{index:03d}/clean"), run.settings)
        for name in progress(["clean", *edits], len(edits) + 1, f"batch {index + 1} of {len(work)}"):
            file = f"{index:03d}/{name.replace(' ', '_')}.safetensors"
            if not run.has(file):
                if name == "clean":
                    final = observe(wan, condition, clean, [Clean(plan.layer)], noise)
                    passes = sum(1 + (wan.preset.guidance[wan.expert(t)[0]] != 1) for t in schedule.timesteps)
                    found = {"final": final, "passes": torch.tensor(passes)}
                else:
                    edit = replace(edits[name], seed=[edits[name].seed + case.seed for case in batch])
                    found = measure(wan, condition, noise, clean, edit, plan.layer)
                run.save_tensors(file, found | _verdicts(wan, found["final"], batch))
            found = run.load_tensors(file)
            if index:
                del found["final"]  # one batch of videos is enough to show
            parts.setdefault(name, []).append(found)
        x0 = [kept(clean, Clean.name, i)["x0"] for i in range(len(schedule))]
        estimates.append(torch.stack([stats.squared(x, x0[-1]) for x in x0], dim=1))  # b N f
    runs = {
        name: {key: _joined([part[key] for part in some if key in part]) for key in some[0]}
        for name, some in parts.items()
    }
    low = [i for i, t in enumerate(schedule.timesteps) if wan.expert(t)[0] == "low"]
    free = tuple(f for f, fixed in enumerate(imposed) if not fixed)
    results = Results(plan, edits, runs, schedule.sigmas, low[0] if low and low[0] else None, free, np.empty(0))
    moved = torch.cat(estimates).numpy()[:, :, free].sum(2) / results.unit[-1, free].sum()
    return replace(results, estimates=moved)


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return (torch.cat if parts[0].ndim else torch.stack)(list(parts)).numpy()


def _verdicts(wan: Wan, latent: Tensor, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Of puzzles alone: solved (b), the index of the answer or -1 (b), which video frames show a valid answer (b F)."""
    if batch[0].puzzle is None:
        return {}
    pairs = list(zip((case.puzzle for case in batch), wan.decode(latent), strict=True))
    verdicts = [puzzle.score(video) for puzzle, video in pairs]
    return {
        "solved": torch.tensor([v.solved for v in verdicts]),
        "answer": torch.tensor([-1 if v.answer is None else v.answer for v in verdicts]),
        "right": torch.from_numpy(np.stack([puzzle.matches(video).any(1) for puzzle, video in pairs])),
    }
