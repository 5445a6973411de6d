"""How much code there is: statements of the syntax tree, docstrings left out. `python -m
tests.statements [COMMIT]` prints them by folder.

Lines say how code is laid out, statements how much it does: a call broken over ten lines is one,
three calls on a line are three. A table is one statement however long it is; the file of tensor
names is left out of what opens a file.
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("minicos", "kernels", "tests")
# The networks, the loop, hooks, solvers, conditioning, configurations; what opens a file and places
# its weights (`pipeline` and `residency` are former names); and what `minicos inspect` says about a
# file, of which opening one uses nothing. `clip`, which some models of Wan2.1 need, is in none.
PARTS = {
    "(core)": "attend condition config dit hooks ops sample schedule text vae",
    "(opening a file)": "video_model wan open plan stream cost tiles attention pipeline residency "
    "weights/",
    "(describing a file)": "weights/inspect",
}
TABLES = "weights/names"  # of names, left out of what opens a file


def statements(source: str) -> int:
    """Statements in a file, without docstrings."""
    tree = ast.parse(source)
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - len(_docstrings(tree))


def lines(source: str) -> int:
    """Lines of code in a file, without docstrings, comments and blank lines."""
    strings = _docstrings(ast.parse(source))
    documented = {i for node in strings for i in range(node.lineno, (node.end_lineno or 0) + 1)}
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and i not in documented
        for i, line in enumerate(source.splitlines(), start=1)
    )


def _docstrings(tree: ast.Module) -> list[ast.stmt]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None
    ]


def sources(commit: str | None = None) -> Iterator[tuple[str, str]]:
    """Path and text of every Python file, of the work tree or of a commit."""
    if commit is None:
        for folder in FOLDERS:
            for path in sorted((ROOT / folder).rglob("*.py")):
                yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        return
    listed = _git("ls-tree", "-r", "--name-only", commit, *FOLDERS).split()
    for path in listed:
        if path.endswith(".py"):
            yield path, _git("show", f"{commit}:{path}")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def belongs(path: str, names: str) -> bool:
    """Whether a file of the package is one of `names`, or in one of its folders."""
    inside = path.removeprefix("minicos/").removesuffix(".py")
    return path.startswith("minicos/") and any(
        inside.startswith(name) if name.endswith("/") else inside == name for name in names.split()
    )


def by_folder(commit: str | None = None) -> Counter[str]:
    """Statements of each folder; of the package, also of its PARTS."""
    out: Counter[str] = Counter()
    for path, source in sources(commit):
        count = statements(source)
        parts = path.split("/")
        out["/".join(parts[:2]) if len(parts) > 2 else parts[0]] += count
        for part, names in PARTS.items():
            elsewhere = TABLES if part == "(describing a file)" else f"{TABLES} weights/inspect"
            out[part] += count * (belongs(path, names) and not belongs(path, elsewhere))
    return out


def main() -> None:
    commit = sys.argv[1] if len(sys.argv) > 1 else None
    now, before = by_folder(), by_folder(commit) if commit else None
    for name in sorted(now.keys() | (before or {}).keys()):
        then = "" if before is None else f"{before[name]:7}"
        print(f"{name:24}{then}{now[name]:7}")


if __name__ == "__main__":
    main()
