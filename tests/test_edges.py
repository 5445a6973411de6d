"""Nothing is silently replaced, and Python can be used as people use it."""

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from minicos import Hooks, MinicosError, load
from minicos.cli import main, values
from minicos.device import open_device
from minicos.errors import MinicosWarning
from minicos.page import kept
from minicos.precision import undisturbed, without_tf32
from minicos.runs import Run
from minicos.vbvr import cases
from minicos.weights import layouts, lora

PICTURE = np.full((32, 32, 3), 255, np.uint8)
PROMPT = "solve the maze"


@pytest.fixture(scope="module")
def wan():
    return load("tiny", device="cpu").with_preset(steps=2, frames=5)


@pytest.fixture(scope="module")
def condition(wan):
    return wan.condition(PROMPT, PICTURE)


def final(wan, condition, **given) -> torch.Tensor:
    (*_, step) = wan.sample(condition, **given)
    return step.next


@pytest.fixture(scope="module")
def plain(wan, condition):
    return final(wan, condition, seed=1)


# -- process-wide settings of the caller -----------------------------------------------------------


def default_device():
    return torch.device("meta")  # anything made there by mistake has no numbers


def default_dtype():
    torch.set_default_dtype(torch.float64)
    return torch.no_grad()


def precision():
    torch.set_float32_matmul_precision("medium")
    return torch.no_grad()


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def newer_precision(place, value: str):
    before, place.fp32_precision = place.fp32_precision, value
    try:
        yield
    finally:
        assert place.fp32_precision == value
        place.fp32_precision = before


def of_products():
    return newer_precision(torch.backends.mkldnn.matmul, "bf16")


def of_all():
    return newer_precision(torch.backends, "tf32")


@pytest.mark.parametrize(
    "setting",
    [
        *(default_device, default_dtype, precision, autocast, torch.inference_mode),
        *((of_products, of_all) if hasattr(torch.backends, "fp32_precision") else ()),
    ],
)
def test_what_others_set_changes_no_bit(plain, setting):
    try:
        with setting():
            wan = load("tiny", device="cpu").with_preset(steps=2, frames=5)
            condition = wan.condition(PROMPT, PICTURE)
            made = final(wan, condition, seed=1)
            video = wan.decode(made)
            noise = wan.noise(condition, 1)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(made, plain)
    assert video.shape == (1, 5, 32, 32, 3)
    assert noise.dtype == torch.float32
    assert torch.equal(final(wan, condition, noise=noise), plain)  # what was made there serves here


def test_runs_in_threads_and_in_turn_do_not_mix(wan, condition, plain):
    """Each has its own hooks and steps, and leaves torch's settings of all threads alone."""

    def silenced(x, site):
        assert torch._dynamo.eval_frame._stance.stance == "default"  # whether anything compiles
        return torch.zeros_like(x)

    def run(number: int) -> torch.Tensor:
        hooks = Hooks().on("blocks.*.self_attn", silenced) if number % 2 else Hooks()
        return final(wan, condition, seed=1, hooks=hooks)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(run, range(4)))
    assert [torch.equal(one, plain) for one in made] == [True, False, True, False]
    first, second = (iter(wan.sample(condition, seed=1)) for _ in range(2))
    steps = list(zip(first, second, strict=True))  # two runs in turn in one thread
    assert all(torch.equal(step.next, plain) for step in steps[-1])


def test_threads_that_overlap_give_tf32_back():
    """The second finds what the first has set, and would restore that."""
    before = torch.backends.cudnn.allow_tf32
    first, second = without_tf32(), without_tf32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["in place", ".data", "numpy", "assigned"])
def test_every_edit_is_seen(wan, condition, mode, how):
    """UniPC's history would undo it."""
    guided = wan.with_preset(solver="unipc", steps=3)
    with mode():
        for step in guided.sample(condition, seed=1):
            if step.index != 1:
                continue
            assert step.state.history
            if how == "in place":
                step.next += 1
            elif how == ".data":
                step.next.data.add_(1)
            elif how == "numpy":
                step.next.numpy()[:] += 1
            else:
                step.next = step.next + 1
            edited = step
    assert not edited.state.history


def test_what_a_loop_body_leaves_must_be_a_latent(wan, condition):
    for wrong, says in (
        (None, "its `next` is a tensor, and NoneType"),
        (torch.zeros(1), r"torch.float32 \(1,\) cpu was assigned"),
        (torch.zeros(condition.shape).double(), "torch.float64"),
        (torch.full(condition.shape, torch.nan), "step 1, expert low: .* no longer finite; it ent"),
    ):
        with pytest.raises(MinicosError, match=says):
            for step in wan.sample(condition):
                step.next = wrong
    with pytest.raises(MinicosError, match="the state of a run is that of a step, not NoneType"):
        for step in wan.sample(condition):
            step.state = None


def test_a_history_of_another_step_is_a_mistake_of_the_caller(wan, condition):
    guided = wan.with_preset(solver="unipc", steps=3)
    last = [*guided.sample(condition)][-2]
    with pytest.raises(MinicosError, match="step 1 was given the history of step 1"):
        next(guided.sample(condition, noise=last.x, start=1, state=last.state))


def test_gradients_through_a_run_are_refused(wan, condition):
    noise = wan.noise(condition, 1).requires_grad_()
    with pytest.raises(MinicosError, match="keeps no gradients"):
        wan.sample(condition, noise=noise)
    with torch.no_grad():
        assert not final(wan, condition, noise=noise).requires_grad
    scale = torch.ones(1, requires_grad=True)
    with pytest.raises(MinicosError, match="keeps no gradients"):
        for step in wan.sample(condition):
            step.next = step.next * scale
    with pytest.raises(MinicosError, match="gradients do not flow"):
        wan.condition(PROMPT, torch.ones(3, 32, 32, requires_grad=True))


# -- common forms of inputs ------------------------------------------------------------------------


def test_a_picture_in_any_form_makes_the_same_condition(wan, condition, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    for form in (Image.fromarray(PICTURE), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(wan.condition(PROMPT, form).y, condition.y)


@pytest.mark.parametrize(
    "step", [np.int64(1), np.array(1), torch.tensor(1), (i for i in [1]), {1}, np.array([1])]
)
def test_steps_of_a_hook_in_any_form(wan, condition, step):
    seen = []
    hooks = Hooks().on("blocks.0", lambda x, site: seen.append(site.step), step=step)
    final(wan, condition, hooks=hooks)
    assert seen == [1]


def test_numbers_of_numpy(wan, condition, plain):
    assert torch.equal(final(wan, condition, seed=np.int64(1)), plain)
    for seed in (np.array([1]), np.array(1), torch.tensor(1)):
        assert torch.equal(final(wan, condition, seed=seed), plain)
    assert wan.condition(PROMPT, PICTURE, frames=torch.tensor(5)).shape == condition.shape
    assert wan.with_preset(guidance=3).preset.guidance == {"high": 3.0, "low": 3.0}


def closed() -> Image.Image:
    picture = Image.fromarray(PICTURE)
    picture.close()
    return picture


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda wan, c: wan.condition(3, PICTURE), "a prompt is text"),
        (lambda wan, c: wan.condition([PROMPT, 3], PICTURE), "a prompt is text"),
        (lambda wan, c: wan.condition(PROMPT, 3), "an image is a path"),
        (lambda wan, c: wan.condition(PROMPT, PICTURE / 255), "an image as an array is uint8"),
        (lambda wan, c: wan.condition(PROMPT, PICTURE, frames=5.5), "frames"),
        (lambda wan, c: wan.sample("maze"), "needs a condition"),
        (lambda wan, c: wan.sample(c, noise=3), "noise is a tensor"),
        (lambda wan, c: wan.sample(c, noise=torch.zeros(c.shape)[..., :2]), "this condition needs"),
        (lambda wan, c: wan.sample(c, noise=torch.zeros(c.shape).double()), "is torch.float64"),
        (lambda wan, c: wan.with_preset(shift=1e-30), "shift is 1e-30: it must be .* from 1e-06"),
        (lambda wan, c: wan.with_preset(guidance=False), "guidance is a number"),
        (lambda wan, c: wan.with_preset(fps=True), "fps is True"),
        (lambda wan, c: wan.with_preset(["tiny"]), "no preset"),
        (lambda wan, c: list(wan.with_preset(solver=["euler"]).sample(c)), "no solver"),
        (lambda wan, c: wan.sample(c, seed=True), "a seed is a whole number"),
        (lambda wan, c: wan.sample(c, seed=itertools.count()), "a seed is a whole number"),
        (lambda wan, c: wan.condition(PROMPT, PICTURE, negative=3), "negative_prompt is 3"),
        (lambda wan, c: wan.condition("&amp;nbsp;", PICTURE), "the prompt is empty"),
        (lambda wan, c: wan.condition("maze " * 10**6, PICTURE), "5,000,000 letters: take at most"),
        (lambda wan, c: wan.condition("a", PICTURE, negative="a" * 10**6), "at most 131,072 lett"),
        (lambda wan, c: wan.sample(c, start=1, state={}), "the state of a run is that of a step"),
        (lambda wan, c: c["0"], "a sample is a whole number"),
        (lambda wan, c: Hooks().on("blocks", print, layers=range(10**30)), "layers is a whole"),
        (
            lambda wan, c: final(wan, c, hooks=Hooks().on("blocks.0", lambda x, _: x.to_sparse())),
            r"returned torch.sparse_coo torch.float32 \(1, 8, 128\) on cpu, not torch.float32",
        ),
        (lambda wan, c: wan.decode(torch.zeros(c.shape)[:0]), "and none is 0"),
        (lambda wan, c: next(wan.frames(None)), "latents are b c f h w"),
        (lambda wan, c: wan.condition(PROMPT, "a" * 5000), "does not exist or is not a file"),
        (lambda wan, c: wan.condition(PROMPT, closed()), "the image cannot be read as an image"),
        (
            lambda wan, c: load("tiny", preset=replace(wan.preset, shift=math.nan)),
            "shift is nan: it must be",
        ),
        (lambda wan, c: wan.sample(c, seed=1.5), "a seed is a whole number"),
        (lambda wan, c: wan.sample(c, seed="1"), "a seed is a whole number"),
        (lambda wan, c: wan.sample(c, hooks=3), "hooks"),
        (lambda wan, c: list(wan.with_preset(steps=2.5).sample(c)), "steps"),
        (lambda wan, c: wan.with_preset(shift=float("nan")), "shift is nan"),
        (lambda wan, c: wan.with_preset(guidance=float("inf")), "guidance high is inf"),
        (lambda wan, c: Hooks().on("blocks.0", print, step=1.5), "step is a whole number"),
        (lambda wan, c: Hooks().on("blocks", print, layers=1.5), "layers is a whole number"),
        (lambda wan, c: Hooks().on("blocks.0", 3), "a hook is a function"),
        (lambda wan, c: Hooks().on(None, print), "a hook is a function .* at None"),
        (
            lambda wan, c: final(wan, c, hooks=Hooks().on("blocks.0", lambda x, site: "a")),
            "a str, not",
        ),
        (lambda wan, c: wan.with_preset(guidance="5"), "guidance is a number"),
        (lambda wan, c: next(wan.with_preset(steps=10**9).sample(c)), "at most 10,000"),
        (lambda wan, c: wan.condition(PROMPT, PICTURE, frames=10**9 + 1), "at most 10001"),
        (lambda wan, c: wan.condition(PROMPT, PICTURE[:0]), "an image is float"),
        (lambda wan, c: wan.sample(c, start="1"), "cannot start at step 1"),
        (lambda wan, c: wan.decode(None), "latents are b c f h w, not NoneType"),
        (lambda wan, c: wan.decode(torch.zeros(3)), r"latents are b c f h w, not Tensor \(3,\)"),
        (lambda wan, c: wan.decode(torch.zeros(1, 3, 2, 4, 4)), "c is 16 here"),
        (lambda wan, c: wan.decode(torch.full(c.shape, torch.nan)), "would be black"),
    ],
)
def test_wrong_types_are_said_in_our_words(wan, condition, call, says):
    with pytest.raises(MinicosError, match=says):
        call(wan, condition)


WITHOUT_NUMBERS = {
    "on the meta device": lambda x: x.to("meta"),
    "sparse": Tensor.to_sparse,
    "complex": lambda x: x.to(torch.complex64),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "of 8-bit floats": lambda x: x.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", WITHOUT_NUMBERS)
def test_tensors_without_numbers_are_named(wan, condition, kind):
    made = WITHOUT_NUMBERS[kind]
    latent, run = made(torch.zeros(condition.shape)), wan.sample(condition, seed=0)
    step = next(run)
    step.next = latent
    for call in (
        lambda: wan.sample(condition, noise=latent),
        lambda: wan.decode(latent),
        lambda: wan.condition(PROMPT, made(torch.zeros(3, 32, 32))),
        lambda: next(run),
    ):
        with pytest.raises(MinicosError, match=f"real numbers in memory, and this one is {kind}"):
            call()


# -- what is lost, unused or overflows -------------------------------------------------------------


def test_a_prompt_that_is_too_long_says_what_it_loses(wan):
    long = "solve the maze " * 6
    kept = wan.tokenizer.text_len - 1
    with pytest.warns(MinicosWarning, match=rf"longer than the {kept + 1} tokens .* is cut off"):
        wan.condition(long, PICTURE)
    tail = wan.tokenizer.cut_off(long)
    words = long.split()
    assert tail == " ".join(words[kept:])  # of this tokenizer a word is a token
    assert wan.tokenizer.cut_off(" ".join(words[:kept])) == ""


def test_an_unused_negative_prompt_is_said(wan):
    with pytest.warns(MinicosWarning, match="negative prompt is not used: guidance is 1"):
        wan.condition(PROMPT, PICTURE, negative="mark the circle")


def test_no_prompt_is_allowed_where_it_is_asked_for(wan, condition):
    assert wan.condition(None, PICTURE).text.shape == condition.text.shape
    assert not torch.equal(wan.condition(None, PICTURE).text, condition.text)
    with pytest.raises(MinicosError, match="the prompt is empty"):
        wan.condition(" ", PICTURE)


def test_a_run_that_overflows_stops_and_says_where(wan, condition):
    def harm(x, site):
        return torch.full_like(x, torch.inf)

    hooks = Hooks().on("blocks.0.ffn", harm, step=1)
    with pytest.raises(
        MinicosError, match=r"step 1, expert low.*no longer finite.*branch cond.*LoRA"
    ):
        final(wan, condition, hooks=hooks)


def test_guidance_that_overflows_is_named(wan):
    strong = wan.with_preset(guidance=1e39)  # finite, and no float32
    with pytest.raises(MinicosError, match=r"step 0, .*overflowed in guidance or solver"):
        final(strong, strong.condition(PROMPT, PICTURE))


def test_the_command_says_them_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("a.png")
    argv = ["generate", "--image", "a.png", "--frames", "1", "--steps", "1", "--out", "run"]
    assert main([*argv, "--prompt", "solve the maze " * 6, "--negative", "mark"]) == 0
    _, err = capsys.readouterr()
    assert re.search(r"^minicos: the prompt is longer than .*maze' is cut off$", err, re.M)
    assert re.search(r"^minicos: the negative prompt is not used", err, re.M)
    assert main([*argv[:-1], "none", "--no-prompt"]) == 0


def test_the_720p_model_is_sampled_at_720p():
    """By a name in its files, which are those of the 480p model in everything else."""
    from minicos.config import PRESETS, VARIANTS, get_preset
    from minicos.weights import layouts, variants

    cfg = VARIANTS["Wan2.1-I2V-14B"]
    shapes = {name: getattr(cfg, name) for name in ("in_dim", "dim", "num_layers", "image_tokens")}
    for name in ("Wan2.1-I2V-14B-720P", "wan2.1_i2v_720p_14B_fp16.safetensors"):
        assert layouts._large_frames(Path(name), {}, shapes) == "Wan2.1-I2V-14B-720P"
    assert layouts._large_frames(Path("Wan2.1-I2V-14B-480P"), {}, shapes) is None
    other = {**shapes, "image_tokens": 514}  # FLF2V-14B-720P has settings of its own
    assert layouts._large_frames(Path("Wan2.1-FLF2V-14B-720P"), {}, other) is None
    large = get_preset("Wan2.1-I2V-14B-720P")
    assert (large.shift, large.area) == (5.0, 1280 * 720)
    assert variants.finetunes("Wan2.1-I2V-14B") == ["ChronoEdit-14B", "Wan2.1-I2V-14B-720P"]
    assert PRESETS["Wan2.1-I2V-14B"]["official"].shift == 3.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shift": "3"}, "shift is '3': it must be a finite number"),
        ({"boundary": "x"}, "boundary is 'x': it must be a finite number"),
        ({"guidance": {"high": None, "low": 1}}, "guidance high is None"),
        ({"area": -1}, "area is -1: it must be a whole number above 0"),
        ({"area": "832x480"}, "area is '832x480'"),
        ({"fps": 0}, "fps is 0: it must be a whole number above 0"),
        ({"steps": -1}, "steps is -1: it must be a whole number above 0, at most 10,000"),
        ({"steps": 2.5}, "steps is 2.5: it must be a whole number"),
        ({"frames": 0}, "frames is 0: it must be a whole number above 0"),
        ({"negative_prompt": None}, "negative_prompt is None: it must be text"),
        ({"image": "x"}, "image is 'x': it must be one of none, channels"),
        ({"boundary": 2}, "boundary is 2: it must be a finite number from 0 to 1"),
        ({"boundary": -0.1}, "boundary is -0.1: it must be a finite number from 0 to 1"),
        ({"guidance": None}, "guidance is a number, or one for each expert, not None"),
        ({"area": 10**30}, "at most 134,217,728"),
        ({"size": (0, 64)}, "size is (0, 64): it must be height and width"),
        ({"size": "64x64"}, "size is '64x64': it must be height and width"),
        ({"size": (64, 64, 3)}, "size is (64, 64, 3): it must be height and width"),
        ({"fps": 10**12}, "it must be a whole number above 0, at most 1,000"),
        ({"resize": "x"}, "resize is 'x': it must be one of bicubic, pil, crop"),
        ({"residual_dtype": "float16"}, "it must be one of float32, bfloat16"),
    ],
)
def test_a_preset_holds_values_that_can_be_used(wan, changes, says):
    with pytest.raises(MinicosError, match=re.escape(says)):
        wan.with_preset(**changes)


def test_device_0_is_a_card_and_not_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MinicosError, match="has no device '0'"):
        open_device(0)
    assert open_device(None) == torch.device("cpu")


def test_loras_in_every_form_of_python_and_of_a_shell(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    pieces = {"lora_down": torch.zeros(4, 128), "lora_up": torch.zeros(128, 4)}
    save_file({f"blocks.0.self_attn.q.{k}.weight": v for k, v in pieces.items()}, file)
    for given in (str(file), file, (file, 1.0), [file], [(file, 1.0)]):
        assert layouts.find("tiny", lora={"high": given}).experts["high"].loras == ((file, 1.0),)
    with pytest.raises(MinicosError, match="lora is a dictionary"):
        layouts.find("tiny", lora=[file])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert values.lora("high=~/a.safetensors:0.5") == ("high", (str(file), 0.5))


def test_a_lora_of_integers_is_refused(tmp_path):
    """They lack a factor: applied as they are, they would be off by about 127."""
    pieces = {"lora_down": torch.zeros(4, 128, dtype=torch.int8), "lora_up": torch.zeros(128, 4)}
    file = tmp_path / "a.safetensors"
    save_file({f"blocks.0.self_attn.q.{k}.weight": v for k, v in pieces.items()}, file)
    with pytest.raises(MinicosError, match=r"q\.lora_down\.weight holds integers \(I8\)"):
        lora.read(file)


def test_numbers_of_a_kind_without_arithmetic_are_refused(tmp_path):
    """Half-byte numbers crashed torch, and powers of two are factors, not changes."""
    pieces = {"lora_down": torch.zeros(4, 128), "lora_up": torch.zeros(128, 4)}
    named = {f"blocks.0.self_attn.q.{k}.weight": v for k, v in pieces.items()}
    for kind in (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu):
        alpha = {"blocks.0.self_attn.q.alpha": torch.zeros(1, dtype=torch.uint8).view(kind)}
        save_file(named | alpha, file := tmp_path / "a.safetensors")
        with pytest.raises(MinicosError, match=r"q\.alpha holds numbers \(F(4|8_E8M0)\)"):
            lora.read(file)


def test_addresses_are_told_from_paths(wan):
    with pytest.raises(MinicosError, match="Addresses are not fetched"):
        wan.condition(PROMPT, "https://example.com/maze.png")
    with pytest.raises(MinicosError, match=r"by its id: Wan-AI/Wan2\.2-I2V-A14B"):
        load("https://huggingface.co/Wan-AI/Wan2.2-I2V-A14B/tree/main")


def test_a_link_to_itself_is_a_missing_file(tmp_path):
    """`Path.resolve` raises RuntimeError for it."""
    (link := tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(MinicosError, match=r"loop\.png is missing"):
        cases._inside(tmp_path, link)
    run = Run(tmp_path, {})
    assert not kept.inside(run, "videos.json", link.name).exists()
    link.unlink()
    link.symlink_to("..")
    with pytest.raises(MinicosError, match=r"'loop\.png', which is not in the folder"):
        kept.inside(run, "videos.json", link.name)


def shown() -> tuple[str, str]:
    """What torch's switches of float32 say, with what they have from the switch of all."""
    return torch.backends.mkldnn.conv.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch 2.8")
def test_precision_is_given_back_as_it_was():
    before = shown()
    with of_all():
        with undisturbed():
            assert shown() == ("ieee", "ieee")
        assert shown() == ("tf32", "tf32")
    assert shown() == before  # none was left with a value of its own


@pytest.mark.parametrize("given", ["--counts=0,2", "--counts=-1", "--lengths=5,18"])
def test_counts_are_refused_before_weights_are_read(tmp_path, monkeypatch, capsys, given):
    """The last of them would have been found after all the others were sampled."""
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        patched.setattr("minicos.open.load", None)
        assert main(["counts", "--n=1", given]) == 2
    assert re.search(r"minicos: (0 steps|-1 steps|18 frames): ", capsys.readouterr().err)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--shift=1e-9"], "'1e-9' is not a number from 1e-06 to 1e"),
        (["--preset="], "'' is not a name"),
        (["--variant= "], "' ' is not a name"),
        (["--jsonl=a.png"], "a.png does not hold lines of JSON"),
        (["--jsonl=."], ". is not a file, and cannot be one"),
        (["--jsonl=a.png/x"], "a.png/x is not a file, and cannot be one"),
    ],
)
def test_these_are_refused_before_weights_are_read(tmp_path, monkeypatch, capsys, given, says):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("a.png")
    with monkeypatch.context() as patched:
        patched.setattr("minicos.open.load", None)
        try:
            code = main(["generate", "--puzzle", "mark", *given])
        except SystemExit as stopped:
            code = stopped.code
    assert code == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_numbers_of_numpy_are_numbers_in_the_record_of_a_run(tmp_path):
    Run.open(tmp_path, {"steps": np.int64(2), "shift": np.float32(5)})
    assert Run.open(tmp_path, {"steps": 2, "shift": 5.0}).settings["steps"] == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--share-at=nan"], "--share-at is of no use without --ensemble"),
        (["--modes=mix", "--noise", "step:1"], "--modes is of no use without --ensemble"),
        (["--donor=both"], "--donor is of no use without --swap"),
        (["--mode=erase"], "--mode is of no use without --noise"),
    ],
)
def test_a_detail_of_no_intervention_is_refused(tmp_path, capsys, given, says):
    out = tmp_path / "run"
    assert main(["run", "--puzzle=maze", *given, f"--out={out}"]) == 2
    assert capsys.readouterr().err == f"minicos: {says}\n"
    assert not out.exists()
