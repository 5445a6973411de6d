"""Many edits of many cases (`study`): noise at steps and in frames, each measured against the clean run of its case.

What noise is put in and what is measured is in `noise`, and what a study says in `sensitivity`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.noise.edit import Clean, Noise, measure
from minicos.analysis.tools import cases, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.figures import evenly
from minicos.analysis.tools.record import kept, record
from minicos.errors import MinicosError
from minicos.puzzles import timeline
from minicos.runs import Run, progress
from minicos.wan import Wan


@dataclass(frozen=True)
class Plan:
    """Which noise: at each of the steps `at` in all frames, and in each of the latent frames `frames` at several steps."""

    mode: str = "replace"
    at: tuple[int, ...] | None = None  # steps, None for all
    frames: tuple[int, ...] | None = None  # latent frames, None for all that are not imposed
    match: str = "cells"  # "cells": frame noise enters as many of the steps as there are frames; "none": all, as the paper has it
    dose: float | None = (
        None  # of `add`, latent frames of unit variance; None for as many as there are frames
    )
    layer: int | None = None  # also compare this block's output
    others: int = 2  # other seeds, for the yardstick
    seed: int = 0

    def edits(self, steps: int, imposed: Sequence[bool]) -> dict[str, Noise]:
        """The edits of a run of `steps` steps by name. `imposed`: for each latent frame, whether it is."""
        at = tuple(range(steps)) if self.at is None else self.at
        if not at or not 0 <= min(at) <= max(at) < steps:
            raise MinicosError(
                f"noise at steps {', '.join(map(str, at))}: the run has steps 0 to {steps - 1}"
            )
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
            **{
                f"seed {k}": Noise("replace", (0,), seed=self.seed + 10**8 * k)
                for k in range(1, self.others + 1)
            },
            **{f"step {s}": replace(edit, steps=(s,)) for s in at},
            **{f"frame {f}": replace(edit, steps=cells, frames=(f,)) for f in frames},
        }


@dataclass(frozen=True)
class Results:
    """All that was measured; the first axis of every array is cases."""

    plan: Plan
    edits: Mapping[str, Noise]
    runs: Mapping[
        str, Mapping[str, np.ndarray]
    ]  # of each edit and of "clean"; "final" holds the first batch alone
    sigmas: tuple[float, ...]
    handover: int | None  # the first step of the low-noise expert, where there are two
    free: tuple[int, ...]  # latent frames that are not imposed
    estimates: (
        np.ndarray
    )  # convergence of the clean run: D of each step's estimate to the last one  n N

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
        return clean + sum(int(self.runs[name]["passes"].sum()) for name in names), clean * len(
            names
        )


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
        for name in progress(
            ["clean", *edits], len(edits) + 1, f"batch {index + 1} of {len(work)}"
        ):
            file = f"{index:03d}/{name.replace(' ', '_')}.safetensors"
            if not run.has(file):
                if name == "clean":
                    final = record(wan, condition, clean, [Clean(plan.layer)], noise)
                    passes = sum(
                        1 + (wan.preset.guidance[wan.expert_name(t)] != 1)
                        for t in schedule.timesteps
                    )
                    found = {"final": final, "passes": torch.tensor(passes)}
                else:
                    edit = replace(
                        edits[name], seed=[edits[name].seed + case.seed for case in batch]
                    )
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
    low = [i for i, t in enumerate(schedule.timesteps) if wan.expert_name(t) == "low"]
    free = tuple(f for f, fixed in enumerate(imposed) if not fixed)
    results = Results(
        plan, edits, runs, schedule.sigmas, low[0] if low and low[0] else None, free, np.empty(0)
    )
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
        "right": torch.from_numpy(
            np.stack([puzzle.matches(video).any(1) for puzzle, video in pairs])
        ),
    }
