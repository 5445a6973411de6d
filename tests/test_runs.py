"""Run folders: whole files or none, one set of settings, and a progress bar that does not get in
the way.
"""

import gc
import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
from hashlib import sha256
from itertools import islice

import pytest
import torch
from safetensors.torch import save

from minicos import runs
from minicos.errors import MinicosError
from minicos.puzzles import export, make
from minicos.runs import PART, Run, progress, read_json, replace_file, write_json


def test_replace_file_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "name.txt"
    replace_file(path, lambda temporary: temporary.write_text("first"))

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        replace_file(path, fail)
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["name.txt"]


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path):
    """Also by verbs that have no run folder; what a living process writes stays."""
    host, dead = runs._host(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid, name in ((dead.pid, "a[1].txt"), (os.getppid(), "a[1].txt"), (dead.pid, "b.txt")):
        (tmp_path / f"{PART}{host}-{pid}-0123abcd-{name}").write_text("half")
    left = tmp_path / f"{PART}{host}-{dead.pid}-4567abcd-puzzle"
    left.mkdir()
    (left / "first_frame.png").write_bytes(b"")
    replace_file(tmp_path / "a[1].txt", lambda temporary: temporary.write_text("whole"))
    export(make("maze", 0, size=3), 0, tmp_path / "puzzle")
    assert sorted(p.name.removeprefix(f"{PART}{host}-") for p in tmp_path.iterdir()) == sorted(
        [f"{os.getppid()}-0123abcd-a[1].txt", f"{dead.pid}-0123abcd-b.txt", "a[1].txt", "puzzle"]
    )


def test_replace_file_says_what_the_disk_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MinicosError, match=r"cannot write .*file.*name"):
        replace_file(tmp_path / "file" / "name", lambda temporary: temporary.write_text(""))
    with pytest.raises(MinicosError, match="No space"):
        replace_file(tmp_path / "name", full_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def full_disk(temporary):
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(os.name != "posix", reason="modes are a matter of POSIX")
def test_files_get_the_mode_of_any_other_file(tmp_path):
    replace_file(tmp_path / "new", lambda temporary: temporary.write_text(""))
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_round_trip_and_its_error(tmp_path):
    write_json(tmp_path / "a.json", {"prompt": "迷宫", "path": tmp_path})
    assert read_json(tmp_path / "a.json") == {"prompt": "迷宫", "path": str(tmp_path)}
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "missing.json"):
        with pytest.raises(MinicosError, match=rf"{name}.*cannot be read as JSON.*Delete it"):
            read_json(tmp_path / name)


def test_a_run_is_continued_with_equal_settings_only(tmp_path):
    settings = {"command": "steps", "sizes": (64, 64), "image": tmp_path / "a.png"}
    run = Run.open(tmp_path / "run", settings, {"device": "cpu"})
    record = json.loads(run.path("run.json").read_text())
    assert record["settings"] == {
        "command": "steps",
        "sizes": [64, 64],
        "image": str(tmp_path / "a.png"),
    }
    assert {"minicos", "torch", "python", "date"} < set(record)
    assert record["device"] == "cpu"

    assert Run.open(tmp_path / "run", settings, {"device": "cuda"}) == run
    assert json.loads(run.path("run.json").read_text()) == record
    for other in (
        {**settings, "sizes": [64, 32]},
        {"command": "steps", "image": settings["image"]},
    ):
        with pytest.raises(MinicosError, match=r"sizes = \[64, 64\].*another --out"):
            Run.open(tmp_path / "run", other)


def test_a_run_refuses_what_is_not_its_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MinicosError, match="a file, not a folder"):
        Run.open(tmp_path / "file", {})
    with pytest.raises(MinicosError, match="cannot write"):
        Run.open(tmp_path / "file" / "run", {})
    for text in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(MinicosError, match=r"run\.json"):
            Run.open(tmp_path, {})


def test_tensors_of_a_run(tmp_path):
    run = Run.open(tmp_path, {})
    x = torch.arange(6.0).view(2, 3)
    tensors = {
        "x": x,
        "transposed": x.t(),
        "row": x[0],
        "half": x.bfloat16(),
        "none": torch.zeros(0),
        "n": torch.tensor(3),
    }
    assert not run.has("steps/00.safetensors")
    run.save_tensors("steps/00.safetensors", tensors)
    assert run.has("steps/00.safetensors")
    for name, tensor in run.load_tensors("steps/00.safetensors").items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
    run.path("bad.safetensors").write_bytes(b"nothing")
    for name, says in (("bad.safetensors", "damaged"), ("missing.safetensors", "cannot be read")):
        with pytest.raises(MinicosError, match=rf"{name}.*{says}.*Run the command again"):
            run.load_tensors(name)


@pytest.mark.skipif(os.name != "posix", reason="a living process is recognised on POSIX only")
def test_what_killed_runs_left_is_swept_and_what_others_write_is_not(tmp_path):
    def parts():
        return [p.name for p in tmp_path.iterdir() if p.name.startswith(PART)]

    script = f"""
import time
from pathlib import Path
from minicos.runs import replace_file
def write(temporary):
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
replace_file(Path({str(tmp_path)!r}) / "video.mp4", write)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "writing\n"
        Run.open(tmp_path, {})
        assert len(parts()) == 1
        other.kill()
    Run.open(tmp_path, {})
    assert parts() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "run.json"]


def test_files_of_other_machines_are_swept_after_a_day(tmp_path):
    foreign = tmp_path / f"{PART}elsewhere-1-aa-x"
    foreign.write_text("")
    Run.open(tmp_path, {})
    assert foreign.exists()
    os.utime(foreign, (time.time() - 90000,) * 2)
    Run.open(tmp_path, {})
    assert not foreign.exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert list(progress([1, 2, 3], label="denoise")) == [1, 2, 3]
    assert screen.getvalue().startswith("\rdenoise [")
    assert "3/3" in screen.getvalue()
    assert screen.getvalue().endswith("\n")


def test_progress_elsewhere_is_a_line_every_ten_seconds(monkeypatch):
    clock = iter(range(0, 10000, 4))
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    list(progress(iter(range(10)), total=10, label="sweep"))
    lines = log.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["3/10", "6/10", "9/10"]
    assert lines[0].split(maxsplit=3)[3].strip() == "0:12, 0:28 left"


def test_progress_of_unknown_length_and_left_early(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert list(islice(progress(iter(range(9)), label="x"), 2)) == [0, 1]
    assert list(progress([])) == []
    assert "x 0" in screen.getvalue()


ENTER = """
import sys
from minicos.errors import MinicosError
from minicos.runs import Run
seed = int(sys.argv[1])
print("ready", flush=True)
for folder in iter(sys.stdin.readline, ""):
    try:
        run = Run.open(folder.strip(), {"seed": seed})
        run.save_json("seed.json", seed)
        print("in", flush=True)
    except MinicosError as error:
        print(error, flush=True)
    sys.stdin.readline()  # the owner stays until the other has tried
    run = None
"""


@pytest.fixture(scope="module")
def entering():
    """Two processes that wait for the folder that they are to enter, as seeds 1 and 2."""
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", ENTER, seed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for seed in "12"
    ]
    assert [process.stdout.readline() for process in pair] == ["ready\n"] * 2
    yield pair
    for process in pair:
        process.kill()
        process.communicate()


def test_of_two_that_enter_a_new_folder_together_one_is_admitted(tmp_path, entering):
    """Its seed is the one that run.json names."""
    for turn in range(60):
        folder = tmp_path / str(turn)
        for process in entering:
            process.stdin.write(f"{folder}\n")
        said = [process.stdout.readline().strip() for process in entering]
        for process in entering:
            process.stdin.write("\n")
        (winner,) = (seed for seed, words in zip((1, 2), said, strict=True) if words == "in")
        assert any(re.search("in use by another command|holds a run with seed", s) for s in said), (
            said
        )
        assert json.loads((folder / "run.json").read_text())["settings"] == {"seed": winner}
        assert json.loads((folder / "seed.json").read_text()) == winner


@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX")
def test_a_disk_that_is_full_as_the_folder_is_locked(tmp_path, monkeypatch):
    import resource

    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(MinicosError, match=r"cannot write into .*: File too large"):
            Run.open(tmp_path / "a", {})
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not ignored
    assert Run.open(tmp_path / "a", {}).lock is not None


def test_a_lock_ends_with_its_process_and_serves_one_process_twice(tmp_path, entering):
    other, _ = entering
    other.stdin.write(f"{tmp_path}\n")
    assert other.stdout.readline() == "in\n"
    with pytest.raises(MinicosError, match=rf"in use .*process {other.pid} on"):
        Run.open(tmp_path, {"seed": 1})
    other.kill()
    other.wait()
    first = Run.open(tmp_path, {"seed": 1})
    assert Run.open(tmp_path, {"seed": 1}).lock is first.lock
    assert pickle.loads(pickle.dumps(first)) == first  # as sent to a worker


def test_files_without_a_record_are_not_claimed(tmp_path):
    run = Run.open(tmp_path, {"seed": 1})
    run.save_tensors("steps/000.safetensors", {"x": torch.zeros(1)})
    run.path("run.json").unlink()
    with pytest.raises(MinicosError, match=r"checksums.*no run\.json.*Choose another"):
        Run.open(tmp_path, {"seed": 2})


@pytest.mark.parametrize("harm", ["empty", "cut", "flipped", "another's"])
def test_what_is_damaged_is_not_finished(tmp_path, harm):
    run = Run.open(tmp_path, {})
    name = "steps/000.safetensors"
    run.save_tensors(name, {"x": torch.arange(8.0)})
    data = run.path(name).read_bytes()
    other = {
        "empty": b"",
        "cut": data[:-1],
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "another's": save({"x": torch.ones(8)}),
    }[harm]
    run.path(name).write_bytes(other)
    assert not run.has(name)
    with pytest.raises(MinicosError, match=r"000\.safetensors is damaged"):
        run.load_tensors(name)
    run.save_tensors(name, {"x": torch.arange(8.0)})
    assert run.has(name)
    assert run.path(name).read_bytes() == data


def test_checksums_are_those_of_sha256sum(tmp_path):
    run = Run.open(tmp_path, {})
    for value in (1, 2):  # the second time the line is replaced
        run.save_json("a.json", value)
        run.save_json("b c.json", value)
    lines = run.path("checksums.sha256").read_text().splitlines()
    hashes = {
        name: sha256(run.path(name).read_bytes()).hexdigest() for name in ("a.json", "b c.json")
    }
    assert lines == [f"{value}  {name}" for name, value in hashes.items()]
    run.path("checksums.sha256").write_text(lines[0] + "\n" + lines[1][:30])  # a power cut
    assert run.has("a.json")
    assert not run.has("b c.json")


def test_runs_of_other_versions_are_refused_by_name(tmp_path):
    Run.open(tmp_path, {})
    record = json.loads((tmp_path / "run.json").read_text())
    for schema in (1, 3):
        (tmp_path / "run.json").write_text(json.dumps({**record, "schema": schema}))
        with pytest.raises(MinicosError, match=rf"schema {schema}, and this version reads 2"):
            Run.open(tmp_path, {})


def test_one_progress_for_all_parts_of_a_command(monkeypatch):
    """Earlier work counts neither as done nor in the remaining time."""
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with runs.Progress(12, "study") as bar:
        bar.skip(2)
        for _ in range(4):
            now[0] += 15
            bar.tick()
    last = log.getvalue().splitlines()[-1]
    assert last.strip().endswith("4/10  1:00, 1:30 left")


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        (3, {}),
        ("x" * 300, {}),
        ("x", [1]),
        ("x", {(1, 2): 3}),
        ("x", (circle := {}) or circle.update(x=circle) or circle),
    ],
)
def test_what_no_run_can_be_made_of(tmp_path, monkeypatch, folder, settings):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MinicosError, match="a run is made of a folder and a dictionary"):
        Run.open(folder, settings)
    with pytest.raises(MinicosError, match="cannot write into"):
        Run.open("x\0y", {})
    assert not [*tmp_path.iterdir()]


def test_a_run_keeps_text_that_is_not_unicode_and_no_tensor_without_numbers(tmp_path):
    run = Run.open(tmp_path, {"prompt": "\udcff"})
    assert Run.open(tmp_path, {"prompt": "\udcff"}).settings == run.settings
    run.save_json("a.json", {"prompt": "\udcff"})
    assert run.load_json("a.json") == {"prompt": "\udcff"}
    for value in (3, torch.zeros(2, device="meta")):
        with pytest.raises(MinicosError, match="x is no tensor in memory"):
            run.save_tensors("a.safetensors", {"x": value})
