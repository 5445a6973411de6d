"""`--cases FOLDER`: every verb that takes a prompt and a picture takes a folder of them."""

import json

import pytest

from minicos.cli import main
from minicos.wan import Wan
from tests.vbvr_samples import sample

pytestmark = pytest.mark.usefixtures("bare_pictures")

VERBS = {
    "generate": ("video.mp4",),
    "steps --at 0": ("x0_sheet.png",),
    "energy --at 0": ("energy.safetensors", "results.json"),
    "attention --at 0 --layers 0": ("attention.safetensors", "results.json"),
    "run --x0 --at 0": ("x0_sheet.png", "results.json"),
    "noise --at 0 --in 1 --others 1": ("results.json",),
    "swap --at 0 --during 0 --one-way": ("results.json",),
    "ensemble --seeds 2": ("results.json",),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = tmp_path_factory.mktemp("cases")
    for number, (name, words) in enumerate((("a", "solve the maze"), ("b", "mark the circle"))):
        sample(root / "task" / name, frames=5, size=(40 + 8 * number, 64), seed=number)
        (root / "task" / name / "prompt.txt").write_text(words)
    return root


@pytest.mark.parametrize("verb", VERBS)
def test_every_sample_has_a_run_of_its_own(cases, tmp_path, verb, capsys):
    given = [*verb.split(), "--cases", str(cases), "--steps", "2", "--frames", "5"]
    assert main([*given, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    for name in ("a", "b"):
        for file in VERBS[verb]:
            assert (tmp_path / "task" / name / file).is_file(), file


def test_the_page_of_all_samples_has_their_numbers(cases, tmp_path, capsys):
    given = ["energy", "--cases", str(cases), "--steps", "2", "--frames", "5", "--out"]
    assert main([*given, str(tmp_path), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [number["name"] for number in lines[0]["numbers"]]
    assert len(lines) == 2 and "token energy in the first frame of tokens" in names
    assert "token energy in the first frame of tokens" in (tmp_path / "index.html").read_text()


def test_a_broken_sample_is_named_and_the_others_are_made(cases, tmp_path, capsys):
    folder = tmp_path / "cases"
    sample(folder / "good", frames=5)
    sample(folder / "bad", frames=5)
    (folder / "bad" / "first_frame.png").write_bytes(b"")
    given = [
        "generate",
        "--cases",
        str(folder),
        "--steps",
        "1",
        "--frames",
        "5",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(given) == 1
    assert "failed: bad: first_frame.png" in capsys.readouterr().err
    assert (tmp_path / "out" / "good" / "video.mp4").is_file()


def test_a_sample_whose_run_breaks_is_named_too(cases, tmp_path, monkeypatch, capsys):
    """As of a card that is lost, or too small for one picture."""
    whole = Wan.condition

    def condition(wan, prompts, *given, **more):
        if prompts == ["solve the maze"]:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return whole(wan, prompts, *given, **more)

    monkeypatch.setattr(Wan, "condition", condition)
    given = ["generate", "--cases", str(cases), "--steps", "1", "--frames", "5"]
    assert main([*given, "--out", str(tmp_path)]) == 1
    assert "failed: task/a: RuntimeError: CUDA error" in capsys.readouterr().err
    assert (tmp_path / "task" / "b" / "video.mp4").is_file()


def test_a_folder_or_a_prompt(cases, tmp_path, capsys):
    assert main(["noise", "--cases", str(cases), "--prompt", "x", "--out", str(tmp_path)]) == 2
    assert "--cases brings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "--out", str(tmp_path)])
    assert "--prompt" in capsys.readouterr().err
