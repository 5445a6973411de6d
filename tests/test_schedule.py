"""Schedules and solvers against the official tables and trajectories, and what must hold for
every schedule.
"""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from minicos.errors import MinicosError
from minicos.schedule import SCHEDULES, SOLVERS, History, Schedule, expert_name, make, shifted
from tests import golden

TABLES = json.loads((golden.FOLDER / "schedules.json").read_text())
GOLDEN_NAMES = {"unipc": "official_unipc", "dpmpp": "official_dpmpp", "euler": "diffsynth_euler"}
TOY = golden.read("sampler_toy")
TOY_RUNS = sorted(
    key.removesuffix(".x") for key in TOY if key.count(".") == 3 and key.endswith(".x")
)
MULTISTEP = ("unipc", "dpmpp")

solvers = st.sampled_from(sorted(SCHEDULES))
steps = st.integers(1, 100)
shifts = st.floats(0.2, 20)
seeds = st.integers(0, 2**31 - 1)


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", GOLDEN_NAMES)
@pytest.mark.parametrize("case", TABLES)
def test_golden_tables(case, solver):
    n, shift = (float(part.split("=")[1]) for part in case.split())
    schedule, expected = make(solver, int(n), shift), TABLES[case][GOLDEN_NAMES[solver]]
    assert list(schedule.timesteps) == expected["timesteps"]
    assert list(schedule.sigmas) == expected["sigmas"]
    assert {type(t) for t in schedule.timesteps} == {float if solver == "euler" else int}
    assert len(schedule) == n


def test_four_steps_of_lightx2v():
    """Its denoising_step_list [1000, 750, 500, 250] at shift 5 is Euler with four steps."""
    schedule = make("euler", 4, 5.0)
    expected = torch.tensor([shifted(t / 1000, 5.0) for t in (1000, 750, 500, 250, 0)])
    assert torch.equal(torch.tensor(schedule.sigmas), expected)


@given(solvers, steps, shifts)
def test_sigmas_fall_to_zero(solver, n, shift):
    schedule = make(solver, n, shift)
    assert len(schedule.sigmas) == n + 1
    assert schedule.sigmas[-1] == 0
    assert all(a > b for a, b in zip(schedule.sigmas, schedule.sigmas[1:], strict=False))
    assert all(a >= b for a, b in zip(schedule.timesteps, schedule.timesteps[1:], strict=False))
    assert schedule.timesteps[-1] >= 0
    assert schedule.timesteps[0] <= 1000.001
    assert schedule.sigmas[0] == pytest.approx(1, abs=2e-7) or solver == "unipc"


@given(solvers, steps)
def test_shift_one_is_the_identity(solver, n):
    schedule = make(solver, n, 1.0)
    even = torch.linspace(schedule.sigmas[0], 0, n + 1, dtype=torch.float64)
    assert (
        torch.tensor(schedule.sigmas, dtype=torch.float64) - even
    ).abs().max() < 1.2e-7  # measured 5.1e-8


@given(st.floats(0, 1), shifts, shifts)
def test_shifts_multiply(sigma, a, b):
    assert shifted(shifted(sigma, a), b) == pytest.approx(shifted(sigma, a * b), abs=1e-12)


def test_mistakes_name_what_is_possible():
    with pytest.raises(MinicosError, match="euler, unipc, dpmpp"):
        make("eular", 4, 5.0)
    for n, shift in (
        (0, 5.0),
        (-1, 5.0),
        (4, 0.0),
        (4, -1.0),
        (4, float("nan")),
        (4, float("inf")),
    ):
        for solver in SCHEDULES:
            with pytest.raises(ValueError, match="steps" if n < 1 else "shift"):
                make(solver, n, shift)


def test_experts_meet_at_the_boundary():
    assert [expert_name(t, 0.9) for t in (999, 900, 900.0, 899, 899.99)] == [
        "high",
        "high",
        "high",
        "low",
        "low",
    ]
    assert expert_name(0, None) == "high"
    experts = [expert_name(t, 0.875) for t in make("euler", 50, 5.0).timesteps]
    assert experts == sorted(experts)
    assert experts.count("high") == 21


# -- solvers ---------------------------------------------------------------------------------------


def toy_velocity(x: Tensor, sigma: float) -> Tensor:
    """v = tanh(A x + sigma b), in float64, rounded to float32."""
    return torch.tanh(TOY["in.A"].double() @ x.double() + sigma * TOY["in.b"].double()).float()


@dataclass(frozen=True)
class Gaussian:
    """Videos drawn from N(mean, 1/4): the best velocity is known at each x, and so is the path
    from each noise.
    """

    mean: Tensor
    noise: Tensor

    @staticmethod
    def spread(sigma: float) -> float:
        return ((1 - sigma) ** 2 / 4 + sigma**2) ** 0.5

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        x0 = self.mean + (1 - sigma) / 4 / self.spread(sigma) ** 2 * (x - (1 - sigma) * self.mean)
        return (x - x0) / sigma

    def flow(self, sigma: float) -> Tensor:
        return (1 - sigma) * self.mean + self.spread(sigma) * self.noise


VIDEOS = Gaussian(
    *torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
)


def run(
    schedule: Schedule,
    x: Tensor,
    velocity=toy_velocity,
    start: int = 0,
    stop: int | None = None,
    history=None,
):
    """Latents after every step from `start`, and the last history."""
    out = []
    for i in range(start, len(schedule) if stop is None else stop):
        x, history = SOLVERS[schedule.solver](
            x, velocity(x, schedule.sigmas[i]), i, schedule, history
        )
        out.append(x)
    return out, history


@pytest.mark.parametrize("case", TOY_RUNS)
def test_golden_trajectories(case):
    solver, n, shift = case.split(".")
    schedule = make(solver, int(n[1:]), float(shift[5:]))
    assert torch.equal(torch.tensor(schedule.sigmas), TOY[f"{case}.sigmas"])
    latents, _ = run(schedule, TOY["in.x0"])
    errors = [
        golden.rel_max(x, expected) for x, expected in zip(latents, TOY[f"{case}.x"], strict=True)
    ]
    # Measured 0 for euler and unipc. 2.6e-7 for dpmpp, which takes expm1(-h) where the official
    # code takes exp(-h) - 1.
    assert max(errors) <= (1e-6 if solver == "dpmpp" else 5e-7)


@given(solvers, st.integers(1, 50), st.floats(0.5, 15), seeds)
@settings(max_examples=60, deadline=None)
def test_a_constant_velocity_leads_to_x0(solver, n, shift, seed):
    """On the straight line from noise to x0 every solver is exact, whatever the number of steps."""
    torch.manual_seed(seed)
    x0, noise = torch.randn(2, 1, 3, 4, 2, 2)
    schedule = make(solver, n, shift)
    sigma = schedule.sigmas[0]
    latents, _ = run(schedule, (1 - sigma) * x0 + sigma * noise, lambda x, sigma: noise - x0)
    for x, sigma in zip(latents, schedule.sigmas[1:], strict=True):
        assert torch.allclose(
            x, (1 - sigma) * x0 + sigma * noise, rtol=0, atol=1e-5
        )  # measured 2.5e-6, after 50 steps
    assert latents[0].shape == x0.shape
    assert latents[0].dtype == torch.float32


@given(solvers, seeds)
@settings(max_examples=30, deadline=None)
def test_the_last_step_lands_on_the_clean_estimate(solver, seed):
    torch.manual_seed(seed)
    x, velocity = torch.randn(2, 5)
    schedule = make(solver, 7, 5.0)
    landed, _ = SOLVERS[solver](x, velocity, 6, schedule, None)
    estimate = x - torch.tensor(schedule.sigmas[6]) * velocity
    assert torch.equal(landed, estimate)


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence(solver):
    """Half the step, half the error (Euler) or a quarter (the others); away from 0 and 1, where
    lambda is infinite.
    """

    def error(n):
        schedule = Schedule(solver, (0,) * n, tuple(torch.linspace(0.9, 0.1, n + 1).tolist()))
        latents, _ = run(schedule, VIDEOS.flow(0.9), VIDEOS.velocity)
        return golden.rel_l2(latents[-1], VIDEOS.flow(schedule.sigmas[-1]))

    gain = (
        error(20) / error(80)
    ) ** 0.5  # measured 1.98, unipc 3.7; dpmpp 19.6, a lucky third order on this path
    assert 1.8 < gain < 2.2 if solver == "euler" else gain > 3.3


# -- history ---------------------------------------------------------------------------------------


@given(st.sampled_from(MULTISTEP), st.integers(1, 19))
@settings(max_examples=38, deadline=None)
def test_resumed_is_undisturbed(solver, at):
    """A run cut anywhere and continued from the saved latent and history is the same run, bit
    for bit.
    """
    schedule = make(solver, 20, 5.0)
    whole, _ = run(schedule, TOY["in.x0"])
    first, history = run(schedule, TOY["in.x0"], stop=at)
    saved = load(
        save(
            {
                "latent": first[-1],
                **{f"history.{key}": value for key, value in history.tensors().items()},
            }
        )
    )
    history = History.from_tensors(
        {key.removeprefix("history."): value for key, value in saved.items() if key != "latent"}
    )
    rest, _ = run(schedule, saved["latent"], start=at, history=history)
    assert all(torch.equal(a, b) for a, b in zip(whole, first + rest, strict=True))


@given(st.sampled_from(MULTISTEP), st.integers(1, 15), st.floats(1, 12), seeds)
@settings(max_examples=40, deadline=None)
def test_an_edit_survives_when_history_is_dropped(solver, at, shift, seed):
    """The latent is replaced by that of another noise: how far from its path, in units of the
    edit, do we get?
    """
    other = replace(VIDEOS, noise=torch.randn(64, generator=torch.Generator().manual_seed(seed)))
    schedule = make(solver, 20, shift)
    sigma, sigma_next = schedule.sigmas[at : at + 2]
    _, history = run(schedule, VIDEOS.flow(schedule.sigmas[0]), VIDEOS.velocity, stop=at)

    def distance(history):
        (x,), _ = run(
            schedule, other.flow(sigma), VIDEOS.velocity, start=at, stop=at + 1, history=history
        )
        return (
            (x - other.flow(sigma_next)).norm() / (VIDEOS.flow(sigma) - other.flow(sigma)).norm()
        ).item()

    assert distance(None) < 0.02  # measured 0.006
    if solver == "unipc":
        assert (
            distance(history) > 0.5
        )  # measured 0.65: its corrector starts again from the latent before the edit


@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_restart_is_a_first_step(solver):
    """Without history a step in the middle is the exponential Euler step, and the next one is of
    second order again.
    """
    schedule = make(solver, 10, 5.0)
    x, velocity = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(schedule.sigmas)
    moved, history = SOLVERS[solver](x, velocity, 4, schedule, None)
    assert torch.allclose(moved, x + velocity * (sigma[5] - sigma[4]), atol=1e-6)  # measured 2.4e-7
    assert history.step == 4
    assert len(history.x0) == 1
    _, history = SOLVERS[solver](moved, velocity, 5, schedule, history)
    assert len(history.x0) == (2 if solver == "unipc" else 1)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_history_of_another_step_is_refused(solver):
    schedule = make(solver, 10, 5.0)
    _, history = run(schedule, TOY["in.x0"], stop=3)
    with pytest.raises(ValueError, match="step 5 was given the history of step 2"):
        SOLVERS[solver](TOY["in.x0"], TOY["in.x0"], 5, schedule, history)


def test_a_history_of_another_solver_is_refused():
    schedule, x = make("unipc", 6, 5.0), torch.ones(1, 4)
    _, history = SOLVERS["dpmpp"](x, x, 0, schedule, None)
    with pytest.raises(ValueError, match="this history is of another solver"):
        SOLVERS["unipc"](x, x, 1, schedule, history)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_are_pure(solver):
    """Neither the latent, the velocity nor the history changes, and steps can be repeated."""
    schedule = make(solver, 6, 5.0)
    latents, history = run(schedule, TOY["in.x0"], stop=3)
    x, velocity = latents[-1].clone(), toy_velocity(latents[-1], schedule.sigmas[3])
    copies = x.clone(), velocity.clone(), {} if history is None else history.tensors()
    once, twice = (SOLVERS[solver](x, velocity, 3, schedule, history)[0] for _ in range(2))
    assert torch.equal(once, twice)
    assert torch.equal(x, copies[0])
    assert torch.equal(velocity, copies[1])
    assert history is None or all(
        torch.equal(value, copies[2][key]) for key, value in history.tensors().items()
    )


def test_schedules_are_values():
    a = make("unipc", 4, 5.0)
    assert a == make("unipc", 4, 5.0)
    assert hash(a) == hash(make("unipc", 4, 5.0))
    assert replace(a, solver="dpmpp") != a
