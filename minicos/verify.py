"""Compare minicos with diffusers and transformers, layer by layer, on the same weights and inputs.

    for part in verify(minicos.load("Wan2.2-I2V-A14B")):
        print(part.name, part.parted)

The networks of diffusers and transformers are built around our tensors, so there is no second copy
of the weights (except for the few that they keep in another dtype). Blocks that are streamed come
for theirs as for ours, so a model of any residency can be compared. Layers are compared in the
order in which they run. If two networks differ in one place, the first row beyond its tolerance is
that place; later rows inherit the difference.

One systematic difference is known. diffusers computes the time sinusoid in float32, the official
code in float64. This makes up to 5.6e-5 in a table of numbers between -1 and 1, and 4e-6 to 9e-6 in
the velocity. By default their sinusoid is replaced by the exact one, so that a much smaller
tolerance applies to everything else, and one more row shows the velocity of diffusers as shipped.
`as_shipped` keeps their sinusoid throughout.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minicos.clip import CLIP, pixels
from minicos.dit import DiT
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.ops import sinusoid
from minicos.text import TextEncoder
from minicos.vae import VAE
from minicos.wan import Wan
from minicos.weights.names import (
    CLIP_TRANSFORMERS,
    DIT_DIFFUSERS,
    UMT5_TRANSFORMERS,
    VAE22_DIFFUSERS,
    VAE_DIFFUSERS,
    decoder_layers,
    translate,
)

Pair = tuple[str, Tensor, Tensor]  # a point, our tensor, their tensor
TOLERANCE = {
    torch.float32: 5e-6,
    torch.bfloat16: 5e-2,
}  # of rel_l2, by dtype; the embedded model: 6e-7 and 2e-2
MAX_TO_L2 = 10  # allowed ratio of rel_max to rel_l2; the embedded model: 1.0e-5 and 5.0e-2
# for everything after a float32 time sinusoid; random weights, 30 layers of 1.3B: 9e-6 (rel_max)
AS_SHIPPED = 2e-5


@dataclass(frozen=True)
class Row:
    """The difference of the two networks at one point, relative to the size of their tensor."""

    point: str
    rel_max: float  # max |a - b| / max |b|
    rel_l2: float  # ||a - b|| / ||b||
    tolerance: float  # largest allowed rel_l2

    @property
    def ok(self) -> bool:
        """Whether both errors are within their tolerance, which NaN never is. A single wrong number
        among many shows only in rel_max.
        """
        return self.rel_l2 <= self.tolerance and self.rel_max <= self.tolerance_max

    @property
    def tolerance_max(self) -> float:
        """The largest allowed rel_max; it is the error of one number, rel_l2 an average."""
        return MAX_TO_L2 * self.tolerance


@dataclass(frozen=True)
class Part:
    """The comparison of one network: an expert, the VAE, the text or the image encoder."""

    name: str  # "high" | "low" | "vae" | "text" | "clip"
    rows: tuple[Row, ...]
    skipped: str = ""  # the reason if there are no rows

    @property
    def parted(self) -> Row | None:
        """The first row beyond its tolerance, in the order in which layers run, or None."""
        return next((row for row in self.rows if not row.ok), None)


def verify(
    wan: Wan,
    grid: tuple[int, int, int] = (3, 4, 6),
    *,
    as_shipped: bool = False,
    tolerance: float | None = None,
) -> Iterator[Part]:
    """Compare every network of a model with its counterpart on random inputs; yields each `Part`
    when it is done.

    In addition to the weights this needs host memory for all layer outputs of one network, twice:
    about 4 GB for 14B in float32.

    Args:
        grid: tokens along frames, height and width. A small grid suffices, since errors in the code
            show at any size.
        as_shipped: keep the float32 time sinusoid of diffusers, and allow for it.
        tolerance: largest allowed rel_l2, instead of `TOLERANCE` of the dtype.

    Raises:
        MinicosError: diffusers or transformers is not installed; raised before anything runs.
    """
    peers()
    return _parts(wan, grid, as_shipped, tolerance)


def _parts(
    wan: Wan, grid: tuple[int, int, int], as_shipped: bool, tolerance: float | None
) -> Iterator[Part]:
    draw = torch.Generator().manual_seed(0)
    allowed = tolerance or TOLERANCE[wan.dtype]
    shipped = max(allowed, AS_SHIPPED)

    encoder = wan.residency.to_device(wan.text)
    ids, mask = _tokens(encoder, draw)
    yield Part("text", _rows(compare_text(encoder, transformers_umt5(encoder), ids, mask), allowed))

    _, ph, pw = wan.experts["high"].cfg.patch_size
    f, h, w = grid[0], grid[1] * ph, grid[2] * pw
    prompt = encoder(ids[1:], mask[1:]).masked_fill(mask[1:, :, None] == 0, 0)
    text = F.pad(
        prompt, (0, 0, 0, wan.text.cfg.text_len - prompt.shape[1])
    )  # b t d', in the form of `text.encode`
    for name, ours in wan.experts.items():
        cfg = ours.cfg
        if cfg.images and cfg.text_len != 512:
            yield Part(
                name,
                (),
                "diffusers tells image rows from text by a text length of 512, and this network "
                "has another",
            )
            continue
        ours = wan.residency.to_device(ours)
        x = torch.randn(1, cfg.in_dim, f, h, w, generator=draw).to(wan.device)
        y = x[:, cfg.out_dim :] if cfg.in_dim > cfg.out_dim else None
        clip = (
            torch.randn(1, cfg.image_tokens, cfg.image_dim, generator=draw).to(wan.device)
            if cfg.images
            else None
        )
        given = x[:, : cfg.out_dim], _timestep(wan, name, f), text, y, clip
        pairs = compare_dit(ours, diffusers_dit(ours, exact_time=not as_shipped), *given)
        rows = _rows(pairs, shipped if as_shipped else allowed)
        if not as_shipped:
            _, velocity, _ = pairs[-1]
            theirs = their_velocity(diffusers_dit(ours, exact_time=False), *given)
            rows += _rows([("velocity, diffusers as shipped", velocity, theirs)], shipped)
        yield Part(name, rows)

    stride = wan.vae.cfg.stride
    latent = torch.randn(1, wan.vae.cfg.z_dim, f, h, w, generator=draw).to(wan.device)
    video = (
        torch.rand(1, 3, (f - 1) * stride[0] + 1, h * stride[1], w * stride[2], generator=draw) * 2
        - 1
    )
    vae = wan.residency.to_device(wan.vae)
    pairs = compare_vae(vae, diffusers_vae(vae), video.to(wan.device), latent)
    yield Part("vae", _rows(pairs, tolerance or TOLERANCE[torch.float32]))  # always float32

    if wan.clip is not None:
        image = torch.rand(1, 3, 90, 120, generator=draw) * 2 - 1
        pairs = compare_clip(wan.clip, transformers_clip(wan.clip), image.to(wan.device))
        yield Part("clip", _rows(pairs, tolerance or TOLERANCE[torch.float32]))


def _tokens(encoder: TextEncoder, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and mask of two prompts (2 t): a short one, and one longer than 128, the largest distance
    that the encoder distinguishes.
    """
    length = min(encoder.cfg.text_len, 140)
    ids = torch.randint(2, encoder.cfg.vocab_size, (2, length), generator=draw)
    mask = (torch.arange(length) < torch.tensor([[length], [9]])).long()
    device = encoder.token_embedding.weight.device
    return (ids * mask).to(device), mask.to(device)


def _timestep(wan: Wan, expert: str, frames: int) -> Tensor:
    """A timestep that the expert serves (1 g): one for all frames, or 0 for an imposed first frame
    and one for the rest.
    """
    value = 937.0 if expert == "high" else 412.0
    return torch.tensor(
        [[0.0] + [value] * (frames - 1) if wan.preset.image == "imposed" else [value]]
    )


def _rows(pairs: Iterable[Pair], tolerance: float) -> tuple[Row, ...]:
    return tuple(Row(point, *distance(ours, theirs), tolerance) for point, ours, theirs in pairs)


def distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """rel_max and rel_l2; infinite if the shapes differ, or if b is zero and a is not."""
    if a.shape != b.shape:
        return float("inf"), float("inf")
    a, b = a.cpu().float(), b.cpu().float()
    if torch.equal(a, b):
        return 0.0, 0.0
    return ((a - b).abs().max() / b.abs().max()).item(), ((a - b).norm() / b.norm()).item()


# -- their networks, built around our tensors ------------------------------------------------------


def peers() -> tuple[ModuleType, ModuleType]:
    """diffusers and transformers. Raises MinicosError if one is not installed, or too old to
    support Wan.
    """
    try:
        import diffusers
        import transformers

        _ = (
            diffusers.WanTransformer3DModel,
            diffusers.AutoencoderKLWan,
            transformers.UMT5EncoderModel,
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        # lazy imports, which fail without docstrings (PYTHONOPTIMIZE=2), give the cause at the end
        reason = str(error).splitlines()[-1 if isinstance(error, RuntimeError) else 0]
        raise MinicosError(
            f"diffusers and transformers, the peers, cannot be used here ({reason}): "
            '`pip install -e ".[peers]"`'
        ) from error
    return diffusers, transformers


class ExactTime(nn.Module):
    """The time sinusoid of the official code, as a replacement for diffusers' `Timesteps`."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:  # ... -> ... dim
        return sinusoid(timestep.cpu(), self.dim).float().to(timestep.device)


def diffusers_dit(ours: DiT, exact_time: bool = True) -> nn.Module:
    """A WanTransformer3DModel (or ChronoEdit's) with the weights of `ours`; unless `exact_time`,
    with its own float32 time sinusoid.
    """
    diffusers, _ = peers()
    cfg = ours.cfg
    chrono = {} if ours.time_skip is None else {"temporal_skip_len": ours.time_skip + 1}
    with torch.device("meta"):
        theirs = (
            diffusers.ChronoEditTransformer3DModel if chrono else diffusers.WanTransformer3DModel
        )(
            patch_size=cfg.patch_size,
            num_attention_heads=cfg.num_heads,
            attention_head_dim=cfg.head_dim,
            in_channels=cfg.in_dim,
            out_channels=cfg.out_dim,
            text_dim=cfg.text_dim,
            freq_dim=cfg.freq_dim,
            ffn_dim=cfg.ffn_dim,
            num_layers=cfg.num_layers,
            eps=cfg.eps,
            image_dim=cfg.image_dim if cfg.images else None,
            added_kv_proj_dim=cfg.dim if cfg.images else None,
            pos_embed_seq_len=cfg.image_tokens if cfg.images == 2 else None,
        )
    rope = type(theirs.rope)(
        cfg.head_dim, cfg.patch_size, max_seq_len=1024, **chrono
    )  # its tables are not weights
    theirs.rope = rope.to(ours.patch_embedding.weight.device)
    if exact_time:
        theirs.condition_embedder.timesteps_proj = ExactTime(cfg.freq_dim)
    weights = {translate(name, DIT_DIFFUSERS): p for name, p in ours.state_dict().items()}
    wide, dtype = set(theirs._keep_in_fp32_modules), ours.dtype
    for name, p in weights.items():  # `to` returns the same tensor if nothing changes
        weights[name] = p.to(torch.float32 if wide & set(name.split(".")) else dtype)
    theirs = _filled(theirs, weights)
    if ours._in_turn is not iter:
        _stream_too(ours, theirs)
    return theirs


def _stream_too(ours: DiT, theirs: Any) -> None:
    """Give each block of theirs, just before it runs, the weights of our block, which are streamed:
    from the host's memory, or from their files.
    """
    turn: Iterator[nn.Module] = iter(())

    def bring(i: int, block: nn.Module, given: tuple) -> None:
        nonlocal turn
        if i == 0:
            turn = iter(ours._in_turn(ours.blocks))
        place = f"blocks.{i}."
        for name, p in next(turn).state_dict().items():
            here = translate(place + name, DIT_DIFFUSERS).removeprefix(place)
            target = block.get_parameter(here)
            target.data = p.to(target.dtype)

    for i, block in enumerate(theirs.blocks):
        block.register_forward_pre_hook(partial(bring, i))


def diffusers_vae(ours: VAE) -> nn.Module:
    """An AutoencoderKLWan with the weights of `ours`."""
    diffusers, _ = peers()
    cfg = ours.cfg
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(
            base_dim=cfg.dim,
            z_dim=cfg.z_dim,
            dim_mult=list(cfg.dim_mult),
            num_res_blocks=cfg.num_res_blocks,
            temperal_downsample=list(cfg.temporal_downsample),
            latents_mean=list(cfg.mean),
            latents_std=list(cfg.std),
            decoder_base_dim=cfg.dec_dim,
            is_residual=cfg.stage_shortcuts,
            patch_size=cfg.patch_size if cfg.patch_size > 1 else None,
            in_channels=3 * cfg.patch_size**2,
            out_channels=3 * cfg.patch_size**2,
        )
    return _filled(
        theirs, {translate(name, _vae_table(ours)): p for name, p in ours.state_dict().items()}
    )


def _vae_table(ours: VAE) -> dict[str, str]:
    return (
        VAE22_DIFFUSERS
        if ours.cfg.stage_shortcuts
        else VAE_DIFFUSERS | decoder_layers(ours.cfg.num_res_blocks)
    )


def transformers_umt5(ours: TextEncoder) -> nn.Module:
    """A UMT5EncoderModel with the weights of `ours` and eager attention, which is how the official
    code computes.
    """
    _, transformers = peers()
    cfg = ours.cfg
    config = transformers.UMT5Config(
        vocab_size=cfg.vocab_size,
        d_model=cfg.dim,
        d_kv=cfg.dim_attn // cfg.num_heads,
        d_ff=cfg.dim_ffn,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        relative_attention_num_buckets=cfg.num_buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        theirs = transformers.UMT5EncoderModel(config)
    weights = {translate(name, UMT5_TRANSFORMERS): p for name, p in ours.state_dict().items()}
    return _filled(theirs, weights | {"encoder.embed_tokens.weight": weights["shared.weight"]})


def transformers_clip(ours: CLIP) -> nn.Module:
    """A CLIPVisionModel with the blocks of `ours` (one fewer than its file has) and eager
    attention, in float32.
    """
    _, transformers = peers()
    cfg = ours.cfg
    config = transformers.CLIPVisionConfig(
        hidden_size=cfg.dim,
        intermediate_size=4 * cfg.dim,
        num_hidden_layers=cfg.num_layers - 1,
        num_attention_heads=cfg.num_heads,
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        theirs = transformers.CLIPVisionModel(config)
    device, tower = ours.visual.cls_embedding.device, getattr(theirs, "vision_model", theirs)
    # neither the position ids nor the final norm are weights
    tower.embeddings.position_ids = torch.arange(cfg.tokens, device=device)[None]
    weights = {
        "post_layernorm.weight": torch.ones(cfg.dim),
        "post_layernorm.bias": torch.zeros(cfg.dim),
    }
    for name, p in ours.state_dict().items():
        if "to_qkv" in name:
            for i, part in enumerate(p.chunk(3)):
                weights[translate(name.replace("to_qkv", f"to_qkv.{i}"), CLIP_TRANSFORMERS)] = part
        else:
            table_name = translate(name, CLIP_TRANSFORMERS)
            weights[table_name] = (
                p.flatten()
                if "class_embedding" in table_name
                else p[0]
                if "position" in table_name
                else p
            )
    _filled(tower, {name: p.to(device, torch.float32) for name, p in weights.items()})
    return theirs.eval().requires_grad_(False)


def _filled(theirs: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with exactly these tensors as its parameters."""
    theirs.load_state_dict(weights, assign=True)
    return theirs.eval().requires_grad_(False)


# -- both sides of a comparison, in the order in which our layers run ------------------------------


def same(x: Tensor, like: Tensor) -> Tensor:
    return x


def patches(x: Tensor, like: Tensor) -> Tensor:
    return rearrange(x, "b d f h w -> b (f h w) d")


def heads(x: Tensor, like: Tensor) -> Tensor:
    return rearrange(x, "b l (n k) -> b n l k", n=like.shape[1])


def joined(x: Tensor, like: Tensor) -> Tensor:
    """Rows of two images one after the other, or already joined -> b m d."""
    return x.reshape(like.shape)


def times(x: Tensor, like: Tensor) -> Tensor:
    """b 6d or, if every token has a timestep, b l 6d -> b g 6 d."""
    rows = rearrange(x, "b ... (six d) -> b (...) six d", six=6)
    return rows[:, :: rows.shape[1] // like.shape[1]]


# Hook point -> the same tensor in diffusers: a module, its output or input, and the conversion to
# our shape. diffusers rotates q and k of self-attention inside its processor, so they are taken
# where attention is computed (`_Attended`).
NETWORK_POINTS = {
    "embed": ("patch_embedding", "out", patches),
    "text": ("condition_embedder.text_embedder", "out", same),
    "time": ("condition_embedder.time_proj", "out", times),
}
BLOCK_POINTS = {
    ".self_attn.v": (".attn1.to_v", "out", heads),
    ".self_attn.heads": (".attn1.to_out.0", "in", heads),
    ".self_attn": (".attn1", "out", same),
    ".cross_attn.q": (".attn2.norm_q", "out", heads),
    ".cross_attn.k": (".attn2.norm_k", "out", heads),
    ".cross_attn.v": (".attn2.to_v", "out", heads),
    ".cross_attn.heads": (".attn2.to_out.0", "in", heads),
    ".cross_attn": (".attn2", "out", same),
    ".ffn.hidden": (".ffn.net.0", "out", same),
    ".ffn": (".ffn", "out", same),
    "": ("", "out", same),
}
# With an image branch. diffusers does not expose the attention to text and to the image separately.
IMAGE_POINTS = {"image": ("condition_embedder.image_embedder", "out", joined)}
IMAGE_BLOCK_POINTS = {
    ".cross_attn.k_img": (".attn2.norm_added_k", "out", heads),
    ".cross_attn.v_img": (".attn2.add_v_proj", "out", heads),
}


def compare_dit(
    ours: DiT,
    theirs: Any,
    x: Tensor,
    timestep: Tensor,
    text: Tensor,
    y: Tensor | None = None,
    clip: Tensor | None = None,
) -> list[Pair]:
    """Every hook point that has a counterpart in diffusers, the velocity last. The arguments are
    those of `DiT.forward`, with timestep b g.
    """
    seen: dict[str, Tensor] = {}
    hooks = Hooks()
    for depth in range(1, 5):
        hooks = hooks.on(
            ".".join("*" * depth), lambda tensor, site: seen.update({site.name: tensor.cpu()})
        )
    ours(x, timestep, text, y, clip, hooks=hooks)

    inside = BLOCK_POINTS
    if ours.cfg.images:
        inside = {
            name: where for name, where in inside.items() if name != ".cross_attn.heads"
        } | IMAGE_BLOCK_POINTS
    blocks = range(ours.cfg.num_layers)
    points = NETWORK_POINTS | (IMAGE_POINTS if ours.cfg.images else {})
    points |= {
        f"blocks.{i}{a}": (f"blocks.{i}{b}", end, read)
        for i in blocks
        for a, (b, end, read) in inside.items()
    }
    taps = {
        name: (theirs.get_submodule(module), side) for name, (module, side, _) in points.items()
    }
    attended = _Attended()
    with tapped(taps) as calls, attended:
        velocity = their_velocity(theirs, x, timestep, text, y, clip)
    found = {name: how(calls[name][0], seen[name]) for name, (_, _, how) in points.items()}
    each = (
        len(attended.calls) // ours.cfg.num_layers
    )  # of attention in a block, self-attention first
    for i in blocks if each else ():
        found[f"blocks.{i}.self_attn.q"], found[f"blocks.{i}.self_attn.k"] = attended.calls[
            i * each
        ]
    pairs = [(name, seen[name], found[name]) for name in seen if name in found]
    return [*pairs, ("velocity", seen["velocity"], velocity)]


class _Attended(TorchFunctionMode):
    """Records q and k of every attention computed in this context, after norm and rotation, which
    no module exposes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []  # b n l k each

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self.calls.append((given["query"].cpu(), given["key"].cpu()))
        return func(*args, **(kwargs or {}))


def their_velocity(
    theirs: Any,
    x: Tensor,
    timestep: Tensor,
    text: Tensor,
    y: Tensor | None = None,
    clip: Tensor | None = None,
) -> Tensor:
    """A pass of diffusers' network with our arguments; it takes one timestep per sample or per
    token.
    """
    dtype = theirs.patch_embedding.weight.dtype
    x = x if y is None else torch.cat([x, y], dim=1)
    if timestep.shape[1] > 1:
        _, ph, pw = theirs.config.patch_size
        timestep = timestep.repeat_interleave(x.shape[3] // ph * (x.shape[4] // pw), dim=1)
    else:
        timestep = timestep[:, 0]
    each = (
        None if clip is None else clip.reshape(-1, 257, clip.shape[-1]).to(dtype)
    )  # one image after the other
    return theirs(x.to(dtype), timestep.to(x.device), text.to(dtype), each).sample


def compare_vae(ours: VAE, theirs: Any, video: Tensor, latent: Tensor) -> list[Pair]:
    """Every layer with weights, in encoding and in decoding; then the latents and the video."""
    mean, std = (latent.new_tensor(v).view(1, -1, 1, 1, 1) for v in (ours.cfg.mean, ours.cfg.std))
    return [
        *compare_layers(
            (ours, lambda: ours.encode(video)),
            (theirs, lambda: (theirs.encode(video).latent_dist.mode() - mean) / std),
            _vae_table(ours),
            "encode",
        ),
        *compare_layers(
            (ours, lambda: ours.decode(latent)),
            (theirs, lambda: theirs.decode(latent * std + mean).sample),
            _vae_table(ours),
            "decode",
        ),
    ]


def compare_text(ours: TextEncoder, theirs: Any, ids: Tensor, mask: Tensor) -> list[Pair]:
    """Every layer with weights; then the rows of the prompts, without padding."""
    *layers, (name, a, b) = compare_layers(
        (ours, lambda: ours(ids, mask)),
        (theirs, lambda: theirs(ids, attention_mask=mask).last_hidden_state),
        UMT5_TRANSFORMERS,
        "rows",
    )
    pairs = [(k, _of_pairs(x) if "pos_embedding" in k else x, y) for k, x, y in layers]
    return [*pairs, (name, a[mask == 1], b[mask == 1])]


def _of_pairs(rows: Tensor) -> Tensor:
    """Convert a row for each distance (2t-1 n) to one for each query and key (t t n), as in
    transformers.
    """
    length = (len(rows) + 1) // 2
    return rows.unfold(0, length, 1).flip(0).mT


def compare_clip(ours: CLIP, theirs: Any, image: Tensor) -> list[Pair]:
    """Every block; then the features of images (b 3 H W) in [-1, 1]."""
    tower = getattr(theirs, "vision_model", theirs)
    blocks = [f"visual.transformer.{i}" for i in range(len(ours.visual.transformer))]
    with tapped({name: (ours.get_submodule(name), "out") for name in blocks}) as here:
        a = ours(image)
    layers = zip(blocks, tower.encoder.layers, strict=True)
    with tapped({name: (layer, "out") for name, layer in layers}) as there:
        b = theirs(pixels(image, ours.cfg.image_size), output_hidden_states=True).hidden_states[-1]
    return [
        *((name, _joined(here[name]), _joined(there[name])) for name in blocks),
        ("features", a, b),
    ]


def compare_layers(
    ours: tuple[nn.Module, Callable[[], Tensor]],
    theirs: tuple[nn.Module, Callable[[], Tensor]],
    table: Mapping[str, str],
    result: str,
) -> list[Pair]:
    """Run both networks; compare the output of every layer with weights, over all its calls, and
    the result.
    """
    (network, run), (peer, run_peer) = ours, theirs
    layers = {name: module for name, module in network.named_modules() if module._parameters}
    peers = {
        name: translate(f"{name}.weight", dict(table)).removesuffix(".weight") for name in layers
    }
    with tapped({name: (module, "out") for name, module in layers.items()}) as here:
        a = run()
    with tapped({name: (peer.get_submodule(path), "out") for name, path in peers.items()}) as there:
        b = run_peer()
    return [
        *((name, _joined(here[name]), _joined(there[name])) for name in here if name in there),
        (result, a, b),
    ]


def _joined(calls: list[Tensor]) -> Tensor:
    """The calls of a layer as one tensor; the pieces of a video are joined along time."""
    return torch.cat(calls, dim=2 if calls[0].ndim == 5 else 0)


@contextmanager
def tapped(taps: Mapping[str, tuple[nn.Module, str]]) -> Iterator[dict[str, list[Tensor]]]:
    """Record, in the host's memory, what each of these modules returns ("out") or receives ("in"),
    call by call, in the order of their last calls, since the first piece of a video skips some
    layers.
    """
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, side: str, module: nn.Module, given: tuple, out: Tensor | tuple) -> None:
        found = given if side == "in" else out
        tensor = found[0] if isinstance(found, tuple) else found
        seen[name] = [*seen.pop(name, []), tensor.cpu()]

    handles = [
        module.register_forward_hook(partial(note, name, side))
        for name, (module, side) in taps.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
