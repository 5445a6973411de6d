"""The diffusion transformer of Wan2.2 (official wan/modules/model.py), with every hook point in sight.

Read `DiT.forward`: latents are cut into patches (tokens), text and timestep are embedded, forty blocks follow, a head
turns tokens back into a velocity. `hooks("name", tensor)` marks a point where a reader of the network may look or intervene.
The image-to-video networks of Wan2.1 also look at a picture, through CLIP: `ImageEmbedding` and the end of `CrossAttention`.
Modules carry the names of the official checkpoint, so its weights load without a map.

Precision follows the official policy: matrix products in the dtype of the weights (float32 or bfloat16); timestep embedding,
modulation, norms and head in float32; residual stream in float32 or, as DiffSynth does it, in bfloat16 (`residual_dtype`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minicos.config import DiTConfig
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.ops import REFERENCE, Ops, layer_norm, rms_norm, rope, sinusoid

# Parameters whose name contains one of these stay in float32 whatever the dtype of the rest.
FLOAT32 = (
    "time_embedding",
    "time_projection",
    "modulation",
    "norm",
    "head.head",
    "img_emb.proj.0",
    "img_emb.proj.4",
    "img_emb.emb_pos",
)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its weights, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class RMSNorm(nn.Module):
    """The weight of an RMS norm; the mathematics is in ops."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class LayerNorm(nn.Module):
    """A layer norm with affine parameters; the mathematics is in ops."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.eps, self.weight, self.bias)


class ImageEmbedding(nn.Module):
    """CLIP features as rows that cross-attention can look at (official `MLPProj`): b m d' -> b m d."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(cfg.image_dim, eps=1e-5),
            Linear(cfg.image_dim, cfg.image_dim),
            nn.GELU(),
            Linear(cfg.image_dim, cfg.dim),
            LayerNorm(cfg.dim, eps=1e-5),
        )
        two = (
            cfg.images == 2
        )  # then the rows of the first image and those of the last are told apart
        self.emb_pos = (
            nn.Parameter(torch.zeros(1, cfg.image_tokens, cfg.image_dim)) if two else None
        )

    def forward(self, clip: Tensor) -> Tensor:
        clip = clip.float()
        return self.proj(clip if self.emb_pos is None else clip + self.emb_pos)


class Attention(nn.Module):
    """Projections shared by self- and cross-attention; q and k are normalised over the full width, before heads are split."""

    def __init__(self, cfg: DiTConfig, ops: Ops):
        super().__init__()
        self.cfg, self.ops = cfg, ops
        self.q, self.k, self.v, self.o = (Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim), RMSNorm(cfg.dim)

    def heads(self, x: Tensor) -> Tensor:
        """b l (n k) -> b n l k, with the tensor's own methods: sixty einops calls are a twentieth of a small network's pass."""
        return x.unflatten(-1, (self.cfg.num_heads, -1)).transpose(1, 2)


class SelfAttention(Attention):
    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], hooks: Hooks = NO_HOOKS) -> Tensor:
        n, eps = self.cfg.num_heads, self.cfg.eps
        q, k = self.ops.rms_rope(
            self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, angles, n, eps
        )
        q = hooks("q", q)  # b n l k
        k = hooks("k", k)  # b n l k
        v = hooks("v", self.heads(self.v(x)))  # b n l k
        heads = hooks("heads", self.ops.self_attention(q, k, v))  # b n l k
        return self.o(heads.transpose(1, 2).flatten(2))  # b n l k -> b l (n k)


class CrossAttention(Attention):
    """Every token looks at the text and, in Wan2.1's image-to-video networks, with the same query at the image."""

    def __init__(self, cfg: DiTConfig, ops: Ops):
        super().__init__(cfg, ops)
        if cfg.image_tokens:
            self.k_img, self.v_img = Linear(cfg.dim, cfg.dim), Linear(cfg.dim, cfg.dim)
            self.norm_k_img = RMSNorm(cfg.dim)

    def forward(
        self, x: Tensor, text: Tensor, image: Tensor | None, hooks: Hooks = NO_HOOKS
    ) -> Tensor:
        dtype, eps = self.q.weight.dtype, self.cfg.eps
        q = hooks(
            "q", self.heads(rms_norm(self.q(x), self.norm_q.weight, eps).to(dtype))
        )  # b n l k
        k = hooks(
            "k", self.heads(rms_norm(self.k(text), self.norm_k.weight, eps).to(dtype))
        )  # b n t k
        v = hooks("v", self.heads(self.v(text)))  # b n t k
        heads = hooks("heads", self.ops.attention(q, k, v))  # b n l k
        if image is not None:
            k_img = rms_norm(self.k_img(image), self.norm_k_img.weight, eps).to(dtype)
            k_img = hooks("k_img", self.heads(k_img))  # b n m k
            v_img = hooks("v_img", self.heads(self.v_img(image)))  # b n m k
            heads = heads + hooks("heads_img", self.ops.attention(q, k_img, v_img))  # b n l k
        return self.o(heads.transpose(1, 2).flatten(2))  # b n l k -> b l (n k)


class Block(nn.Module):
    """Self-attention and feed-forward, each modulated and gated by the timestep; cross-attention, neither."""

    def __init__(self, cfg: DiTConfig, ops: Ops, residual_dtype: torch.dtype):
        super().__init__()
        self.eps, self.ops, self.residual_dtype = cfg.eps, ops, residual_dtype
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)
        self.self_attn = SelfAttention(cfg, ops)
        self.norm3 = LayerNorm(cfg.dim, cfg.eps)
        self.cross_attn = CrossAttention(cfg, ops)
        self.ffn = nn.Sequential(
            Linear(cfg.dim, cfg.ffn_dim), nn.GELU(approximate="tanh"), Linear(cfg.ffn_dim, cfg.dim)
        )

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        image: Tensor | None,
        time: Tensor,
        angles: tuple[Tensor, Tensor],
        hooks: Hooks = NO_HOOKS,
    ) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time).unbind(
            2
        )  # 6 x  b g d
        residual, dtype = (
            self.residual_dtype,
            self.ffn[0].weight.dtype,
        )  # of the stream, and of matrix products

        h = self.ops.modulated_norm(x, scale, shift, self.eps, dtype)  # b l d
        h = hooks("self_attn", self.self_attn(h, angles, hooks.scope("self_attn")))

        x, h = self.ops.add_norm(
            x, h, gate, self.norm3.weight, self.norm3.bias, self.norm3.eps, residual, dtype
        )
        h = hooks("cross_attn", self.cross_attn(h, text, image, hooks.scope("cross_attn")))

        x, h = self.ops.add_norm(x, h, None, ffn_scale, ffn_shift, self.eps, residual, dtype)
        h = hooks("ffn", self.ffn(h))

        return self.ops.gated_add(x, h, ffn_gate, residual)


class Head(nn.Module):
    def __init__(self, cfg: DiTConfig, ops: Ops):
        super().__init__()
        self.eps, self.ops = cfg.eps, ops
        pf, ph, pw = cfg.patch_size
        self.head = Linear(cfg.dim, pf * ph * pw * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # x b l d; time b g d
        shift, scale = (self.modulation + time.unsqueeze(2)).unbind(2)
        return self.head(self.ops.modulated_norm(x, scale, shift, self.eps))


class DiT(nn.Module):
    """velocity = dit(x, timestep, text, y, clip): the whole contract between network and sampler.

    residual_dtype  of the residual stream
    time_skip       of ChronoEdit's rotary embedding, see `ops.rope`
    """

    def __init__(
        self,
        cfg: DiTConfig,
        ops: Ops = REFERENCE,
        residual_dtype: torch.dtype = torch.float32,
        time_skip: int | None = None,
    ):
        super().__init__()
        self.cfg, self.time_skip, self.residual_dtype = cfg, time_skip, residual_dtype
        self.patch_embedding = nn.Conv3d(cfg.in_dim, cfg.dim, cfg.patch_size, stride=cfg.patch_size)
        self.text_embedding = nn.Sequential(
            Linear(cfg.text_dim, cfg.dim), nn.GELU(approximate="tanh"), Linear(cfg.dim, cfg.dim)
        )
        if cfg.image_tokens:
            self.img_emb = ImageEmbedding(cfg)
        self.time_embedding = nn.Sequential(
            Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), Linear(cfg.dim, cfg.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(cfg.dim, 6 * cfg.dim))
        self.blocks = nn.ModuleList(Block(cfg, ops, residual_dtype) for _ in range(cfg.num_layers))
        self.head = Head(cfg, ops)
        self._angles: dict[tuple, tuple[Tensor, Tensor]] = {}  # (grid, device) of the last run
        self.visit = iter  # the blocks in order; stream.Streamer brings the weights of each

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        y: Tensor | None = None,
        clip: Tensor | None = None,
        hooks: Hooks = NO_HOOKS,
    ) -> Tensor:
        """The velocity noise - x0 at latents x.

        x         b c f h w  latents
        timestep  b or b f   in 0..1000, one per sample or one per latent frame; never in bfloat16
        text      b t d'     rows of the text encoder, zero beyond the prompt (the zero rows take part in attention)
        y         b 20 f h w mask and image latents of image-to-video, concatenated behind x
        clip      b m d'     Wan2.1 image-to-video: CLIP features of the first image (m = 257), or of first and last (514)
        returns   b c f h w  float32
        """
        x = self._with_condition(x, y)
        self._check_clip(clip)
        tokens = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))  # b d f h w
        grid = tuple(tokens.shape[2:])
        hooks = hooks.at(grid=grid)
        tokens = rearrange(
            tokens, "b d f h w -> b (f h w) d"
        ).contiguous()  # else every block would work on a transposed stream
        tokens = hooks("embed", tokens)
        text = hooks("text", self.text_embedding(text))  # b t d
        image = None if clip is None else hooks("image", self.img_emb(clip))  # b m d
        timestep = timestep.view(len(timestep), -1)  # b g
        embedding = self.time_embedding(
            sinusoid(timestep, self.cfg.freq_dim).float().to(tokens.device)
        )  # b g d
        time = hooks("time", self.time_projection(embedding).unflatten(-1, (6, -1)))  # b g 6 d
        angles = self._rope(grid, tokens.device)

        for i, block in enumerate(self.visit(self.blocks)):
            inside = hooks.scope(f"blocks.{i}")
            tokens = hooks(
                f"blocks.{i}", watched(block, inside)(tokens, text, image, time, angles, inside)
            )  # b l d

        velocity = rearrange(
            self.head(tokens, embedding),
            "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",
            **dict(
                zip(("f", "h", "w", "pf", "ph", "pw"), (*grid, *self.cfg.patch_size), strict=True)
            ),
        )
        return hooks("velocity", velocity.float())

    def _with_condition(self, x: Tensor, y: Tensor | None) -> Tensor:
        channels = x.shape[1] + (0 if y is None else y.shape[1])
        if channels != self.cfg.in_dim:
            need = "an image" if channels < self.cfg.in_dim else "no image"
            raise MinicosError(
                f"the network takes {self.cfg.in_dim} channels, not {channels}: this model needs {need}"
            )
        _, ph, pw = self.cfg.patch_size
        if x.shape[-2] % ph or x.shape[-1] % pw:
            raise MinicosError(
                f"latents of {x.shape[-2]}x{x.shape[-1]} do not divide into patches of {ph}x{pw}"
            )
        return x if y is None else torch.cat([x, y], dim=1)

    def _check_clip(self, clip: Tensor | None) -> None:
        needed = (self.cfg.image_tokens, self.cfg.image_dim) if self.cfg.image_tokens else None
        given = None if clip is None else tuple(clip.shape[1:])
        if given != needed:
            raise MinicosError(
                f"this network takes {_features(needed)}, and was given {_features(given)}"
            )

    def _rope(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotation of each token, built once per grid and device."""
        if (grid, device) not in self._angles:
            cos, sin = rope(grid, self.cfg.head_dim, time_skip=self.time_skip)
            self._angles = {(grid, device): (cos.to(device), sin.to(device))}
        return self._angles[grid, device]

    def compile_blocks(self) -> "DiT":
        """Compile each block (not the model: block outputs are hooked outside any graph). Watched blocks keep running eagerly."""
        for block in self.blocks:
            block.compile()
        return self


def watched(block: nn.Module, inside: Hooks) -> Callable[..., Tensor]:
    """The block's call, in eager mode when a hook looks inside it: a compiled graph has no place for hooks."""
    if not inside:
        return block

    def call(*args):
        with torch.compiler.set_stance("force_eager"):
            return block(*args)

    return call


def _features(shape: tuple[int, ...] | None) -> str:
    return (
        "no CLIP features"
        if shape is None
        else f"CLIP features of (b, {', '.join(map(str, shape))})"
    )


def points(cfg: DiTConfig) -> dict[str, str]:
    """Every hook point of a network and its shape in letters, e.g. {"blocks.0.ffn": "b l d"}.

    Found by a run of one block, which stands for all, on the meta device.
    """
    sizes = {
        "b": 2,
        "c": 17,
        "f": 3,
        "h": 10,
        "w": 14,
        "l": 105,
        "n": 11,
        "k": 8,
        "d": 88,
        "t": 19,
        "g": 1,
        "6": 6,
    }
    sizes["m"] = cfg.image_tokens
    letters = {size: letter for letter, size in sizes.items()}
    small = replace(
        cfg,
        in_dim=17,
        out_dim=17,
        dim=88,
        num_heads=11,
        ffn_dim=8,
        num_layers=1,
        text_dim=8,
        text_len=19,
        image_dim=8,
    )
    found: dict[str, str] = {}

    def note(x: Tensor, site: Site) -> None:
        found[site.name] = " ".join(letters[size] for size in x.shape)

    everything = Hooks()
    for depth in range(1, 5):
        everything = everything.on(".".join("*" * depth), note)
    with torch.device("meta"):
        clip = torch.empty(2, cfg.image_tokens, 8) if cfg.image_tokens else None
        DiT(small)(
            torch.empty(2, 17, 3, 10, 14),
            torch.empty(2),
            torch.empty(2, 19, 8),
            clip=clip,
            hooks=everything,
        )
    velocity = found.pop("velocity")
    block = {name: shape for name, shape in found.items() if name.startswith("blocks.0")}
    for i in range(1, cfg.num_layers):
        found |= {
            name.replace("blocks.0", f"blocks.{i}", 1): shape for name, shape in block.items()
        }
    return found | {"velocity": velocity}
