"""The contract of `sample.Model` for the authors of new models, tested with two of them: an exact
posterior, and a further latent next to the video.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.sample import VIDEO, Latents, Model, Moment, State, classifier_free, draw_noise, sample
from minicos.schedule import SOLVERS, Schedule, make

SHAPE = (2, 4, 3, 4, 4)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
with_history = pytest.mark.parametrize("solver", ["unipc", "dpmpp"])


# -- an ideal observer -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Observer(Model):
    """Knows the few possible videos z (r c f h w), all equally likely: its clean estimate is
    the posterior mean.

    p(r | x) is proportional to exp(-||x - (1 - sigma) z_r||^2 / (2 sigma^2)), and velocity = (x -
    E[z | x]) / sigma.
    """

    z: Tensor
    solver: str = "euler"

    def schedule(self) -> Schedule:
        return make(self.solver, 20, 5.0)

    def mean(self, x: Tensor, sigma: float) -> Tensor:
        gaps = (x[:, None] - (1 - sigma) * self.z).double().square().flatten(2).sum(2)  # b r
        weights = torch.softmax(-gaps / (2 * sigma**2), dim=1)
        return torch.tensordot(weights, self.z.double(), dims=1).float()

    def velocity(
        self, latents: Latents, moment: Moment, branch: str, condition: Condition, hooks: Hooks
    ) -> Latents:
        x = latents[VIDEO]
        return {VIDEO: (x - self.mean(x, moment.sigma)) / moment.sigma}


@pytest.fixture(scope="module")
def observer() -> Observer:
    return Observer(draw_noise((3, *SHAPE[1:]), 100))


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return draw_noise(SHAPE, 0)


@every_solver
def test_an_observer_believes_the_posterior_mean_and_ends_at_a_candidate(solver, observer, noise):
    observer = replace(observer, solver=solver)
    for step in observer.sample(Condition(shape=SHAPE), noise=noise):
        expected = observer.mean(step.x, step.sigma)
        assert (step.x0 - expected).abs().max() < 2e-5  # measured 2.1e-6
    for video in step.next:
        assert (video - observer.z).flatten(1).abs().amax(1).min() < 1e-4  # measured 0


def test_an_observer_of_one_video_travels_straight_to_it(observer, noise):
    one = replace(observer, z=observer.z[:1])
    *_, last = one.sample(Condition(shape=SHAPE), seed=0)
    assert (last.next - one.z).abs().max() < 1e-5  # measured 9.5e-7


def test_what_studies_may_ask_has_an_answer(observer):
    assert (observer.depth, observer.sublayers, observer.points) == (0, (), {})
    assert observer.grid(SHAPE) == (3, 4, 4)
    assert [*map(observer.frames_behind, range(3))] == [range(1), range(1, 2), range(2, 3)]


def test_a_hook_needs_a_point(observer, noise):
    with pytest.raises(MinicosError, match="no hook point"):
        sample(observer, noise, Condition(shape=SHAPE), hooks=Hooks().on("blocks.0", print))


# -- a further latent next to the video -----------------------------------------------------------


@dataclass(frozen=True)
class WithSound(Model):
    """Like LTX-2: two latents, each of whose velocities depends on both, guidance, and a third
    pass.
    """

    solver: str = "unipc"

    def schedule(self) -> Schedule:
        return make(self.solver, 6, 5.0)

    def branches(self, expert: str, condition: Condition) -> tuple[str, ...]:
        return "cond", "uncond", "apart"

    def velocity(
        self, latents: Latents, moment: Moment, branch: str, condition: Condition, hooks: Hooks
    ) -> Latents:
        x, sound = latents[VIDEO], latents["sound"]
        heard = 0 if branch == "apart" else sound.mean((1, 2))[:, None, None, None, None]
        seen = x.mean((1, 2, 3, 4))[:, None, None]
        toward = 1.0 if branch == "cond" else 0.5
        return {
            VIDEO: hooks("velocity", (x - toward * x.tanh() - 0.1 * heard)),
            "sound": sound - toward * (sound + seen).sin(),
        }

    def guide(
        self, passes: Mapping[str, Latents], latents: Latents, moment: Moment
    ) -> dict[str, Tensor]:
        guided = classifier_free(passes, 2.0)
        return {k: v + 0.5 * (passes["cond"][k] - passes["apart"][k]) for k, v in guided.items()}

    def beside(self, noise: Tensor, condition: Condition) -> dict[str, Tensor]:
        return {"sound": draw_noise((len(noise), 5, 2), 77)}

    @property
    def points(self) -> dict[str, str]:
        return {"velocity": "b c f h w"}


CONDITION = Condition(shape=SHAPE)


@every_solver
def test_both_latents_move_by_the_same_solver_each_with_its_own_velocity(solver, noise):
    """The loop, written out for two latents."""
    model = WithSound(solver)
    schedule, move = model.schedule(), SOLVERS[solver]
    latents = {VIDEO: noise, **model.beside(noise, CONDITION)}
    history = dict.fromkeys(latents)
    for step in model.sample(CONDITION, noise=noise):
        i = step.index
        moment = Moment(i, step.sigma, step.timestep, "high")
        passes = {
            branch: model.velocity(latents, moment, branch, CONDITION, NO_HOOKS)
            for branch in ("cond", "uncond", "apart")
        }
        velocity = model.guide(passes, latents, moment)
        assert torch.equal(step.velocity, velocity[VIDEO])
        assert torch.equal(step.velocity_cond, passes["cond"][VIDEO])
        for name, x in latents.items():
            latents[name], history[name] = move(x, velocity[name], i, schedule, history[name])
        assert torch.equal(step.next, latents[VIDEO])
        assert torch.equal(step.state.beside["sound"], latents["sound"])
    assert not torch.equal(latents["sound"], model.beside(noise, CONDITION)["sound"])


@pytest.mark.parametrize("at", [1, 2, 5])
@every_solver
def test_saved_and_resumed_it_goes_on_bit_for_bit(solver, at, noise, tmp_path):
    whole = list(WithSound(solver).sample(CONDITION, noise=noise))
    before = whole[at - 1]
    save_file({"next": before.next, **before.state.tensors()}, tmp_path / "step.safetensors")
    saved = load_file(tmp_path / "step.safetensors")
    resumed = WithSound(solver).sample(
        CONDITION, noise=saved["next"], start=at, state=State.from_tensors(saved)
    )
    for step, again in zip(whole[at:], resumed, strict=True):
        assert torch.equal(step.next, again.next)
        assert torch.equal(step.state.beside["sound"], again.state.beside["sound"])


def test_it_cannot_be_resumed_without_its_state(noise):
    with pytest.raises(MinicosError, match="denoises sound along with the video: start at step 3"):
        sample(WithSound(), noise, CONDITION, start=3)
    with pytest.raises(MinicosError, match="sound"):
        sample(WithSound(), noise, CONDITION, start=3, state=State())


@pytest.mark.parametrize("in_place", [False, True])
@with_history
def test_an_edit_of_the_video_keeps_the_sound_and_its_history(solver, in_place, noise):
    """The solver's history of the video is dropped, since it would undo the edit."""
    steps = WithSound(solver).sample(CONDITION, noise=noise)
    for step in steps:
        if step.index == 3:
            sound, history = step.state.beside["sound"], step.state.history["sound"]
            if in_place:
                step.next += 1
            else:
                step.next = step.next + 1
            break
    following = next(steps)
    assert step.state.beside["sound"] is sound
    assert step.state.history == {"sound": history}
    fresh = next(
        sample(
            WithSound(solver),
            step.next,
            CONDITION,
            start=4,
            state=State({"sound": history}, {"sound": sound}),
        )
    )
    assert torch.equal(following.next, fresh.next)
    assert torch.equal(following.state.beside["sound"], fresh.state.beside["sound"])
    assert following.state.history["sound"].step == following.state.history[VIDEO].step == 4


def test_what_travels_beside_can_be_changed(noise):
    steps = WithSound().sample(CONDITION, noise=noise)
    first = next(steps)
    first.state = State(beside={"sound": torch.zeros(2, 5, 2)})
    moved = next(steps).next
    *_, plain = zip(range(2), WithSound().sample(CONDITION, noise=noise), strict=False)
    assert not torch.equal(moved, plain[1].next)


def test_rows_of_a_state_are_those_of_its_tensors(noise):
    step = next(WithSound().sample(CONDITION, noise=noise))
    turned = step.state.take(torch.tensor([1, 1, 0]))
    assert torch.equal(turned.beside["sound"], step.state.beside["sound"][[1, 1, 0]])
    assert torch.equal(turned.history[VIDEO].x0[-1], step.state.history[VIDEO].x0[-1][[1, 1, 0]])
    assert turned.history[VIDEO].step == 0


def test_a_third_pass_is_seen_by_hooks_and_names_itself(noise):
    seen = []
    hooks = Hooks().on("velocity", lambda x, site: seen.append((site.step, site.branch)))
    next(WithSound().sample(CONDITION, noise=noise, hooks=hooks))
    assert seen == [(0, "cond"), (0, "uncond"), (0, "apart")]


def test_a_hook_can_be_limited_to_a_pass_that_only_this_model_makes(noise):
    seen = []
    hooks = Hooks().on("velocity", lambda x, site: seen.append(x), branch="apart")
    step = next(WithSound().sample(CONDITION, noise=noise, hooks=hooks))
    assert list(step.velocities) == ["cond", "uncond", "apart"]
    assert torch.equal(step.velocities["apart"], *seen)
    assert torch.equal(step.x0_of("apart"), step.x - step.sigma_map * step.velocities["apart"])
    with pytest.raises(MinicosError, match="no together pass, only cond and uncond and apart"):
        step.x0_of("together")
