"""The work list: shards, retries, kills, and locks."""

import os
import random
import re
import signal
import subprocess
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minicos import runs
from minicos.errors import MinicosError, SampleError
from minicos.runs import replace_file
from minicos.vbvr import work
from minicos.vbvr.work import Job, Shard, Unit, attempt, shard, units

JOBS = {
    name: [Job(f"task/{i:05d}", (9, 16 * (1 + i % 2), 16)) for i in range(7)]
    for name in ("plain", "ensemble")
}


def test_a_unit_holds_samples_of_one_shape_in_order():
    every = units(JOBS, (1, 2), 3)
    assert len(every) == len(set(every)) == 2 * 2 * 3
    assert all(len(unit.samples) <= 3 for unit in every)
    for condition in JOBS:
        for seed in (1, 2):
            made = [
                s for u in every if (u.condition, u.seed) == (condition, seed) for s in u.samples
            ]
            assert sorted(made) == [job.sample for job in JOBS[condition]]


@given(st.integers(1, 9), st.integers(1, 4))
def test_shards_are_a_partition(count, batch):
    every = units(JOBS, (1,), batch)
    parts = [Shard(i, count).of(every) for i in range(count)]
    assert sorted(map(str, every)) == sorted(str(unit) for part in parts for unit in part)


def test_where_the_shard_comes_from():
    assert shard("1/4", {"RANK": "0", "WORLD_SIZE": "2"}) == Shard(1, 4)
    assert shard(None, {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Shard(3, 8, 1)
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}
    assert shard(None, batch) == Shard()  # a batch script without srun is one process
    assert shard(None, batch | step) == Shard(5, 6, 2)
    assert shard(None, {}) == Shard()
    with pytest.raises(MinicosError, match="WORLD_SIZE=two in the environment is no number"):
        shard(None, {"RANK": "0", "WORLD_SIZE": "two"})
    for text in ("4/4", "1", "-1/2", "0/0", "a/b"):
        with pytest.raises(MinicosError, match="shard"):
            shard(text, {})


def test_a_failure_is_tried_again_and_loses_nothing_else():
    every, calls, done = units(JOBS, (1,), 2), [], set()

    def make(unit: Unit) -> None:
        calls.append(unit)
        if unit == every[1] and calls.count(unit) == 1:
            raise RuntimeError("CUDA error: unspecified launch failure")
        if unit == every[3]:
            raise OSError(28, "No space left on device")
        done.add(unit)

    failed = attempt(every, make, retries=2)
    assert list(failed) == [every[3]] and "No space left" in failed[every[3]]
    assert done == set(every) - {every[3]} and calls.count(every[3]) == 3
    assert attempt([*failed], make, done=len(done), retries=0).keys() == failed.keys()


def test_a_broken_device_stops_the_process_early():
    every, calls = units(JOBS, (1,), 1), []

    def make(unit: Unit) -> None:
        calls.append(unit)
        raise RuntimeError("CUDA error")

    failed = attempt(every, make, retries=3)
    assert list(failed) == every and len(calls) == work.CONSECUTIVE
    assert "not tried" in failed[every[-1]]


def test_bad_samples_in_a_row_are_no_broken_device():
    every = units(JOBS, (1,), 1)
    bad = {every[0]: SampleError("no ground_truth.mp4"), every[1]: MemoryError()}
    bad |= dict.fromkeys(every[2:5], torch.OutOfMemoryError("CUDA out of memory"))
    done = set()

    def make(unit: Unit) -> None:
        if unit in bad:
            raise bad[unit]
        done.add(unit)

    assert attempt(every, make).keys() == bad.keys()
    assert done == set(every[5:])


def test_mistakes_in_the_code_are_not_caught():
    def make(unit: Unit) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        attempt(units(JOBS, (1,), 1), make)


def test_two_processes_on_one_shard(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lock = work.hold(tmp_path, Shard(0, 2))
        os.write(writer, b"x" if lock else b"-")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    try:
        with pytest.raises(MinicosError, match=f"process {child}"):
            work.hold(tmp_path, Shard(0, 2))
        assert work.hold(tmp_path, Shard(1, 2)) is not None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert work.hold(tmp_path, Shard(0, 2)) is not None  # what was killed holds nothing


def test_a_process_with_failures_leaves_last(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lock = work.hold(tmp_path, Shard(1, 3))
        os.write(writer, b"x" if lock else b"-")
        time.sleep(1)
        (tmp_path / "made").touch()
        os._exit(0)
    os.read(reader, 1)
    work.wait_for_others(tmp_path, Shard(0, 3), seconds=0.05)  # shard 2 of 3 never began
    assert (tmp_path / "made").exists()
    os.waitpid(child, 0)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    """But not what a live process is writing."""
    child = subprocess.Popen(["true"])
    child.wait()
    host = runs._host()
    left = tmp_path / "plain" / f"{runs.PART}{host}-{child.pid}-0123abcd-00000.mp4"
    now = tmp_path / "plain" / f"{runs.PART}{host}-{os.getpid()}-0123abcd-00001.mp4"
    left.parent.mkdir()
    left.write_bytes(b"half")
    now.write_bytes(b"half")
    work.hold(tmp_path, Shard())
    assert not left.exists() and now.exists()


def test_killed_at_a_hundred_moments_nothing_is_lost_and_nothing_is_half(tmp_path):
    """Processes on shards of one list are killed at random; at the end every file is there,
    whole, and as from one process.
    """
    every, chance = units(JOBS, (1, 2, 3), 2), random.Random(0)

    def path(unit: Unit):
        return tmp_path / unit.condition / f"{unit.seed}" / unit.samples[0]

    def left(units: list[Unit]) -> list[Unit]:
        return [unit for unit in units if not path(unit).exists()]

    def make(unit: Unit) -> None:
        def write(temporary):
            with temporary.open("w") as file:
                for part in range(4):
                    file.write(f"{unit} {part}\n")
                    file.flush()
                    time.sleep(0.0002)

        replace_file(path(unit), write)

    for round in range(100):
        child = os.fork()
        if not child:
            attempt(left(Shard(round % 4, 4).of(every)), make)
            os._exit(0)
        time.sleep(chance.uniform(0, 0.006))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for unit in every:
            if path(unit).exists():
                assert path(unit).read_text() == "".join(f"{unit} {part}\n" for part in range(4))
    assert not attempt(left(every), make)
    assert all(path(unit).read_text().count("\n") == 4 for unit in every)


def test_the_time_left_is_that_of_the_whole_list_and_of_each_pace(monkeypatch, capsys):
    """Units without a model are free of operations and take time all the same."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    paid, free = (units({name: JOBS[name]}, (1,), 1)[:4] for name in JOBS)
    prices = dict.fromkeys(paid, 5.0) | dict.fromkeys(free, 0.0)
    tell = work.Progress(prices, paid[:1], Shard())
    for done, (unit, seconds) in enumerate(
        [*((u, 30) for u in paid[1:]), *((u, 20) for u in free)]
    ):
        tell(done + 1, 3, unit)
        now[0] += seconds
    tell(8, 4, None)
    told = [re.search(", (.*) left", line) for line in capsys.readouterr().err.splitlines()]
    rest = ["more than 0:01:00", "more than 0:00:30", "more than 0:00:00"]  # of three paid units
    rest += ["0:01:00", "0:00:40", "0:00:20", "0:00:00"]
    assert [found and found[1] for found in told] == [None, *rest]
