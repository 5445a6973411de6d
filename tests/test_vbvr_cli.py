"""`minicos vbvr` end to end, with the embedded model, on samples made here."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors.torch import save_file

from minicos.cli import main
from minicos.config import VARIANTS
from minicos.dit import DiT
from minicos.media import load_video
from minicos.tiny.lora import save_lora
from minicos.vbvr import cases, puzzles
from minicos.weights.lora import LowRank
from tests.conftest import write_official
from tests.test_vbvr_scores import checkout
from tests.vbvr_samples import TASKS, bench, sample

pytestmark = pytest.mark.usefixtures("bare_pictures")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("vbvr") / "data", 2)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("vbvr") / "kit")


def run(data, out, *more):
    return main(["vbvr", "--data", str(data), "--steps", "1", "--out", str(out), *map(str, more)])


def files(out):
    """Every video of the trees by its name, with the digest of its bytes."""
    return {
        p.relative_to(out).as_posix(): sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.rglob("*.mp4"))
    }


def test_from_samples_to_tables_and_not_twice(data, kit, tmp_path, capsys):
    conditions = ("--condition", "plain", "noise:frame=1", "static", "truth", "--every", "0")
    scorer = ("--evalkit", kit, "--evalkit-python", sys.executable, "--published")
    assert run(data, tmp_path, *conditions, *scorer) == 0
    names = [f"{split}/{task}/{i:05d}.mp4" for split, task in TASKS.items() for i in range(2)]
    trees = (
        "noise_frame=1",
        "noise_frame=1/steps/step_000",
        "plain",
        "plain/steps/step_000",
        "static",
        "truth",
    )
    made = files(tmp_path)
    assert sorted(made) == sorted(f"{tree}/{name}" for tree in trees for name in names)
    assert load_video(tmp_path / "plain" / names[0]).shape == (9, 48, 64, 3)
    results = json.loads((tmp_path / "results.json").read_text())
    numbers = {n["name"]: n for n in results["numbers"]}
    rows = [(r["condition"], r["step"], r["sigma"]) for r in results["tables"]["steps"]]
    assert rows[:2] == [("plain", 0, 1.0), ("plain", "end", 0.0)] and len(rows) == 4
    assert (tmp_path / "steps.csv").exists() and (tmp_path / "steps.png").exists()
    assert numbers["score: plain"]["value"] == 0.25 and numbers["score: plain"]["n"] == 4
    assert numbers["score: truth minus plain"]["value"] == 0
    said = capsys.readouterr().err
    assert "496 of the benchmark's 500" in said and "scores plain: 4 videos" in said
    assert "| plain | 4 of 4 |" in (tmp_path / "table.md").read_text()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.mp4")}
    assert run(data, tmp_path, *conditions, *scorer) == 0
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.mp4")}


def test_shards_make_the_same_files_as_one_process(data, tmp_path, capsys):
    conditions = ("--condition", "plain", "static", "--seeds", "1", "2", "--batch", "2")
    assert run(data, tmp_path / "one", *conditions) == 0
    assert run(data, tmp_path / "two", *conditions, "--shard", "1/2") == 0
    assert "units are not finished" in capsys.readouterr().out
    assert run(data, tmp_path / "two", *conditions, "--shard", "0/2") == 0
    assert "give --evalkit" in capsys.readouterr().out
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert {name.partition("/")[0] for name in files(tmp_path / "one")} == {
        "plain",
        "plain_seed=2",
        "static",
    }


def test_two_ranks_under_torchrun_make_the_same_files_as_one_process(data, tmp_path):
    options = ["vbvr", "--data", str(data), "--steps", "1", "--condition", "plain", "static"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = ["-m", "minicos", *options, "--batch", "1", "--out", str(tmp_path / "two")]
    done = subprocess.run([sys.executable, *torchrun, *given], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert len([*(tmp_path / "two" / "checksums").iterdir()]) == 2  # each made some
    assert main([*options, "--batch", "1", "--out", str(tmp_path / "one")]) == 0
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_damaged_video_is_made_again_alone(data, tmp_path, capsys):
    """A full disk or a power cut leaves files of the right name that are empty or changed."""
    given = (data, tmp_path, "--condition", "plain", "static", "--every", "0", "--batch", "1")
    assert run(*given) == 0
    made = files(tmp_path)
    names = {
        "video": f"plain/In-Domain_50/{TASKS['In-Domain_50']}/00001.mp4",
        "step": f"plain/steps/step_000/Out-of-Domain_50/{TASKS['Out-of-Domain_50']}/00000.mp4",
        "baseline": f"static/In-Domain_50/{TASKS['In-Domain_50']}/00000.mp4",
    }
    (tmp_path / names["video"]).write_bytes(b"")
    (tmp_path / names["baseline"]).unlink()
    whole = (tmp_path / names["step"]).read_bytes()
    (tmp_path / names["step"]).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    others = made.keys() - names.values()
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in others if "static" in name}
    assert run(*given) == 0
    assert files(tmp_path) == made
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in times.items())
    assert "2 videos in" in capsys.readouterr().err


def test_a_broken_sample_fails_alone_and_is_named(kit, tmp_path, capsys):
    data = bench(tmp_path / "data", 2)
    broken = data / "In-Domain_50" / TASKS["In-Domain_50"] / "00001"
    (broken / "first_frame.png").write_bytes(b"\x89PNG")
    assert run(data, tmp_path / "out", "--condition", "static") == 1
    assert (
        f"{broken.relative_to(data).as_posix()}: first_frame.png cannot be decoded"
        in capsys.readouterr().err
    )
    assert len(files(tmp_path / "out")) == 3


def test_a_unit_that_fails_leaves_the_rest_and_a_list(tmp_path, capsys):
    """What cannot be written (here: a folder has its name) is reported, and so is what has no
    true video; the rest is made.
    """
    data, task = bench(tmp_path / "data", 2), TASKS["Out-of-Domain_50"]
    (tmp_path / "out" / "static" / "Out-of-Domain_50" / task / "00001.mp4").mkdir(parents=True)
    (data / "Out-of-Domain_50" / task / "00000" / "ground_truth.mp4").unlink()
    assert run(data, tmp_path / "out", "--condition", "truth", "static") == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if "failed:" in line]
    assert f"truth, seed 1: Out-of-Domain_50/{task}/00000: " in failed[0]
    assert f"static, seed 1: Out-of-Domain_50/{task}/00001: cannot write" in failed[1]
    assert sum(path.is_file() for path in (tmp_path / "out").rglob("*.mp4")) == 6


def test_samples_that_cannot_be_used_do_not_stop_the_rest(tmp_path, capsys):
    """Three without a true video in a row, and a picture that no model can make."""
    data = bench(tmp_path / "data", 3)
    for truth in (data / "In-Domain_50").rglob("ground_truth.mp4"):
        truth.unlink()
    sample(data / "In-Domain_50" / "thin" / "00000", size=(8, 800))
    assert run(data, tmp_path / "out", "--condition", "truth", "static", "plain") == 1
    error = capsys.readouterr().err
    assert "In-Domain_50/thin/00000: a picture of 800x8 pixels" in error
    assert error.count("failed: truth") == error.count("has no ground_truth.mp4") == 3
    made = Counter(name.partition("/")[0] for name in files(tmp_path / "out"))
    assert made == {"truth": 3, "static": 6, "plain": 6}


def test_the_videos_of_another_system(data, kit, tmp_path, capsys):
    assert run(data, tmp_path / "made", "--condition", "static") == 0
    (tmp_path / "made" / "static" / "In-Domain_50" / TASKS["In-Domain_50"] / "00000.mp4").unlink()
    scorer = ("--evalkit", kit, "--evalkit-python", sys.executable)
    code = run(
        data,
        tmp_path / "out",
        "--condition",
        "static",
        "--videos",
        f"sora2={tmp_path / 'made' / 'static'}",
        *scorer,
    )
    assert code == 1 and "no score: sora2: In-Domain_50" in capsys.readouterr().err
    assert "| sora2 | 3 of 4 |" in (tmp_path / "out" / "table.md").read_text()


def test_puzzles_have_their_own_scorers(tmp_path, capsys):
    code = main(
        ["vbvr", "--puzzles", "4", "--condition", "static", "truth", "--out", str(tmp_path)]
    )
    assert code == 0, capsys.readouterr().err
    scores = {
        n["name"]: n["value"]
        for n in json.loads((tmp_path / "results.json").read_text())["numbers"]
    }
    solved = json.loads((tmp_path / "solved" / "results.json").read_text())["numbers"]
    assert scores["score: truth"] > 0.98 and scores["score: static"] < 0.3
    assert [n["value"] for n in solved[:2]] == [0, 1]
    capsys.readouterr()
    main(
        [
            "vbvr",
            "--puzzles",
            "4",
            "--condition",
            "static",
            "truth",
            "--json",
            "--out",
            str(tmp_path),
        ]
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["solved"]["numbers"] == solved


def test_puzzles_that_the_command_exported_are_scored_too(tmp_path):
    folder, out = str(tmp_path / "puzzles"), str(tmp_path / "out")
    own = ("--kind", "mark", "--n", "2", "--scale", "4", "--out", folder)
    assert main(["puzzles", *own]) == 0
    (lost, *_) = (tmp_path / "puzzles").rglob("metadata.json")
    about = lost.read_text()
    lost.unlink()  # as by a kill
    assert main(["puzzles", *own]) == 0 and lost.read_text() == about
    assert main(["vbvr", "--data", folder, "--condition", "static", "truth", "--out", out]) == 0
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())["numbers"]
    scores = {number["name"]: number["value"] for number in numbers}
    assert scores["score: truth"] > 0.95 and scores["score: static"] < 0.3  # .970 and .199


def test_a_dry_run_makes_nothing(data, tmp_path, capsys):
    conditions = ("plain", "ensemble", "static")
    assert (
        run(data, tmp_path / "out", "--condition", *conditions, "--dry-run", "--tflops", "1e-6")
        == 0
    )
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert [lines[name][:2] for name in conditions] == [["1", "4"], ["1", "4"], ["4", "4"]]
    assert (
        2 < float(lines["ensemble"][3]) / float(lines["plain"][3]) < 5
    )  # one step, shared by three seeds in two passes
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_puzzles_writes_none_and_knows_them(tmp_path, capsys):
    options = ("--puzzles", "3", "--dry-run", "--tflops", "1", "--out", str(tmp_path / "out"))
    assert main(["vbvr", *options]) == 0
    assert "plain" in capsys.readouterr().out and not (tmp_path / "out").exists()
    puzzles.write(tmp_path, 3)
    written = [replace(one, truth=None) for one in cases.read(tmp_path).samples]
    assert puzzles.planned(tmp_path, 3).samples == tuple(written)


def test_the_embedded_model_has_weights_for_four_steps(tmp_path, capsys):
    options = ("--puzzles", "1", "--condition", "appendix-c", "--out", str(tmp_path / "out"))
    assert main(["vbvr", *options, "--dry-run", "--tflops", "1e-6"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert 4.5 < float(lines["plain"][3]) / float(lines["4step"][3]) < 5.5  # 20 steps, and 4
    assert main(["vbvr", *options]) == 0
    assert "| 4step |" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--data"),
        (("--data", "{data}", "--puzzles", "3"), "--data"),
        (("--puzzles", "3", "--published"), "--published"),
        (("--data", "{data}", "--condition", "magic"), "magic"),
        (("--data", "{data}", "--shard", "2/2"), "shard"),
        (("--data", "{data}", "--seeds", "1", "1"), "--seeds"),
        (("--data", "{data}", "--condition", "vbvr-lora", "--steps", "1"), "--weights vbvr-lora"),
        (
            ("--data", "{data}", "--condition", "4step", "--weights", "other", "high=x"),
            "--weights other",
        ),
        (("--data", "{data}", "--condition", "4step", "--weights", "4step", "x"), "--weights"),
        (("--data", "{data}", "--condition", "static", "--videos", "../x=/"), "--videos"),
        (("--data", "{data}", "--evalkit", "nowhere"), "run_evaluation.py"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_in_one_sentence(data, tmp_path, capsys, options, words):
    given = [part.format(data=data) for part in options]
    assert main(["vbvr", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") <= 2


def test_the_steps_of_puzzles_and_every_number_as_lines(tmp_path, capsys):
    given = ("--condition", "plain", "steps=1", "static", "--steps", "2", "--every", "all")
    journal = tmp_path / "n.jsonl"
    out = ("--out", str(tmp_path / "out"), "--jsonl", str(journal))
    assert main(["vbvr", "--puzzles", "2", *given, *out]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "solved" / "results.json").read_text())
    steps = [(row["condition"], row["step"]) for row in results["tables"]["steps"]]
    assert steps == [
        ("plain", 0),
        ("plain", 1),
        ("plain", "end"),
        ("steps=1", 0),
        ("steps=1", "end"),
    ]
    assert [curve["x"][-1] for curve in results["curves"]] == [0, 0]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    scored = [line for line in lines if line.get("sample") and line["condition"] == "plain"]
    assert {line.get("step") for line in scored} == {0, 1, None} and len(scored) == 6
    assert all("score" in line and "solved" in line for line in scored)
    assert sum("made" in line for line in lines) == 6


def test_steps_that_no_run_has(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", "--every", "3") == 2
    assert "--every 3" in capsys.readouterr().err


def test_the_conditions_are_listed(capsys):
    assert main(["vbvr", "--list-conditions"]) == 0
    assert "appendix-a" in capsys.readouterr().out


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    """A small folder that opens as like Wan2.2-I2V-A14B, and LoRA files for its networks by name
    and expert.
    """
    folder = tmp_path_factory.mktemp("like")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        high, low = (DiT(replace(VARIANTS["tiny"], num_layers=1)) for _ in range(2))
        model = write_official(folder / "model", high, expert="high_noise_model")
        shutil.copytree(model / "high_noise_model", model / "low_noise_model")
        (file,) = (model / "low_noise_model").glob("*.safetensors")
        save_file(low.half().state_dict(), file)
        loras = {}
        for name in ("4step", "vbvr-lora"):
            for expert in ("high", "low"):
                delta = LowRank(torch.randn(128, 2), torch.randn(2, 128))
                loras[name, expert] = folder / f"{name}-{expert}.safetensors"
                save_lora(loras[name, expert], {"blocks.0.self_attn.q.weight": delta})
    return model, loras


def test_conditions_on_weights_of_their_own(two_experts, tmp_path, capsys):
    """Each condition runs in its own way of sampling with its own files merged, and one without
    its files is refused before anything is made.
    """
    model, loras = two_experts
    bench(tmp_path / "data", 1)
    given = ["vbvr", "--data", tmp_path / "data", "--model", model, "--area", "64x48", "--frames"]
    given += ["5", "--out", tmp_path / "out", "--condition", "4step", "vbvr-lora", "--weights"]
    each = {
        name: [name, *(f"{expert}={loras[name, expert]}" for expert in ("high", "low"))]
        for name in ("4step", "vbvr-lora")
    }
    command = [*given, *each["4step"], "--weights", *each["vbvr-lora"]]
    code, said = main([*map(str, command)]), capsys.readouterr().err
    assert code == 0, said
    assert all(f"{expert}: {path.name}: 1 tensor" in said for (_, expert), path in loras.items())
    names = [f"{split}/{task}/00000.mp4" for split, task in TASKS.items()]
    made = files(tmp_path / "out")
    assert sorted(made) == sorted(f"{tree}/{name}" for tree in each for name in names)
    assert all(made[f"4step/{name}"] != made[f"vbvr-lora/{name}"] for name in names)
    for name, variant, steps in (
        ("4step", "like Wan2.2-I2V-A14B-4step", 4),
        ("vbvr-lora", "like VBVR-Wan2.2", 50),
    ):
        (record,) = (tmp_path / "out" / "made_with" / name).rglob("run.json")
        about = json.loads(record.read_text())["settings"]
        assert (about["model"], about["steps"]) == (variant, steps)

    one = [*map(str, given), *map(str, each["4step"]), "--out", str(tmp_path / "new")]
    assert main(one) == 2
    assert "--weights vbvr-lora high=FILE low=FILE" in capsys.readouterr().err
    assert not files(tmp_path / "new")
