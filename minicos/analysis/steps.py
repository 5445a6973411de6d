"""What does the model predict at every step? The decoded clean estimate x0 = x - sigma v (paper,
Sec. 3 and Figs 1-2).

At high noise the estimate of a puzzle with several right answers shows them all, faintly; as sigma
falls, one survives. Part of this is arithmetic: x0 approximates the mean of all videos that x may
become, so an ideal observer would show the same (`posterior`).

Does the model reason along the steps or along the frames? `convergence` shows both axes in one
picture: the distance of every frame of every step's estimate to the final one. Along the steps, all
frames settle together; along the frames, later frames settle later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.options import StepsOptions
from minicos.analysis.result import Number, Result, write
from minicos.analysis.tools import cases, figures, observer, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.observer import NETWORK
from minicos.analysis.tools.record import Saved
from minicos.analysis.tools.stats import distance, squared, yardstick
from minicos.hooks import NO_HOOKS, Hooks
from minicos.media import load_image, save_image, save_video
from minicos.runs import Progress, Run
from minicos.sample import Step
from minicos.video_model import VideoModel


def spread(count: int, steps: int) -> tuple[int, ...]:
    """`count` of `steps` indices, including first and last, denser at the start, where the picture
    changes most.
    """
    last, n = steps - 1, max(1, min(count, steps) - 1)
    return tuple(sorted({round(last * (k / n) ** 1.5) for k in range(n + 1)}))


@dataclass(frozen=True)
class Steps:
    """Decode the clean estimate of the first sample at the chosen steps: one mp4 per step, one
    sheet for all; and the convergence of all steps, from their latents, without decoding them.

    In a guided run, the estimates of the prompted and the unprompted branch are decoded too, and
    have sheets of their own: three videos for each chosen step. None is a preview: `tools.preview`
    is another recorder, which uses no VAE and keeps nothing. Further samples of the same prompt define the unit of the convergence; with one sample,
    distances are fractions of the first step's.
    """

    wan: VideoModel
    chosen: Sequence[int]
    columns: int = 7  # frames shown in the sheet
    name: str = "x0"

    def hooks(self) -> Hooks:
        """No hooks: the estimate is a property of the step."""
        return NO_HOOKS

    def keep(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        """ "guided" and, with guidance, "cond" and "uncond": b c f h w."""
        estimates = self._estimates(step)
        if step.index in self.chosen:
            for branch, x0 in estimates.items():
                self._show(branch, step.index, x0, run)
        return estimates

    def draw(self, saved: Saved, run: Run) -> list[str]:
        """A sheet for each branch, convergence.png, and a video for each chosen step."""
        schedule = self.wan.schedule()
        run.save_json("schedule.json", {"sigmas": schedule.sigmas, "timesteps": schedule.timesteps})
        branches = sorted({b for step in saved for b in step}, key=lambda b: (b != "guided", b))
        sheets = [self._sheet(branch, saved, run) for branch in branches]
        moved = convergence(torch.stack([step["guided"] for step in saved]))
        run.save_tensors("convergence.safetensors", {"moved": moved})
        figures.grid(
            run.path("convergence.png"),
            moved.T.numpy(),
            x="denoising step",
            y="video frames",
            rows=[figures.frame_name(self.wan.frames_behind(f)) for f in range(moved.shape[1])],
            sigmas=schedule.sigmas,
            bar="0: the final one",
            title="How far each frame of the estimate still is from the final one",
        )
        shown = [i for i in self.chosen if i < len(saved)]
        return [*sheets, "convergence.png", *(self._file("guided", i, "mp4") for i in shown)]

    def numbers(self, saved: Saved) -> list[Number]:
        """The step from which on the clean estimate stays near the final one, over its frames."""
        moved = convergence(torch.stack([step["guided"] for step in saved])).numpy()  # steps f
        moved = moved[:, np.isfinite(moved).all(0)]
        if not moved.size:
            return []
        steps = stats.settled(moved[None] >= SETTLED)[0]
        name = "step from which the clean estimate stays near the final one"
        note = (
            f"mean over latent frames, which settle between steps {steps.min()} and {steps.max()}"
        )
        return [Number(name, float(steps.mean()), unit="step", note=note)]

    def _estimates(self, step: Step) -> dict[str, Tensor]:
        """The guided estimate and, with several passes, that of each pass: b c f h w."""
        passes = step.velocities if len(step.velocities) > 1 else ()
        return {"guided": step.x0} | {branch: step.x0_of(branch) for branch in passes}

    def _sheet(self, branch: str, saved: Saved, run: Run) -> str:
        shown = [i for i in self.chosen if i < len(saved) and branch in saved[i]]
        for i in shown:
            if not run.has(self._file(branch, i, "png")):
                self._show(branch, i, saved[i][branch], run)
        sigmas, latents = self.wan.schedule().sigmas, range(saved[0]["guided"].shape[2])
        frames = self._frames(sum(len(self.wan.frames_behind(f)) for f in latents))
        name = f"{_folder(branch)}_sheet.png"
        figures.sheet(
            run.path(name),
            [
                np.split(
                    figures.pixels(load_image(run.path(self._file(branch, i, "png")))),
                    len(frames),
                    axis=1,
                )
                for i in shown
            ],
            rows=[f"step {i}\nσ {sigmas[i]:.2f}" for i in shown],
            columns=[f"frame {f}" for f in frames],
            title=f"The clean estimate{TITLES.get(branch, f' of pass {branch}')}: "
            "denoising step (down), video frame (across)",
        )
        return name

    def _show(self, branch: str, index: int, x0: Tensor, run: Run) -> None:
        """Decode one estimate: a video to watch, and a strip of its frames for the sheet."""
        video = self.wan.decode(x0[:1])[0]  # f h w 3
        save_video(run.path(self._file(branch, index, "mp4")), video, fps=self.wan.preset.fps)
        strip = self._file(branch, index, "png")
        shown = np.concatenate(list(video[self._frames(len(video))]), axis=1)
        save_image(run.path(strip), shown)
        run.record(strip)

    def _file(self, branch: str, index: int, ending: str) -> str:
        """The file name of a decoded estimate; it contains the way of decoding unless that is the
        default.
        """
        tile = f"_tile{self.wan.tile}" if self.wan.tile else ""
        narrow = "_bfloat16" if self.wan.decode_dtype == torch.bfloat16 else ""
        if self.wan.device.type == "cuda" and not (
            narrow or getattr(self.wan, "decode_tf32", True)
        ):
            narrow = "_float32"  # TF32 is the default there
        return f"{_folder(branch)}/step_{index:02d}{tile}{narrow}.{ending}"

    def _frames(self, count: int) -> list[int]:
        return figures.evenly(count, self.columns)


TITLES = {"guided": "", "cond": " of the prompted branch", "uncond": " of the unprompted branch"}


def convergence(estimates: Tensor) -> Tensor:
    """Distance of every step's estimate to the last one, per frame: steps b c f h w -> steps f,
    float64, mean over samples.

    With several samples, in units of the distance between two samples' final estimates (D: 0
    settled, 1 as far as another seed); otherwise in units of the first step's distance. NaN for a
    frame that never moves by more than 1e-6 of the largest unit.
    """
    moved = torch.stack([squared(x0, estimates[-1]) for x0 in estimates])  # steps b f
    several = estimates.shape[1] > 1
    unit = yardstick([x0[None] for x0 in estimates[-1]])[0] if several else moved[0, 0]  # f
    unit = torch.where(unit > 1e-6 * unit.max(), unit, torch.nan)
    return distance(moved.mean(1)[..., None], unit[:, None])


def _folder(branch: str) -> str:
    return "x0" if branch == "guided" else f"x0_{branch}"


# -- the question, on puzzles ----------------------------------------------------------------------

# fraction of the first estimate's distance to the last one below which an estimate is settled
SETTLED = 0.1
SEVERAL, ONE = "several", "one"  # number of right answers


def moves(wan: VideoModel, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Squared distance of every step's estimate to the last one, per latent frame: b N f."""
    condition = cases.condition(wan, batch)
    steps = wan.sample(condition, noise=cases.noise(wan, condition, batch))
    estimates = [step.x0_cond for step in steps]
    return {"moved": torch.stack([squared(x0, estimates[-1]) for x0 in estimates], dim=1)}


def settling(moved: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The step from which on each frame's estimate stays near the last one: moved (n N f), unit
    (f) -> n f.
    """
    return stats.settled(distance(moved[..., None], unit[:, None]) >= SETTLED)


def study(wan: VideoModel, run: Run, options: StepsOptions) -> Result:
    """When do the frames settle: all together, and later if several answers are right?

    The given first frame is excluded. All puzzles share one unit, the mean distance of the first
    estimate to the last one in puzzles with a choice: without a choice, even the first estimate may
    be near the last.
    """
    chosen = {
        SEVERAL: cases.chosen(options),
        ONE: cases.chosen(replace(options, several=False, single=True)),
    }
    models = observer.models(wan, options)
    work = {name: cases.batches(made) for name, made in chosen.items()}
    with Progress(len(models) * sum(map(len, work.values())), "steps") as bar:
        kept = {n: cases.collect_each(run, n, models, some, moves, bar) for n, some in work.items()}
    moved = {(who, n): kept[n][who]["moved"][..., 1:] for who in models for n in work}
    units = {who: values[:, 0].mean(0) for (who, name), values in moved.items() if name == SEVERAL}
    settled = {
        (who, name): settling(values, units[who]).astype(float)
        for (who, name), values in moved.items()
    }
    unit, made = units[NETWORK], numbers(settled)
    far = moved[NETWORK, SEVERAL] / unit
    curves = [
        stats.curve(
            f"latent frame {f + 1}",
            far[..., f],
            range(far.shape[1]),
            "denoising step",
            "1: as at the first step",
        )
        for f in range(far.shape[2])
    ]
    figures.grid(
        run.path("convergence.png"),
        far.mean(0).T,
        x="denoising step",
        y="video frames",
        rows=[figures.frame_name(wan.frames_behind(f + 1)) for f in range(far.shape[2])],
        sigmas=wan.schedule().sigmas,
        bar="1: as at the first step",
        title="Distance of every frame's estimate to the last one",
    )
    return write(run, Result("steps", run.settings, made, curves=curves, files=["convergence.png"]))


def numbers(settled: Mapping[tuple[str, str], np.ndarray]) -> list[Number]:
    """When frames settle (n frames), for each model, with several right answers and with one."""
    of = {who: values for (who, name), values in settled.items() if name == SEVERAL}
    late = {who: values[:, -1] - values[:, 0] for who, values in of.items()}
    return [
        stats.mean(
            "step at which the estimate settles, several answers",
            of[NETWORK].max(1),
            "the last step",
            "step",
        ),
        stats.between(
            "step at which it settles: several minus one answer",
            of[NETWORK].max(1),
            settled[NETWORK, ONE].max(1),
            "puzzles with one answer (other puzzles: unpaired)",
            "step",
        ),
        *stats.compared(
            "step at which it settles: last minus second latent frame",
            late,
            "frames of one video: 0 where they settle together",
            "step",
        ),
    ]
