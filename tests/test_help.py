"""Help and its examples, completion, --version: what a person sees before the first run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest

from minicos import __version__
from minicos.analysis.reading import READINGS
from minicos.cli import VERBS, main, parser
from minicos.cli.options import Parser

NAMES = [verb.__name__.rpartition(".")[2] for verb in VERBS]


def verbs() -> dict[str, Parser]:
    """The parser of every verb."""
    top = parser()
    return next(a.choices for a in top._actions if isinstance(a.choices, dict))


def commands(text: str) -> list[list[str]]:
    """The example commands in a text, as a shell would read them."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [line.strip() for line in lines if re.match(r"  +minicos \w", line)]
    read = [shlex.split(line, comments=True) for line in found if "..." not in line]
    return [words[1 : words.index(">")] if ">" in words else words[1:] for words in read]


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_help_run_as_printed(name):
    """Each is taken by the parser; what needs a picture or weights says so by a file's name."""
    own = verbs()[name]
    found = commands(str(own.epilog))
    assert found
    for words in found:
        words = words[: words.index(">>")] if ">>" in words else words
        assert words[0] == name
        parser().parse_args(words)


LIGHT = ("generate", "points", "puzzles", "completion")


@pytest.mark.parametrize("name", LIGHT)
def test_light_examples_run(name, tmp_path, monkeypatch, capsys):
    """As printed, in two steps, with the pictures that they name; those of weights that are not
    here say so.
    """
    monkeypatch.chdir(tmp_path)
    assert main(["puzzles", "--kind", "maze", "--n", "1", "--out", "drawn"]) == 0
    (drawn,) = tmp_path.glob("drawn/**/first_frame.png")
    for picture in ("maze.png", "cat.png", "first.png", "last.png"):
        shutil.copy(drawn, picture)
    for words in commands(str(verbs()[name].epilog)):
        words = words[: words.index(">>")] if ">>" in words else words
        few = ["--steps", "2"] if name == "generate" else []
        absent = any(word.startswith("Wan2.") for word in words) and "--json" not in words
        assert main([*words, *few]) == (2 if absent else 0), words
        if absent:
            assert "is not a folder with a model" in capsys.readouterr().err


def test_the_commands_of_pages_and_of_the_front_page_are_understood():
    for verb, reading in READINGS.items():
        assert verb in NAMES
        assert reading.shows and reading.read and 2 <= len(reading.next) <= 4
        for why, command in reading.next:
            assert why
            first, *words = shlex.split(command)
            assert first == "minicos"
            parser().parse_args(words)
    top = commands(str(parser().description))
    assert len(top) > 10
    for words in top:
        parser().parse_args(words)


def test_help_folds_what_all_verbs_share(capsys):
    with pytest.raises(SystemExit):
        main(["steps", "--help"])
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["steps", "--help-all"])
    whole = capsys.readouterr().out
    assert READINGS["steps"].shows in " ".join(short.split())
    for option in ("--puzzle", "--at", "--model", "--out", "--help-all"):
        assert option in short and option in whole
    for option in ("--residency", "--decode-dtype", "--guidance", "--noise-device"):
        assert option not in short and option in whole
    assert "--model takes" in whole and "--model takes" not in short
    assert len(short.splitlines()) < len(whole.splitlines()) - 20


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"minicos {__version__}\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["minicos", "ste"], ["steps"]),
        (["minicos", "steps", "--resi"], ["--residency"]),
        (["minicos", "generate", "--solver", "e"], ["euler"]),
        (["minicos", "attention", "--puzzle", "maz"], ["maze", "maze-one"]),
        (["minicos", "completion", "fi"], ["fish"]),
    ],
)
def test_completion_in_bash(line, expected, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = " ".join(map(shlex.quote, line))
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _minicos; echo ${{COMPREPLY[@]}}"
    shell = ["bash", "--norc", "-c", f"{script}\n{ask}"]
    answer = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert set(expected) <= set(answer.stdout.split())
    assert all(word.startswith(line[-1]) for word in answer.stdout.split())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_elsewhere_names_every_verb(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in NAMES)
