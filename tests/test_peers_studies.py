"""Every study on every peer, and every command on a diffusers folder of one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minicos.activations import Activations
from minicos.analysis.attention import PARTS, Attention
from minicos.analysis.energy import Energy
from minicos.analysis.ensemble import share
from minicos.analysis.noise.edit import Noise
from minicos.analysis.noise.measure import measure_all
from minicos.analysis.noise.study import effects
from minicos.analysis.noise.study import study as noise_study
from minicos.analysis.options import NoiseOptions, SwapOptions
from minicos.analysis.steps import Steps
from minicos.analysis.swap.states import Swap, flip, lockstep
from minicos.analysis.swap.study import study as swap_study
from minicos.analysis.sweep import settings
from minicos.analysis.tools import cases, figures
from minicos.analysis.tools.cases import chosen
from minicos.analysis.tools.controls import untrained
from minicos.analysis.tools.interventions import Interventions
from minicos.analysis.tools.observer import Observer
from minicos.analysis.tools.record import record, recorded
from minicos.cli import main
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.media import save_image
from minicos.peers import folder as peer_folder
from minicos.peers import opening, presets
from minicos.runs import Run
from tests import peers

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("bare_pictures")
NETWORK = "transformer/config.json"
each = pytest.mark.parametrize("name", peers.NAMES)


@pytest.fixture
def image(tmp_path):
    def make(model):
        height, width = model.preset.size
        levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        save_image(tmp_path / "first.png", levels)
        return tmp_path / "first.png"

    return make


def recorders(model, condition):
    parts = [part for part in PARTS if part in model.sublayers]
    words = model.words(condition, "cond")
    return [
        Steps(model, (0, 3)),
        Energy((0,), behind=model.frames_behind_token),
        Attention(
            (0, model.depth - 1), (1,), words=words, behind=model.frames_behind_token, parts=parts
        ),
    ]


@each
def test_recorders_and_resuming_after_a_kill(name, tmp_path):
    model, condition = peers.conditioned(name)
    start, run = model.noise(condition, 0), Run.open(tmp_path / "whole", {})
    edited = Interventions(edits=(Noise("replace", (0, 2)),))
    final = record(model, condition, run, recorders(model, condition), start, edited)
    for one in recorders(model, condition):
        saved = recorded(run, one.name, peers.STEPS)
        assert len(saved) == peers.STEPS
        assert all(run.path(file).exists() for file in one.draw(saved, run))
    between = recorded(run, "attention", peers.STEPS)[1]["between.0"]
    text = recorded(run, "attention", peers.STEPS)[1].get("text.0")
    joint = "joint" in model.streams
    whole = between.sum(1) + (text.sum() if joint else 0)
    if joint:  # rows sum to what the text leaves, on average over frames
        assert float(whole.mean()) == pytest.approx(1, abs=1e-5)
    else:
        assert torch.allclose(whole, torch.ones_like(whole), atol=1e-5)
    again = Run.open(tmp_path / "killed", {})
    for i in (0, 1):  # as a killed run leaves it
        again.save_tensors(
            f"steps/{i:03d}.safetensors", load_file(run.path(f"steps/{i:03d}.safetensors"))
        )
    resumed = record(model, condition, again, recorders(model, condition), start, edited)
    assert torch.equal(resumed, final)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("cogvideox15", ["frame 0", "1-8"]),  # a frame of tokens holds two latent frames
        ("hunyuan_concat", ["padding", "frame 0", "1-4"]),
        ("ltx2", ["frame 0", "1-2", "3-4"]),
    ],
)
def test_pictures_and_numbers_name_the_frames_of_the_video(name, rows, tmp_path, monkeypatch):
    model, condition = peers.conditioned(name)
    run, drawn = Run.open(tmp_path, {}), {}
    monkeypatch.setattr(figures, "maps", lambda path, *_, **given: drawn.update({path: given}))
    found = recorders(model, condition)[1:]
    record(model, condition, run, found, model.noise(condition, 0))
    for one, sheet in zip(
        found, ("energy/raw_cond_step_00.png", "attention/received_step_01.png"), strict=True
    ):
        saved = recorded(run, one.name, peers.STEPS)
        one.draw(saved, run)
        assert drawn[run.path(sheet)]["rows"] == rows
        assert one.numbers(saved)[-1 if one.name == "energy" else 0].note.endswith(
            f"; video: {rows[0]}"
        )


def test_puzzles_are_judged_in_their_own_size():
    batch = cases.held_out("maze", 1)
    wrong = peers.peer("cogvideox15").with_preset("diffusers")
    right = "with_preset(frames=13, size=(64, 64), area=None)"
    with pytest.raises(MinicosError, match=re.escape(right)):
        cases.condition(wrong, batch)
    model = wrong.with_preset(frames=13, size=(64, 64), area=None, steps=4)
    (*_, last) = model.sample(cases.condition(model, batch), seed=0)
    (score,) = cases.scores(model, last.next, batch)
    assert not score.solved  # a random network


@each
def test_what_travels_beside_starts_alike_in_an_edited_run(name, tmp_path):
    model, condition = peers.conditioned(name)
    if not model.beside(model.noise(condition, 0), condition):
        pytest.skip("there is no latent besides the video")
    kept = []
    for edits in ((), (Noise("replace", (0,)),)):
        seen = []
        hooks = Hooks().on("embed.audio", lambda x, site, seen=seen: seen.append(x), step=0)
        run = Run.open(tmp_path / str(len(kept)), {})
        what = Interventions(hooks=hooks, edits=edits)
        record(model, condition, run, [], model.noise(condition, 0), what)
        kept.append(seen[0])
    assert torch.equal(*kept)


@each
def test_noise(name, image, tmp_path):
    model = peers.peer(name)
    asked = NoiseOptions(prompt="go", image=image(model), at=(1,), frames=(1,), others=1)
    found = noise_study(model, Run.open(tmp_path / "run", {}), asked)
    assert {row["edit"] for row in found.tables["edits"]} >= {"null", "step 1", "frame 1"}
    null = next(row for row in found.tables["edits"] if row["edit"] == "null")
    assert null["D"].value == 0


@each
def test_noise_in_a_given_frame_is_told_from_noise_in_others(name, image, tmp_path):
    model = peers.peer(name)
    asked = NoiseOptions(prompt="go", image=image(model), at=(1,), others=1)
    measured = measure_all(model, chosen(asked), Run.open(tmp_path / "run", {}), asked)
    _, condition = peers.conditioned(name, model)
    given = model.pictured(condition)
    later = [f for f in measured.free if f not in given]
    step, title = measured.final("step 1"), "D of the video: step noise minus noise in a frame"
    found = effects(measured)
    if len(later) == len(measured.free):  # the given frame is imposed, and none is noised
        assert f"{title} that was not given" not in found
    else:
        others = np.mean([measured.final(f"frame {f}") for f in later], axis=0)
        assert np.array_equal(found[f"{title} that was not given"][0], step - others)
    assert all(f >= model.lead for f in measured.seen)  # what is not shown is not in D
    frames = np.arange(len([i for behind in measured.behind for i in behind]))
    measured.runs["clean"]["right"] = np.ones((1, len(frames)))
    hidden = np.isin(frames, model.frames_behind(later[0]))
    assert np.array_equal(measured.shown(f"frame {later[0]}", "untouched"), ~hidden)


@each
def test_swap(name, image, tmp_path):
    model = peers.peer(name)
    what = (model.streams or ("stream",))[-1]  # joint, or the sound
    asked = SwapOptions(
        prompt="go",
        other="bad",
        image=image(model),
        layers="1",
        during="1",
        what=what,
        one_way=True,
    )
    found = swap_study(model, Run.open(tmp_path / "run", {}), asked)
    assert found.tables["layers"]
    _, condition = peers.conditioned(name, model)
    noise, give = model.noise(condition, 0), model.condition("bad", peers.picture(name))
    *_, plain = model.sample(condition, noise=noise)
    for other in ("stream", "update", *model.sublayers, *model.streams):
        *_, steps = lockstep(model, give, condition, noise, [Swap((1,), range(1, 2), other)])
        assert not torch.equal(steps[0].next, plain.next), other


@each
def test_the_last_stream_is_the_donor_by_construction_where_the_model_says_so(name):
    model, take = peers.conditioned(name)
    give = model.condition("bad", peers.picture(name))
    noise, ends = model.noise(take, 0), {}
    for key, condition in (("a", give), ("b", take)):
        *_, step = model.sample(condition, noise=noise)
        ends[key] = step.next
    whole = [Swap((model.depth - 1,), range(peers.STEPS), branch=None)]
    *_, steps = lockstep(model, give, take, noise, whole)
    flipped, _ = flip(steps[0].next, ends["a"], ends["b"])
    assert (abs(float(flipped) - 1) < 1e-3) == model.stream_decides


@each
def test_ensembles(name, image, tmp_path):
    model, condition = peers.conditioned(name)
    rows = condition.take([0, 0])
    start = model.noise(rows, [0, 1])
    for mode in share.MODES:
        layers = () if mode in share.BETWEEN_STEPS else (1,)
        e = share.Ensemble(layers, mode, (0, 1), seeds=2, alpha=0.5 if mode == "mix" else 1.0)
        final = share.run(model, rows, start, e)
        assert final.shape == condition.shape and final.isfinite().all()
    alone = share.Ensemble((1,), "override", (0,), seeds=1)
    *_, plain = model.sample(condition, noise=start[:1])
    assert torch.equal(share.run(model, condition, start[:1], alone), plain.next)


# -- a folder, with a text encoder, by commands ----------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny CogVideoX1.5 with a T5 of its own, saved by diffusers."""
    return peers.saved(tmp_path_factory.mktemp("peer") / "cog")


@pytest.fixture
def small(monkeypatch):
    """Its preset for videos that are made in a moment."""
    name = "CogVideoX1.5-5B-I2V"
    preset = presets.get_preset(name).changed(steps=4, frames=9, size=(64, 48), area=None)
    monkeypatch.setitem(presets.PRESETS, name, {"diffusers": preset})


def test_inspect_names_the_family_without_torch(folder, capsys):
    main(["inspect", str(folder), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["variant"] == "CogVideoX1.5-5B-I2V" and told["layout"] == "diffusers"
    assert told["architecture"] == {"dim": 32, "num_layers": 3, "num_heads": 2}
    assert set(told["parts"]) == {"transformer", "text_encoder", "vae"}
    loaded = "assert not {'torch', 'diffusers'} & set(sys.modules)"
    code = f"import sys; from minicos.cli import main; main(['inspect', {str(folder)!r}]); {loaded}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_repository_of_ltx2_runs_from_words_and_a_first_frame(tmp_path, monkeypatch, capsys):
    """Side by side with diffusers, and by a study."""
    model = str(peers.saved_ltx2(tmp_path / "ltx2"))
    small = presets.get_preset("LTX-2").changed(steps=2, stg_blocks=(1,), frames=9, size=(64, 64))
    monkeypatch.setitem(presets.PRESETS, "LTX-2", {"diffusers": small.changed(area=None)})
    main(["inspect", model, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["variant"] == "LTX-2"
    assert set(told["parts"]) >= {"text_encoder", "connectors", "audio_vae", "vocoder"}
    assert main(["verify", "--model", model, "--grid", "2,2,2"]) in (0, None)
    assert "agrees" in capsys.readouterr().out
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_image(tmp_path / "first.png", levels)
    given = ["--prompt", "solve the maze", "--image", str(tmp_path / "first.png")]
    main(["steps", "--model", model, *given, "--at", "0,1", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "index.html").is_file()
    assert '"image_crf": 33' in (tmp_path / "out" / "run.json").read_text()


@pytest.mark.parametrize(
    ("kind", "network", "message"),
    [
        ("CogVideoXPipeline", {}, "no adapter for CogVideoXPipeline of diffusers: there are Cog"),
        ("LTX2Pipeline", {"use_prompt_adaln_single": False}, "as LTX-2.5 has"),
    ],
)
def test_a_folder_of_another_pipeline_is_refused_by_name(
    kind, network, message, folder, tmp_path, capsys
):
    place = shutil.copytree(folder, tmp_path / "other")
    for file, changes in (("model_index.json", {"_class_name": kind}), (NETWORK, network)):
        told = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps(told | changes))
    assert main(["points", "--model", str(place)]) == 2
    assert message in capsys.readouterr().err


def test_points_without_reading_a_weight(folder, capsys):
    main(["points", "--model", str(folder), "--all", "--json"])
    found = {p["name"]: p["shape"] for p in json.loads(capsys.readouterr().out)}
    assert found == dict(peers.peer("cogvideox15").points)


COMMANDS = {
    "steps": ["--also", "energy", "attention", "--at", "0,3"],
    "noise": ["--at", "1", "--in", "3", "--others", "1"],  # the last one, of four with padding
    "swap": ["--other", "go to the blue goal", "--layers", "2", "--during", "1"],
    "ensemble": ["--seeds", "2", "--modes", "lockstep", "--windows", "20-29"],
    "run": [
        *("--x0", "--noise", "step:1", "--swap", "1", "--other", "go to the goal"),
        *("--knockout", "frame:0", "to", "frame:1", "layers:0"),
        *("--knockout", "text", "to", "frame:0"),
    ],
    "generate": [],
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_commands(verb, folder, small, tmp_path, capsys):
    levels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    save_image(tmp_path / "first.png", levels)
    out = tmp_path / "out"
    options = [verb, "--model", str(folder), "--prompt", "solve the maze"]
    options += ["--image", str(tmp_path / "first.png"), "--out", str(out), *COMMANDS[verb]]
    main(options)
    settings = json.loads((out / "run.json").read_text())
    assert "CogVideoX1.5-5B-I2V" in json.dumps(settings)
    capsys.readouterr()
    main(options)  # again: everything exists
    assert str(out) in capsys.readouterr().out


def test_verify(folder, small, capsys):
    assert main(["verify", "--model", str(folder), "--grid", "2,3,4"]) in (0, None)
    assert "agrees" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernels"], "--kernels has no place"),
        (["--lora", "high=a.safetensors"], "--lora has no place"),
        (["--preview"], "--preview has no place"),
        (["--tile", "20"], "tiles of 20 pixels: take a multiple of 8"),
        (["--solver", "unipc"], "stepped by euler"),
        (["--steps", "30"], "divisor of 1000"),
        (["--residency", "swap"], "for cards"),
        (["--preset", "official"], "no preset 'official'"),
    ],
)
def test_options_without_meaning_are_refused(options, message, folder, small, tmp_path, capsys):
    save_image(tmp_path / "first.png", np.zeros((64, 48, 3), np.uint8))
    given = ["steps", "--model", str(folder), "--prompt", "go", "--image"]
    code = main([*given, str(tmp_path / "first.png"), "--out", str(tmp_path / "out"), *options])
    assert code == 2 and message in capsys.readouterr().err


def test_without_diffusers_one_sentence_says_so(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["points", "--model", str(folder)]) == 2
    assert "pip install 'minicos[peers]'" in capsys.readouterr().err


def test_commands_of_wan_refuse_it(folder, tmp_path, capsys):
    assert main(["selfcheck", "--model", str(folder)]) == 2
    assert "this command is for Wan" in capsys.readouterr().err


def test_what_only_wan_has_is_refused_by_name(folder, small, tmp_path, capsys):
    save_image(tmp_path / "first.png", np.zeros((64, 48, 3), np.uint8))
    given = [
        "run",
        "--model",
        str(folder),
        "--prompt",
        "go",
        "--image",
        str(tmp_path / "first.png"),
    ]
    cut = ["--knockout", "word:go", "to", "all", "--out", str(tmp_path / "out")]
    assert main([*given, *cut]) == 2
    assert "--knockout word is for Wan, and CogVideoX" in capsys.readouterr().err
    model, _ = peers.conditioned("cogvideox15")
    with pytest.raises(MinicosError, match="an ideal observer is for Wan"):
        Observer.of(model)
    with pytest.raises(MinicosError, match="the untrained control is for Wan"):
        untrained(model)


def test_a_command_that_is_killed_continues_bit_for_bit(folder, tmp_path, monkeypatch):
    """A real process, ended by kill -9 once it has kept a step, against a run left alone."""
    save_image(tmp_path / "first.png", np.full((64, 48, 3), 128, np.uint8))
    options = ["steps", "--model", str(folder), "--prompt", "solve the maze", "--steps", "8"]
    options += ["--image", "first.png", "--frames", "9", "--area", "48x64", "--at", "0,7"]
    options += ["--also", "energy", "--out"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "minicos", *options, "killed"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=one_thread, stderr=subprocess.PIPE, text=True
    )
    kept = tmp_path / "killed" / "steps"
    while process.poll() is None and not list(kept.glob("[0-9]*.safetensors")):
        time.sleep(0.002)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error  # before its end
    before = {path: path.stat().st_mtime_ns for path in kept.glob("[0-9]*.safetensors")}
    assert before
    monkeypatch.chdir(tmp_path)
    for name in ("killed", "whole"):
        assert main([*options, name]) in (0, None)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    for file in ("steps/007.safetensors", "energy.safetensors", "video.mp4"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.fixture
def samples(tmp_path):
    """A folder of cases of two sizes."""
    for name, size in (("tall", (64, 48)), ("wide", (48, 64))):
        place = tmp_path / "cases" / name
        place.mkdir(parents=True)
        save_image(place / "first_frame.png", np.full((*size, 3), 100, np.uint8))
        (place / "prompt.txt").write_text("solve the maze")
    return tmp_path / "cases"


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_sample_of_a_folder(verb, folder, small, samples, tmp_path):
    """A run folder and a row each, from one open model."""
    options = [verb, "--model", str(folder), "--cases", str(samples), *COMMANDS[verb]]
    assert main([*options, "--height", "64", "--width", "48", "--out", str(tmp_path / "out")]) == 0
    for name in ("tall", "wide"):
        assert (tmp_path / "out" / name / "index.html").is_file()
    assert (tmp_path / "out" / "index.html").read_text().count("solve the maze") >= 2


def test_capture(folder, small, samples, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["capture", "--model", str(folder), "--cases", str(samples), "--area", "48x64"]
    options += ["--points", "blocks.1", "--out", str(out)]
    main([*options, "--dry-run"])
    told = float(re.search(r"2 samples, ([0-9.]+) MB", capsys.readouterr().err)[1])
    assert main([*options, "--branches", "cond", "uncond"]) == 0
    a = Activations(out)
    x, _ = a.rows("blocks.1", step=0, branch="uncond")
    assert x.shape == (2 * 2 * 4 * 3, 32)  # samples, frames of tokens, rows, columns
    assert told == pytest.approx(2 * x.numel() / 1e6, abs=0.05)
    assert main([*options[:-1], str(tmp_path / "other"), "--branches", "stg"]) == 2
    assert "--branches stg" in capsys.readouterr().err


def test_a_latent_frame_that_there_is_not(folder, small, tmp_path, capsys):
    save_image(tmp_path / "first.png", np.zeros((64, 48, 3), np.uint8))
    options = ["noise", "--model", str(folder), "--prompt", "go", "--at", "1", "--in", "4"]
    options += ["--image", str(tmp_path / "first.png"), "--out", str(tmp_path / "out")]
    assert main(options) == 2
    assert "take some of 0, 1, 2, 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_decoding(folder, small):
    """More in all for a longer video, and less of it in tiles."""
    found = peer_folder.find(folder)
    preset = found.preset()

    def work(frames, tile=None):
        return opening._decoding(found, preset.changed(frames=frames), tile)

    assert work(17) > work(9) > 3 * 9 * 64 * 48
    assert work(9, 32) < work(9)


@pytest.mark.parametrize("residency", ["auto", "resident"])
def test_where_the_text_encoder_does_not_fit_all_networks_are_offloaded(
    residency, folder, monkeypatch
):
    """diffusers has no plan between "resident" and "swap"."""
    card, made = torch.device("cuda"), []
    found = peer_folder.find(folder)

    def free(size: int) -> str:
        monkeypatch.setattr(opening, "available", lambda d: size if d == card else 10**12)
        made.append(opening._plan(found, found.preset(), card, torch.float32, residency, None))
        return made[-1].residency

    assert free(10**12) == "resident"
    whole = made[-1]
    text = next(part.weights for part in whole.parts if part.name == "text")
    assert free(int((whole.peak - text / 2) / 0.9)) == "swap"
    assert {part.placement for part in made[-1].parts} == {"offload"}


@pytest.mark.parametrize("residency", ["resident", "swap", "stream"])
def test_offloading_is_what_diffusers_offers(residency):
    """Stand-ins: one call of the pipeline's own for each way, on the plan's device."""
    asked, card = [], torch.device("cuda")
    pipe = SimpleNamespace(
        to=lambda device: asked.append(("resident", device)),
        enable_model_cpu_offload=lambda device: asked.append(("swap", device)),
        enable_sequential_cpu_offload=lambda device: asked.append(("stream", device)),
    )
    opening._place(pipe, SimpleNamespace(residency=residency, device=card))
    assert asked == [(residency, card)]


def test_offloading_without_accelerate_names_the_remedy():
    def missing(device):
        raise ImportError("accelerate")

    pipe = SimpleNamespace(enable_model_cpu_offload=missing, enable_sequential_cpu_offload=missing)
    for residency in ("swap", "stream"):
        plan = SimpleNamespace(residency=residency, device=torch.device("cuda"))
        with pytest.raises(MinicosError, match=f"{residency}.*pip install accelerate"):
            opening._place(pipe, plan)


def test_boundaries_of_one_network_are_refused():
    asked = NoiseOptions(prompt="go", boundaries=(0.8, 0.9))
    with pytest.raises(MinicosError, match=r"CogVideoX.*has one here"):
        settings(peers.peer("cogvideox15"), asked)
