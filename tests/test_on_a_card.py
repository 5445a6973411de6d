"""Things that run only on a CUDA card and belong to no kernel: attention's backends, weights on the
move, loading, memory as it was planned, and watching that never waits. Skipped where there is none.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minicos import attention, cost, device, measures
from minicos.analysis.energy import Energy
from minicos.analysis.tools import cases
from minicos.bench import load as loading
from minicos.bench.networks import A14B, QUICK, Subject, random_dit
from minicos.bench.vae import psnr, random_vae
from minicos.config import VAEConfig
from minicos.dit import DiT
from minicos.hooks import NO_HOOKS
from minicos.open import load
from minicos.ops import REFERENCE, rms_norm
from minicos.precision import tf32_convolutions
from minicos.stream import CudaCopyQueue, HostBuffer, Streamer
from minicos.weights.load import load_into
from tests.golden import rel_l2

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda")
SDPA = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def heads(length: int, n: int = 2, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q, k and v, with heads of 128."""
    draw = torch.Generator(CARD).manual_seed(0)
    shape = 1, n, length, 128
    q, k, v = (torch.randn(shape, generator=draw, device=CARD).to(dtype) for _ in range(3))
    return q, k, v


def subject(layers: int, grid: tuple[int, int, int], cfg=A14B, kernels: bool | None = None):
    """A14B's width, bfloat16, with this number of blocks and latents of this size."""
    cfg = replace(cfg, num_layers=layers)
    dit = random_dit(cfg, CARD, torch.bfloat16, device.operations(CARD, kernels))
    draw = torch.Generator(CARD).manual_seed(0)
    randn = partial(torch.randn, generator=draw, device=CARD)
    x, y = randn(1, cfg.out_dim, *grid), randn(1, cfg.in_dim - cfg.out_dim, *grid)
    text = randn(1, cfg.text_len, cfg.text_dim)
    return Subject("test", dit, x, torch.full((1, 1), 937.0), text, y)


def peak(run) -> int:
    """Bytes that a call allocates in addition to existing ones."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", SDPA, ids=lambda b: b.name)
def test_a_backend_and_its_logarithms_are_right(backend):
    """Against float64, for a length that is not a multiple of 128 and for one that is."""
    for length in (1000, 1024):
        q, k, v = heads(length)
        scores = (q.double() @ k.double().mT) * 128**-0.5
        with sdpa_kernel([backend]):
            try:
                found = F.scaled_dot_product_attention(q, k, v)
            except RuntimeError:
                pytest.skip(f"{backend.name} does not serve this card")
            again, lse = measures.attention_with_lse(q, k, v)
        assert torch.equal(found, again)
        assert rel_l2(found.double(), scores.softmax(-1) @ v.double()) < 1e-2
        assert (lse.double() - scores.logsumexp(-1)).abs().max() < 1e-3


@pytest.mark.parametrize("length", [256, 257, 264, 320, 376])
def test_the_attention_of_this_card_is_right_for_every_length(length):
    q, k, v = heads(length)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for op in (attention.best(CARD), attention.cudnn_first):
        assert rel_l2(op(q, k, v).double(), expected) < 1e-2


class Late(CudaCopyQueue):
    """Copies that begin late, into buffers with garbage until then: a missing wait shows."""

    def _copy(self, target, source, after):
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            target.fill_(0xFF)
            torch.cuda._sleep(20_000_000)
        return super()._copy(target, source, after)


@torch.no_grad()
def test_streamed_is_resident_however_late_copies_come():
    s = subject(6, (3, 16, 16))
    expected = s.run().clone()
    streamer = Streamer(Late(CARD), CARD)
    for block in s.dit.blocks:
        state = {k: p.detach().clone() for k, p in block.named_parameters()}
        host = streamer.host[block] = HostBuffer(block, lambda k, s=state: s[k].dtype, pin=True)
        for name, p in state.items():
            host.view(name).copy_(p)
        host.bind()
    s.dit.stream_blocks(streamer.stream)
    for _ in range(5):
        assert torch.equal(s.run(), expected)


@torch.no_grad()
def test_wherever_weights_live_a_run_ends_alike():
    """The embedded model: bit for bit on the card, and near the CPU's latent."""
    batch, ends = cases.held_out("maze", 1), {}
    for name, options in {
        "cpu": {"device": "cpu"},
        "resident": {},
        "swap": {"residency": "swap"},
        "stream": {"residency": "stream"},
        "disk": {"residency": "disk"},
        "reference": {"ops": REFERENCE},
    }.items():
        wan = load("tiny", **({"device": "cuda"} | options)).with_preset(steps=4)
        condition = cases.condition(wan, batch)
        *_, last = wan.sample(condition, noise=cases.noise(wan, condition, batch))
        ends[name] = last.next.cpu()
        assert wan.decode(last.next).shape[2:] == (64, 64, 3)
    for name in ("swap", "stream", "disk"):
        assert torch.equal(ends[name], ends["resident"])
    for name in ("cpu", "reference"):
        assert rel_l2(ends[name], ends["resident"]) < 1e-3


def test_a_checkpoint_gives_the_same_weights_on_the_card(tmp_path):
    """Through pinned buffers, with values checked."""
    with torch.device("meta"):
        network = DiT(QUICK)
    loading.write(tmp_path, {k: p.shape for k, p in network.state_dict().items()}, 10**5)
    states = []
    for where in ("cpu", "cuda"):
        with torch.device("meta"):
            twin = DiT(QUICK)
        policy = partial(loading.policy, torch.bfloat16)
        load_into(twin, tmp_path, dtype=policy, device=where, check_finite=True)
        states.append(twin.state_dict())
    assert all(torch.equal(x, states[1][k].cpu()) for k, x in states[0].items())


@torch.no_grad()
def test_memory_is_as_it_was_planned():
    s = subject(2, (5, 60, 104), kernels=False)
    planned = cost.dit_memory(s.dit.cfg, s.x.shape, torch.bfloat16, torch.float32)
    assert 0.5 * planned < peak(s.run) < 1.2 * planned
    vae = random_vae(VAEConfig(), CARD)
    latent = torch.randn(1, 16, 3, 60, 104, device=CARD)
    planned = cost.vae_memory(vae.cfg, 480, 832, CARD)
    assert peak(lambda: [*vae.stream(latent)]) < 1.5 * planned


@torch.no_grad()
def test_tf32_is_good_enough_to_decode_with():
    """The default of cards, on the embedded model's decoder."""
    wan = load("tiny", device="cuda")
    latent = wan.vae.encode(torch.rand(1, 3, 13, 64, 64, device=CARD) * 2 - 1)
    pictures = []
    for allowed in (False, True):
        with tf32_convolutions(allowed):
            pictures.append(wan.vae.decode(latent))
    assert psnr(*pictures) > 60
    assert wan.decode_tf32


def strict(hook):
    """The hook, where torch refuses whatever waits for the card."""

    def call(x, site):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return hook(x, site)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@torch.no_grad()
def test_watching_energy_never_waits_for_the_card():
    """Torch refuses any synchronisation: results come to the host when the step has ended."""
    s = subject(2, (3, 16, 16))
    energy = Energy((0,), ops=s.dit.ops)
    hooks = energy.hooks().at(step=0, branch="cond")
    s.run(hooks)  # compiles kernels
    energy.keep(None, None)
    s.run(replace(hooks, rules=tuple(replace(r, hook=strict(r.hook)) for r in hooks.rules)))
    assert set(energy.keep(None, None)) > {"cond.raw", "cond.components"}
    plain, watched = (peak(partial(s.run, h)) for h in (NO_HOOKS, hooks))
    assert watched - plain < 10**9


@torch.no_grad()
def test_one_norm_for_cross_attention_is_the_references():
    x = torch.randn(1, 4096, 5120, device=CARD, dtype=torch.bfloat16)
    weight = torch.rand(5120, device=CARD) + 0.5
    found = device.operations(CARD, kernels=True).rms_norm(x, weight, 1e-6, torch.bfloat16)
    expected = rms_norm(x, weight, 1e-6, torch.bfloat16)
    assert (found != expected).double().mean() < 1e-3
