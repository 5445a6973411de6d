"""Write the API reference as HTML, from signatures and docstrings.

`python .github/reference.py --out api` makes one page for each public module, and an index.

The public API is `minicos.__all__` and the modules in MODULES. Other names may change between
versions. Only the standard library is used, so that the page of a commit needs its package alone.
"""

import argparse
import inspect
import sys
from collections.abc import Iterator
from html import escape
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import minicos

MODULES = {  # heading -> modules
    "The model": ("sample", "hooks", "record", "wan", "open", "condition", "schedule", "config"),
    "The mathematics": ("ops", "measures", "dit", "vae", "text", "clip"),
    "Files": ("media", "runs", "activations", "verify"),
    "Studies": (
        "analysis.options",
        "analysis.result",
        "analysis.steps",
        "analysis.energy",
        "analysis.attention",
        "analysis.belief",
        "analysis.commitment",
        "analysis.plant",
        "analysis.recall",
        "analysis.counts",
        "analysis.noise.edit",
        "analysis.swap.states",
        "analysis.swap.pairs",
        "analysis.ensemble.share",
        "analysis.knockout",
    ),
    "Tools of studies": (
        "analysis.tools.cases",
        "analysis.tools.stats",
        "analysis.tools.intervals",
        "analysis.tools.posterior",
        "analysis.tools.observer",
        "analysis.tools.record",
        "analysis.tools.readout",
        "analysis.tools.interventions",
    ),
    "Puzzles": ("puzzles",),
}
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
pre{white-space:pre-wrap;font:14px/1.45 ui-monospace,monospace;margin:.4rem 0 1.2rem}
pre.signature{background:#8881;padding:.5rem;border-left:3px solid #888;margin:1rem 0 .2rem}
section section{margin-left:2rem}
@media (prefers-color-scheme:dark){body{background:#111;color:#ddd}a{color:#8bf}}"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pages")
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in minicos.__all__ if not name.startswith("_")]
    front = [(name, getattr(minicos, name)) for name in names]
    _write(out, "minicos", _module(minicos, front))
    index = ["<h1>minicos: API reference</h1>", "<h2>import minicos</h2>", _links("minicos", front)]
    for heading, modules in MODULES.items():
        index.append(f"<h2>{escape(heading)}</h2>")
        for short in modules:
            module = import_module(f"minicos.{short}")
            members = list(_members(module))
            _write(out, module.__name__, _module(module, members))
            first = (inspect.getdoc(module) or "").partition("\n\n")[0]
            title = f'<a href="{module.__name__}.html">{module.__name__}</a>'
            index.append(f"<p>{title}: {escape(first)}<br>{_links(module.__name__, members)}</p>")
    _write(out, "index", "\n".join(index))
    return 0


def _members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public classes and functions of a module, in the order in which they are written."""
    stated = getattr(module, "__all__", None)
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        public = name in stated if stated is not None else own and not name.startswith("_")
        if public and (inspect.isclass(value) or inspect.isfunction(value)):
            yield name, value


def _links(page: str, members: list[tuple[str, Any]]) -> str:
    return ", ".join(f'<a href="{page}.html#{name}">{name}</a>' for name, _ in members)


def _module(module: ModuleType, members: list[tuple[str, Any]]) -> str:
    head = f'<p><a href="index.html">minicos</a></p><h1>{module.__name__}</h1>{_prose(module)}'
    return head + "\n".join(_entry(name, name, value) for name, value in members)


def _entry(anchor: str, name: str, value: Any) -> str:
    """A class with its methods and properties, or a function."""
    kind = "class " if inspect.isclass(value) else ""
    parts = [f'<section id="{anchor}"><pre class="signature">{kind}{_signature(name, value)}</pre>']
    parts.append(_prose(value))
    if inspect.isclass(value):
        for method, raw in vars(value).items():
            function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
            function = function.fget if isinstance(function, property) else function
            if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
                parts.append(_entry(f"{anchor}.{method}", method, function))
    return "".join([*parts, "</section>\n"])


def _signature(name: str, value: Any) -> str:
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return escape(name)
    if len(text) > 80:
        text = text.replace("(", "(\n    ", 1).replace(", ", ",\n    ")
    return escape(name + text)


def _prose(value: Any) -> str:
    doc = inspect.getdoc(value) or ""
    written = not doc.startswith(
        f"{getattr(value, '__name__', '')}("
    )  # a dataclass's own signature
    return f"<pre>{escape(doc)}</pre>" if doc and written else ""


def _write(out: Path, name: str, body: str) -> None:
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
    page = f"{head}<style>{STYLE}</style>\n{body}</html>\n"
    (out / f"{name}.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
