"""The diffusion transformer of Wan2.2 (official wan/modules/model.py), with all its hook points.

Start with `DiT.forward`: latents are cut into patches (tokens), text and timestep are embedded,
thirty or forty blocks follow, and a head turns the tokens into a velocity. `hooks("name", tensor)`
marks a hook point. The image-to-video networks of Wan2.1 also attend to CLIP features of the
picture: see `ImageEmbedding` and the end of `CrossAttention`. Modules have the names of the
official checkpoint, so its weights load without renaming.

Precision follows the official policy. Matrix products run in the dtype of the weights (float32 or
bfloat16). Timestep embedding, modulation, norms and head run in float32. The residual stream is
float32 or, as in DiffSynth, bfloat16 (`residual_dtype`).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import SupportsIndex

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minicos.attend import attend, earlier_frames
from minicos.config import DiTConfig
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.ops import REFERENCE, Ops, layer_norm, rope, sinusoid

# Parameters whose name contains one of these stay in float32 when the others are bfloat16.
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


FRAME_CAUSAL = NO_HOOKS.on("blocks.*.self_attn.allowed", earlier_frames)


class Linear(nn.Linear):
    """A linear layer that casts its input to the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x (... in) -> (... out), in the dtype of the weights."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class RMSNorm(nn.Module):
    """The weight of an RMS norm; the computation is in `ops`."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class LayerNorm(nn.LayerNorm):
    """A layer norm with affine parameters, computed in float32 by `ops.layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (... d) -> (... d), rounded to the dtype of x."""
        return layer_norm(x, self.eps, self.weight.float(), self.bias.float())


class ImageEmbedding(nn.Module):
    """Project CLIP features to rows for cross-attention (official `MLPProj`): b m d' -> b m d."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(cfg.image_dim, eps=1e-5),
            Linear(cfg.image_dim, cfg.image_dim),
            nn.GELU(),
            Linear(cfg.image_dim, cfg.dim),
            LayerNorm(cfg.dim, eps=1e-5),
        )
        # With two images, a position embedding distinguishes the rows of the first and the last.
        position = torch.zeros(1, cfg.image_tokens, cfg.image_dim)
        self.emb_pos = nn.Parameter(position) if cfg.images == 2 else None

    def forward(self, clip: Tensor) -> Tensor:
        """Project CLIP features (b m d') to float32 rows (b m d)."""
        clip = clip.float()
        return self.proj(clip if self.emb_pos is None else clip + self.emb_pos)


class Attention(nn.Module):
    """Base of self- and cross-attention: projections, and norms of q and k over the full width,
    before the split into heads.
    """

    def __init__(self, cfg: DiTConfig, ops: Ops):
        super().__init__()
        self.cfg, self.ops = cfg, ops
        self.q, self.k, self.v, self.o = (Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.dim), RMSNorm(cfg.dim)

    def heads(self, x: Tensor) -> Tensor:
        """b l (n k) -> b n l k. Uses tensor methods: sixty einops calls would take 5 % of a small
        network's pass.
        """
        return x.unflatten(-1, (self.cfg.num_heads, -1)).transpose(1, 2)


class SelfAttention(Attention):
    """Attention between all tokens; positions enter as rotations of q and k over f, h and w
    (RoPE, arXiv:2104.09864).
    """

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], hooks: Hooks = NO_HOOKS) -> Tensor:
        """x (b l d) and angles (cos and sin, each l k/2) -> b l d."""
        n, eps = self.cfg.num_heads, self.cfg.eps
        weights = self.norm_q.weight, self.norm_k.weight
        q, k = self.ops.rms_rope(self.q(x), self.k(x), *weights, angles, n, eps)
        q = hooks("q", q)  # b n l k
        k = hooks("k", k)  # b n l k
        v = hooks("v", self.heads(self.v(x)))  # b n l k
        heads = hooks("heads", attend(q, k, v, self.ops.self_attention, hooks))  # b n l k
        return self.o(heads.transpose(1, 2).flatten(2))  # b n l k -> b l (n k)


class CrossAttention(Attention):
    """Attention of the tokens to the text and, in Wan2.1's image-to-video networks, with the same
    queries to the image.
    """

    def __init__(self, cfg: DiTConfig, ops: Ops):
        super().__init__(cfg, ops)
        if cfg.image_tokens:
            self.k_img, self.v_img = Linear(cfg.dim, cfg.dim), Linear(cfg.dim, cfg.dim)
            self.norm_k_img = RMSNorm(cfg.dim)

    def _normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return self.ops.rms_norm(x, norm.weight, self.cfg.eps, self.q.weight.dtype)

    def forward(
        self, x: Tensor, text: Tensor, image: Tensor | None, hooks: Hooks = NO_HOOKS
    ) -> Tensor:
        """x (b l d), text (b t d) and image (b m d) -> b l d."""
        q = hooks("q", self.heads(self._normed(self.q(x), self.norm_q)))  # b n l k
        k = hooks("k", self.heads(self._normed(self.k(text), self.norm_k)))  # b n t k
        v = hooks("v", self.heads(self.v(text)))  # b n t k
        heads = hooks("heads", attend(q, k, v, self.ops.attention, hooks))  # b n l k
        if image is not None:
            k_img = self._normed(self.k_img(image), self.norm_k_img)
            k_img = hooks("k_img", self.heads(k_img))  # b n m k
            v_img = hooks("v_img", self.heads(self.v_img(image)))  # b n m k
            seen = attend(q, k_img, v_img, self.ops.attention, hooks, "_img")
            heads = heads + hooks("heads_img", seen)  # b n l k
        return self.o(heads.transpose(1, 2).flatten(2))  # b n l k -> b l (n k)


class Block(nn.Module):
    """Three sub-layers on the residual stream x (official `WanAttentionBlock`):

        x = x + gate · self_attn((1 + scale) · LN(x) + shift)
        x = x + cross_attn(norm3(x))
        x = x + ffn_gate · ffn((1 + ffn_scale) · LN(x) + ffn_shift)

    LN has no parameters. The six modulation vectors come from the timestep (adaLN-Zero,
    arXiv:2212.09748, section 3.2).
    """

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
        """x (b l d), text (b t d), image (b m d) and time (b g 6 d) -> b l d. Each addition is
        fused with the norm that follows it.
        """
        ops, eps, norm3 = self.ops, self.eps, self.norm3
        stream, dtype = self.residual_dtype, self.ffn[0].weight.dtype
        modulation = (self.modulation + time).unbind(2)  # 6 x  b g d
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation

        h = ops.modulated_norm(x, scale, shift, eps, dtype)
        h = hooks("self_attn", self.self_attn(h, angles, hooks.scope("self_attn")))
        gate = hooks("self_attn.gate", gate)  # b g d
        x, h = ops.gated_add_norm(x, h, gate, norm3.weight, norm3.bias, norm3.eps, stream, dtype)
        if (changed := hooks.replaced("self_attn.stream", x)) is not None:  # b l d
            x, h = changed, norm3(changed).to(dtype)
        h = hooks("cross_attn", self.cross_attn(h, text, image, hooks.scope("cross_attn")))
        x, h = ops.add_modulated_norm(x, h, ffn_scale, ffn_shift, eps, stream, dtype)
        if (changed := hooks.replaced("cross_attn.stream", x)) is not None:  # b l d
            x, h = changed, ops.modulated_norm(changed, ffn_scale, ffn_shift, eps, dtype)
        up, gelu, down = self.ffn
        h = hooks("ffn", down(hooks("ffn.hidden", gelu(up(h)))))  # hidden: b l e
        return ops.gated_add(x, h, hooks("ffn.gate", ffn_gate), stream)


class Head(nn.Module):
    """A modulated norm and a projection to the velocity of each token's patch (official `Head`)."""

    def __init__(self, cfg: DiTConfig, ops: Ops):
        super().__init__()
        self.eps, self.ops = cfg.eps, ops
        pf, ph, pw = cfg.patch_size
        self.head = Linear(cfg.dim, pf * ph * pw * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (b l d) and time (b g d) -> b l (pf ph pw c), float32."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unbind(2)
        return self.head(self.ops.modulated_norm(x, scale, shift, self.eps))


class DiT(nn.Module):
    """The network: `velocity = dit(x, timestep, text, y, clip)`.

    Args:
        residual_dtype: dtype of the residual stream.
        time_skip: position of the second latent frame in ChronoEdit, see `ops.rope`.
    """

    def __init__(
        self,
        cfg: DiTConfig,
        ops: Ops = REFERENCE,
        residual_dtype: torch.dtype = torch.float32,
        time_skip: int | None = None,
    ):
        super().__init__()
        self.cfg, self.ops, self.residual_dtype = cfg, ops, residual_dtype
        self.time_skip = time_skip
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
        self._angles: dict[tuple, tuple[Tensor, Tensor]] = {}  # (grid, device) of the last pass
        # yields the blocks in order, see `stream_blocks`
        self._in_turn: Callable[[nn.ModuleList], Iterable[nn.Module]] = iter

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices; parameters named in `FLOAT32` are float32."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        y: Tensor | None = None,
        clip: Tensor | None = None,
        hooks: Hooks = NO_HOOKS,
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """The velocity (noise - x0) at latents x.

        Args:
            x: latents, b c f h w.
            timestep: in 0..1000, one per sample (b) or one per latent frame (b f); float32, since
                bfloat16 is too coarse.
            text: rows of the text encoder, b t d'. Rows beyond the prompt are zero, and attention
                includes them.
            y: mask and image latents of image-to-video, b 20 f h w, concatenated to x along the
                channels.
            clip: CLIP features of the first image (m = 257) or of first and last image (m = 514),
                b m d'; Wan2.1 image-to-video only.
            stop_at_layer: return the residual stream that enters this block instead, and skip the
                block and all later ones; from 0, before all blocks, to their number, after all.

        Returns:
            The velocity, b c f h w, float32; with `stop_at_layer` the stream, b l d.

        Raises:
            MinicosError: there is no such layer, or an input does not fit this network.
        """
        if not isinstance(stop_at_layer, SupportsIndex | None) or (
            stop_at_layer not in (None, *range(len(self.blocks) + 1))
        ):
            raise MinicosError(f"stop_at_layer {stop_at_layer}: give 0 to {len(self.blocks)}")
        x = self._with_condition(x, y)
        self._check_clip(clip)
        tokens = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))  # b d f h w
        f, h, w = grid = tuple(tokens.shape[2:])
        own = FRAME_CAUSAL.rules if self.cfg.frame_causal else ()
        hooks = replace(hooks, rules=own + hooks.rules).at(grid=grid)
        # contiguous, or every block would work on a transposed stream
        tokens = hooks("embed", rearrange(tokens, "b d f h w -> b (f h w) d").contiguous())
        text = hooks("text", self.text_embedding(text))  # b t d
        image = None if clip is None else hooks("image", self.img_emb(clip))  # b m d
        waves = sinusoid(timestep.view(len(timestep), -1), self.cfg.freq_dim)
        embedding = self.time_embedding(waves.float().to(tokens.device))  # b g d
        time = hooks("time", self.time_projection(embedding).unflatten(-1, (6, -1)))  # b g 6 d
        angles = self._rope(grid, tokens.device)

        for i, block in enumerate(islice(self._in_turn(self.blocks), stop_at_layer)):
            inside = hooks.scope(f"blocks.{i}")
            run = watched(block, inside, tokens.requires_grad)
            tokens = run(tokens, text, image, time, angles, inside)
            tokens = hooks(f"blocks.{i}", tokens)  # b l d
        if stop_at_layer is not None:
            return tokens

        pf, ph, pw = self.cfg.patch_size
        to_latent = "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)"
        velocity = rearrange(
            self.head(tokens, embedding), to_latent, f=f, h=h, w=w, pf=pf, ph=ph, pw=pw
        )
        return hooks("velocity", velocity.float())

    def _with_condition(self, x: Tensor, y: Tensor | None) -> Tensor:
        channels = x.shape[1] + (0 if y is None else y.shape[1])
        if channels != self.cfg.in_dim:
            need = "an image" if channels < self.cfg.in_dim else "no image"
            raise MinicosError(
                f"the network takes {self.cfg.in_dim} channels, not {channels}: this model needs "
                f"{need}"
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
        """The rotation of each token, built once for each grid and device."""
        if (grid, device) not in self._angles:
            cos, sin = rope(grid, self.cfg.head_dim, time_skip=self.time_skip)
            self._angles = {(grid, device): (cos.to(device), sin.to(device))}
        return self._angles[grid, device]

    def stream_blocks(self, stream: Callable[[Iterable[nn.Module]], Iterable[nn.Module]]) -> None:
        """In every pass, take the blocks from `stream(blocks)`, which loads the weights of each
        block just before it runs (`stream.Streamer`).
        """
        self._in_turn = stream

    def compile_blocks(self) -> "DiT":
        """Compile each block. The model as a whole is not compiled, so hooks on block outputs work;
        blocks with hooks inside them run eagerly.
        """
        for block in self.blocks:
            block.compile()
        return self


def watched(block: nn.Module, inside: Hooks, grad: bool = False) -> Callable[..., Tensor]:
    """The call of a block, eager if a hook looks inside it: a compiled graph cannot call hooks.

    With `grad`, a block without hooks inside is recomputed in the backward pass (activation
    checkpointing), since the activations of forty blocks of a long video do not fit in memory.
    """
    if not inside:
        frozen = not next(block.parameters()).requires_grad
        return partial(checkpoint, block, use_reentrant=False) if grad and frozen else block
    # torch.compiler.set_stance would hold for all threads, and be left behind by those that overlap
    eager: Callable[..., Tensor] = getattr(block, "_orig_mod", block)._call_impl
    return eager


def _features(shape: tuple[int, ...] | None) -> str:
    return (
        "no CLIP features"
        if shape is None
        else f"CLIP features of (b, {', '.join(map(str, shape))})"
    )
