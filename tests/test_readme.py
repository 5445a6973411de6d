"""What the README shows works as it stands there."""

import re
from pathlib import Path

from minicos import puzzles

README = Path(__file__).parents[1] / "README.md"
PYTHON = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def test_python_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    puzzle = puzzles.make("maze", 0, size=4, split="test")
    puzzles.export(puzzle, 0, tmp_path / "puzzles/maze_4x4_test/00000")
    names: dict[str, object] = {}
    for source in PYTHON:
        exec(compile(source, "README.md", "exec"), names)
    assert len(PYTHON) >= 6
    assert names["video"].shape == (13, 64, 64, 3)
    assert names["answers"].shape == (2, 2, 2)
    assert (tmp_path / "runs/watched/attention_frames.png").exists()


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not (README.parent / link).exists()]
