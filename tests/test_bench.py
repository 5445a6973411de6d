"""The output of a benchmark and its order of measurements; never the time of anything."""

import json
import sys
from dataclasses import replace
from functools import wraps
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from minicos.bench import (
    BENCHMARKS,
    capture,
    ensemble,
    kernels,
    layers,
    load,
    measure,
    networks,
    vae,
)
from minicos.bench.measure import TITLES, Ceilings, Line, alternate, attempt, ceilings, rate
from minicos.cli import main
from minicos.dit import FLOAT32
from minicos.errors import MinicosError
from minicos.ops import REFERENCE, Ops, token_energy
from tests.golden import rel_max

CPU = torch.device("cpu")
KEYS = ["name", "ours_ms", "peer", "peer_ms", "ratio", "ceiling_share"]


# -- a line ----------------------------------------------------------------------------------------


def test_a_line_as_json():
    line = Line("forward", 2.0, "diffusers", 5.0, 0.5, note="for people")
    assert line.to_json() == dict(
        zip(KEYS, ("forward", 2.0, "diffusers", 5.0, 0.4, 0.5), strict=True)
    )
    assert Line("alone", 2.0).to_json() == dict.fromkeys(KEYS) | {"name": "alone", "ours_ms": 2.0}
    assert Line("none", not_measured="no card").to_json() == {
        "name": "none",
        "not_measured": "no card",
    }


@given(st.floats(1e-2, 1e5), st.floats(1e-2, 1e5))
def test_a_line_as_a_row(ours, peer):
    row = str(Line("forward", ours, "diffusers", peer, 0.5, note="so"))
    assert row.index("diffusers") == TITLES.index("peer")
    assert row.index("50.00 %") + len("50.00 %") == len(TITLES)
    assert row.endswith("  so")
    assert float(row.split()[1]) == pytest.approx(ours, rel=1e-3)


def test_a_share_above_the_ceiling_says_why():
    """In every form of a line; others say nothing."""
    above, below = (Line("vae", 2.0, "diffusers", 5.0, share) for share in (1.01, 1.0))
    for text in (str(above), above.cells()[-1], above.to_json()["remarks"]):
        assert text.endswith("faster than the best product or copy measured before and after")
    assert replace(above, note="612 TFLOP/s").cells()[-1].startswith("612 TFLOP/s; above the ceil")
    assert "above" not in f"{below} {below.cells()} {below.to_json()}"
    mapped = replace(above, above=load.ABOVE)
    for text in (str(mapped), mapped.cells()[-1], mapped.to_json()["remarks"]):
        assert text.endswith("the ceiling is a read that copies")


def test_the_best_product_so_far_is_the_ceiling(monkeypatch):
    speeds = iter([3.0, 5.0, 4.0, 1.0, 2.0, 1.0, 9.0, 6.0, 7.0])
    monkeypatch.setattr(measure.cost, "throughput", lambda *given: next(speeds))
    monkeypatch.setattr(measure, "_copies", lambda device: 1e9)
    monkeypatch.setattr(measure, "_best", {})
    assert [ceilings(CPU).matmul for _ in range(3)] == [5.0, 5.0, 9.0]


@pytest.mark.parametrize(
    "error", [MinicosError("no diffusers"), torch.OutOfMemoryError("no diffusers\nand more")]
)
def test_what_cannot_be_measured_says_why(error):
    def fail() -> Line:
        raise error

    line = attempt("forward", fail)
    assert set(line.to_json()) == {"name", "not_measured"}
    assert "no diffusers" in line.not_measured


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        attempt("forward", lambda: Line(str(1 // 0)))


# -- taking turns ----------------------------------------------------------------------------------


class Watch:
    """A clock that each call advances, and that records the order of events."""

    def __init__(self):
        self.now, self.events = 0.0, []

    def ready(self):
        self.events.append("ready")

    def mark(self):
        return self.now

    def ms(self, begin, end):
        return end - begin

    def takes(self, name, times):
        times = iter(times)

        def run():
            self.events.append(name)
            self.now += next(times)

        return run


def test_calls_take_turns_and_medians_are_taken_behind_the_warm_up():
    watch = Watch()
    a, b = watch.takes("a", [900, 1, 2, 30]), watch.takes("b", [900, 5, 700, 6])
    assert alternate(a, b, device=CPU, repeats=3, warmup=1, clock=watch) == (2, 6)
    assert watch.events == ["a", "b", *["ready", "a", "ready", "b"] * 3]


@given(st.lists(st.lists(st.integers(1, 99), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_median_is_that_of_each_call(times):
    watch = Watch()
    found = alternate(
        *(watch.takes(i, t) for i, t in enumerate(times)),
        device=CPU,
        repeats=5,
        warmup=0,
        clock=watch,
    )
    assert found == tuple(sorted(t)[2] for t in times)


def test_shares_of_ceilings():
    assert [rate(2e12, ms=1), rate(2e6, ms=1)] == ["2000 TFLOP/s", "2 GFLOP/s"]
    found = replace(ceilings(CPU), matmul=1e12, copy=1e9)
    assert found.of_matmul(5e8, ms=1) == 0.5
    assert found.of_copy(5e5, ms=1) == 0.5


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def bench(capsys, monkeypatch):
    """Run `minicos bench` on the CPU: (stdout, stderr)."""

    def run(*argv: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["minicos", "bench", *argv])
        assert main(["bench", *argv, "--device", "cpu", "--quick"]) == 0
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_runs_small_on_a_cpu(name, bench):
    out, err = bench(name, "--json")
    lines = json.loads(out)
    assert lines
    for line in lines:
        assert list(line) in (KEYS, ["name", "not_measured"])
        assert all(
            value is None or value > 0
            for key, value in line.items()
            if key.endswith(("_ms", "ratio", "share"))
        )
    assert f"command   minicos bench {name}" in err
    assert torch.__version__.partition("+")[0] in err  # some wheels' metadata lack the "+cu128"
    assert all(f"{peer} " in err for peer in ("diffusers", "transformers", "safetensors"))


def test_the_table(bench):
    out, _ = bench("ensemble")
    assert TITLES in out
    assert "plain run" in out


def test_everything_in_one_table(monkeypatch, tmp_path, bench):
    """Lines of all benchmarks, and why one cannot begin."""

    def made(name: str):
        def lines(device, quick, gb=None):
            assert (gb == 60) is (name == "load")  # an option reaches its benchmark only
            if name == "load":
                raise MinicosError("no disk | here")
            yield Line(f"{name} of mine", 2.0, "peer", 4.0, 0.25, note="so")

        return SimpleNamespace(lines=lines)

    monkeypatch.setattr("importlib.import_module", lambda name: made(name.rpartition(".")[2]))
    monkeypatch.chdir(tmp_path)
    out, _ = bench("--gb", "60")
    table = (tmp_path / "bench.md").read_text().splitlines()
    rows = [row for row in table if row.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(BENCHMARKS)
    assert "| `vae` | vae of mine | 2.000 ms | peer | 4.000 ms | 0.5000 | 25.00 % | so |" in rows
    assert "| `load` | load | not measured |  |  |  |  | no disk / here |" in rows
    assert any(line.startswith("command   minicos bench") for line in table)
    assert "bench.md  (the same as one table)" in out


def test_a_size_of_files_is_refused_where_no_file_is_read(capsys):
    assert main(["bench", "vae", "--device", "cpu", "--gb", "2"]) == 2
    assert "--gb is for load, and vae reads no file: leave it out" in capsys.readouterr().err


def test_a_device_without_a_clock_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("minicos.device.open_device", torch.device)
    assert main(["bench", "capture", "--device", "mps"]) == 2
    assert "no clock for mps: take --device cpu or cuda" in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minicos.cli.bench.lines", lambda *args: pytest.fail("worked"))
    assert main(["bench", "capture", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "is not a file, and cannot be one. Choose another --out" in capsys.readouterr().err


def test_without_diffusers(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    lines = json.loads(bench("forward", "--json")[0])
    assert all('pip install -e ".[peers]"' in line["not_measured"] for line in lines)


# -- what runs on a card, tried on a CPU -----------------------------------------------------------


def test_every_kernel_has_a_case_that_fits_it():
    """Each is given arguments that its operation knows, all but those that only the attention of
    its layer takes.
    """
    import tests.on_device  # noqa: F401  finds minicos.kernels, and skips where there is no Triton

    twins = REFERENCE.with_kernels()
    swapped = {name for name, op in vars(REFERENCE).items() if getattr(twins, name) is not op}
    assert {kernels.operation(name) for name in kernels.CASES} == swapped
    shapes = kernels.Shapes(CPU, quick=True)
    for name, case in kernels.CASES.items():
        given = case(shapes)
        run = kernels.bound(getattr(REFERENCE, kernels.operation(name)), given)
        assert set(given) - set(run.keywords) <= {"v"}
        assert kernels.tree_leaves(run())


def test_products_of_a_mass_are_counted_as_torch_counts_them():
    """Once, where logarithms are given; the reference finds p in one go, and the kernel without
    them computes them twice.
    """
    shapes = kernels.Shapes(CPU, quick=True)
    for name, times in {
        "attention_mass, lse": 1,
        "attention_mass": 2,
        "attention_mass_sampled": 2,
    }.items():
        run = kernels.bound(
            getattr(REFERENCE, kernels.operation(name)), kernels.CASES[name](shapes)
        )
        with FlopCounterMode(display=False) as counter:
            run()
        assert kernels.products(**run.keywords) == times * counter.get_total_flops()


def stand_in(op):
    return wraps(op)(lambda *args, **options: op(*args, **options))


@pytest.fixture
def stand_ins(monkeypatch):
    """Copies of the references in the place of kernels, a compiler that does nothing, and
    ceilings of 1 TFLOP/s and 1 GB/s.
    """

    def make(*names: str) -> None:
        copies = {name: stand_in(getattr(REFERENCE, name)) for name in names}
        monkeypatch.setattr(kernels, "obstacle", lambda device: "")
        monkeypatch.setattr(Ops, "with_kernels", lambda self: replace(REFERENCE, **copies))
        monkeypatch.setattr(torch, "compile", lambda op: op)
        monkeypatch.setattr(
            kernels, "ceilings", lambda device, dtype=None: Ceilings(matmul=1e12, copy=1e9)
        )

    return make


def test_a_kernel_beside_its_reference(stand_ins):
    """Bytes are every argument read and every result written once."""
    stand_ins("token_energy")
    first, second, *others = kernels.lines(CPU, quick=True)
    assert (first.name, first.peer, second.peer) == (
        "token_energy",
        "reference",
        "reference, compiled",
    )
    count = 30 * (64 + 1) * 4  # 30 tokens of width 64
    assert first.ceiling_share == pytest.approx(count / 1e9 / (first.ours_ms / 1e3))
    assert all(line.not_measured == "it has no kernel" for line in others)


def test_masses_are_held_against_the_attention_of_their_layer(stand_ins):
    stand_ins("attention_mass", "attention_mass_sampled")
    lines = [line for line in kernels.lines(CPU, quick=True) if not line.not_measured]
    names = ["attention_mass", "attention_mass, lse", "attention_mass_sampled"]
    peers = ["reference", "reference, compiled", "attention of its layer"]
    assert [(line.name, line.peer) for line in lines] == [
        (name, peer) for name in names for peer in peers
    ]
    count = 2 * 2 * 30 * 30 * 64  # q k^T twice: 30 tokens, two heads of 32
    assert lines[0].ceiling_share == pytest.approx(count / 1e12 / (lines[0].ours_ms / 1e3))


def test_capture_beside_the_published_way():
    """The verbs keep of a pass the same numbers as the published method's hidden states."""
    s = networks.subject(CPU, quick=True)
    kept, ways = capture.hidden_states(s), capture.recorders(s)
    assert len(kept) == s.dit.cfg.num_layers
    assert not any(block._forward_hooks for block in s.dit.blocks)
    energy, drawn, attention = (capture.watched(s, make) for make in ways.values())
    assert set(energy) == {"cond.raw", "cond.centred", "cond.update"}
    assert {"cond.components", "cond.channel"} < set(drawn)
    assert {"received.0", "between.0", "text.0"} < set(attention)
    raw = torch.stack([token_energy(x[0]) for x in kept])
    assert torch.equal(energy["cond.raw"].flatten(1), raw)


def test_whole_runs_are_lines_on_a_card_too(monkeypatch):
    """Each with the reason, where it cannot be measured; one failure leaves the others."""

    def fail(*given):
        raise MinicosError("no card")

    for part in ("passes", "runs", "composed"):
        monkeypatch.setattr(capture, part, fail)
    monkeypatch.setattr(capture, "typed", lambda *given: [Line("energy, as typed", 2.0)])
    names = [line.name for line in capture.lines(torch.device("cuda"))]
    assert names == [
        *("energy, a pass", "attention, a pass"),
        *("energy, a run", "attention, a run", "steps, a run"),
        "energy, as typed",
        "steps, a run of Wan2.2-I2V-A14B",
    ]
    assert names[:-1] == [line.name for line in capture.lines(CPU)]


def test_runs_say_what_they_leave_out():
    energy, attention, steps = capture.runs(CPU, quick=True)
    assert [energy.name, steps.name] == ["energy, run of 3 steps", "steps, run of 3 steps"]
    assert all(line.note.endswith("without pictures") for line in (energy, attention))
    assert steps.note.endswith("with its decoded videos, without sheets and plots")


def test_a_command_as_typed_draws_its_pictures(monkeypatch, tmp_path, capsys):
    class Folder:
        def __enter__(self):
            return str(tmp_path)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(capture, "TemporaryDirectory", Folder)
    capture.command(["energy", "--puzzle", "mark", "--steps", "1", "--device", "cpu"])
    written = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"energy_layers_cond.png", "video.mp4", "index.html"} <= written
    assert not any(capsys.readouterr())
    with pytest.raises(MinicosError, match="--puzzle"):
        capture.command(["generate", "--puzzle", "maze:x"])


def test_a_composed_run_of_steps_counts_passes_and_videos():
    """Of A14B at the verb's defaults: eight steps, guided, prompted and unprompted."""
    line = capture.composed(CPU, quick=True)
    assert line.note.startswith("composed: 80 passes of ")
    assert ", and 24 videos and the last one, each decoded in " in line.note
    assert line.name == "steps, run of 40 steps, quick"
    assert line.ratio > 1


def test_the_fastest_setting_of_a_peer_counts(monkeypatch):
    monkeypatch.setattr(layers, "alternate", lambda *sides, **options: (4.0, 9.0, 8.0))
    monkeypatch.setattr(layers, "ceilings", lambda *given: Ceilings(matmul=1e12, copy=1e9))
    peers = {"eager": lambda: None, "sdpa": lambda: None}
    line = layers._line("layer", lambda: None, peers, 10**9, CPU, torch.float32, True)
    assert (line.ours_ms, line.peer, line.peer_ms) == (4.0, "sdpa", 8.0)


def test_settings_of_the_text_encoders_peer_compute_the_same():
    pytest.importorskip("transformers")
    ours = layers.random_text(
        replace(layers.TINY_TEXT, num_layers=1, vocab_size=100), CPU, torch.float32
    )
    ids = torch.arange(16)[None] + 2
    mask = (torch.arange(16) < 9)[None].long()
    settings = layers.peer_settings(ours)
    assert "eager" in settings
    for how, theirs in settings.items():
        assert theirs.config._attn_implementation == how
        assert theirs.encoder.config._attn_implementation == how
        found = theirs(ids, mask).last_hidden_state
        assert rel_max(found[mask.bool()], ours(ids, mask)[mask.bool()]) < 1e-5  # measured 4e-7


def test_a_composed_ensemble_says_so():
    line = ensemble._composed(CPU, quick=True)
    assert line.note.startswith("composed")
    assert line.ratio > 1


def test_random_networks_are_of_the_official_precision_and_size():
    dit = networks.random_dit(networks.QUICK, CPU, torch.bfloat16)
    for name, p in dit.named_parameters():
        assert p.dtype == (
            torch.float32 if any(part in name for part in FLOAT32) else torch.bfloat16
        )
    s = replace(networks.subject(CPU, quick=True), dit=dit)
    assert 0.1 < s.run().std() < 10


def test_both_sides_of_a_load_give_the_same_weights(tmp_path):
    network = load.subject(CPU, quick=True, free=0)
    load.write(tmp_path, {name: p.shape for name, p in network.state_dict().items()}, 10**5)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for dtype, check in product((torch.float32, torch.bfloat16), (False, True)):
        a, b = (
            side(network, tmp_path, dtype, CPU, check_finite=check).state_dict()
            for side in (load.ours, load.theirs)
        )
        assert a["blocks.0.ffn.0.weight"].dtype == dtype
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("side", [load.ours, load.theirs])
def test_both_sides_of_a_load_find_a_nan(side, tmp_path):
    network = load.subject(CPU, quick=True, free=0)
    state = {name: torch.zeros(p.shape) for name, p in network.state_dict().items()}
    state["blocks.1.ffn.2.bias"][3] = torch.nan
    save_file(state, tmp_path / "model.safetensors")
    side(network, tmp_path, torch.bfloat16, CPU)
    with pytest.raises((MinicosError, ValueError), match=r"NaN|not finite"):
        side(network, tmp_path, torch.bfloat16, CPU, check_finite=True)


@pytest.mark.parametrize(
    ("device", "free", "gb", "blocks"),
    [
        ("cuda", 10**12, None, 2),
        ("cuda", 10**12, 60, 40),
        ("cuda", 64 * 10**9, 60, 15),
        ("cuda", 0, None, 1),
        ("cpu", 10**12, None, 5),
        ("cpu", 10**12, 60, 30),
    ],
)
def test_a_checkpoint_is_small_unless_asked_for_and_fits_the_disk(device, free, gb, blocks):
    assert len(load.subject(torch.device(device), False, free, gb).blocks) == blocks


def test_both_sides_of_a_vae_compute_the_same():
    """The untrained VAE has pixels that are neither grey nor clamped: their PSNR means
    something.
    """
    s = vae.subject(CPU, quick=True)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (s.vae.cfg.mean, s.vae.cfg.std))
    ours, theirs = vae.encoders(s)
    assert rel_max(ours() * std + mean, theirs()) < 3e-6  # measured 2.6e-7
    ours, theirs = vae.decoders(s, torch.float32)
    assert 0.1 < ours().std() < 0.9
    assert rel_max(ours(), theirs()) < 3e-5  # measured 5.4e-6
    ours, _ = vae.decoders(s, torch.bfloat16)
    assert 35 < vae.psnr(ours(), s.vae.decode(s.latent)) < 60  # measured 43.8


def test_a_card_decodes_with_tf32_by_default_and_both_sides_are_measured_so(monkeypatch):
    assert ("decode", vae.TF32) not in vae.ways(CPU)
    assert vae.ways(torch.device("cuda"))[-1] == ("decode", vae.TF32)
    cudnn, seen = torch.backends.cudnn, []

    def watched(decode):
        return lambda: (seen.append(cudnn.allow_tf32), decode())[1]

    s, sides = vae.subject(CPU, quick=True), vae.decoders
    monkeypatch.setattr(vae, "decoders", lambda *given: tuple(map(watched, sides(*given))))
    before = cudnn.allow_tf32
    for way, on in ((vae.TF32, True), (vae.FLOAT32, False)):
        line = vae._measured("decode", s, "decode", way, 1, s)
        assert seen == [on] * len(seen)
        assert (line.ceiling_share is None) is on
        seen.clear()
    assert cudnn.allow_tf32 == before


def test_the_loss_of_a_decoding_is_held_against_float32(monkeypatch):
    s, found = vae.subject(CPU, quick=True), []
    monkeypatch.setattr(vae, "psnr", lambda ours, exact: found.append((ours, exact)) or 50.0)
    decode = vae.VAE.decode

    def rounded(self, latent):  # as a card with TF32 would
        return decode(self, latent) + 0.25 * torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(vae.VAE, "decode", rounded)
    line = vae._measured("decode, TF32", s, "decode", vae.TF32, 1, s)
    assert line.name == "decode, TF32, 50.0 dB"
    ((ours, exact),) = found
    assert torch.equal(exact, decode(s.vae, s.latent))
    assert torch.equal(ours, exact + 0.25)


def test_operations_of_a_vae():
    """Of all parts, the convolution next to the pixels can be counted by hand."""
    s = vae.subject(CPU, quick=True)
    pixels = s.video[0, 0].numel()
    assert vae.flops(s, "decode") > 2 * 27 * 4 * 3 * pixels
    assert vae.flops(s, "encode") > 2 * 27 * 3 * 4 * pixels


def test_modules_are_those_of_the_table():
    for name in BENCHMARKS:
        assert callable(import_module(f"minicos.bench.{name}").lines)
