"""One report on a model: it passes if everything is correct, and fails if something is wrong."""

import json

import pytest
import torch

from minicos import load
from minicos.cli import main
from minicos.selfcheck import as_text, selfcheck


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
        "minicos.selfcheck.selfcheck", lambda wan, files: {"files": files, "ok": False}
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
