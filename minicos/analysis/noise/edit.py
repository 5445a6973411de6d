"""What does noise do to a run, at which step, in which frame? (paper, Sec. 3.2 and Fig. 3)

The paper replaces latents by Gaussian noise, either all frames at one step ("noise at step") or one
frame at every step ("noise at frame"), and finds that a step is fragile and a frame is not. `Noise`
does either, or any set of steps and latent frames, to the latent *entering* a step, before the
network sees it. With x0 the clean estimate of the step before, sigma the level of the latent and
eps fresh N(0, 1), it becomes

    replace   eps                                  the paper's; a reseed at step 0, later far more
                                                   noise than the network is told
    renoise   (1 - sigma) x0 + sigma eps           on the schedule: what was believed stays, the
                                                   noise is drawn again
    erase     (1 - sigma) mean(x0) + sigma eps     on the schedule: what was believed goes (mean
                                                   over f h w, one value per channel)
    add       x + eps scaled to a total dose       the same squared norm for any set of steps and
                                                   frames
    null      x, as a new tensor                   the control

Imposed frames (TI2V's first) are never touched. Under channel concatenation (I2V) frame 0 is a
latent like the others and is touched, but its picture still stands beside x in the condition: noise
there asks whether the network copies it again.

Dose: the squared norm injected over the whole run, in units of one latent frame of unit variance. A
step has f frames and a frame has N steps, so the paper's two conditions differ in dose, and "a
frame matters less" could be an artefact either way. Two ways to match: `cells` (frame noise enters
at as many steps as there are frames) and mode `add` (equal dose, spread evenly over the cells).

Measured on every later step's clean estimate, against the clean run: D (0 same, 1 another seed;
`stats`) and 1 - debiased CKA over tokens, on request also of one layer's hidden state; where a
puzzle knows its answers, the verdict on the video, and the share of right frames among all, those
that were not touched, and those that show the whole answer.

Trivial by construction: `null` gives exactly 0 under Euler. `replace` at step 0 is another seed, D
= 1 on average; at the last step the video *is* noise, since one step cannot remove what it is not
told of, so the frame that is noised at every step is lost in any model, and only the frames beside
it tell anything. Noise in the frames that are scored costs more score than noise elsewhere. A
step's sweep resumes from the saved clean run: noise at step s costs N - s passes. A multistep
solver forgets its history at an edit, which moves even an untouched run, so its edits are held
against a run with the same restarts (twice the passes); take Euler. The paper is silent on mode,
level, CKA's rows and which frames: these readings are ours.
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
from minicos.wan import Wan

MODES = ("replace", "renoise", "erase", "add", "null")


@dataclass(frozen=True)
class Noise:
    """Noise on the latents entering `steps`, in the latent frames `frames` (None: all). In a loop
    of one's own:

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
        """The latent (b c f h w) that enters step `index` instead of x; x itself where there is
        nothing to do.

        sigma   level of x in every frame, 0 where it is imposed  1 1 f 1 1 or 1 1 1 1 1
        x0      clean estimate of the step before (b c f h w); None before the first step, where
                nothing is believed yet
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
        # every frame's norm exactly as wanted
        unit = eps / eps.square().mean(dim=(1, 3, 4), keepdim=True).sqrt()
        return x + (self.dose / (len(self.steps) * self._hit(x, sigma).sum())).sqrt() * unit

    def _draw(self, x: Tensor, index: int) -> Tensor:
        """Fresh noise for each sample, depending on its seed and the step alone, and never the
        noise of another run's start.
        """
        seeds = range(self.seed, self.seed + len(x)) if isinstance(self.seed, int) else self.seed
        # a name's checksum, since torch reads the low 32 bits of a seed alone: 2**50 + n would be
        # the noise of seed n
        each = [
            torch.Generator().manual_seed(crc32(f"noise {seed} {index}".encode())) for seed in seeds
        ]
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in each]).to(x)


def follow(
    wan: Wan,
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
    dose that entered it (b f).
    """
    entered = edit(x, start, condition.per_frame(wan.schedule().sigmas[start]), x0)
    if state is None and not start:  # what travels beside starts as in the clean run
        state = State(beside=wan.beside(x, condition))
    if state is not None and entered is not x:
        state = state.edited()
    for step in wan.sample(condition, noise=entered, start=start, state=state, hooks=hooks):
        injected = stats.squared(entered, x) / x[0, :, 0].numel()
        x, step.next = step.next, edit.after(step)
        entered = step.next
        yield step, injected
