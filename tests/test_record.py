"""What analyses keep of a run, how runs resume, and the content of pictures."""

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicos import puzzles
from minicos.analysis.attention import Attention
from minicos.analysis.energy import FORMS, Energy
from minicos.analysis.routes import Routes, evidence
from minicos.analysis.steps import SETTLED, Steps, convergence, spread
from minicos.analysis.tools import figures
from minicos.analysis.tools.record import record, recorded
from minicos.dit import DiT
from minicos.hooks import NO_HOOKS, Hooks
from minicos.media import load_image, save_video
from minicos.open import load
from minicos.runs import Run
from tests.golden import rel_max

STEPS = 4


@pytest.fixture(scope="module")
def wan(toy):
    """Guided, so that there are two branches; UniPC, so that there is a memory to resume with."""
    return load(toy, device="cpu").with_preset("official", steps=STEPS)


@pytest.fixture(scope="module")
def condition(wan):
    draw = torch.Generator().manual_seed(0)
    return wan.condition(["solve the maze", "turn the l"], torch.rand(3, 32, 48, generator=draw))


@pytest.fixture
def run(tmp_path):
    return Run.open(tmp_path / "run", {})


@pytest.fixture(scope="module")
def truth(wan, condition):
    """The steps of a run without hooks."""
    return list(wan.sample(condition, seed=0))


# -- one pass, watched -----------------------------------------------------------------------------


def test_what_is_kept_of_a_run(wan, condition, run, truth):
    analyses = [Steps(wan, (0, 3)), Energy((3,))]
    final = record(wan, condition, run, analyses, wan.noise(condition, 0))
    assert torch.equal(final, truth[-1].next)  # watching changes nothing
    estimates, energies = recorded(run, "x0", STEPS), recorded(run, "energy", STEPS)
    assert len(estimates) == len(energies) == STEPS
    for step, estimate, energy in zip(truth, estimates, energies, strict=True):
        assert torch.equal(
            run.load_tensors(f"steps/{step.index:03}.safetensors")["next"], step.next
        )
        assert set(estimate) == {"guided", "cond", "uncond"}
        assert rel_max(estimate["guided"], step.x - step.sigma * step.velocity) < 1e-6
        assert rel_max(estimate["uncond"], step.x - step.sigma * step.velocity_uncond) < 1e-6
        for branch in ("cond", "uncond"):
            values = energy[f"{branch}.raw"]
            assert values.shape == (12, 4, 2, 3)  # layer f h w
            assert rel_max(values, norms(wan, condition, step, branch)) < 1e-6


def norms(wan, condition, step, branch) -> torch.Tensor:
    """Norms of the residual stream of the first sample, by a forward pass of our own: layer f h
    w.
    """
    out = []
    hooks = Hooks().on(
        "blocks.*", lambda x, site: out.append(x[0].square().sum(-1).sqrt().view(site.grid))
    )
    timestep = torch.full((2, 1), float(step.timestep))
    wan.experts["high"](step.x, timestep, condition.branch(branch), condition.y, hooks=hooks)
    return torch.stack(out)


def test_pictures_of_the_clean_estimate(wan, condition, run, truth):
    analysis = Steps(wan, (0, 3), columns=5)
    record(wan, condition, run, [analysis], wan.noise(condition, 0))
    names = analysis.draw(recorded(run, "x0", STEPS), run)
    sheets = ["x0_sheet.png", "x0_cond_sheet.png", "x0_uncond_sheet.png"]
    assert names == [*sheets, "convergence.png", "x0/step_00.mp4", "x0/step_03.mp4"]
    assert run.load_json("schedule.json")["sigmas"] == list(wan.schedule().sigmas)
    for index in (0, 3):
        video = wan.decode(truth[index].x0[:1])[0]
        strip = figures.pixels(load_image(run.path(f"x0/step_{index:02}.png")))
        assert np.array_equal(strip, np.concatenate([video[f] for f in (0, 3, 6, 9, 12)], axis=1))
        save_video(run.path("again.mp4"), video, fps=16)
        assert (
            run.path("again.mp4").read_bytes() == run.path(f"x0/step_{index:02}.mp4").read_bytes()
        )
    pictures = {name: run.path(name).read_bytes() for name in names}
    for path in run.folder.rglob("*.*[34g]"):  # mp4 and png
        path.unlink()
    analysis.draw(recorded(run, "x0", STEPS), run)
    assert {name: run.path(name).read_bytes() for name in names} == pictures


def test_convergence_ends_at_zero_and_starts_at_its_unit():
    one = torch.randn(
        5, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)
    )  # steps b c f h w
    moved = convergence(one)
    assert torch.equal(moved[0], torch.ones(3, dtype=torch.float64))  # shares of the first step's
    assert torch.equal(moved[-1], torch.zeros(3, dtype=torch.float64))


def test_convergence_of_several_seeds_is_measured_by_their_difference():
    many = torch.randn(4, 60, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = convergence(many)  # every step as far from the last as another seed
    torch.testing.assert_close(
        moved[:-1], torch.ones(3, 3, dtype=torch.float64), atol=0.1, rtol=0
    )  # measured 0.05
    many[:, :, :, 0] = many[
        :1, :1, :, 0
    ]  # a frame that is the same everywhere, such as an imposed one
    assert convergence(many)[:, 0].isnan().all()


def test_pictures_of_energy(wan, condition, run):
    analysis = Energy((0, 3))
    record(wan, condition, run, [analysis], wan.noise(condition, 0))
    saved = recorded(run, "energy", STEPS)
    first, *rest = analysis.draw(saved, run)
    forms = ("centred", "raw", "update", "components")
    sheets = [
        f"energy/{form}_{b}_step_{i}.png"
        for b in ("cond", "uncond")
        for i in ("00", "03")
        for form in forms
    ]
    curves = [
        f"energy_{what}_{b}.png"
        for b in ("cond", "uncond")
        for what in ("layers", "steps", "frames")
    ]
    assert [first, *rest] == [*sheets, *curves, "energy.safetensors"]
    assert all(run.path(name).exists() for name in [first, *rest])
    arrays = run.load_tensors("energy.safetensors")
    assert set(arrays) == {f"{b}.{form}" for b in ("cond", "uncond") for form in FORMS}
    for name, values in arrays.items():
        assert torch.equal(values, torch.stack([step[name] for step in saved]))


def test_the_step_axis_of_energy_stays_whole(run):
    """Guidance {"high": 1, "low": g}: the first steps have no uncond pass."""
    draw = torch.Generator().manual_seed(0)
    forms = ("raw", "centred", "update")
    saved = [
        {f"cond.{form}": torch.rand(2, 1, 2, 2, generator=draw) for form in forms} for _ in range(3)
    ]
    saved[2] |= {f"uncond.{form}": torch.rand(2, 1, 2, 2, generator=draw) for form in forms}
    Energy((0,)).draw(saved, run)
    arrays = run.load_tensors("energy.safetensors")
    assert arrays["cond.raw"].shape == arrays["uncond.raw"].shape == (3, 2, 1, 2, 2)
    assert arrays["uncond.raw"][:2].isnan().all()
    assert torch.equal(arrays["uncond.raw"][2], saved[2]["uncond.raw"])


def test_energy_of_experts_with_and_without_guidance(wan, condition, run):
    """If the low-noise expert is not guided, nothing of an earlier pass replaces the pass
    that is not made.
    """
    one = wan.experts["high"]
    two = replace(wan, experts={"high": one, "low": one}).with_preset(
        guidance={"high": 3.0, "low": 1.0}
    )
    record(two, condition, run, [Energy(())], two.noise(condition, 0))
    branches = [{name.split(".")[0] for name in kept} for kept in recorded(run, "energy", STEPS)]
    experts = [two.expert_name(t) for t in two.schedule().timesteps]
    assert branches == [{"cond", "uncond"} if name == "high" else {"cond"} for name in experts]
    assert set(experts) == {"high", "low"}


# -- resuming --------------------------------------------------------------------------------------


class Interrupt:
    """An analysis that stops the run at a step, before the step is saved."""

    name = "interrupt"

    def __init__(self, at: int):
        self.at = at

    def hooks(self):
        return NO_HOOKS

    def keep(self, step, run):
        if step.index == self.at:
            raise KeyboardInterrupt
        return {}


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpmpp"])
def test_an_interrupted_run_continues_bit_for_bit(solver, wan, condition, run, monkeypatch):
    wan, noise = wan.with_preset(solver=solver), wan.noise(condition, 0)
    truth = list(wan.sample(condition, seed=0))
    for at in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            record(wan, condition, run, [Energy(()), Interrupt(at)], noise)
        assert not run.has(f"steps/{at:03}.safetensors")
    final = record(wan, condition, run, [Energy(())], noise)
    assert torch.equal(final, truth[-1].next)
    for step, energy in zip(truth, recorded(run, "energy", STEPS), strict=True):
        assert torch.equal(
            run.load_tensors(f"steps/{step.index:03}.safetensors")["next"], step.next
        )
        assert {name.split(".")[0] for name in energy} == {"cond", "uncond"}

    monkeypatch.setattr(DiT, "forward", None)  # everything exists: no pass is needed
    assert torch.equal(record(wan, condition, run, [Energy(())], noise), final)


def test_a_step_that_was_lost_is_made_again(wan, condition, run, truth):
    noise = wan.noise(condition, 0)
    record(wan, condition, run, [], noise)
    run.path("steps/001.safetensors").unlink()
    assert torch.equal(record(wan, condition, run, [], noise), truth[-1].next)
    assert torch.equal(run.load_tensors("steps/001.safetensors")["next"], truth[1].next)


def test_an_analysis_keeps_to_its_own_name(wan, condition, run):
    energy = Energy(())
    record(wan, condition, run, [energy, Steps(wan, ())], wan.noise(condition, 0))
    assert all(set(kept) == {"guided", "cond", "uncond"} for kept in recorded(run, "x0", STEPS))
    assert recorded(run, "x", STEPS) == [{}] * STEPS


# -- routes ----------------------------------------------------------------------------------------


def several_routes() -> puzzles.Puzzle:
    mazes = (puzzles.make("maze", seed, size=4, split="test") for seed in range(100))
    return next(maze for maze in mazes if len(maze.candidates) >= 2)


def test_evidence_is_for_the_route_that_is_drawn():
    maze = several_routes()
    drawn = [maze.draw(i)[-1] for i in range(len(maze.candidates))]
    trail = np.stack([maze.read_trail(frame).clip(0, 1).mean(1) for frame in drawn])
    found = evidence(maze, trail)  # route, drawn route
    assert found.shape == (len(drawn), len(drawn))
    assert (np.diag(found) > 0.9).all()
    assert all(found[:, i].argmax() == i for i in range(len(drawn)))
    nothing = maze.read_trail(maze.first_frame()).clip(0, 1).mean(1)
    assert evidence(maze, nothing[None]).max() < 0.05
    half = evidence(maze, trail[:2].mean(0)[None])[:2, 0]
    assert np.allclose(half, 0.5, atol=0.1)  # a blend of two routes is evidence for both


def test_routes_are_read_from_the_last_frame(wan, run, monkeypatch):
    maze = several_routes()
    analysis = Routes(wan, maze)
    monkeypatch.setattr(type(wan), "decode", lambda self, latent: maze.draw(1)[None])
    condition = wan.condition(
        "solve the maze", torch.from_numpy(maze.first_frame()).permute(2, 0, 1) / 255
    )
    step = next(islice(wan.sample(condition), 1))
    kept = analysis.keep(step, run)
    assert evidence(maze, kept["trail"][None].numpy())[:, 0].argmax() == 1
    assert analysis.draw([kept] * 3, run) == ["routes.png"]
    assert load_image(run.path("routes.png")).shape[0] == 3


# -- choices of what to show -----------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60))
def test_spread_is_dense_at_the_start(count, steps):
    chosen = spread(count, steps)
    assert chosen[0] == 0
    assert count == 1 or chosen[-1] == steps - 1
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) <= max(count, 2)
    gaps = np.diff(chosen)
    assert all(later >= earlier - 1 for earlier, later in pairwise(gaps))


@given(st.integers(1, 100), st.integers(1, 30))
def test_evenly(count, most):
    chosen = figures.evenly(count, most)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert most == 1 or chosen[-1] == count - 1
    assert len(chosen) == min(count, most)
    assert np.ptp(np.diff(chosen)) <= 1 if len(chosen) > 2 else True


@settings(max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=30))
def test_heat_is_a_colour_for_every_number(values):
    colours = figures.heat(np.array(values))
    assert colours.shape == (len(values), 4)
    assert np.isfinite(colours).all()
    order = np.argsort(values, kind="stable")
    brightness = colours[order, :3].sum(1)
    assert (np.diff(brightness) >= -1e-6).all()


# -- pictures --------------------------------------------------------------------------------------

COLOURS = np.array(
    [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 0, 255)]],
    np.uint8,
)


def test_a_sheet_shows_every_picture_in_its_place(tmp_path):
    path = tmp_path / "sheet.png"
    images = np.broadcast_to(COLOURS[:, :, None, None], (2, 3, 20, 30, 3))
    figures.sheet(path, images, rows=["up", "down"], columns=["a", "b", "c"], title="t")
    shown = load_image(path).permute(1, 2, 0).mul(255).round()
    centres = np.array(
        [
            [(shown == torch.tensor(c)).all(-1).nonzero().float().mean(0).tolist() for c in line]
            for line in COLOURS
        ]
    )
    rows, columns = centres[..., 0], centres[..., 1]
    assert np.ptp(rows, axis=1).max() < 2
    assert np.ptp(columns, axis=0).max() < 2
    assert (rows[1] - rows[0] > 20).all()
    assert (np.diff(columns, axis=1) > 30).all()
    heights, widths = (rows[1] - rows[0]).mean(), np.diff(columns, axis=1).mean()
    assert abs(heights / widths - 20 / 30) < 0.05  # pictures keep their shape


def test_what_is_not_finite_is_white_and_colours_out_of_range_are_bounded(tmp_path):
    unknown = figures.heat(np.array([[np.nan, 1.0], [np.nan, 0.0]]))
    bright = np.full((2, 2, 3), (1.5, -0.5, 0.0))
    figures.sheet(tmp_path / "a.png", [[unknown, bright]], rows=["r"], columns="ab", title="t")
    shown = load_image(tmp_path / "a.png").permute(1, 2, 0).mul(255).round()
    red = (shown == torch.tensor([255, 0, 0])).all(-1)
    cell = int(red.sum())
    lowest = (shown - 255 * torch.tensor(figures.heat(np.zeros(2))[0, :3])).abs().amax(-1) < 1
    assert cell > 10_000  # about 115 x 115
    assert 0.22 * cell < lowest.sum() < 0.28 * cell  # a quarter of the other; two are white


@pytest.mark.parametrize("shape", [(40, 21, 30, 52), (12, 4, 4, 4), (30, 13, 23, 40), (2, 1, 1, 1)])
def test_energy_of_every_model_fits_a_screen(shape, run):
    saved = {f"cond.{form}": torch.rand(shape) for form in ("raw", "centred", "update")}
    Energy((0,), sheets=("raw",)).draw([saved], run)
    _, height, width = load_image(run.path("energy/raw_cond_step_00.png")).shape
    assert 100 < height < 1080
    assert 150 < width < 1500


@pytest.mark.parametrize("size", [(64, 64), (120, 208), (208, 120)])
def test_the_sheet_of_estimates_fits_a_screen(size, tmp_path):
    images = np.zeros((8, 7, *size, 3), np.uint8)
    figures.sheet(tmp_path / "a.png", images, rows=["step"] * 8, columns=["frame"] * 7, title="t")
    _, height, width = load_image(tmp_path / "a.png").shape
    assert 400 < height < 1080
    assert 400 < width < 1500


def test_the_numbers_of_a_run(wan, truth):
    """Each follows from what was kept, and a run that is settled at once says step 0."""
    x0 = [step.x0 for step in truth]
    (settled,) = Steps(wan, (0,)).numbers([{"guided": x} for x in x0])
    moved = convergence(torch.stack(x0)).numpy().T  # frames steps
    far = [frame >= SETTLED for frame in moved if np.isfinite(frame).all()]
    expected = [max((i + 1 for i in range(STEPS) if frame[i]), default=0) for frame in far]
    assert settled.value == pytest.approx(np.mean(expected))
    same = [{"guided": x0[-1] + (10 if i == 0 else 0)} for i in range(STEPS)]
    assert Steps(wan, (0,)).numbers(same)[0].value == 1
    raw = torch.ones(STEPS, 3, 4, 2, 2)
    raw[:, 1] = 2
    raw[:, :, 0] *= 3
    layer, share = Energy((0,)).numbers([{"cond.raw": step} for step in raw])
    assert layer.value == 1 and share.value == pytest.approx(3 / 6)
    assert Energy((0,)).numbers([{"uncond.raw": raw[0]}]) == []


def test_shares_of_attention():
    between = torch.full((4, 4), 0.1)
    between[1:, 0] = 0.7
    saved = [{"between.2": between, "text.2": torch.tensor([0.5, 0.2, 0.2, 0.1])}]
    first, padded = Attention((2,), (0,), words=2).numbers(saved)
    assert first.value == pytest.approx(0.7) and padded.value == pytest.approx(0.3)
    assert "0.25" in first.note and "0.5" in padded.note
