"""The denoising loop against the official procedures, and what its body may rely on: resume,
edits, branches, experts.
"""

import copy
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from torch import Tensor

from minicos.condition import WanCondition
from minicos.config import VAEConfig
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.record import Record
from minicos.sample import State, Step, sample
from minicos.schedule import SOLVERS, make
from minicos.vae import VAE
from tests import golden
from tests.golden import rel_max

LOOPS = golden.read("loops")
CONFIG = golden.info("loops")["config"]


# -- the official loops ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def i2v_pair(pair, golden_dit):
    """The experts of the golden loop at a boundary: the low-noise one is the high-noise one with
    its blocks swapped.
    """
    high = golden_dit("dit_i2v")
    low = copy.deepcopy(high)
    low.blocks = low.blocks[::-1]
    return lambda **preset: pair(high, low, **preset)


@pytest.fixture(scope="module")
def i2v(padded) -> WanCondition:
    text, null = (padded(LOOPS[f"i2v.context{end}"]) for end in ("", "_null"))
    return WanCondition(text=text, text_null=null, shape=(1, 16, 3, 4, 6), y=LOOPS["i2v.y"][None])


@pytest.fixture(scope="module")
def golden_steps(i2v_pair, pair, golden_dit, i2v, padded):
    """case -> the steps of our loop."""

    def run(case: str) -> list[Step]:
        config = CONFIG[case]
        low, high = config.get("guidance_low_high", [config.get("guidance")] * 2)
        preset = {
            "solver": "euler" if case == "i2v_euler" else "unipc",
            "steps": config["steps"],
            "shift": config["shift"],
            "guidance": {"high": high, "low": low},
            "boundary": config.get("boundary"),
        }
        model, condition = i2v_pair(**preset), i2v
        if case == "ti2v":
            model = pair(golden_dit("dit_ti2v"), golden_dit("dit_ti2v"), **preset)
            text, null = (padded(LOOPS[f"ti2v.context{end}"]) for end in ("", "_null"))
            shape, first = (1, 48, 3, 4, 6), LOOPS["ti2v.z"][None]
            condition = WanCondition(text=text, text_null=null, shape=shape, first=first)
        noise = LOOPS[f"{case.removesuffix('_euler')}.noise"][None]
        return list(sample(model, noise, condition))

    return run


@pytest.mark.parametrize("case", ["i2v", "i2v_euler", "ti2v"])
def test_every_latent_of_the_official_loops(case, golden_steps):
    steps, expected = golden_steps(case), LOOPS[f"{case}.latents"]
    assert [s.timestep for s in steps] == LOOPS[f"{case}.timesteps"].tolist()
    assert "".join(s.expert[0].upper() for s in steps) == CONFIG[case].get("experts_used", "HHHHHH")
    assert [s.index for s in steps] == list(range(len(expected)))
    for step in steps:
        assert rel_max(step.next[0], expected[step.index]) < 8e-6  # measured 2.3e-6


def test_the_video_of_the_official_loop(golden_steps):
    vae = VAE(golden.config(VAEConfig, "vae21")).requires_grad_(False)
    vae.load_state_dict(golden.read("vae21.weights"))
    video = vae.decode(golden_steps("i2v")[-1].next)
    assert (video[0, :, ::4] - LOOPS["i2v.video_every4"]).abs().max() < 1e-5  # measured 3.1e-6


def test_an_imposed_frame_is_never_noisy(golden_steps):
    first = LOOPS["ti2v.z"][None]
    for step in golden_steps("ti2v"):
        for x in (step.x, step.next, step.x0, step.x0_cond):
            assert torch.equal(x[:, :, :1], first)
        assert step.sigma_map.flatten().tolist() == [0, step.sigma, step.sigma]


# -- a step ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(pair, small_dit):
    return pair(small_dit(0), small_dit(1))


@pytest.fixture(scope="module")
def condition() -> WanCondition:
    draw = torch.Generator().manual_seed(1)
    text, null = (torch.randn(2, 5, 8, generator=draw) for _ in range(2))
    return WanCondition(text=text, text_null=null, shape=(2, 4, 3, 4, 4))


@pytest.fixture(scope="module")
def noise(condition) -> Tensor:
    return torch.randn(condition.shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def loop(model, condition, noise):
    """A loop of six steps with both experts. x, start and state resume it."""

    def make_loop(solver="euler", x=noise, given=condition, guidance=(3.0, 2.0), **options):
        strength = dict(zip(("high", "low"), guidance, strict=True))
        wan = model.with_preset(solver=solver, steps=6, guidance=strength)
        return sample(wan, x, given, **options)

    return make_loop


solvers = pytest.mark.parametrize("solver", SOLVERS)


@solvers
@pytest.mark.parametrize("imposed", [False, True])
def test_x_lies_between_the_clean_estimate_and_the_noise(solver, imposed, loop, condition, noise):
    """x = (1 - sigma) x0 + sigma noise and velocity = noise - x0, whatever the guidance, per
    frame.
    """
    given = replace(condition, first=noise[:, :, :1]) if imposed else condition
    for step in loop(solver, given=given):
        sigma = step.sigma_map
        assert rel_max((1 - sigma) * step.x0 + sigma * step.noise, step.x) < 4e-7  # measured 8.0e-8
        assert rel_max(step.noise - step.x0, step.velocity) < 4e-7  # measured 8.8e-8
        assert torch.equal(step.x0_cond, step.x - sigma * step.velocity_cond)


@solvers
def test_the_last_step_lands_on_its_clean_estimate(solver, loop):
    *_, last = loop(solver)
    assert last.sigma_next == 0
    assert rel_max(last.next, last.x0) < 4e-7  # measured 0


@solvers
def test_steps_are_a_chain_along_the_schedule(solver, loop, noise):
    schedule, steps = make(solver, 6, 5.0), list(loop(solver))
    assert torch.equal(steps[0].x, noise)
    assert [s.sigma for s in steps] == list(schedule.sigmas[:-1])
    assert [s.sigma_next for s in steps] == list(schedule.sigmas[1:])
    assert [s.timestep for s in steps] == list(schedule.timesteps)
    for before, after in pairwise(steps):
        assert after.x is before.next
    assert [s.expert for s in steps] == ["high" if t >= 900 else "low" for t in schedule.timesteps]
    assert {s.expert for s in steps} == {"high", "low"}


def test_guidance_moves_from_uncond_through_cond_as_each_expert_is_told(loop):
    for step in loop(guidance=(3.0, 2.0)):
        g = {"high": 3.0, "low": 2.0}[step.expert]
        expected = g * step.velocity_cond + (1 - g) * step.velocity_uncond
        assert rel_max(step.velocity, expected) < 3e-7  # measured 7.1e-8
        assert not torch.equal(step.velocity_cond, step.velocity_uncond)


# -- the sites that hooks receive ------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [(1, 1), (1, 2.0), (3.0, 1.0), (3.0, 2.0)])
def test_guidance_1_makes_no_uncond_pass(guidance, loop):
    record = Record(lambda x: x)
    steps = list(loop(guidance=guidance, hooks=Hooks().on("velocity", record)))
    strength = dict(zip(("high", "low"), guidance, strict=True))
    branches = {name: ["cond"] if g == 1 else ["cond", "uncond"] for name, g in strength.items()}
    passes = [(s.index, s.expert, branch) for s in steps for branch in branches[s.expert]]
    assert [(site.step, site.expert, site.branch) for site, _ in record.entries] == passes
    seen = {(site.step, site.branch): velocity for site, velocity in record.entries}
    for step in steps:
        assert torch.equal(step.velocity_cond, seen[step.index, "cond"])
        if strength[step.expert] == 1:
            assert step.velocity_uncond is None
            with pytest.raises(MinicosError, match=r"no uncond pass, only cond: .* guidance is 1"):
                _ = step.x0_uncond
            assert step.velocity is step.velocity_cond
        else:
            assert torch.equal(step.velocity_uncond, seen[step.index, "uncond"])


def test_no_negative_prompt_is_needed_without_guidance(loop, condition):
    alone = replace(condition, text_null=None)
    assert len(list(loop(given=alone, guidance=(1, 1)))) == 6
    with pytest.raises(MinicosError, match="negative prompt"):
        loop(given=alone, guidance=(1, 2.0))  # at the call, before any step runs


def test_sites_of_a_loop(loop, model, condition):
    """Step, sigma, grid, and the expert and the prompt that really ran."""
    record = Record(lambda x: x)
    steps = list(loop(hooks=Hooks().on("text", record).on("velocity", record)))
    for site, tensor in record.entries:
        step = steps[site.step]
        assert (site.sigma, site.expert, site.grid) == (step.sigma, step.expert, (3, 2, 2))
        if site.name == "text":
            assert torch.equal(
                tensor, model.experts[site.expert].text_embedding(condition.branch(site.branch))
            )


@solvers
def test_looking_changes_no_bit_of_a_loop(solver, loop):
    hooks = (
        Hooks().on("blocks.*", lambda x, site: None).on("blocks.*.self_attn.q", lambda x, site: x)
    )
    for plain, watched in zip(loop(solver), loop(solver, hooks=hooks), strict=True):
        assert torch.equal(plain.next, watched.next)


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 5])
@solvers
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(solver, at, loop):
    whole, record = list(loop(solver)), Record(lambda x: None)
    hooks = Hooks().on("velocity", record, branch="cond")
    resumed = list(loop(solver, x=whole[at].x, start=at, state=whole[at - 1].state, hooks=hooks))
    assert (
        [s.index for s in resumed]
        == [site.step for site, _ in record.entries]
        == list(range(at, 6))
    )
    for again, step in zip(resumed, whole[at:], strict=True):
        assert torch.equal(again.next, step.next)
        assert again.timestep == step.timestep


@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
def test_a_multistep_solver_needs_its_history_to_resume(solver, loop):
    whole = list(loop(solver))
    without = next(loop(solver, x=whole[3].x, start=3))
    assert rel_max(without.next, whole[3].next) > 1e-4


@solvers
def test_a_run_can_start_at_its_end_and_not_beyond(solver, loop, noise):
    assert list(loop(solver, start=6)) == []
    for start in (-1, 7):
        with pytest.raises(MinicosError, match=f"a run of 6 steps cannot start at step {start}"):
            loop(solver, start=start)


@pytest.mark.parametrize("how", ["in place", "another tensor", "an equal tensor"])
def test_an_edit_drops_the_history(how, loop, noise):
    """UniPC's history belongs to the latent before the edit. An equal tensor also restarts
    it: controls need that.
    """
    steps = loop("unipc")
    next(steps)
    step = next(steps)
    assert step.state.history
    if how == "in place":
        step.next += noise
    else:
        step.next = step.next + (noise if how == "another tensor" else 0)
    following = next(steps)
    assert step.state == State()
    assert len(following.state.history["video"].x0) == 1  # a first step again
    assert torch.equal(following.next, next(loop("unipc", x=step.next, start=2)).next)


# -- edits -----------------------------------------------------------------------------------------


@solvers
def test_an_edited_latent_starts_afresh(solver, loop, noise):
    """From there on the loop equals one started at the edit, without a history."""
    edit = noise.flip(1)
    edited = []
    for step in loop(solver):
        if step.index == 2:
            step.next = edit
        edited.append(step)
    for step, fresh in zip(edited[3:], loop(solver, x=edit, start=3), strict=True):
        assert torch.equal(step.next, fresh.next)
    assert edited[3].x is edit


@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
def test_an_edit_is_not_pulled_back(solver, i2v_pair, i2v):
    """UniPC corrects each step afterwards; with a history kept, it would correct
    an edit away. DPM++ would take the difference of the two clean estimates for a slope, and go on
    along it."""
    model, start = i2v_pair(solver=solver), LOOPS["i2v.noise"][None]
    clean = list(islice(sample(model, start, i2v), 8))
    sigma = clean[6].sigma_next
    edit = (1 - sigma) * clean[6].x0 + sigma * start.flip(2)  # other noise
    edit_size = (edit - clean[6].next).norm()

    for step in islice(sample(model, start, i2v), 8):
        if step.index == 6:
            step.next = edit
    assert (step.next - edit).norm() / edit_size < 0.1  # measured 0.02: one small step further
    assert (step.next - clean[7].next).norm() / edit_size > 0.9  # measured 1.00

    # the run without an edit
    kept = next(sample(model, edit, i2v, start=7, state=clean[6].state)).next
    if solver == "unipc":
        assert (kept - edit).norm() / edit_size > 0.9  # measured 0.96
        assert (kept - clean[7].next).norm() / edit_size < 0.1  # measured 0.04
    else:
        assert (kept - step.next).norm() / (
            step.next - edit
        ).norm() > 0.3  # measured 0.50: half a step astray


@solvers
def test_an_edited_run_can_be_resumed_from_its_steps(solver, loop, noise):
    """The history of an edited step is also dropped from the step."""
    edited = []
    for step in loop(solver):
        if step.index == 2:
            step.next = noise.flip(1)
        edited.append(step)
    assert edited[2].state == State()
    for at in (3, 4):
        *_, last = loop(solver, x=edited[at].x, start=at, state=edited[at - 1].state)
        assert torch.equal(last.next, edited[-1].next)


# -- a generator that leaves global settings alone -------------------------------------------------


def test_nothing_runs_before_the_first_step_and_no_step_runs_ahead(loop):
    record = Record(lambda x: None)
    steps = loop(hooks=Hooks().on("velocity", record), guidance=(1, 1))
    for runs in (0, 1, 2):
        assert len(record.entries) == runs
        next(steps)


@solvers
def test_interleaved_loops_do_not_disturb_each_other(solver, loop, noise):
    alone = list(loop(solver)), list(loop(solver, x=noise.flip(0)))
    together = list(zip(loop(solver), loop(solver, x=noise.flip(0)), strict=True))
    for i in range(2):
        for step, pair in zip(alone[i], together, strict=True):
            assert torch.equal(step.next, pair[i].next)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_body_has_gradients_as_the_caller_has_them(enabled, loop):
    with torch.set_grad_enabled(enabled):
        steps = loop(), loop()
        for pair in zip(*steps, strict=True):
            assert torch.is_grad_enabled() == enabled
            assert not pair[0].velocity.requires_grad
            if pair[0].index == 3:
                break
        for each in steps:
            each.close()
            assert torch.is_grad_enabled() == enabled
            with pytest.raises(StopIteration):
                next(each)


def test_the_network_runs_without_gradients_even_where_it_could_have_them(
    pair, small_dit, condition, noise
):
    network, seen = small_dit().requires_grad_(True), []
    hooks = Hooks().on("blocks.0", lambda x, site: seen.append(x.requires_grad))
    steps = sample(pair(network, network, steps=2), noise, condition, hooks=hooks)
    assert not any(step.next.requires_grad for step in steps)
    assert seen == [False, False]
    assert network(
        noise, torch.tensor([500.0, 500.0]), condition.text
    ).requires_grad  # outside the loop it has them


def test_closing_in_the_middle_leaves_nothing(loop):
    steps, before = loop("unipc"), list(loop("unipc"))
    next(steps)
    next(steps)
    steps.close()
    for step, again in zip(before, loop("unipc"), strict=True):
        assert torch.equal(step.next, again.next)


def test_the_noise_is_left_as_it_was(loop, noise):
    kept = noise.clone()
    list(loop("unipc"))
    assert torch.equal(noise, kept)


def test_hooks_are_optional(loop):
    for step, same in zip(loop(), loop(hooks=NO_HOOKS), strict=True):
        assert torch.equal(step.next, same.next)
