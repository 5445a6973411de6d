"""Score trees of videos, and remember it: a tree whose files have not changed is not scored
again.
"""

from collections.abc import Iterator, Mapping
from hashlib import file_digest, sha256
from pathlib import Path

from minicos.analysis import result
from minicos.analysis.result import Result
from minicos.errors import MinicosError
from minicos.runs import Run, read_json, write_json
from minicos.vbvr import evalkit, puzzles, table, tree
from minicos.vbvr.cases import Sample
from minicos.vbvr.evalkit import Kit, Scored


def trees(
    folders: Mapping[str, Path],
    samples: Mapping[str, Sample],
    memory: Path,
    truth: Path,
    kit: Kit | None,
) -> dict[str, dict[str, Scored]]:
    """Scores of every tree: kind of score -> tree -> scores. Puzzles have a second kind, "solved",
    the strict verdict.

    folders  name of the tree -> its folder
    memory   the folder that keeps what was scored
    truth    the benchmark's folder
    kit      the scorer; None: the puzzles' own
    """
    out: dict[str, dict[str, Scored]] = {"score": {}} if kit else {"score": {}, "solved": {}}
    for name, folder in folders.items():
        for kind, scored in _tree(name, folder, samples, memory, truth, kit).items():
            out[kind][name] = scored
    return out


def _tree(
    name: str,
    folder: Path,
    samples: Mapping[str, Sample],
    memory: Path,
    truth: Path,
    kit: Kit | None,
) -> dict[str, Scored]:
    place, known = memory / f"{name}.json", _fingerprint(folder, samples, kit)
    if place.exists():
        kept = read_json(place)
        if isinstance(kept, dict) and kept.get("fingerprint") == known:
            return {kind: Scored(**one) for kind, one in kept["scored"].items()}
    if not folder.is_dir():
        absent = dict.fromkeys(samples, "no video")
        return {kind: Scored({}, absent) for kind in (("score",) if kit else ("score", "solved"))}
    if kit:
        scored = {"score": evalkit.score(kit, folder, truth, list(samples))}
    else:
        verdicts = puzzles.score(folder, samples)
        scored = {"score": verdicts.graded, "solved": verdicts.strict}
    plain = {kind: {"scores": one.scores, "failed": one.failed} for kind, one in scored.items()}
    write_json(place, {"fingerprint": known, "scored": plain})
    return scored


def _fingerprint(folder: Path, samples: Mapping[str, Sample], kit: Kit | None) -> str:
    """Of the videos that are there and of the scorer."""
    digest = sha256(f"{kit}".encode())
    for name in samples:
        video = tree.path(folder, name)
        digest.update(f"\0{name}\0".encode())
        if video.is_file():
            try:
                with video.open("rb") as file:
                    digest.update(file_digest(file, "sha256").digest())
            except OSError as error:
                raise MinicosError(f"{video} cannot be read: {error}.") from error
    return digest.hexdigest()


def report(
    found: Mapping[str, Mapping[str, Scored]],
    samples: Mapping[str, Sample],
    out: Path,
    base: str,
    settings: Mapping[str, object],
    published: bool = False,
) -> Iterator[tuple[str, Path, Result]]:
    """Write the tables of every kind of score, and yield the kind, the folder and the result.

    base       the condition that others are held against
    published  add the papers' rows, to the kind that they are of
    """
    for kind, scored in found.items():
        scores = table.Scores(
            {name: one.scores for name, one in scored.items()},
            samples,
            {name: one.failed for name, one in scored.items()},
        )
        where = out if kind == "score" else out / kind
        made = table.result(scores, base, settings, published and kind == "score")
        table.write(where, scores, base, made)
        result.write(Run(where, dict(settings)), made)
        yield kind, where, made
