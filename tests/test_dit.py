"""The diffusion transformer against the official code, tensor by tensor, through its own hook
points.
"""

import copy
import pickle
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minicos.config import VARIANTS, DiTConfig
from minicos.dit import FLOAT32, DiT
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.ops import REFERENCE, attention, gated_add, sinusoid
from minicos.points import points
from tests import golden
from tests.golden import rel_l2, rel_max

CASES = ("dit_i2v", "dit_t2v", "dit_ti2v", "dit_i2v21")  # the last with an image branch
DATA = {case: golden.read(case) for case in (*CASES, "dit_flf2v")}


@pytest.fixture
def given(padded):
    """case, i -> x, timestep, text, y, clip of the case's i-th forward pass."""

    def inputs(case: str, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        data = DATA[case]
        timestep = data["in.t"][i]  # b
        if "in.t_tokens" in data:  # one timestep per token, the same within a frame -> b f
            frames = data["in.t_tokens"][i].unflatten(1, (data["in.x"].shape[2], -1))
            assert (frames == frames[..., :1]).all()
            timestep = frames[..., 0]
        clip = data["in.clip_fea"][None] if "in.clip_fea" in data else None
        return data["in.x"], timestep, padded(data["in.context_0"]), data.get("in.y"), clip

    return inputs


def watch(
    network: DiT, *inputs, pattern: tuple[str, ...] = ("*", "*.*", "*.*.*", "*.*.*.*")
) -> dict[str, Tensor]:
    """Every tensor that a forward pass shows to hooks."""
    seen: dict[str, Tensor] = {}
    hooks = Hooks()
    for p in pattern:
        hooks = hooks.on(p, lambda x, site: seen.update({site.name: x}))
    network(*inputs, hooks=hooks)
    return seen


# -- the official outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("case", DATA)
def test_velocity_is_the_official_one(case, i, golden_dit, given):
    actual, expected = golden_dit(case)(*given(case, i)), DATA[case]["out.velocity"][i]
    assert rel_max(actual, expected) < 2.5e-6  # measured 7.4e-7
    assert rel_l2(actual, expected) < 2e-6  # measured 5.7e-7


# golden tensor -> the hook point that shows it, and the rows of the golden file cut from it
MIDDLE = {
    "tokens_in": ("embed", lambda x: x),
    "text_emb_rows": ("text", lambda x: x[:9]),  # seven real rows and two of padding
    "time_e0": ("time", lambda x: x[[0, -1]] if len(x) > 1 else x),  # first and last frame
    "q_rope_block0": ("blocks.0.self_attn.q", lambda x: x.transpose(0, 1)),  # n l k -> l n k
    "k_rope_block0": ("blocks.0.self_attn.k", lambda x: x.transpose(0, 1)),
    "self_attn_block0": ("blocks.0.self_attn", lambda x: x),
    "cross_attn_block0": ("blocks.0.cross_attn", lambda x: x),
    "block0": ("blocks.0", lambda x: x),
    "block1": ("blocks.1", lambda x: x),
    "img_emb_rows": ("image", lambda x: x[::64]),
}


@pytest.mark.parametrize("case", CASES)
def test_hook_points_show_the_official_tensors(case, golden_dit, given):
    seen = watch(golden_dit(case), *given(case, 0))
    for name, (point, rows) in MIDDLE.items():
        if point == "image" and point not in seen:
            continue
        actual, expected = rows(seen[point][0]), DATA[case][f"mid.{name}"]
        assert actual.shape == expected.shape, name
        assert rel_max(actual, expected) < 5e-6, name  # measured 1.5e-6 (cross-attention)
        assert rel_l2(actual, expected) < 2e-6, name  # measured 8.1e-7


@pytest.mark.parametrize("case", CASES)
def test_time_embedding_is_the_official_one(case, golden_dit, given):
    network, data = golden_dit(case), DATA[case]
    features = sinusoid(data["in.t"].flatten(), network.cfg.freq_dim)
    assert (
        features - data["mid.time_sinusoid"]
    ).abs().max() < 1e-7  # measured 3.0e-8, half a unit of float32
    _, timestep, *_ = given(case, 0)
    embedding = network.time_embedding(sinusoid(timestep.flatten(), network.cfg.freq_dim).float())
    rows = embedding[[0, -1]] if len(embedding) > 1 else embedding  # first and last frame
    assert rel_max(rows, data["mid.time_e"]) < 2e-6  # measured 5.7e-7


@pytest.mark.parametrize("case", CASES)
def test_the_points_without_a_golden_tensor_fit_those_with_one(case, golden_dit, given):
    """Each point is computed anew from the points before it."""
    network = golden_dit(case)
    seen = watch(network, *given(case, 0))
    x = seen["embed"]
    for i, block in enumerate(network.blocks):

        def at(name, i=i):
            return seen[f"blocks.{i}.{name}"]

        _, _, gate, _, _, ffn_gate = (block.modulation + seen["time"]).unbind(2)
        for module in (block.self_attn, block.cross_attn):
            name = "self_attn" if module is block.self_attn else "cross_attn"
            heads = attention(at(f"{name}.q"), at(f"{name}.k"), at(f"{name}.v"))
            assert torch.equal(at(f"{name}.heads"), heads)
            if f"blocks.{i}.{name}.heads_img" in seen:
                looks = attention(at(f"{name}.q"), at(f"{name}.k_img"), at(f"{name}.v_img"))
                assert torch.equal(at(f"{name}.heads_img"), looks)
                assert torch.equal(at(f"{name}.v_img"), module.heads(module.v_img(seen["image"])))
                heads = heads + looks
            assert torch.equal(at(name), module.o(heads.transpose(1, 2).flatten(2)))
        assert torch.equal(
            at("cross_attn.v"), block.cross_attn.heads(block.cross_attn.v(seen["text"]))
        )
        x = gated_add(x, at("self_attn"), gate) + at("cross_attn")
        x = gated_add(x, at("ffn"), ffn_gate)
        assert torch.equal(seen[f"blocks.{i}"], x)


@pytest.mark.parametrize("case", ["dit_i2v", "dit_i2v21"])
def test_epsilons_are_the_official_ones(case, golden_dit, given):
    """Weights, and CLIP features, scaled down until the epsilon of each norm shows: a wrong one
    is off by 0.5 % or more.
    """
    weights = golden_dit(case).state_dict() | {"in.clip_fea": torch.ones(())}
    for pattern, factor in golden.info("eps")["config"]["scaling"][case]:
        base, exponent = factor.split("**")
        weights = {
            k: v * int(base) ** int(exponent) if re.search(pattern, k) else v
            for k, v in weights.items()
        }
    smaller = weights.pop("in.clip_fea")
    network = DiT(golden_dit(case).cfg).requires_grad_(False)
    network.load_state_dict(weights)
    *others, clip = given(case, 0)
    velocity = network(*others, None if clip is None else clip * smaller)
    assert rel_max(velocity, golden.read("eps")[f"{case}.velocity"]) < 2e-6  # measured 5.3e-7


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residual", "to_autocast", "to_float32"),
    [
        # measured 6.5e-4 (the official policy: the same roundings) and 2.2e-3
        (torch.float32, 2e-3, 4e-3),
        (torch.bfloat16, 8e-3, 8e-3),  # measured 3.7e-3 and 3.7e-3 (DiffSynth's residual stream)
    ],
)
def test_bfloat16_is_as_close_to_the_official_autocast_as_expected(
    residual, to_autocast, to_float32, golden_dit, given
):
    data, expected = golden.read("dit_i2v_bf16"), DATA["dit_i2v"]["out.velocity"]
    network = DiT(golden.config(DiTConfig, "dit_i2v"), residual_dtype=residual).requires_grad_(
        False
    )
    network.load_state_dict(golden_dit("dit_i2v").state_dict())
    for name, p in network.named_parameters():
        if not any(part in name for part in FLOAT32):
            p.data = p.data.bfloat16()
    assert {p.dtype for p in network.parameters()} == {torch.float32, torch.bfloat16}
    for i in range(3):
        velocity = network(*given("dit_i2v", i))
        assert velocity.dtype == torch.float32
        assert rel_l2(velocity, data["out.velocity.autocast"][i]) < to_autocast
        assert rel_l2(velocity, expected[i]) < to_float32
    stream = watch(network, *given("dit_i2v", 0), pattern=("blocks.*",))["blocks.1"][0].float()
    # measured 1.6e-4 and 4.5e-3, and 2.3e-3 instead of the former under PyTorch 2.8
    assert rel_l2(stream, data["mid.autocast.block1"]) < 2 * to_autocast


def test_the_image_branch_in_bfloat16(golden_dit, given):
    network = copy.deepcopy(golden_dit("dit_i2v21"))
    for name, p in network.named_parameters():
        if not any(part in name for part in FLOAT32):
            p.data = p.data.bfloat16()
    kept = {n for n, p in network.named_parameters() if p.dtype == torch.float32 and "img" in n}
    assert kept == {f"img_emb.proj.{i}.{leaf}" for i in (0, 4) for leaf in ("weight", "bias")} | {
        f"blocks.{i}.cross_attn.norm_k_img.weight" for i in range(2)
    }
    seen = watch(network, *given("dit_i2v21", 0))
    assert seen["blocks.0.cross_attn.heads_img"].dtype == torch.bfloat16
    assert rel_l2(seen["velocity"], DATA["dit_i2v21"]["out.velocity"][0]) < 8e-3  # measured 2.7e-3


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_residual_stream_has_its_own_dtype(residual, small_dit):
    network = DiT(small_dit().cfg, residual_dtype=residual).requires_grad_(False)
    seen = watch(network, torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 8))
    assert {seen[f"blocks.{i}"].dtype for i in range(2)} == {residual}
    assert seen["velocity"].dtype == torch.float32


def test_every_sum_of_a_block_is_rounded_to_the_residual_dtype(small_dit):
    """And the tokens that enter the blocks lie in memory as b l d."""
    streams = []

    def kept(op):
        def run(*args):
            out = op(*args)
            streams.append((out[0] if isinstance(out, tuple) else out).dtype)
            return out

        return run

    sums = ("gated_add_norm", "add_modulated_norm", "gated_add")
    bundle = replace(REFERENCE, **{name: kept(getattr(REFERENCE, name)) for name in sums})
    network = DiT(small_dit().cfg, bundle, torch.bfloat16).requires_grad_(False)
    laid = []
    hooks = Hooks().on("embed", lambda x, site: laid.append(x.is_contiguous()))
    given = torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 8)
    network(*given, hooks=hooks)
    assert streams == [torch.bfloat16] * 6  # three in each of two blocks
    assert laid == [True]


# -- the contract ----------------------------------------------------------------------------------


@pytest.fixture
def batch():
    """x, timestep, text of two different samples, three frames of 3x2 tokens."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 3, 6, 4, generator=draw),
        torch.tensor([900.0, 30.5]),
        torch.randn(2, 5, 8, generator=draw),
    )


def test_samples_of_a_batch_do_not_see_each_other(small_dit, batch):
    network = small_dit()
    together = network(*batch)
    for i in range(2):
        assert (
            rel_max(together[i : i + 1], network(*(part[i : i + 1] for part in batch))) < 1.5e-6
        )  # measured 3.5e-7


def test_one_timestep_per_frame_equals_one_per_sample_where_all_are_equal(small_dit, batch):
    network, (x, t, text) = small_dit(), batch
    assert (
        rel_max(network(x, t[:, None].expand(2, 3), text), network(x, t, text)) < 1.5e-6
    )  # measured 3.1e-7
    assert (
        rel_max(
            network(x, torch.tensor([[0.0, 900, 900], [0, 30.5, 30.5]]), text), network(x, t, text)
        )
        > 1e-2
    )


def test_integer_timesteps_are_exact(small_dit, batch):
    network, (x, _, text) = small_dit(), batch
    assert torch.equal(
        network(x, torch.tensor([937, 41]), text), network(x, torch.tensor([937.0, 41.0]), text)
    )


def test_padding_rows_take_part_in_attention(golden_dit, given):
    x, t, text, y, _ = given("dit_i2v", 0)
    network = golden_dit("dit_i2v")
    assert rel_max(network(x, t, text[:, :7], y), network(x, t, text, y)) > 1e-2


def test_any_grid_in_any_order(small_dit, batch):
    """The rotations are kept for one grid; another grid in between changes nothing."""
    network, (x, t, text) = small_dit(), batch
    first = network(x, t, text)
    network(x.transpose(3, 4), t, text)
    assert torch.equal(network(x, t, text), first)
    assert torch.equal(small_dit()(x.transpose(3, 4), t, text), network(x.transpose(3, 4), t, text))


@pytest.mark.parametrize(
    ("channels", "extra", "size", "message"),
    [
        (16, None, (4, 4), "an image"),
        (16, 24, (4, 4), "no image"),
        (16, 20, (5, 4), "5x4"),
        (16, 20, (4, 7), "4x7"),
    ],
)
def test_wrong_inputs_are_named(channels, extra, size, message, golden_dit):
    y = None if extra is None else torch.zeros(1, extra, 1, *size)
    with pytest.raises(MinicosError, match=message):
        golden_dit("dit_i2v")(
            torch.zeros(1, channels, 1, *size), torch.zeros(1), torch.zeros(1, 512, 48), y
        )


@pytest.mark.parametrize("layer", [-1, 3, 1.5, 1.0])
def test_a_layer_to_stop_at_that_is_not_there_is_refused(layer, small_dit):
    x, time, text = torch.zeros(1, 4, 1, 4, 4), torch.zeros(1), torch.zeros(1, 5, 8)
    with pytest.raises(MinicosError, match=f"^stop_at_layer {layer}: give 0 to 2$"):
        small_dit(0)(x, time, text, stop_at_layer=layer)


def test_clip_features_are_checked(golden_dit, small_dit, given, batch):
    *inputs, clip = given("dit_i2v21", 0)
    for wrong, says in (
        (None, "was given no CLIP"),
        (clip[:, :256], r"was given CLIP features of \(b, 256, 1280\)"),
    ):
        with pytest.raises(
            MinicosError, match=r"takes CLIP features of \(b, 257, 1280\), and " + says
        ):
            golden_dit("dit_i2v21")(*inputs, wrong)
    with pytest.raises(MinicosError, match="takes no CLIP features, and was given"):
        small_dit()(*batch, clip=clip)


def test_first_and_last_image_are_told_apart(golden_dit, given):
    *inputs, clip = given("dit_flf2v", 0)
    network = golden_dit("dit_flf2v")
    assert rel_max(network(*inputs, clip.roll(257, dims=1)), network(*inputs, clip)) > 1e-2
    network = golden_dit("dit_i2v21")  # attention does not depend on the order of rows
    *inputs, clip = given("dit_i2v21", 0)
    assert (
        rel_max(network(*inputs, clip.flip(1)), network(*inputs, clip)) < 1.5e-6
    )  # measured 5.1e-7


def test_two_frames_stand_apart_under_a_time_skip(small_dit, batch):
    network, (x, t, text) = small_dit(), batch
    three, two = network(x, t, text), network(x[:, :, :2], t, text)
    skipping = small_dit()
    skipping.time_skip = 7
    assert torch.equal(skipping(x, t, text), three)
    assert rel_max(skipping(x[:, :, :2], t, text), two) > 1e-3
    assert torch.equal(skipping(x[:, :, :1], t, text), network(x[:, :, :1], t, text))


def test_every_op_is_taken_from_the_bundle(small_dit, batch):
    calls = Counter()

    def counted(name):
        def op(*args, **kwargs):
            calls[name] += 1
            return getattr(REFERENCE, name)(*args, **kwargs)

        return op

    norms = ("modulated_norm", "gated_add_norm", "add_modulated_norm")
    names = ("rms_rope", *norms, "gated_add", "self_attention", "attention")
    bundle = replace(REFERENCE, **{name: counted(name) for name in names})
    network = DiT(small_dit().cfg, bundle).requires_grad_(False)
    network.load_state_dict(small_dit().state_dict())
    assert torch.equal(network(*batch), small_dit()(*batch))
    assert calls == dict.fromkeys(names, 2) | {"modulated_norm": 3}  # two blocks and the head


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))]
)
def test_a_network_can_be_copied_and_pickled(duplicate, small_dit, batch):
    network = small_dit()
    assert torch.equal(duplicate(network)(*batch), network(*batch))


# -- the table of hook points ----------------------------------------------------------------------


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("image_tokens", [0, 257, 514])
def test_points_are_what_a_forward_pass_calls(layers, image_tokens, per_frame, small_dit, batch):
    """The same names in the same order, and every letter means one size throughout."""
    network, (x, t, text) = (
        small_dit(num_layers=layers, image_tokens=image_tokens, image_dim=6),
        batch,
    )
    clip = torch.ones(2, image_tokens, 6) if image_tokens else None
    seen = watch(network, x, t[:, None].expand(2, 3) if per_frame else t, text, None, clip)
    table = points(network.cfg)
    assert list(table) == list(seen)
    sizes = {
        "b": 2,
        "c": 4,
        "l": 18,
        "d": 24,
        "n": 2,
        "k": 12,
        "t": 5,
        "6": 6,
        "e": 32,
        "g": 3 if per_frame else 1,
        "m": image_tokens,
    }
    for name, shape in table.items():
        grid = (
            {"f": 3, "h": 6, "w": 4} if name == "velocity" else {}
        )  # of latents there, elsewhere of tokens
        assert seen[name].shape == tuple((sizes | grid)[letter] for letter in shape.split()), name


@pytest.mark.parametrize(
    ("variant", "count"), [("tiny", 280), ("Wan2.2-I2V-A14B", 924), ("Wan2.1-FLF2V-14B", 1165)]
)
def test_number_of_points(variant, count):
    table, branch = points(VARIANTS[variant]), VARIANTS[variant].images > 0
    assert len(table) == count == 4 + branch + (23 + 6 * branch) * VARIANTS[variant].num_layers
    assert table.get("image") == ("b m d" if branch else None)
    assert table.get("blocks.2.cross_attn.k_img") == ("b n m k" if branch else None)
    assert table["blocks.2.cross_attn.k"] == "b n t k"
    assert table["blocks.2.cross_attn.pattern"] == "b n l t"
    assert table["blocks.2.ffn.hidden"] == "b l e"
    assert table["velocity"] == "b c f h w"
    assert table["time"] == "b g 6 d"
