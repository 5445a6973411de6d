"""A study as a verb: options from the fields of its dataclass, its run folder, its numbers on the
terminal.

Defaults and help texts are those of `analysis/options.py`; `minicos reproduce` passes the same
objects to the same studies.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

from minicos.analysis.options import OWN, PUZZLES, Cases, FramesOptions, Puzzles, option_fields
from minicos.cli import each, opening, options, run_folder, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.analysis.outline import Outline
    from minicos.analysis.result import Result
    from minicos.analysis.tools.cases import Case
    from minicos.runs import Run
    from minicos.video_model import VideoModel

O = TypeVar("O")  # noqa: E741  the options of a study
MEASURED = "what is measured"  # heading of --help
NO_PUZZLES = "is an option of held-out puzzles: leave it out, or the --prompt"
NO_PROMPT = "is an option of a case of your own: give a --prompt"
Study = Callable[["VideoModel", "Run", Any], "Result"]


def add(
    verbs: Any,
    name: str,
    help: str,
    examples: str,
    cls: type,
    run: Callable[[argparse.Namespace], Any],
) -> options.Parser:
    """Add the verb of a study with all options of `cls`."""
    parser = options.add_parser(verbs, name, help, examples, run)
    add_json(parser)
    add_options(parser, cls)
    if issubclass(cls, Cases):
        own = parser.group(OWN)
        options.add_sampling_of_own(own, frames=cls is not FramesOptions)
        each.add(parser, own)
    options.add_model_options(parser, out=f"runs/{name}")
    options.add_jsonl(parser)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json, for verbs that compute numbers."""
    parser.add_argument(
        "--json", action="store_true", help="print the numbers as JSON, those of results.json"
    )


def add_options(
    parser: options.Parser,
    cls: type,
    only: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    heading: str = "",
) -> None:
    """Add the options of a class of `analysis/options.py`: all, all `without` some, or `only` some,
    with other defaults; all under one `heading`, if given, instead of their own.
    """
    for field, flags, hint in option_fields(cls):
        if field.name in without or (only is not None and field.name not in only):
            continue
        help = field.metadata["help"]
        default = field.default if only is None else only[field.name]
        if default not in (None, (), False):
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            help = f"{help} (default: {shown})"
        how = {"action": "store_true"} if hint is bool else _reader(hint, field.metadata["least"])
        parser.group(heading or field.metadata["group"] or MEASURED).add_argument(
            *(flags if only is None else flags[:1]),
            dest=_dest(flags),
            default=default,
            help=help,
            **how,
        )


def _dest(flags: Sequence[str]) -> str:
    """The attribute in which argparse stores an option: `in` for --in. The field's name would not
    do, since frames of a video and of noise would collide.
    """
    return flags[0].removeprefix("--").replace("-", "_")


def _reader(hint: Any, least: int | None) -> dict[str, Any]:
    """The argparse arguments that turn text into a value of a field's type."""
    optional = get_origin(hint) in (Union, UnionType)
    if optional:
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        part = values.number if kind is float else kind
        return {"type": values.indices_or_none if kind is int else partial(values.listed, part)}
    if hint is int:
        whole = values.layer if least is None else values.whole(least, values.MOST_PUZZLES)
        return {"type": values.or_none(whole) if optional else whole}
    return {"type": values.number if hint is float else hint}


def read(args: argparse.Namespace, cls: type[O]) -> O:
    """The options on a command line, as an object of `cls`."""
    given = vars(args)
    found = {field.name: given[_dest(flags)] for field, flags, _ in option_fields(cls)}
    return cls(**found, **{"seed": args.seed})


def run(
    args: argparse.Namespace,
    cls: type,
    study: Study,
    *,
    check: Callable[["Outline", Any], None] | None = None,
    load: Callable[[argparse.Namespace, Any], "VideoModel"] | None = None,
) -> "Run":
    """Run a study and print its results. `check` refuses what the run cannot do, before weights are
    read and a folder is created.
    """
    asked: Any = read(args, cls)
    refuse_mixed(args, asked)
    files = opening.layout_or_peer(args)
    opening.within(getattr(asked, "at", None), opening.plan(args, files).steps)
    outline = opening.outline(args, files)
    if check is not None and outline is not None:
        check(outline, asked)
    wan = open_model(args, asked) if load is None else load(args, asked)
    if check is not None and outline is None:
        check(wan, asked)
    folder = run_folder.open_run(args, wan, [], **about(args, asked))
    show(args, folder, study(wan, folder, asked))
    return folder


def open_model(
    args: argparse.Namespace, asked: Any, made: "Sequence[Case] | None" = None, euler: bool = False
) -> "VideoModel":
    """The model of a study: with memory for its picture, and for puzzles only one trained on them.

    Args:
        made: the cases to run on, instead of `cases.chosen`.
        euler: use Euler unless a solver is requested, since an edit of the latent makes a multistep
            solver restart.
    """
    from minicos.analysis.tools import cases

    files, own = opening.layout_or_peer(args), _own(asked)
    if not own and files.variant != "tiny":
        raise MinicosError(
            f"the puzzles are for the embedded model, not for {files.variant}: give a --prompt"
        )
    if made is None:
        made = cases.chosen(asked) if isinstance(asked, Puzzles) else []
    wan = opening.load(args, files, made[0].image if own else None)
    return wan.with_preset(solver="euler") if euler and not args.solver else wan


def refuse_mixed(args: argparse.Namespace, asked: Any) -> None:
    """Raise MinicosError for options of held-out puzzles together with a case of the user's own,
    and for options of such a case without one.
    """
    own = _own(asked)
    refuse(args, type(asked), PUZZLES if own else OWN, NO_PUZZLES if own else NO_PROMPT)


def _own(asked: Any) -> bool:
    """Whether the options ask for a case of the user's own."""
    return getattr(asked, "prompt", None) is not None or bool(getattr(asked, "probe", None))


def refuse(args: argparse.Namespace, cls: type, group: str, why: str) -> None:
    """Raise MinicosError for an option of a group that would be ignored."""
    for field, flags, _ in option_fields(cls):
        given = vars(args)[_dest(flags)]
        if field.metadata["group"] == group and given not in (None, field.default):
            raise MinicosError(f"{flags[0]} {why}")


def about(args: argparse.Namespace, asked: Any) -> dict[str, Any]:
    """The options among a run's settings: an image counts by its pixels, not by its name."""
    found = asdict(asked)
    if found.get("image") is not None:
        found |= run_folder.subject(args, opening.images(args))
    return found


def show(args: argparse.Namespace, folder: "Run", found: "Result") -> None:
    """Print numbers and tables, and where the pictures are; with --json, only the result, in one
    line.
    """
    if not printed(args, folder, found):
        print(listed(folder, found.files))
    run_folder.close(args, folder)


def listed(folder: "Run", files: Sequence[str]) -> str:
    """The first of these files of a run, and how many more there are."""
    first, *rest = files
    return f"{folder.path(first)}{f'  (and {len(rest)} more)' if rest else ''}"


def printed(args: argparse.Namespace, folder: "Run", found: "Result") -> bool:
    """Print what a run found: as a table for people or, with --json, as one line, after which
    nothing else may follow; says which.
    """
    import json

    from minicos.analysis.result import FILE
    from minicos.runs import read_json

    as_json = bool(getattr(args, "json", False))
    if as_json:
        print(json.dumps(read_json(folder.path(FILE)), ensure_ascii=False))
    elif text := found.text():
        print(text)
    return as_json
