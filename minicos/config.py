"""Wan models as data: architectures (`VARIANTS`), models that share an architecture (`FINETUNES`)
and ways of sampling (`PRESETS`).

A *variant* fixes tensor shapes; a *preset* fixes how a condition is made and how the loop runs.
Sources: wan/configs/*.py of Wan2.2 (official), and WanVideoPipeline of DiffSynth-Studio (the tools
of the paper). This file does not import torch, so `minicos inspect` identifies a checkpoint in a
fraction of a second.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from html import unescape
from numbers import Integral, Real
from typing import Any

from minicos.errors import MinicosError, suggest


@dataclass(frozen=True)
class DiTConfig:
    """Shapes of the diffusion transformer (official `WanModel`). Letters as in `ops`: d width, n
    heads, t text rows.
    """

    in_dim: int  # channels of the network's input: latent, or latent + mask + image latent
    out_dim: int  # c, latent channels
    dim: int  # d
    ffn_dim: int
    num_heads: int  # n; head width k = d / n
    num_layers: int
    text_dim: int = 4096  # width of the text encoder
    text_len: int = 512  # t; zero rows after a shorter prompt take part in attention
    freq_dim: int = 256  # width of the time sinusoid
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    # m, rows of CLIP features for cross-attention in addition to the text: 257 per image (Wan2.1)
    image_tokens: int = 0
    image_dim: int = 1280  # width of those features
    frame_causal: bool = False  # tokens attend to their own and earlier latent frames only

    def __post_init__(self):
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"width {self.dim} does not divide into {self.num_heads} heads of even width"
            )

    @property
    def head_dim(self) -> int:
        """k, the width of a head."""
        return self.dim // self.num_heads

    @property
    def images(self) -> int:
        """The number of images that cross-attention sees: 0, 1 (first) or 2 (first and last)."""
        return self.image_tokens // CLIPConfig().tokens


# Statistics of the latents of Wan2.1_VAE (wan/modules/vae2_1.py): the DiT sees (mu - mean) / std.
VAE21_MEAN = (
    -0.7571, -0.7089, -0.9113,  0.1075, -0.1745,  0.9653, -0.1517,  1.5508,
     0.4134, -0.0715,  0.5517, -0.3632, -0.1922, -0.9497,  0.2503, -0.2921,
)  # fmt: skip
VAE21_STD = (
     2.8184,  1.4541,  2.3275,  2.6558,  1.2196,  1.7708,  2.6052,  2.0743,
     3.2687,  2.1526,  2.8652,  1.5579,  1.6382,  1.1253,  2.8251,  1.9160,
)  # fmt: skip


# And of Wan2.2_VAE (wan/modules/vae2_2.py).
VAE22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799,  0.0174,  0.1838,  0.1557,
    -0.1382,  0.0542,  0.2813,  0.0891,  0.1570, -0.0098,  0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698,  0.5109,  0.2665, -0.2108, -0.2158,  0.2502,
    -0.2055, -0.0322,  0.1109,  0.1567, -0.0729,  0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649,  0.0117,  0.0723, -0.2839, -0.2083, -0.0520,  0.3748,
     0.0152,  0.1957,  0.1433, -0.2944,  0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
VAE22_STD = (
     0.4765,  1.0364,  0.4514,  1.1677,  0.5313,  0.4990,  0.4818,  0.5013,
     0.8158,  1.0344,  0.5894,  1.0901,  0.6885,  0.6165,  0.8454,  0.4978,
     0.5759,  0.3523,  0.7135,  0.6804,  0.5833,  1.4146,  0.8986,  0.5659,
     0.7069,  0.5338,  0.4889,  0.4917,  0.4069,  0.4999,  0.6866,  0.4093,
     0.5709,  0.6065,  0.6415,  0.4944,  0.5726,  1.2042,  0.5458,  1.6887,
     0.3971,  1.0600,  0.3943,  0.5537,  0.5444,  0.4089,  0.7468,  0.7744,
)  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """Shapes of the causal 3D VAE (official `WanVAE_`), with the statistics of its latents. The
    defaults are those of Wan2.1_VAE.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    dec_dim: int | None = None  # width of the decoder if it differs from the encoder's
    patch_size: int = 1  # pixels folded into channels, along height and width, before the encoder
    stage_shortcuts: bool = False  # a shortcut around every stage that changes size
    mean: tuple[float, ...] = VAE21_MEAN
    std: tuple[float, ...] = VAE21_STD

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent along frames, height and width, e.g. (4, 8, 8)."""
        space = self.patch_size * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space


VAE22 = VAEConfig(  # Wan2.2_VAE, of Wan2.2-TI2V-5B; stride 4 x 16 x 16
    dim=160,
    z_dim=48,
    dec_dim=256,
    patch_size=2,
    stage_shortcuts=True,
    mean=VAE22_MEAN,
    std=VAE22_STD,
)


@dataclass(frozen=True)
class TextConfig:
    """Shapes of the UMT5 encoder (official `T5Encoder`, shared_pos=False)."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    text_len: int = 512


@dataclass(frozen=True)
class CLIPConfig:
    """Shapes of CLIP's image encoder (official `VisionTransformer`, a ViT-H/14)."""

    image_size: int = 224  # pixels of either side
    patch_size: int = 14
    dim: int = 1280
    num_heads: int = 16
    num_layers: int = 32  # in its file; the features are the output of the last but one

    @property
    def tokens(self) -> int:
        """m, rows of features: one for each patch, and one for the whole image."""
        return (self.image_size // self.patch_size) ** 2 + 1


_14B = DiTConfig(in_dim=16, out_dim=16, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

VARIANTS: dict[str, DiTConfig] = {
    "Wan2.2-I2V-A14B": replace(_14B, in_dim=36),
    "Wan2.2-T2V-A14B": _14B,
    "Wan2.2-TI2V-5B": replace(
        _14B, in_dim=48, out_dim=48, dim=3072, ffn_dim=14336, num_heads=24, num_layers=30
    ),
    "Wan2.1-T2V-1.3B": replace(_14B, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "Wan2.1-T2V-14B": _14B,
    "Wan2.1-I2V-14B": replace(_14B, in_dim=36, image_tokens=257),
    "Wan2.1-FLF2V-14B": replace(_14B, in_dim=36, image_tokens=514),
    "tiny": DiTConfig(
        in_dim=36,
        out_dim=16,
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_layers=12,
        text_dim=64,
        text_len=16,
    ),
}

# Numbers of experts that a variant may have, if not just one. The embedded model has one until its
# second stage is trained.
EXPERTS: dict[str, tuple[int, ...]] = {
    "Wan2.2-I2V-A14B": (2,),
    "Wan2.2-T2V-A14B": (2,),
    "tiny": (1, 2),
}

# Models whose files do not distinguish them from a variant: never guessed, used only by name
# (--variant).
FINETUNES: dict[str, str] = {
    "VBVR-Wan2.2": "Wan2.2-I2V-A14B",
    "Wan2.2-I2V-A14B-4step": "Wan2.2-I2V-A14B",
    "Wan2.2-T2V-A14B-4step": "Wan2.2-T2V-A14B",
    "ChronoEdit-14B": "Wan2.1-I2V-14B",
    "Wan2.1-I2V-14B-720P": "Wan2.1-I2V-14B",  # also chosen if a file or folder name contains 720p
}

# Prefix to the name of a variant: a network of that form in another size, sampled like it.
LIKE = "like "

TINY_VAE = VAEConfig(dim=16, dim_mult=(1, 1, 2, 4), num_res_blocks=1)  # statistics: in its file
TINY_TEXT = TextConfig(
    vocab_size=96, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2, text_len=16
)

# wan/configs/shared_config.py; the official code uses it if no negative prompt is given
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


# Far above practical values, and low enough to refuse a typing error before any work starts. Pixels
# are those of a picture or frame: 134 megapixels, of which a small file can hold far more.
MOST_STEPS, MOST_FRAMES, MOST_FPS, MOST_PIXELS = 10_000, 10_001, 1_000, 1 << 27
LEAST_SHIFT, MOST_SHIFT = 1e-6, 1e6
MOST_LETTERS = 1 << 17  # of a prompt; models read some 2,000


@dataclass(frozen=True)
class Preset:
    """A way of sampling. Guidance is keyed by the expert's name, because the official code and
    diffusers order their pairs differently.
    """

    solver: str  # "euler" | "unipc" | "dpmpp"
    steps: int
    shift: float  # sigma' = shift sigma / (1 + (shift - 1) sigma)
    guidance: dict[str, float] = field(hash=False)  # {"high": g, "low": g}; 1 skips the uncond pass
    boundary: float | None = None  # timesteps >= 1000 boundary go to the high-noise expert
    residual_dtype: str = "float32"  # dtype of the residual stream when the weights are bf16
    loop_dtype: str = "float32"  # of latent, guidance and timestep; "bfloat16" as DiffSynth
    negative_prompt: str = NEGATIVE_PROMPT
    image: str = "none"  # how the network receives a first frame, see `IMAGE`
    resize: str = "bicubic"  # how that frame is resized, see `RESIZE`
    area: int | None = 832 * 480  # pixels of a frame, in the image's aspect ratio; None: its size
    size: tuple[int, int] = (480, 832)  # height and width if there is no image
    frames: int = 81  # 4n + 1
    fps: int = 16
    # ChronoEdit: position of the second of two latent frames on the time axis of RoPE
    time_skip: int | None = None
    # where noise is drawn: "cpu", equal on every machine, or "cuda", as in the official code
    noise_device: str = "cpu"

    @property
    def takes_image(self) -> bool:
        """Whether a first frame can be given."""
        return self.image != "none"

    @property
    def needs_image(self) -> bool:
        """Whether a first frame must be given; TI2V also makes videos from text alone."""
        return self.image in ("channels", "first and last")

    def changed(self, **changes: Any) -> "Preset":
        """The preset with some fields changed. A number as guidance applies to both experts.

        Raises:
            MinicosError: there is no such field, a value is of another type, a number is not
                finite, or the loop's dtype is unknown or not supported by the solver (bfloat16
                needs Euler).
        """
        names = [f.name for f in fields(self)]
        for name in changes:
            if name not in names:
                raise MinicosError(f"a preset has no {name!r}{suggest(name, names)}")
        if _is(guidance := changes.get("guidance", {}), Real):
            changes["guidance"] = dict.fromkeys(("high", "low"), float(guidance))
        elif not isinstance(guidance, Mapping):
            raise MinicosError(f"guidance is a number, or one for each expert, not {guidance!r}")
        new = replace(self, **changes)
        for name, (value, fits, must) in _needs(new).items():
            if not fits:
                raise MinicosError(f"{name} is {value!r:.40}: it must be {must}")
        if (new.solver, new.loop_dtype) != ("euler", "bfloat16") and new.loop_dtype != "float32":
            raise MinicosError(
                f"a loop in {new.loop_dtype} under {new.solver}: take loop_dtype float32, or "
                "bfloat16 with the solver euler"
            )
        return new

    @property
    def guided(self) -> bool:
        """Whether any expert needs a second pass with the negative prompt."""
        return any(g != 1 for g in self.guidance.values())

    @property
    def branches(self) -> tuple[str, ...]:
        """The passes that a step may have, by name."""
        return ("cond", "uncond") if self.guided else ("cond",)

    def check_inputs(
        self, variant: str, prompts: Sequence[str | None], image: bool, last: bool
    ) -> None:
        """Raise MinicosError for an empty prompt, and for a first or last frame that is missing or
        not accepted.

        None explicitly means no prompt; an empty prompt, also one of control characters or HTML's
        spaces alone, is taken for a mistake.
        """
        for prompt in prompts or [""]:
            if not isinstance(prompt, str | None):
                raise MinicosError(f"a prompt is text, or None for no prompt, not {prompt!r}")
            if len(prompt or "") > MOST_LETTERS:  # it would take minutes to say what is cut off
                raise MinicosError(
                    f"the prompt has {len(prompt or ''):,} letters: take at most {MOST_LETTERS:,}"
                )
            if prompt is not None and not any(
                c.isprintable() and not c.isspace() for c in unescape(unescape(prompt))
            ):
                raise MinicosError(
                    "the prompt is empty; say what should happen, e.g. --prompt 'solve the maze' "
                    "(or --no-prompt; None in Python)"
                )
        if self.needs_image and not image:
            raise MinicosError(f"{variant} makes a video from a first frame: give an image")
        if image and not self.takes_image:
            raise MinicosError(f"{variant} makes a video from text alone and takes no image")
        if last != (self.image == "first and last"):
            what = "takes no last frame" if last else "needs a last frame, too: give one"
            raise MinicosError(f"{variant} {what}")


def _is(value: Any, kind: type) -> bool:
    """Whether a value is a number of this kind; False for guidance would be 0."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _needs(p: Preset) -> dict[str, tuple[object, bool, str]]:
    """Each field of a preset that anybody may change: its value, whether it can be used, and what
    it must be.
    """

    def number(
        value: Any, low: float = -math.inf, high: float = math.inf
    ) -> tuple[object, bool, str]:
        fits = _is(value, Real) and math.isfinite(value) and low <= float(value) <= high
        return value, fits, "a finite number" + f" from {low:g} to {high:g}" * math.isfinite(high)

    def count(value: Any, most: int) -> tuple[object, bool, str]:
        fits = _is(value, Integral) and 0 < int(value) <= most
        return value, fits, f"a whole number above 0, at most {most:,}"

    sides = p.size if isinstance(p.size, tuple | list) and len(p.size) == 2 else (0, 0)
    return {
        "steps": count(p.steps, MOST_STEPS),
        "frames": count(p.frames, MOST_FRAMES),
        "shift": number(p.shift, LEAST_SHIFT, MOST_SHIFT),
        **{f"guidance {expert}": number(g) for expert, g in p.guidance.items()},
        **({} if p.boundary is None else {"boundary": number(p.boundary, 0, 1)}),
        **({} if p.area is None else {"area": count(p.area, MOST_PIXELS)}),
        "size": (
            p.size,
            all(count(side, MOST_PIXELS)[1] for side in sides),
            "height and width, whole numbers above 0",
        ),
        "fps": count(p.fps, MOST_FPS),
        "negative_prompt": (
            p.negative_prompt,
            isinstance(p.negative_prompt, str) and len(p.negative_prompt) <= MOST_LETTERS,
            f'text of at most {MOST_LETTERS:,} letters, or ""',
        ),
        **{
            name: (value, value in names, f"one of {', '.join(names)}")
            for name, value, names in (
                ("residual_dtype", p.residual_dtype, ("float32", "bfloat16")),
                ("resize", p.resize, RESIZE),
                ("noise_device", p.noise_device, ("cpu", "cuda")),
                ("image", p.image, IMAGE),
            )
        },
    }


IMAGE = {
    "none": "text alone",
    "channels": "mask and latent of [image, grey frames], concatenated to x (required)",
    "first and last": "the same with an image at either end (both required)",
    "imposed": "the first latent frame is the image's at every step (optional)",
}
RESIZE = {
    "bicubic": "official: torch's bicubic without antialiasing, no crop",
    "pil": "DiffSynth: PIL's bicubic, antialiased, no crop; without an area, sides are rounded up",
    "crop": "official TI2V-5B: PIL's Lanczos to cover, then a centre crop",
}

# Wan2.1 asks for no shaking camera, and between two frames also for no cut
# (wan/configs/wan_i2v_14B.py, __init__.py).
_SHAKE, _CUT = "镜头晃动，", "镜头切换，镜头晃动，"

_OFFICIAL = Preset("unipc", 40, 5.0, {"high": 3.5, "low": 3.5}, boundary=0.900)
_OFFICIAL21 = _OFFICIAL.changed(steps=50, guidance={"high": 5.0, "low": 5.0}, boundary=None)
_COS = Preset(
    "euler",
    50,
    5.0,
    {"high": 5.0, "low": 5.0},
    boundary=0.875,
    residual_dtype="bfloat16",
    resize="pil",
)
_COS_IMAGE = _COS.changed(image="channels", area=None)  # videos have the size of their first frame
_4STEP = _OFFICIAL.changed(  # lightx2v
    solver="euler", steps=4, guidance={"high": 1.0, "low": 1.0}, negative_prompt=""
)
_5B = {"image": "imposed", "size": (704, 1280), "frames": 121, "fps": 24}
_CHRONO = _OFFICIAL21.changed(
    image="channels", resize="pil", area=720 * 1280, frames=5, negative_prompt="", time_skip=7
)
_TINY = {"negative_prompt": "", "area": None, "size": (64, 64), "frames": 13, "image": "channels"}

# Variant -> name -> preset; the first is the default. "official" follows the defaults of Wan's own
# code. "cos" follows the paper's tools as they are called: DiffSynth's pipeline with the official
# negative prompt. It differs from them in three ways. Their size was measured on mazes with the
# embedded model (relative L2):
#   latents, guidance and timesteps are float32, where the tools use bfloat16: 4e-2 to 5e-2 of the
#   final latents (network in bfloat16). loop_dtype="bfloat16" follows the tools;
#   the picture is encoded whole, where the tools use tiles of 30x52 latents with stride 15x26: 1e-2
#   to 2.3e-2 of its latents at 480x832. There is no option to follow the tools;
#   it is encoded in float32, where the tools use bfloat16: 7e-3 of its latents. Likewise.
PRESETS: dict[str, dict[str, Preset]] = {
    "Wan2.2-I2V-A14B": {"official": _OFFICIAL.changed(image="channels"), "cos": _COS_IMAGE},
    "Wan2.2-T2V-A14B": {
        "official": _OFFICIAL.changed(
            shift=12.0, guidance={"high": 4.0, "low": 3.0}, boundary=0.875
        ),
        "cos": _COS,
    },
    "Wan2.2-TI2V-5B": {
        "official": _OFFICIAL21.changed(resize="crop", area=704 * 1280, **_5B),
        "cos": _COS.changed(boundary=None, area=None, **_5B),
    },
    "Wan2.1-T2V-14B": {"official": _OFFICIAL21, "cos": _COS.changed(boundary=None)},
    "Wan2.1-I2V-14B": {
        "official": _OFFICIAL21.changed(
            steps=40, image="channels", shift=3.0, negative_prompt=_SHAKE + NEGATIVE_PROMPT
        ),
        "cos": _COS_IMAGE.changed(boundary=None),
    },
    "Wan2.1-FLF2V-14B": {
        "official": _OFFICIAL21.changed(
            image="first and last",
            shift=16.0,
            area=720 * 1280,
            negative_prompt=_CUT + NEGATIVE_PROMPT,
        )
    },
    # nvidia/ChronoEdit-14B-Diffusers: the last frame is the edited image. "reasoning" also makes
    # the intermediate frames (the published code decodes latents 0 and 7 separately). From
    # nv-tlabs/ChronoEdit, scripts/run_inference_diffusers.py; its rope_temporal_skip_len of 8
    # puts two latent frames at positions 0 and 7. CLIP receives the picture as in Wan; their
    # diffusers pipeline crops it.
    "ChronoEdit-14B": {"official": _CHRONO, "reasoning": _CHRONO.changed(frames=29, fps=8)},
    "tiny": {
        "tiny": _OFFICIAL.changed(
            solver="euler", steps=20, guidance={"high": 1.0, "low": 1.0}, **_TINY
        ),
        "official": _OFFICIAL.changed(**_TINY),
        "cos": _COS.changed(**_TINY),
        "4step": _4STEP.changed(**_TINY),
    },
    # Video-Reason/VBVR-Wan2.2: its tools run 50 Euler steps with boundary 0.875, but it was trained
    # with 0.8997.
    "VBVR-Wan2.2": {"cos": _COS_IMAGE, "trained": _COS_IMAGE.changed(boundary=0.8997)},
    "Wan2.2-I2V-A14B-4step": {"official": _4STEP.changed(image="channels")},
    "Wan2.2-T2V-A14B-4step": {"official": _4STEP},
}
PRESETS["Wan2.1-T2V-1.3B"] = PRESETS["Wan2.1-T2V-14B"]
PRESETS["Wan2.1-I2V-14B-720P"] = {  # the official generate.py uses shift 3 at 480p only
    "official": replace(PRESETS["Wan2.1-I2V-14B"]["official"], shift=5.0, area=720 * 1280),
    "cos": PRESETS["Wan2.1-I2V-14B"]["cos"],
}


def get_preset(variant: str, name: str | None = None) -> Preset:
    """The preset `name` of a variant (by default its first one). Raises MinicosError with the
    possible names.
    """
    table = PRESETS.get(variant.removeprefix(LIKE))
    if table is None:
        raise MinicosError(
            f"no preset for variant {variant!r}: there are presets for {', '.join(PRESETS)}."
        )
    name = name or next(iter(table))
    if name not in tuple(table):
        raise MinicosError(f"{variant} has no preset {name!r}: take one of {', '.join(table)}.")
    return table[name]


preset = get_preset  # its name in version 0.1
