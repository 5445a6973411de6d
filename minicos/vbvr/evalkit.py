"""The benchmark's own scorer, VBVR-EvalKit: an external checkout, run in a process of its own and
never imported.

Scores are those of its `run_evaluation.py` (the task's own rules, 0 to 1), which the published
numbers use; its `evaluate.py` mixes other terms in and gives static pictures .69 where this gives
.27. Three traps are closed here:

- OpenCV 5 returns detected lines in another shape; the scorer then fails inside and counts the
sample as 0. It is refused.
- A sample that failed has score 0 and a field `error`. It is a failure here, not a score.
- Means are over the videos that were found. Here the samples that were wanted and not scored are
listed.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minicos.errors import MinicosError
from minicos.runs import read_json
from minicos.vbvr.cases import printable

SCRIPT = "run_evaluation.py"
PROBE = (
    "import json, cv2, numpy, PIL, tqdm; print(json.dumps([cv2.__version__, numpy.__version__]))"
)
REMEDY = 'Make it an environment: python -m venv {0}/.venv && {0}/.venv/bin/pip install "opencv-python-headless<5" Pillow tqdm'


@dataclass(frozen=True)
class Kit:
    """A checkout that can score."""

    path: Path
    python: Path  # the interpreter that runs it
    opencv: str
    numpy: str


@dataclass(frozen=True)
class Scored:
    """What the scorer says of one tree of videos."""

    scores: dict[str, float]  # name of the sample -> 0 to 1
    failed: dict[str, str]  # name -> what went wrong


def find(path: str | Path, python: str | Path | None = None) -> Kit:
    """The checkout at `path`, tried out with the interpreter that will run it.

    python  by default the one of an environment .venv (or venv) inside the checkout, else the one
            that runs minicos
    Raises MinicosError where the checkout, OpenCV or numpy is missing, and for OpenCV 5.
    """
    path = Path(path).resolve()
    if not (path / SCRIPT).is_file():
        raise MinicosError(
            f"{path} holds no {SCRIPT}. Give a checkout of Video-Reason/VBVR-EvalKit."
        )
    inside = (path / name / "bin" / "python" for name in (".venv", "venv"))
    chosen = (
        Path(python) if python else next((p for p in inside if p.exists()), Path(sys.executable))
    )
    try:
        probe = _run([str(chosen), "-c", PROBE], path, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MinicosError(
            f"{chosen} cannot be run: {error}. Give another with --evalkit-python."
        ) from error
    if probe.returncode:
        reason = (probe.stderr.strip() or "no message").splitlines()[-1]
        raise MinicosError(f"{chosen} cannot run EvalKit ({reason}). {REMEDY.format(path)}")
    opencv, numpy = json.loads(probe.stdout.splitlines()[-1])
    if int(opencv.split(".")[0]) >= 5:
        raise MinicosError(
            f"{chosen} has OpenCV {opencv}, with which EvalKit counts samples as 0 where its line "
            f"detection fails. {REMEDY.format(path)}"
        )
    return Kit(path, chosen, opencv, numpy)


def score(kit: Kit, videos: Path, truth: Path, wanted: Sequence[str]) -> Scored:
    """Score the tree `videos` against the benchmark's folder `truth`.

    wanted  the names of the samples that should have a score; one that the scorer left out has
            failed
    Raises MinicosError where the scorer itself fails or what it wrote cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="minicos-evalkit-") as out:
        command = [str(kit.python), SCRIPT, "--model_path", str(videos.resolve()), "--gt_base",
                   str(truth.resolve()), "--output_dir", out, "--device", "cpu"]  # fmt: skip
        done = _run(command, kit.path)
        results = sorted(Path(out).glob("*_vbvr_results.json"))
        if done.returncode or len(results) != 1:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise MinicosError(
                f"EvalKit failed on {videos} with exit code {done.returncode}: {printable(last)} "
                f"Run it by hand: {' '.join(command)}"
            )
        return parse(read_json(results[0]), wanted)


def parse(result: object, wanted: Sequence[str]) -> Scored:
    """Scores and failures from what run_evaluation.py writes. Raises MinicosError where that has
    another form.
    """
    scores: dict[str, float] = {}
    failed: dict[str, str] = {}
    try:
        for one in result["samples"]:  # type: ignore[index]  # a KeyError or TypeError is told below
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
            f"EvalKit's results have another form than expected ({error!r}). Use the revision that "
            "weights.md names."
        ) from error
    for name in wanted:
        if name not in scores and name not in failed:
            failed[name] = "the scorer left it out: no video, or a task that it does not know"
    return Scored({name: scores[name] for name in wanted if name in scores}, failed)


def _run(
    command: list[str], folder: Path, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, without what this process set for itself in the environment."""
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
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False)  # fmt: skip
