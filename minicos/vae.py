"""The causal 3D video VAEs of Wan2.1 and Wan2.2-A14B (16 channels, stride 4 x 8 x 8) and of
Wan2.2-TI2V-5B (48 channels, stride 4 x 16 x 16).

A video of 4n + 1 frames becomes n + 1 latent frames: one for the first frame, then one for every
four. Every convolution looks only back in time, so a latent frame never depends on a later picture.
The network can therefore *stream*: it processes clips in chunks, and each layer keeps the last few
frames of its input. This memory is a `Stream`, a dict keyed by module that is passed to every call.
The result does not depend on the chunks (tested); small frames pass in longer chunks (`at_once`).
Module and attribute names are those of the official checkpoint.

The second generation extends the first in three ways, all of which are data in `VAEConfig`: pixels
are folded two by two into channels before the encoder and unfolded after the decoder
(`patch_size`), the decoder is wider than the encoder (`dec_dim`), and every stage that changes size
has a shortcut without parameters (`stage_shortcuts`: `DownStage`, `UpStage`).

Large frames can be cut into overlapping tiles (tiles.py), in space but not in time. The decoder may
be cast to bfloat16 (`vae.decoder.to(torch.bfloat16)`, or `minicos.load(decode_dtype=...)`), which
halves its memory. Convolutions, attention and residual sums then round to bfloat16; norms, latent
statistics, `conv2` and the result of `decode` stay float32. Keeping the last convolution in float32
would gain only 0.5 dB of 56. The official code and diffusers decode in float32, ComfyUI in bfloat16
where the card supports it. The encoder always runs in float32, since its output conditions the
model.

On a CPU the clips of a batch are processed one after the other, since the memory holds activations
for a single clip. A clip thus gets the same bits alone and in a batch.

Sources: wan/modules/vae2_1.py and vae2_2.py.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minicos.config import VAEConfig
from minicos.errors import MinicosError
from minicos.precision import fast_bfloat16
from minicos.tiles import Tiles

Stream = dict[nn.Module, Tensor]  # module -> the last input frames that its next chunk needs
AT_ONCE = 2**15  # pixels: smaller frames are grouped up to this number (`at_once`)
NARROW = 96  # most channels for which channels-last convolutions are faster on a CPU


class OneDNN(nn.modules.conv._ConvNd):
    """A convolution that oneDNN computes in float32 on a CPU, bfloat16 included where the processor
    lacks instructions for it: the products are exact in float32, and each sum is rounded once, as
    by such instructions, in a fortieth of the time of PyTorch's loop.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Called by the forward of `nn.Conv2d` and `nn.Conv3d`."""
        served = (
            not torch.compiler.is_compiling()  # which cannot trace `mkldnn_convolution`
            and x.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
        )
        # In float32 PyTorch chooses the same, except for one clip of few channels: there it uses a
        # loop that is five times as slow. Where frames are small and channels many, that loop is up
        # to six times as fast, since oneDNN reorders all weights at every call.
        few = self.in_channels <= 4 * x.shape[-2] * x.shape[-1]
        better = {torch.float32: few, torch.bfloat16: not fast_bfloat16()}.get(x.dtype, False)
        if not (served and better) or torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(x, weight, bias)
        return torch.mkldnn_convolution(
            x.float(),
            weight.float(),
            None if bias is None else bias.float(),
            self.padding,  # type: ignore[arg-type]
            self.stride,
            self.dilation,
            self.groups,
        ).to(x.dtype)


class Conv2d(OneDNN, nn.Conv2d):
    """A Conv2d for single frames."""


class CausalConv3d(OneDNN, nn.Conv3d):
    """A Conv3d that pads time at the front only: with frames from the stream, or with zeros at the
    start of a clip.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel: int | tuple[int, int, int],
        stride=1,
        padding: int = 0,
    ):
        super().__init__(in_dim, out_dim, kernel, stride, padding=(0, padding, padding))
        self.history = self.kernel_size[0] - 1

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        """b c f h w -> b c f h w. Prepends the last frames of the previous chunk, from `stream`,
        and stores those of this one.
        """
        if x.device.type == "cpu" and self.in_channels <= NARROW:  # wider ones become slower
            x = x.contiguous(memory_format=torch.channels_last_3d)
        if self.history:
            x = (
                torch.cat([stream[self], x], dim=2)
                if self in stream
                else F.pad(x, (0, 0, 0, 0, self.history, 0))
            )
            stream[self] = x[:, :, -self.history :].clone()  # a view would keep the whole chunk
        return super().forward(x)


class RMSNorm(nn.Module):
    """x / ||x||_channels * sqrt(c) * gamma, in float32 or wider."""

    def __init__(self, dim: int, spatial: int = 3):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial))

    def forward(self, x: Tensor) -> Tensor:
        """x (b c ...) -> (b c ...)."""
        y = wide(x)
        # equals F.normalize, but is 10 times as fast on a CPU
        y = y / y.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt()  # frees the wide copy
        return y.mul_(self.scale * self.gamma).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two causal convolutions, each after a norm and SiLU, with a residual connection."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, 3, padding=1),
            RMSNorm(out_dim),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(out_dim, out_dim, 3, padding=1),
        )
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """b c f h w -> b c' f h w."""
        skip = x if self.shortcut is None else self.shortcut(x, stream)
        return run(self.residual, x, stream) + skip


class Attention(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, spatial=2)
        self.to_qkv = Conv2d(dim, 3 * dim, 1)
        self.proj = Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """b c f h w -> b c f h w."""
        b, _, _, h, _ = x.shape
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "bf (s c) h w -> s bf 1 (h w) c", s=3)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "bf 1 (h w) c -> bf c h w", h=h)
        return x + rearrange(self.proj(out), "(b f) c h w -> b c f h w", b=b)


class Downsample(nn.Module):
    """Halve height and width and, if `temporal`, the number of frames. The first frame of a clip is
    not convolved in time.
    """

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """b c f h w -> b c f' h/2 w/2."""
        x = per_frame(self.resample, x)
        if not self.temporal:
            return x
        first = x[:, :, :0]
        if self not in stream:
            first, x = x[:, :, :1], x[:, :, 1:]
            stream[self] = first.clone()
        if x.shape[2]:
            # windows of three frames, two apart: the last remembered frame and the next two
            window = torch.cat([stream[self], x], dim=2)
            stream[self] = x[:, :, -1:].clone()
            x = nn.Conv3d.forward(self.time_conv, window)
        return torch.cat([first, x], dim=2)


class Upsample(nn.Module):
    """Double height and width and, if `temporal`, all frames of a clip except the first."""

    def __init__(self, dim: int, out_dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), Conv2d(dim, out_dim, 3, padding=1)
        )
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """b c f h w -> b c' f' 2h 2w."""
        if self.temporal:
            first = x[:, :, :0]
            if self not in stream:
                # the first frame enters neither this convolution nor its history
                first, x = x[:, :, :1], x[:, :, 1:]
                stream[self] = x.new_empty(0)
            if x.shape[2]:
                x = rearrange(self.time_conv(x, stream), "b (s c) f h w -> b c (f s) h w", s=2)
            x = torch.cat([first, x], dim=2)
        return per_frame(self.resample, x)


class DownStage(nn.Module):
    """A downsampling stage of the second generation, with an averaging shortcut (official
    AvgDown3D).
    """

    def __init__(self, layers: list[nn.Module], out_dim: int, time: int, space: int):
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self.out_dim, self.time, self.space = out_dim, time, space

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """The blocks' output plus the averaged input."""
        out = run(self.downsamples, x, stream)
        return out + self.average(x, out.shape[2])

    def average(self, x: Tensor, frames: int) -> Tensor:
        """Fold pixels into channels, then average equal groups of channels. A clip's first frame is
        paired with zeros.
        """
        x = F.pad(x, (0, 0, 0, 0, self.time * frames - x.shape[2], 0))
        x = rearrange(
            x, "b c (f t) (h p) (w q) -> b (c t p q) f h w", t=self.time, p=self.space, q=self.space
        )
        return x.unflatten(1, (self.out_dim, -1)).mean(2)


class UpStage(nn.Module):
    """An upsampling stage of the second generation, with a repeating shortcut (official
    DupUp3D).
    """

    def __init__(self, layers: list[nn.Module], out_dim: int, time: int, space: int):
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self.out_dim, self.time, self.space = out_dim, time, space

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """The blocks' output plus the repeated input."""
        out = run(self.upsamples, x, stream)
        # the last stage has no shortcut
        return out if self.space == 1 else out + self.repeat(x, out.shape[2])

    def repeat(self, x: Tensor, frames: int) -> Tensor:
        """Repeat channels and unfold them into pixels. The first copy of a clip's first frame is
        dropped, so that it is not doubled.
        """
        x = x.repeat_interleave(self.out_dim * self.time * self.space**2 // x.shape[1], dim=1)
        x = rearrange(
            x, "b (c t p q) f h w -> b c (f t) (h p) (w q)", t=self.time, p=self.space, q=self.space
        )
        return x[:, :, -frames:]


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if x is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2D layer to every frame of b c f h w."""
    return rearrange(
        layer(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=x.shape[0]
    )


REMEMBERING = (CausalConv3d, ResidualBlock, Downsample, Upsample, DownStage, UpStage)


def run(layers: Iterable[nn.Module], x: Tensor, stream: Stream) -> Tensor:
    """Apply layers in order, passing the stream to those that keep a history."""
    for layer in layers:
        x = layer(x, stream) if isinstance(layer, REMEMBERING) else layer(x)
    return x


def residual_blocks(count: int, here: int, there: int) -> list[nn.Module]:
    """`count` residual blocks from `here` to `there` channels; the first changes the width."""
    return [ResidualBlock(there if i else here, there) for i in range(count)]


class Encoder3d(nn.Module):
    """Pixels (b 3 f H W) -> moments of the latents (b 2c f h w)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.patch_size = cfg.patch_size
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        self.conv1 = CausalConv3d(3 * cfg.patch_size**2, widths[0], 3, padding=1)
        stages: list[nn.Module] = []
        for (here, there), temporal in zip(
            pairwise(widths), (*cfg.temporal_downsample, None), strict=True
        ):
            layers = residual_blocks(cfg.num_res_blocks, here, there)
            if temporal is not None:  # every stage but the last halves the size
                layers.append(Downsample(there, temporal))
            if cfg.stage_shortcuts:
                layers = [
                    DownStage(
                        layers, there, time=2 if temporal else 1, space=1 if temporal is None else 2
                    )
                ]
            stages += layers
        self.downsamples = nn.Sequential(*stages)
        self.middle = nn.Sequential(
            ResidualBlock(there, there), Attention(there), ResidualBlock(there, there)
        )
        self.head = nn.Sequential(
            RMSNorm(there), nn.SiLU(), CausalConv3d(there, 2 * cfg.z_dim, 3, padding=1)
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """b 3 f H W -> b 2c f' h w, one chunk."""
        x = rearrange(
            x, "b c f (h q) (w r) -> b (c r q) f h w", q=self.patch_size, r=self.patch_size
        )
        return run((self.conv1, *self.downsamples, *self.middle, *self.head), x, stream)


class Decoder3d(nn.Module):
    """Latents (b c f h w) -> pixels (b 3 F H W)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.patch_size = cfg.patch_size
        widths = [(cfg.dec_dim or cfg.dim) * m for m in (cfg.dim_mult[-1], *reversed(cfg.dim_mult))]
        self.conv1 = CausalConv3d(cfg.z_dim, widths[0], 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(widths[0], widths[0]),
            Attention(widths[0]),
            ResidualBlock(widths[0], widths[0]),
        )
        stages: list[nn.Module] = []
        channels = widths[0]
        for there, temporal in zip(
            widths[1:], (*reversed(cfg.temporal_downsample), None), strict=True
        ):
            layers = residual_blocks(cfg.num_res_blocks + 1, channels, there)
            channels = (
                there if cfg.stage_shortcuts else there // 2
            )  # the first generation halves the channels as it upsamples
            if temporal is not None:
                layers.append(Upsample(there, channels, temporal))
            if cfg.stage_shortcuts:
                layers = [
                    UpStage(
                        layers, there, time=2 if temporal else 1, space=1 if temporal is None else 2
                    )
                ]
            stages += layers
        self.upsamples = nn.Sequential(*stages)
        self.head = nn.Sequential(
            RMSNorm(there), nn.SiLU(), CausalConv3d(there, 3 * cfg.patch_size**2, 3, padding=1)
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """b c f h w -> b 3 F H W, one chunk."""
        x = run((self.conv1, *self.middle, *self.upsamples, *self.head), x, stream)
        return rearrange(
            x, "b (c r q) f h w -> b c f (h q) (w r)", q=self.patch_size, r=self.patch_size
        )


class VAE(nn.Module):
    """Encoder and decoder with a streaming interface. Pixels are in [-1, 1], latents are
    normalised.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder3d(cfg)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, 1)
        self.decoder = Decoder3d(cfg)

    def posterior(self, video: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents before normalisation, each b c f h w. One call
        processes one chunk.
        """
        video = video.to(self.conv1.weight.dtype)
        moments = self.conv1(self.encoder(video, {} if stream is None else stream), {})
        mean, log_variance = wide(moments).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, video: Tensor, chunk: int | None = None, tile: int | None = None) -> Tensor:
        """Encode a video to the normalised mean of the posterior.

        Args:
            video: pixels in [-1, 1], b 3 F H W with F = 4n + 1.
            chunk: frames per chunk after the first frame, a multiple of 4. It affects memory, not
                the result. By default 4, and more where frames are small (`at_once`).
            tile: side in pixels of the tiles that frames are cut into (see tiles.py), a multiple of
                the stride; None: whole frames.

        Returns:
            Latents, b c n+1 H/8 W/8 (or H/16 W/16).

        Raises:
            MinicosError: the number of frames or the size is not divisible. The official code
                drops frames silently.
        """
        check_video(video.shape, self.cfg)
        time, space, _ = self.cfg.stride
        chunk = time * at_once(*video.shape[-2:]) if chunk is None else chunk
        if chunk % time or chunk < 1:
            raise MinicosError(f"chunk must be a positive multiple of {time}, not {chunk}")
        if len(video) > 1 and video.device.type == "cpu":
            return torch.cat([self.encode(clip, chunk, tile) for clip in video.split(1)])
        tiles = Tiles((video.shape[-2] // space, video.shape[-1] // space), tile, space)
        chunks = (
            [video[:, :, :1], *video[:, :, 1:].split(chunk, dim=2)]
            if video.shape[2] > 1
            else [video]
        )
        parts = [
            tiles(lambda x, stream: self.posterior(x, stream)[0], part, before=space)
            for part in chunks
        ]
        mu = torch.cat(parts, dim=2)
        mean, scale = self._statistics(mu)
        return _finite(((mu - mean) * scale).contiguous(), "video")

    def decode(self, latent: Tensor, chunk: int | None = None, tile: int | None = None) -> Tensor:
        """Decode normalised latents (b c f h w) to a video in [-1, 1] (b 3 4f-3 8h 8w, or 16h
        16w). `chunk` and `tile` are those of `stream`.
        """
        return torch.cat(list(self.stream(latent, chunk, tile)), dim=2)

    def stream(
        self, latent: Tensor, chunk: int | None = None, tile: int | None = None
    ) -> Iterator[Tensor]:
        """Decode `chunk` latent frames at a time, and yield the pieces of the video (first
        1 + 4(chunk-1) frames, then 4 chunk).

        By default `chunk` is 1, and more where frames are small (`at_once`). `tile` is as in
        `encode`. Raises MinicosError at the call, not at the first piece, if the size is not
        divisible.
        """
        _, space, _ = self.cfg.stride
        height, width = (space * side for side in latent.shape[-2:])
        chunk = at_once(height, width) if chunk is None else chunk
        if chunk < 1:
            raise MinicosError(f"chunk must be 1 or more latent frames, not {chunk}")
        if len(latent) > 1 and latent.device.type == "cpu":
            clips = [self.stream(clip, chunk, tile) for clip in latent.split(1)]
            return (torch.cat(parts) for parts in zip(*clips, strict=True))
        tiles = Tiles((latent.shape[-2], latent.shape[-1]), tile, space)
        latent = wide(latent)
        mean, scale = self._statistics(latent)
        z = self.conv2((latent / scale + mean).to(self.conv2.weight.dtype), {}).to(
            self.decoder.conv1.weight.dtype
        )

        def pixels(part: Tensor, stream: Stream) -> Tensor:
            return _finite(wide(self.decoder(part, stream)), "latent")

        return (tiles(pixels, part, after=space).clamp(-1, 1) for part in z.split(chunk, dim=2))

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.cfg.mean, dtype=like.dtype, device=like.device)
        scale = 1.0 / torch.tensor(
            self.cfg.std, dtype=like.dtype, device=like.device
        )  # this form is bitwise equal to the official one
        return mean.view(1, -1, 1, 1, 1), scale.view(1, -1, 1, 1, 1)


def _finite(x: Tensor, given: str) -> Tensor:
    """x, what the VAE made of a video or a latent. Raises MinicosError if it is not finite."""
    if not x.is_meta and not x.isfinite().all():
        raise MinicosError(
            f"the VAE made NaN or infinity of this {given}: unless the {given} holds some itself, "
            "the VAE's weights are damaged. Download them again."
        )
    return x


def at_once(height: int, width: int) -> int:
    """Latent frames per chunk for frames of this size in pixels: 1, or as many as make up `AT_ONCE`
    pixels. Short clips of small frames pass in one piece, where calls would cost more than
    arithmetic.
    """
    return max(1, AT_ONCE // (height * width))


def check_video(shape: torch.Size | tuple[int, ...], cfg: VAEConfig) -> None:
    """Raise MinicosError unless b 3 F H W has F = 4n + 1 and H, W multiples of the stride."""
    _, channels, frames, height, width = shape
    ft, fh, fw = cfg.stride
    if channels != 3:
        raise MinicosError(f"a video has 3 colour channels, not {channels}")
    if frames % ft != 1:
        raise MinicosError(
            f"{frames} frames: the VAE takes {ft}n + 1 frames, e.g. {max(1, frames // ft * ft + 1)}"
        )
    if height % fh or width % fw:
        raise MinicosError(
            f"{width}x{height} pixels: width and height must be multiples of {fw} and {fh}"
        )
