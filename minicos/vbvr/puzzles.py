"""The embedded model's benchmark: held-out puzzles of every family in the benchmark's layout, with
their own scorers.

Families that the model is trained on are in-domain, the others out-of-domain, and each family is a
task of its category. Puzzles are written as files and read back like any other samples, and videos
are also scored from their files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicos import puzzles
from minicos.errors import MinicosError
from minicos.media import load_video
from minicos.puzzles import FAMILIES, Family, Puzzle
from minicos.runs import progress, write_json
from minicos.vbvr import tree
from minicos.vbvr.cases import Found, Sample
from minicos.vbvr.evalkit import Scored
from minicos.vbvr.fit import resize

# pixels are repeated in the files, since a video's colours have half the resolution of its
# brightness
SCALE = 4
SPLIT_OF = {"in": "In-Domain_50", "out": "Out-of-Domain_50"}


def write(folder: Path, count: int, split: str = "test") -> None:
    """Write `count` distinct puzzles of a split, as evenly over the families as possible (see
    `_in_turns`); existing ones are kept.
    """
    for name, puzzle, about in _planned(count, split):
        there = folder / name
        if not there.exists():
            _write(there, puzzle)
        if not (there / "metadata.json").exists():
            write_json(there / "metadata.json", about)


def planned(folder: Path, count: int, split: str = "test") -> Found:
    """What `write` would write and `cases.read` would read, without files."""
    samples = []
    for name, puzzle, about in _planned(count, split):
        height, width = (side * SCALE for side in puzzle.first_frame().shape[:2])
        picture = folder / name / "first_frame.png"
        samples.append(
            Sample(name, picture, puzzle.prompt, (height, width), None, puzzle.frames, about)
        )
    return Found(folder, tuple(sorted(samples, key=lambda sample: sample.name)), {})


def _planned(count: int, split: str) -> Iterator[tuple[str, Puzzle, dict[str, Any]]]:
    """The puzzles of a benchmark: name of the sample, puzzle, metadata."""
    for place, (name, family) in enumerate(_in_turns()):
        each = count // len(FAMILIES) + (place < count % len(FAMILIES))
        for index, (seed, puzzle) in enumerate(_distinct(family, each, split).items()):
            about = metadata(family, seed, split, SCALE)
            yield f"{SPLIT_OF[family.domain]}/{name}/{index:05d}", puzzle, about


def metadata(family: Family, seed: int, split: str, scale: int) -> dict[str, Any]:
    """What metadata.json says of a puzzle of one of `FAMILIES`, by which it is drawn and scored
    again; `scale` is how often its pixels are repeated.
    """
    category = family.category.capitalize()
    return {
        "category": category,
        "family": family.name,
        "seed": seed,
        "split": split,
        "scale": scale,
    }


def _in_turns() -> list[tuple[str, Family]]:
    """The families, the first of every category and domain first, so that even a few puzzles cover
    many kinds.
    """
    turns: Counter[tuple[str, str]] = Counter()
    ranked = []
    for name, family in FAMILIES.items():
        kind = (family.category, family.domain)
        ranked.append((turns[kind], name, family))
        turns[kind] += 1
    return [(name, family) for _, name, family in sorted(ranked, key=lambda one: one[0])]


def _write(folder: Path, puzzle: Puzzle) -> None:
    try:
        puzzles.export(puzzle, 0, folder, SCALE)
    except OSError as error:
        if not folder.exists():  # otherwise another process was faster
            raise MinicosError(f"cannot write {folder}: {error}. Choose another --out.") from error


def _distinct(family: Family, count: int, split: str) -> dict[int, Puzzle]:
    """The first `count` puzzles of a family with distinct pictures or prompts, by their seeds."""
    found: dict[int, Puzzle] = {}
    seen: set[tuple[str, str]] = set()
    for seed in range(100 * count):
        puzzle = family.draw(seed, split)
        if (puzzle.key, puzzle.prompt) not in seen:
            seen.add((puzzle.key, puzzle.prompt))
            found[seed] = puzzle
        if len(found) == count:
            break
    if len(found) < count:
        raise MinicosError(
            f"{family.name} has no {count} distinct puzzles in its {split} split: ask for fewer."
        )
    return found


def known(sample: Sample) -> bool:
    """Whether a sample's metadata identify its puzzle."""
    return {"family", "seed", "split"} <= sample.metadata.keys() and not sample.pro


def puzzle(sample: Sample) -> Puzzle:
    """The puzzle of a sample that `write` wrote. Raises MinicosError if its metadata name none."""
    try:
        name, seed, split = (sample.metadata[key] for key in ("family", "seed", "split"))
        return puzzles.family(str(name)).draw(int(seed), str(split))
    except (KeyError, ValueError, TypeError) as error:
        raise MinicosError(
            f"{sample.name}: metadata.json names no puzzle ({error}). Write the puzzles again."
        ) from error


@dataclass(frozen=True)
class Verdicts:
    """The two scores of a tree: graded (the weighted rules, 0 to 1) and strict (solved or not)."""

    graded: Scored
    strict: Scored


def score(videos: Path, samples: Mapping[str, Sample]) -> Verdicts:
    """Score a tree of videos by the puzzles' own rules. A missing or unreadable video counts as
    failed.
    """
    graded: dict[str, float] = {}
    solved: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, sample in progress(samples.items(), label=f"score {videos.name}"):
        try:
            asked, video = puzzle(sample), load_video(tree.path(videos, name))
            verdict = asked.score(resize(video, asked.first_frame().shape[:2]))
        except ValueError as error:  # includes MinicosError
            failed[name] = str(error)
            continue
        graded[name], solved[name] = verdict.score, float(verdict.solved)
    return Verdicts(Scored(graded, failed), Scored(solved, failed))
