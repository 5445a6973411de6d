"""Every question on the embedded model: a list of studies, and the report that they make.

A section is some studies with their options; what is measured is defined in the studies alone, and
each has the verb that gives the same numbers (`Part.command`). Networks run on one thread (`work`),
sections in processes of their own: two thread pools on two cores would lose, and last bits then do
not depend on the number of cores. A section that was killed continues and ends at the same bits.

Puzzles are of the test split: n for headlines, `fewer` for curves. Steps, layers and windows are
fixed here beforehand, except the ensemble's arm (dev split). Interventions are run at fewer
denoising steps than the preset's 20, which costs the embedded model little (section `counts`).
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from time import process_time
from typing import Any

import torch

from minicos.analysis import attention, belief, commitment, counts, energy, result, steps, sweep
from minicos.analysis.behaviours import study as behaviours
from minicos.analysis.ensemble import study as ensemble
from minicos.analysis.noise import study as noise
from minicos.analysis.options import (
    AttentionOptions,
    BehavioursOptions,
    BeliefOptions,
    CommitmentOptions,
    CountsOptions,
    EnergyOptions,
    EnsembleOptions,
    NoiseOptions,
    StepsOptions,
    SwapOptions,
    arguments,
)
from minicos.analysis.result import Result
from minicos.analysis.swap import study as swap
from minicos.open import load
from minicos.runs import Run
from minicos.wan import Wan

N = 100  # puzzles of an experiment
FULL = 1000  # the same with --full
SHORT = 10  # denoising steps of the interventions
AT_LEAST = 4  # puzzles: the ensemble's wrong donors take three, a yardstick two


@dataclass(frozen=True)
class Part:
    """One study with its options, under the model's preset with some fields changed."""

    name: str  # its folder inside the section's
    verb: str  # which gives the same numbers
    study: Callable[[Wan, Run, Any], Result]
    options: Any
    preset: Mapping[str, Any] = field(default_factory=dict)

    def command(self, model: str = "tiny") -> str:
        """The command that gives the same numbers."""
        other = [] if model == "tiny" else ["--model", model]
        preset = [word for k, v in self.preset.items() for word in (f"--{k}", str(v))]
        return shlex.join(["minicos", self.verb, *arguments(self.options), *preset, *other])


@dataclass(frozen=True)
class Section:
    """A question of the report: its title, and what to know before reading its numbers."""

    title: str
    text: str
    seconds: float  # of one core and of one puzzle, about: the longest sections begin first


def fewer(n: int) -> int:
    """Puzzles of a curve, where the headline has n."""
    return max(AT_LEAST, n // 4)


def parts(n: int) -> dict[str, list[Part]]:
    """The studies of every section, with n puzzles for a headline."""
    few, short = fewer(n), {"steps": SHORT}
    # as many steps as there are latent frames, so that doses match
    like = NoiseOptions(several=True, others=1, at=tuple(SHORT * k // 4 for k in range(4)))
    moved = replace(like, mode="renoise", n=few, at=(1, 3, 5, 7), frames=())
    site = "9"  # of 12 blocks: behind the layer where the answer turns
    put = SwapOptions(n=few, one_way=True, during="all", control_layers=site)
    mazes = CommitmentOptions(n=few, at=(0, 2, 4, SHORT - 2), count=3)
    shared = EnsembleOptions(
        n=n,
        choose=max(AT_LEAST, n // 10),
        arms=("override 20-29 @0", "override 0-9 @0", "override 0-39 @0", "update 20-29 @0-1"),
        no_rivals=True,
    )
    return {
        "belief": [Part("mazes", "belief", belief.study, BeliefOptions(n=n))],
        "steps": [Part("mazes", "steps", steps.study, StepsOptions(n=n))],
        "commitment": [Part("mazes", "commitment", commitment.study, mazes, short)],
        "behaviours": [
            Part("all", "behaviours", behaviours.study, BehavioursOptions(n=n, rows=2 * n))
        ],
        "noise": [
            Part("renoise", "noise", noise.study, replace(like, mode="renoise", n=few), short),
            Part("replace", "noise", noise.study, replace(like, n=n), short),
        ],
        "boundary": [
            Part(
                "boundaries",
                "noise",
                sweep.study,
                replace(moved, boundaries=(0.9, 0.96, 0.8)),
                short,
            )
        ],
        "energy": [Part("mark", "energy", energy.study, EnergyOptions(n=n))],
        "attention": [Part("mark", "attention", attention.study, AttentionOptions(n=n))],
        "swap": [
            Part(name, "swap", swap.study, options, short)
            for name, options in {
                "layers": replace(put, controls=("null", "shuffled", "random")),
                "begun": replace(put, layers=site, during="0,0-1,0-4,all"),
                "wrong": replace(put, layers=site, controls=("wrong",), n=n),
            }.items()
        ],
        "ensemble": [Part("mazes", "ensemble", ensemble.study, shared, {"steps": 8})],
        "counts": [Part("mazes", "counts", counts.study, CountsOptions(n=few, lengths=(9, 17)))],
    }


SECTIONS: dict[str, Section] = {  # in the order of the report
    "belief": Section(
        "Several candidates early, one late",
        """\
Mazes with several right answers. Answers alive is the exponential of the entropy of the weights that an estimate gives to the
valid answers; an ideal observer's are exact. By construction it holds all routes alike at step 0, where the latent is noise
alone, and one at the end: several candidates early are Bayes' rule. The question is where the network departs from it. At step 0
nothing can be known, so an answer that is shown most there and is the final one means that the network leans before anything
is decided, and ends where it leans.""",
        0.7,
    ),
    "steps": Section(
        "Along the steps, not along the frames",
        """\
The step from which on the clean estimate stays near the last one, for each latent frame. Were the answer found along the frames,
later frames would settle later; were it decided only where there is something to decide, mazes with one route would settle at once.""",
        0.4,
    ),
    "commitment": Section(
        "When the answer is decided",
        """\
The clean estimate of a step is thrown back to its noise level with fresh noise and completed: commitment is 0 where the completions
answer every which way, 1 where they agree. By construction it ends at 1, and at step 0 completions are nothing but other seeds,
so that the agreement there is what so few completions give by chance. An estimate can show one answer and leave it open, or blur
what is decided: compare with the answers alive above.""",
        1.5,
    ),
    "behaviours": Section(
        "Self-correction, perception before action, working memory",
        """\
*Self-correction*: the leading hypothesis of every step's estimate among the valid answers and those to the picture's other prompts,
wrong early and right late. A blurred mixture of valid answers may lie nearest to a wrong one, so only what exceeds the ideal
observer's rate at the same latents is the network's. *Perception before action*: what stands still need only be copied from the
given frame, so it is no wonder that it settles first. *Working memory*: while an object is behind a wall, its shape and colour are
read from the hidden states at the tokens that hide it, by a linear classifier taught on the training split; the layer is chosen
there as well. The latents of a drawn video are the hardest control: four video frames share a latent frame, and the object is in
sight in some of them.""",
        1.2,
    ),
    "noise": Section(
        "Noise at a step, noise in a frame",
        """\
Latents entering a step get Gaussian noise, in all frames at one of four steps, or in one latent frame at all of these steps: the same
noised cells, once by step and once by frame, so that doses agree. `renoise` keeps the clean estimate and draws its noise again, on
the schedule; `replace`, the paper's, puts noise alone. D = 0 is the same video and 1 another seed's. By construction the null
intervention gives 0, and step 0 is a reseed. A late `replace` leaves noise that the later steps cannot remove in any model, in all
frames or in one; a model that treated frames alone would lose as much by either, and still by the early steps of step noise, which
frame noise overwrites: part of a positive difference under `replace` is no finding. The paper finds a step fragile and a
frame robust, at doses that differ.""",
        2.4,
    ),
    "boundary": Section(
        "Noise and the boundary between the experts",
        """\
The paper's sensitivity peaks where its tools change experts, so the peak could belong to the change of experts. Here the boundary is
moved (0.9 in training) and the rest kept: noise at four steps, on the schedule. If sensitivity belongs to the noise level, curves
stay; if to the expert, they move where another expert serves a step.""",
        0.5,
    ),
    "energy": Section(
        "Which tokens layers work on",
        """\
"Mark the circle" and its like: the cell to be filled is known, and the AUROC says how well a layer's token energy tells its tokens from
the others at the middle step (.5: blind; below: the answer's tokens have less). Raw energy is the paper's, centred energy drops the
mean token and massive channels, update is what a block writes. Any network sees the picture and where objects are in it, so an
untrained one is the control. The paper reads a turn from background to objects off maps of raw energy.""",
        0.3,
    ),
    "attention": Section(
        "Where attention goes",
        """\
Exact attention mass at the middle step, mean over heads, tokens and layers. Prompts are padded with zero rows, and nothing is fixed by
construction, since no mask hides them.""",
        0.3,
    ),
    "swap": Section(
        "Where a prompt becomes an answer",
        """\
"Mark the circle" (A) and "mark the square" (B) of one picture: at every step the residual stream behind one layer of run B is replaced
by what A's prompt makes of the same latent. By construction the last layer hands over A's velocity, so that curves end at A: the
finding is where they turn.""",
        1.5,
    ),
    "ensemble": Section(
        "Seeds that share states",
        """\
States of the middle blocks are averaged over three seeds, early, and one trajectory is finished, on mazes larger than any that the model
was trained on. Four arms are tried on dev mazes, and the one that solves most is taken (of equals the first); on test it is reported
beside the others with its controls, p values corrected after Holm. By construction only the last layer of an override counts, and
step 0 of 8 moves the latent further than step 0 of 50. At equal compute a vote among three plain runs is the rival, and an oracle
that picks the best of them says what there is to be gained.""",
        3.0,
    ),
    "counts": Section(
        "Fewer steps, other lengths",
        """\
Few-step sampling, and other lengths of video. The model was trained at 13 frames and is not distilled, so that other counts are out of
distribution; one step returns the first clean estimate, a mixture wherever there is a choice.""",
        0.5,
    ),
}


def make(wan: Wan, run: Run, name: str, n: int) -> list[Result]:
    """The results of a section's studies, each in a folder of its own inside `run`."""
    found = []
    for part in parts(n)[name]:
        folder = replace(
            run.inside(f"{name}/{part.name}"), settings={**run.settings, **_settings(part)}
        )
        if not folder.has(result.FILE):
            part.study(wan.with_preset(**part.preset), folder, part.options)
        found.append(result.read(folder.folder))
    return found


def _settings(part: Part) -> dict[str, Any]:
    return {**asdict(part.options), **part.preset}


def work(model: str, run: Run, name: str, n: int) -> tuple[str, float]:
    """Make one section; its name, and the seconds of processor that it took. For a process of
    its own.
    """
    torch.set_num_threads(1)
    begin = process_time()
    make(_load(model), run, name, n)
    return name, process_time() - begin


_load = cache(load)
