"""What does noise do to a run, at which step and in which frame? (paper, Sec. 3.2 and Fig. 3)

The paper replaces latents by Gaussian noise, either all frames at one step ("noise at step") or one
frame at every step ("noise at frame"), and finds that a step is fragile and a frame is not. `Noise`
does either, or any set of steps and latent frames, to the latent that *enters* a step, before the
network sees it. With x0 the clean estimate of the step before, sigma the level of the latent and
eps fresh N(0, 1), the latent becomes

    replace   eps                                  the paper's. At step 0 a new seed; later far more
                                                   noise than the timestep tells the network
    renoise   (1 - sigma) x0 + sigma eps           on the schedule: keeps the estimate and redraws
                                                   the noise
    erase     (1 - sigma) mean(x0) + sigma eps     on the schedule: removes the estimate (mean over
                                                   f h w, one value per channel)
    add       x + eps scaled to a total dose       equal squared norm for any set of steps and
                                                   frames
    null      x, as a new tensor                   the control

Imposed frames (TI2V's first) are never changed. With channel concatenation (I2V), a given frame
(`Model.pictured`) is a latent like the others and is changed, but its picture remains in the
condition: noise there tests whether the network copies it again.

Dose: the squared norm injected over the whole run, in units of one latent frame of unit variance. A
step has f frames and a frame has N steps, so the paper's two conditions differ in dose, and "a
frame matters less" could be an artefact in either direction. There are two ways to match doses:
`cells` (frame noise at as many steps as there are frames) and mode `add` (equal dose, spread evenly
over the cells).

Measured on the clean estimate of every later step, relative to the clean run: D (0 the same, 1
another seed; `stats`) and 1 - debiased CKA over tokens, on request also of one layer's hidden
state. If a puzzle knows its answers, also the verdict on the video, and the share of right frames
among all frames, unchanged frames, and frames that show the whole answer.

Trivial by construction: `null` gives exactly 0 under Euler. `replace` at step 0 is another seed, so
D is 1 on average. At the last step the video *is* noise, since one step cannot remove noise above
its own level; a frame that is replaced at every step is therefore lost in any model, and only the
other frames are informative. Noise in frames that are scored costs more score than noise elsewhere.

Cost: a sweep over steps resumes from the saved clean run, so noise at step s costs N - s passes. A
multistep solver loses its history at an edit, which changes even a null run, so its edits are
compared with a run that has the same restarts (twice the passes); prefer Euler. The paper does not
specify mode, level, the rows of CKA, or which frames: these choices are ours.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from minicos.analysis.tools import stats
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.sample import State, Step
from minicos.video_model import VideoModel

MODES = ("replace", "renoise", "erase", "add", "null")


@dataclass(frozen=True)
class Noise:
    """Noise on the latents that enter `steps`, in the latent frames `frames` (None: all). In a loop
    of your own:

        edit = Noise("replace", steps=(10,))
        for step in wan.sample(condition, noise=edit(noise, 0, condition.per_frame(1.0))):
            step.next = edit.after(step)
    """

    mode: str
    steps: tuple[int, ...]
    frames: tuple[int, ...] | None = None
    dose: float = 1.0  # total squared norm of `add`, in latent frames of unit variance
    seed: int | Sequence[int] = 0  # one per sample, or n for n, n + 1, ...

    def __post_init__(self):
        if self.mode not in MODES:
            raise MinicosError(f"no noise mode {self.mode!r}: take one of {', '.join(MODES)}")
        if not 0 < self.dose < math.inf:
            raise MinicosError(f"a dose of {self.dose}: it is a squared norm, above 0")

    def __call__(self, x: Tensor, index: int, sigma: Tensor, x0: Tensor | None = None) -> Tensor:
        """The latent (b c f h w) that enters step `index` instead of x; x itself if this step is
        not edited.

        Args:
            sigma: level of x in every frame, 0 for imposed ones; 1 1 f 1 1 or 1 1 1 1 1.
            x0: clean estimate of the step before (b c f h w); None before the first step, where
                there is no estimate.
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
        """Which frames are changed: 1 1 f 1 1, bool."""
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
        # scale the norm of every frame exactly
        unit = eps / eps.square().mean(dim=(1, 3, 4), keepdim=True).sqrt()
        return x + (self.dose / (len(self.steps) * self._hit(x, sigma).sum())).sqrt() * unit

    def _draw(self, x: Tensor, index: int) -> Tensor:
        """Fresh noise for each sample, which depends only on its seed and the step, and never
        equals the initial noise of a run.
        """
        seeds = range(self.seed, self.seed + len(x)) if isinstance(self.seed, int) else self.seed
        # The checksum of a name, since torch uses only the low 32 bits of a seed: 2**50 + n would
        # give the noise of seed n.
        each = [
            torch.Generator().manual_seed(crc32(f"noise {seed} {index}".encode())) for seed in seeds
        ]
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in each]).to(x)


def follow(
    wan: VideoModel,
    condition: Condition,
    x: Tensor,
    edit: Noise,
    *,
    start: int = 0,
    state: State | None = None,
    x0: Tensor | None = None,
    hooks: Hooks = NO_HOOKS,
) -> Iterator[tuple[Step, Tensor]]:
    """The run under `edit`, from the clean latent x that enters step `start`: each step, and the
    dose injected before it (b f).
    """
    entered = edit(x, start, condition.per_frame(wan.schedule().sigmas[start]), x0)
    if state is None and not start:  # additional latents start as in the clean run
        state = State(beside=wan.beside(x, condition))
    if state is not None and entered is not x:
        state = state.edited()
    for step in wan.sample(condition, noise=entered, start=start, state=state, hooks=hooks):
        injected = stats.squared(entered, x) / x[0, :, 0].numel()
        x, step.next = step.next, edit.after(step)
        entered = step.next
        yield step, injected
