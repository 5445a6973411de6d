"""Costs counted from shapes against what torch counts and allocates."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from minicos import cost
from minicos.config import VAE22, VARIANTS, DiTConfig, VAEConfig
from minicos.dit import FLOAT32, DiT
from minicos.vae import VAE

CFG = DiTConfig(
    in_dim=7, out_dim=4, dim=96, ffn_dim=208, num_heads=4, num_layers=3, text_dim=24, text_len=11
)


@pytest.mark.parametrize(("batch", "times"), [(1, 1), (2, 1), (1, 3)])
def test_flops_are_those_that_torch_counts(batch, times):
    network = DiT(CFG).requires_grad_(False)
    x, text = torch.randn(batch, 7, 3, 10, 14), torch.randn(batch, 11, 24)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # it does not count the CPU's fused one
        network(x, torch.full((batch, times), 500.0), text)
    assert cost.flops(CFG, x.shape, times) == counter.get_total_flops()


def test_flops_of_the_large_models():
    """Numbers published or counted elsewhere: 1,678 and 6,523 TFLOP with all
    element-wise work.
    """
    cfg = VARIANTS["Wan2.2-T2V-A14B"]
    assert cost.tokens(cfg, (1, 16, 21, 60, 104)) == 32_760
    assert cost.flops(cfg, (1, 16, 21, 60, 104)) / 1e12 == pytest.approx(1678, rel=0.01)
    assert cost.flops(cfg, (1, 16, 21, 90, 160)) / 1e12 == pytest.approx(6523, rel=0.01)


def peak(run) -> int:
    """Bytes that torch has allocated at the worst moment of a call."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [
        (e.start_ns(), e.nbytes())
        for e in found.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    now = most = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("ffn", [320, 864, 1493])
@pytest.mark.parametrize(
    "dtype, residual", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_memory_of_a_forward_pass(dtype, residual, ffn):
    dtype, residual = getattr(torch, dtype), getattr(torch, residual)
    cfg = DiTConfig(
        in_dim=16,
        out_dim=16,
        dim=320,
        ffn_dim=ffn,
        num_heads=5,
        num_layers=2,
        text_dim=64,
        text_len=32,
    )
    network = DiT(cfg, residual_dtype=residual).requires_grad_(False)
    for name, p in network.named_parameters():
        p.data = p if any(part in name for part in FLOAT32) else p.to(dtype)
    x = torch.randn(1, 16, 4, 32, 32)
    found = peak(lambda: network(x, torch.full((1,), 500.0), torch.randn(1, 32, 64)))
    expected = cost.dit_memory(cfg, x.shape, dtype, residual)
    assert 0.95 < found / expected < 1.05  # measured 0.963 to 1.030


@pytest.mark.parametrize("where", ["float32", "unfolded", "bfloat16"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64)])
@pytest.mark.parametrize(
    "cfg", [VAEConfig(dim=8), replace(VAE22, dim=4, dec_dim=8)], ids=["2.1", "2.2"]
)
def test_memory_of_decoding(cfg, height, width, where, monkeypatch):
    """With oneDNN's convolutions, as on a card, and on a CPU without them. In bfloat16 a CPU is
    planned for as if it had none.
    """
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: where != "unfolded")
    monkeypatch.setattr("minicos.vae.AT_ONCE", 1)
    monkeypatch.setattr("minicos.vae.NARROW", 0)  # in the layout of a card
    narrow = where == "bfloat16"
    if narrow and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no convolutions in bfloat16")
    vae, (_, *stride) = VAE(cfg).requires_grad_(False), cfg.stride
    dtype = torch.bfloat16 if narrow else torch.float32
    vae.decoder.to(dtype)
    latent = torch.randn(1, cfg.z_dim, 3, height // stride[0], width // stride[1])

    def run():
        for piece in vae.stream(latent):
            del piece

    device = torch.device("cuda" if narrow else "cpu")
    ratio = peak(run) / cost.vae_memory(vae.cfg, height, width, device, dtype)
    # measured 0.980 to 1.012; 0.933 with narrower vectors (AVX2), for which oneDNN reserves less, and
    # 1.30 in bfloat16 with AMX, for which it reserves more, though no CPU is planned for so
    assert 0.91 < ratio < (1.35 if narrow else 1.03)


@pytest.mark.parametrize("cfg", [VAEConfig(dim=8), replace(VAE22, dim=4, dec_dim=8)])
def test_a_plan_suffices_for_chunks_of_small_frames(cfg, monkeypatch):
    monkeypatch.setattr("minicos.vae.AT_ONCE", 2 * 32 * 32)
    vae = VAE(cfg).requires_grad_(False)
    latent = torch.randn(1, cfg.z_dim, 6, 32 // cfg.stride[1], 32 // cfg.stride[1])

    def run():
        for piece in vae.stream(latent):
            del piece

    device = torch.device("cpu")
    one = cost.vae_memory(cfg, 32, 64, device)  # as much for one frame of twice the size
    assert one == cost.vae_memory(cfg, 32, 32, device)
    assert 0.4 < peak(run) / one < 1  # measured MEASURED


def test_throughput():
    """A number that a processor can have."""
    assert 1e8 < cost.throughput(torch.device("cpu"), torch.float32) < 1e14


def test_throughput_by_a_given_clock():
    """Here every product takes a second; the best of three times counts."""
    seconds = iter(range(1000))
    found = cost.throughput(torch.device("cpu"), torch.float32, lambda: float(next(seconds)))
    assert found == 5 * 2 * 512**3
