"""The causal 3D video VAE of Wan2.1 and Wan2.2-A14B: 16 channels, stride 4 x 8 x 8 (official wan/modules/vae2_1.py).

A video of 4n + 1 frames becomes n + 1 latent frames: the first frame stands alone, then every four make one.
Every convolution looks only back in time, so a latent frame never depends on a later picture. That allows the
network to *stream*: clips are processed in chunks, and each layer remembers the last few frames that it has seen.
Here the memory is a `Stream`, a dict keyed by module that is handed down the calls; whatever the chunks, the result
is the same (a test says so). Module and attribute names are those of the official checkpoint.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minicos.config import VAEConfig
from minicos.errors import MinicosError

Stream = dict[nn.Module, Tensor]  # module -> the last input frames that its next chunk will need


class CausalConv3d(nn.Conv3d):
    """Conv3d that pads time at the front only: with what the stream remembers, or with zeros at the start of a clip."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int], stride=1, padding: int = 0):
        super().__init__(in_dim, out_dim, kernel, stride, padding=(0, padding, padding))
        self.history = self.kernel_size[0] - 1

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # b c f h w
        if self.history:
            b, c, _, h, w = x.shape
            past = stream[self] if self in stream else x.new_zeros(b, c, self.history, h, w)
            x = torch.cat([past, x], dim=2)
            stream[self] = x[:, :, -self.history :]
        return super().forward(x)


class RMSNorm(nn.Module):
    """x / ||x||_channels * sqrt(c) * gamma."""

    def __init__(self, dim: int, spatial: int = 3):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3, padding=1),
            RMSNorm(out_dim), nn.SiLU(), nn.Identity(), CausalConv3d(out_dim, out_dim, 3, padding=1),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x, stream)
        return run(self.residual, x, stream) + skip


class Attention(nn.Module):
    """One head over the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, spatial=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, h, _ = x.shape
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "bf (s c) h w -> s bf 1 (h w) c", s=3)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "bf 1 (h w) c -> bf c h w", h=h)
        return x + rearrange(self.proj(out), "(b f) c h w -> b c f h w", b=b)


class Downsample(nn.Module):
    """Halve height and width and, if `temporal`, frames. The first frame of a clip has no partner and is not convolved in time."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = per_frame(self.resample, x)
        if not self.temporal:
            return x
        first = x[:, :, :0]
        if self not in stream:
            first, x = x[:, :, :1], x[:, :, 1:]
            stream[self] = first
        if x.shape[2]:  # windows of three frames, two apart: the last remembered frame and the next two
            window = torch.cat([stream[self], x], dim=2)
            stream[self] = x[:, :, -1:]
            x = nn.Conv3d.forward(self.time_conv, window)
        return torch.cat([first, x], dim=2)


class Upsample(nn.Module):
    """Double height and width, halve channels and, if `temporal`, double all frames of a clip but the first."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.temporal:
            first = x[:, :, :0]
            if self not in stream:  # the first frame enters neither this convolution nor its history
                first, x = x[:, :, :1], x[:, :, 1:]
                stream[self] = first[:, :0]
            if x.shape[2]:
                x = rearrange(self.time_conv(x, stream), "b (s c) f h w -> b c (f s) h w", s=2)
            x = torch.cat([first, x], dim=2)
        return per_frame(self.resample, x)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2D layer to every frame of b c f h w."""
    return rearrange(layer(rearrange(x, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", b=x.shape[0])


def run(layers: nn.Sequential, x: Tensor, stream: Stream) -> Tensor:
    """Apply layers in turn, handing the stream to those that remember."""
    for layer in layers:
        x = layer(x, stream) if isinstance(layer, (CausalConv3d, ResidualBlock, Downsample, Upsample)) else layer(x)
    return x


class Encoder3d(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        self.conv1 = CausalConv3d(3, widths[0], 3, padding=1)
        stages: list[nn.Module] = []
        for i, (here, there) in enumerate(pairwise(widths)):
            for _ in range(cfg.num_res_blocks):
                stages.append(ResidualBlock(here, there))
                here = there
            if i < len(cfg.dim_mult) - 1:
                stages.append(Downsample(there, cfg.temporal_downsample[i]))
        self.downsamples = nn.Sequential(*stages)
        self.middle = nn.Sequential(ResidualBlock(there, there), Attention(there), ResidualBlock(there, there))
        self.head = nn.Sequential(RMSNorm(there), nn.SiLU(), CausalConv3d(there, 2 * cfg.z_dim, 3, padding=1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layers in (self.downsamples, self.middle, self.head):
            x = run(layers, x, stream)
        return x


class Decoder3d(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.dim * m for m in (cfg.dim_mult[-1], *reversed(cfg.dim_mult))]
        temporal = cfg.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(cfg.z_dim, widths[0], 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(widths[0], widths[0]), Attention(widths[0]), ResidualBlock(widths[0], widths[0])
        )
        stages: list[nn.Module] = []
        for i, (here, there) in enumerate(pairwise(widths)):
            if i:
                here //= 2  # the upsampling before this stage has halved the channels
            for _ in range(cfg.num_res_blocks + 1):
                stages.append(ResidualBlock(here, there))
                here = there
            if i < len(cfg.dim_mult) - 1:
                stages.append(Upsample(there, temporal[i]))
        self.upsamples = nn.Sequential(*stages)
        self.head = nn.Sequential(RMSNorm(there), nn.SiLU(), CausalConv3d(there, 3, 3, padding=1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layers in (self.middle, self.upsamples, self.head):
            x = run(layers, x, stream)
        return x


class VAE(nn.Module):
    """Encoder and decoder with the chunked, streaming interface. Pixels are in [-1, 1], latents are normalised."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder3d(cfg)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, 1)
        self.decoder = Decoder3d(cfg)

    def posterior(self, video: Tensor, stream: Stream | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents before normalisation, each b c f h w. One call, one chunk."""
        moments = self.conv1(self.encoder(video, {} if stream is None else stream), {})
        return moments.chunk(2, dim=1)

    def encode(self, video: Tensor, chunk: int = 4) -> Tensor:
        """Video (b 3 F H W) in [-1, 1], F = 4n + 1 -> normalised latents (b c n+1 H/8 W/8): the posterior's mean.

        `chunk` is how many frames are taken at once after the first (a multiple of 4); it changes memory, not the result.
        Raises MinicosError when frames or sizes do not divide: the official code would silently drop frames.
        """
        check_video(video.shape, self.cfg)
        if chunk % self.cfg.stride[0] or chunk < 1:
            raise MinicosError(f"chunk must be a positive multiple of {self.cfg.stride[0]}, not {chunk}")
        stream: Stream = {}
        chunks = [video[:, :, :1], *video[:, :, 1:].split(chunk, dim=2)] if video.shape[2] > 1 else [video]
        mu = torch.cat([self.posterior(part, stream)[0] for part in chunks], dim=2)
        mean, scale = self._statistics(mu)
        return (mu - mean) * scale

    def decode(self, latent: Tensor, chunk: int = 1) -> Tensor:
        """Normalised latents (b c f h w) -> video (b 3 4f-3 8h 8w), clamped to [-1, 1]."""
        return torch.cat(list(self.stream(latent, chunk)), dim=2)

    def stream(self, latent: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """Decode `chunk` latent frames at a time; yields pieces of the video of `decode` (first 1 + 4(chunk-1) frames, then 4 chunk)."""
        mean, scale = self._statistics(latent)
        memory: Stream = {}
        z = self.conv2(latent / scale + mean, memory)
        for part in z.split(chunk, dim=2):
            yield self.decoder(part, memory).clamp(-1, 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.cfg.mean, dtype=like.dtype, device=like.device)
        scale = 1.0 / torch.tensor(
            self.cfg.std, dtype=like.dtype, device=like.device
        )  # this form is bit-equal to the official one
        return mean.view(1, -1, 1, 1, 1), scale.view(1, -1, 1, 1, 1)


def check_video(shape: torch.Size | tuple[int, ...], cfg: VAEConfig) -> None:
    """Raise MinicosError unless b 3 F H W has F = 4n + 1 and H, W multiples of the stride."""
    _, channels, frames, height, width = shape
    ft, fh, fw = cfg.stride
    if channels != 3:
        raise MinicosError(f"a video has 3 colour channels, not {channels}")
    if frames % ft != 1:
        raise MinicosError(f"{frames} frames: the VAE takes {ft}n + 1 frames, e.g. {max(1, frames // ft * ft + 1)}")
    if height % fh or width % fw:
        raise MinicosError(f"{width}x{height} pixels: width and height must be multiples of {fw} and {fh}")
