"""Activations on disk: what a hook saw, bit for bit; sizes known before; broken and foreign
folders.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from minicos import activations, load
from minicos.activations import REDUCE, Activations, Wanted, index, reduced, shard, write
from minicos.cli import main
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.record import Record
from minicos.vbvr.cases import load_picture, read
from minicos.vbvr.conditions import image_batch
from tests.vbvr_samples import sample

POINTS = {"blocks.0": "b l d", "blocks.1": "b l d", "blocks.0.self_attn.q": "b n l k"}


def command(root):
    """Every block's output of two steps, of all samples."""
    words = f"capture --cases {root}/cases --points blocks.* --at 0,1 --steps 2 --frames 5 --dtype float32 --out {root}/out"
    return words.split()


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Two samples captured by the command."""
    root = tmp_path_factory.mktemp("capture")
    for name, seed in (("a", 0), ("b", 1)):
        sample(root / "cases" / "task" / name, size=(32, 48), seed=seed)
    assert main(command(root)) == 0
    return root


def test_what_a_hook_saw(captured):
    a = Activations(captured / "out")
    assert a.samples == ["task/a", "task/b"] and len(a.points) == 12 and len(a) == 2 * 2 * 12
    wan = load("tiny").with_preset(steps=2, frames=5, area=None)
    one = read(captured / "cases").samples[1]
    seen = Record(lambda x: x.clone())
    hooks = Hooks().on("blocks.6", seen, branch="cond")
    condition = wan.condition(one.prompt, image_batch([load_picture(one)]))
    for _ in wan.sample(condition, noise=wan.noise(condition, 1), hooks=hooks):
        pass
    (entry,) = a.select("blocks.6", step=1, sample="task/b")
    assert (entry.layer, entry.grid, entry.branch) == (6, (2, 2, 3), "cond")
    site, seen_at = seen.entries[1]
    assert site.step == 1 and torch.equal(a.load(entry), seen_at[0])
    x, where = a.rows("blocks.6", step=1)
    assert x.shape == (24, 128) and torch.equal(x[12:], seen_at[0])
    assert (where[13].sample, where[13].token) == ("task/b", 1)


def test_the_example_of_the_manual(captured, monkeypatch, capsys):
    manual = (Path(__file__).parents[1] / "weights.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", manual, flags=re.S)
    monkeypatch.chdir(captured)
    names: dict[str, object] = {}
    exec(compile(example.replace("runs/capture", "out"), "weights.md", "exec"), names)
    assert names["x"].shape == (24, 128) and names["right"] > 0.9
    assert capsys.readouterr().out.count("task/a") == 12


def test_bytes_are_known_before(captured, capsys):
    wanted = Wanted(("blocks.*",), (0, 1), dtype="float32")
    points = {f"blocks.{i}": "b l d" for i in range(12)}
    size = sum(a.stat().st_size for a in (captured / "out" / "shards").iterdir())
    predicted = 2 * wanted.bytes(points, (2, 2, 3), 128)
    assert predicted < size < predicted * 1.05  # headers
    command = [
        "capture",
        "--cases",
        str(captured / "cases"),
        "--points",
        "blocks.*",
        "--frames",
        "5",
        "--dry-run",
    ]
    assert main([*command, "--out", str(captured / "none")]) == 0
    assert "2 samples, 0.1 MB" in capsys.readouterr().err and not (captured / "none").exists()


def test_a_capture_continues(captured):
    place = shard(captured / "out", 1)
    kept, other = place.read_bytes(), shard(captured / "out", 0).stat().st_mtime_ns
    place.unlink()
    assert main(command(captured)) == 0
    assert place.read_bytes() == kept and shard(captured / "out", 0).stat().st_mtime_ns == other


def test_a_sample_that_fails_leaves_the_others(captured, monkeypatch, capsys):
    real = activations.capture

    def capture(*given, about, **more):
        if about["sample"] == "task/a":
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(*given, about=about, **more)

    for number in (0, 1):
        shard(captured / "out", number).unlink()
    whole = (captured / "out" / "index.json").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(activations, "capture", capture)
        assert main(command(captured)) == 1
    assert "failed: task/a: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err
    assert Activations(captured / "out").samples == ["task/b"]
    journal = captured / "n.jsonl"
    assert main([*command(captured), "--jsonl", str(journal)]) == 0
    assert (captured / "out" / "index.json").read_text() == whole
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["sample"] for line in lines] == ["task/a", "task/b"]


@pytest.mark.parametrize("how", REDUCE)
def test_reductions(how):
    x = torch.randn(2, 12, 8)
    found = reduced(x, (3, 2, 2), how)
    wanted = {
        "whole": x,
        "frames": torch.stack([x[:, 4 * f : 4 * f + 4].mean(1) for f in range(3)], 1),
        "mean": x.mean(1),
        "norm": x.square().sum(-1).sqrt(),
    }
    torch.testing.assert_close(found, wanted[how])
    size = Wanted(("blocks.0",), (0,), ("cond", "uncond"), how, "float16").bytes(
        POINTS, (3, 2, 2), 8
    )
    assert size == 2 * 2 * found[0].numel()


def test_a_pass_that_the_run_does_not_have(captured, tmp_path, capsys):
    options = ["--branches", "cond", "uncond", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*command(captured), *options]) == 2
    assert "--branches uncond: this run has the passes cond." in capsys.readouterr().err
    assert main([*command(captured), *options, "--guidance", "3"]) == 0


def test_what_cannot_be_captured(tmp_path):
    with pytest.raises(MinicosError, match="b n l k"):
        Wanted(("blocks.0.self_attn.q",), (0,)).check(POINTS)
    with pytest.raises(MinicosError, match=r"blocks\.9"):
        Wanted(("blocks.9",), (0,)).check(POINTS)
    with pytest.raises(MinicosError, match="--reduce"):
        Wanted(("blocks.0",), (0,), reduce="median")


def test_a_probe_in_ten_lines(tmp_path):
    """The example of the documentation: which of two kinds a sample is, read off the mean
    activation by least squares.
    """
    wanted = Wanted(("blocks.0",), (0,), reduce="mean", dtype="float32")
    torch.manual_seed(0)
    for i in range(40):
        x = torch.randn(8) + (i % 2) * torch.arange(8)
        write(
            tmp_path,
            i,
            {"000/cond/blocks.0": x},
            {"sample": f"kind{i % 2}/{i:05d}", "grid": (1, 2, 2)},
        )
    index(tmp_path, wanted, {})

    a = Activations(tmp_path)
    x, where = a.rows("blocks.0", step=0)
    y = torch.tensor([row.sample.startswith("kind1") for row in where]).float()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    weights = torch.linalg.lstsq(x[:30], 2 * y[:30, None] - 1).solution
    right = (x[30:] @ weights > 0).squeeze() == y[30:].bool()
    assert right.float().mean() > 0.9


def test_damaged_and_foreign_folders(captured, tmp_path):
    for text in (
        "",
        "[]",
        '{"schema": 0}',
        '{"schema": 1}',
        '{"schema": 1, "settings": {}, "wanted": {"reduce": "mean"}, "entries": [{}]}',
    ):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(MinicosError, match="index"):
            Activations(tmp_path)
    kept = json.loads((captured / "out" / "index.json").read_text())
    kept["entries"] = [
        kept["entries"][0] | {"file": "../../secret.safetensors"},
        kept["entries"][1] | {"file": "shards/x"},
    ]
    (tmp_path / "index.json").write_text(json.dumps(kept))
    a = Activations(tmp_path)
    for entry, words in zip(a.entries, ("leads out", "cannot be read"), strict=True):
        with pytest.raises(MinicosError, match=words):
            a.load(entry)
    with pytest.raises(MinicosError, match="no rows"):
        a.rows("blocks.0", step=7)
