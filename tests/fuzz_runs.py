"""A target of `tests.fuzz`: run folders."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch

from minicos.analysis import result
from minicos.analysis.result import Curve, Interval, Number, Result
from minicos.analysis.tools.figures import lines
from minicos.analysis.tools.record import entering, recorded
from minicos.analysis.tools.shown import Where, list_interventions, save_videos
from minicos.errors import MinicosError
from minicos.folder_lock import LOCK
from minicos.media import save_image, save_video
from minicos.page import gather
from minicos.runs import CHECKSUMS, PART, RECORD, Run
from tests.fuzz import Opened, target
from tests.fuzz_files import changed, dumped, flipped

SETTINGS = {"prompt": "solve the maze", "fps": 16, "seed": 0, "model": "tiny"}
STEP = "steps/000.safetensors"
NOISE = torch.zeros(1, 2, 1, 2, 2)
FRAMES = np.zeros((5, 16, 16, 3), np.uint8)


@cache
def files() -> dict[str, bytes]:
    """The files of a complete run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(folder, SETTINGS, {"command": "minicos steps --out run"})
        run.save_json("schedule.json", {"sigmas": [1.0, 0.5], "steps": 2})
        for name in (STEP, "steps/001.safetensors"):
            run.save_tensors(name, {"next": NOISE, "energy.cond": torch.rand(3, 4, 2, 2)})
        run.save_tensors("energy.safetensors", {"cond.raw": torch.rand(2, 3, 4, 2, 2)})
        attention = {f"step{i}.received.{k}": torch.rand(4, 2, 2) for i in (0, 1) for k in (2, 5)}
        pairs = {f"step{i}.pairs.{k}": torch.rand(*(4, 2, 2) * 2) for i in (0, 1) for k in (2, 5)}
        run.save_tensors("attention.safetensors", attention | pairs)
        save_image(run.path("first_frame.png"), FRAMES[0])
        save_image(run.path("x.png"), FRAMES[0])
        save_video(run.path("x0/step_01.mp4"), FRAMES, 16)
        save_videos(run, {"plain": FRAMES, "noised": FRAMES[::-1]}, 16)
        list_interventions(run, [Where("noise", steps=[1], frames=[0, 1])])
        run.save_tensors("convergence.safetensors", {"moved": torch.rand(2, 4)})
        number = Number("D", 0.5, 0.4, 0.6, 9, "D", "a control")
        curve = Curve("D", [0, 1], [0.1, 0.2], x_label="step", unit="D")
        rows = [{"a": 1, "b": Interval(0.5, 0.4, 0.6, 9)}]
        result.write(run, Result("noise", SETTINGS, [number], {"t": rows}, [curve], ["x.png"]))
        lines(run.path("x.png"), [curve], y="D", title="title")
        made = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in Path(folder).rglob("*")
            if p.is_file()
        }
    return {name: content for name, content in made.items() if name != LOCK}


@target("run folder")
def damaged_run(draw: random.Random, folder: Path) -> Opened:
    """A run folder with damaged files, files of other kinds, or half-written ones."""
    place = folder / "run"
    for name, content in files().items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    for _ in range(draw.randint(1, 3)):
        damage(draw, place)
    if draw.random() < 0.5:
        agree(place)
    return lambda: used(place)


def damage(draw: random.Random, place: Path) -> None:
    name = draw.choice(
        [*files(), LOCK, f"{PART}host-99999999999999999999-x", f"{PART}--", "\x1b[2J"]
    )
    path = place / name
    content = files().get(name, b'{"process": 1, "host": "a", "since": "b"}')
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match draw.randrange(10):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(draw.choice((path.name, "/dev/zero", "..", "/etc/hostname", "gone")))
        case 2:
            os.mkfifo(path)
        case 3:
            path.write_bytes(b"")
        case 4:
            pass
        case 5 | 6 if name.endswith(".json"):
            path.write_bytes(dumped(draw, changed(draw, json.loads(content))))
        case _:
            path.write_bytes(flipped(draw, content))


def agree(place: Path) -> None:
    """Write checksums that match the existing files, damaged or not."""
    if (place / CHECKSUMS).is_file():
        run = Run(place, SETTINGS)
        for name in files():
            with suppress(OSError):
                run.record(name)


def used(place: Path) -> None:
    """What verbs do with a run folder."""
    run = Run.open(place, SETTINGS)
    said: list[str] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except MinicosError as error:
            said.append(str(error))

    for name in files():
        if name not in (RECORD, CHECKSUMS) and run.has(name):
            load = run.load_json if name.endswith("json") else run.load_tensors
            attempt(lambda: load(name))  # noqa: B023
    attempt(lambda: entering(run, 1, NOISE))
    attempt(lambda: recorded(run, "energy", 2))
    attempt(lambda: result.read(place))
    attempt(lambda: gather.write(run))
    run.save_json("again.json", {})
    if bad := [text for text in said if str(place) not in text]:
        raise MinicosError(bad[0])
