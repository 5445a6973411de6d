"""`minicos run --knockout`: from words on the command line to a `Knockout`.

frame:0 to frame:2 layers:0-5       information from latent frame 0 does not reach frame 2
frame:0 rows:0-1 columns:2 to all   from these tokens (of the token grid) to any
word:circle to frame:1-3            from a word of the prompt; `text` is all of the text,
                                    `padding` the rows after the prompt
causal                              from any frame to earlier ones
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from minicos.analysis.options import spans
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.analysis.knockout import Cut, Flow, Knockout, Text, Tokens
    from minicos.analysis.tools.shown import Where
    from minicos.video_model import VideoModel

HELP = (
    "cut attention from tokens to tokens: frame:0 to frame:2, with layers:0-5 steps:0-9"
    " branch:cond where not everywhere; instead of a frame: rows:0-1 columns:2, word:circle, text,"
    " padding, all; or causal; control:0 cuts as many random pairs instead; may be repeated"
)
SIDES = ("frame", "rows", "columns")
PLACES = ("latent frames", "rows of tokens", "columns of tokens")
LIMITS = ("layers", "steps", "branch", "control")
TEXTS = ("text", "padding", "word")  # the rows of the last two depend on the prompt


def read(
    parts: Sequence[str], steps: int, depth: int, branches: Sequence[str] = ("cond", "uncond")
) -> "Knockout":
    """The knockout that the words after one --knockout describe, for a run with so many steps and
    blocks and these passes. If it names a word or the padding, `resolve` inserts the rows.

    Raises:
        MinicosError: the words have no meaning.
    """
    from minicos.analysis.knockout import Causal, Knockout

    option = f"--knockout {' '.join(parts)}"
    named = {name: value for name, value in map(_split, parts) if name in LIMITS}
    sides = _sides(parts)
    if len(named) + len(sides) != len(parts):
        raise MinicosError(f"{option}: it says a thing twice")
    cut: Cut = Causal() if sides == ["causal"] else _flow(option, sides)
    own = any(_split(part)[0] in TEXTS[1:] for part in sides)  # rows that depend on the prompt
    branch = named.get("branch", "cond" if own else "both")
    if branch not in (*branches, "both") or (own and branch != "cond"):
        raise MinicosError(
            f"{option}: the branch is {', '.join(branches)} or both (all), and cond for words of "
            "the prompt"
        )
    knockout = Knockout(
        cut,
        layers=_numbers(option, "layers", named.get("layers"), depth),
        steps=_numbers(option, "steps", named.get("steps"), steps),
        branch=None if branch == "both" else branch,
    )
    if "control" not in named:
        return knockout
    if not named["control"].isdecimal() or len(named["control"]) > 9:
        raise MinicosError(
            f"{option}: control:0 takes a whole number, the seed of the random pairs"
        )
    return knockout.control(int(named["control"]))


def check_word(parts: Sequence[str], prompt: str | None) -> None:
    """Raise MinicosError for a word that the prompt lacks, before a model is read."""
    from minicos.words import bare

    for name, value in map(_split, parts):
        if name == "word" and bare(value) not in map(bare, (prompt or "").split()):
            raise MinicosError(f"--knockout word:{value}: the prompt {prompt or ''!r} lacks it")


def check_places(parts: Sequence[str], grid: tuple[int, int, int]) -> None:
    """Raise MinicosError for a frame, row or column that this token grid lacks, before a model is
    read.
    """
    sizes = dict(zip(SIDES, zip(PLACES, grid, strict=True), strict=True))
    for name, value in map(_split, parts):
        if name in sizes:
            _numbers(f"--knockout {' '.join(parts)}", sizes[name][0], value, sizes[name][1])


def resolve(
    knockout: "Knockout", parts: Sequence[str], wan: "VideoModel", prompt: str | None
) -> "Knockout":
    """The knockout with the text rows of its word or padding, and in the attention that reads the
    text.
    """
    from minicos.analysis.knockout import Flow, Scattered, Text

    name, value = _split(_sides(parts)[0])
    if name not in TEXTS:
        return knockout
    cut = knockout.cut
    flow = cut.cut if isinstance(cut, Scattered) else cut
    assert isinstance(flow, Flow)
    flow = replace(flow, joint="cross_attn" not in wan.sublayers)
    if name in TEXTS[1:]:
        flow = replace(flow, source=Text(_rows(wan, name, value, prompt)))
    return replace(knockout, cut=replace(cut, cut=flow) if isinstance(cut, Scattered) else flow)


def _rows(wan: "VideoModel", name: str, value: str, prompt: str | None) -> tuple[int, ...]:
    """The text rows of a word of the prompt, or those of the padding."""
    from minicos.wan import as_wan
    from minicos.words import rows

    tokenizer = as_wan(wan, f"--knockout {name}").tokenizer
    if name == "word":
        return rows(tokenizer, prompt or "", value)
    _, mask = tokenizer([prompt or ""])
    return tuple((mask[0] == 0).nonzero().flatten().tolist())


def check_grid(
    knockout: "Knockout", parts: Sequence[str], grid: tuple[int, int, int], keys: int | None
) -> None:
    """Raise MinicosError if it names a token outside the video, or cuts nothing."""
    if not knockout.cuts(grid, keys if knockout.cut.text else None):
        raise MinicosError(f"--knockout {' '.join(parts)}: nothing would be cut")


def where(knockout: "Knockout", parts: Sequence[str]) -> "Where":
    """Where it acts, for the page of its run: steps, layers, and the frames that lose keys."""
    from minicos.analysis.knockout import Flow, Scattered
    from minicos.analysis.tools.shown import Where

    cut = knockout.cut
    flow = cut.cut if isinstance(cut, Scattered) else cut
    target = flow.target if isinstance(flow, Flow) else None
    frames = () if target is None or target.outside else target.frames or ()
    steps, layers = tuple(knockout.steps or ()), tuple(knockout.layers or ())
    return Where(f"knockout: {' '.join(parts)}", steps, frames, layers)


def _sides(parts: Sequence[str]) -> list[str]:
    return [part for part in parts if _split(part)[0] not in LIMITS]


def _flow(option: str, sides: list[str]) -> "Flow":
    from minicos.analysis.knockout import Flow, Text

    if sides.count("to") != 1 or sides[0] == "to" or sides[-1] == "to":
        raise MinicosError(f"{option}: give two sides, such as frame:0 to frame:2, or causal")
    middle = sides.index("to")
    source = _tokens(option, sides[:middle], source=True)
    target = _tokens(option, sides[middle + 1 :])
    if isinstance(target, Text):
        raise MinicosError(f"{option}: the text looks at nothing; it can only be the first side")
    return Flow(source, target)


def _tokens(option: str, words: list[str], source: bool = False) -> "Tokens | Text":
    """One side: tokens of the video, or rows of the text."""
    from minicos.analysis.knockout import Text, Tokens

    pairs = [_split(word) for word in words]
    names = [name for name, _ in pairs]
    if len(pairs) == 1 and names[0] in TEXTS and (names[0] == "word") == bool(pairs[0][1]):
        return Text()
    if words == ["all"]:
        return Tokens()
    if not set(names) <= set(SIDES) or len(set(names)) != len(names):
        wanted = "frame:0, rows:0-1, columns:2 or all" + ", text, padding or word:circle" * source
        raise MinicosError(f"{option}: {' '.join(words)} is not {wanted}")
    frames, rows, columns = (_numbers(option, name, dict(pairs).get(name)) for name in SIDES)
    return Tokens(frames, rows, columns)


def _numbers(
    option: str, name: str, text: str | None, count: int | None = None
) -> tuple[int, ...] | None:
    """Numbers from "0,3-5"; None for all. `count` is the number of possible values."""
    if text is None or text == "all":
        return None
    found = sorted({i for a, b in spans(text, f"{option}: {name}") for i in range(a, b + 1)})
    if count is not None and found[-1] >= count:
        raise MinicosError(f"{option}: this run has {name} 0 to {count - 1}.")
    return tuple(found)


def _split(part: str) -> tuple[str, str]:
    name, _, value = part.partition(":")
    return name, value
