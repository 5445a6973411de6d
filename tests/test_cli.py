"""The command: one sentence for every mistake, and runs that survive being killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minicos import cli
from minicos.analysis.energy import FORMS
from minicos.cli import main, opening, points
from minicos.cli import options as cli_options
from minicos.config import VARIANTS
from minicos.dit import DiT
from minicos.media import load_image, load_video, save_image
from minicos.runs import PART
from minicos.tiny.lora import save_lora
from minicos.weights import layouts, lora

PROMPT = ["--prompt", "solve the maze"]
VERBS = (
    *(
        "demo",
        "generate",
        "steps",
        "energy",
        "attention",
        "belief",
        "commitment",
        "plant",
        "recall",
        "behaviours",
        "counts",
        "noise",
        "frames",
        "distilled",
        "swap",
        "ensemble",
        "run",
        "reproduce",
    ),
    *("puzzles", "points", "inspect", "verify", "bench"),
)
posix = pytest.mark.skipif(os.name != "posix", reason="signals are a matter of POSIX")
PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def work(tmp_path, monkeypatch, toy):
    """A working folder, with a picture and a fast model."""
    monkeypatch.chdir(tmp_path)
    save_image("maze.png", PICTURE)
    os.symlink(toy, "toy")
    return tmp_path


@pytest.fixture
def minicos(work, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(list(argv))
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def passes(monkeypatch):
    """The forward passes of the network so far, not counting those on the meta device that find
    its points.
    """
    seen, forward = [], DiT.forward

    def counted(self, x, *args, **kwargs):
        seen.extend([x.shape] * (not x.is_meta))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(DiT, "forward", counted)
    return seen


def start(*argv: str) -> subprocess.Popen:
    """Run Python in a process of its own, on one thread as here, so that last bits agree."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background ignores Ctrl-C, and children inherit that:
    # listen again.
    listen = None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, *argv], env=environment, preexec_fn=listen, **pipes)


def wait_for(path, process, seconds: float = 120) -> None:
    """Wait until the file exists. If the process ends before, the test is wrong."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def numbers(folder) -> dict[str, torch.Tensor]:
    """Every number of a run."""
    files = [*folder.glob("steps/*.safetensors"), *folder.glob("*.safetensors")]
    return {
        f"{path.relative_to(folder)}:{k}": v for path in files for k, v in load_file(path).items()
    }


def same(a, b) -> bool:
    a, b = numbers(a), numbers(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


# -- help, and the verbs that need no network ------------------------------------------------------


def test_help_teaches_by_example_and_is_told_without_torch(work):
    code = (
        "import sys\nfrom minicos.cli import main\n"
        "for argv in [[], ['--help'], *([verb, '--help'] for verb in sys.argv[2:]), ['inspect', "
        "sys.argv[1], '--json']]:\n"
        "    try: main(argv)\n"
        "    except SystemExit as stop: assert not stop.code, stop\n"
        "print(sorted({'torch', 'av', 'matplotlib'} & set(sys.modules)))"
    )
    out, err = start("-c", code, "toy", *VERBS).communicate()
    assert err == ""
    assert out.splitlines()[-1] == "[]"
    top, *each = re.split(r"^usage: minicos (?=\w)", out, flags=re.M)
    assert top.count("usage: minicos [options] VERB") == 2  # no arguments also print help
    assert all(verb in top for verb in VERBS)
    for verb, text in zip(VERBS, each, strict=True):
        assert text.startswith(verb)
        assert "examples:\n  minicos " + verb in text


def test_inspect_tells_one_object(minicos, toy):
    code, out, _ = minicos("inspect", "toy", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["variant"] == "tiny"
    assert found["layout"] == "official"
    tensors = load_file(toy / "high_noise_model/diffusion_pytorch_model.safetensors")
    assert found["tensors"] == len(tensors)
    assert found["dtypes"] == {"F16": len(tensors)}
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert "tiny" in minicos("inspect", "toy")[1]


def test_points_are_a_list_of_names_and_shapes(minicos):
    code, out, _ = minicos("points", "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found) == 4 + 23 * VARIANTS["tiny"].num_layers
    assert all(set(point) == {"name", "shape"} for point in found)
    assert all(
        re.fullmatch(r"[bcdefghklntw6]( [bcdefghklntw6])*", point["shape"]) for point in found
    )
    shapes = {point["name"]: point["shape"] for point in found}
    assert len(shapes) == len(found)
    assert shapes["blocks.11.self_attn.q"] == "b n l k"
    assert shapes["velocity"] == "b c f h w"


def test_points_of_other_models(minicos):
    assert minicos("points", "--model", "toy", "--json") == minicos("points", "--json")
    folded = minicos("points")[1].splitlines()
    *rows, _, blocks = folded[: folded.index("b        samples")]
    assert len(rows) == 4 + 23
    assert blocks.startswith("i = 0..11;")
    used = {letter for row in rows for letter in row.split()[1:]} - {"6"}
    legend = [line[:7].split() for line in folded[len(rows) + 2 :]]  # one line per letter or group
    assert {letter for letters in legend for letter in letters} == used
    assert (
        len(minicos("points", "--model", "Wan2.2-I2V-A14B", "--all")[1].splitlines()) == 4 + 23 * 40
    )


def test_a_reader_that_stops_early_is_no_error(work):
    process = start("-m", "minicos", "inspect", "toy", "--json")
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


# -- mistakes --------------------------------------------------------------------------------------


def video(*argv: str) -> list[str]:
    """A command that would work, with options added or replaced."""
    return ["steps", "--model", "toy", *PROMPT, "--image", "maze.png", "--steps", "6", *argv]


def both(*argv: str) -> list[str]:
    return ["run", *video()[1:], *argv]


MISTAKES = {
    "no image": (["steps", "--model", "toy", *PROMPT], "first frame: give an image"),
    "nothing to generate from": (
        ["generate", "--model", "toy", *PROMPT],
        "first frame: give an image",
    ),
    "a loop in bfloat16 under UniPC": (
        video("--preset", "official", "--loop-dtype", "bfloat16"),
        "take loop_dtype float32, or bfloat16 with the solver euler",
    ),
    "missing image": (video("--image", "none.png"), "none.png does not exist"),
    "image is a folder": (video("--image", "toy"), "toy does not exist or is not a file"),
    "image is text": (video("--image", "text.png"), "text.png cannot be read as an image"),
    "image is half a video": (video("--image", "half.mp4"), "half.mp4 cannot be read as an image"),
    "image is empty": (video("--image", "empty.png"), "empty.png"),
    "image of a wrong size": (
        video("--image", "odd.png"),
        "40x32 pixels; both sides must be multiples of 16",
    ),
    "image of a wrong size, run": (
        ["run", *video("--image", "odd.png")[1:]],
        "--image .*odd.png: the image has 40x32 pixels",
    ),
    "no prompt": (["generate", "--model", "toy"], "--prompt"),
    "empty prompt": (video("--prompt", " "), "prompt is empty"),
    "frames": (video("--frames", "12"), "12 frames: the model makes 4n [+] 1 frames, e.g. 9 or 13"),
    "no frames": (video("--frames", "0"), "--frames: '0' is not a whole number from 1"),
    "no steps": (video("--steps", "0"), "--steps: '0' is not a whole number from 1"),
    "steps in words": (video("--steps", "few"), "--steps: 'few' is not"),
    "solver": (video("--solver", "heun"), "--solver: invalid choice: 'heun' .choose from .*dpmpp"),
    "shift": (video("--shift", "0"), "--shift: '0' is not a positive number"),
    "shift in words": (video("--shift", "far"), "--shift: 'far' is not a number"),
    "guidance": (video("--guidance", "strong"), "--guidance: 'strong' is not a number"),
    "guidance of one": (video("--guidance", "high=4"), "'high=4' is not guidance for both experts"),
    "guidance of another": (
        video("--guidance", "high=4,mid=3"),
        "'high=4,mid=3' is not guidance for both experts",
    ),
    "guidance without end": (
        video("--guidance", "high=4,low=inf"),
        "--guidance: 'inf' is not a number",
    ),
    "boundary": (
        video("--boundary", "900"),
        "--boundary: '900' is not a number between 0 and 1, e.g. 0.9",
    ),
    "boundary of one": (
        video("--boundary", "0.9"),
        "--boundary is between two experts, and tiny has one here",
    ),
    "step beyond the end": (video("--at", "0,6"), "--at 0,6: the run has steps 0 to 5"),
    "step before the start": (video("--at", "-1"), "--at -1: the run has steps 0 to 5"),
    "step in words": (
        video("--at", "first"),
        "--at: 'first' is not a list of numbers such as 0,5,19",
    ),
    "negative seed": (video("--seed", "-1"), "--seed: '-1' is not a whole number from 0"),
    "huge seed": (
        video("--seed", str(2**63)),
        "--seed: '9223372036854775808' is not a whole number",
    ),
    "preset": (video("--preset", "best"), "'best': take one of tiny, official, cos, 4step"),
    "device": (video("--device", "gpu"), "no device 'gpu'"),
    "kernels": (video("--kernels", "--device", "cpu"), "they need a CUDA card, and this is cpu"),
    "swap without another prompt": (
        both("--swap", "3"),
        "a swap needs both: --swap LAYERS, and --other",
    ),
    "swap of no layer": (
        both("--swap", "12", "--other", "mark the circle"),
        "--swap: this model has layers 0 to 11",
    ),
    "noise of no step": (both("--noise", "step:99"), "--noise step:99: the run has steps 0 to"),
    "attention of no pass": (
        video("--also", "attention", "--branch", "uncond", "--guidance", "1"),
        "--branch uncond: at guidance 1 a run has no unprompted pass",
    ),
    "noise of what": (both("--noise", "10"), "--noise 10: give step:10, or frame:1"),
    "noise of no frame": (
        both("--noise", "frame:9"),
        "--noise frame:9: this run has latent frames 0 to 3",
    ),
    "knockout of one side": (both("--knockout", "frame:0"), "give two sides, such as frame:0 to"),
    "knockout of two pairs": (both("--knockout", "text", "to", "all", "to", "all"), "two sides"),
    "knockout of what": (
        both("--knockout", "object:cat", "to", "all"),
        "object:cat is not frame:0, rows:0-1, columns:2 or all, text",
    ),
    "knockout of the text's sight": (both("--knockout", "all", "to", "text"), "looks at nothing"),
    "knockout of no step": (
        both("--knockout", "causal", "steps:0-6"),
        "causal steps:0-6: this run has steps 0 to 5",
    ),
    "knockout of no layer": (
        both("--knockout", "causal", "layers:12"),
        "this run has layers 0 to 11",
    ),
    "knockout of no word": (
        both("--knockout", "word:cat", "to", "all"),
        "--knockout word:cat: the prompt 'solve the maze' lacks it",
    ),
    "knockout of a word in another branch": (
        both("--knockout", "word:maze", "to", "all", "branch:both"),
        "and cond for words of the prompt",
    ),
    "knockout twice": (both("--knockout", "causal", "layers:1", "layers:2"), "says a thing twice"),
    "knockout of no seed": (both("--knockout", "causal", "control:x"), "seed of the random pairs"),
    "knockout of no frame": (
        both("--knockout", "frame:9", "to", "all"),
        "--knockout frame:9 to all: this run has latent frames 0 to 3",
    ),
    "knockout of no row": (
        both("--knockout", "frame:1", "rows:0-9", "to", "all"),
        "--knockout frame:1 rows:0-9 to all: this run has rows of tokens 0 to 1",
    ),
    "knockout of no column": (
        ["run", "--puzzle", "maze", "--knockout", "all", "to", "columns:6"],
        "--knockout all to columns:6: this run has columns of tokens 0 to 3",
    ),
    "sharing with oneself": (both("--ensemble", "20-29", "--seeds", "1"), "--seeds 2 or more"),
    "sharing of no window": (
        both("--ensemble", "20-29,30-39"),
        "--ensemble 20-29,30-39: one window of blocks",
    ),
    "belief of one's own": (
        ["belief", "--prompt", "solve"],
        "unrecognized arguments: --prompt solve",
    ),
    "meta device": (video("--device", "meta"), "no device 'meta'"),
    "model": (video("--model", "nonsense"), "nonsense is not a folder with a model"),
    "also": (video("--also", "steps"), "--also: invalid choice: 'steps'"),
    "out is a file": (video("--out", "maze.png"), "maze.png is a file, not a folder"),
    "out below a file": (video("--out", "maze.png/run"), "maze.png is a file, not a folder"),
    "out is no run": (video("--out", "foreign"), "foreign/run.json is not the record of a run"),
    "verb": (["dance"], "invalid choice: 'dance'"),
    "option": (video("--colour", "red"), "unrecognized arguments: --colour red"),
    "points of nothing": (
        ["points", "--model", "nonsense"],
        "neither a model's files nor a variant.*Wan2.2-I2V.*tiny",
    ),
    "points of a picture": (["points", "--model", "maze.png"], "maze.png is not a file of weights"),
    "a part given twice": (
        video("--part", "vae=a.pth", "vae=b.pth"),
        "--part vae=... is given twice: name one file for each part",
    ),
    "a part of no name": (video("--part", "vae"), "--part: 'vae' is not NAME=FILE"),
    "an unknown part": (
        video("--part", "eyes=maze.png"),
        "--part eyes=maze.png: there is no part 'eyes'. Take one of high, low, vae, text",
    ),
    "a part that is not there": (
        video("--part", "vae=none.pth"),
        "none.pth does not exist: --part vae=none.pth",
    ),
    "a LoRA for nobody": (video("--lora", "maze.png"), "--lora: 'maze.png' is not NAME=FILE"),
    "a LoRA for an expert that is not there": (
        video("--lora", "low=maze.png"),
        "tiny has one network: --lora high=FILE",
    ),
    "a LoRA that is not there": (
        video("--lora", "high=none.safetensors"),
        "none.safetensors does not exist",
    ),
    "a LoRA that is none": (
        video("--lora", "high=maze.png:0.5"),
        "maze.png is not a file of weights",
    ),
    "an unknown variant": (
        video("--variant", "Wan3"),
        "no variant 'Wan3': take one of .*VBVR-Wan2.2",
    ),
    "another variant": (
        video("--variant", "VBVR-Wan2.2"),
        "has not the shapes of VBVR-Wan2.2: it can be tiny",
    ),
    "a model of the Hub": (
        video("--model", "no/body"),
        "no/body is neither .* `minicos inspect no/body --download`",
    ),
    "inspect nothing": (["inspect", "nonsense"], "nonsense does not exist"),
    "inspect a picture": (["inspect", "maze.png"], "maze.png is not a file of weights"),
    "puzzle": (
        ["demo", "--model", "toy", "--puzzle", "-1"],
        "--puzzle: '-1' is not a whole number from 0",
    ),
}


def test_run_composes_and_continues(minicos, passes, work):
    argv = both(
        "--swap",
        "3",
        "--other",
        "mark the circle",
        "--noise",
        "step:4",
        "--noise",
        "step:2",
        "frame:1",
        "--ensemble",
        "20-29",
    )
    shown = ["--x0", "--energy", "--attention", "0,6", "--at", "0,4"]
    code, out, err = minicos(*argv, *shown, "--out", "new")
    assert code == 0, err
    assert len(passes) == 12  # six steps of a run and of its donor, without guidance
    files = [line.split("  (")[0] for line in out.splitlines() if line.startswith("new/")]
    assert files and all(os.path.exists(file) for file in files)
    os.unlink("new/steps/005.safetensors")
    assert minicos(*argv, *shown, "--out", "new")[0] == 0
    assert len(passes) == 14
    assert minicos(*argv, "--out", "plain")[0] == 0
    ours, plain = (load_file(f"{name}/steps/005.safetensors") for name in ("new", "plain"))
    assert torch.equal(ours["next"], plain["next"])  # looking changes nothing


@pytest.fixture
def bad_files(work):
    (work / "text.png").write_text("not an image")
    (work / "empty.png").write_text("")
    (work / "half.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(500))
    save_image(work / "odd.png", np.zeros((32, 40, 3), np.uint8))
    (work / "foreign").mkdir()
    (work / "foreign/run.json").write_text("[]")


def assert_one_sentence(result: tuple[int, str, str], says: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert re.fullmatch(f"minicos: .*{says}.*\n", err), (
        err
    )  # `.` does not match a newline: it is one line


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(name, minicos, bad_files, work):
    argv, says = MISTAKES[name]
    if argv[0] in ("steps", "demo", "generate", "run") and "--out" not in argv:
        argv = [*argv, "--out", "new/run"]
    before = sorted(work.rglob("*"))
    assert_one_sentence(minicos(*argv), says)
    assert sorted(work.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(minicos, work):
    assert_one_sentence(minicos(*video("--device", "cuda", "--out", "run")), "no device 'cuda'")
    assert not (work / "run").exists()


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"), reason="needs a file system that nobody can write to"
)
def test_an_out_that_cannot_be_written(minicos):
    assert_one_sentence(minicos(*video("--out", "/proc/run")), "cannot write into /proc/run")


@posix
@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("link", "link is a link to nothing. Remove it, or choose another --out"),
        (".", "and no run.json that says which run it is of"),
        ("notes.txt", "notes.txt is a file, not a folder"),
        ("notes.txt/run", "notes.txt is a file, not a folder"),
    ],
)
def test_an_out_that_is_something_else(minicos, tmp_path, monkeypatch, out, says):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert_one_sentence(minicos(*video("--out", out)), says)
    assert sorted(tmp_path.iterdir()) == before


@posix
def test_a_current_folder_that_was_deleted(minicos, tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert_one_sentence(minicos("points"), "the current folder does not exist any more")


def test_a_home_folder_that_the_shell_left_in_an_option(monkeypatch, tmp_path):
    """As in `--out=~/runs`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["generate", "--prompt=x", "--out=~/run", "--model=~/wan", "--image=~/a.png"]
    args = cli.parser().parse_args(given)
    named = str(tmp_path / "run"), str(tmp_path / "wan"), str(tmp_path / "a.png")
    assert (str(args.out), args.model, str(args.image)) == named
    assert cli.parser().parse_args(["generate", "--prompt=x"]).model == "tiny"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "minicos", "points"], stdout=full, stderr=-1, text=True
        )
    assert process.returncode == 2
    assert process.stderr.startswith("minicos: reading or writing failed: No space left on device")
    assert process.stderr.count("\n") == 1


def test_the_system_says_no(minicos, monkeypatch):
    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("minicos.media.load_image", deny)
    assert_one_sentence(
        minicos(*video()), "maze.png: Permission denied. Check path, space and permissions"
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_no_memory_left(error, minicos, monkeypatch):
    def fill(args):
        raise error

    monkeypatch.setattr(points, "run", fill)
    assert_one_sentence(minicos("points"), "out of memory. Take fewer --frames")


def test_a_fault_of_minicos_is_not_dressed_up_as_yours(minicos, monkeypatch):
    def fail(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(points, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        minicos("points")


def test_the_demo_is_for_the_embedded_model(minicos, monkeypatch, work):
    find = layouts.find
    monkeypatch.setattr(
        layouts, "find", lambda *args, **kw: replace(find(*args, **kw), variant="Wan2.2-I2V-A14B")
    )
    monkeypatch.setattr("minicos.open.load", None)  # reported before anything is loaded
    assert_one_sentence(
        minicos("demo", "--model", "toy", "--out", "run"), "embedded model, not Wan2.2-I2V-A14B"
    )
    assert not (work / "run").exists()


CHEAP = {
    "preset": ("--preset", "best"),
    "step beyond the end": ("--at", "0,6"),
    "empty prompt": ("--prompt", " "),
    "out is a file": ("--out", "maze.png"),
    "out below a file": ("--out", "maze.png/run"),
    "a LoRA that is not there": ("--lora", "high=none.safetensors"),
}


@pytest.mark.parametrize("name", CHEAP)
def test_what_needs_no_weights_is_refused_before_any_are_read(name, minicos, monkeypatch):
    monkeypatch.setattr("minicos.open.load", None)
    assert_one_sentence(minicos(*video("--out", "new/run", *CHEAP[name])), MISTAKES[name][1])


@pytest.mark.parametrize(
    "name",
    [
        "attention of no pass",
        "noise of no frame",
        "knockout of no frame",
        "knockout of no row",
        "knockout of no column",
        "knockout of no layer",
    ],
)
def test_places_that_a_run_lacks_are_refused_before_weights_are_read(name, minicos, monkeypatch):
    monkeypatch.setattr("minicos.open.load", None)
    assert_one_sentence(minicos(*MISTAKES[name][0]), MISTAKES[name][1])


@pytest.mark.parametrize(
    ("size", "given"), [((40, 56), ["--area", "64x32"]), ((64, 96), ["--frames", "5"])]
)
def test_the_token_grid_is_known_before_weights_are_read(size, given, toy):
    argv = ["run", "--model", str(toy), *PROMPT, "--image", "x.png", *given]
    args, picture = cli.parser().parse_args(argv), torch.zeros(3, *size)
    files = opening.layout(args)
    outline, wan = opening.outline(args, files), opening.load_wan(args, files)
    assert outline.grid(picture) == wan.grid(wan.condition("solve", picture).shape)


DIT = "high_noise_model/diffusion_pytorch_model.safetensors"
TOKENIZER = "google/umt5-xxl/tokenizer.json"
DAMAGES = {
    "truncated": (
        DIT,
        lambda data: data[:-1000],
        f"{DIT} is not a whole safetensors file .*cut off",
    ),
    "cut in its header": (
        DIT,
        lambda data: data[:1000],
        f"{DIT} is not a whole safetensors file .*header",
    ),
    "a web page": (
        "Wan2.1_VAE.safetensors",
        lambda data: b"<html>" + data,
        "Wan2.1_VAE.safetensors is a web page",
    ),
    "a pointer": (
        DIT,
        lambda data: b"version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer",
    ),
    "no network": (DIT, None, "high_noise_model holds no weights"),
    "no VAE": (
        "Wan2.1_VAE.safetensors",
        None,
        "comes without the VAE .*Wan2.1_VAE.pth.*--part vae=FILE",
    ),
    "no text encoder": (
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        None,
        "comes without the text encoder .*models_t5_umt5",
    ),
    "no tokenizer": (TOKENIZER, None, "(comes without a tokenizer.json|has more tokens)"),
    "broken tokenizer": (
        TOKENIZER,
        lambda data: data[:100],
        f"damaged/{TOKENIZER} is not a tokenizer.json",
    ),
    "broken config": (
        "high_noise_model/config.json",
        lambda data: b"{",
        "config.json is not a table in JSON",
    ),
    "config is a list": (
        "high_noise_model/config.json",
        lambda data: b"[1]",
        "config.json is not a table in JSON",
    ),
    "odd heads": (
        "high_noise_model/config.json",
        lambda data: b'{"num_heads": 7}',
        "says num_heads 7, and its shapes are those of tiny",
    ),
    "no heads": (
        "high_noise_model/config.json",
        lambda data: b'{"num_heads": 0}',
        "says num_heads 0",
    ),
    "worded heads": (
        "high_noise_model/config.json",
        lambda data: b'{"num_heads": "x"}',
        "says num_heads 'x'",
    ),
    "a NaN": (DIT, lambda data: data[:-2] + b"\0\x7e", f"{DIT}: .* holds NaN"),  # float16
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_told_by_file(name, minicos, work, toy):
    file, change, says = DAMAGES[name]
    shutil.copytree(toy, work / "damaged", copy_function=os.link)
    path = work / "damaged" / file
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
    assert_one_sentence(minicos(*video("--model", "damaged", "--out", "run")), says)
    assert not (work / "run").exists()


def test_a_foreign_network_is_told_by_file_and_key(minicos, work, toy):
    shutil.copytree(toy, work / "damaged", copy_function=os.link)
    os.replace(
        work / "damaged/models_t5_umt5-xxl-enc-bf16.safetensors",
        work / "damaged/Wan2.1_VAE.safetensors",
    )
    shutil.copy(toy / "models_t5_umt5-xxl-enc-bf16.safetensors", work / "damaged")
    says = "damaged/Wan2.1_VAE.safetensors is not a VAE of Wan: '[a-z0-9_.]+' is missing"
    assert_one_sentence(minicos(*video("--model", "damaged")), says)


def test_unknown_words_are_named(minicos):
    argv = ["generate", "--model", "toy", "--image", "maze.png", "--steps", "1", "--out", "run"]
    code, out, err = minicos(*argv, "--prompt", "solve the riddle now")
    assert code == 0
    assert out.splitlines()[0] == "run/video.mp4"
    assert "minicos: the model does not know the words riddle, now\n" in err
    assert load_video("run/video.mp4").shape == (13, 32, 32, 3)


def test_what_a_lora_changed_is_told_and_recorded(minicos, work):
    draw = torch.Generator().manual_seed(0)
    delta = lora.LowRank(torch.randn(128, 2, generator=draw), torch.randn(2, 128, generator=draw))
    save_lora(
        work / "a.safetensors",
        {"blocks.0.self_attn.q.weight": delta, "blocks.1.ffn.0.bias": lora.Whole(torch.ones(512))},
    )
    argv = ["generate", "--model", "toy", "--image", "maze.png", *PROMPT, "--steps", "1"]
    code, _, err = minicos(*argv, "--lora", "high=a.safetensors:0.5", "--out", "run")
    assert code == 0
    assert (
        "minicos: high: a.safetensors: 2 tensors changed (diffsynth, rank 2, strength 0.5)\n" in err
    )
    record = json.loads((work / "run/run.json").read_text())
    assert record["loras"] == [
        {
            "expert": "high",
            "file": "a.safetensors",
            "dialect": "diffsynth",
            "ranks": [2],
            "strength": 0.5,
            "tensors": 2,
            "notes": [],
        }
    ]
    assert record["settings"]["weights"] != layouts.find("toy").fingerprint()
    code, _, err = minicos(
        *argv, "--lora", "high=a.safetensors", "--out", "run"
    )  # another strength is another model
    assert code == 2
    assert "minicos: run holds a run with weights =" in err


# -- runs ------------------------------------------------------------------------------------------

RUN = [*video("--also", "energy", "--at", "0,5", "--preset", "official"), "--out", "run"]


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """The folder of RUN, when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    save_image(folder / "maze.png", PICTURE)
    names = {"run": str(folder / "run"), "toy": str(toy), "maze.png": str(folder / "maze.png")}
    assert main([names.get(word, word) for word in RUN]) == 0
    return folder / "run"


@posix
def test_a_killed_run_continues_bit_for_bit(minicos, undisturbed, passes, work):
    """kill -9 at an arbitrary moment; UniPC, whose memory has to survive; guidance, so
    two passes a step.
    """
    chance = np.random.default_rng()
    process = start("-m", "minicos", *RUN)
    wait_for(work / f"run/steps/{chance.integers(4):03}.safetensors", process)
    time.sleep(chance.uniform(0, 0.03))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it was not through
    left = 6 - len(list((work / "run/steps").glob("[0-9]*.safetensors")))
    assert left > 0
    assert minicos(*RUN)[0] == 0
    assert len(passes) == 2 * left
    assert same(work / "run", undisturbed)
    assert not list((work / "run").rglob(f"{PART}*"))
    for name in (
        "x0_sheet.png",
        "energy_layers_cond.png",
        "x0/step_00.mp4",
        "energy/raw_cond_step_00.png",
    ):
        assert (work / "run" / name).read_bytes() == (undisturbed / name).read_bytes()


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_keeps_what_is_finished(minicos, undisturbed, work, name):
    plain = [*video("--at", "5", "--preset", "official"), "--out", "run"]  # RUN without energy
    process = start("-m", "minicos", *plain)
    wait_for(work / "run/steps/001.safetensors", process)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert out == ""
    assert "Traceback" not in err
    by = " by SIGTERM" if name == "SIGTERM" else ""
    assert err.endswith(
        f"minicos: stopped{by}. What is finished is kept in run; the same command continues.\n"
    )
    finished = numbers(work / "run")
    assert "steps/001.safetensors:next" in finished
    whole = numbers(undisturbed)
    assert all(torch.equal(value, whole[key]) for key, value in finished.items())
    assert not list((work / "run").rglob(f"{PART}*"))
    assert minicos(*plain)[0] == 0
    finished = numbers(work / "run")
    assert {f"steps/{i:03}.safetensors:next" for i in range(6)} <= finished.keys()
    assert all(torch.equal(value, whole[key]) for key, value in finished.items())


def test_other_settings_are_refused_by_name(minicos, passes, work, toy):
    argv = [*video("--steps", "2", "--at", "0"), "--out", "run"]
    assert minicos(*argv)[0] == 0
    before = numbers(work / "run")
    save_image("other.png", PICTURE[::-1])
    shutil.copytree(toy, "other")
    vae = work / "other/Wan2.1_VAE.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1] + b"\x01")
    for change, says in (
        (["--steps", "3"], "steps = 2, and this one has steps = 3"),
        (["--seed", "1"], "seed = 0, and this one has seed = 1"),
        (
            ["--prompt", "turn the l"],
            'prompt = "solve the maze", and this one has prompt = "turn the l"',
        ),
        (["--preset", "official"], "guidance = "),
        (["--solver", "unipc"], 'solver = "euler", and this one has solver = "unipc"'),
        (["--shift", "3"], "shift = 5.0, and this one has shift = 3.0"),
        (["--guidance", "2"], r'guidance = ."high": 1.0, "low": 1.0.,'),
        (["--frames", "9"], "frames = 13, and this one has frames = 9"),
        (["--image", "other.png"], "image = "),
        (["--also", "energy"], "analyses = "),
        (["--model", "other"], "weights = "),
    ):
        assert_one_sentence(
            minicos(*argv, *change), f"run holds a run with {says}.*Choose another --out"
        )
    assert minicos(*argv)[0] == 0  # nothing is spoiled
    assert len(passes) == 2
    assert numbers(work / "run").keys() == before.keys()


def test_what_does_not_matter_is_not_refused(minicos, passes, work):
    """The picture's and the model's names, an option spelled out at its default, which analysis is
    the verb, and --at: steps that were not shown are decoded from what is on disk."""
    argv = ["--image", "maze.png", *PROMPT, "--steps", "2", "--out", "run"]
    assert minicos("steps", "--also", "energy", "--model", "toy", *argv)[0] == 0
    assert len(passes) == 2  # both analyses watch one pass
    os.rename("maze.png", "labyrinth.png")
    os.rename("toy", "renamed")
    argv[1] = "labyrinth.png"
    for at in ("0", "1"):
        assert (
            minicos(
                "energy",
                "--also",
                "steps",
                "--model",
                "renamed",
                "--frames",
                "13",
                "--at",
                at,
                *argv,
            )[0]
            == 0
        )
    assert len(passes) == 2
    assert_one_sentence(minicos("steps", "--model", "renamed", *argv), "analyses = ")


def test_the_record_of_a_run(minicos, work):
    minicos(*video("--steps", "1", "--seed", "3", "--out", "run"))
    record = json.loads((work / "run/run.json").read_text())
    assert {"command", "device", "operations", "torch", "minicos", "date"} < set(record)
    settings = record["settings"]
    assert (settings["model"], settings["dtype"]) == ("tiny", "torch.float32")
    assert (settings["seed"], settings["steps"], settings["prompt"]) == (3, 1, "solve the maze")
    assert record["preset"] == "tiny"
    written = "minicos steps --model toy --prompt 'solve the maze' --image maze.png"
    assert record["command"] == f"{written} --steps 6 --steps 1 --seed 3 --out run"


def test_a_preset_can_be_changed_in_part(minicos, monkeypatch, work):
    """Options replace the preset's values, reach the loop, and are recorded."""
    from minicos import sample as loop
    from minicos import schedule

    assert tuple(schedule.SOLVERS) == cli_options.SOLVERS
    seen, sample = [], loop.sample
    monkeypatch.setattr(
        loop, "sample", lambda wan, *args, **kw: seen.append(wan) or sample(wan, *args, **kw)
    )
    argv = [
        "generate",
        "--image",
        "maze.png",
        *PROMPT,
        "--preset",
        "official",
        "--steps",
        "2",
        "--out",
        "run",
    ]
    changes = [
        "--solver",
        "dpmpp",
        "--shift",
        "3",
        "--guidance",
        "high=2,low=1.5",
        "--boundary",
        "0.7",
    ]
    assert minicos(*argv, *changes)[0] == 0
    (wan,) = seen
    assert wan.schedule() == schedule.make("dpmpp", 2, 3.0)
    assert wan.preset.guidance == {"high": 2.0, "low": 1.5}
    assert [wan.expert_name(t) for t in (700, 699)] == ["high", "low"]
    settings = json.loads((work / "run/run.json").read_text())["settings"]
    names = ("solver", "steps", "shift", "guidance", "boundary", "resize")
    assert [settings[name] for name in names] == [
        "dpmpp",
        2,
        3.0,
        {"high": 2.0, "low": 1.5},
        0.7,
        "bicubic",
    ]
    assert_one_sentence(
        minicos(*argv), "run holds a run with boundary = 0.7, and this one has boundary = 0.9"
    )


def test_steps_and_energy_leave_what_they_promise(minicos, passes, work):
    argv = [*RUN, "--preset", "cos", "--steps", "4", "--at", "3,0"]
    code, out, _ = minicos(*argv)
    assert code == 0
    assert len(passes) == 4 * 2  # one pass over the steps, two branches
    assert out.splitlines()[-4:] == [
        "run/video.mp4",
        "run/x0_sheet.png  (and 5 more)",
        "run/energy/centred_cond_step_00.png  (and 22 more)",
        "run/index.html  (all of it on one page: open it in a browser)",
    ]
    made = {
        str(path.relative_to(work / "run")) for path in (work / "run").rglob("*") if path.is_file()
    }
    both, shown = ("cond", "uncond"), ("00", "03")
    assert made == {
        *(".lock", "checksums.sha256", "run.json", "results.json", "index.html"),
        *("schedule.json", "x0_sheet.png", "x0_cond_sheet.png", "x0_uncond_sheet.png"),
        *("video.mp4", "first_frame.png"),
        *("convergence.png", "convergence.safetensors", "energy.safetensors"),
        *(f"steps/{i:03}.safetensors" for i in range(4)),
        *(
            f"x0{b}/step_{i}.{end}"
            for b in ("", "_cond", "_uncond")
            for i in shown
            for end in ("mp4", "png")
        ),
        *(
            f"energy/{form}_{b}_step_{i}.png"
            for form in (*FORMS, "components")
            for b in both
            for i in shown
        ),
        *(f"energy_{what}_{b}.png" for what in ("layers", "steps", "frames") for b in both),
        *(f"energy_{what}_{b}.json" for what in ("layers", "frames") for b in both),
    }
    energy = load_file(work / "run/energy.safetensors")
    names = [f"{b}.{form}" for b in both for form in FORMS]
    assert {k: v.shape for k, v in energy.items()} == dict.fromkeys(names, (4, 12, 4, 2, 2))
    assert not torch.equal(energy["cond.raw"], energy["uncond.raw"])
    assert load_video("run/x0/step_03.mp4").shape == (13, 32, 32, 3)


# -- the demo --------------------------------------------------------------------------------------


def test_the_demo_says_what_to_open_first_and_does_not_run_twice(minicos, passes, work):
    argv = ["demo", "--model", "toy", "--steps", "2", "--out", "demo"]
    code, out, _ = minicos(*argv)
    assert code == 0
    assert len(passes) == 2
    assert re.search(r"^\d+ s in all\. Look at these, in this order:$", out, re.M)
    _, _, listing = out.partition("order:\n")
    listed = [line.split()[0] for line in listing.splitlines()]
    assert listed[0] == "demo/index.html"
    pictures = {name: (work / name).read_bytes() for name in listed}
    assert all(pictures.values())
    assert load_image("demo/first_frame.png").shape == (3, 64, 64)
    assert load_video("demo/video.mp4").shape == (13, 64, 64, 3)
    shutil.rmtree(work / "demo/x0")
    (work / "demo/x0_sheet.png").unlink()

    again = minicos(*argv)[1]
    assert len(passes) == 2  # pictures alone are made again
    assert re.sub(r"\d+ s in", "", again) == re.sub(r"\d+ s in", "", out)
    assert {name: (work / name).read_bytes() for name in listed} == pictures


@pytest.mark.parametrize("name", ["first frame", "first and last"])
def test_a_video_from_pictures_that_clip_sees(name, minicos, toys21, work):
    save_image("last.png", PICTURE[::-1])
    argv = [
        "generate",
        "--model",
        str(toys21[name]),
        *PROMPT,
        "--image",
        "maze.png",
        "--device",
        "cpu",
        "--steps",
        "1",
    ]
    both = [*argv, "--last", "last.png"]
    code, out, err = minicos(*(both if name == "first and last" else argv))
    assert (code, err) == (0, ""), err
    assert load_video(out.splitlines()[0]).shape == (9, 32, 32, 3)

    code, _, err = minicos(*(argv if name == "first and last" else both), "--out", "other")
    assert code == 2
    assert "a last frame, too" in err if name == "first and last" else "takes no last frame" in err
    if name == "first and last":
        save_image("last.png", PICTURE[:, ::-1])
        code, _, err = minicos(*both)
        assert (code, "last = " in err) == (2, True), (
            err
        )  # the folder holds a run to another last frame


def test_how_pictures_are_decoded_does_not_identify_a_run(minicos, passes, work):
    """And it is checked before any work."""
    argv = [*video("--steps", "2", "--at", "0"), "--out", "run"]
    assert_one_sentence(minicos(*argv, "--tile", "7"), "tiles of 7 pixels: take a multiple of 8")
    assert not (work / "run").exists()
    assert minicos(*argv)[0] == 0
    count = len(passes)
    for more in (("--tile", "32"), ("--decode-dtype", "bfloat16")):
        assert minicos(*argv, *more)[0] == 0
    assert len(passes) == count == 2
    made = {path.name for path in (work / "run/x0").glob("*.png")}
    assert made == {"step_00.png", "step_00_tile32.png", "step_00_bfloat16.png"}


def test_a_puzzle_with_another_number_of_frames(tmp_path, capsys):
    given = ("generate", "--puzzle", "maze", "--steps", "1", "--out", str(tmp_path / "out"))
    assert main([*given, "--frames", "5"]) == 0
    assert (tmp_path / "out" / "answers.png").is_file()
    assert main([*given, "--height", "32"]) == 2
    assert "--height needs a --prompt" in capsys.readouterr().err
