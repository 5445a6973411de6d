"""A target of `tests.fuzz`: command lines, which must be refused before any work begins."""

import argparse
import io
import random
import re
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from unittest.mock import patch

from minicos.cli import main, parser
from minicos.errors import MinicosError, printable
from tests.fuzz import Opened, target
from tests.fuzz_media import picture

VALUES = (
    *("nan", "inf", "-inf", "1e400", "-1", "0", "1000000000", "1" + "0" * 20, "9" * 5000, "0x10"),
    *("", " ", "\udcff", "\u2603", "a" * 5000, "1e-320", "1,2,", ",", "0-", "5-2", "1,1", "-0.5"),
    *("None", "..", "/dev/zero", "\x1b[31m", "high=nan", "low=", "=", "step:", "step:9 frame:9"),
    *("%s%n", "{}", "\u0661\u0662", "x=y:nan", "0x0", "1x1", "99999x99999", "1/0", "5/4", "plain"),
    *("steps=nan", "noise:step=-1", "swap:layer=99", "ensemble:window=9-1", "frames=0", "no-such"),
)
PICTURE = "cases/00000/first_frame.png"
NEEDED = {  # what a verb requires
    "generate": ("--prompt", "solve the maze", "--image", PICTURE),
    "run": ("--prompt", "solve the maze", "--image", PICTURE),
    "vbvr": ("--puzzles", "2"),
    "capture": ("--cases", "cases", "--points", "blocks.*"),
    "inspect": ("tiny",),
    "bench": ("forward",),
}
WORK = (  # where the work of verbs begins
    *("minicos.cli.opening.load", "minicos.open.load", "minicos.cli.puzzles._write"),
    *("minicos.vbvr.puzzles.write", "minicos.bench.measure.header"),
)


class Begun(Exception):
    """The options were taken."""


@cache
def options() -> dict[str, list[argparse.Action]]:
    """Verb -> its options."""
    (verbs,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: [a for a in verb._actions if a.option_strings and a.dest != "help"]
        for name, verb in verbs.choices.items()
    }


@target("options", names=lambda message, folder: True)  # see `called`
def absurd_options(draw: random.Random, folder: Path) -> Opened:
    """A verb with one or two options that hold anything."""
    (image := folder / PICTURE).parent.mkdir(parents=True)
    image.write_bytes(picture("PNG", "RGB", 1))
    image.with_name("prompt.txt").write_text("solve the maze")
    verb = draw.choice(list(options()))
    argv = [verb, *(str(folder / w) if w[:5] == "cases" else w for w in NEEDED.get(verb, ()))]
    known = options()[verb]
    for action in draw.sample(known, min(len(known), draw.choice((1, 1, 2)))):
        flag = draw.choice(action.option_strings)
        if action.nargs == 0:
            argv.append(flag)
        elif action.dest != "download":
            argv.append(f"{flag}={draw.choice(VALUES)}")
    if any(action.dest == "out" for action in known) and draw.random() < 0.9:
        argv += ["--out", str(folder / "out")]
    return lambda: called(argv)


def called(argv: list[str]) -> None:
    """Run a command up to its work. Raises MinicosError with its message."""
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        for place in WORK:
            stack.enter_context(patch(place, side_effect=Begun))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            code: object = main(argv)
        except Begun:
            return
        except SystemExit as stopped:
            code = stopped.code
    if code == 0:
        return
    *notes, said = err.getvalue().removesuffix("\n").split("\n")
    assert code == 2, f"{argv}: exit {code}, {said[:200]}"
    assert all(line.startswith("minicos: ") for line in (*notes, said)), f"{argv}: {said[:200]}"
    given = [
        part
        for word in argv
        for part in (word, *word.split("=", 1), *re.split("[=,]", word))
        if part
    ]
    if "--puzzle=" in argv:
        given.append("unknown family ''")
    if "--image" not in argv:  # what the model requires
        given.append("give an image with --image")
    assert any(printable(part)[:40] in said for part in given), f"{argv}: {said[:200]}"
    raise MinicosError(said)
