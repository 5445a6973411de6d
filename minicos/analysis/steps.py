"""What does the model believe at every step? The clean estimate x0 = x - sigma v, decoded (paper, Sec. 3 and Fig. 2).

At high noise the estimate of a puzzle with several right answers shows them all, faintly; as sigma falls, one survives. Part of that is
arithmetic: x0 approximates the mean of all videos that x may become, so an ideal observer would show the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from minicos.analysis import figures
from minicos.analysis.observe import Saved
from minicos.hooks import NO_HOOKS, Hooks
from minicos.media import load_image, save_image, save_video
from minicos.pipeline import Wan
from minicos.runs import Run
from minicos.sample import Step


def spread(count: int, steps: int) -> tuple[int, ...]:
    """`count` of `steps` indices, first and last included, closer together at the start, where the picture changes most."""
    last, n = steps - 1, max(1, min(count, steps) - 1)
    return tuple(sorted({round(last * (k / n) ** 1.5) for k in range(n + 1)}))


@dataclass(frozen=True)
class Steps:
    """Decode the guided clean estimate of the first sample at the chosen steps: one mp4 a step, one sheet for all."""

    wan: Wan
    chosen: Sequence[int]
    columns: int = 7  # frames shown in the sheet
    name: str = "x0"

    def hooks(self) -> Hooks:
        return NO_HOOKS

    def see(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        if step.index in self.chosen:
            self._show(step.index, step.x0, run)
        return {"latent": step.x0}

    def draw(self, saved: Saved, run: Run) -> list[str]:
        shown = [i for i in self.chosen if i < len(saved)]
        for i in shown:
            if not run.has(_strip(i)):
                self._show(i, saved[i]["latent"], run)
        sigmas, stride = self.wan.schedule().sigmas, self.wan.vae.cfg.stride[0]
        frames = self._frames(stride * (saved[0]["latent"].shape[2] - 1) + 1)
        figures.sheet(
            run.path("x0_sheet.png"),
            [np.split(figures.pixels(load_image(run.path(_strip(i)))), len(frames), axis=1) for i in shown],
            rows=[f"step {i}\nσ {sigmas[i]:.2f}" for i in shown],
            columns=[f"frame {f}" for f in frames],
            title="The clean estimate: denoising step (down), video frame (across)",
        )
        return ["x0_sheet.png", *(f"x0/step_{i:02d}.mp4" for i in shown)]

    def _show(self, index: int, x0: Tensor, run: Run) -> None:
        """Decode one estimate: a video to watch, and a strip of its frames for the sheet."""
        video = self.wan.decode(x0[:1])[0]  # f h w 3
        save_video(run.path(f"x0/step_{index:02d}.mp4"), video, fps=self.wan.preset.fps)
        save_image(run.path(_strip(index)), np.concatenate(list(video[self._frames(len(video))]), axis=1))

    def _frames(self, count: int) -> list[int]:
        return figures.evenly(count, self.columns)


def _strip(index: int) -> str:
    return f"x0/step_{index:02d}.png"
