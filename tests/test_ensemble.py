"""Ensembles: the algebra of every mode, what it costs, and what the command makes of puzzles and
pictures.
"""

from collections import deque
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicos import ops
from minicos.analysis import result
from minicos.analysis.ensemble import measure, plan
from minicos.analysis.ensemble import share as ensemble
from minicos.analysis.ensemble import study as ensemble_study
from minicos.analysis.ensemble.share import Ensemble, Passes, run, share, window
from minicos.analysis.options import EnsembleOptions
from minicos.analysis.tools import cases
from minicos.cli import main
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.media import save_image
from minicos.open import load
from minicos.runs import Run

pytestmark = pytest.mark.usefixtures("bare_pictures")

CASES, T, DEPTH = 3, 3, 12
WINDOW = (6, 7, 8)  # 20..29 of 40


@pytest.fixture(scope="module")
def wan(toy):
    return load(toy, device="cpu").with_preset(steps=2, frames=5)


@pytest.fixture(scope="module")
def start(wan):
    """Condition and noise of rows (case seed): three marks of three cells, three seeds of each."""
    batch = cases.held_out("mark", CASES, size=3)
    condition = cases.condition(wan, batch).take(torch.arange(CASES).repeat_interleave(T))
    return condition, wan.noise(condition, 7)


@pytest.fixture(scope="module")
def plain(wan, start):
    (last,) = deque(wan.sample(start[0], noise=start[1]), maxlen=1)
    return last.next


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    return ((a - b).norm() / b.norm()).item()


def one(e: Ensemble, **changes) -> Ensemble:
    return replace(e, **changes)


# -- the op ----------------------------------------------------------------------------------------

batches = st.tuples(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(0, 2**31 - 1),
)


def states(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, int]:
    count, seeds, length, width, seed = shape
    return torch.randn(
        count * seeds, length, width, generator=torch.Generator().manual_seed(seed)
    ).to(dtype), seeds


@given(batches, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([0.0, 0.3, 1.0]))
def test_latent_mean_is_its_formula(shape, dtype, alpha):
    x, seeds = states(shape, dtype)
    y = ops.latent_mean(x, seeds, alpha)
    each = x.double().unflatten(0, (-1, seeds))
    expected = ((1 - alpha) * each + alpha * each.mean(1, keepdim=True)).flatten(0, 1)
    # one rounding to x's dtype, at most 2^-8 of the value in bfloat16; in float32 a few of 2^-24
    assert (
        (y.double() - expected).abs()
        <= (2**-8 if dtype == torch.bfloat16 else 0) * expected.abs() + 1e-6
    ).all()
    assert y.dtype == dtype
    if alpha == 0 or seeds == 1:
        assert torch.equal(y, x)


@given(batches, st.randoms(use_true_random=False))
def test_the_order_of_seeds_does_not_matter(shape, random):
    x, seeds = states(shape)
    order = list(range(seeds))
    random.shuffle(order)
    turned = x.unflatten(0, (-1, seeds))[:, order].flatten(0, 1)
    assert torch.allclose(
        ops.latent_mean(turned, seeds), ops.latent_mean(x, seeds), rtol=0, atol=1e-6
    )


def test_latent_mean_writes_where_it_is_told():
    x, seeds = states((2, 3, 4, 5, 0))
    expected, seen = ops.latent_mean(x, seeds, 0.5), torch.full_like(x, torch.nan)
    assert ops.latent_mean(x, seeds, 0.5, seen) is seen
    assert torch.equal(seen, expected)
    assert torch.equal(ops.latent_mean(x.clone(), seeds, 0.0, seen), x)
    assert torch.equal(ops.latent_mean(x, seeds, 0.5, x), expected)  # in place
    with pytest.raises(ValueError, match="6 rows are not whole cases of 4 seeds"):
        ops.latent_mean(x, 4)
    with pytest.raises(ValueError, match="out must be"):
        ops.latent_mean(x, 3, 1.0, x[:3])


# -- sharing ---------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(batches, st.sampled_from([0.25, 1.0]))
def test_keep_norm_gives_the_mean_its_norm(shape, alpha):
    x, seeds = states(shape)
    e = Ensemble(WINDOW, "mix", seeds=seeds, carrier=None, alpha=alpha, keep_norm=True)
    y = share(x, e)
    whole = share(x, one(e, alpha=1.0))
    norms = x.norm(dim=-1).unflatten(0, (-1, seeds)).mean(1).repeat_interleave(seeds, 0)
    assert torch.allclose(whole.norm(dim=-1), norms, rtol=1e-4)  # a mean may be short
    assert torch.allclose(y, (1 - alpha) * x + alpha * whole, atol=1e-5)


def test_wrong_donors_are_of_other_cases():
    marked = (
        torch.arange(4.0).repeat_interleave(3).view(12, 1, 1)
    )  # every row holds the number of its case
    y = share(10**marked, Ensemble(WINDOW, "lockstep", donors="others"))
    digits = (3 * y.flatten()).round().int().tolist()
    own = (10 ** marked.flatten()).int().tolist()
    assert all(sorted(str(d).zfill(4)) == list("0111") for d in digits)  # three cases, each once
    assert all(d // o % 10 == 1 for d, o in zip(digits, own, strict=True))  # including its own
    with pytest.raises(
        MinicosError, match="3 seeds of different cases need a batch of 3 cases or more, not 2"
    ):
        share(marked[:6], Ensemble(WINDOW, "lockstep", donors="others"))


def test_the_random_control_moves_as_far_elsewhere():
    x, _ = states((2, 3, 5, 64, 1))
    e = Ensemble(WINDOW, "lockstep")
    true, random = share(x, e) - x, share(x, one(e, donors="random"), draw=3) - x
    assert torch.allclose(random.norm(dim=-1), true.norm(dim=-1), rtol=1e-5)
    assert (
        torch.cosine_similarity(random, true, dim=-1).abs().max() < 0.5
    )  # 64 channels: deviation 1/8
    assert not torch.equal(random, share(x, one(e, donors="random"), draw=4) - x)


@pytest.mark.parametrize(
    ("span", "depth", "expected"),
    [
        ((20, 29), 40, (20, 29)),
        ((20, 29), 12, (6, 8)),
        ((20, 29), 30, (15, 22)),
        ((0, 39), 12, (0, 11)),
        ((0, 9), 12, (0, 2)),
        ((39, 39), 12, (11, 11)),
        ((39, 39), 2, (1, 1)),
    ],
)
def test_windows_scale_with_depth(span, depth, expected):
    found = window(*span, depth)
    assert (found[0], found[-1]) == expected
    assert found == tuple(range(found[0], found[-1] + 1))


# -- the algebra of the modes ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ensemble.MODES)
def test_one_seed_is_the_plain_run(wan, start, plain, mode):
    e = Ensemble(
        () if mode in ensemble.BETWEEN_STEPS else WINDOW,
        mode,
        seeds=1,
        steps=(0, 1),
        keep_norm=True,
    )
    out = run(wan, *start, e)
    if mode == "input_override":  # blocks run on their own output, also without averaging
        assert relative(out, plain) > 1e-4
    elif mode == "x0":
        assert torch.allclose(out, plain, atol=1e-6)
        assert torch.equal(out, plain)
    else:
        assert torch.equal(out, plain)


def test_no_sharing_is_the_plain_run(wan, start, plain):
    assert torch.equal(run(wan, *start, Ensemble(WINDOW, "mix", alpha=0.0, carrier=None)), plain)


def everything(mode: str, layers=WINDOW, **changes) -> Ensemble:
    return Ensemble(layers, mode, carrier=None, **changes)


def test_which_layers_count(wan, start, plain):
    def of(mode: str, *layers: int) -> Tensor:
        return run(wan, *start, everything(mode, layers))

    # equal numbers by other means: 0 or a few last bits; another layer moves much more
    assert relative(of("override", *WINDOW), of("override", 8)) == 0
    assert relative(of("input_override", *WINDOW), of("input_override", 8)) == 0
    assert relative(of("lockstep", *WINDOW), of("lockstep", 6)) < 1e-6
    assert relative(of("override", *WINDOW), of("lockstep", 8)) < 1e-6
    assert relative(of("lockstep", *WINDOW), of("mix", *WINDOW)) < 1e-6
    whole = of("update", *WINDOW)
    for gone in WINDOW:
        assert relative(of("update", *(k for k in WINDOW if k != gone)), whole) > 1e-5
    for mode in ("override", "input_override", "lockstep", "update"):
        assert relative(of(mode, *WINDOW), plain) > 1e-5


def test_update_adds_the_mean_of_what_blocks_add(wan, start):
    """Against a pass that is built by hand from the states of another: one layer, so that
    nothing is fed back.
    """
    seen: dict[str, Tensor] = {}

    def watch(x, site):
        seen[site.name] = x

    observer = Hooks().on("blocks.5", watch, step=(0,)).on("blocks.6", watch, step=(0,))
    next(wan.sample(start[0], noise=start[1], hooks=observer))
    added = (
        (seen["blocks.6"] - seen["blocks.5"])
        .unflatten(0, (CASES, T))
        .mean(1)
        .repeat_interleave(T, 0)
    )
    by_hand = Hooks().on("blocks.6", lambda x, site: seen["blocks.5"] + added, step=(0,))
    (last,) = deque(wan.sample(start[0], noise=start[1], hooks=by_hand), maxlen=1)
    assert relative(run(wan, *start, everything("update", (6,))), last.next) < 1e-6


def velocities(wan, start, e: Ensemble) -> Tensor:
    """The network's output at step 0, for the last pass there  (case seed c f h w)."""
    seen = []
    watch = Hooks().on("velocity", lambda x, site: seen.append(x), step=(0,), branch="cond")
    run(wan, *start, e, watch=watch)
    return seen[-1].unflatten(0, (CASES, T))


@pytest.mark.parametrize(
    ("mode", "shared"), [("override", True), ("lockstep", True), ("update", False), ("mix", False)]
)
@pytest.mark.parametrize("keep_norm", [False, True])
def test_seeds_share_one_velocity(wan, start, mode, shared, keep_norm):
    v = velocities(
        wan, start, everything(mode, keep_norm=keep_norm, alpha=0.5 if mode == "mix" else 1.0)
    )
    spread = relative(v[:, 1:], v[:, :1].expand(-1, T - 1, -1, -1, -1, -1))
    assert (spread < 1e-6) if shared else (spread > 1e-4)
    assert relative(v[0], v[1]) > 1e-3  # of one case, not of all


@pytest.mark.parametrize("mode", ensemble.MODES)
def test_seeds_may_be_permuted(wan, start, mode):
    e = everything(mode, () if mode in ensemble.BETWEEN_STEPS else WINDOW, steps=(0, 1))
    order = torch.tensor([2, 0, 1]).repeat(CASES) + torch.arange(CASES).repeat_interleave(T) * T
    out = run(wan, *start, e)
    turned = run(wan, start[0].take(order), start[1][order], e)
    assert relative(turned, out[order]) < 1e-5


@pytest.mark.parametrize("mode", ensemble.MODES)
def test_a_carrier_is_one_of_all(wan, start, mode):
    e = everything(mode, () if mode in ensemble.BETWEEN_STEPS else WINDOW)
    out = run(wan, *start, one(e, carrier=2))
    assert len(out) == CASES
    assert relative(out, run(wan, *start, e)[2::T]) < 1e-5  # another batch size, other last bits


def test_averaged_latents_and_estimates(wan, start):
    condition, noise = start
    step = next(wan.sample(condition, noise=noise))
    mean = step.next.unflatten(0, (CASES, T)).mean(1).repeat_interleave(T, 0)
    assert relative(ensemble.edit(step, everything("latent", ())), mean) < 1e-6
    shared = ensemble.edit(step, everything("x0", ()))
    x0 = step.x0.unflatten(0, (CASES, T)).mean(1).repeat_interleave(T, 0)
    by_hand = step.x + (step.sigma_next - step.sigma) * (step.x - x0) / step.sigma
    assert relative(shared, by_hand) < 1e-6


@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
def test_a_multistep_run_goes_on_with_its_memory(wan, start, solver):
    """Sharing inside the passes is not an edit of the latent, so the solver's history is kept, for
    carriers too.
    """
    multistep = wan.with_preset(solver=solver, steps=4)
    (last,) = deque(multistep.sample(start[0], noise=start[1]), maxlen=1)
    idle = Ensemble(WINDOW, "mix", alpha=0.0, steps=(1,), carrier=1)
    assert (
        relative(run(multistep, *start, idle), last.next[1::T]) < 1e-5
    )  # without history it is far from it


@pytest.mark.parametrize(
    ("mode", "branches", "guidance", "expected"),
    [
        ("lockstep", ("cond",), 1.0, T + 3),
        ("override", ("cond",), 1.0, T + 4),
        ("lockstep", ("cond", "uncond"), 2.0, 2 * (T + 3)),
        (
            "override",
            ("cond",),
            2.0,
            T + 2 * 4,
        ),  # the first pass needs the branch that shares, and no other
        ("override", ("cond", "uncond"), 2.0, 2 * (T + 4)),
    ],
)
def test_passes_are_as_told(wan, mode, branches, guidance, expected):
    guided = wan.with_preset(steps=4, guidance={"high": guidance, "low": guidance})
    single = cases.condition(guided, cases.held_out("mark", 1, size=3))
    condition = single.take(torch.zeros(T, dtype=torch.int64))
    counter = Passes()
    run(
        guided,
        condition,
        guided.noise(condition, 0),
        Ensemble((6,), mode, branches=branches),
        watch=counter.hooks,
    )
    assert counter.count == expected


def test_only_the_named_branch_shares(wan, start):
    guided = wan.with_preset(guidance={"high": 2.0, "low": 2.0})
    batch = cases.held_out("mark", CASES, size=3)
    condition = cases.condition(guided, batch).take(torch.arange(CASES).repeat_interleave(T))
    seen: dict[str, Tensor] = {}
    watch = Hooks().on("blocks.7", lambda x, site: seen.__setitem__(site.branch, x), step=(0,))
    hooked = ensemble.hooks(everything("lockstep", (6,))) + watch
    next(guided.sample(condition, noise=start[1], hooks=hooked))
    apart = {k: v.unflatten(0, (CASES, T)).std(1).max().item() for k, v in seen.items()}
    assert apart["cond"] < 1e-5
    assert apart["uncond"] > 1e-3


def test_what_cannot_be():
    with pytest.raises(MinicosError, match="a mode of override"):
        Ensemble(WINDOW, "median")
    with pytest.raises(MinicosError, match="no carrier 3"):
        Ensemble(WINDOW, carrier=3)
    with pytest.raises(MinicosError, match="cannot share layers"):
        Ensemble((), "lockstep")
    with pytest.raises(MinicosError, match="alpha belongs to mode mix"):
        Ensemble(WINDOW, "update", alpha=0.5)
    with pytest.raises(MinicosError, match="not made of hooks alone"):
        ensemble.hooks(Ensemble(WINDOW, "override"))
    assert ensemble.hooks(Ensemble(WINDOW, "update", seeds=1)) is NO_HOOKS
    with pytest.raises(MinicosError, match="counted from 0 to 39"):
        window(30, 40, 12)


def test_steps_and_blocks_that_are_not_there(wan, start):
    with pytest.raises(MinicosError, match="sharing at step 2: the run has steps 0 to 1"):
        run(wan, *start, Ensemble(WINDOW, steps=(2,)))
    with pytest.raises(MinicosError, match=r"no hook point matches 'blocks\.12'"):
        run(wan, *start, Ensemble((11, 12), "lockstep"))
    with pytest.raises(MinicosError, match="no unconditional pass"):
        run(wan, *start, Ensemble(WINDOW, branches=("cond", "uncond")))


# -- the experiment --------------------------------------------------------------------------------


def kept(arms, solved: dict[str, list[int]]) -> dict[str, Tensor]:
    """What `compare` could have made of four cases: an arm solves what `solved` says, otherwise
    nothing, and moves by 1 of 4.
    """
    zero = [0, 0, 0, 0]
    out = {
        "plain.solved": torch.tensor(
            [[1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.uint8
        )
    }
    out |= {
        "plain.passes": torch.full((4,), 12.0),
        "plain.vote": torch.tensor([0, 2, 0, 1]),
        "plain.apart": torch.full((4,), 4.0),
    }
    for name in arms:
        out[f"{name}.solved"] = torch.tensor(solved.get(name, zero), dtype=torch.uint8)[:, None]
        out |= {f"{name}.passes": torch.full((4,), 6.0), f"{name}.moved": torch.ones(4, 1)}
    return out


def test_chosen_on_dev_tested_on_test(tmp_path):
    """From stored batches, without a network."""
    folder = Run.open(tmp_path / "run", {})
    first, second = (
        plan.ablation(12, [(20, 29), (0, 9)], ["lockstep"], Ensemble((0,), "lockstep", steps=steps))
        for steps in ((0,), (0, 1))
    )
    best = "lockstep 0-9 @0-1"
    folder.save_tensors(
        "dev/000.safetensors",
        kept({**first, **second}, {"lockstep 20-29 @0": [1, 0, 0, 0], best: [1, 1, 0, 0]}),
    )
    tried = {
        **first,
        best: second[best],
        **plan.controls(best, second[best]),
        **plan.rivals(second[best]),
    }
    folder.save_tensors("test/000.safetensors", kept(tried, {best: [1, 1, 0, 1]}))
    batch = [cases.held_out("mark", 4, size=3)]
    chosen, table = ensemble_study.experiment(None, folder, [first, second], batch, batch)
    by_name = {row["arm"]: row for row in table}
    assert chosen == best
    assert list(by_name) == [
        "plain (T = 1)",
        "lockstep 20-29 @0",
        "lockstep 0-9 @0",
        best,
        f"{best}, other cases",
        f"{best}, random direction",
        "clean estimate @0-1",
        "latent, norm kept @0-1",
        "vote among 3 plain runs",
        "best of 3 plain runs (oracle)",
    ]
    solved = {name: row["solved"].value for name, row in by_name.items()}
    assert solved["plain (T = 1)"] == 0.5
    assert (solved[best], by_name[best]["gain"].value, by_name[best]["D to plain"]) == (
        0.75,
        0.25,
        0.25,
    )
    assert solved["vote among 3 plain runs"] == solved["best of 3 plain runs (oracle)"] == 0.75
    worse = by_name["lockstep 0-9 @0"]
    assert worse["gain"].value == -0.5
    tested = {row["arm"] for row in table if row.get("p after Holm") is not None}
    assert tested == {*first, best}  # the three that were tested
    assert worse["p after Holm"] == pytest.approx(min(1, 3 * worse["p"]))
    # of four, one puzzle may always change
    vote = by_name["vote among 3 plain runs"]["finds a gain of"]
    assert vote == pytest.approx(2.802 * 0.5 / 2)


# -- the command -----------------------------------------------------------------------------------


def test_puzzles_chosen_on_dev_reported_on_test(toy, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "ensemble",
        "--model",
        str(toy),
        "--device",
        "cpu",
        "--steps",
        "2",
        "--frames",
        "5",
        "--puzzle",
        "mark",
        "--size",
        "3",
        "--n",
        "3",
        "--choose",
        "3",
        "--windows",
        "20-29",
        "--modes",
        "lockstep",
        "--at",
        "0,0-1",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    text = capsys.readouterr().out
    table = result.read(out).tables["arms"]
    named = [row["arm"] for row in table]
    assert named[:2] == ["plain (T = 1)", "lockstep 20-29 @0"]
    assert {
        "lockstep 20-29 @0, other cases",
        "clean estimate @0",
        "best of 3 plain runs (oracle)",
    } < set(named)
    assert [row["passes"] for row in table[:2]] == [2, 4]  # N; T + N - 1
    # a random network solves nothing; of equals, the first
    chosen = result.read(out).number("puzzles solved: lockstep 20-29 @0, minus plain")
    assert "chosen on 3 dev puzzles" in chosen.note and chosen.note in text
    assert (out / "ensemble.png").exists()
    (out / "test/000.safetensors").unlink()  # as after a kill there
    assert main(command) == 0
    assert result.read(out).tables["arms"] == table


def test_a_picture_of_ones_own(toy, tmp_path, capsys):
    picture = cases.held_out("mark", 1, size=3)[0].puzzle.first_frame()
    save_image(tmp_path / "p.png", picture)
    out = tmp_path / "out"
    command = [
        "ensemble",
        "--model",
        str(toy),
        "--device",
        "cpu",
        "--steps",
        "2",
        "--frames",
        "5",
        "--image",
        str(tmp_path / "p.png"),
        "--prompt",
        "solve the maze",
        "--out",
        str(out),
        "--modes",
        "update",
        "--seeds",
        "2",
    ]
    assert main(command) == 0
    assert "update 20-29 @0, random direction" in capsys.readouterr().out
    assert (out / "side_by_side.mp4").exists()
    assert (out / "ensemble_sheet.png").exists()
    assert (
        len(list((out / "videos").glob("*.mp4"))) == 4
    )  # two plain seeds, the ensemble and its control


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--image", "p.png"], "--image is an option of a case of your own: give a --prompt"),
        (["--puzzle", "mark"], "no mark of size 5"),
        (["--puzzle", "maze", "--carrier", "x"], "--carrier x"),
        (["--puzzle", "maze", "--n", "2"], "--n 2: the wrong donors of 3 seeds"),
        (["--puzzle", "maze", "--modes", "median"], "a mode of override"),
    ],
)
def test_mistakes_are_one_sentence(toy, tmp_path, capsys, options, sentence):
    assert main(["ensemble", "--model", str(toy), *options, "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err


def test_wrong_donors_do_more_than_own_seeds_on_the_embedded_model():
    wan = load("tiny", device="cpu").with_preset(steps=4)
    batch = cases.held_out("maze", 3, size=3)
    out = measure.compare(
        wan, {"own": Ensemble(WINDOW), "others": Ensemble(WINDOW, donors="others")}, batch
    )
    own, others = measure.moved(out, "own"), measure.moved(out, "others")
    assert 0 < own < 0.7  # measured 0.007: another video, much nearer than another seed's
    assert others > 2 * own
    assert out["plain.passes"].tolist() == [12] * 3
    assert out["own.passes"].tolist() == [7] * 3


def test_an_ideal_observer_gains_nothing_by_choosing_among_its_runs(tmp_path):
    """It ends at a right answer from every seed, if it has steps enough to leave the mixture."""
    wan = load("tiny", device="cpu").with_preset(steps=8)
    options = EnsembleOptions(puzzle="maze", size=3, n=3, seeds=3, ideal=True)
    batch = cases.held_out("maze", 3, size=3)
    found = ensemble_study.ideal(wan, Run.open(tmp_path / "run", {}), [batch], options)
    assert [number.name for number in found] == [
        "puzzles solved: vote among 3 plain runs, minus plain: ideal observer",
        "puzzles solved: best of 3 plain runs (oracle), minus plain: ideal observer",
        "puzzles solved: early selection among 3 seeds, minus plain: ideal observer",
    ]
    assert [number.value for number in found] == [0, 0, 0]
    solved = Run.open(tmp_path / "run", {}).load_tensors("ideal/test/000.safetensors")
    assert solved["plain.solved"].float().mean() == 1
    assert solved["plain.passes"].tolist() == [24] * 3
