"""Every claim on the embedded model: a list of studies, and the report that they make.

A section is a set of studies with their options. The studies alone define what is measured, and
each has a verb that gives the same numbers (`Part.command`). `claims` says what they decide. Each
section runs in its own process, with networks on one thread (`work`): two thread pools would
compete for two cores, and the last bits would depend on the number of cores. A section that was
killed continues and ends at the same bits.

Puzzles are from the test split: n for headlines, fewer for the most expensive studies. Steps,
layers and windows were fixed here beforehand. Most runs take 10 denoising steps, which costs the
embedded model little accuracy (section `counts`).
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from time import process_time
from typing import Any

import torch

from minicos.analysis import belief, commitment, counts, energy, plant, recall, result, steps
from minicos.analysis.behaviours import study as behaviours
from minicos.analysis.ensemble import study as ensemble
from minicos.analysis.noise import study as noise
from minicos.analysis.options import (
    BehavioursOptions,
    BeliefOptions,
    CommitmentOptions,
    CountsOptions,
    EnergyOptions,
    EnsembleOptions,
    NoiseOptions,
    PlantOptions,
    RecallOptions,
    StepsOptions,
    SwapOptions,
    arguments,
)
from minicos.analysis.result import Result
from minicos.analysis.swap import study as swap
from minicos.analysis.tools.encoded import CodesOnce
from minicos.open import load
from minicos.puzzles import FAMILIES
from minicos.runs import Run
from minicos.video_model import VideoModel
from minicos.wan import Wan

N = 100  # puzzles of an experiment
FULL = 1000  # the same with --full
SHORT = 10  # denoising steps, unless stated otherwise
AT_LEAST = 5  # puzzles: a mixture takes one of each family
# With one right answer, by the number of facts that depend on each other in a chain.
LONG = "maze-one,shell-one,balls-three"
TWINS = "sequence-short,mirror-one,balls-one"
CHOICES = "latin,maze,shell-short"  # several right answers
WRONG = "goal,pick,partner,turn-one,mirror-one"  # plausible wrong answers, one right one
MIXED = "sequence,partner,pick,maze,mirror-one"  # the five categories, all of one length
WINDOWS = ("20-29", "0-9", "10-19", "30-39", "0-39")  # of 40 blocks, the paper's in front


@dataclass(frozen=True)
class Part:
    """One study with its options, under the model's preset with some fields changed."""

    name: str  # its subfolder in the section's folder
    verb: str  # the verb that gives the same numbers
    study: Callable[[VideoModel, Run, Any], Result]
    options: Any
    preset: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""  # which this study opens instead of the report's

    def command(self, model: str = "tiny") -> str:
        """The command that gives the same numbers."""
        model = self.model or model
        other = ["--decode-dtype", "bfloat16"] + ([] if model == "tiny" else ["--model", model])
        preset = [word for k, v in self.preset.items() for word in (f"--{k}", str(v))]
        return shlex.join(["minicos", self.verb, *arguments(self.options), *preset, *other])


@dataclass(frozen=True)
class Section:
    """A question of the report: its title, and what to know before reading its numbers."""

    title: str
    text: str
    seconds: float  # about, on one core and for one puzzle; the longest sections start first


def fewer(n: int) -> int:
    """Number of puzzles for a curve, if the headline has n."""
    return max(AT_LEAST, n // 4)


def parts(n: int, seed: int = 0) -> dict[str, list[Part]]:
    """The studies of every section, with n puzzles for a headline and noise from `seed` on."""
    made = {**_answers(n, seed), **_behaviours(n, seed), **_changes(n, seed), **_others(n, seed)}
    if n >= FULL:
        for section, more in _appendix(fewer(n) // 2, seed).items():
            made[section] += more
    own = {"counts": {}, "frames": {}, "ensemble": {"steps": 8}}  # counts set their own steps
    return {
        section: [
            replace(part, preset={**own.get(section, {"steps": SHORT}), **part.preset})
            for part in some
        ]
        for section, some in made.items()
    }


def _answers(n: int, seed: int) -> dict[str, list[Part]]:
    """How an answer comes about: along the steps, along the frames, with more of either."""
    few, half = fewer(n), max(AT_LEAST, n // 2)
    mazes = BeliefOptions(n=n, ideal=True, seed=seed)
    figures = BeliefOptions(n=few, puzzle="turn,mirror", ideal=True, seed=seed)
    settling = StepsOptions(n=n, ideal=True, seed=seed)
    chains = CountsOptions(n=n, puzzle=LONG, counts=(1, 4, 20), against=TWINS, seed=seed)
    choices = CountsOptions(n=half, puzzle=CHOICES, counts=(1, 4, 20), ideal=True, seed=seed)
    committed = CommitmentOptions(n=half, at=(0, 2), count=2, ideal=True, seed=seed)
    lengths = CountsOptions(n=half, puzzle="maze-4x4", counts=(10,), lengths=(5, 17), seed=seed)
    return {
        "belief": [
            Part("mazes", "belief", belief.study, mazes),
            Part("figures", "belief", belief.study, figures),
        ],
        "steps": [Part("mazes", "steps", steps.study, settling)],
        "counts": [
            Part("chains", "counts", counts.study, chains),
            Part("choices", "counts", counts.study, choices),
        ],
        "commitment": [Part("mazes", "commitment", commitment.study, committed)],
        "frames": [Part("lengths", "counts", counts.study, lengths)],
    }


def _behaviours(n: int, seed: int) -> dict[str, list[Part]]:
    """Behaviours that the paper sees: self-correction, memory, perception before action."""
    half = max(AT_LEAST, n // 2)
    completed = CommitmentOptions(
        puzzle=WRONG, also_single=True, n=half, at=(3,), count=1, ideal=True, seed=seed
    )
    planted = PlantOptions(n=half, at=(4,), ideal=True, seed=seed)
    shells = RecallOptions(puzzle="shell", n=fewer(n), seed=seed)
    goals = BehavioursOptions(n=half, rows=0, ideal=True, seed=seed)
    return {
        "correction": [
            Part("completions", "commitment", commitment.study, completed),
            Part("planted", "plant", plant.study, planted),
        ],
        "memory": [
            Part("reveal", "recall", recall.study, RecallOptions(n=half, seed=seed)),
            Part("shell", "recall", recall.study, shells),
        ],
        "perception": [Part("goals", "behaviours", behaviours.study, goals)],
    }


def _changes(n: int, seed: int) -> dict[str, list[Part]]:
    """Interventions in a run, and measurements inside it."""
    half = max(AT_LEAST, n // 2)
    noised = NoiseOptions(
        n=max(AT_LEAST, n // 6), several=True, others=1, ideal=True, match="none", seed=seed
    )
    matched = replace(noised, mode="renoise", match="cells", at=(0, 2, 5, 7))
    marked = EnergyOptions(n=n, seed=seed)
    swapped = SwapOptions(
        n=half, one_way=True, layers="6", during="0,all", controls=("wrong",), seed=seed
    )
    shared = EnsembleOptions(
        puzzle=MIXED,
        size=None,
        n=n,
        choose=0,
        arms=("override 20-29 @0", "override 20-29 @0-1", "update 20-29 @0-1"),
        select=2,
        no_rivals=True,
        ideal=True,
        seed=seed,
    )
    return {
        "noise": [
            Part("paper", "noise", noise.study, noised),
            Part("matched", "noise", noise.study, matched),
        ],
        "energy": [Part("mark", "energy", energy.study, marked)],
        "swap": [Part("when", "swap", swap.study, swapped)],
        "ensemble": [Part("mixed", "ensemble", ensemble.study, shared)],
    }


def _others(n: int, seed: int) -> dict[str, list[Part]]:
    """Questions of the other sections, asked to variants of the embedded model."""
    mazes = replace(_answers(n, seed)["belief"][0].options, n=fewer(n))
    # of one named colour: 4 objects to choose from, not 24
    recalled = RecallOptions(puzzle="reveal-colour", n=max(AT_LEAST, n // 2), seed=seed)
    wrong = _behaviours(n, seed)["correction"][0].options
    shared = replace(_changes(n, seed)["ensemble"][0].options, n=max(AT_LEAST, n // 2))
    return {
        "variants": [
            Part("one-answer", "belief", belief.study, mazes, model="tiny:one-answer"),
            Part("distilled", "belief", belief.study, mazes, {"steps": 4}, "tiny:distilled"),
            Part("frame-causal", "recall", recall.study, recalled, model="tiny:frame-causal"),
            Part("mid-correction", "commitment", commitment.study, wrong, model="tiny:mid"),
            Part("mid-ensemble", "ensemble", ensemble.study, shared, {"steps": 8}, "tiny:mid"),
        ]
    }


def _appendix(n: int, seed: int) -> dict[str, list[Part]]:
    """For --full only, without headlines: every family at every number of steps, answers planted at
    every noise level, a readout of memory, more windows, seeds, kinds of prompts, layers, guidance,
    and the effect of noise on hidden states.
    """
    trained = ",".join(name for name, family in FAMILIES.items() if family.domain == "in")
    ladder = CountsOptions(n=4 * n, puzzle=trained, counts=(1, 2, 4, 8, 20, 50), seed=seed)
    planted = PlantOptions(n=n, ideal=True, seed=seed)
    recalled = BehavioursOptions(n=n, seed=seed)
    windows = EnsembleOptions(
        puzzle=MIXED,
        size=None,
        n=n,
        choose=0,
        arms=tuple(f"override {w} @{at}" for at in ("0", "0-1") for w in WINDOWS),
        no_rivals=True,
        seed=seed,
    )
    kinds = SwapOptions(
        puzzle="mark,goal,pick,partner,turn-one",
        n=n,
        one_way=True,
        layers="embed,0,2,4,6,8,10,11",
        during="0,all",
        seed=seed,
    )
    hidden = NoiseOptions(n=n // 3, several=True, frames=(), layer=6, seed=seed)
    return {
        "counts": [Part("families", "counts", counts.study, ladder)],
        "correction": [Part("levels", "plant", plant.study, planted)],
        "memory": [Part("readout", "behaviours", behaviours.study, recalled)],
        "noise": [Part("hidden", "noise", noise.study, hidden)],
        "ensemble": [
            Part("windows", "ensemble", ensemble.study, windows),
            Part("five", "ensemble", ensemble.study, replace(windows, seeds=5)),
        ],
        "swap": [
            Part("kinds", "swap", swap.study, kinds),
            Part("guided", "swap", swap.study, replace(kinds, branch="both"), {"guidance": 5}),
        ],
    }


SECTIONS: dict[str, Section] = {  # in the order of the report
    "belief": Section(
        "Several candidates early, one late",
        """\
Puzzles with several right answers. *Answers alive* is the exponential of the entropy of the weights
that an estimate gives to the valid answers. By Bayes' rule an ideal observer gives equal weights in
pure noise, and one answer all the weight at the end; it runs here as a model, from the same noise.
The question is where the network deviates from it. In pure noise nothing can be known: if the
answer shown most is the one this run ends at, more often than the one another seed of the picture
ends at, the network leans with its noise before anything is decided.""",
        1.4,
    ),
    "steps": Section(
        "Along the steps, not along the frames",
        """\
The step from which on the clean estimate stays near the last one, for each latent frame. If the
answer were found along the frames, later frames would settle later. An answer that is a single
choice settles in all frames together in any model, so the ideal observer is the comparison.""",
        0.5,
    ),
    "counts": Section(
        "What more steps are worth",
        """\
The share solved at 1, 4 and 20 steps from the same noise. One step returns the mean of the right
answers, which is none of them: an ideal observer, too, fails there. So where several answers are
right, only what the network gains beyond it counts; where one is, an ideal observer needs one step,
and the question is whether longer chains of dependent facts gain more than their twins.""",
        2.6,
    ),
    "commitment": Section(
        "When the answer is decided",
        """\
The clean estimate of a step is set back to its noise level with fresh noise and completed:
commitment is 0 if two completions agree as often as random draws, and 1 if they always agree. At
step 0 completions are other seeds. An ideal observer commits as well.""",
        0.9,
    ),
    "correction": Section(
        "Are wrong answers put right?",
        """\
*Completions*: those that show a plausible wrong answer where the run ends at a valid one, minus the
opposite; errors that come and go independently give equal numbers of both. *Planted*: a wrong
answer is put into the latent on the schedule, and is corrected or not; the control plants a valid
one. An ideal observer corrects all, since it knows what is valid.""",
        1.8,
    ),
    "memory": Section(
        "What comes back, and who reads whom",
        """\
A block hides an object that the model has made up itself: nothing in the first frame says which. It
must come back the same on the other side. Attention between the two reveals is cut in one direction
or the other, in all layers and steps; the control cuts as many keys at random. A memory handed on
along the frames needs the second reveal to read the first. *Causal*: every frame reads itself and
earlier ones alone. In the shell game the swaps are made up, and the ball must be where they bring
it.""",
        1.4,
    ),
    "perception": Section(
        "Where before how",
        """\
Mazes with two goals, one of them named, and several routes to it. *Where*: the step from which on
the leading hypothesis goes to the right goal; *how*: the step from which on the leading route to it
is the final one.""",
        0.6,
    ),
    "noise": Section(
        "Noise at a step, noise in a frame",
        """\
*paper*: all frames replaced by noise at one step, for each step, or one frame at all steps, for
each frame. The two differ in dose, and a late replacement leaves noise that no model can remove.
*matched*: equal doses, on the schedule (`renoise` keeps the estimate and draws its noise again). D
is 0 for the same video, 1 for another seed's. Frame 0 is an input at every step and dilutes the
effect of noise in a frame, so results without it are shown as well. The map shows the damage of
each noised step at each later one (Fig. 3c).""",
        2.2,
    ),
    "energy": Section(
        "Which tokens the layers work on",
        """\
"Mark the circle" and its like: the cells to be filled are known, and the AUROC says how well a
layer's token energy tells them from the others of the same frame (.5: blind), at the middle step.
The step's own clean estimate also shows the answer, without any layer: it is the baseline.""",
        0.3,
    ),
    "swap": Section(
        "Where a prompt becomes an answer",
        """\
"Mark the circle" (A) and "mark the square" (B) of one picture: in run B the residual stream behind
the middle layer is replaced by what A's prompt makes of the same latent, at step 0 (a tenth of the
run) or at all steps. The control gives another picture's states.""",
        1.4,
    ),
    "ensemble": Section(
        "Seeds that share states",
        """\
States of the middle blocks are averaged over three seeds, early, and one trajectory is finished, on
puzzles of five categories. D says how far that moved the video: an arm that moves nothing cannot
gain anything. The alternatives at the same cost: a vote among three runs, an oracle's best of
three, and three seeds for two steps, of which the best-scored is finished.""",
        1.9,
    ),
    "frames": Section(
        "Other lengths",
        """\
Mazes at other lengths that the model was trained at.""",
        0.6,
    ),
    "variants": Section(
        "The same questions to other networks",
        """\
`tiny:one-answer` was trained on with only one of the valid answers to every prompt. It must hold
fewer answers than an ideal observer that knows them all: a measurement that did not see this could
not see several candidates either. `tiny:distilled` takes four steps for twenty. In
`tiny:frame-causal` no frame reads a later one, so what comes back can only be handed on along the
frames: the positive control of memory, if the network remembers enough to tell. `tiny:mid` is an
earlier checkpoint, which solves less, so there is more room for correction and for ensembles.""",
        1.5,
    ),
}


def make(wan: VideoModel, run: Run, name: str, n: int, seed: int = 0) -> list[Result]:
    """The results of a section's studies, each in its own folder inside `run`."""
    found = []
    for part in parts(n, seed)[name]:
        folder = replace(
            run.inside(f"{name}/{part.name}"), settings={**run.settings, **_settings(part)}
        )
        if not folder.has(result.FILE):
            model = _load(part.model) if part.model else wan
            part.study(model.with_preset(**part.preset), folder, part.options)
        found.append(result.read(folder.folder))
    return found


def _settings(part: Part) -> dict[str, Any]:
    return {**asdict(part.options), **part.preset}


def work(model: str, run: Run, name: str, n: int, seed: int = 0) -> tuple[str, float]:
    """Make one section, in its own process; returns its name and the processor seconds it took."""
    torch.set_num_threads(1)
    begin = process_time()
    make(_load(model), run, name, n, seed)
    return name, process_time() - begin


@cache
def _load(model: str) -> Wan:
    """Open the model with a bfloat16 decoder: a fifth of the time at 56 dB from float32, a
    difference far below what a scorer notices. Sections share puzzles and runs, so clips are encoded, and latents
    decoded, once.
    """
    wan = load(model, decode_dtype=torch.bfloat16)
    return replace(wan, vae=CodesOnce.of(wan.vae))
