"""Noise levels (`Schedule`), and the solvers that move a latent from one level to the next.

A latent at noise level sigma is x = (1 - sigma) x0 + sigma noise, and the network predicts its
velocity v = noise - x0. Sampling solves the differential equation dx/dsigma = v from sigma = 1
(noise) to sigma = 0 (video). At every step, x0 = x - sigma v is the end of a straight line along v.
A schedule lists the sigmas; a solver determines the path between them:

    euler   a straight line in x along v (DiffSynth: the tools of the paper)
    dpmpp   a straight line in x0 through this and the last step (DPM-Solver++ 2M, official)
    unipc   like dpmpp, but each step first corrects the previous one with the x0 now known at its
            end (UniPC, official and the default of Wan)

`shift` moves the levels towards noise: sigma' = shift sigma / (1 + (shift - 1) sigma). Euler needs
no past steps. The other two keep a `History`, which the loop passes from step to step; without one
they restart at first order. After an edit of the latent the history must be dropped: it belongs to
the latent before the edit, and UniPC would pull the edit back.

Rounding follows the official code: tables in float64, rounded once, and updates in float32.
Sources: wan/utils/fm_solvers_unipc.py and fm_solvers.py of Wan2.2,
diffsynth/diffusion/flow_match.py of DiffSynth-Studio.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import SupportsIndex, TypeVar

import torch
from torch import Tensor

from minicos.config import LEAST_SHIFT, MOST_SHIFT, MOST_STEPS
from minicos.errors import MinicosError

S = TypeVar("S", float, Tensor)


@dataclass(frozen=True)
class Schedule:
    """N steps. Step i goes from sigmas[i] to sigmas[i + 1], and the network receives
    timesteps[i].
    """

    solver: str  # name in SOLVERS of the solver that these sigmas are made for
    # N values in 0..1000; the official solvers truncate to int, Euler does not
    timesteps: tuple[int | float, ...]
    sigmas: tuple[float, ...]  # N + 1 values falling to 0, each a float32 number
    dtype: torch.dtype = torch.float32  # to which the loop rounds, see `rounded`

    def __len__(self) -> int:
        return len(self.timesteps)


def shifted(sigma: S, shift: float) -> S:
    """sigma' = shift sigma / (1 + (shift - 1) sigma), for a number or a tensor; shift 1 is the
    identity.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def euler(steps: int, shift: float) -> Schedule:
    """Evenly spaced sigmas 1, ..., 1/N, shifted, in float32. Timesteps are 1000 sigma, not
    truncated.
    """
    _check(steps, shift)
    sigmas = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu")[:-1], shift)
    return Schedule("euler", tuple((1000 * sigmas).tolist()), (*sigmas.tolist(), 0.0))


def dpmpp(steps: int, shift: float) -> Schedule:
    """Evenly spaced sigmas 1, ..., 1/N, shifted, in float64. Timesteps are 1000 sigma,
    truncated.
    """
    return _official("dpmpp", 1.0, steps, shift)


def unipc(steps: int, shift: float) -> Schedule:
    """Like `dpmpp`, but from 0.999 rounded to float32: the official table of alphas ends at
    1/1000, not at 0.
    """
    return _official("unipc", 0.9990000128746033, steps, shift)


def _official(solver: str, start: float, steps: int, shift: float) -> Schedule:
    _check(steps, shift)
    sigmas = [shifted(start - i * (start / steps), shift) for i in range(steps)]
    rounded = torch.tensor([*sigmas, 0.0], dtype=torch.float32, device="cpu").tolist()
    return Schedule(solver, tuple(int(1000 * sigma) for sigma in sigmas), tuple(rounded))


def rounded(schedule: Schedule, dtype: torch.dtype) -> Schedule:
    """Euler's levels for a loop that keeps latent, guidance and timestep in `dtype`, as DiffSynth
    does with bfloat16.
    """
    timesteps = torch.tensor(schedule.timesteps, device="cpu").to(dtype).tolist()
    return replace(schedule, timesteps=tuple(timesteps), dtype=dtype)


def _check(steps: int, shift: float) -> None:
    if not isinstance(steps, SupportsIndex) or not 1 <= steps <= MOST_STEPS:
        raise MinicosError(f"{steps} steps: sampling takes a whole number from 1 to {MOST_STEPS}")
    if not LEAST_SHIFT <= shift <= MOST_SHIFT:
        raise MinicosError(
            f"shift {shift}: it must be a positive number, such as 5 (1 leaves sigmas evenly "
            f"spaced), from {LEAST_SHIFT:g} to {MOST_SHIFT:g}"
        )


SCHEDULES: dict[str, Callable[[int, float], Schedule]] = {
    "euler": euler,
    "unipc": unipc,
    "dpmpp": dpmpp,
}


def make(solver: str, steps: int, shift: float) -> Schedule:
    """The schedule of a solver, by name. Raises MinicosError for an unknown solver."""
    if solver not in tuple(SCHEDULES):  # a list has no hash
        raise MinicosError(f"no solver {solver!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[solver](steps, shift)


def expert_name(timestep: float, boundary: float | None) -> str:
    """The expert for a timestep: "high" at or above 1000 * boundary, else "low". "high" if boundary
    is None.
    """
    return "high" if boundary is None or timestep >= 1000 * boundary else "low"


@dataclass(frozen=True)
class History:
    """The memory of a multistep solver: as many clean estimates as the order of the step that
    wrote it.
    """

    step: int  # the step that wrote this history
    x0: tuple[Tensor, ...]  # the clean estimates of the last one or two steps, newest last
    x: Tensor | None = None  # UniPC: the latent at the start of that step, after correction

    def tensors(self) -> dict[str, Tensor]:
        """The history as tensors for a safetensors file; copies, since a file must not hold one
        storage twice.
        """
        tensors = {f"x0.{i}": x0.clone() for i, x0 in enumerate(self.x0)} | {
            "step": torch.tensor(self.step)
        }
        return tensors if self.x is None else tensors | {"x": self.x.clone()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "History":
        """The inverse of `tensors`."""
        x0 = tuple(tensors[key] for key in sorted(tensors) if key.startswith("x0."))
        return cls(int(tensors["step"]), x0, tensors.get("x"))


Solver = Callable[[Tensor, Tensor, int, Schedule, History | None], tuple[Tensor, History | None]]


def euler_step(
    x: Tensor, velocity: Tensor, i: int, schedule: Schedule, history: History | None = None
) -> tuple[Tensor, None]:
    """x' = x + v (sigma' - sigma), each term rounded to the schedule's dtype; keeps no history."""
    sigma, dtype = _sigmas(schedule), schedule.dtype
    moved = x.to(dtype) + velocity.to(dtype) * (sigma[i + 1] - sigma[i])
    return moved.float(), None


def dpmpp_step(
    x: Tensor, velocity: Tensor, i: int, schedule: Schedule, history: History | None = None
) -> tuple[Tensor, History]:
    """DPM-Solver++ 2M, midpoint (arXiv:2211.01095, algorithm 2); first order on the first and last
    step and after a restart.
    """
    _follows(history, i)
    sigma = _sigmas(schedule)
    x0 = x - sigma[i] * velocity
    return _predict(x, x0, i, sigma, history), History(i, (x0,))


def unipc_step(
    x: Tensor, velocity: Tensor, i: int, schedule: Schedule, history: History | None = None
) -> tuple[Tensor, History]:
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv:2302.04867): correct the last step, then predict
    as DPM-Solver++ does.
    """
    _follows(history, i)
    sigma = _sigmas(schedule)
    x0 = x - sigma[i] * velocity  # of the latent that the network saw, before the correction
    if history is not None:
        x = _correct(x0, i, sigma, history)
    seen = (x0,) if history is None else (history.x0[-1], x0)
    return _predict(x, x0, i, sigma, history), History(i, seen, x)


SOLVERS: dict[str, Solver] = {"euler": euler_step, "unipc": unipc_step, "dpmpp": dpmpp_step}


def _sigmas(schedule: Schedule) -> Tensor:
    """float32 on the CPU, wherever the latents are: multiplying a tensor on any device by a CPU
    scalar needs no synchronisation.
    """
    return torch.tensor(schedule.sigmas, dtype=torch.float32, device="cpu")


def _follows(history: History | None, i: int) -> None:
    if history is not None and history.step != i - 1:
        raise MinicosError(
            f"step {i} was given the history of step {history.step}: pass that of step {i - 1}, or "
            "None"
        )


def _log_snr(sigma: Tensor) -> Tensor:
    """lambda = log(alpha / sigma) with alpha = 1 - sigma: the time variable of both multistep
    solvers; inf at sigma 0.
    """
    return torch.log(1 - sigma) - torch.log(sigma)


def _advance(x: Tensor, x0: Tensor, bend: Tensor | float, start: Tensor, end: Tensor) -> Tensor:
    """x' = (sigma'/sigma) x + alpha' (1 - e^-h) (x0 + bend), where h is the step in lambda; exact
    if x0 + bend is constant.
    """
    alpha, decay = 1 - end, torch.expm1(_log_snr(start) - _log_snr(end))
    return end / start * x - alpha * decay * x0 - alpha * decay * bend


def _predict(x: Tensor, x0: Tensor, i: int, sigma: Tensor, history: History | None) -> Tensor:
    """From sigma_i to sigma_i+1 with x0 extrapolated by half a step, or kept constant (first order)
    on the first and last step.
    """
    if history is None or i == len(sigma) - 2:
        return _advance(x, x0, 0.0, sigma[i], sigma[i + 1])
    before, here, there = _log_snr(sigma[i - 1 : i + 2])
    r = (before - here) / (there - here)  # < 0: the last step, in units of this one
    slope = (history.x0[-1] - x0) / r  # change of x0 per step of this length
    return _advance(x, x0, 0.5 * slope, sigma[i], sigma[i + 1])


def _correct(x0: Tensor, i: int, sigma: Tensor, history: History) -> Tensor:
    """UniC: repeat the step from sigma_i-1 to sigma_i with the clean estimate at its end.

    Relative to sigma_i-1, in units of the step, that estimate is at 1 and the one before at r < 0.
    The weights rho of their differences make the update exact for x0 quadratic in lambda:
    rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2.
    """
    if history.x is None:
        raise MinicosError("this history is of another solver: that of UniPC keeps the latent, too")
    *earlier, last = history.x0
    bend = x0 - last
    if not earlier:
        bend = 0.5 * bend
    else:
        before, start, end = _log_snr(sigma[i - 2 : i + 1])
        r, h = (before - start) / (end - start), start - end
        phi_1 = torch.expm1(h) / h - 1
        phi_2 = phi_1 / h - 0.5
        b = torch.stack([phi_1, 2 * phi_2]) / torch.expm1(h)
        rho = torch.linalg.solve(r.new_tensor([[1, 1], [r, 1]]), b)
        bend = rho[0] * ((earlier[0] - last) / r) + rho[1] * bend
    return _advance(history.x, last, bend, sigma[i - 1], sigma[i])
