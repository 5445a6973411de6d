"""The work list: what to make, which process makes it, and what is left.

The list is determined by its inputs alone: samples, conditions, seeds and the batch size, in order.
A unit is one condition, one seed and a batch of samples of one shape. Batches never depend on what
is finished, so any number of processes make the same files to the last byte. Process i of n takes
every n-th unit from i on; processes do not communicate.
"""

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from minicos import folder_lock
from minicos.errors import MinicosError, SampleError, out_of_memory
from minicos.folder_lock import FolderLock
from minicos.runs import sweep

T = TypeVar("T", bound=Hashable)
# What may fail without being a mistake in the code.
FAILURES = (MinicosError, OSError, RuntimeError, MemoryError, ValueError)
# Consecutive failures after which a process gives up: its device, disk or model is broken.
CONSECUTIVE = 3
TELL = 10.0  # seconds between two progress lines


@dataclass(frozen=True)
class Job:
    """One sample with what is needed to batch it: jobs of one `shape` can run together."""

    sample: str  # its name
    shape: tuple[int, int, int]  # frames, height and width that the model makes


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work: made completely, or made again."""

    condition: str
    seed: int
    samples: tuple[str, ...]
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        more = f" and {len(self.samples) - 1} more" if len(self.samples) > 1 else ""
        return f"{self.condition}, seed {self.seed}: {self.samples[0]}{more}"


def units(jobs: Mapping[str, Sequence[Job]], seeds: Sequence[int], batch: int) -> list[Unit]:
    """The work list.

    Args:
        jobs: for each condition, by name, its job for each sample.
        batch: most samples in one forward pass; only samples of one shape are batched.
    """
    out = []
    for condition, all_jobs in jobs.items():
        for seed in seeds:
            alike = sorted(all_jobs, key=lambda job: job.shape)  # stable: names stay in order
            for shape, group in groupby(alike, key=lambda job: job.shape):
                names = [job.sample for job in group]
                for i in range(0, len(names), batch):
                    out.append(Unit(condition, seed, tuple(names[i : i + batch]), shape))
    return out


@dataclass(frozen=True)
class Shard:
    """The part of the list that belongs to this process: i of n, counted from 0."""

    index: int = 0
    count: int = 1
    local: int = 0  # its index among the processes of this machine, which selects the card

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise MinicosError(
                f"shard {self.index}/{self.count}: shards are counted from 0 to {self.count - 1}."
            )

    def of(self, every: Sequence[Unit]) -> list[Unit]:
        return list(every[self.index :: self.count])

    @property
    def name(self) -> str:
        """A suffix for its own files."""
        return f"shard-{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The shard of --shard "i/n", or else of torchrun or srun; the whole list by default.

    srun alone sets the variables of a step; SLURM_NTASKS is also set in a batch script, which is
    one process whatever the number of tasks.
    """
    if text is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found:
            raise MinicosError(f"--shard {text}: give i/n, such as 0/4.")
        return Shard(int(found[1]), int(found[2]))
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if rank in environment and size in environment:
            told = {name: environment.get(name, "0") for name in (rank, size, local)}
            for name, value in told.items():
                if not value.isdecimal():
                    raise MinicosError(f"{name}={value} in the environment is no number: unset it.")
            return Shard(*map(int, told.values()))
    return Shard()


SCORES = "scores"  # the argument of `hold` for them


def hold(out: Path, what: Shard | str) -> FolderLock | None:
    """Lock a shard of a folder, or its scores, as long as the returned lock is referenced, and
    remove unfinished files of killed processes.

    Raises:
        MinicosError: another process holds the lock.
    """
    place = _place(out, what)
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = folder_lock.hold(place)
    except OSError as error:
        raise MinicosError(
            f"cannot write into {out}: {error.strerror or error}. Choose another --out."
        ) from error
    sweep(out)
    return lock


def wait_for_others(out: Path, part: Shard, seconds: float = 2.0) -> None:
    """Return when no other shard is locked. A process with failures exits last: torchrun ends all
    others when one ends with a code other than 0.
    """
    for index in range(part.count):
        place = _place(out, Shard(index, part.count))
        while index != part.index and place.is_dir() and _held(place):
            time.sleep(seconds)


def _held(place: Path) -> bool:
    try:
        folder_lock.hold(place)
    except MinicosError:
        return True
    return False


def _place(out: Path, what: Shard | str) -> Path:
    """The folder whose lock represents a shard or the scores."""
    return out / ".locks" / (what.name if isinstance(what, Shard) else what)


def attempt(
    left: Sequence[T],
    make: Callable[[T], object],
    *,
    done: int = 0,
    retries: int = 1,
    tell: Callable[[int, int, T | None], object] = lambda done, total, unit: None,
) -> dict[T, str]:
    """Make what is left, one unit after the other; failed units are tried again at the end. Returns
    the failures and their reasons. Stops after three consecutive failures; all remaining units then
    count as failed. A bad sample, or one too large for the memory, does not count among the three.

    Args:
        done: number of units that were finished before.
        retries: further attempts for a failed unit.
        tell: called with the number of finished units, of all units, and the next unit.
    """
    total, failed = done + len(left), dict[T, str]()
    for _ in range(1 + retries):
        failed, streak = {}, 0
        for place, unit in enumerate(left):
            if streak == CONSECUTIVE:
                why = f"not tried, after {CONSECUTIVE} failures in a row"
                return failed | dict.fromkeys(left[place:], why)
            tell(done, total, unit)
            try:
                make(unit)
            except FAILURES as error:
                failed[unit] = one_line(error)
                streak += not (isinstance(error, SampleError) or out_of_memory(error))
                continue
            done, streak = done + 1, 0
        left = list(failed)
    tell(done, total, None)
    return failed


class Progress:
    """Prints the progress of the whole list and the time left; a line every ten seconds.

    Units are weighed by their cost. Those made without a model cost no operations and have a pace
    of their own: until it is known, or that of the others, the time left is "more than".
    """

    def __init__(self, prices: Mapping[Unit, float], finished: Sequence[Unit], part: Shard):
        self.prices = {unit: (bool(price), price or 1.0) for unit, price in prices.items()}
        self.left, self.done, self.spent = (defaultdict[bool, float](float) for _ in range(3))
        for unit in set(prices).difference(finished):
            kind, price = self.prices[unit]
            self.left[kind] += price
        self.begin = self.since = time.monotonic()
        self.told, self.part = -TELL, part
        self.current: Unit | None = None

    def __call__(self, done: int, _: int, unit: Unit | None) -> None:
        now = time.monotonic()
        if self.current is not None:
            kind, price = self.prices[self.current]
            self.done[kind] += price
            self.spent[kind] += now - self.since
            self.left[kind] = max(0.0, self.left[kind] - price)
        self.current, self.since, spent = unit, now, now - self.begin
        if spent - self.told < TELL and unit is not None:
            return
        self.told = spent
        which = f" (shard {self.part})" if self.part.count > 1 else ""
        what = "" if unit is None else f"  {unit}"
        line = f"{done}/{len(self.prices)}{which}  {clock(spent)}{self._rest()}{what}"
        print(line, file=sys.stderr, flush=True)

    def _rest(self) -> str:
        """The time left in words; nothing before the first unit is made."""
        if not self.done:
            return ""
        seconds = sum(self.spent[k] * self.left[k] / done for k, done in self.done.items())
        unknown = any(left and k not in self.done for k, left in self.left.items())
        return f", {'more than ' * unknown}{clock(seconds)} left"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def one_line(error: BaseException) -> str:
    """An error for a list, with its type if the message alone is unclear."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, MinicosError) else f"{type(error).__name__}: {text}"
