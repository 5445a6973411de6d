"""Weights on the move: streamed and swapped equal resident, bit for bit, and a plan fits the
memory that there is.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minicos import cost
from minicos import open as opening
from minicos.cli import main
from minicos.config import VARIANTS, TextConfig, VAEConfig
from minicos.dit import FLOAT32, DiT
from minicos.errors import MinicosError, MinicosWarning
from minicos.hooks import NO_HOOKS, Hooks
from minicos.media import save_image
from minicos.open import load
from minicos.plan import DoesNotFit, Part, Plan, available, choose, describe, measure
from minicos.stream import HostBuffer, Residency, Streamer, ThreadCopyQueue, host_memory
from minicos.text import TextEncoder
from minicos.tiny.lora import save_lora
from minicos.vae import VAE
from minicos.verify import verify
from minicos.weights import lora

CPU = torch.device("cpu")


class RoughQueue(ThreadCopyQueue):
    """Takes an arbitrary time, and leaves NaN in a buffer as long as it may write there."""

    seconds: tuple[float, ...] = (0, 0.0005, 0.002)

    def __init__(self, seed: int = 0):
        super().__init__()
        self._draw = random.Random(seed)

    def _copy(self, target, source, after):
        target.fill_(0xFF)  # NaN in float32 and bfloat16
        time.sleep(self._draw.choice(self.seconds))
        source.write(target)


class DeafQueue(RoughQueue):
    """Broken: the computation does not wait for the weights."""

    seconds = (0.05,)

    def wait(self, event):
        pass


class HastyStreamer(Streamer):
    """Broken: a buffer is filled again while its block still computes."""

    def stream(self, blocks):
        blocks = list(blocks)
        buffers = self._buffers
        for i, block in enumerate(blocks):
            host = self.host[block]
            self.queue.wait(self._fill(buffers[i % 2], host, self.queue.event())[-1])
            host.bind(buffers[i % 2])
            if i + 2 < len(blocks):
                self._fill(buffers[i % 2], self.host[blocks[i + 2]], self.queue.event())
            yield block
            host.bind()


def streamed(network: DiT, queue=None, kind=Streamer) -> DiT:
    """The network with its blocks streamed; its weights are moved into host buffers."""
    streamer = kind(queue or RoughQueue(), CPU)
    for block in network.blocks:
        before = {name: p.clone() for name, p in block.named_parameters()}
        host = streamer.host[block] = HostBuffer(block, lambda name: before[name].dtype, pin=False)  # noqa: B023
        for name, value in before.items():
            host.view(name).copy_(value)
        host.bind()
    network.stream_blocks(streamer.stream)
    return network


@pytest.fixture
def deep(small_dit):
    return partial(small_dit, num_layers=5)


def velocity(network: DiT, seed: int = 0, hooks: Hooks = NO_HOOKS) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, 4, 2, 6, 6, generator=draw), torch.randn(1, 5, 8, generator=draw)
    with torch.no_grad():
        return network(x, torch.tensor([500.0]), text, hooks=hooks)


# -- streaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_streamed_equals_resident(small_dit, layers):
    network = streamed(small_dit(num_layers=layers))
    for seed in range(5):
        assert torch.equal(velocity(network, seed), velocity(small_dit(num_layers=layers), seed))


@pytest.mark.parametrize(
    "broken",
    [{"queue": DeafQueue()}, {"kind": HastyStreamer}],
    ids=["not ready", "freed too early"],
)
def test_a_broken_streamer_is_found_out(deep, broken):
    """The test above can fail: it catches these two mistakes."""
    network = streamed(deep(), **broken)
    assert not all(
        torch.equal(velocity(network, seed), velocity(deep(), seed)) for seed in range(5)
    )


def test_hooks_see_and_change_a_streamed_network_as_a_resident_one(deep):
    def run(network):
        seen = []
        hooks = (
            Hooks()
            .on("blocks.*", lambda x, site: seen.append((site.name, x.clone())))
            .on("blocks.2.ffn", lambda x, site: x * 0.5)
            .on("blocks.*.self_attn.q", lambda x, site: seen.append((site.name, x.clone())))
        )
        return velocity(network, hooks=hooks), seen

    (a, seen_a), (b, seen_b) = run(streamed(deep())), run(deep())
    assert torch.equal(a, b)
    assert [name for name, _ in seen_a] == [name for name, _ in seen_b]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(seen_a, seen_b, strict=True))


def test_a_caller_in_inference_mode_streams(deep):
    """The thread that copies is not in that mode, and could not write to tensors made in it."""
    with torch.inference_mode():
        found = velocity(streamed(deep()))
    assert torch.equal(found, velocity(deep()))


def test_compiled_blocks_stream(deep):
    torch._dynamo.reset()  # forget what other tests have compiled
    network = streamed(deep())
    graphs = Counter()

    def backend(graph, inputs):
        graphs["compiled"] += 1
        return graph.forward

    for block in network.blocks:
        block.compile(backend=backend)
    for seed in range(3):
        assert torch.equal(velocity(network, seed), velocity(deep(), seed))
    assert (
        graphs["compiled"] == 1
    )  # moving weights compiles nothing again, and all blocks share a graph


@pytest.mark.parametrize("keep", [False, True], ids=["closed", "kept alive"])
def test_a_pass_that_breaks_off_harms_no_other(deep, keep):
    network, expected = streamed(deep()), velocity(deep())

    def stop(x, site):
        raise ValueError

    kept = []
    for point in ("blocks.0", "blocks.2.ffn", "blocks.4", "velocity"):
        with pytest.raises(ValueError) as error:
            velocity(network, hooks=Hooks().on(point, stop))
        kept.append(error)  # its traceback holds the generator of the broken pass
        if not keep:
            kept.clear()
        assert torch.equal(velocity(network), expected)
    abandoned = network._in_turn(network.blocks)
    next(abandoned)
    assert torch.equal(velocity(network), expected)
    with pytest.raises(MinicosError, match="two passes"):
        next(abandoned)
    assert torch.equal(velocity(network), expected)


def test_threads_get_what_is_right_or_an_error(deep):
    """Of simultaneous passes the last one wins, and the others raise: none returns a wrong velocity."""
    network, expected = streamed(deep()), [velocity(deep(), seed) for seed in range(4)]

    def attempt(seed: int) -> torch.Tensor | None:
        try:
            return velocity(network, seed)
        except MinicosError as error:
            assert "two passes through a streamed network at once" in str(error)
            return None

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            made = list(pool.map(attempt, range(4)))
            assert any(found is not None for found in made)
            for found, right in zip(made, expected, strict=True):
                assert found is None or torch.equal(found, right)
    assert torch.equal(velocity(network), expected[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_a_process_that_streamed_can_stream(deep):
    """The thread that copies is not in the fork: waiting for it would never end."""
    network = streamed(deep())
    expected = velocity(network)
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if torch.equal(velocity(network), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(velocity(network), expected)


def test_an_error_of_the_copier_is_told_and_not_kept(deep):
    class Failing(ThreadCopyQueue):
        broken = True

        def _copy(self, target, source, after):
            if self.broken:
                raise RuntimeError("the bus is gone")
            super()._copy(target, source, after)

    queue = Failing()
    network = streamed(deep(), queue)
    with pytest.raises(RuntimeError, match="the bus is gone"):
        velocity(network)
    queue.broken = False
    assert torch.equal(velocity(network), velocity(deep()))


def test_the_first_blocks_of_the_next_pass_are_copied_while_this_one_ends(deep):
    """Every pass copies each block once, two of them for the pass after it, and one of another
    network begins anew.
    """

    class Counting(ThreadCopyQueue):
        copied: list[nn.Module] = []  # noqa: RUF012

        def copy(self, target, source, after):
            self.copied.append(source.module)
            return super().copy(target, source, after)

    queue = Counting()
    network = streamed(deep(), queue)
    first, second, *others = blocks = list(network.blocks)
    velocity(network)
    assert queue.copied == [*blocks, first, second]
    queue.copied.clear()
    for _ in network._in_turn(blocks):
        assert not queue.copied[:1] or queue.copied[0] is others[0]  # what is there is not copied
    assert queue.copied == [*others, first, second]
    queue.copied.clear()
    assert torch.equal(
        torch.stack([p.sum() for p in network._in_turn(blocks[2:]) for p in p.parameters()]),
        torch.stack([p.sum() for block in deep().blocks[2:] for p in block.parameters()]),
    )
    assert queue.copied == [*others, *others[:2]]


# -- whole models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(toy):
    """residency, dtype -> every latent of a guided UniPC run over both experts, and the video's
    first piece.
    """
    folder = toy.parent / "both"
    folder.mkdir()
    for path in toy.iterdir():
        (folder / path.name).symlink_to(path)
    other = load_file(toy / "high_noise_model/diffusion_pytorch_model.safetensors")
    (folder / "low_noise_model").mkdir()
    halves = {
        name: tensor / 2 for name, tensor in other.items()
    }  # so that a mix-up of the experts shows
    save_file(halves, folder / "low_noise_model/diffusion_pytorch_model.safetensors")

    def run(residency: str, dtype=torch.float32):
        wan = load(folder, device="cpu", residency=residency, dtype=dtype, preset="official")
        wan = wan.with_preset(steps=4, boundary=0.95)
        condition = wan.condition(
            "solve the maze",
            torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)),
            frames=5,
        )
        steps = list(wan.sample(condition, seed=1))
        assert {step.expert for step in steps} == {"high", "low"}
        return wan, [step.next for step in steps], next(iter(wan.frames(steps[-1].next[0])))

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_and_streamed_runs_equal_resident_ones(pictures, dtype):
    _, expected, video = pictures("resident", dtype)
    for residency in ("swap", "stream", "disk"):
        wan, latents, frame = pictures(residency, dtype)
        assert wan.residency.plan.residency == residency
        assert all(torch.equal(a, b) for a, b in zip(latents, expected, strict=True))
        assert (frame == video).all()


@pytest.fixture(scope="module")
def quantised(toy):
    """A model whose matrices are fp8 with a factor, and a LoRA for it."""
    folder = toy.parent / "fp8"
    (folder / "high_noise_model").mkdir(parents=True)
    for path in toy.iterdir():
        if path.name != "high_noise_model":
            (folder / path.name).symlink_to(path)
    weights, changes = {}, {}
    draw = torch.Generator().manual_seed(0)
    file = "high_noise_model/diffusion_pytorch_model.safetensors"
    for name, tensor in load_file(toy / file).items():
        weights[name] = tensor
        if name.startswith("blocks.") and tensor.ndim == 2:
            factor = tensor.abs().max() / 448
            weights[name] = (tensor / factor).to(torch.float8_e4m3fn)
            weights[name.replace(".weight", ".scale_weight")] = factor
            if ".q." in name:
                thin = (torch.randn(n, 2, generator=draw) / 10 for n in tensor.shape)
                up, down = thin
                changes[name] = lora.LowRank(up, down.T.contiguous())
    save_file(weights, folder / file)
    save_lora(folder / "a.safetensors", changes)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_and_loras_read_at_each_use_equal_those_read_once(quantised, dtype):
    def run(residency: str):
        change = {"high": [quantised / "a.safetensors"]}
        wan = load(quantised, device="cpu", dtype=dtype, residency=residency, lora=change)
        condition = wan.with_preset(steps=2).condition(
            "solve the maze",
            torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)),
            frames=5,
        )
        return wan, [step.next for step in wan.with_preset(steps=2).sample(condition, seed=1)]

    (resident, expected), (wan, found) = run("resident"), run("disk")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    plain = load(quantised, device="cpu", dtype=dtype)  # the LoRA changes something
    name = "blocks.0.self_attn.q.weight"
    assert not torch.equal(
        plain.experts["high"].state_dict()[name], resident.experts["high"].state_dict()[name]
    )
    idle = dict(wan.experts["high"].blocks.named_parameters())
    assert all(p.untyped_storage().nbytes() == p.itemsize for p in idle.values())  # one NaN each
    pytest.importorskip("diffusers")
    compared = (list(verify(model, (1, 2, 2))) for model in (wan, resident))
    assert next(compared) == next(compared)
    with pytest.raises(MinicosError, match="gradients need weights that stay in place"):
        wan.check_differentiable()


def test_what_is_read_between_passes_is_merged_whatever_the_caller_has_set(quantised):
    """A thread reads the first blocks of the next pass, also when the caller's settings hold again."""
    change = {"high": [quantised / "a.safetensors"]}
    wan = load(quantised, device="cpu", residency="disk", lora=change)
    host = wan.residency._streamer.host[wan.experts["high"].blocks[0]]
    plain, other = (torch.zeros(host.size, dtype=torch.uint8) for _ in range(2))
    host.write(plain)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        host.write(other)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(plain, other)


def test_a_file_that_changes_during_a_run_is_an_error(quantised, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(quantised, folder)
    wan = load(folder, device="cpu", residency="disk").with_preset(steps=2)
    picture = torch.rand(3, 32, 32)
    steps = wan.sample(wan.condition("solve the maze", picture, frames=5), seed=1)
    next(steps)
    with (folder / "high_noise_model/diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(MinicosError, match="has become shorter or longer while it was read"):
        list(steps)


def test_each_network_comes_once_where_there_is_room(pictures, monkeypatch):
    moves = []
    bind = HostBuffer.bind
    monkeypatch.setattr(
        HostBuffer,
        "bind",
        lambda buffer, memory=None: (
            moves.append((buffer.module, memory is not None)),
            bind(buffer, memory),
        ),
    )
    wan, *_ = pictures("swap")
    name = {
        wan.vae: "vae",
        wan.text: "text",
        wan.experts["high"]: "high",
        wan.experts["low"]: "low",
    }
    # the VAE, which the first frame needs, is still there when the video is decoded
    assert [name[module] for module, comes in moves if comes] == ["vae", "text", "high", "low"]
    assert all(comes for _, comes in moves)


# -- the plan --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a14b():
    """The parts of Wan2.2-I2V-A14B in bfloat16 for 81 frames of a size."""
    cfg = VARIANTS["Wan2.2-I2V-A14B"]
    with torch.device("meta"):
        expert, vae, text = DiT(cfg), VAE(VAEConfig()), TextEncoder(TextConfig())

    def policy(name):
        return torch.float32 if any(part in name for part in FLOAT32) else torch.bfloat16

    def parts(height: int = 480, width: int = 832) -> list[Part]:
        shape = (1, 16, 21, height // 8, width // 8)
        work = cost.dit_memory(cfg, shape, torch.bfloat16, torch.float32)
        decode = cost.vae_memory(VAEConfig(), height, width, torch.device("cuda"))
        return [
            measure("high", expert, policy, work=work),
            measure("low", expert, policy, work=work),
            measure("vae", vae, lambda name: torch.float32, work=decode),
            measure("text", text, lambda name: torch.bfloat16),
        ]

    return parts


def test_sizes_of_the_parts(a14b):
    high, _, vae, text = a14b()
    assert high.weights == pytest.approx(
        28.95e9, rel=0.001
    )  # 14.3 G parameters, of which 0.2 G stay in float32
    assert high.weights - high.blocks == pytest.approx(0.85e9, rel=0.05)
    assert high.block == pytest.approx(0.71e9, rel=0.02)
    assert (vae.weights, text.weights) == (
        pytest.approx(507.6e6, rel=0.01),
        pytest.approx(11.36e9, rel=0.01),
    )


@pytest.mark.parametrize(
    ("memory", "residency", "text"),
    [
        (141e9, "resident", "resident"),
        (85e9, "resident", "offload"),
        (51e9, "swap", "offload"),
        (25e9, "stream", "offload"),
    ],
)
def test_the_first_plan_that_fits(a14b, memory, residency, text):
    """One card of each size: H200, 80 GB, 48 GB, 24 GB."""
    plan = choose("auto", a14b(), torch.device("cuda"), free=int(memory), host=10**12)
    assert (plan.residency, plan.parts[3].placement) == (residency, text)
    assert plan.peak < memory
    assert plan.host == {"resident": 0, "offload": text_bytes(plan)}[text] + experts_bytes(plan)
    words = describe(plan, speed=1e14)
    assert all(name in words for name in ("high", "low", "vae", "text", residency))


@pytest.mark.parametrize("memory", [24e9, 32e9, 48e9])
def test_cards_in_a_host_with_little_memory(a14b, memory):
    """Both experts in 64 GB: they are read from their files, of 28 GB in fp8."""
    parts = [replace(p, stored=int(14.3e9) if p.blocks and p.name != "text" else 0) for p in a14b()]
    cuda, host = torch.device("cuda"), 64 * 10**9
    plan = choose("auto", parts, cuda, free=int(memory), host=host)
    assert plan.residency == "disk"
    assert plan.host == (text_bytes(plan) if memory < 30e9 else 0)
    assert "block by block through cuda, each time from its files (14.3 GB" in describe(plan)
    assert choose("auto", parts, cuda, free=int(24e9), host=80 * 10**9).residency == "stream"
    with pytest.raises(DoesNotFit):  # of no use to a model that cannot read them there
        choose("auto", a14b(), cuda, free=int(memory), host=host)
    with pytest.raises(MinicosError, match="--residency disk is for Wan's networks: take stream"):
        choose("disk", a14b(), cuda, free=int(memory), host=host)


def test_a_cpu_with_little_memory_expands_blocks_as_well(quantised, monkeypatch):
    plans = []

    def load_with(free: int) -> str:
        monkeypatch.setattr(opening, "available", lambda device: free)
        wan = load(quantised, device="cpu", frames=5, size=(32, 32), tell=plans.append)
        return wan.placement

    assert load_with(10**10) == "resident"
    whole = plans[-1]
    assert load_with(int(whole.peak / 0.9) - 1) == "disk"
    assert plans[-1].peak < whole.peak - whole.parts[0].blocks / 2
    assert plans[-1].host == 0


def text_bytes(plan: Plan) -> int:
    return sum(
        part.weights
        for part in plan.parts
        if part.name == "text" or (part.name == "vae" and part.placement == "offload")
    )


def experts_bytes(plan: Plan) -> int:
    each = {"resident": 0, "swap": plan.parts[0].weights, "stream": plan.parts[0].blocks}
    return 2 * each[plan.residency]


def test_plans_that_do_not_fit(a14b):
    cuda = torch.device("cuda")
    with pytest.raises(
        MinicosError,
        match=r"not enough memory for the plan: stream needs about \d+\.\d GB of 8.0 GB",
    ):
        choose("auto", a14b(), cuda, free=8 * 10**9, host=10**12)
    with pytest.raises(
        MinicosError, match=r"resident needs about \d+\.\d GB of 25.0 GB free on cuda"
    ):
        choose("resident", a14b(), cuda, free=25 * 10**9, host=10**12)
    with pytest.raises(MinicosError, match=r"and \d+\.\d GB of 32.0 GB of host memory"):
        choose("auto", a14b(), cuda, free=25 * 10**9, host=32 * 10**9)
    with pytest.raises(
        MinicosError, match="no residency 'fast': take one of auto, resident, swap, stream, disk"
    ):
        choose("fast", a14b(), cuda, free=None, host=None)
    assert choose("auto", a14b(), cuda, free=None, host=None).residency == "resident"


def test_on_a_cpu_weights_in_their_files_count_nothing():
    part = Part("high", weights=10**9, work=10**8, blocks=10**9, block=10**8, mapped=10**9)
    assert choose("auto", [part], CPU, free=2 * 10**8, host=None).peak == 10**8
    with pytest.raises(MinicosError, match=r"resident needs about 1\.1 GB of 0\.2 GB free on cpu"):
        choose("auto", [replace(part, mapped=0)], CPU, free=2 * 10**8, host=None)
    with pytest.raises(
        MinicosError, match="swap needs about"
    ):  # host and device share the memory here
        choose("swap", [part], CPU, free=15 * 10**8, host=None)


def test_free_memory_is_known_here():
    free = available(CPU)
    assert free is None or 10**8 < free < 10**14


def test_the_plan_comes_before_the_weights(toy, monkeypatch):
    told = []
    monkeypatch.setattr(
        "minicos.open.load_into", lambda *args, **options: pytest.fail("a weight was read")
    )
    monkeypatch.setattr("minicos.open.available", lambda device: 10**6)
    with pytest.raises(
        MinicosError, match=r"not enough memory for the plan: .*No smaller video fits either"
    ):
        load(toy, device="cpu", tell=told.append)
    assert told.pop().residency == "disk"  # a refused plan is shown as well, the last one tried
    monkeypatch.undo()
    wan = load(toy, device="cpu", frames=9, size=(96, 32), tell=told.append)
    assert told == [wan.residency.plan]
    assert told[0].weights == sum(
        p.nbytes for n in (wan.experts["high"], wan.vae, wan.text) for p in n.parameters()
    )
    assert told[0].operations == cost.flops(wan.experts["high"].cfg, (1, 16, 3, 12, 4))


@pytest.mark.parametrize("asked", ["auto", "resident"])
def test_what_is_refused_says_the_smallest_thing_that_fits(asked, toy, monkeypatch):
    """The suggested change fits, and the ones before it do not."""
    seen, words = [], []

    def changed(wish):
        for text, other in offers(wish):
            seen.append(other)
            words.append(text)
            yield text, other

    offers = opening._Wish.changed
    monkeypatch.setattr(opening._Wish, "changed", changed)
    monkeypatch.setattr(opening, "load_into", lambda *a, **o: pytest.fail("a weight was read"))
    need = 48 * 10**6  # decoding takes 2^15 pixels at once, however small a frame is
    monkeypatch.setattr(opening, "available", lambda device: need)
    with pytest.raises(MinicosError) as refused:
        load(toy, device="cpu", frames=81, size=(256, 256), residency=asked)
    *others, last = seen
    assert f"It fits with {words[-1]}." in str(refused.value)
    assert last.plan().peak <= 0.9 * need
    for other in others:
        with pytest.raises(DoesNotFit):
            other.plan()


def test_the_command_prints_the_plan_and_writes_it_down(toy, tmp_path, capsys, monkeypatch):
    picture, out = tmp_path / "first.png", tmp_path / "run"
    save_image(picture, np.zeros((32, 32, 3), np.uint8))
    command = [
        "generate",
        "--model",
        str(toy),
        "--image",
        str(picture),
        "--prompt",
        "solve the maze",
        "--device",
        "cpu",
    ]
    command += ["--steps", "1", "--frames", "5", "--out", str(out)]
    assert main([*command, "--residency", "stream"]) == 0
    assert "plan" not in capsys.readouterr().err  # a small model starts without ado
    facts = json.loads((out / "run.json").read_text())
    assert (facts["residency"], facts["settings"]["noise_device"]) == ("stream", "cpu")
    assert facts["operations"].endswith("attention by scaled_dot_product_attention")
    assert "they need a CUDA card" in facts["operations"]
    assert facts["compiled"] is False
    assert main(command) == 0  # where the weights are does not identify a run

    monkeypatch.setattr("minicos.cli.opening.LARGE", 0)
    assert main([*command[:-1], str(tmp_path / "other"), "--noise-device", "cuda"]) == 2
    told = capsys.readouterr().err
    assert "plan: resident on cpu" in told
    assert "\n  operations: PyTorch's (no kernels: they need a CUDA card" in told
    assert "attention by scaled_dot_product_attention\n" in told
    assert "s a step: an estimate from" in told
    assert "minicos: the official CUDA noise needs a CUDA card, and this model is on cpu\n" in told


# -- offloaded networks that stay on the device ----------------------------------------------------


class Home:
    """Offloaded networks with this many float32 each, and as much work memory. On a CPU, whose memory
    holds both sides: `room` numbers in addition to those on the host.
    """

    def __init__(self, room: int | None, **sizes: int):
        parts = tuple(Part(k, 4 * n, work=4 * n, placement="offload") for k, n in sizes.items())
        free = None if room is None else int(4 * (room + sum(sizes.values())) / 0.9) + 1
        self.made = Residency(Plan("swap", CPU, parts, free))
        self.networks = {name: nn.Linear(n, 1, bias=False) for name, n in sizes.items()}
        for name, network in self.networks.items():
            place = self.made.allocate(name, network, lambda name: torch.float32)
            network.weight.data = place("weight", network.weight.shape, torch.float32)
        self.host = {name: network.weight.data_ptr() for name, network in self.networks.items()}

    def use(self, name: str) -> list[str]:
        """Move a network to the device; returns those that are there now."""
        self.made.to_device(self.networks[name])
        return [k for k, x in self.networks.items() if x.weight.data_ptr() != self.host[k]]


def test_an_expert_stays_while_the_vae_decodes_if_both_fit():
    """Room for 270 numbers: the weights on the device, and the work of what runs."""
    home = Home(270, high=100, low=100, vae=20)
    assert [home.use(name) for name in ("vae", "high", "vae", "low", "vae", "high")] == [
        ["vae"],
        ["high", "vae"],
        ["high", "vae"],
        ["low", "vae"],  # both experts, 200, and work, 100, do not fit
        ["low", "vae"],
        ["high", "vae"],
    ]


def test_where_nothing_is_known_of_the_device_one_is_there_at_a_time():
    home = Home(None, high=100, vae=20)
    assert [home.use(name) for name in ("high", "vae", "vae")] == [["high"], ["vae"], ["vae"]]


def test_memory_that_cannot_be_pinned_is_a_warning(monkeypatch):
    class Cudart:
        cudaHostRegister = staticmethod(lambda address, size, flags: 2)

    def refuse(code):
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(torch.cuda, "check_error", refuse)
    with pytest.warns(MinicosWarning, match=r"cannot be pinned \(CUDA error: out of memory\)"):
        assert host_memory(4096, pin=True).shape == (4096,)
