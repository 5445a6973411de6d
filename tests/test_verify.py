"""`minicos verify`: it is silent if two networks agree, and names the layer where they do
not.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import minicos
from minicos import open as opening
from minicos import plan, verify
from minicos.cli import main
from minicos.cli import verify as cli
from minicos.clip import CLIP
from minicos.config import CLIPConfig
from minicos.errors import MinicosError
from minicos.stream import HostBuffer
from minicos.verify import Part, Row, compare_dit, compare_text, compare_vae
from minicos.wan import Wan

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def wan(toy) -> Wan:
    """The embedded model's shapes with random weights."""
    return minicos.load(toy)


@pytest.fixture(scope="module")
def given() -> tuple[Tensor, ...]:
    """x, timestep, text of the small network, 2 x 2 x 3 tokens."""
    draw = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 4, 2, 4, 6, generator=draw),
        torch.tensor([[700.0]]),
        torch.randn(1, 5, 8, generator=draw),
    )


def first(pairs: list, tolerance: float = 5e-6) -> str | None:
    """Where two networks first differ."""
    row = Part("", verify._rows(pairs, tolerance)).parted
    return row and row.point


def scaled(module: nn.Module, leaf: str = "weight") -> None:
    """A parameter a hundredth larger, in place of the one that is shared with our network."""
    setattr(module, leaf, nn.Parameter(1.01 * getattr(module, leaf), requires_grad=False))


# -- the peers share our weights -------------------------------------------------------------------


def pointers(network: nn.Module) -> set[int]:
    return {p.data_ptr() for p in network.parameters()}


def test_a_peer_is_built_around_our_tensors(wan):
    for ours, theirs in (
        (wan.experts["high"], verify.diffusers_dit(wan.experts["high"])),
        (wan.vae, verify.diffusers_vae(wan.vae)),
        (wan.text, verify.transformers_umt5(wan.text)),
    ):
        assert pointers(theirs) == pointers(ours)
        assert not any(
            p.is_meta or p.requires_grad for p in (*theirs.parameters(), *theirs.buffers())
        )


def test_only_what_a_peer_keeps_in_another_dtype_is_copied(small_dit):
    ours = small_dit().bfloat16()
    theirs = verify.diffusers_dit(ours)
    copies = [name for name, p in theirs.named_parameters() if p.data_ptr() not in pointers(ours)]
    assert copies
    assert all(any(part in name for part in theirs._keep_in_fp32_modules) for name in copies)


# -- every point is compared, and each fault is reported with its layer ----------------------------


def test_every_hook_point_has_a_counterpart(small_dit, given):
    ours = small_dit()
    compared = [point for point, _, _ in compare_dit(ours, verify.diffusers_dit(ours), *given)]
    points = minicos.points.points(ours.cfg)
    # not the output of any module of diffusers
    inside = (".allowed", ".pattern", ".lse", ".gate", ".stream")
    expected = [name for name in points if not name.endswith(inside)]
    assert sorted(compared) == sorted(expected)
    assert compared[-1] == "velocity"


def shipped_time() -> nn.Module:
    """The time sinusoid of diffusers."""
    from diffusers.models.embeddings import Timesteps

    return Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)


FAULTS: dict[str, tuple[Callable[[nn.Module], None], str | None]] = {
    "none": (lambda net: None, None),
    "patches": (lambda net: scaled(net.patch_embedding), "embed"),
    "text": (lambda net: scaled(net.condition_embedder.text_embedder.linear_1), "text"),
    "time": (lambda net: scaled(net.condition_embedder.time_embedder.linear_2), "time"),
    "time in float32": (
        lambda net: setattr(net.condition_embedder, "timesteps_proj", shipped_time()),
        "time",
    ),
    "modulation": (lambda net: scaled(net.blocks[1], "scale_shift_table"), "blocks.1.self_attn.q"),
    "self-attention's q": (lambda net: scaled(net.blocks[0].attn1.norm_q), "blocks.0.self_attn.q"),
    "self-attention's o": (lambda net: scaled(net.blocks[1].attn1.to_out[0]), "blocks.1.self_attn"),
    "rotation": (lambda net: net.rope.freqs_cos.mul_(1.01), "blocks.0.self_attn.q"),
    "norm before cross-attention": (
        lambda net: scaled(net.blocks[1].norm2),
        "blocks.1.cross_attn.q",
    ),
    "cross-attention's k": (
        lambda net: scaled(net.blocks[1].attn2.norm_k),
        "blocks.1.cross_attn.k",
    ),
    "epsilon": (
        lambda net: setattr(net.blocks[1].attn2.norm_q, "eps", 1e-4),
        "blocks.1.cross_attn.q",
    ),
    "feed-forward": (lambda net: scaled(net.blocks[0].ffn.net[2]), "blocks.0.ffn"),
    "epsilon of a norm": (
        lambda net: setattr(net.blocks[0].norm3, "eps", 1e-4),
        "blocks.0.ffn.hidden",
    ),
    "head": (lambda net: scaled(net.proj_out), "velocity"),
    "NaN": (
        lambda net: setattr(
            net.blocks[1].attn2.to_v, "bias", nn.Parameter(torch.full((24,), float("nan")), False)
        ),
        "blocks.1.cross_attn.v",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_transformer_is_told_by_its_layer(fault, small_dit, given):
    ours = small_dit()
    theirs = verify.diffusers_dit(ours)
    spoil, where = FAULTS[fault]
    spoil(theirs)
    assert first(compare_dit(ours, theirs, *given)) == where


@pytest.mark.parametrize("exact_time", [True, False])
def test_one_timestep_for_each_frame(exact_time, small_dit, given):
    """As TI2V-5B has it, where a first frame is imposed."""
    x, _, text = given
    ours, t = small_dit(), torch.tensor([[0.0, 873.0]])
    pairs = compare_dit(ours, verify.diffusers_dit(ours, exact_time), x, t, text)
    assert (
        first(pairs, verify.TOLERANCE[torch.float32] if exact_time else verify.AS_SHIPPED) is None
    )
    ((time, theirs),) = ((a, b) for point, a, b in pairs if point == "time")
    assert time.shape == theirs.shape == (1, 2, 6, 24)
    other = compare_dit(ours, verify.diffusers_dit(ours, exact_time), x, t.flip(1), text)
    assert first([("velocity", pairs[-1][1], other[-1][2])]) == "velocity"


def test_faults_of_the_vae(wan):
    draw = torch.Generator().manual_seed(1)
    given = (
        torch.rand(1, 3, 9, 16, 32, generator=draw) * 2 - 1,
        torch.randn(1, 16, 3, 2, 4, generator=draw),
    )
    for spoil, where in (
        (lambda net: None, None),
        (lambda net: scaled(net.encoder.down_blocks[2].conv1), "encoder.downsamples.2.residual.2"),
        (
            lambda net: scaled(net.encoder.down_blocks[3].time_conv),
            "encoder.downsamples.4.shortcut",
        ),  # seen after it
        (
            lambda net: scaled(net.decoder.up_blocks[0].upsamplers[0].time_conv),
            "decoder.upsamples.2.time_conv",
        ),
        (lambda net: scaled(net.decoder.conv_out), "decoder.head.2"),
        (lambda net: scaled(net.post_quant_conv), "conv2"),
    ):
        theirs = verify.diffusers_vae(wan.vae)
        spoil(theirs)
        assert first(compare_vae(wan.vae, theirs, *given)) == where


def test_faults_of_the_text_encoder(wan):
    ids = torch.randint(2, 30, (2, 16), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(16) < torch.tensor([[16], [5]])).long()
    for spoil, where in (
        (lambda net: None, None),
        (lambda net: scaled(net.encoder.block[1].layer[0].SelfAttention.k), "blocks.1.attn.k"),
        (
            lambda net: scaled(net.encoder.block[0].layer[0].SelfAttention.relative_attention_bias),
            "blocks.0.pos_embedding.embedding",
        ),
        (
            lambda net: setattr(net.encoder.block[1].layer[1].layer_norm, "variance_epsilon", 1e-2),
            "blocks.1.norm2",
        ),
        (lambda net: scaled(net.encoder.final_layer_norm), "norm"),
    ):
        theirs = verify.transformers_umt5(wan.text)
        spoil(theirs)
        assert first(compare_text(wan.text, theirs, ids, mask)) == where


def test_a_row_without_a_number_is_not_fine():
    assert Row("", 0, 0, 1e-9).ok
    assert not Row("", 0, float("nan"), 1e-9).ok
    assert verify.distance(torch.zeros(2), torch.zeros(2)) == (0, 0)
    assert verify.distance(torch.ones(2), torch.zeros(2))[1] == float("inf")
    assert verify.distance(torch.ones(2), torch.ones(3))[1] == float("inf")


# -- a model ---------------------------------------------------------------------------------------


def test_peers_that_cannot_be_imported(monkeypatch):
    class Lazy(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(f"Failed to import {name} because of:\nno docstring of it")

    monkeypatch.setitem(sys.modules, "diffusers", Lazy("diffusers"))
    with pytest.raises(MinicosError, match=r"cannot be used here \(no docstring of it\)"):
        verify.peers()


def test_the_embedded_model_agrees_with_its_peers():
    """With a margin: the worst layer, in the VAE's decoder, differs by 5.4e-7."""
    parts = list(verify.verify(minicos.load("tiny"), (2, 2, 3), tolerance=2e-6))
    assert [part.name for part in parts] == ["text", "high", "low", "vae"]
    assert not any(part.parted for part in parts)
    for part in parts[1:3]:
        *_, velocity, shipped = part.rows
        assert velocity.rel_max < 5e-7  # measured 0
        assert shipped.point == "velocity, diffusers as shipped"
        assert 0 < shipped.rel_l2 < shipped.tolerance == verify.AS_SHIPPED  # measured 4.3e-7


def test_bfloat16_is_told_from_a_fault(toy):
    wan = minicos.load(toy, dtype=torch.bfloat16)
    high = {part.name: part for part in verify.verify(wan, (2, 2, 3))}["high"]
    assert high.parted is None
    assert 1e-4 < max(row.rel_l2 for row in high.rows) < 2e-2  # measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residency", ["swap", "stream", "disk"])
def test_weights_on_the_move_are_compared_as_those_that_stay(residency, dtype, toy, monkeypatch):
    """Bit for bit, although what is not on the device has no number there, as on a card."""
    expected = list(verify.verify(minicos.load(toy, dtype=dtype), (2, 2, 2)))
    wan, bind = minicos.load(toy, dtype=dtype, residency=residency), HostBuffer.bind

    def nowhere(buffer, memory=None):
        empty = torch.full((buffer.size,), 0xFF, dtype=torch.uint8)
        bind(buffer, empty if memory is None else memory)

    monkeypatch.setattr(HostBuffer, "bind", nowhere)
    away = wan.residency._offloaded.values()
    streamed = [] if residency == "swap" else wan.residency._streamer.host.values()
    for buffer in (*away, *streamed):
        buffer.bind()
    assert list(verify.verify(wan, (2, 2, 2))) == expected


def test_a_fault_is_told_by_its_layer_where_blocks_come_from_files(toy, monkeypatch):
    wan = minicos.load(toy, residency="disk")
    to_out = wan.experts["high"].blocks[5].self_attn.o
    forward = to_out.forward
    monkeypatch.setattr(to_out, "forward", lambda x: forward(x) * 1.001)
    high = {part.name: part for part in verify.verify(wan, (2, 2, 2))}["high"]
    assert high.parted.point == "blocks.5.self_attn"


def test_an_image_branch_that_is_not_compared_says_so(wan):
    network = wan.experts["high"]
    network = type(network)(replace(network.cfg, image_tokens=257))
    parts = [
        part
        for part in verify.verify(replace(wan, experts={"high": network}), (1, 2, 2))
        if part.name != "vae"
    ]
    assert not parts[1].rows
    assert "text length of 512" in parts[1].skipped
    assert (
        cli.verdict("it", "them", parts)
        == f"it agrees with them at all of {len(parts[0].rows)} points. Not compared: high."
    )


def test_the_worst_of_a_kind_is_shown():
    rows = [Row(f"blocks.{i}.ffn", x, x, 1e-3) for i, x in enumerate((1e-5, float("nan"), 1e-2, 0))]
    assert cli.folded(rows) == {"blocks.*.ffn": rows[1]}
    assert cli.folded(rows[2:]) == {"blocks.*.ffn": rows[2]}
    found = cli.to_json([Part("high", tuple(rows))])
    assert found["first"]["point"] == "blocks.1.ffn"
    assert found["first"]["rel_l2"] is None
    json.dumps(found, allow_nan=False)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def told(toy, capsys):
    """Options -> exit code, stdout, stderr."""

    def run(*options: str) -> tuple[int, str, str]:
        try:
            code = main(["verify", "--model", str(toy), "--grid", "2,2,2", *options])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_agreement_is_exit_code_0(told):
    code, out, err = told()
    *table, last = out.splitlines()
    assert (code, err) == (0, "")
    assert last.startswith("tiny (float32 on cpu) agrees with diffusers ")
    assert sum("blocks.*.self_attn.heads" in line for line in table) == 1
    assert "parted" not in out
    assert len(told("--all")[1].splitlines()) > len(table) + 100


def test_a_fault_is_exit_code_1_and_told_by_its_layer(told, monkeypatch):
    build = verify.diffusers_dit

    def spoiled(ours, exact_time=True):
        theirs = build(ours, exact_time)
        scaled(theirs.blocks[7].attn2.to_k)
        return theirs

    monkeypatch.setattr(verify, "diffusers_dit", spoiled)
    code, out, _ = told()
    assert code == 1
    assert ", first at high blocks.7.cross_attn.k: rel_l2 " in out.splitlines()[-1]
    assert "  blocks.*.cross_attn.k " in out
    code, out, _ = told("--json")
    found = json.loads(out)
    assert (code, found["ok"], found["model"], found["dtype"]) == (1, False, "tiny", "float32")
    assert (found["first"]["part"], found["first"]["point"]) == ("high", "blocks.7.cross_attn.k")
    assert [part["name"] for part in found["parts"]] == ["text", "high", "vae"]
    wrong = {row["point"] for part in found["parts"] for row in part["rows"] if not row["ok"]}
    assert "blocks.6" not in wrong
    assert {"blocks.7", "velocity", "velocity, diffusers as shipped"} < wrong


def test_as_shipped_is_told_apart(told):
    shipped, exact = (json.loads(told("--json", *options)[1]) for options in (["--as-shipped"], []))
    rows = [{row["point"]: row for row in found["parts"][1]["rows"]} for found in (shipped, exact)]
    assert rows[0]["time"]["rel_l2"] > 1e-7 > rows[1]["time"]["rel_l2"]
    assert rows[0]["velocity"]["rel_l2"] == rows[1]["velocity, diffusers as shipped"]["rel_l2"]


@pytest.mark.parametrize("residency", ["swap", "stream", "disk"])
def test_any_residency_can_be_asked_for(residency, told):
    code, out, _ = told("--residency", residency)
    assert code == 0 and "agrees with diffusers" in out


@pytest.fixture
def planned(monkeypatch) -> list[tuple]:
    """The frames, height and width of every video that memory is planned for."""
    seen, plan_of = [], opening._Wish.plan
    monkeypatch.setattr(
        opening._Wish, "plan", lambda wish: (seen.append(wish.video), plan_of(wish))[1]
    )
    return seen


def test_memory_is_for_the_compared_video_and_its_plan_is_printed(told, planned, monkeypatch):
    monkeypatch.setattr("minicos.cli.opening.LARGE", 0)
    code, _, err = told("--residency", "stream")
    assert code == 0 and planned == [(5, 32, 32)]
    assert err.startswith("plan: stream on cpu") and "  expected peak " in err
    assert "s a step" not in err and "  operations: " in err


def test_height_and_width_are_those_of_the_compared_frames(toy, planned, capsys):
    given = ["verify", "--model", str(toy), "--json", "--tolerance", "1e-4"]
    assert main([*given, "--height", "32", "--width", "48"]) == 0
    size = json.loads(capsys.readouterr().out)
    assert planned == [(9, 32, 48)]
    assert main([*given, "--grid", "3,2,3"]) == 0
    assert json.loads(capsys.readouterr().out) == size
    assert main([*given, "--height", "40", "--width", "48"]) == 2
    assert "both sides must be multiples of 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fits", "words"),
    [
        (["--residency", "resident"], lambda p: p.residency == "disk", "--residency auto"),
        ([], lambda p: p.dtype == torch.bfloat16, "--dtype bfloat16"),
        (
            ["--residency", "stream"],
            lambda p: p.dtype == torch.bfloat16 and p.residency == "disk",
            "--residency auto --dtype bfloat16",
        ),
    ],
)
def test_the_remedy_works_when_it_is_typed(options, fits, words, told, monkeypatch):
    monkeypatch.setattr(plan, "_fits", lambda one, free, host: fits(one))
    code, out, err = told(*options)
    assert (code, out) == (2, "")
    assert "not enough memory for the plan" in err
    assert err.endswith(f" It fits with {words}.\n")
    assert told(*options, *words.split())[0] == 0


def test_where_nothing_fits_no_option_is_advised(told, planned, monkeypatch):
    monkeypatch.setattr(plan, "_fits", lambda one, free, host: False)
    code, _, err = told()
    assert code == 2
    assert err.endswith(". Take a device, or a machine, with more memory.\n")
    monkeypatch.setattr(plan, "_fits", lambda one, free, host: planned[-1] == (9, 64, 96))
    assert told()[2].endswith(". It fits without --grid, --height and --width.\n")


def test_out_of_memory_advises_what_the_verb_has(told, monkeypatch):
    def fail(*given):
        raise MemoryError

    monkeypatch.setattr(verify, "compare_vae", fail)
    code, _, err = told()
    assert code == 2
    assert "out of memory. Take a smaller --grid, --dtype bfloat16 or --residency stream." in err


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_without_a_peer(package, told, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = told()
    assert (code, out) == (2, "")
    assert f"{package}" in err
    assert err.endswith('`pip install -e ".[peers]"`\n')
    with pytest.raises(MinicosError, match=package):
        verify.verify(None)  # at the call, before anything runs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--grid", "3,4"], "'3,4' is not three positive numbers"),
        (["--grid", "0,4,6"], "'0,4,6' is not three positive numbers"),
        (["--tolerance", "none"], "'none' is not a number"),
        (["--tolerance", "-1"], "'-1' is not a positive number"),
        (["--tolerance", "nan"], "'nan' is not a number"),
        (["--height", "32", "--width", "32"], "another way to say --height and --width"),
        (["--height", "32"], "--height and --width go together"),
        (["--residency", "nowhere"], "invalid choice: 'nowhere'"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--model", "nonsense"], "nonsense is not a folder with a model"),
    ],
)
def test_mistakes(options, says, told):
    code, out, err = told(*options)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


# -- the image branch of Wan2.1 --------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [257, 514])
def test_a_fault_of_the_image_branch_is_told_by_its_layer(tokens, small_dit):
    ours = small_dit(in_dim=9, image_tokens=tokens, image_dim=12, text_len=512)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 4, 2, 4, 6, generator=draw), torch.randn(1, 5, 2, 4, 6, generator=draw)
    text, clip = torch.randn(1, 512, 8, generator=draw), torch.randn(1, tokens, 12, generator=draw)
    theirs = verify.diffusers_dit(ours)

    def pairs():
        return compare_dit(ours, theirs, x, torch.tensor([[700.0]]), text, y, clip)

    points = {name for name, _, _ in pairs()}
    assert {"image", "blocks.1.cross_attn.k_img", "blocks.1.cross_attn.v_img", "velocity"} <= points
    assert first(pairs()) is None
    scaled(theirs.blocks[1].attn2.add_v_proj)
    assert first(pairs()) == "blocks.1.cross_attn.v_img"


def test_clip_block_by_block():
    ours = CLIP(
        CLIPConfig(image_size=28, patch_size=14, dim=24, num_heads=2, num_layers=4)
    ).requires_grad_(False)
    theirs = verify.transformers_clip(ours)
    image = torch.rand(1, 3, 30, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    names = [name for name, _, _ in verify.compare_clip(ours, theirs, image)]
    assert names == [*(f"visual.transformer.{i}" for i in range(3)), "features"]
    assert first(verify.compare_clip(ours, theirs, image)) is None
    scaled(getattr(theirs, "vision_model", theirs).encoder.layers[1].mlp.fc1)
    assert first(verify.compare_clip(ours, theirs, image)) == "visual.transformer.1"


def test_q_and_k_of_self_attention_are_compared_after_norm_and_rotation(monkeypatch):
    """A rotation that is wrong in one block shows at its q, before any attention."""
    wan = minicos.load("tiny", device="cpu")
    points = [row.point for part in verify.verify(wan) for row in part.rows if part.name == "high"]
    for block in range(wan.depth):
        at = points.index(f"blocks.{block}.self_attn.q")
        assert points[at + 1] == f"blocks.{block}.self_attn.k"
    norm = wan.experts["high"].blocks[3].self_attn.norm_k
    norm.weight.mul_(1.001)
    try:
        x, text = torch.randn(1, 36, 3, 8, 8), torch.randn(1, 16, 64)
        theirs = verify.diffusers_dit(minicos.load("tiny", device="cpu").experts["high"])
        pairs = verify.compare_dit(
            wan.experts["high"], theirs, x[:, :16], torch.tensor([[937.0]]), text, x[:, 16:]
        )
        first = next(row for row in verify._rows(pairs, 5e-6) if not row.ok)
    finally:
        norm.weight.div_(1.001)
    assert first.point == "blocks.3.self_attn.k"


def test_the_verdict_uses_both_columns():
    """One wrong number in a million does not show in rel_l2."""
    a = torch.ones(1000, 1000)
    b = a.clone()
    b[0, 0] += 1e-3
    (row,) = verify._rows([("x", a, b)], 5e-6)
    assert row.rel_l2 < row.tolerance
    assert row.rel_max > row.tolerance_max
    assert not row.ok
