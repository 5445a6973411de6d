"""The peers: what diffusers' pipelines compute, hooks that leave nothing behind, resuming."""

import copy
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

import minicos
from minicos.analysis.attention import gives_lse
from minicos.analysis.knockout import Flow, Knockout, Text, Tokens
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.ops import REFERENCE
from minicos.peers.cogvideox import rotation
from minicos.peers.decoding import peak
from minicos.peers.ltx2 import AUDIO
from minicos.peers.peer import as_pil
from minicos.record import Record
from minicos.sample import State
from tests import peers
from tests.golden import rel_max

pytest.importorskip("diffusers")
TOLERANCE = 8e-6  # of max; measured 0 (HunyuanVideo) to 9.6e-7, with AVX-512 5.7e-6
each = pytest.mark.parametrize("name", peers.NAMES)


def golden_run(name, model, group="loop", **more):
    """The steps of a run from the golden's noise."""
    found = peers.tensors(name)
    _, condition = peers.conditioned(name, replace(model, picture_seed=7))
    state = None
    if f"{group}.audio.0" in found or "loop.audio.0" in found:
        state = State(beside={AUDIO: found["loop.audio.0"]})
    return list(model.sample(condition, noise=found[f"{group}.x.0"], state=state, **more))


def in_its_own_coordinates(name, step):
    return step.next * (sum(rotation(step.sigma_next)) if "cog" in name else 1)


@each
def test_every_latent_of_the_pipelines_own_run(name):
    found = peers.tensors(name)
    for step in golden_run(name, peers.peer(name)):
        expected = found[f"loop.x.{step.index + 1}"]
        assert rel_max(in_its_own_coordinates(name, step), expected) < TOLERANCE
        audio = found.get(f"loop.audio.{step.index + 1}")
        if audio is not None:
            assert rel_max(step.state.beside[AUDIO], audio) < TOLERANCE


TERMS = {"stg": 1.0, "stg_blocks": (1,), "modality": 3.0, "rescale": 0.7, "audio_guidance": 7.0}


@pytest.mark.parametrize(
    ("name", "changes", "passes"),
    [
        ("ltx23", TERMS, ["cond", "uncond", "stg", "modality"]),
        ("hunyuan_replace", {"guidance": 3.0}, ["cond", "uncond"]),
    ],
)
def test_all_terms_of_guidance(name, changes, passes):
    """As diffusers guides LTX-2.3 by default, with rescaling, and HunyuanVideo with
    true_cfg_scale.
    """
    found, model = peers.tensors(name), peers.peer(name, **changes)
    for step in golden_run(name, model, group="full"):
        assert list(step.velocities) == passes
        assert model.preset.branches == tuple(step.velocities)
        assert rel_max(step.next, found[f"full.x.{step.index + 1}"]) < TOLERANCE


@pytest.mark.parametrize("name", ["hunyuan_concat", "hunyuan_replace"])
def test_a_negative_prompt_comes_with_a_black_picture(name):
    """Words and pictures through text encoders: those of the pipeline's own guided run."""
    from minicos.peers.verify import verify

    model = minicos.from_diffusers(peers.with_text_encoders(peers.pipeline(name)))
    model = model.with_preset(guidance=3.0, negative_prompt="bad")
    (part,) = verify(model, (2, 2, 3))
    assert part.parted is None and max(row.rel_max for row in part.rows) < 4e-6
    model = model.with_preset(size=(64, 48), frames=9, area=None)
    _, condition = peers.conditioned(name, model)
    same = model.condition("bad", peers.picture(name))
    rows = [
        c.branch(b)["encoder_hidden_states"] for c, b in ((condition, "uncond"), (same, "cond"))
    ]
    assert rows[0].shape != rows[1].shape or not torch.equal(*rows)  # another picture


def test_rows_of_hunyuan15_come_from_words():
    """Through its text encoders: those of the pipeline's own guided run; words in quotation marks
    have rows of their own.
    """
    from minicos.peers.verify import verify

    model = minicos.from_diffusers(peers.with_text_encoders_15(peers.pipeline("hunyuan15")))
    model = model.with_preset(negative_prompt="bad")
    (part,) = verify(model, (2, 2, 3))
    assert model.preset.guided and part.parted is None
    assert max(row.rel_max for row in part.rows) < 4e-6
    model = model.with_preset(size=(64, 48), frames=9, area=None, guidance=1.0)
    rows = [
        model.words(model.condition(prompt, peers.picture("hunyuan15")), "cond")
        for prompt in ("a ball left", 'a ball "left"')
    ]
    assert rows[1] - rows[0] > len("left")  # two signs, and letters with what ends them


@each
def test_side_by_side_with_the_pipeline_that_is_installed(name):
    """With the guidance of its preset, at another size than the golden's."""
    from minicos.peers.verify import verify

    changes = {}
    if name.startswith("ltx"):
        terms = {"stg": 1.0, "stg_blocks": (1,), "modality": 3.0, "rescale": 0.7}
        changes = {**terms, "audio_guidance": 7.0}
    (part,) = verify(peers.peer(name, **changes), (2, 2, 3))
    assert len(part.rows) == 4 * (2 if changes else 1)
    assert part.parted is None and max(row.rel_max for row in part.rows) < 4e-6


@each
def test_blocks_and_sublayers(name):
    found, record = peers.tensors(name), Record(lambda x: x)
    model = replace(peers.peer(name), picture_seed=7)
    _, condition = peers.conditioned(name, model)
    points = [k.removeprefix("out.") for k in found if k.startswith("out.blocks.")]
    hooks = sum((Hooks().on(p, record, step=1, branch="cond") for p in points), Hooks())
    x, state = found["loop.x.1"], None
    if "cog" in name:
        x = x / sum(rotation(model.schedule().sigmas[1]))
    if "loop.audio.1" in found:
        state = State(beside={AUDIO: found["loop.audio.1"]})
    step = next(model.sample(condition, noise=x, start=1, state=state, hooks=hooks))
    seen = {site.name: x for site, x in record.entries}
    assert set(seen) == set(points)
    for point in points:
        theirs = found[f"out.{point}"]
        if "cog" in name and point.endswith("ffn"):  # theirs is text and video in one tensor
            theirs = theirs[:, -seen[point].shape[1] :]
        assert rel_max(seen[point], theirs) < 1e-5, point  # measured 2.1e-6, with AVX-512 7.1e-6
    if "cog" not in name:  # whose velocity differs
        velocity = model.velocities((found["out.velocity"],) * 2, {"video": x}, None)["video"]
        assert rel_max(step.velocity_cond, velocity) < TOLERANCE


@each
def test_hooks_that_only_look_change_no_bit_and_nothing_is_left(name):
    model, condition = peers.conditioned(name)
    pipe = model.pipe
    before = dict(vars(pipe)), dict(vars(pipe.transformer))
    noise = model.noise(condition, 0)
    *_, plain = model.sample(condition, noise=noise)
    every = sum((Hooks().on(p, lambda x, site: None) for p in model.points), Hooks())
    *_, watched = model.sample(condition, noise=noise, hooks=every)
    assert torch.equal(watched.next, plain.next)
    with pytest.raises(ZeroDivisionError):
        list(model.sample(condition, noise=noise, hooks=Hooks().on("blocks.1", lambda x, s: 1 / 0)))
    with pytest.raises(ZeroDivisionError):
        hooks = Hooks().on("blocks.1.self_attn.q", lambda x, s: 1 / 0)
        list(model.sample(condition, noise=noise, hooks=hooks))
    after = dict(vars(pipe)), dict(vars(pipe.transformer))
    for then, now in zip(before, after, strict=True):
        assert then.keys() == now.keys() and all(then[k] is now[k] for k in then)
    for module in pipe.transformer.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


@each
def test_every_point_fires_with_its_shape_and_can_be_replaced(name):
    model, condition = peers.conditioned(name, peers.peer(name, guidance=1.0))
    seen = {}
    hooks = Hooks()
    for point in model.points:
        hooks = hooks.on(point, lambda x, site: seen.update({site.name: (x.shape, site)}))
    next(model.sample(condition, hooks=hooks))
    assert seen.keys() == model.points.keys()
    for point, (shape, site) in seen.items():
        assert len(shape) == len(model.points[point].split()), point
        f, h, w = site.grid
        if model.points[point] == "b l d":
            assert shape[1] == f * h * w, point
        elif model.points[point] in ("b j d", "b n l k") and "cross" not in point:
            rows = shape[-2]
            if "from_audio" not in point:
                start, stop, _ = site.video.indices(rows)
                assert stop - start == f * h * w, point
    noise = model.noise(condition, 0)
    plain = next(model.sample(condition, noise=noise)).velocity
    for point in ("embed", "blocks.0", "blocks.1.self_attn", "blocks.0.self_attn.q"):
        changed = next(
            model.sample(condition, noise=noise, hooks=Hooks().on(point, lambda x, s: 2 * x))
        )
        assert not torch.equal(changed.velocity, plain), point


@each
def test_a_replaced_point_is_exactly_its_part(name):
    """Zeros at a point are seen as zeros by the next point, and elsewhere nothing changes."""
    model, condition = peers.conditioned(name, peers.peer(name, guidance=1.0))
    if "blocks.0.joint" not in model.points:
        pytest.skip("video and text do not share blocks")
    seen = {}
    hooks = Hooks().on("blocks.0.text", lambda x, s: torch.zeros_like(x))
    hooks = hooks.on("blocks.0.joint", lambda x, s: seen.update(x=x, video=s.video))
    next(model.sample(condition, hooks=hooks))
    video = seen["x"][:, seen["video"]]
    assert video.any() and not seen["x"][:, video.shape[1] :].any()


@each
def test_a_flow_between_frames_is_cut(name):
    """Where text and video attend jointly, too."""
    model, condition = peers.conditioned(name, peers.peer(name, guidance=1.0))
    seen = []
    hooks = Knockout(Flow(Tokens((0,)), Tokens((1,)))).hooks()
    hooks = hooks.on("blocks.*.self_attn.pattern", lambda p, site: seen.append((p, site)))
    changed = next(model.sample(condition, hooks=hooks))
    assert not torch.equal(changed.velocity, next(model.sample(condition)).velocity)
    assert len(seen) == model.depth
    for p, site in seen:
        start, size = site.video.indices(p.shape[2])[0], site.grid[1] * site.grid[2]
        first, second = slice(start, start + size), slice(start + size, start + 2 * size)
        assert not p[..., second, first].any() and p[..., first, second].all()


@each
def test_a_flow_from_the_text_is_cut(name):
    """Without it, the prompt does not reach the video's queries, and other keys stay."""
    model, condition = peers.conditioned(name, peers.peer(name, guidance=1.0))
    joint, seen = "cross_attn" not in model.sublayers, []
    cut = Knockout(Flow(Text(), Tokens((1,)), joint=joint))
    within = "self_attn" if joint else "cross_attn"
    hooks = cut.hooks().on(f"blocks.*.{within}.allowed", lambda x, site: seen.append((x, site)))
    next(model.sample(condition, hooks=hooks))
    assert len(seen) == model.depth
    for allowed, site in seen:
        size, rows = site.grid[1] * site.grid[2], allowed[0, 0]
        start = site.video.indices(rows.shape[0])[0] if joint else 0
        video = torch.zeros(rows.shape[1], dtype=torch.bool)
        if joint:
            video[site.video] = True
        cut_rows = rows[start + size : start + 2 * size]
        assert not cut_rows[:, ~video].any() and cut_rows[:, video].all()
        assert rows[start : start + size, ~video].any(1).all()  # frame 0 reads it


def test_a_flow_is_cut_in_a_pass_of_the_models_own():
    """In the pass "stg", block 1 computes no self-attention: nothing flows there to be cut."""
    model, condition = peers.conditioned("ltx23", peers.peer("ltx23", **TERMS))
    noise, cut = model.noise(condition, 0), Flow(Tokens((0,)), Tokens((1,)))

    def velocities(**limits):
        hooks = Knockout(cut, **limits).hooks()
        return next(model.sample(condition, noise=noise, hooks=hooks)).velocities

    plain = next(model.sample(condition, noise=noise)).velocities
    others = [k for k in range(model.depth) if k != 1]
    for limits, changed in (
        ({"branch": "modality"}, {"modality"}),
        ({"branch": "stg", "layers": others}, {"stg"}),
        ({"layers": (1,)}, {"cond", "uncond", "modality"}),
        ({}, {"cond", "uncond", "stg", "modality"}),
    ):
        found = velocities(**limits)
        assert {k for k in plain if not torch.equal(found[k], plain[k])} == changed
    with pytest.raises(MinicosError, match=r"blocks\.1\.self_attn is not computed in the pass stg"):
        velocities(branch="stg")
    crossing = Hooks().on("blocks.0.from_audio.q", lambda x, s: None, branch="modality")
    with pytest.raises(MinicosError, match="not computed in the pass modality"):
        next(model.sample(condition, noise=noise, hooks=crossing))


@each
def test_the_frames_that_show_the_given_picture(name):
    """The frame in which the network receives it; for CogVideoX1.5 that is padding, and the next
    one is the video's first.
    """
    model, condition = peers.conditioned(name)
    assert model.pictured(condition) == ((0, 1) if "cog" in name else (0,))
    call, c = condition.branch("cond"), condition.shape[1]
    if condition.first is None:  # it is concatenated
        axis = 1 if "cog" in name else 2  # of the frames in a call
        beside = call["hidden_states"].narrow(3 - axis, c, c)  # the picture's channels
        given = beside.abs().amax(dim=tuple(i for i in range(5) if i != axis)) > 0
        assert given.nonzero().flatten().tolist() == [0]
    if "cog" in name:
        assert [[*model.frames_behind(f)] for f in (0, 1)] == [[], [0]]


@each
def test_resumes_bitwise(name):
    model, condition = peers.conditioned(name)
    steps = list(model.sample(condition, noise=model.noise(condition, 0)))
    state = State.from_tensors(steps[1].state.tensors())
    *_, last = model.sample(condition, noise=steps[1].next, start=2, state=state)
    assert torch.equal(last.next, steps[-1].next)


@each
def test_a_sample_is_the_same_alone_and_in_a_batch(name):
    model = peers.peer(name)
    _, one = peers.conditioned(name, model)
    two = model.condition(["solve the maze"] * 2, peers.picture(name))
    noise = model.noise(two, [0, 1])
    *_, both = model.sample(two, noise=noise)
    *_, alone = model.sample(one, noise=noise[1:])
    *_, picked = model.sample(two.take(torch.tensor([1])), noise=noise[1:])
    assert rel_max(alone.next, both.next[1:]) < 2e-5  # measured
    assert rel_max(picked.next, both.next[1:]) < 2e-5
    *_, repeated = model.sample(one.take(torch.tensor([0, 0])), noise=noise)
    assert rel_max(repeated.next, both.next) < 2e-5


def test_sound_travels_beside_and_survives_an_edit():
    model, condition = peers.conditioned("ltx2")
    noise = model.noise(condition, 0)
    assert torch.equal(model.beside(noise, condition)[AUDIO], model.beside(noise, condition)[AUDIO])
    other = model.beside(model.noise(condition, 1), condition)[AUDIO]
    assert not torch.equal(model.beside(noise, condition)[AUDIO], other)
    plain, edited = (list(model.sample(condition, noise=noise)) for _ in range(2))
    steps = []
    for step in model.sample(condition, noise=noise):
        if step.index == 1:
            before = step.state.beside[AUDIO]
            step.next = step.next + 0.1 * torch.randn(step.next.shape)
        steps.append(step)
    assert torch.equal(steps[1].state.beside[AUDIO], before)
    assert torch.equal(steps[1].state.beside[AUDIO], plain[1].state.beside[AUDIO])
    assert not torch.equal(steps[2].state.beside[AUDIO], edited[2].state.beside[AUDIO])
    with pytest.raises(MinicosError, match="denoises audio along"):
        model.sample(condition, noise=noise, start=1)


def test_log_sum_exp_is_no_by_product_of_their_attention():
    model = peers.peer("cogvideox15")
    assert gives_lse(minicos.load("tiny")) and not gives_lse(model)
    assert replace(model.ops, self_attention=REFERENCE.self_attention) == REFERENCE


def test_a_picture_keeps_its_levels():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    for one in as_pil(levels / 255):
        assert np.array_equal(np.asarray(one), levels[0].permute(1, 2, 0).numpy())


def test_a_first_frame_is_compressed_where_the_preset_says_so():
    plain, compressed = peers.peer("ltx2"), peers.peer("ltx2", image_crf=33)
    picture = peers.picture("ltx2")[None]
    assert plain.compressed(picture) is picture
    once = compressed.compressed(picture)
    assert once.shape == picture.shape and not torch.equal(once, picture)
    low, high = once.aminmax()
    assert low >= 0 and high <= 1


@each
def test_a_condition_prints_as_three_lines(name):
    model, condition = peers.conditioned(name)
    about, calls, given = repr(condition).splitlines()
    assert str(tuple(condition.shape)) in about and "cond" in calls
    assert ("imposed" in about) == model.imposes()
    assert f"hidden_states {tuple(condition.branch('cond')['hidden_states'].shape)}" in given


@each
def test_decodes(name):
    model, condition = peers.conditioned(name)
    video = model.decode(model.noise(condition, 0))
    shown = [f for frame in range(condition.shape[2]) for f in model.frames_behind(frame)]
    assert shown == list(range(video.shape[1]))
    assert video.shape[2:] == (*model.preset.size, 3) and video.dtype.name == "uint8"


def test_generate_is_condition_sample_and_decode():
    model, condition = peers.conditioned("cogvideox15")
    *_, last = model.sample(condition, seed=3)
    video = model.generate("solve the maze", peers.picture("cogvideox15"), seed=3)
    assert np.array_equal(video, model.decode(last.next)[0])


@pytest.mark.parametrize("how", ["swap", "stream"])
def test_an_offloaded_pipeline_is_the_same_model(how):
    """accelerate's own hooks, with the CPU as the card: our hooks see the same, and theirs stay."""
    accelerate = pytest.importorskip("accelerate")
    model, condition = peers.conditioned("cogvideox15")
    pipe = copy.deepcopy(model.pipe)
    if how == "swap":
        pipe.enable_model_cpu_offload(device="cpu")
    else:  # as enable_sequential_cpu_offload, which wants a card
        for network in (pipe.vae, pipe.transformer):
            accelerate.cpu_offload(network, torch.device("cpu"))
    offloaded = minicos.from_diffusers(pipe, embed=model.embed)
    assert offloaded.weights == model.weights
    _, same = peers.conditioned("cogvideox15", replace(offloaded, preset=model.preset))
    seen = []
    hooks = Hooks().on("blocks.1.self_attn.q", lambda x, site: seen.append(site.step))
    *_, step = replace(offloaded, preset=model.preset).sample(same, seed=0, hooks=hooks)
    *_, plain = model.sample(condition, seed=0)
    assert torch.equal(step.next, plain.next) and len(seen) == 2 * peers.STEPS
    assert {"_hf_hook", "forward"} <= vars(pipe.transformer).keys()


def test_a_network_without_weights_is_refused():
    pipe = copy.deepcopy(peers.pipeline("cogvideox15"))
    pipe.transformer.to("meta")
    with pytest.raises(MinicosError, match="CogVideoXTransformer3DModel has no weights"):
        minicos.from_diffusers(pipe)


def test_whole_compiled_networks_are_refused_with_the_remedy():
    model, condition = peers.conditioned("cogvideox15")
    pipe = model.pipe
    pipe.transformer.compile()
    try:
        with pytest.raises(MinicosError, match="compile_repeated_blocks"):
            next(model.sample(condition, hooks=Hooks().on("blocks.0", lambda x, s: None)))
    finally:
        pipe.transformer._compiled_call_impl = None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cogvideox15", {"solver": "unipc"}, "stepped by euler"),
        ("cogvideox15", {"shift": 5.0}, "its scheduler has none"),
        ("hunyuan_replace", {"boundary": 0.9}, "one network"),
        ("ltx2", {"nonsense": 1}, "nonsense"),
    ],
)
def test_what_a_family_does_not_have_is_refused(name, changes, message):
    with pytest.raises(MinicosError, match=message):
        peers.peer(name, **changes)


def test_steps_that_do_not_divide_1000_and_other_schedulers_are_refused():
    model = peers.peer("cogvideox15", steps=30)
    with pytest.raises(MinicosError, match="divisor of 1000"):
        model.schedule()
    import diffusers

    model.pipe.scheduler = diffusers.CogVideoXDPMScheduler()
    with pytest.raises(MinicosError, match="CogVideoXDDIMScheduler"):
        model.with_preset(steps=4).schedule()


def test_a_picture_of_another_shape_is_not_squashed():
    model = peers.peer("cogvideox15", area=64 * 48)
    with pytest.raises(MinicosError, match=r"size=\(48, 48\)"):
        model.condition("go", torch.rand(3, 60, 60))
    assert model.fitting((60, 60)) == (48, 48)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {"size": (96, 64)}, "at most 64x64 pixels, not 64x96"),
        ({}, {"frames": 8}, "frames"),
        ({"use_learned_positional_embeddings": True}, {}, "64x64 pixels and 9 frames alone"),
    ],
)
def test_sizes_that_the_positions_of_cogvideox_do_not_fit(config, changes, message, monkeypatch):
    model = peers.peer("cogvideox15", **changes)
    known = model.pipe.transformer._internal_dict
    monkeypatch.setattr(model.pipe.transformer, "_internal_dict", type(known)(known | config))
    with pytest.raises(MinicosError, match=message):
        model.condition("go", torch.rand(3, *model.preset.size))


@each
def test_decodes_in_tiles(name):
    """Large frames are as those of whole ones, nearly; a frame within one tile is exactly."""
    model, condition = peers.conditioned(name)
    latent, side = model.noise(condition, 0), model.stride[1]
    large = torch.nn.functional.interpolate(latent, scale_factor=(1, 2, 2), mode="trilinear")
    whole = model.decode(large)
    largest = max(large.shape[-2:]) * side
    assert (replace(model, tile=largest).decode(large) == whole).all()
    tiles = replace(model, tile=largest // 2).decode(large)
    assert tiles.shape == whole.shape and not (tiles == whole).all()
    with pytest.raises(MinicosError, match=f"a multiple of {side}"):
        peers.conditioned(name, replace(model, tile=side + 1))


def test_what_a_decoder_holds_is_counted_on_meta():
    """Twelve numbers at a time: the input is not its own, and what it drops is given back."""

    class Decoder(torch.nn.Module):
        config: ClassVar = {}

        def decode(self, x):
            x = x + 1
            x = torch.cat([x, x])  # 4 and 8
            return x[:1] * 2

    assert peak(Decoder(), torch.empty(1, 4, device="meta")) == 12 * 4


def test_arguments_that_move_unexpectedly_are_an_error(monkeypatch):
    from minicos.peers.ltx2 import LTX2

    monkeypatch.setattr(LTX2, "moving", frozenset({"hidden_states", "timestep"}))
    with pytest.raises(MinicosError, match="changes audio_timestep, sigma"):
        peers.conditioned("ltx2")


def test_a_pipeline_that_takes_no_first_frame_names_the_one_that_does():
    import diffusers

    pipe = diffusers.LTX2Pipeline(**peers.pipeline("ltx2").components)
    with pytest.raises(MinicosError, match=r"LTX2ImageToVideoPipeline\(\*\*pipe\.components\)"):
        minicos.from_diffusers(pipe)
    model = minicos.from_diffusers(diffusers.LTX2ImageToVideoPipeline(**pipe.components))
    assert model.variant == "LTX-2" and model.pipe.transformer is pipe.transformer


def test_other_pipelines_are_refused():
    import diffusers

    with pytest.raises(MinicosError, match="not a pipeline that minicos supports"):
        minicos.from_diffusers(diffusers.DDIMScheduler())
