"""One report on a model: it passes if everything is correct, and fails if something is wrong."""

import json
import sys

import pytest
import torch

from minicos import load
from minicos import open as opening
from minicos.cli import main
from minicos.errors import MinicosError
from minicos.selfcheck import as_text, selfcheck
from minicos.verify import Part, Row


def test_the_report_of_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["selfcheck", "--out", "out"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["ok"]
    assert report["agreement"]["ok"]
    assert report["run"]["finite"]
    assert report["run"]["resumed bit for bit"]
    assert {"torch", "minicos", "python"} <= set(report["versions"])
    text = (tmp_path / "out/report.txt").read_text()
    assert text.startswith("command: minicos selfcheck --out out\nversions\n  minicos: ")
    assert text in capsys.readouterr().out


def test_the_report_as_json_is_all_that_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "minicos.selfcheck.selfcheck", lambda wan, files, frames: {"files": files, "ok": False}
    )
    assert main(["selfcheck", "--json", "--out", str(tmp_path)]) == 1
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report.json").read_text())


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_stops_is_part_of_the_report(monkeypatch):
    wan = load("tiny", device="cpu")
    monkeypatch.setattr("minicos.selfcheck._agreement", lambda wan: {"ok": True})
    wan.experts["high"].head.head.weight.data.fill_(3e38)
    report = selfcheck(wan)
    assert not report["ok"] and "versions" in report
    assert report["run"]["stopped"].startswith("step 0, expert high: the latent of the video is no")


SHORT = {"finite": True, "resumed bit for bit": True}  # the outcome of a run without faults


@pytest.fixture
def quick(monkeypatch):
    """A model, and no run."""
    monkeypatch.setattr("minicos.selfcheck._short_run", lambda *given: SHORT)
    return load("tiny", device="cpu")


def test_only_a_lack_of_diffusers_excuses_that_nothing_is_compared(quick, monkeypatch):
    def refuse(*given):
        raise MinicosError("for some reason")

    monkeypatch.setattr("minicos.selfcheck.verify", refuse)
    report = selfcheck(quick)
    assert not report["ok"]
    assert report["agreement"]["not compared"] == "for some reason"
    monkeypatch.undo()
    monkeypatch.setattr("minicos.selfcheck._short_run", lambda *given: SHORT)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    report = selfcheck(quick)
    assert report["ok"] and "pip install" in report["agreement"]["not compared"]


def test_a_network_that_is_not_compared_is_not_ok(quick, monkeypatch):
    parts = [Part("text", (Row("rows", 0, 0, 1e-6),)), Part("high", (), "of some reason")]
    monkeypatch.setattr("minicos.selfcheck.verify", lambda *given: parts)
    report = selfcheck(quick)
    assert not report["ok"] and report["agreement"]["high"] == "of some reason"


def test_weights_in_their_files_are_compared_and_memory_is_for_the_short_run(tmp_path, monkeypatch):
    frames, video = [], opening._video

    def reserved(*given):
        frames.append(video(*given)[0])
        return video(*given)

    def run(wan, folder, count):
        frames.append(count)
        return SHORT

    monkeypatch.setattr(opening, "_video", reserved)
    monkeypatch.setattr("minicos.selfcheck._short_run", run)
    options = ["selfcheck", "--residency", "disk", "--out", str(tmp_path)]
    assert main(options) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model"]["residency"] == "disk" and report["agreement"]["ok"]
    assert "not compared" not in report["agreement"]
    assert main([*options, "--frames", "5"]) == 0  # an option that a refusal may advise
    assert frames == [9, 9, 5, 5]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_parts_from_diffusers_is_reported(monkeypatch):
    wan = load("tiny", device="cpu")
    attention = wan.experts["low"].blocks[7].self_attn
    forward = attention.o.forward
    monkeypatch.setattr(attention.o, "forward", lambda x: forward(x) * 1.001)
    report = selfcheck(wan)
    assert not report["ok"]
    assert report["agreement"]["low"].startswith("parts at blocks.7.self_attn: ")
    assert report["run"]["finite"]
    assert "\n  low: parts at" in as_text(report)
    assert torch.is_grad_enabled()
