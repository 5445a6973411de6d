"""Image conditioning against the official procedures: the mask, the latents, the size rule, and
the imposed frame.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from minicos.checks import check_types
from minicos.condition import (
    Condition,
    WanCondition,
    check_frames,
    cover,
    crop_like,
    fit,
    frame_size,
    image_channels,
    known_frames,
    resize,
)
from minicos.config import RESIZE, VAE22, VAEConfig
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS
from minicos.peers.peer import PeerCondition
from minicos.vae import VAE
from tests import golden
from tests.golden import rel_max

DATA = golden.read("conditioning")
RULE = golden.info("conditioning")["config"]
TABLES = json.loads((golden.FOLDER / "size_tables.json").read_text())
SIZES = TABLES["i2v_size_rule"]


@pytest.fixture(scope="module")
def vae() -> VAE:
    network = VAE(golden.config(VAEConfig, "vae21")).requires_grad_(False)
    network.load_state_dict(golden.read("vae21.weights"))
    return network


@pytest.fixture(scope="module")
def image() -> Tensor:
    """The first frame as the pipeline has it: b 3 h w in [-1, 1]."""
    return DATA["i2v.image_u8"].permute(2, 0, 1)[None] / 127.5 - 1


# -- image channels --------------------------------------------------------------------------------


def test_the_resized_image_is_the_official_one(image):
    height, width = frame_size(tuple(image.shape[-2:]), RULE["max_area"])
    assert (height, width) == DATA["i2v.resized"].shape[-2:]
    assert (resize(image, height, width)[0] - DATA["i2v.resized"]).abs().max() < 1e-6  # measured 0


def test_mask_and_latents_of_a_first_frame_are_the_official_ones(vae, image):
    y = image_channels(vae, resize(image, *DATA["i2v.resized"].shape[-2:]), RULE["frames"])[0]
    assert y.shape == DATA["i2v.y"].shape
    assert torch.equal(y[:4], DATA["i2v.y"][:4])
    assert rel_max(y[4:], DATA["i2v.y"][4:]) < 8e-7  # measured 2.2e-7


def test_every_image_of_a_batch_has_its_own_channels(vae, image):
    images = torch.cat([resize(image, 16, 24), resize(image, 16, 24).flip(-1)])
    together = image_channels(vae, images, 5)
    assert together.shape == (2, 20, 2, 2, 3)
    for i in range(2):
        assert (
            rel_max(together[i], image_channels(vae, images[i : i + 1], 5)[0]) < 2e-6
        )  # measured 6.3e-7
    assert not torch.equal(together[0, 4:], together[1, 4:])


def test_mask_and_latents_of_a_first_and_last_frame_are_the_official_ones(vae):
    """81 frames are 21 latents; of the last latent's four video frames only the last is known,
    and is marked.
    """
    expected = DATA["flf2v.y"]
    ends = [DATA[f"flf2v.{end}_u8"].permute(2, 0, 1)[None] / 127.5 - 1 for end in ("first", "last")]
    size = frame_size(tuple(ends[0].shape[-2:]), RULE["max_area"])
    assert size == tuple(8 * n for n in expected.shape[-2:])
    y = image_channels(vae, *(resize(end, *size) for end in ends[:1]), 81, resize(ends[1], *size))[
        0
    ]
    assert torch.equal(y[:4], expected[:4])
    assert torch.equal(known_frames((1, 16, *expected.shape[1:]), last=True)[0], expected[:4])
    assert y[:4, -1].amax((1, 2)).tolist() == [0, 0, 0, 1]
    assert rel_max(y[4:], expected[4:]) < 3e-6  # measured 1.0e-6


def test_two_frames_are_the_least_between_which_to_lead(vae, image):
    small = resize(image, 16, 16)
    with pytest.raises(MinicosError, match="need 5 or more"):
        image_channels(vae, small, 1, small)
    assert image_channels(vae, small, 5, small).shape == (1, 20, 2, 2, 2)


pixels = st.integers(1, 400)


@given(pixels, pixels, pixels, pixels)
def test_a_last_frame_keeps_its_middle_in_the_shape_of_the_first(height, width, h, w):
    image = torch.arange(height)[:, None] * 1000.0 + torch.arange(width)
    cut = crop_like(image[None, None], torch.empty(1, 1, h, w))[0, 0]
    assert cut.shape[0] == height or cut.shape[1] == width  # as much of it as fits
    assert (
        abs(cut.shape[0] * w / h - cut.shape[1]) <= max(1, w / h) / 2 + 1e-6 or min(cut.shape) == 1
    )
    top, left = divmod(int(cut[0, 0]), 1000)
    assert torch.equal(cut, image[top : top + cut.shape[0], left : left + cut.shape[1]])
    assert abs(height - cut.shape[0] - 2 * top) <= 1
    assert abs(width - cut.shape[1] - 2 * left) <= 1
    assert torch.equal(crop_like(image[None, None], image[None, None])[0, 0], image)


@pytest.mark.parametrize("frames", [0, -3, 2, 4, 80, 82])
def test_frame_counts_must_be_4n_plus_1(frames, vae, image):
    with pytest.raises(MinicosError, match=f"^{frames} frames"):
        check_frames(frames)
    with pytest.raises(MinicosError, match=f"^{frames} frames"):
        image_channels(vae, resize(image, 16, 16), frames)


@given(st.integers(-20, 200))
def test_suggested_frame_counts_are_good_ones(frames):
    try:
        check_frames(frames)
    except MinicosError as error:
        below, above = (
            int(word.rstrip(".")) for word in str(error).split("e.g. ")[1].split(" or ")
        )
        assert below < above
        assert below <= max(frames, 1) < above
        check_frames(below)
        check_frames(above)
    else:
        assert frames % 4 == 1


# -- the imposed frame -----------------------------------------------------------------------------


def test_the_cropped_image_and_its_latent_are_the_official_ones():
    picture = DATA["ti2v.image_u8"].permute(2, 0, 1)[None] / 255
    size = frame_size(tuple(picture.shape[-2:]), RULE["ti2v_area"], 16, rule="crop")
    assert size == DATA["ti2v.cropped_u8"].shape[:2]
    frame = fit(picture, size, "crop")
    levels = (frame[0] + 1) * 127.5
    assert torch.equal(levels.round().to(torch.uint8).permute(1, 2, 0), DATA["ti2v.cropped_u8"])
    assert (levels - levels.round()).abs().max() < 1e-4  # measured 7.6e-6: nothing but the levels
    vae22 = VAE(replace(VAE22, dim=4, dec_dim=6)).requires_grad_(False)
    vae22.load_state_dict(golden.read("vae22.weights"))
    assert rel_max(vae22.encode(frame.unsqueeze(2))[0], DATA["ti2v.z"]) < 8e-7  # measured 2.1e-7


@pytest.mark.parametrize(
    "row",
    TABLES["ti2v_best_output_size"],
    ids=lambda r: "{}x{}@{}".format(*r["image"], r["max_area"]),
)
def test_size_rule_of_the_crop(row):
    width, height = row["image"]
    if row["out"]:
        size = frame_size((height, width), row["max_area"], 16, rule="crop")
        assert size == tuple(row["out"][::-1])
        assert cover((height, width), size) == (
            tuple(row["resized"][::-1]),
            tuple(row["crop_left_top"][::-1]),
        )
    else:  # the official code divides by zero
        with pytest.raises(MinicosError, match="too long and thin"):
            frame_size((height, width), row["max_area"], 16, rule="crop")


# -- how an image is resized -----------------------------------------------------------------------


@pytest.mark.parametrize("rule", RESIZE)
@pytest.mark.parametrize("size", [(64, 96), (40, 58), (32, 32)])
def test_every_way_to_fit_gives_the_size_and_the_range(rule, size):
    picture = DATA["i2v.image_u8"].permute(2, 0, 1)[None] / 255
    frames = fit(torch.cat([picture, 1 - picture]), size, rule)
    assert (frames.shape, frames.dtype) == ((2, 3, *size), torch.float32)
    assert frames.abs().max() < (
        1.5 if rule == "bicubic" else 1.0001
    )  # without 8 bits, bicubic overshoots
    same = fit(picture, tuple(picture.shape[-2:]), rule)
    assert (
        same - (picture * 2 - 1)
    ).abs().max() < 1e-6  # measured 6.0e-8: an image that fits is left alone


def test_pil_is_antialiased_and_bicubic_is_not():
    """Stripes of one pixel, at a third of the size: grey where they are averaged."""
    stripes = (torch.arange(96) % 2).float().expand(1, 3, 96, 96)
    assert fit(stripes, (32, 32), "pil").std() < 0.2 < 0.9 < fit(stripes, (32, 32), "bicubic").std()


def test_the_pil_rule_is_that_of_diffsynth():
    """image.resize((w, h)) with PIL's default, then to [-1, 1]; a side that does not divide is
    rounded up.
    """
    assert frame_size((30, 45), None, rule="pil") == (32, 48)
    assert frame_size((33, 47), None, rule="pil") == (48, 48)
    assert frame_size((30, 45), None, 16, rule="pil") == (32, 64)
    assert frame_size((32, 48), None, rule="pil") == (32, 48)
    levels = DATA["flf2v.first_u8"]
    expected = torch.from_numpy(
        np.array(Image.fromarray(levels.numpy()).resize((48, 32)), dtype=np.float32)
    )
    fitted = fit(levels.permute(2, 0, 1)[None] / 255, (32, 48), "pil")[0]
    assert (
        fitted - (expected * (2 / 255) - 1).permute(2, 0, 1)
    ).abs().max() < 1e-6  # measured 1.2e-7


def test_an_unknown_rule_is_refused():
    with pytest.raises(MinicosError, match="called 'lanczos': take one of bicubic, pil, crop"):
        fit(torch.zeros(1, 3, 8, 8), (16, 16), "lanczos")


@given(st.integers(64, 3000), st.integers(64, 3000), st.integers(64 * 64, 1280 * 720))
def test_crops_stay_within_the_area_and_inside_the_covering_image(height, width, area):
    try:
        size = frame_size((height, width), area, 16, rule="crop")
    except MinicosError:
        return
    (rows, columns), (top, left) = cover((height, width), size)
    assert not size[0] % 32
    assert not size[1] % 32
    assert size[0] * size[1] <= area
    assert 0 <= top <= rows - size[0]
    assert 0 <= left <= columns - size[1]
    assert min(rows - size[0], columns - size[1]) <= 1  # one side fits, the other is cut


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", SIZES, ids=lambda r: "{}x{}@{}".format(*r["image"], r["max_area"]))
def test_size_rule(row):
    width, height = row["image"]
    if row["H"] and row["W"]:
        assert frame_size((height, width), row["max_area"]) == (row["H"], row["W"])
    else:  # the official code would go on with an empty video
        with pytest.raises(MinicosError, match="too long and thin"):
            frame_size((height, width), row["max_area"])


sides = st.integers(16, 3000)


@given(sides, sides, st.integers(64 * 64, 1280 * 720))
def test_frames_divide_into_patches_stay_within_the_area_and_turn_with_the_image(
    height, width, area
):
    try:
        size = frame_size((height, width), area)
    except MinicosError:
        return
    assert not size[0] % 16
    assert not size[1] % 16
    assert size[0] * size[1] <= area
    assert frame_size((width, height), area) == size[::-1]


@given(sides, sides)
def test_without_an_area_the_image_keeps_its_size_or_is_refused_with_one_that_works(height, width):
    try:
        assert frame_size((height, width), None) == (height, width)
        assert not height % 16
        assert not width % 16
    except MinicosError as error:
        columns, rows = map(int, str(error).split("e.g. ")[1].split("x"))
        assert frame_size((rows, columns), None) == (rows, columns)
        assert abs(rows - height) <= 8
        assert abs(columns - width) <= 8


def test_resizing_to_the_same_size_changes_nothing(image):
    assert torch.equal(resize(image, *image.shape[-2:]), image)


# -- condition -------------------------------------------------------------------------------------


@pytest.fixture
def plain() -> WanCondition:
    return WanCondition(
        text=torch.ones(1, 5, 8), text_null=torch.zeros(1, 5, 8), shape=(1, 4, 3, 2, 2)
    )


def test_branches_have_their_own_prompt(plain):
    assert torch.equal(plain.branch("cond"), plain.text)
    assert torch.equal(plain.branch("uncond"), plain.text_null)
    with pytest.raises(MinicosError, match="negative prompt"):
        replace(plain, text_null=None).branch("uncond")


def test_conditions_that_differ_in_the_prompt_alone(plain):
    """Every other field counts: a pass of one stands for the other only where nothing else
    differs.
    """
    y = torch.zeros(1, 20, 3, 2, 2)
    pictured = replace(plain, y=y)
    assert pictured.same_but_text(replace(pictured, text=plain.text + 1, y=y.clone()))
    for change in ({"y": y + 1}, {"text_null": y}, {"clip": y}, {"first": y}, {"y": None}):
        assert not pictured.same_but_text(replace(pictured, **change))
    assert not pictured.same_but_text(Condition(shape=plain.shape))
    assert not Condition(shape=plain.shape).same_but_text(pictured)


def test_imposing_replaces_the_first_frame_and_nothing_else(plain):
    x, first = torch.randn(2, 4, 3, 2, 2), torch.randn(1, 4, 1, 2, 2)
    assert plain.impose(x) is x
    kept = x.clone()
    imposed = replace(plain, first=first.expand(2, -1, -1, -1, -1)).impose(x)
    assert torch.equal(imposed[:, :, :1], first.expand(2, -1, -1, -1, -1))
    assert torch.equal(imposed[:, :, 1:], x[:, :, 1:])
    assert torch.equal(x, kept)


@pytest.mark.parametrize("value", [937, 0.25])
def test_an_imposed_frame_has_timestep_and_sigma_0(value, plain):
    even, uneven = (
        plain.per_frame(value),
        replace(plain, first=torch.zeros(1, 4, 1, 2, 2)).per_frame(value),
    )
    assert even.dtype == uneven.dtype == torch.float32  # of integer timesteps, too
    assert even.shape == (1, 1, 1, 1, 1)
    assert even.item() == value
    assert uneven.shape == (1, 1, 3, 1, 1)
    assert uneven.flatten().tolist() == [0, value, value]


# -- samples of a batch ----------------------------------------------------------------------------


def test_samples_are_taken_and_repeated():
    text, y = torch.randn(3, 5, 8), torch.randn(3, 20, 1, 2, 2)
    condition = WanCondition(text=text, y=y, shape=(3, 16, 1, 2, 2))
    for found, rows in (
        (condition[1], [1]),
        (condition[-1], [2]),
        (condition[1:], [1, 2]),
        (condition.take([2, 0, 2]), [2, 0, 2]),
        (condition.take(torch.tensor([0])), [0]),
        (condition.repeat(2), [0, 0, 1, 1, 2, 2]),
        (condition[0].repeat(3), [0, 0, 0]),
    ):
        assert torch.equal(found.text, text[rows]) and torch.equal(found.y, y[rows])
        assert found.shape == (len(rows), 16, 1, 2, 2) and found.text_null is None
    assert [one.shape[0] for one in condition] == [1, 1, 1]
    alike = replace(condition, clip=torch.randn(1, 4, 8)).take([2, 0])  # one for all samples
    assert len(alike.clip) == 1 and torch.equal(alike.text, text[[2, 0]])
    with pytest.raises(IndexError):
        condition[3]
    with pytest.raises(IndexError):
        condition.take([3])
    mask = torch.tensor([True, False, True])
    for wrong in ([0.5], ["a"], None, torch.tensor([0.0]), mask, mask[:1], mask.tolist(), True):
        with pytest.raises(MinicosError, match="a sample is a whole number or several"):
            condition.take(wrong)
    with pytest.raises(MinicosError, match="has no samples"):
        check_types(condition.take([]), NO_HOOKS)
    for wrong in (1.5, "2", True, None, [2, 3]):
        with pytest.raises(MinicosError, match="a number of repetitions is a whole number"):
            condition.repeat(wrong)
    for absurd in (0, -1, 10**12):
        with pytest.raises(MinicosError, match=f"3 samples {absurd} times: take 1 to"):
            condition.repeat(absurd)


def test_conditions_are_equal_if_their_content_is():
    text, shape = torch.randn(2, 5, 8), (2, 16, 1, 2, 2)
    one = WanCondition(text=text, shape=shape)
    assert one == WanCondition(text=text.clone(), shape=shape) and one in [one]
    assert len({one, WanCondition(text=text.clone(), shape=shape)}) == 1
    for change in ({"text": text + 1}, {"text": text.double()}, {"y": text}, {"shape": shape[:4]}):
        assert one != replace(one, **change)
    assert one != Condition(shape=shape) and one != "a condition"
    angles = text[0], text[1]
    peer = PeerCondition(shape=shape, calls={"cond": {"x": text, "angles": angles, "size": None}})
    same = {"x": text.clone(), "angles": tuple(x.clone() for x in angles), "size": None}
    assert peer == replace(peer, calls={"cond": same})
    for change in ({"x": text + 1}, {"angles": angles[::-1]}, {"angles": angles[:1]}, {"size": 1}):
        assert peer != replace(peer, calls={"cond": same | change})
