"""Noise at steps and in frames: what is touched, what is injected, what it costs, and what
resuming changes (nothing).
"""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minicos import puzzles
from minicos.analysis import result, sweep
from minicos.analysis.noise import edit, study
from minicos.analysis.noise import measure as noise_measure
from minicos.analysis.noise.edit import Noise, follow
from minicos.analysis.noise.measure import Clean, edits, measure, measure_all
from minicos.analysis.options import NoiseOptions
from minicos.analysis.tools import cases, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.record import record
from minicos.cli import main
from minicos.errors import MinicosError
from minicos.open import load
from minicos.runs import Run
from minicos.wan import Wan

STEPS = 5
EDITED = tuple(mode for mode in edit.MODES if mode != "null")


@pytest.fixture(scope="module")
def wan(toy):
    """Guided, so that a step costs two passes."""
    return load(toy, device="cpu").with_preset("cos", steps=STEPS, frames=9)


@pytest.fixture(scope="module")
def subjects():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [Case("solve the maze", image, seed=5), Case("turn the l", image, seed=9)]


@pytest.fixture(scope="module")
def clean(wan, subjects, tmp_path_factory):
    """Condition, starting noise and the saved run of a model."""

    def make(model=wan):
        condition = cases.condition(model, subjects)
        start = cases.noise(model, condition, subjects)
        run = Run.open(tmp_path_factory.mktemp("clean"), {})
        record(model, condition, run, [Clean(3)], start)
        return condition, start, run

    return make


def latent(seed: int, b: int = 2, f: int = 4) -> torch.Tensor:
    return torch.randn(b, 3, f, 4, 6, generator=torch.Generator().manual_seed(seed))


# -- the intervention ------------------------------------------------------------------------------


@given(
    st.sampled_from(EDITED),
    st.sets(st.integers(0, 3), min_size=1),
    st.sets(st.integers(0, 9), min_size=1),
    st.booleans(),
    st.integers(0, 9),
)
def test_only_what_was_named_is_touched(mode, frames, steps, imposed, index):
    x, x0, sigma = latent(0), latent(1), torch.full((1, 1, 4, 1, 1), 0.6)
    if imposed:
        sigma[:, :, 0] = 0
    before = x.clone()
    out = Noise(mode, tuple(steps), tuple(frames))(x, index, sigma, x0)
    assert torch.equal(x, before)
    if index not in steps:
        assert out is x
        return
    for f in range(4):
        same = torch.equal(out[:, :, f], x[:, :, f])
        assert same == (f not in frames or (imposed and f == 0))


def test_what_each_mode_leaves():
    x, x0, sigma = latent(0), latent(1) + 3, torch.full((1, 1, 1, 1, 1), 0.25)
    out = {mode: Noise(mode, (2,), seed=7, dose=2.0)(x, 2, sigma, x0) for mode in EDITED}
    eps = out["replace"]
    assert torch.allclose(out["renoise"], 0.75 * x0 + 0.25 * eps)
    assert torch.allclose(out["erase"], 0.75 * x0.mean((2, 3, 4), keepdim=True) + 0.25 * eps)
    each = (out["add"] - x).square().mean((1, 3, 4))
    assert torch.allclose(each, torch.full_like(each, 2.0 / 4))  # a dose of two frames over four
    assert (
        torch.corrcoef(torch.stack([(out["add"] - x)[0, :, 0].flatten(), eps[0, :, 0].flatten()]))[
            0, 1
        ]
        > 0.999
    )


def test_noise_depends_on_the_sample_and_the_step_alone():
    edit, sigma = Noise("replace", (1, 2), seed=(3, 8)), torch.ones(1, 1, 1, 1, 1)
    both, second = edit(latent(0), 1, sigma), replace(edit, seed=(8,))(latent(4, b=1), 1, sigma)
    assert torch.equal(both[1], second[0])
    assert not torch.equal(both[1], edit(latent(0), 2, sigma)[1])
    # not the noise that a run starts from, whatever its seed and step
    starts = [
        torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(s)) for s in range(99)
    ]
    drawn = [
        Noise("replace", (i,), seed=(s,))(latent(0, b=1), i, sigma)[0]
        for s in range(9)
        for i in (0, 3)
    ]
    assert not any(torch.equal(eps, start) for eps in drawn for start in starts)


def test_mistakes_are_named():
    with pytest.raises(MinicosError, match="no noise mode 'blur'"):
        Noise("blur", (0,))
    with pytest.raises(MinicosError, match="no latent frame 4"):
        Noise("replace", (0,), (4,))(latent(0), 0, torch.ones(1, 1, 1, 1, 1))
    with pytest.raises(MinicosError, match="steps 0 to 9"):
        edits(NoiseOptions(at=(3, 10)), 10, [False] * 4)
    with pytest.raises(MinicosError, match="latent frame 0 is imposed"):
        edits(NoiseOptions(frames=(0,)), 10, [True, False])


@given(st.integers(1, 40), st.integers(1, 21), st.booleans())
def test_matched_cells(steps, frames, imposed):
    """Step noise and frame noise change equally many cells, if there are enough steps."""
    planned = edits(NoiseOptions(), steps, [imposed, *[False] * frames])
    free = frames + (not imposed)
    assert sum(name.startswith("frame") for name in planned) == free
    assert all(
        len(e.steps) == min(free, steps) for name, e in planned.items() if name.startswith("frame")
    )
    assert not any(imposed and e.frames == (0,) for e in planned.values())


def test_a_loop_of_ones_own_does_the_same(wan, clean):
    condition, start, _ = clean()
    edit = Noise("renoise", (0, 2, 3), (1,), seed=4)
    theirs = [step.x for step, _ in follow(wan, condition, start, edit)]
    ours = []
    for step in wan.sample(condition, noise=edit(start, 0, condition.per_frame(1.0))):
        ours.append(step.x)
        step.next = edit.after(step)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- one edit, measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [(0,), (3,), tuple(range(STEPS))])
def test_an_edit_that_changes_nothing_measures_nothing(wan, clean, at):
    condition, start, run = clean()
    found = measure(wan, condition, start, run, Noise("null", at), layer=3)
    later = slice(at[0], None)
    for key in ("squared", "cka", "hidden"):
        assert (found[key][:, later] == 0).all()
        assert found[key][:, : at[0]].isnan().all()
    assert found["injected"].sum() == 0
    assert found["passes"] == 2 * (STEPS - at[0])


def test_replace_at_the_first_step_is_another_seed(wan, clean):
    condition, start, run = clean()
    edit = Noise("replace", (0,), seed=11)
    fresh = edit(start, 0, torch.ones(1, 1, 1, 1, 1))
    (*_, last) = wan.sample(condition, noise=fresh)
    assert torch.equal(measure(wan, condition, start, run, edit)["final"], last.next)


@pytest.mark.parametrize(("steps", "frames"), [((1,), None), ((0, 2, 4), (1,)), ((1, 2), (0, 2))])
def test_the_dose_is_what_was_asked(wan, clean, steps, frames):
    condition, start, run = clean()
    found = measure(wan, condition, start, run, Noise("add", steps, frames, dose=2.5))
    assert torch.allclose(
        found["injected"].sum(1), torch.tensor(2.5, dtype=torch.float64), rtol=1e-5
    )  # measured 3e-7
    assert all(
        (found["injected"][:, f] > 0).all() == (frames is None or f in frames) for f in range(3)
    )


def test_noise_is_seen_from_its_step_on_and_grows_with_the_dose(wan, clean):
    condition, start, run = clean()
    small, large = (
        measure(wan, condition, start, run, Noise("add", (2,), dose=d), layer=3)
        for d in (0.01, 1.0)
    )
    for key in ("squared", "cka", "hidden"):
        assert (small[key][:, 2:] > 0).all()
        assert (large[key][:, 2] > small[key][:, 2]).all()


def test_a_multistep_solver_is_held_against_the_same_restarts(wan, clean):
    model = wan.with_preset(solver="unipc")
    condition, start, run = clean(model)
    restart = measure(model, condition, start, run, Noise("null", (3,)))
    tiny = measure(model, condition, start, run, Noise("add", (3,), dose=1e-8))
    assert (
        restart["squared"][:, -1].sum() > 100 * tiny["squared"][:, -1].sum() > 0
    )  # the control lost its history as well
    assert tiny["passes"] == 2 * restart["passes"]


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("mode", ["replace", "renoise", "null"])
def test_a_resumed_run_is_the_full_one(wan, clean, mode, solver):
    """Every number that is measured, and the video, bit for bit; the passes before the edit are
    spared.
    """
    model = wan.with_preset(solver=solver)
    condition, noise, run = clean(model)
    resumed, full = (
        measure(model, condition, noise, run, Noise(mode, (2, 3)), layer=3, start=s)
        for s in (None, 0)
    )
    spared = full.pop("passes") - resumed.pop("passes")
    assert spared == 2 * 2 * (
        2 if (solver, mode) in {("unipc", "replace"), ("unipc", "renoise")} else 1
    )
    assert all(
        torch.allclose(full[key], value, rtol=0, atol=0, equal_nan=True)
        for key, value in resumed.items()
    )


def test_massive_channels_are_found():
    h = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    h[:, 5] += 300
    assert stats.massive(h).nonzero().flatten().tolist() == [5]


# -- studies ---------------------------------------------------------------------------------------


def test_a_sweep_over_all_steps_costs_little_more_than_half(wan, subjects, tmp_path, monkeypatch):
    """N + N (N + 1) / 2 passes, counted where the network is called, clean run included: at 50
    steps 0.53 of 50 full runs.
    """
    count = [0]
    real = Wan.velocity

    def counted(*args):
        count[0] += 1
        return real(*args)

    monkeypatch.setattr(Wan, "velocity", counted)
    quick = wan.with_preset(steps=12, frames=5, guidance={"high": 1.0, "low": 1.0})
    results = measure_all(
        quick, subjects[:1], Run.open(tmp_path, {}), NoiseOptions(frames=(), others=1)
    )
    spent, full = results.passes()
    assert spent == count[0] - 12 - 6  # without the yardstick and the null control
    assert full == 12 * 12

    def sweep(n: int) -> float:
        return n + n * (n + 1) / 2

    assert spent == sweep(12)
    assert sweep(50) <= 0.55 * 50 * 50


def test_killed_and_rerun_gives_the_same(wan, subjects, tmp_path, monkeypatch):
    plan = NoiseOptions(at=(1, 3), others=1, layer=2)
    whole = measure_all(wan, subjects, Run.open(tmp_path / "whole", {}), plan, most=1)
    real, calls = noise_measure.measure, []

    def dying(*args):
        calls.append(None)
        if len(calls) in (3, 9):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(noise_measure, "measure", dying)
    run = Run.open(tmp_path / "torn", {})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure_all(wan, subjects, run, plan, most=1)
    torn = measure_all(wan, subjects, run, plan, most=1)
    assert len(calls) == 2 * len(whole.edits) + 2  # nothing was done twice but what was cut short
    for name, arrays in whole.runs.items():
        assert all(
            np.array_equal(values, torn.runs[name][key], equal_nan=True)
            for key, values in arrays.items()
        )


def test_another_seed_is_the_yardstick(wan, subjects, tmp_path):
    options = NoiseOptions(at=(2,), others=3, frames=(1,))
    results = measure_all(wan, subjects, Run.open(tmp_path, {}), options)
    others = np.mean([results.d(name) for name in results.names("seed")], axis=(0, 1))
    assert np.allclose(others, 1)  # at every step, by construction
    assert (results.final("null") == 0).all()
    assert results.untouched("step 2") is None
    assert results.untouched("frame 1").shape == (2,)
    assert np.allclose(results.estimates[:, -1], 0)


def test_frames_match_the_answers_they_come_from():
    for kind in puzzles.KINDS:
        puzzle = puzzles.make(kind, 3, split="test")
        for i in range(len(puzzle.candidates)):
            found = puzzle.matches(puzzle.draw(i))
            assert found[:, i].all()
            assert found[0].all()  # the picture itself
        torn = puzzle.draw(0)
        torn[7] = 255 - torn[7]
        assert puzzle.matches(torn).any(1).tolist() == [k != 7 for k in range(13)]


def test_late_noise_breaks_what_early_noise_does_not(tmp_path):
    """The embedded model: replacing the latent is a reseed at step 0, and at the last step
    nothing can clean it up.
    """
    wan = load("tiny").with_preset(steps=6)
    options = NoiseOptions(puzzle="mark", size=3, n=4, at=(0, 5), frames=(1,), others=1)
    results = measure_all(wan, cases.chosen(options), Run.open(tmp_path, {}), options)
    solved = {name: run["solved"].sum() for name, run in results.runs.items()}
    assert min(solved["clean"], solved["step 0"]) >= 3  # of 4
    assert solved["step 5"] <= solved["step 0"]
    right = {name: run["right"].mean() for name, run in results.runs.items()}
    assert right["step 5"] < right["step 0"]
    assert results.final("step 5").mean() > results.final("step 0").mean()
    found = study.report(wan, Run.open(tmp_path, {}), options, results)
    assert [row["edit"] for row in found.tables["edits"]] == list(results.edits)
    against = [n.name for n in found.numbers if "step noise minus frame noise" in n.name]
    assert [name.split(":")[0] for name in against] == [
        "D of the video",
        "puzzles not solved",
        "frames not right",
        "dose",
    ]
    assert found.number("largest D of the null intervention").value == 0
    assert found.number("step whose noise changes the video most").value == 5
    share = results.runs["frame 1"]["right"]
    assert results.shown("frame 1", "untouched").tolist() == [
        k not in (1, 2, 3, 4) for k in range(13)
    ]
    assert not results.shown("step 5", "untouched").any()
    assert share.shape == (4, 13)


# -- settings and the command ----------------------------------------------------------------------


def test_peaks_of_cases_that_agree():
    values = np.array([[0.0, 2.0, 1.0], [0.1, 3.0, 1.0]])
    top, _ = study.peak(values, np.array([0, 10, 20]))
    assert (top.value, top.low, top.high) == (10, 0, 20)  # between noised steps nothing is known
    torn, _ = study.peak(np.array([[5.0, 0.0, 0.0], [0.0, 0.0, 4.0]]), np.array([0, 10, 20]))
    assert (torn.value, torn.low, torn.high) == (0, 0, 20)


def test_settled_is_when_it_stays_near():
    far = np.array([[1.0, 0.05, 0.5, 0.01], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.2, 0.0]])
    assert sweep.settled(far).tolist() == [0.75, 0.0, 0.75]


def test_the_boundary_is_swept_in_one_command(tmp_path, capsys):
    out = tmp_path / "swept"
    command = [
        "noise",
        "--n",
        "1",
        "--size",
        "3",
        "--puzzle",
        "mark",
        "--steps",
        "4",
        "--at",
        "0,2",
        "--in",
        "1",
        "--others",
        "1",
        "--boundaries",
        "0.7,0.95",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    told = capsys.readouterr().out
    found = result.read(out).tables["settings"]
    assert [row["boundary at step"] for row in found] == [3, 1]  # sigmas 1, .94, .83, .63
    assert found[0]["against the first"].value == 0
    assert "against the first" in told
    for name in (
        "sensitivity.png",
        "convergence.png",
        "0.7/sensitivity.png",
        "0.95/score.png",
        "0.7/videos.png",
    ):
        assert (out / name).stat().st_size > 5000


def test_frame_counts_and_few_steps(tmp_path, capsys):
    common = ["--n", "1", "--size", "3", "--puzzle", "mark", "--points", "1", "--others", "1"]
    assert (
        main(
            ["frames", *common, "--counts", "5", "--steps", "2", "--out", str(tmp_path / "frames")]
        )
        == 0
    )
    assert "trained at 13 frames: 5 are out of its distribution" in capsys.readouterr().err
    assert main(["distilled", *common, "--counts", "2,3", "--out", str(tmp_path / "few")]) == 0
    rows = result.read(tmp_path / "few").tables["settings"]
    assert [row["steps"] for row in rows] == [2, 3]


def test_a_picture_of_ones_own(wan, toy, tmp_path, capsys):
    from minicos.media import save_image

    image = tmp_path / "own.png"
    save_image(image, (np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251).astype(np.uint8))
    command = [
        "noise",
        "--model",
        str(toy),
        "--image",
        str(image),
        "--prompt",
        "solve the maze",
        "--steps",
        "3",
    ]
    assert main([*command, "--layer", "5", "--mode", "add", "--out", str(tmp_path / "own")]) == 0
    told = capsys.readouterr().out
    assert "1 - CKA hidden" in told
    assert "solved" not in told
    assert (tmp_path / "own/hidden.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--image", "x.png"], "--image is an option of a case of your own: give a --prompt"),
        (["--puzzle", "turn", "--size", "5"], "no turn of size 5"),
        (["--at", "25"], "the run has steps 0 to 19"),
        (["--layer", "12"], "blocks 0 to 11"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(options, says, tmp_path, capsys):
    assert main(["noise", *options, "--n", "1", "--out", str(tmp_path / "x")]) == 2
    assert says in capsys.readouterr().err
    assert len(list(islice(tmp_path.rglob("*.safetensors"), 1))) == 0
