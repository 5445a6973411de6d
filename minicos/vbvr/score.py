"""Score trees of videos, with a cache: a tree whose files have not changed is not scored again."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import file_digest, sha256
from pathlib import Path
from statistics import fmean
from types import MappingProxyType

from minicos.analysis import result
from minicos.analysis.result import Result, Row
from minicos.analysis.tools.shown import list_videos
from minicos.errors import MinicosError
from minicos.runs import Run
from minicos.vbvr import evalkit, puzzles, steps, table, tree
from minicos.vbvr.cases import Sample
from minicos.vbvr.conditions import BASELINES
from minicos.vbvr.evalkit import Kit, Scored
from minicos.vbvr.steps import Estimates


def trees(
    folders: Mapping[str, Path],
    samples: Mapping[str, Sample],
    memory: Path,
    truth: Path,
    kit: Kit | None,
    seen: Callable[[str, Mapping[str, Scored]], object] = lambda name, kinds: None,
) -> dict[str, dict[str, Scored]]:
    """Scores of every tree: kind of score -> tree -> scores. Puzzles have a second kind, "solved",
    the strict verdict.

    Args:
        folders: name of the tree -> its folder.
        memory: folder of the cache.
        truth: the benchmark's folder.
        kit: the scorer; None: the puzzles' own.
        seen: called with each tree and its kinds of scores as soon as they are known.
    """
    out: dict[str, dict[str, Scored]] = {"score": {}} if kit else {"score": {}, "solved": {}}
    for name, folder in folders.items():
        kinds = _tree(name, folder, samples, memory, truth, kit)
        seen(name, kinds)
        for kind, scored in kinds.items():
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
    """The scores of one tree, from the cache if nothing changed. If the scorer fails, no video of
    the tree has a score, and the next run tries again.
    """
    kinds = ("score",) if kit else ("score", "solved")
    remembered, file, known = Run(memory, {}), f"{name}.json", _fingerprint(folder, samples, kit)
    if remembered.has(file):
        kept = remembered.load_json(file)
        if kept["fingerprint"] == known:
            return {kind: Scored(**one) for kind, one in kept["scored"].items()}
    count = sum(tree.path(folder, sample).is_file() for sample in samples)
    if not count:
        return {kind: Scored({}, dict.fromkeys(samples, "no video")) for kind in kinds}
    if kit:
        what = f"{kit.scorer.name} scores {name}: {count} videos, a second or more each"
        print(f"minicos: {what}", file=sys.stderr, flush=True)
        try:
            scored = {"score": evalkit.score(kit, folder, truth, list(samples))}
        except MinicosError as error:
            return {kind: Scored({}, dict.fromkeys(samples, str(error))) for kind in kinds}
    else:
        verdicts = puzzles.score(folder, samples)
        scored = {"score": verdicts.graded, "solved": verdicts.strict}
    plain = {kind: {"scores": one.scores, "failed": one.failed} for kind, one in scored.items()}
    remembered.save_json(file, {"fingerprint": known, "scored": plain})
    return scored


def _fingerprint(folder: Path, samples: Mapping[str, Sample], kit: Kit | None) -> str:
    """A fingerprint of the existing videos and of the scorer."""
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
    run: Run,
    base: str,
    references: Sequence[Row] = (),
    estimates: Mapping[str, Estimates] = MappingProxyType({}),
) -> Iterator[tuple[str, Path, Result]]:
    """Write the tables of every kind of score into the folder of `run`; yields the kind, its folder
    and the result.

    Args:
        base: the condition that others are compared with.
        references: rows of other systems, for the first kind.
        estimates: the trees of clean estimates of steps, and the runs they belong to.
    """
    first = next(iter(samples))
    made_here = {  # and scored, hence readable
        name: f"{name}/{first}.mp4"
        for name, scored in found["score"].items()
        if name not in estimates and first in scored.scores
    }
    list_videos(
        run,
        {file: f"{name}, {first}" for name, file in made_here.items() if run.path(file).is_file()},
    )
    for kind, scored in found.items():
        whole = _scores(scored, samples)
        final = _scores({k: v for k, v in scored.items() if k not in estimates}, samples)
        own = run if kind == "score" else run.inside(kind)
        others = references if kind == "score" else ()
        made = table.result(final, base, run.settings, others, kind)
        if estimates:
            rows = steps.rows(whole, estimates)
            lines = steps.curves(rows)
            steps.draw(own.path("steps.png"), lines, _levels(final))
            made = replace(
                made,
                numbers=(*made.numbers, *steps.numbers(rows)),
                tables={**made.tables, "steps": rows},
                curves=lines,
                files=(*made.files, "steps.png"),
            )
        made = table.write(own.folder, whole, base, made, kind)
        result.write(own, made)
        yield kind, own.folder, made


def lines(
    name: str, kinds: Mapping[str, Scored], estimates: Mapping[str, Estimates]
) -> Iterator[dict[str, object]]:
    """The scores of every sample of a tree, for a journal."""
    where: dict[str, object] = {"what": "vbvr", "condition": name}
    if at := estimates.get(name):
        where |= {"condition": at.of, "step": at.step, "sigma": at.sigma}
    failed = kinds["score"].failed
    for sample in (*kinds["score"].scores, *failed):
        values = {kind: scored.scores.get(sample) for kind, scored in kinds.items()}
        why = {"failed": failed[sample]} if sample in failed else {}
        yield {**where, "sample": sample, **values, **why}


def _scores(scored: Mapping[str, Scored], samples: Mapping[str, Sample]) -> table.Scores:
    return table.Scores(
        {name: one.scores for name, one in scored.items()},
        samples,
        {name: one.failed for name, one in scored.items()},
    )


def _levels(scores: table.Scores) -> dict[str, float]:
    """The mean scores of the baselines that exist, by descriptive names."""
    made = {name: scores.by_condition.get(name) for name in BASELINES}
    means = {name: fmean(values.values()) for name, values in made.items() if values}
    return {f"{name} ({mean:.2f})": mean for name, mean in means.items()}
