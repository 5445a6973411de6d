"""Which of a puzzle's right answers are alive at each step of one run, compared with an ideal
observer?

The numbers are those of `belief`, for one run and one picture instead of many: the weights with
which the valid answers mix into the clean estimate. For puzzles with several right answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minicos.analysis.belief import belief
from minicos.analysis.result import Curve, Number
from minicos.analysis.tools import figures, posterior
from minicos.analysis.tools.record import Saved
from minicos.hooks import NO_HOOKS, Hooks
from minicos.runs import Run
from minicos.sample import Step
from minicos.video_model import VideoModel

MOST = 8  # answers that are drawn as separate curves


@dataclass(frozen=True)
class Answers:
    """The weight of every valid answer in the first sample's clean estimate, and the ideal
    observer's, at every step.
    """

    wan: VideoModel
    z: Tensor = field(repr=False)  # r c f h w, the latents of two answers or more
    name: str = "answers"

    def hooks(self) -> Hooks:
        """No hooks: the estimate is a property of the step."""
        return NO_HOOKS

    def keep(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        """ "shown", "ideal": weights of the answers (r), float64."""
        found = belief(step.x[0], step.x0_cond[0], step.sigma, self.z)
        return {"shown": found.shown, "ideal": found.ideal}

    def draw(self, saved: Saved, run: Run) -> list[str]:
        """answers.png: how many answers are alive; evidence.png: the weight of each."""
        shown, ideal = (torch.stack([step[k] for step in saved]) for k in ("shown", "ideal"))
        steps, label = range(len(shown)), "denoising step"
        alive = {"network": shown, "ideal observer": ideal}
        sigmas = self.wan.schedule().sigmas
        figures.lines(
            run.path("answers.png"),
            [
                Curve(name, steps, [posterior.effective(w) for w in weights], (), (), label)
                for name, weights in alive.items()
            ],
            y="answers alive",
            title=f"How many of {shown.shape[1]} right answers the clean estimate shows",
            sigmas=sigmas,
        )
        figures.lines(
            run.path("evidence.png"),
            [
                Curve(f"answer {r}", steps, shown[:, r].tolist(), (), (), label)
                for r in range(min(MOST, shown.shape[1]))
            ],
            y="weight",
            title="The weight of each right answer in the clean estimate",
            sigmas=sigmas,
        )
        return ["answers.png", "evidence.png"]

    def numbers(self, saved: Saved) -> list[Number]:
        """Answers alive in the first and in the last clean estimate."""
        found = []
        for where, step in (("first", saved[0]), ("last", saved[-1])):
            alive, ideal = (posterior.effective(step[k]) for k in ("shown", "ideal"))
            name = f"answers alive in the {where} clean estimate"
            found.append(Number(name, alive, unit="answers", note=f"ideal observer: {ideal:.3g}"))
        return found
