"""The recipes run unchanged, are short, and draw a picture."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minicos import recipes

FOLDER = Path(recipes.__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")


def test_the_list_names_every_recipe():
    assert recipes.__doc__ is not None
    assert sorted(re.findall(r"^ *(\w+)  +\S", recipes.__doc__, flags=re.M)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short(name):
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 25


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_leaves_a_picture(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_module(f"minicos.recipes.{name}")
    (file,) = tmp_path.glob("*.png")
    assert file.name == f"{name}.png"
    picture = np.asarray(Image.open(file).convert("L"))
    assert min(picture.shape) > 150 and picture.std() > 5


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minicos.recipes.lens"]
    given = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True)


def test_a_backend_that_there_is_not(tmp_path):
    assert run(tmp_path, MPLBACKEND="nonsense").stdout == "lens.png\n"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody can write")
def test_a_folder_where_nothing_can_be_written():
    done = run(Path("/proc"))
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch("minicos: cannot write lens[.]png: .*[.]\n", done.stderr)
