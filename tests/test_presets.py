"""Presets as published. Each row is copied from the sources that config.py names, not from
config.py.
"""

import math

import pytest

from minicos import config
from minicos.config import PRESETS
from minicos.errors import MinicosError

CHINESE = (  # wan/configs/shared_config.py, sample_neg_prompt
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# variant, preset: solver, steps, shift, boundary, guidance (high, low), negative prompt, image,
# resize, area, size, frames, fps
TABLE = {
    ("Wan2.2-I2V-A14B", "official"): (
        "unipc", 40, 5.0, 0.900, (3.5, 3.5), CHINESE, "channels", "bicubic", 480 * 832, (480, 832), 81, 16),
    ("Wan2.2-I2V-A14B", "cos"): (
        "euler", 50, 5.0, 0.875, (5.0, 5.0), CHINESE, "channels", "pil", None, (480, 832), 81, 16),
    ("Wan2.2-T2V-A14B", "official"): (
        "unipc", 40, 12.0, 0.875, (4.0, 3.0), CHINESE, "none", "bicubic", 480 * 832, (480, 832), 81, 16),
    ("Wan2.2-T2V-A14B", "cos"): (
        "euler", 50, 5.0, 0.875, (5.0, 5.0), CHINESE, "none", "pil", 480 * 832, (480, 832), 81, 16),
    ("Wan2.2-TI2V-5B", "official"): (
        "unipc", 50, 5.0, None, (5.0, 5.0), CHINESE, "imposed", "crop", 704 * 1280, (704, 1280), 121, 24),
    ("Wan2.2-TI2V-5B", "cos"): (
        "euler", 50, 5.0, None, (5.0, 5.0), CHINESE, "imposed", "pil", None, (704, 1280), 121, 24),
    ("Wan2.1-T2V-1.3B", "official"): (
        "unipc", 50, 5.0, None, (5.0, 5.0), CHINESE, "none", "bicubic", 480 * 832, (480, 832), 81, 16),
    ("Wan2.1-T2V-1.3B", "cos"): (
        "euler", 50, 5.0, None, (5.0, 5.0), CHINESE, "none", "pil", 480 * 832, (480, 832), 81, 16),
    ("Wan2.1-T2V-14B", "official"): (
        "unipc", 50, 5.0, None, (5.0, 5.0), CHINESE, "none", "bicubic", 480 * 832, (480, 832), 81, 16),
    ("Wan2.1-T2V-14B", "cos"): (
        "euler", 50, 5.0, None, (5.0, 5.0), CHINESE, "none", "pil", 480 * 832, (480, 832), 81, 16),
    ("Wan2.1-I2V-14B", "official"): (  # shift 3 at 480p
        "unipc", 40, 3.0, None, (5.0, 5.0), "镜头晃动，" + CHINESE, "channels", "bicubic", 480 * 832, (480, 832), 81, 16),
    ("Wan2.1-I2V-14B", "cos"): (
        "euler", 50, 5.0, None, (5.0, 5.0), CHINESE, "channels", "pil", None, (480, 832), 81, 16),
    ("Wan2.1-I2V-14B-720P", "official"): (
        "unipc", 40, 5.0, None, (5.0, 5.0), "镜头晃动，" + CHINESE, "channels", "bicubic", 720 * 1280, (480, 832), 81, 16),
    ("Wan2.1-I2V-14B-720P", "cos"): (
        "euler", 50, 5.0, None, (5.0, 5.0), CHINESE, "channels", "pil", None, (480, 832), 81, 16),
    ("Wan2.1-FLF2V-14B", "official"): (
        "unipc", 50, 16.0, None, (5.0, 5.0), "镜头切换，镜头晃动，" + CHINESE, "first and last", "bicubic", 720 * 1280,
        (480, 832), 81, 16),
    ("ChronoEdit-14B", "official"): (
        "unipc", 50, 5.0, None, (5.0, 5.0), "", "channels", "pil", 720 * 1280, (480, 832), 5, 16),
    ("ChronoEdit-14B", "reasoning"): (
        "unipc", 50, 5.0, None, (5.0, 5.0), "", "channels", "pil", 720 * 1280, (480, 832), 29, 8),
    ("VBVR-Wan2.2", "cos"): (
        "euler", 50, 5.0, 0.875, (5.0, 5.0), CHINESE, "channels", "pil", None, (480, 832), 81, 16),
    ("VBVR-Wan2.2", "trained"): (
        "euler", 50, 5.0, 0.8997, (5.0, 5.0), CHINESE, "channels", "pil", None, (480, 832), 81, 16),
    ("Wan2.2-I2V-A14B-4step", "official"): (
        "euler", 4, 5.0, 0.900, (1.0, 1.0), "", "channels", "bicubic", 480 * 832, (480, 832), 81, 16),
    ("Wan2.2-T2V-A14B-4step", "official"): (
        "euler", 4, 5.0, 0.900, (1.0, 1.0), "", "none", "bicubic", 480 * 832, (480, 832), 81, 16),
    ("tiny", "tiny"): (
        "euler", 20, 5.0, 0.900, (1.0, 1.0), "", "channels", "bicubic", None, (64, 64), 13, 16),
    ("tiny", "official"): (
        "unipc", 40, 5.0, 0.900, (3.5, 3.5), "", "channels", "bicubic", None, (64, 64), 13, 16),
    ("tiny", "cos"): (
        "euler", 50, 5.0, 0.875, (5.0, 5.0), "", "channels", "pil", None, (64, 64), 13, 16),
    ("tiny", "4step"): (
        "euler", 4, 5.0, 0.900, (1.0, 1.0), "", "channels", "bicubic", None, (64, 64), 13, 16),
}  # fmt: skip


def test_every_preset_is_in_the_table():
    published = [variant for variant in PRESETS if not variant.startswith("toy ")]  # those of tests
    assert set(TABLE) == {(variant, name) for variant in published for name in PRESETS[variant]}


@pytest.mark.parametrize(("variant", "name"), TABLE)
def test_a_preset_is_as_published(variant, name):
    p = config.get_preset(variant, name)
    guidance = (p.guidance["high"], p.guidance["low"])
    sampling = (p.solver, p.steps, p.shift, p.boundary, guidance, p.negative_prompt)
    made = (p.image, p.resize, p.area, p.size, p.frames, p.fps)
    assert sampling + made == TABLE[variant, name]
    narrow = name in ("cos", "trained")  # DiffSynth computes in bfloat16 throughout
    assert p.residual_dtype == ("bfloat16" if narrow else "float32")
    assert p.time_skip == (7 if variant == "ChronoEdit-14B" else None)
    assert (p.noise_device, p.loop_dtype) == ("cpu", "float32")


def test_the_first_preset_is_the_default():
    for variant, table in PRESETS.items():
        first = "tiny" if variant == "tiny" else "cos" if variant == "VBVR-Wan2.2" else "official"
        assert config.get_preset(variant) is table[first]


def test_a_change_names_a_field_that_there_is():
    preset = config.get_preset("Wan2.2-I2V-A14B")
    assert preset.changed(steps=10, shift=3.0).steps == 10
    with pytest.raises(MinicosError, match="a preset has no 'guidence'; did you mean guidance"):
        preset.changed(guidence=3.0)


@pytest.mark.parametrize(("high", "low"), [(3.0, 1.0), (1.0, 3.0), (1.0, 1.0)])
def test_a_preset_is_guided_where_any_expert_is(high, low):
    changed = config.get_preset("Wan2.2-I2V-A14B").changed(guidance={"high": high, "low": low})
    assert changed.guided == (high != low)
    assert changed.branches == (("cond", "uncond") if changed.guided else ("cond",))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["shift", "boundary", "guidance"])
def test_numbers_are_finite(name, value):
    with pytest.raises(MinicosError, match=f"^{name}.* is {value}: it must be a finite number"):
        config.get_preset("Wan2.2-I2V-A14B").changed(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [{"loop_dtype": "bfloat16"}, {"loop_dtype": "float16", "solver": "euler"}, {"loop_dtype": ""}],
)
def test_a_narrow_loop_is_bfloat16_under_euler(changes):
    official = config.get_preset("Wan2.2-I2V-A14B")
    with pytest.raises(MinicosError, match="take loop_dtype float32, or bfloat16 with the solver"):
        official.changed(**changes)
    assert official.changed(loop_dtype="bfloat16", solver="euler").loop_dtype == "bfloat16"


@pytest.mark.parametrize("prompts", [[], [""], ["turn", " \n"], ["\0\u200b\ufeff"]])
def test_an_empty_prompt_is_refused(prompts):
    with pytest.raises(MinicosError, match="the prompt is empty"):
        config.get_preset("Wan2.2-T2V-A14B").check_inputs("T2V", prompts, False, False)


@pytest.mark.parametrize(
    ("variant", "image", "last", "says"),
    [
        ("Wan2.2-I2V-A14B", False, False, "from a first frame: give an image"),
        ("Wan2.2-I2V-A14B", True, True, "takes no last frame"),
        ("Wan2.2-T2V-A14B", True, False, "takes no image"),
        ("Wan2.1-FLF2V-14B", True, False, "needs a last frame, too"),
        ("Wan2.1-FLF2V-14B", False, True, "from a first frame: give an image"),
        ("Wan2.2-TI2V-5B", False, True, "takes no last frame"),
    ],
)
def test_frames_that_are_missing_or_too_many_are_refused(variant, image, last, says):
    preset = config.get_preset(variant)
    with pytest.raises(MinicosError, match=says):
        preset.check_inputs(variant, ["turn"], image, last)


@pytest.mark.parametrize("image", [False, True])
def test_ti2v_takes_an_image_or_none(image):
    config.get_preset("Wan2.2-TI2V-5B").check_inputs("TI2V", ["turn"], image, False)
