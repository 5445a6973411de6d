"""Every experiment on the embedded model, one section each: the definitions are in their own files, the choices of size are here.

A section is a function (wan, run, n) -> Section. Whatever costs time goes through `cases.collect` or a study that keeps what it
finished, so a section that was killed continues and ends at the same bits. Networks run on one thread (`work`), sections beside
each other: two thread pools on two cores would lose, and last bits then do not depend on the number of cores.

Puzzles are of the test split: n for headlines, `fewer` for curves. Steps, layers and windows are fixed here beforehand, except
the ensemble's arm (dev split). Interventions are run at fewer denoising steps than the preset's 20, which costs the embedded
model little (section `counts`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from time import process_time

import torch

from minicos.analysis import report
from minicos.analysis.report import Section
from minicos.analysis.reproduce.behaviour import behaviour_section
from minicos.analysis.reproduce.belief import commitment_section, step_section
from minicos.analysis.reproduce.between import (
    count_section,
    ensemble_section,
    handover_section,
    noise_section,
)
from minicos.analysis.reproduce.inside import attention_section, energy_section, swap_section
from minicos.open import load
from minicos.runs import Run
from minicos.wan import Wan


@dataclass(frozen=True)
class Experiment:
    make: Callable[[Wan, Run, int], Section]
    seconds: float  # of one core and of one puzzle, about: the longest experiments begin first


EXPERIMENTS = {  # in the order of the report
    "steps": Experiment(step_section, 0.7),
    "commitment": Experiment(commitment_section, 1.5),
    "behaviours": Experiment(behaviour_section, 0.7),
    "noise": Experiment(noise_section, 2.4),
    "handover": Experiment(handover_section, 0.5),
    "energy": Experiment(energy_section, 0.3),
    "attention": Experiment(attention_section, 0.3),
    "swap": Experiment(swap_section, 1.5),
    "ensemble": Experiment(ensemble_section, 3.0),
    "counts": Experiment(count_section, 0.5),
}


def work(model: str, run: Run, name: str, n: int, command: str) -> tuple[str, float]:
    """Make one section, unless `run` holds it; its name, and the seconds of processor that it took. For a process of its own."""
    torch.set_num_threads(1)
    begin, file = process_time(), f"{name}/section.json"
    if not run.has(file):
        section = EXPERIMENTS[name].make(_load(model), Run(run.path(name), run.settings), n)
        claims = tuple(replace(claim, command=command) for claim in section.claims)
        run.save_json(file, asdict(replace(section, claims=claims)))
    return name, process_time() - begin


def finished(run: Run, names: Sequence[str]) -> dict[str, Section]:
    """The sections that `run` holds, in the order of the report."""
    return {
        name: report.from_json(run.load_json(f"{name}/section.json"))
        for name in EXPERIMENTS
        if name in names
    }


_load = cache(load)
