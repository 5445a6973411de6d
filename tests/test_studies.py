"""One study for each question: the verb and the report make it with the same options, and get
the same numbers.
"""

import ast
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minicos import analysis
from minicos.analysis import result
from minicos.analysis.options import arguments
from minicos.analysis.reproduce import FULL, SECTIONS, Part, parts
from minicos.cli import main, parser, study
from minicos.config import get_preset
from minicos.open import load
from minicos.runs import Run

pytestmark = pytest.mark.usefixtures("bare_pictures")

PARTS = {f"{name}/{p.name}": p for name, some in parts(FULL).items() for p in some}
SMALL = {  # a part of each section, and of each verb: options and steps that take a second
    "belief/mazes": ({"n": 2, "size": 3}, 2),
    "steps/mazes": ({"n": 2, "size": 3}, 2),
    "counts/chains": (
        {"puzzle": "maze", "against": "mark", "n": 2, "size": 3, "counts": (1, 2)},
        2,
    ),
    "commitment/mazes": ({"n": 2, "size": 3, "at": (0, 1), "count": 2}, 2),
    "correction/completions": ({"puzzle": "mark", "n": 2, "size": 3, "at": (0, 1), "count": 1}, 2),
    "correction/planted": ({"n": 2, "size": 3, "at": (0, 1)}, 2),
    "memory/reveal": ({"n": 2}, 2),
    "perception/goals": ({"n": 2, "size": 3, "rows": 4, "at": (0, 1)}, 2),
    "noise/paper": ({"n": 1, "size": 3, "at": (0, 1), "frames": (1,)}, 2),
    "energy/mark": ({"n": 2, "size": 3, "at": (0, 1)}, 2),
    "swap/when": ({"n": 2, "size": 3, "layers": "3,9", "controls": ("wrong",)}, 2),
    "ensemble/mixed": (
        {
            "puzzle": "mark",
            "n": 3,
            "size": 3,
            "choose": 3,
            "arms": ("override 20-29 @0", "update 0-9 @0"),
        },
        2,
    ),
    "frames/lengths": ({"puzzle": "maze", "n": 2, "size": 3, "counts": (1, 2), "lengths": (5,)}, 2),
    "variants/mid-correction": ({"puzzle": "mark", "n": 2, "size": 3, "at": (0, 1), "count": 1}, 2),
}


def small(name: str) -> Part:
    """A part of the report with options that take a second."""
    (changes, steps), (section, own) = SMALL[name], name.split("/")
    part = next(part for part in parts(5)[section] if part.name == own)
    return replace(part, options=replace(part.options, **changes), preset={"steps": steps})


def test_every_section_and_every_study_of_the_report_is_compared():
    assert {name.partition("/")[0] for name in SMALL} == SECTIONS.keys()
    assert {PARTS[name].study for name in SMALL} == {part.study for part in PARTS.values()}
    assert {PARTS[name].verb for name in SMALL} == {part.verb for part in PARTS.values()}


@pytest.mark.parametrize("name", SMALL)
def test_the_verb_gives_the_numbers_of_the_report(name, tmp_path, capsys):
    part = small(name)
    model = load(part.model or "tiny", device="cpu", decode_dtype=torch.bfloat16)
    wan = model.with_preset(**part.preset)
    here = part.study(wan, Run.open(tmp_path / "here", {}), part.options)
    verb, *words = shlex.split(part.command())[1:]
    assert main([verb, *words, "--device", "cpu", "--out", str(tmp_path / "verb")]) == 0
    there = result.read(tmp_path / "verb")
    text = capsys.readouterr().out
    assert here.numbers and there.what == here.what
    again = result.read(tmp_path / "here")  # missing values are NaN in both
    assert list(map(str, there.numbers)) == list(map(str, again.numbers))
    assert repr((there.numbers, there.tables, there.curves)) == repr(
        (again.numbers, again.tables, again.curves)
    )
    for file in there.files:
        assert (tmp_path / "verb" / file).stat().st_size > 0
    assert all(number.name in text for number in there.numbers)


@pytest.mark.parametrize("name", PARTS)
def test_the_command_of_a_part_asks_for_its_study(name):
    part = PARTS[name]
    args = parser().parse_args(shlex.split(part.command())[1:])
    assert study.read(args, type(part.options)) == part.options
    asked, usual = {k: getattr(args, k) for k in part.preset}, get_preset("tiny")
    assert usual.changed(**asked) == usual.changed(**part.preset)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["noise", "--prompt", "solve the maze", "--n", "3"], "--n is an option of held-out"),
        (["noise", "--seeds", "3"], "--seeds is an option of a case of your own"),
        (
            ["energy", "--prompt", "solve the maze", "--size", "3"],
            "--size is an option of held-out",
        ),
        (["energy", "--n", "2", "--queries", "8"], "--queries is an option of one run"),
        (["steps", "--n", "2", "--also", "energy"], "--also goes with one run"),
        (["steps", "--n", "2", "--image", "maze.png"], "--n takes held-out puzzles"),
        (["steps", "--image", "maze.png"], "--image needs a --prompt; a puzzle brings"),
        (["steps", "--last", "maze.png"], "--last needs a --prompt; a puzzle brings"),
        (["attention", "--puzzle", "mazes"], "unknown family 'mazes'"),
        (["generate", "--puzzle", "maze:x"], "--puzzle maze:x: give a kind such as maze"),
        (["commitment", "--at", "20"], "the run has steps 0 to 19"),
        (["belief", "--puzzle", "mazes"], "unknown family 'mazes'"),
        (["swap", "--layers", "3-1"], "--layers 3-1: give a list such as 0,3-5 or embed"),
        (["ensemble", "--arms", "override 20-29"], "--arms override 20-29: give names such as"),
    ],
)
def test_nothing_is_ignored(words, says, tmp_path, capsys):
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "new")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_tools_know_no_question():
    """The tools that record, change and measure a run do not import the studies that use them."""
    base = ("minicos.analysis.tools", "minicos.analysis.result", "minicos.analysis.options")
    for path in (Path(analysis.__file__).parent / "tools").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minicos.anal"):
                assert (node.module or "").startswith(base), f"{path.name}: {node.module}"


def test_options_that_are_not_at_their_default_become_words():
    options = replace(PARTS["swap/when"].options, seed=7, one_way=False)
    words = arguments(options)
    assert words[:2] == ["--seed", "7"]
    assert "--one-way" not in words and words[words.index("--layers") + 1] == "6"
    frames = arguments(replace(PARTS["noise/paper"].options, frames=()))
    assert frames[frames.index("--in") + 1] == "none"
