"""CLIP's image encoder against the official code and against transformers, whose files it reads,
too.
"""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minicos.clip import CLIP, load_clip, pixels
from minicos.config import CLIPConfig
from minicos.errors import MinicosError
from minicos.weights.inspect import inspect
from minicos.weights.names import CLIP_TRANSFORMERS, inverse, renamer, translate
from tests import golden
from tests.checkpoints import manifest
from tests.golden import rel_l2, rel_max

DATA, WEIGHTS = golden.read("clip"), golden.read("clip.weights")
GIVEN = golden.info("clip")["config"]
CFG = CLIPConfig(
    GIVEN["image_size"],
    GIVEN["patch_size"],
    GIVEN["vision_dim"],
    GIVEN["vision_heads"],
    GIVEN["vision_layers"],
)
FULL = "official.models_clip_open-clip-xlm-roberta-large-vit-huge-14.full"
VISION = "diffusers.Wan2.1-I2V.image_encoder.CLIPVisionModel"


@pytest.fixture(scope="module")
def image() -> Tensor:
    return DATA["in.image_u8"].permute(2, 0, 1)[None] / 255 * 2 - 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> CLIP:
    """The golden network, read from a file in the official layout."""
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file(
        WEIGHTS | {"log_scale": torch.zeros(()), "textual.head.0.weight": torch.zeros(2)}, path
    )
    return load_clip(path, CFG, dtype=torch.float32)


# -- the official outputs --------------------------------------------------------------------------


def test_pixels_are_the_official_ones(image):
    # measured 0; 1.7e-6 by torch 2.8, whose bicubic resizing differs in the last bits
    assert (pixels(image, 56) - DATA["mid.pixels"]).abs().max() < 3e-6
    large = pixels(image, 224)
    every = large[0, :, ::16, ::16]
    assert (every - DATA["out.pixels224_every16"]).abs().max() < 3e-6
    assert (large[0, :, 100] - DATA["out.pixels224_row100"]).abs().max() < 3e-6


def test_features_are_the_official_ones(clip, image):
    features = clip(image)
    assert features.dtype == torch.float32
    assert features.shape == DATA["out.features"].shape == (1, CFG.tokens, CFG.dim)
    assert rel_max(features, DATA["out.features"]) < 1e-6  # measured 0


def test_epsilons_are_the_official_ones():
    """Weights scaled down until the epsilon of the norms shows: a wrong one is off by 0.3."""
    weights = WEIGHTS
    for pattern, factor in golden.info("eps")["config"]["scaling"]["clip"]:
        base, exponent = factor.split("**")
        weights = {
            k: v * int(base) ** int(exponent) if re.search(pattern, k) else v
            for k, v in weights.items()
        }
    network = CLIP(CFG).requires_grad_(False)
    network.load_state_dict({k: v for k, v in weights.items() if not k.startswith(network.unused)})
    assert (
        rel_max(network.visual(DATA["mid.pixels"]), golden.read("eps")["clip.features"]) < 1e-6
    )  # measured 0


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)  # measured 6.6e-4, 5.7e-3
def test_narrow_dtypes(dtype, bound, clip, image):
    network = CLIP(CFG).requires_grad_(False)
    network.load_state_dict(clip.state_dict())
    features = network.to(dtype)(image)
    assert features.dtype == torch.float32
    assert rel_l2(features, DATA["out.features"]) < bound


def test_images_of_a_batch_do_not_see_each_other(clip, image):
    both = clip(torch.cat([image, image.flip(-1)]))
    assert rel_max(both[1:], clip(image.flip(-1))) < 1.5e-6  # measured 0
    assert rel_max(both[1:], both[:1]) > 1e-2


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_transformers_computes_the_same_from_its_file(prefix, tmp_path, image):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=CFG.dim,
        intermediate_size=4 * CFG.dim,
        num_hidden_layers=CFG.num_layers,
        num_attention_heads=CFG.num_heads,
        image_size=CFG.image_size,
        patch_size=CFG.patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    theirs, draw = (
        transformers.CLIPVisionModel(config).eval().requires_grad_(False),
        torch.Generator().manual_seed(3),
    )
    for p in theirs.parameters():
        p.copy_(
            torch.randn(p.shape, generator=draw) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
        )
    path = tmp_path / "model.safetensors"
    save_file(
        {prefix + k.removeprefix("vision_model."): p for k, p in theirs.state_dict().items()}, path
    )
    ours = load_clip(path, CFG, dtype=torch.float32)
    assert all(not p.requires_grad for p in ours.parameters())
    expected = theirs(pixels(image, CFG.image_size), output_hidden_states=True).hidden_states[-2]
    assert rel_max(ours(image), expected) < 1e-6  # measured 0
    assert (inspect(path).variant, inspect(path).layout) == ("CLIP image encoder", "transformers")


def test_an_archive_is_read_like_the_official_one(tmp_path, clip, image):
    torch.save(WEIGHTS | {"textual.norm.weight": torch.ones(3)}, tmp_path / "clip.pth")
    assert torch.equal(
        load_clip(tmp_path / "clip.pth", CFG, dtype=torch.float32)(image), clip(image)
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"visual.pre_norm.weight": None}, r"needs visual\.pre_norm\.weight, which is not there"),
        (
            {"visual.extra.weight": torch.zeros(1)},
            r"visual\.extra\.weight is not part of this CLIP",
        ),
        (
            {"visual.pos_embedding": torch.zeros(1, 9, 48)},
            r"pos_embedding is \[1, 9, 48\], and this CLIP needs \[1, 17",
        ),
    ],
)
def test_wrong_files_are_refused(change, says, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file({k: v for k, v in (WEIGHTS | change).items() if v is not None}, path)
    with pytest.raises(MinicosError, match=says):
        load_clip(path, CFG, dtype=torch.float32)


def test_names_and_shapes_of_the_real_files():
    """Of the official file's 784 tensors 377 are used; the others are left aside by name."""
    with torch.device("meta"):
        network = CLIP(CLIPConfig())
    ours, official = {k: tuple(v.shape) for k, v in network.state_dict().items()}, manifest(FULL)
    used = {k: s for k, s in official.items() if not k.startswith(network.unused)}
    assert used == ours
    assert (len(official), len(used)) == (784, 377)
    assert {k.split(".")[0] for k in official} == {"visual", "textual", "log_scale"}


def test_names_and_shapes_of_transformers_files():
    """One of its matrices is a third of `to_qkv`; CLS and positions have no axes of size 1;
    CLIP's projection is not there.
    """
    theirs = manifest(VISION)
    parts = {}
    for key, shape in manifest(FULL).items():
        if not key.startswith("visual.") or key == "visual.head":
            continue
        module, _, leaf = key.rpartition(".")
        if module.endswith("to_qkv"):
            parts |= {f"{module}.{i}.{leaf}": (shape[0] // 3, *shape[1:]) for i in range(3)}
        else:
            parts[key] = tuple(n for n in shape if n != 1)
    assert {translate(key, CLIP_TRANSFORMERS): shape for key, shape in parts.items()} == theirs
    rename = renamer(theirs)
    assert {rename(key): shape for key, shape in theirs.items()} == parts
    assert {
        renamer(["vision_model." + k for k in theirs])("vision_model." + k) for k in theirs
    } == set(parts)
    assert inverse(inverse(CLIP_TRANSFORMERS)) == CLIP_TRANSFORMERS
