"""`--jsonl`: every number as it is found, once, also through kills, and only into files of lines."""

import errno
import io
import json
from pathlib import Path

import pytest
import torch

from minicos.analysis import result
from minicos.analysis.result import Curve, Interval, Number, Result
from minicos.analysis.tools import cases
from minicos.cli import main
from minicos.errors import MinicosError
from minicos.journal import FEW, Journal, brief, rows
from minicos.media import save_image
from minicos.puzzles import make
from minicos.runs import Run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_added_and_never_twice(tmp_path):
    path = tmp_path / "deep" / "n.jsonl"
    journal = Journal(path)
    journal.add({"case": 0, "value": 0.5})
    journal.add({"case": 1, "value": float("nan")})
    journal.add({"case": 0, "value": 0.5})
    again = Journal(path)
    again.add({"case": 1, "value": float("nan")})
    again.add({"case": 2, "value": [1, 2.5]})
    assert lines(path) == [
        {"case": 0, "value": 0.5},
        {"case": 1, "value": None},
        {"case": 2, "value": [1, 2.5]},
    ]


def test_a_line_that_a_full_disk_cut_is_made_again(tmp_path):
    path = tmp_path / "n.jsonl"
    path.write_text('{"case": 0}\n{"case": 1, "va')
    journal = Journal(path)
    journal.add({"case": 1, "value": 2})
    assert lines(path) == [{"case": 0}, {"case": 1, "value": 2}]


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"# a table\n", b"[1, 2]\n"])
def test_other_files_are_not_touched(tmp_path, content):
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    with pytest.raises(MinicosError, match="--jsonl"):
        Journal(path)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(MinicosError, match="--jsonl"):
        Journal(tmp_path)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, raw):
            raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path / "n.jsonl")
    monkeypatch.setattr(Path, "open", lambda *args, **options: Full())
    with pytest.raises(MinicosError, match="No space left"):
        journal.add({"case": 0})


def test_many_values_are_their_mean_deviation_and_shape():
    assert brief(torch.tensor(2)) == 2 and brief(torch.tensor([1.0, 2.0])) == [1, 2]
    many = torch.arange(2.0 * FEW).view(2, FEW)
    found = brief(many)
    assert found == {
        "mean": many.mean().item(),
        "deviation": pytest.approx(many.std(correction=0).item()),
        "shape": [2, FEW],
    }
    made = list(rows({"a": torch.tensor([[1.0], [2.0]]), "passes": torch.tensor(7)}, 2))
    assert made == [{"a": [1.0], "passes": 7}, {"a": [2.0], "passes": 7}]


def test_a_study_that_is_killed_leaves_no_gap_and_no_double(tmp_path):
    def compute(batch):
        if batch == 2 and not (tmp_path / "fixed").exists():
            raise KeyboardInterrupt
        return {"score": torch.tensor([float(batch), batch + 0.5])}

    def run():
        folder = Run.open(tmp_path / "run", {"n": 6}, journal=Journal(tmp_path / "n.jsonl"))
        cases.collect(folder, "part", [0, 1, 2], compute)

    with pytest.raises(KeyboardInterrupt):
        run()
    before = lines(tmp_path / "n.jsonl")
    assert [line["case"] for line in before] == [0, 1, 2, 3]
    # results were written, and the process died before their lines were
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before[:3]))
    (tmp_path / "fixed").touch()
    run()
    after = lines(tmp_path / "n.jsonl")
    assert [(line["case"], line["score"]) for line in after] == [
        (k, k // 2 + 0.5 * (k % 2)) for k in range(6)
    ]
    assert {line["run"] for line in after} == {str(tmp_path / "run")}


def test_a_result_as_lines(tmp_path):
    made = Result(
        "noise",
        {},
        [Number("D", 0.5, 0.4, 0.6, 3, "D", "control")],
        {"edits": [{"edit": "step 5", "D": Interval(1.0, 0.5, 1.5, 3)}]},
        [Curve("D", (0, 5), (1.0, 0.9), x_label="step", unit="D")],
    )
    run = Run(tmp_path, {}, journal=Journal(tmp_path / "n.jsonl"))
    result.write(run, made)
    result.write(run, made)
    number, cell, *points = lines(tmp_path / "n.jsonl")
    assert number["number"] == "D" and number["value"] == 0.5 and number["resolvable"] is None
    assert cell["table"] == "edits" and cell["D"] == {"value": 1.0, "low": 0.5, "high": 1.5, "n": 3}
    assert [(p["curve"], p["x"], p["value"]) for p in points] == [("D", 0, 1.0), ("D", 5, 0.9)]


def test_one_run_and_a_study_of_puzzles(tmp_path, capsys):
    """The steps of one run, then the cases and the result of a study, in one file."""
    file = tmp_path / "n.jsonl"
    common = ("--steps", "2", "--jsonl", str(file))
    picture = tmp_path / "maze.png"
    save_image(picture, make("maze", 0, size=3, split="test").first_frame())
    own = ("--prompt", "solve the maze", "--image", str(picture), "--frames", "5")
    study = ("counts", "--n", "2", "--size", "3", "--counts", "1,2", "--lengths", "none")
    assert main(["generate", *own, *common, "--out", str(tmp_path / "one")]) == 0
    assert main([*study, *common, "--out", str(tmp_path / "two")]) == 0
    found = lines(file)
    steps = [line for line in found if line["run"] == str(tmp_path / "one")]
    assert [line["step"] for line in steps] == [0, 1] and steps[0]["sigma"] > steps[1]["sigma"]
    assert steps[0]["next"]["shape"][0] == 1
    lines_of = [line for line in found if line["run"] == str(tmp_path / "two")]
    assert {line["case"] for line in lines_of if "case" in line} == {0, 1}
    numbers = json.loads((tmp_path / "two" / "results.json").read_text())["numbers"]
    assert [line["number"] for line in lines_of if "number" in line] == [n["name"] for n in numbers]
    again = file.read_bytes()
    assert main(["generate", *own, *common, "--out", str(tmp_path / "one")]) == 0
    assert main([*study, *common, "--out", str(tmp_path / "two")]) == 0
    assert file.read_bytes() == again
