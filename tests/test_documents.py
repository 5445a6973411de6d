"""Everything in README, weights.md and the notebooks works as printed."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest

from minicos.cli import VERBS, main, parser

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "weights.md", "kernels/BENCHMARKS.md", ".github/CONTRIBUTING.md")
}
NOTEBOOKS = sorted((ROOT / ".github/notebooks").glob("*.ipynb"))
WHOLE = 250  # lines of the README
ELSEWHERE = re.compile(  # run by tests of their own, or by .ci/run
    r"(python3 -m venv|pip install|python -m venv|OUT=|python -m minicos\.tiny|srun|torchrun|ruff|python -m pytest)"
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.S | re.M)


def commands(page: str) -> list[str]:
    """Every `minicos` command of a page: lines of bash blocks, and code in the prose."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    quoted = [" ".join(code.split()) for code in re.findall(r"`(minicos [^`]+)`", prose)]
    whole = [line for line in (*lines, *quoted) if "..." not in line and "VERB" not in line]
    return [line for line in whole if line.startswith("minicos ")]


def run(sources: list[str], name: str) -> dict[str, object]:
    names: dict[str, object] = {"__name__": name}
    for source in sources:
        exec(compile(source, name, "exec"), names)
    return names


def test_python_blocks_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = blocks("README.md", "python")
    assert len(sources) == 4
    names = run(sources, "README.md")
    assert names["video"].shape == (13, 64, 64, 3)
    assert names["found"].axes == ("step", "branch", "point", "b", "l")
    assert (tmp_path / "runs/counts/results.json").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_of_a_notebook_run_one_after_the_other(path, tmp_path, monkeypatch):
    """In this process; the workflow `notebooks` runs them in a kernel, with nbclient."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert 4 <= len(code) <= 10
    assert not any(cell.get("outputs") for cell in cells)  # stored without outputs, to be read
    run(code, path.name)
    plt.close("all")


def test_there_are_three_lessons_and_the_readme_links_them():
    assert len(NOTEBOOKS) == 3
    assert all(f".github/notebooks/{path.name}" in PAGES["README.md"] for path in NOTEBOOKS)


def test_the_next_three_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = next(b for b in blocks("README.md", "bash") if "# 3" in b)
    lines = [line.partition("#")[0] for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        _, *words = shlex.split(line)
        assert main(words) == 0
        assert "index.html" in capsys.readouterr().out
    for verb in ("steps", "run", "belief"):
        assert (tmp_path / "runs" / verb / "index.html").exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page):
    """Verbs and options exist; commands that need weights or a card are not run here."""
    verbs = {verb.__name__.rpartition(".")[2] for verb in VERBS}
    found = commands(page)
    assert found or page == ".github/CONTRIBUTING.md"
    for line in found:
        words = shlex.split(line.replace("minicos ", "", 1))
        assert words[0] in verbs, line
        if len(words) > 1:
            parser().parse_args(words)
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            known = line.startswith(("minicos ", "#")) or ELSEWHERE.match(line)
            assert known or not line.strip(), line


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_run_exist(page):
    for name in set(re.findall(r"python -m ((?:minicos|tests)[.\w]*)", PAGES[page])):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_commands_of_training_and_measuring_have_these_options(monkeypatch, capsys):
    text = " ".join(PAGES["weights.md"].split())
    commands = re.findall(r"python -m ((?:minicos|tests)[.\w]+)(.*?)(?=`|#|python -m)", text)
    assert len(commands) >= 7
    for name, words in commands:
        monkeypatch.setattr("sys.argv", [name, "--help"])
        with pytest.raises(SystemExit):
            import_module(name).main()
        known = capsys.readouterr().out
        for option in re.findall(r" (--[\w-]+)", words):
            assert f"{option} " in known.replace("]", " ").replace(",", " "), (name, option)


def test_commands_behind_a_scheduler_are_understood():
    lines = "\n".join(blocks("weights.md", "bash")).splitlines()
    started = [line.partition(" minicos ")[2] for line in lines if line.startswith("srun ")]
    assert started
    for words in started:
        parser().parse_args(shlex.split(words))


@pytest.mark.parametrize("line", ["points", "vbvr --list-conditions", "puzzles --list"])
def test_commands_that_only_print_run(line, capsys):
    assert any(f"minicos {line}" in " ".join(page.split()) for page in PAGES.values())
    assert main(shlex.split(line)) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!http)([^)\s]+)\)", PAGES[page])
    assert links or page == "kernels/BENCHMARKS.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text("utf-8"), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in slugs, link


def test_the_readme_is_read_in_one_sitting():
    assert len(PAGES["README.md"].splitlines()) <= WHOLE


SPEED = {  # rows of README's table -> lines of the benchmark: its name, and how the line begins
    "a pass of the embedded model": [("forward", "forward, tiny 64x64x13")],
    "a layer of UMT5-XXL / a block of A14B": [
        ("layers", "UMT5-XXL layer, float32"),
        ("layers", "A14B block, float32"),
    ],
    "VAE of A14B at its width, encoding / decoding": [
        ("vae", "encode, VAE 2.1 64x64x5"),
        ("vae", "decode, VAE 2.1 64x64x5"),
    ],
    "noise at each of 50 steps": [("sweep", "noise at each of 50 steps, tiny")],
    "token energy of every layer and step, embedded model, without pictures": [
        ("capture", "energy, run of 20 steps")
    ],
    "reading 1 GB of float32 weights as bfloat16, every value checked (always so) / unchecked": [
        ("load", "1 GB to bfloat16, ours checked"),
        ("load", "1 GB to bfloat16, peak"),
    ],
}


def test_speeds_of_the_readme_are_those_of_the_benchmark():
    ratio = r"^\| `(\w+)` \| ([^|]+?) \| [^|]* \| [^|]* \| [^|]* \| ([\d.]+) \|"
    table = re.findall(ratio, PAGES["kernels/BENCHMARKS.md"], flags=re.M)
    section = PAGES["README.md"].partition("## Is it fast?")[2].partition("\n## ")[0]
    for row, lines in SPEED.items():
        found = [
            next(float(r) for what, line, r in table if what == name and line.startswith(begins))
            for name, begins in lines
        ]
        (printed,) = re.findall(
            rf"^\| {re.escape(row)} \| [^|]+ \| ([^|]+) \|", section, flags=re.M
        )
        assert printed == " / ".join(f"{r:.2f}" for r in found)


def test_the_readme_names_every_verb():
    """Where each is defined, in the table of verbs."""
    table = PAGES["README.md"].partition("## Verbs")[2].partition("## ")[0]
    named = set(re.findall(r"`(?:minicos )?(\w+)`", table))
    verbs = {verb.__name__.rpartition(".")[2] for verb in VERBS} - {"completion"}
    assert verbs <= named, verbs - named


def test_the_readme_prints_this_version():
    import minicos

    assert f"version = {{{minicos.__version__}}}" in PAGES["README.md"]
    changes = (ROOT / ".github/CHANGELOG.md").read_text("utf-8")
    assert changes.partition("\n## ")[2].startswith(minicos.__version__)


# -- the tools in .github --------------------------------------------------------------------------


def tool(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(runpy.run_path(str(ROOT / ".github" / f"{name}.py")))
    return module


def test_the_reference_has_every_public_name():
    """The modules that the workflow `reference` documents define every name of the package."""
    import minicos

    workflow = (ROOT / ".github/workflows/reference.yml").read_text("utf-8")
    modules = [import_module(name) for name in re.findall(r"\bminicos\.[\w.]+", workflow)]
    assert len(modules) > 30
    assert all(module.__doc__ for module in modules)
    for name in set(minicos.__all__) - {"__version__"}:
        value = getattr(minicos, name)
        assert value.__module__ in {module.__name__ for module in modules}, name
        assert value.__doc__, name


def test_links_become_absolute_for_a_package_index():
    absolute = tool("absolute_links").absolute
    text = "![x](.github/figures/a.png) [b](minicos/dit.py) [c](https://e.org) [d](#e)"
    assert absolute(text, "https://host/o/n", "v1") == (
        "![x](https://host/o/n/raw/v1/.github/figures/a.png) [b](https://host/o/n/blob/v1/minicos/dit.py)"
        " [c](https://e.org) [d](#e)"
    )
    assert "](." not in absolute(PAGES["README.md"], "https://host/o/n", "v1")
