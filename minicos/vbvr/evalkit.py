"""The benchmarks' own scorers, external checkouts that run in a separate process and are never
imported: VBVR-EvalKit for VBVR-Bench, VBVR-Pro-Bench's repository for VBVR-Pro-Bench.

Scores are those of `run_evaluation.py` (the task's own rules, 0 to 1), which the published numbers
use; EvalKit's `evaluate.py` adds other terms and gives static pictures .69 where this gives .27.
VBVR-Pro-Bench has `run_evaluation_video.py`, whose results have the same form; it was read, but
never run here. The following traps are handled:

- OpenCV 5 returns detected lines in another shape; the scorer then fails internally and scores the
  sample 0. It is refused. So is numpy 2 for VBVR-Pro-Bench: others found that four tasks (G-5, G-8,
  O-18, O-19) then score 0 for every video.
- A failed sample has score 0 and a field `error`. Here it is a failure, not a score.
- EvalKit averages over the videos that were found, VBVR-Pro-Bench over all. Here the samples that
  were wanted and not scored are listed.
- The benchmarks share task names, and either scorer would score the other's videos.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minicos.errors import MinicosError
from minicos.runs import read_json
from minicos.vbvr.cases import Sample, printable

PROBE = "import json, cv2, numpy, {}; print(json.dumps([cv2.__version__, numpy.__version__]))"
REMEDY = "Make it an environment: python -m venv {0}/.venv && {0}/.venv/bin/pip install {1}"


@dataclass(frozen=True)
class Scorer:
    """The properties of one of the scorers."""

    name: str
    script: str
    imports: str  # its dependencies besides OpenCV and numpy
    install: str
    numpy: int  # the highest supported major version


EVALKIT = Scorer(
    "VBVR-EvalKit", "run_evaluation.py", "PIL, tqdm", '"opencv-python-headless<5" Pillow tqdm', 2
)
PRO = Scorer(
    "VBVR-Pro-Bench",
    "run_evaluation_video.py",
    "PIL, tqdm, scipy, skimage, norfair, easyocr",
    '"opencv-python<5" "opencv-python-headless<5" "numpy<2" -r {0}/requirements.txt',
    1,
)
SCORERS = (PRO, EVALKIT)


@dataclass(frozen=True)
class Kit:
    """A checkout that can score."""

    path: Path
    python: Path  # the interpreter that runs it
    opencv: str
    numpy: str
    scorer: Scorer = EVALKIT


@dataclass(frozen=True)
class Scored:
    """The scorer's results for one tree of videos."""

    scores: dict[str, float]  # name of the sample -> 0 to 1
    failed: dict[str, str]  # name -> what went wrong


def find(path: str | Path, python: str | Path | None = None) -> Kit:
    """The checkout at `path`, tested with the interpreter that will run it.

    Args:
        python: default: that of an environment .venv (or venv) inside the checkout, else the one
            that runs minicos.

    Raises:
        MinicosError: the checkout, OpenCV or numpy is missing, or OpenCV has version 5.
    """
    path = Path(path).resolve()
    scorer = next((one for one in SCORERS if (path / one.script).is_file()), None)
    if scorer is None:
        raise MinicosError(
            f"{path} holds no {EVALKIT.script} and no {PRO.script}. Give a checkout of "
            "Video-Reason/VBVR-EvalKit, or of Video-Reason/VBVR-Pro-Bench for its data."
        )
    remedy = REMEDY.format(path, scorer.install.format(path))
    inside = (path / name / "bin" / "python" for name in (".venv", "venv"))
    chosen = (
        Path(python) if python else next((p for p in inside if p.exists()), Path(sys.executable))
    )
    try:
        probe = _run([str(chosen), "-c", PROBE.format(scorer.imports)], path, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MinicosError(
            f"{chosen} cannot be run: {error}. Give another with --evalkit-python."
        ) from error
    if probe.returncode:
        reason = (probe.stderr.strip() or "no message").splitlines()[-1]
        raise MinicosError(f"{chosen} cannot run {scorer.name} ({reason}). {remedy}")
    opencv, numpy = json.loads(probe.stdout.splitlines()[-1])
    if int(opencv.split(".")[0]) >= 5:
        raise MinicosError(
            f"{chosen} has OpenCV {opencv}, with which {scorer.name} counts samples as 0 where its "
            f"line detection fails. {remedy}"
        )
    if int(numpy.split(".")[0]) > scorer.numpy:
        raise MinicosError(
            f"{chosen} has numpy {numpy}, with which {scorer.name} counts whole tasks as 0. "
            f"{remedy}"
        )
    return Kit(path, chosen, opencv, numpy, scorer)


def check(kit: Kit, samples: Sequence[Sample]) -> None:
    """Raise MinicosError if the scorer belongs to the other benchmark."""
    for sample in samples:
        wanted = PRO if sample.pro else EVALKIT
        if wanted is not kit.scorer:
            raise MinicosError(
                f"{sample.name} is of {'VBVR-Pro-Bench' if sample.pro else 'VBVR-Bench'}, and "
                f"{kit.path} is a checkout of {kit.scorer.name}. Give one of {wanted.name}."
            )


def score(kit: Kit, videos: Path, truth: Path, wanted: Sequence[str]) -> Scored:
    """Score the tree `videos` against the benchmark's folder `truth`.

    Args:
        wanted: names of the samples that should have a score; a missing one counts as failed.

    Raises:
        MinicosError: the scorer itself fails, or its output cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="minicos-evalkit-") as out:
        given = {
            "--model_path": videos.resolve(),
            "--gt_base": truth.resolve(),
            "--output_dir": out,
            "--device": "cpu",
        }
        options = [str(word) for pair in given.items() for word in pair]
        command = [str(kit.python), kit.scorer.script, *options]
        done = _run(command, kit.path)
        results = sorted(Path(out).glob("*_vbvr_results.json"))
        if done.returncode or len(results) != 1:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise MinicosError(
                f"{kit.scorer.name} failed on {videos} with exit code {done.returncode}: "
                f"{printable(last)} Run it by hand: {shlex.join(command)}"
            )
        return parse(read_json(results[0]), wanted)


def parse(result: object, wanted: Sequence[str]) -> Scored:
    """Scores and failures from the scorer's output. Raises MinicosError if it has another form."""
    scores: dict[str, float] = {}
    failed: dict[str, str] = {}
    try:
        for one in result["samples"]:  # type: ignore[index]  # errors are reported below
            name = f"{one['folder']}/{one['task_name']}/{one['video_file'].removesuffix('.mp4')}"
            value = float(one["score"])
            if one["error"] is not None:
                failed[name] = str(one["error"])
            elif not (math.isfinite(value) and 0 <= value <= 1):
                failed[name] = f"a score of {value}, which is not between 0 and 1"
            else:
                scores[name] = value
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MinicosError(
            f"the scorer's results have another form than expected ({error!r}). Use the revision "
            "that weights.md names."
        ) from error
    for name in wanted:
        if name not in scores and name not in failed:
            failed[name] = "the scorer left it out: no video, or a task that it does not know"
    return Scored(
        {name: scores[name] for name in wanted if name in scores},
        {name: failed[name] for name in wanted if name in failed},
    )


def _run(
    command: list[str], folder: Path, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, without the environment that this process set for itself."""
    dropped = (
        "PYTHONPATH",
        "PYTHONHOME",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
