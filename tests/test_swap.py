"""Swapping hidden states: what must hold for any network, what the embedded one shows, and the
pictures drawn for others.
"""

from collections import deque
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicos.analysis import result
from minicos.analysis.swap import measure as swap_measure
from minicos.analysis.swap import pairs as swap_pairs
from minicos.analysis.swap import states as swap
from minicos.analysis.swap import study as swap_study
from minicos.analysis.swap.drawings import Drawing
from minicos.analysis.swap.plan import Plan
from minicos.analysis.swap.states import EMBED, Swap
from minicos.analysis.tools import cases
from minicos.analysis.tools.masks import on_grid
from minicos.cli import main
from minicos.errors import MinicosError
from minicos.hooks import Site
from minicos.media import save_image
from minicos.open import load
from minicos.puzzles import draw
from minicos.runs import Run
from minicos.sample import Step
from tests.golden import rel_max

STEPS, LAYERS = 3, 12
ALL = range(STEPS)


@pytest.fixture(scope="module")
def toy_wan(toy):
    return load(toy, device="cpu").with_preset(steps=STEPS, frames=5)


@pytest.fixture(scope="module")
def made():
    return swap_pairs.pairs("mark", 2, size=3)


class Scene:
    """Two prompts on two pictures, their undisturbed runs, and what a swap makes of B."""

    def __init__(self, wan, made):
        self.wan = wan
        self.a, self.b = (
            cases.condition(wan, [getattr(p, name) for p in made]) for name in ("a", "b")
        )
        self.noise = cases.noise(wan, self.b, [p.b for p in made])
        self.to_a, self.to_b = self.run(self.a), self.run(self.b)

    def run(self, condition, **options) -> list[Step]:
        return list(self.wan.sample(condition, noise=self.noise, **options))

    def swapped(self, *swaps: Swap, give=None, **options) -> list[torch.Tensor]:
        give = self.a if give is None else give
        (last,) = deque(
            swap.lockstep(self.wan, give, self.b, self.noise, swaps, **options), maxlen=1
        )
        return [step.next for step in last]


@pytest.fixture(scope="module")
def scene(toy_wan, made):
    return Scene(toy_wan, made)


@pytest.fixture(scope="module")
def guided(toy, made):
    """Guidance 5 and two branches, UniPC with its history."""
    return Scene(
        load(toy, device="cpu").with_preset(
            "official", steps=STEPS, frames=5, guidance={"high": 5.0, "low": 5.0}
        ),
        made,
    )


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("donor", swap.DONORS)
@pytest.mark.parametrize("name", ["scene", "guided"])
def test_a_swap_of_b_into_itself_changes_no_bit(name, donor, request):
    s = request.getfixturevalue(name)
    branch = None if name == "guided" else "cond"
    swaps = [Swap((5,), ALL, what, branch=branch) for what in ("stream", "cross_attn")]
    assert all(torch.equal(y, s.to_b[-1].next) for y in s.swapped(*swaps, give=s.b, donor=donor))
    (y,) = s.swapped(Swap((5,), ALL, "update"), give=s.b, donor=donor)
    assert rel_max(y, s.to_b[-1].next) < 1e-5  # h + (h' - h) rounds


@pytest.mark.parametrize("donor", swap.DONORS)
def test_the_last_blocks_stream_is_the_others_velocity(scene, donor):
    """The curve over layers ends at A by construction."""
    (y,) = scene.swapped(Swap((LAYERS - 1,), ALL), donor=donor)
    assert torch.equal(y, scene.to_a[-1].next)
    assert not torch.equal(scene.to_a[-1].next, scene.to_b[-1].next)


def test_the_last_blocks_stream_under_guidance(guided):
    """Both branches transfer A's velocity; cond alone does too, since uncond does not know the
    prompt, at A's latents.
    """
    ys = guided.swapped(Swap((LAYERS - 1,), ALL, branch=None), Swap((LAYERS - 1,), ALL))
    assert all(torch.equal(y, guided.to_a[-1].next) for y in ys)
    (uncond,) = guided.swapped(Swap((LAYERS - 1,), ALL, branch="uncond"), donor="same_x")
    assert torch.equal(uncond, guided.to_b[-1].next)


@pytest.mark.parametrize("name", ["scene", "guided"])
def test_from_the_same_latent_it_is_the_prompt_of_the_early_blocks(name, request):
    """`same_x` by its definition, A's pass at B's latent, against the result of `lockstep`:
    A's text in blocks 0..k.
    """
    s, branch = request.getfixturevalue(name), None if name == "guided" else "cond"
    for one in (Swap((4,), range(1, 3), branch=branch), Swap((4,), ALL, at="input", branch=branch)):
        states = {}
        give = s.wan.sample(s.a, noise=s.noise, hooks=one.record(states))
        take = s.wan.sample(s.b, noise=s.noise, hooks=one.hooks(states))
        for a, b in zip(give, take, strict=True):
            a.next = b.next
        assert torch.equal(s.swapped(one, donor="same_x")[0], b.next)


def test_before_any_block_the_prompt_is_unread(scene):
    assert torch.equal(scene.swapped(Swap((EMBED,), ALL), donor="same_x")[0], scene.to_b[-1].next)
    assert not torch.equal(
        scene.swapped(Swap((EMBED,), ALL), donor="own")[0], scene.to_b[-1].next
    )  # A's latent


def test_at_step_0_both_donors_are_one(scene):
    swaps = [
        Swap((3,), range(1)),
        Swap((7,), range(1), "cross_attn"),
        Swap((7,), range(1), "update"),
    ]
    own, same_x = (scene.swapped(*swaps, donor=donor) for donor in swap.DONORS)
    assert all(torch.equal(x, y) for x, y in zip(own, same_x, strict=True))


def test_of_whole_streams_only_the_last_counts(scene):
    y, z = scene.swapped(Swap((2, 3, 6), ALL), Swap((6,), ALL))
    assert torch.equal(y, z)


def test_the_input_of_a_block_is_the_output_of_the_one_before(scene):
    y, z = scene.swapped(Swap((4,), ALL, at="input"), Swap((3,), ALL))
    assert torch.equal(y, z)
    y, z = scene.swapped(Swap((0,), ALL, at="input"), Swap((EMBED,), ALL))
    assert torch.equal(y, z)


def test_all_updates_together_are_the_stream(scene):
    """With one embedding (step 0), A's updates added up in B are A's stream, and the first
    update is the first stream.
    """
    updates, stream = scene.swapped(
        Swap(tuple(range(LAYERS)), range(1), "update"), Swap((LAYERS - 1,), range(1))
    )
    assert rel_max(updates, stream) < 1e-5
    first, output = scene.swapped(Swap((0,), range(1), "update"), Swap((0,), range(1)))
    assert rel_max(first, output) < 1e-5
    one, other = scene.swapped(Swap((5,), range(1), "update"), Swap((5,), range(1)))
    assert rel_max(one, other) > 1e-4  # of a later block it is not


def test_regions_are_the_tokens_they_name(scene):
    count = scene.b.shape[2] * scene.b.shape[3] * scene.b.shape[4] // 4
    every, none = torch.ones(count, dtype=torch.bool), torch.zeros(2, count, dtype=torch.bool)
    some = torch.rand(2, count, generator=torch.Generator().manual_seed(0)) < 0.5
    whole, y, z, part = scene.swapped(
        *(Swap((6,), ALL, region=r) for r in (None, every, none, some))
    )
    assert torch.equal(y, whole)
    assert torch.equal(z, scene.to_b[-1].next)
    assert not torch.equal(part, whole)
    assert not torch.equal(part, z)
    own, donated = torch.zeros(2, count, 3), torch.ones(2, count, 3)
    put = Swap((6,), ALL, region=some)._put(own, donated, None)
    assert torch.equal(put[..., 0] == 1, some)


def test_a_random_direction_is_as_long(scene):
    draw_ = torch.Generator().manual_seed(0)
    own, donated = torch.randn(2, 2, 50, 64, generator=draw_)
    site = Site("blocks.3")
    put = Swap((3,), ALL, random=True)._put(own, donated, site)
    assert torch.equal(put, Swap((3,), ALL, random=True)._put(own, donated, site))
    assert torch.allclose((put - own).norm(dim=-1), (donated - own).norm(dim=-1), rtol=1e-5)
    cosine = torch.cosine_similarity(put - own, donated - own, dim=-1)
    assert cosine.abs().mean() < 0.2  # about 0.1 = sqrt(2 / pi / 64)
    assert not torch.equal(scene.swapped(Swap((3,), ALL, random=True))[0], scene.to_b[-1].next)


def test_a_later_start_changes_nothing(scene):
    """Steps before the first swapped one are taken from B's undisturbed run."""
    for donor in swap.DONORS:
        one = Swap((6,), range(1, 3))
        (y,) = scene.swapped(one, donor=donor)
        (z,) = scene.swapped(one, donor=donor, x=scene.to_b[1].x, start=1)
        assert torch.equal(y, z)
        assert not torch.equal(y, scene.to_b[-1].next)


def test_swaps_in_lockstep_are_swaps_alone(scene):
    swaps = [Swap((k,), ALL, what) for k, what in ((2, "stream"), (6, "ffn"), (9, "update"))]
    for donor in swap.DONORS:
        together = scene.swapped(*swaps, donor=donor)
        assert all(
            torch.equal(y, scene.swapped(one, donor=donor)[0])
            for y, one in zip(together, swaps, strict=True)
        )


# -- measures --------------------------------------------------------------------------------------


@given(t=st.floats(-1, 2), off=st.floats(0, 2), seed=st.integers(0, 99))
def test_flip_and_off_axis_share(t, off, seed):
    a, b, z = torch.randn(3, 2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)).double()
    axis = a - b
    scale = [
        (u.flatten(1) * v.flatten(1)).sum(1)[:, None, None, None, None]
        for u, v in ((z, axis), (axis, axis))
    ]
    z = z - scale[0] / scale[1] * axis
    z = z / z.flatten(1).norm(dim=1)[:, None, None, None, None] * scale[1].sqrt()
    turned, share = swap.flip(b + t * axis + off * z, a, b)
    assert torch.allclose(turned, torch.tensor(2 * t - 1).double(), atol=1e-9)
    assert torch.allclose(share, torch.tensor(off).double(), atol=1e-9)


def test_leverage_is_that_of_the_guided_step(guided):
    (steps, *_) = swap.lockstep(
        guided.wan, guided.a, guided.b, guided.noise, [Swap((LAYERS - 1,), range(1))]
    )
    a, b = guided.to_a[0], guided.to_b[0]
    dv = (a.velocity_cond - b.velocity_cond).flatten(1).norm(dim=1)
    expected = 5 * abs(b.sigma_next - b.sigma) * dv / guided.noise.flatten(1).norm(dim=1)
    assert torch.allclose(swap.leverage(steps[0], b.velocity), expected, rtol=1e-4)


def test_crossing_is_where_the_mean_curve_gets_there():
    rising = np.tile([-1.0, -1.0, 1.0, 1.0], (20, 1))
    at = swap_study.crossing([0, 2, 4, 6], rising, 0.0)
    assert (at.value, at.low, at.high, at.n) == (3, 2, 4, 20)  # between layers nothing is known
    never = swap_study.crossing([0, 1], np.zeros((5, 2)), 0.5)
    assert (never.value, never.low, never.high) == (np.inf, np.inf, np.inf)
    assert swap_study.crossing([4, 5], np.ones((5, 2)), 0.5).value == 4  # there already
    mixed = np.repeat([[0.0, 1, 1, 1], [0, 0, 0, 1]], 10, axis=0)
    at = swap_study.crossing([0, 1, 2, 3], mixed, 0.6)
    assert 2 < at.value < 3
    assert at.low < 1 < 2 < at.high <= 3  # resampled, either half may win


def test_a_picture_counts_once():
    assert np.array_equal(swap_study.by_picture(np.array([1.0, 2, 3, 4]), 2), [2, 3])
    assert np.array_equal(swap_study.by_picture(np.array([1.0, 2, 3, 4]), 4), [1, 2, 3, 4])


@pytest.mark.parametrize("preset", ["tiny", "official"])
def test_measuring_b_into_itself(toy, made, preset):
    """Euler takes up B's run behind its last undisturbed step; UniPC, which has a history,
    starts over. Neither is seen.
    """
    wan = load(toy, device="cpu").with_preset(preset, steps=STEPS, frames=5)
    unread = [replace(pair, shows=()) for pair in made]
    plain = swap_measure.undisturbed(wan, unread, [0, 1])
    swaps = [Swap((k,), range(1, 3)) for k in (0, 6)]
    out, ends = swap_measure.measure(
        wan, unread, swap_pairs.donors(made, "null"), plain, swaps, index=1
    )
    assert all(out[name].shape == (2, 2) for name in out)
    assert torch.equal(out["flip"], torch.full((2, 2), -1.0).double())
    assert not any(out[name].any() for name in ("off_axis", "leverage", "changed"))
    assert (out["answer"] == swap_pairs.UNREAD).all()
    assert all(torch.equal(y, plain["b"]) for y in ends)


# -- subjects --------------------------------------------------------------------------------------


def test_pairs_are_prompts_of_one_picture():
    for kind in ("mark", "goal", "pick"):  # of pick, some admit one prompt alone
        for pair in swap_pairs.pairs(kind, 5, size=3, seed=7):
            assert pair.a.prompt != pair.b.prompt
            assert torch.equal(pair.a.image, pair.b.image)
            assert pair.a.seed == pair.b.seed
            videos = [case.puzzle.draw(0) for case in (pair.a, pair.b)]
            assert [pair.read(video) for video in videos] == [swap_pairs.A, swap_pairs.B]
            assert [pair.turned().read(video) for video in videos] == [swap_pairs.B, swap_pairs.A]
            assert pair.read(np.repeat(videos[0][:1], 13, axis=0)) == swap_pairs.NEITHER
            assert pair.objects.any()
    with pytest.raises(MinicosError, match="maze has one: take mark or goal"):
        swap_pairs.pairs("maze", 1)


def test_who_gives_in_a_control():
    made = swap_pairs.pairs("mark", 12, size=3)
    assert swap_pairs.donors(made, None) == swap_pairs.donors(made, "random") == [p.a for p in made]
    assert swap_pairs.donors(made, "null") == [p.b for p in made]
    assert swap_pairs.donors(made, "wrong") == [p.a for p in made[1:] + made[:1]]
    for pair, case in zip(made, swap_pairs.donors(made, "shuffled"), strict=True):
        assert torch.equal(case.image, pair.b.image)
        assert case.prompt not in (pair.a.prompt, pair.b.prompt)
    both = [*made, *(pair.turned() for pair in made)]
    for pair, case in zip(both, swap_pairs.donors(both, "wrong"), strict=True):
        assert case is not pair.a
        assert case is not pair.b
    for one in (made[:1], [made[0], made[0].turned()]):
        with pytest.raises(MinicosError, match="'wrong' takes its donor from another picture"):
            swap_pairs.donors(one, "wrong")


def test_a_mask_of_tokens():
    mask = np.zeros((48, 32), bool)
    mask[17, 31] = True
    assert on_grid(mask, (2, 3, 2)).nonzero().tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Swap((3,), ALL, at="outputs"), "a swap is at output or input"),
        (
            lambda: Swap((3,), ALL, "ffn", at="input"),
            "only a stream can be swapped at a block's input",
        ),
        (lambda: Swap((EMBED,), ALL, "ffn"), "a swap of ffn needs layers from 0 on"),
        (lambda: Swap((), ALL), "needs layers"),
        (lambda: Swap((3,), range(2, 2)), "needs a range of steps"),
    ],
)
def test_a_swap_that_cannot_be(make, says):
    with pytest.raises(MinicosError, match=says):
        make()


def test_swaps_that_do_not_fit_the_run(scene):
    with pytest.raises(MinicosError, match="steps 0 to 3 are not among the steps 0 to 2"):
        scene.swapped(Swap((3,), range(4)))
    with pytest.raises(MinicosError, match="equal steps"):
        scene.swapped(Swap((3,), range(1)), Swap((3,), range(2)))
    with pytest.raises(MinicosError, match=r"no hook point matches 'blocks\.12'"):
        scene.swapped(Swap((12,), ALL))


# -- pictures for any model ------------------------------------------------------------------------


def circled(probe: Drawing, kinds: tuple[str, ...]) -> np.ndarray:
    """A video in which rings appear around things of some classes."""
    first = probe.image()
    y, x = np.mgrid[: probe.height, : probe.width] + 0.5
    last = first.copy()
    for thing in probe.things:
        if thing.kind in kinds:
            last[np.abs(np.hypot(y - thing.y, x - thing.x) - 1.3 * thing.radius) < 2] = (
                222,
                40,
                45,
            )
    return np.stack([first, first, last])


@settings(max_examples=20)
@given(seed=st.integers(0, 999), size=st.sampled_from([(96, 160), (128, 128), (160, 96)]))
def test_probes_can_be_read(seed, size):
    probe = Drawing.sample(
        Random(seed), *size, kinds=("cat", "bicycle") if seed % 2 else ("circle", "triangle")
    )
    assert probe.image().shape == (*size, 3)
    a, b = probe.kinds
    assert not (probe.mask(a) & probe.mask(b)).any()
    drawn = draw.differs(probe.image(), np.full_like(probe.image(), 255))
    assert (probe.mask() & ~drawn).mean() < 0.001  # outlines aside, things are where the mask is
    assert (drawn & ~probe.mask()).mean() < 0.04  # one pixel of outline, small pictures
    for kinds, found in (
        ((a,), [True, False]),
        ((b,), [False, True]),
        ((a, b), [False] * 2),
        ((), [False] * 2),
    ):
        assert [probe.shows(kind)(circled(probe, kinds)) for kind in (a, b)] == found


def test_prompts_of_probes_count():
    texts = {Drawing.sample(Random(i)).prompt("bicycle") for i in range(8)}
    assert texts == {"Circle the bicycle.", "Circle the bicycles."}
    one, two = swap_pairs.drawn(2, 96, 160, seed=3)
    assert {one.a.prompt[11:14], one.b.prompt[11:14]} == {"cat", "bic"}
    assert (one.b.seed, two.b.seed) == (3, 4)


# -- sweeps ----------------------------------------------------------------------------------------


def test_a_killed_sweep_continues_with_the_same_result(toy, tmp_path, monkeypatch):
    wan = load(toy, device="cpu").with_preset(steps=2, frames=5)
    made = [
        replace(pair, shows=()) for pair in swap_pairs.pairs("mark", 3, size=3)
    ]  # unread: nothing but the first is decoded
    plan = Plan(
        (4, 11), (range(1), range(2)), ("own", "same_x"), controls=("null",), control_layers=(4,)
    )
    whole = swap_measure.measure_all(wan, Run.open(tmp_path / "whole", {}), plan, made, most=2)
    assert set(whole) == {None, *plan.arms}
    assert len(plan.arms) == 3 * 2  # step 0 has one donor
    real, calls = swap_measure.measure, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    run = Run.open(tmp_path / "killed", {})
    monkeypatch.setattr(swap_measure, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        swap_measure.measure_all(wan, run, plan, made, most=2)
    again = swap_measure.measure_all(wan, run, plan, made, most=2)
    assert len(calls) == 2 * 6 + 1  # the four finished batches were kept
    for arm in whole:
        assert all(
            np.array_equal(whole[arm][key], again[arm][key], equal_nan=True) for key in whole[arm]
        )
    lines = swap_study.rows(plan, whole, 3)
    assert [line["largest change"] for line in lines if line["arm"].endswith("null")] == [0, 0, 0]
    assert [
        line["flip"].value
        for line in lines
        if line["layer"] == "11" and line["arm"].startswith("steps")
    ] == [1, 1]


def test_the_command(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [
        "swap",
        "--model",
        str(toy),
        "--steps",
        "2",
        "--out",
        "run",
        "--puzzle",
        "mark",
        "--n",
        "2",
        "--size",
        "3",
        "--one-way",
    ]
    argv += [
        "--at",
        "embed,3-4",
        "--frames",
        "5",
        "--controls",
        "null,wrong",
        "--controls-at",
        "4",
        "--region",
        "objects",
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "steps 0-1, A at B's latent, null" in out
    found = result.read(tmp_path / "run")
    assert {line["arm"] for line in found.tables["layers"]} == {
        f"{arm}{c}"
        for arm in ("step 0, A at B's latent", "steps 0-1, A at B's latent")
        for c in ("", ", null", ", wrong")
    }
    turns = [n for n in found.numbers if "flip = 0" in n.name]
    assert [number.n for number in turns] == [2, 2]
    assert np.isnan(turns[0].value)  # a random network does not turn at step 0
    assert (tmp_path / "run/last_frames.png").exists()
    assert (tmp_path / "run/videos/steps_0-1_same_x/layer_embed.mp4").exists()
    assert main(argv) == 0
    assert capsys.readouterr().out == out
    save_image("shapes.png", np.full((32, 64, 3), 200, np.uint8))
    own = ["--image", "shapes.png", "--prompt", "mark the circle", "--other", "mark the square"]
    for subject in (["--probe", "1", "--pixels", "32x64"], own):
        more = [
            "--steps",
            "1",
            "--frames",
            "5",
            "--at",
            "3",
            "--what",
            "ffn",
            "--out",
            subject[0][2:],
        ]
        assert main(["swap", "--model", str(toy), *subject, *more]) == 0
        out, err = capsys.readouterr()
        assert "step 0, A at B's latent" in out
        assert (
            ("rate of A" in out)
            == ("does not know the words bicycle, .\n" in err)
            == (subject is not own)
        )
    for wrong, says in (
        (own[:4], "give --prompt and --other"),
        (["--puzzle", "mark", "--at", "12"], "this model has layers 0 to 11"),
        (["--puzzle", "mark", "--during", "0-20"], "the run has steps 0 to 19"),
        (["--puzzle", "mark", "--during", "0-2-4"], "give a list such as 0,3-5 or all"),
        (
            ["--puzzle", "mark", "--what", "streams"],
            "--what streams: this model has stream, update",
        ),
        (["--puzzle", "mark", "--size", "5"], "no mark of size 5"),
        (["--puzzle", "mark", "--n", "1", "--one-way", "--controls", "wrong"], "there is only one"),
        (["--puzzle", "mark", "--noise-device", "cuda", "--device", "cpu"], "needs a CUDA card"),
    ):
        assert main(["swap", "--model", str(toy), *wrong]) == 2
        assert says in capsys.readouterr().err


def test_the_embedded_model_reads_its_prompt_in_the_middle():
    wan = load("tiny", device="cpu").with_preset(steps=6)
    made = swap_pairs.pairs("mark", 2)
    plain = swap_measure.undisturbed(wan, made, [0])
    out, _ = swap_measure.measure(
        wan,
        made,
        swap_pairs.donors(made, None),
        plain,
        [Swap((k,), range(6)) for k in (2, 9)],
        donor="same_x",
    )
    assert plain["a.answer"].tolist() == [swap_pairs.A] * 2
    assert out["answer"].tolist() == [[swap_pairs.B, swap_pairs.A]] * 2
    assert (out["flip"][:, 0] < -0.9).all()
    assert (out["flip"][:, 1] > 0.8).all()
