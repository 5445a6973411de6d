"""The VAEs against the official code, and what makes them stream: chunks do not matter, and
nothing looks ahead.
"""

import re
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicos import puzzles
from minicos.analysis.tools import cases
from minicos.config import TINY_VAE, VAE22, VAEConfig
from minicos.errors import MinicosError
from minicos.media import to_float
from minicos.open import load
from minicos.vae import VAE, CausalConv3d, Conv2d, DownStage, UpStage, at_once
from tests import golden
from tests.checkpoints import manifest
from tests.golden import rel_l2, rel_max

DATA = {case: golden.read(case) for case in ("vae21", "vae22")}
SPELLING = {
    case: tuple(golden.info(case)["config"]["temperal_downsample"]) for case in DATA
}  # the official one
ARCHITECTURES = {
    "vae21": replace(
        golden.config(VAEConfig, "vae21"), temporal_downsample=SPELLING["vae21"]
    ),  # stride 4 x 8 x 8
    "vae22": replace(
        golden.config(VAEConfig, "vae22"),
        temporal_downsample=SPELLING["vae22"],
        patch_size=2,
        stage_shortcuts=True,
    ),  # 4 x 16 x 16
    "shallow": replace(TINY_VAE, dim=4),
    "two-fold": VAEConfig(
        4, 2, (1, 2), num_res_blocks=1, temporal_downsample=(True,), mean=(0.0, 1.0), std=(1.0, 2.0)
    ),
    # Its decoder narrows where it doubles frames, so that the two copies of a frame in a shortcut
    # differ.
    "narrowing": VAEConfig(
        4,
        2,
        num_res_blocks=1,
        temporal_downsample=(True, True, False),
        dec_dim=6,
        patch_size=2,
        stage_shortcuts=True,
        mean=(0.0, 1.0),
        std=(1.0, 2.0),
    ),
}
each_case = pytest.mark.parametrize("case", DATA)


@cache
def vae(architecture: str = "vae21", dtype: torch.dtype = torch.float32) -> VAE:
    """The golden network, or a random one of another architecture. Shared: do not change it."""
    network = VAE(ARCHITECTURES[architecture]).requires_grad_(False)
    if architecture in DATA:
        network.load_state_dict(golden.read(f"{architecture}.weights"))
        return network.to(dtype)
    draw = torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        p.copy_(
            1 + 0.3 * noise
            if name.endswith("gamma")
            else noise * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
        )
    return network.to(dtype)


def video(network: VAE, latents: int, seed: int = 0, height: int = 2, width: int = 3) -> Tensor:
    """A random clip that has `latents` latent frames of height x width."""
    ft, fh, fw = network.cfg.stride
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 3, 1 + ft * (latents - 1), fh * height, fw * width, generator=draw)
    return (2 * pixels - 1).to(network.conv1.weight)


def latent(network: VAE, frames: int, seed: int = 0, height: int = 2, width: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, network.cfg.z_dim, frames, height, width, generator=draw).to(
        network.conv1.weight
    )


def each_architecture(dtype: torch.dtype):
    return pytest.mark.parametrize(
        "network", [vae(name, dtype) for name in ARCHITECTURES], ids=ARCHITECTURES
    )


# -- the official outputs --------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "file"), [(VAEConfig(), "Wan2.1_VAE"), (VAE22, "Wan2.2_VAE")])
def test_names_and_shapes_are_those_of_the_real_file(config, file):
    with torch.device("meta"):
        network = VAE(config)
    assert {name: tuple(p.shape) for name, p in network.state_dict().items()} == manifest(
        f"official.{file}"
    )


@each_case
def test_the_real_configurations_have_the_official_topology_and_statistics(case):
    real, small = {"vae21": VAEConfig(), "vae22": VAE22}[case], ARCHITECTURES[case]
    assert replace(real, dim=small.dim, dec_dim=small.dec_dim) == small
    assert real.stride == {"vae21": (4, 8, 8), "vae22": (4, 16, 16)}[case]


@each_case
@pytest.mark.parametrize("chunk", [4, 8])
def test_encoding_is_the_official_one(case, chunk):
    data = DATA[case]
    assert (
        rel_max(vae(case).encode(data["in.video"], chunk), data["out.mu"]) < 1.2e-6
    )  # measured 1.9e-7, 3.0e-7


@each_case
@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_decoding_is_the_official_one(case, chunk):
    data = DATA[case]
    assert (
        rel_max(vae(case).decode(data["in.latent"], chunk), data["out.video"]) < 1e-5
    )  # measured 3.3e-6, 3.2e-6


@each_case
def test_epsilons_are_the_official_ones(case):
    """Weights scaled down until the epsilon of the norms shows: a wrong one is off by 5 % or
    more.
    """
    expected = golden.read("eps")
    weights = golden.read(f"{case}.weights")
    for pattern, factor in golden.info("eps")["config"]["scaling"][case]:
        base, exponent = factor.split("**")
        weights = {
            k: v * int(base) ** int(exponent) if re.search(pattern, k) else v
            for k, v in weights.items()
        }
    network = VAE(ARCHITECTURES[case]).requires_grad_(False)
    network.load_state_dict(weights)
    mu, pixels = (
        network.encode(DATA[case]["in.video"][:, :, :1]),
        network.decode(DATA[case]["in.latent"][:, :, :1]),
    )
    assert rel_max(mu, expected[f"{case}.mu"]) < 1e-6  # measured 1.3e-7, 3.3e-7
    assert rel_max(pixels, expected[f"{case}.video"]) < 3e-6  # measured 8.6e-7, 1.8e-6


@each_case
def test_latents_are_the_posterior_mean_normalised(case):
    mu, log_variance = vae(case).posterior(DATA[case]["in.video"][:, :, :5])
    config = ARCHITECTURES[case]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.mean, config.std))
    assert (
        rel_max(vae(case).encode(DATA[case]["in.video"])[:, :, :2], (mu - mean) / std) < 2e-6
    )  # measured 3.9e-7, 4.7e-7
    assert log_variance.shape == mu.shape
    assert rel_max(log_variance, mu) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes(architecture):
    network = vae(architecture)
    ft, fh, fw = network.cfg.stride
    known = {"two-fold": (2, 2, 2), "vae22": (4, 16, 16), "narrowing": (4, 16, 16)}
    assert (ft, fh, fw) == known.get(architecture, (4, 8, 8))
    assert network.encode(torch.zeros(2, 3, 1 + 2 * ft, 2 * fh, 3 * fw)).shape == (
        2,
        network.cfg.z_dim,
        3,
        2,
        3,
    )
    assert network.decode(torch.zeros(2, network.cfg.z_dim, 3, 2, 3)).shape == (
        2,
        3,
        1 + 2 * ft,
        2 * fh,
        3 * fw,
    )


# -- the shortcuts of the second generation --------------------------------------------------------


def test_shortcuts_fold_and_unfold_as_drawn_by_hand():
    """One channel, two frames of 2x2 pixels: averaged into two channels (one per frame), and
    repeated out of eight.
    """
    pixels = torch.arange(8.0).view(1, 1, 2, 2, 2)
    averaged = DownStage([], out_dim=2, time=2, space=2).average(pixels, frames=1)
    assert averaged.flatten().tolist() == [1.5, 5.5]
    late = DownStage([], out_dim=2, time=2, space=2).average(
        pixels[:, :, :1], frames=1
    )  # the first of a clip: zeros before it
    assert late.flatten().tolist() == [0, 1.5]
    up = UpStage([], out_dim=1, time=2, space=2)
    assert torch.equal(up.repeat(torch.arange(8.0).view(1, 8, 1, 1, 1), frames=2), pixels)
    assert torch.equal(
        up.repeat(torch.arange(8.0).view(1, 8, 1, 1, 1), frames=1), pixels[:, :, 1:]
    )  # the first copy is dropped


# -- chunks do not matter --------------------------------------------------------------------------
# In float64, where a wrong frame could not hide: convolutions of other sizes add in other orders,
# and in float32 a random decoder makes 2e-5 of that.


@each_architecture(torch.float64)
def test_encoding_does_not_depend_on_the_chunk(network):
    clip, ft = video(network, 7), network.cfg.stride[0]
    expected = network.encode(clip, ft)
    for times in (2, 3, 6):
        assert rel_max(network.encode(clip, times * ft), expected) < 5e-15  # measured 9.5e-16


@each_architecture(torch.float64)
def test_decoding_does_not_depend_on_the_chunk(network):
    z, ft = latent(network, 5), network.cfg.stride[0]
    expected = network.decode(z, 1)
    for chunk in (2, 3, 5, 99):
        pieces = list(network.stream(z, chunk))
        sizes = [ft * len(part) for part in torch.arange(5).split(chunk)]
        assert [p.shape[2] for p in pieces] == [sizes[0] - (ft - 1), *sizes[1:]]
        assert rel_max(torch.cat(pieces, dim=2), expected) < 1.5e-13  # measured 3.6e-14


plans = st.lists(st.integers(1, 4), min_size=1, max_size=4)  # latent frames of each chunk


@settings(max_examples=15)
@given(plans, st.sampled_from(["shallow", "narrowing"]))
def test_any_plan_of_chunks_encodes_alike(plan, architecture):
    """The first chunk has one frame more, as the first latent frame covers one picture."""
    network = vae(architecture, torch.float64)
    clip, stream = video(network, sum(plan), height=1, width=2), {}
    sizes = [4 * n - 3 * (i == 0) for i, n in enumerate(plan)]
    parts = [network.posterior(part, stream)[0] for part in clip.split(sizes, dim=2)]
    assert [p.shape[2] for p in parts] == plan
    assert rel_max(torch.cat(parts, dim=2), network.posterior(clip)[0]) < 5e-15  # measured 1.0e-15


@settings(max_examples=15)
@given(plans, st.sampled_from(["shallow", "narrowing"]))
def test_any_plan_of_chunks_decodes_alike(plan, architecture):
    network = vae(architecture, torch.float64)
    z, stream = latent(network, sum(plan), height=1, width=2), {}
    parts = [network.decoder(part, stream) for part in z.split(plan, dim=2)]
    assert rel_max(torch.cat(parts, dim=2), network.decoder(z, {})) < 3e-13  # measured 6.4e-14


@pytest.mark.parametrize(
    ("height", "width", "count"), [(480, 832, 1), (256, 256, 1), (128, 128, 2), (64, 64, 8)]
)
def test_small_frames_pass_in_longer_chunks(height, width, count):
    assert at_once(height, width) == count


def test_a_short_clip_of_small_frames_is_one_chunk_by_default():
    network = vae()
    z, clip = latent(network, 3), video(network, 3)
    (whole,) = network.stream(z)
    assert torch.equal(whole, network.decode(z, 3))
    assert torch.equal(network.encode(clip), network.encode(clip, 8))


def test_narrow_layers_stay_channels_last_on_a_cpu(monkeypatch):
    """The layout that makes them fast, and the same numbers in torch's usual layout."""
    network, z, layouts = vae(), latent(vae(), 3), set()
    for layer in network.decoder.modules():
        if isinstance(layer, CausalConv3d):
            layer.register_forward_hook(
                lambda layer, given, out: layouts.add(
                    out.is_contiguous(memory_format=torch.channels_last_3d)
                )
            )
    quick = network.decode(z)
    assert layouts == {True}
    monkeypatch.setattr("minicos.vae.NARROW", 0)
    layouts.clear()
    assert rel_max(network.decode(z), quick) < 3e-5
    assert False in layouts


def test_nothing_is_left_behind_and_streams_do_not_meet():
    network, clip = vae(), DATA["vae21"]["in.video"]
    one, two = (latent(network, 3, seed=s) for s in (1, 2))
    alone = network.decode(one), network.decode(two)
    together = list(zip(network.stream(one), network.stream(two), strict=True))
    for i in range(2):
        assert torch.equal(torch.cat([pair[i] for pair in together], dim=2), alone[i])
    assert torch.equal(network.encode(clip), network.encode(clip))


@pytest.mark.parametrize("architecture", DATA)
def test_a_stream_holds_what_it_needs_and_no_more(architecture):
    """Views would keep whole chunks alive: three times as much memory."""
    network, stream = vae(architecture), {}
    for _ in range(3):
        network.decoder(torch.zeros(1, network.cfg.z_dim, 1, 2, 2), stream)
    network.posterior(torch.zeros(1, 3, 5, 32, 32), stream)
    held = sum(past.untyped_storage().nbytes() for past in stream.values())
    assert held == sum(past.nbytes for past in stream.values()) > 0


# -- nothing looks ahead ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3])  # in latent frames
@pytest.mark.parametrize("latents", [1, 2, 3])
@each_architecture(torch.float32)
def test_a_later_picture_never_changes_an_earlier_latent(network, latents, chunk):
    ft = network.cfg.stride[0]
    clip = video(network, 4)
    seen = 1 + ft * (latents - 1)  # the frames in the first `latents` latent frames
    edited = clip.clone()
    edited[:, :, seen] *= -1  # the first frame that they do not
    before, after = network.encode(clip, chunk * ft), network.encode(edited, chunk * ft)
    assert torch.equal(before[:, :, :latents], after[:, :, :latents])
    assert not torch.equal(before[:, :, latents], after[:, :, latents])


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("frame", [1, 2, 3])
@each_architecture(torch.float32)
def test_a_later_latent_never_changes_an_earlier_picture(network, frame, chunk):
    z, ft = latent(network, 4), network.cfg.stride[0]
    edited = z.clone()
    edited[:, :, frame] *= -1
    before, after = network.decode(z, chunk), network.decode(edited, chunk)
    first = 1 + ft * (frame - 1)  # first picture of the edited latent frame
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.equal(before[:, :, first], after[:, :, first])


@each_architecture(torch.float64)
def test_the_first_latent_is_that_of_the_image_alone(network):
    clip = video(network, 3)
    assert (
        rel_max(network.encode(clip)[:, :, :1], network.encode(clip[:, :, :1])) < 5e-15
    )  # measured 0
    z = latent(network, 3)
    assert (
        rel_max(network.decode(z)[:, :, :1], network.decode(z[:, :, :1])) < 1e-13
    )  # measured 1.8e-14


def test_samples_of_a_batch_do_not_see_each_other():
    network = vae()
    z = torch.cat([latent(network, 3, seed=s) for s in range(2)])
    together = network.decode(z)
    for i in range(2):
        assert torch.equal(together[i : i + 1], network.decode(z[i : i + 1]))
    clips = torch.cat([video(network, 2, seed=s) for s in range(2)])
    both = network.encode(clips)
    for i in range(2):
        assert torch.equal(both[i : i + 1], network.encode(clips[i : i + 1]))


@each_architecture(torch.float32)
def test_one_dnn_convolutions_are_torchs_own(network, monkeypatch):
    z, clip = latent(network, 3), video(network, 2)
    quick = network.decode(z), network.encode(clip)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert rel_max(quick[0], network.decode(z)) < 3e-5  # measured 1.0e-5
    assert rel_max(quick[1], network.encode(clip)) < 3e-6  # measured 7.0e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_can_be_compiled(dtype, monkeypatch):
    """Without a graph break; torch.compile cannot trace PyTorch's function of oneDNN."""
    monkeypatch.setattr("minicos.vae.fast_bfloat16", lambda: False)
    conv = CausalConv3d(4, 8, 3, padding=1).to(dtype)
    x = torch.randn(1, 4, 5, 6, 6, dtype=dtype)
    compiled = torch.compile(lambda x: conv(x, {}), backend="eager", fullgraph=True)
    assert rel_max(compiled(x), conv(x, {})) < (2**-6 if dtype == torch.bfloat16 else 1e-5)


# -- bfloat16 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Conv2d, CausalConv3d])
def test_convolutions_round_as_a_processor_with_bfloat16_does(kind, monkeypatch):
    """float32 products rounded once are PyTorch's own convolution in bfloat16, to one rounding."""
    torch.manual_seed(0)
    conv = kind(8, 16, 3, padding=1).bfloat16()
    x = torch.randn(2, 8, *[5] * len(conv.kernel_size), dtype=torch.bfloat16)
    found = []
    for fast in (True, False):
        monkeypatch.setattr("minicos.vae.fast_bfloat16", lambda fast=fast: fast)
        found.append(conv(x, {}) if kind is CausalConv3d else conv(x))
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert rel_max(*found) < 2**-8  # the spacing of bfloat16 at 1 is 2^-7


@pytest.mark.parametrize("kind", ["maze", "turn", "memory", "mark"])
def test_puzzles_decode_alike_in_bfloat16(kind):
    """PSNR of the embedded decoder in bfloat16 to itself in float32. The drawn videos are at 37
    dB of either.
    """
    exact, rounded = (
        load("tiny", device="cpu").vae,
        load("tiny", device="cpu", decode_dtype=torch.bfloat16).vae,
    )
    assert {p.dtype for p in rounded.decoder.parameters()} == {torch.bfloat16}
    z = exact.encode(
        torch.stack([to_float(case.puzzle.draw(0)) for case in cases.held_out(kind, 2)])
    )
    assert torch.equal(rounded.encode(exact.decode(z)), exact.encode(exact.decode(z)))
    expected, found = exact.decode(z), rounded.decode(z)
    assert found.dtype == torch.float32
    psnr = 10 * torch.log10(4 / (found - expected).square().mean())
    assert psnr > 55  # measured 56.1, 56.4, 57.3, 56.6


@each_case
def test_weights_may_be_bfloat16(case):
    """The result is float32; the effect of rounded activations is that of an untrained
    network.
    """
    network, data = vae(case, torch.bfloat16), DATA[case]
    mu, pixels = network.encode(data["in.video"]), network.decode(data["in.latent"])
    assert mu.dtype == pixels.dtype == torch.float32
    assert rel_l2(mu, data["out.mu"]) < 0.02  # measured 0.0048, 0.0056
    assert rel_l2(pixels, data["out.video"]) < 0.05  # measured 0.0113, 0.0155


# -- edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), "4 frames.*e.g. 5"),
        ((1, 3, 7, 16, 16), "7 frames.*e.g. 5"),
        ((1, 3, 5, 12, 16), "16x12 pixels"),
        ((1, 3, 5, 16, 20), "20x16 pixels"),
        ((1, 4, 5, 16, 16), "3 colour channels, not 4"),
    ],
)
def test_encoding_rejects_what_does_not_divide(shape, message):
    with pytest.raises(ValueError, match=message):
        vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("chunk", [-4, 0, 1, 6])
def test_encoding_rejects_chunks_that_cut_a_latent_frame(chunk):
    with pytest.raises(ValueError, match="multiple of 4"):
        vae().encode(DATA["vae21"]["in.video"], chunk)


def test_decoding_rejects_chunks_of_nothing():
    with pytest.raises(ValueError, match="chunk must be 1 or more"):
        vae().stream(torch.zeros(1, 16, 2, 2, 2), 0)


def test_damaged_weights_do_not_make_a_black_video():
    vae = VAE(ARCHITECTURES["shallow"]).requires_grad_(False)
    video, latent = torch.ones(1, 3, 5, 16, 16), torch.ones(1, 16, 2, 2, 2)
    for conv, what, use in (
        (vae.encoder.conv1, "video", lambda: vae.encode(video)),
        (vae.decoder.conv1, "latent", lambda: vae.decode(latent)),
    ):
        use()
        conv.weight.fill_(3e38)
        with pytest.raises(MinicosError, match=f"NaN or infinity of this {what}: .* damaged"):
            use()


def test_pixels_are_clamped():
    extreme = vae().decode(100 * latent(vae(), 2))
    assert extreme.min() == -1
    assert extreme.max() == 1


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to ten bits of mantissa, to nearest even: what a card multiplies in TF32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def test_tf32_is_good_enough_to_decode_with():
    """The default of cards, on a CPU: every convolution of the decoder with rounded factors."""
    plain = load("tiny", device="cpu")
    narrow = deepcopy(plain.vae)
    for layer in narrow.decoder.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
            layer.weight.data = tf32(layer.weight.data)
            layer.register_forward_pre_hook(lambda layer, given: (tf32(given[0]), *given[1:]))
    (puzzle,) = puzzles.distinct("maze", 1, 4, "test")
    latent = plain.vae.encode(to_float(puzzle.draw(0))[None])
    error = (narrow.decode(latent) - plain.vae.decode(latent)).square().mean()
    assert 75 < 10 * torch.log10(4 / error) < 120  # measured 84.5 to 86.9 dB on six puzzles
    assert not plain.decode_tf32


def test_what_a_layer_returned_stays_as_it_was():
    """A forward hook may keep a layer's output: no later layer writes into it."""
    vae = load("tiny", device="cpu").vae
    kept = []

    def keep(module, given, out):
        if isinstance(out, torch.Tensor):
            kept.append((module, out, out.clone()))

    handles = [module.register_forward_hook(keep) for module in vae.modules()]
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        vae.decode(vae.encode(video))
    for handle in handles:
        handle.remove()
    assert len(kept) > 100
    changed = [type(module).__name__ for module, out, copy in kept if not torch.equal(out, copy)]
    assert changed == []
