"""Which videos are finished: those whose checksum was recorded when they were made.

Each process has its own file, OUT/checksums/shard-0-of-2.sha256, since several machines cannot
safely append to one; all of them are read. A video that a full disk or a power cut left empty or
damaged matches no checksum, and is made again. In OUT, `cat checksums/* | sha256sum --check` also
tests the videos.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minicos.runs import Run, checksum

FOLDER = "checksums"
Known = frozenset[tuple[str, str]]  # name in OUT, checksum


@dataclass(frozen=True)
class Finished:
    """The finished videos in the folder `out`."""

    out: Path
    name: str  # of this process's checksum file

    def save(self, path: Path, write: Callable[[Path], object]) -> None:
        """Let `write(temporary)` make the video `path` atomically, and record its checksum. Raises
        MinicosError if the disk refuses.
        """
        (self.out / FOLDER).mkdir(parents=True, exist_ok=True)
        self._run(f"{self.name}.sha256").save(self._named(path), write)

    def known(self) -> Known:
        """The checksums that all processes recorded."""
        files = (self.out / FOLDER).glob("*.sha256")
        return frozenset(pair for file in files for pair in self._run(file.name).recorded().items())

    def holds(self, path: Path, known: Known) -> bool:
        """Whether the video exists and is unchanged, to the last byte."""
        try:
            return (self._named(path), checksum(path)) in known
        except OSError:
            return False

    def _run(self, file: str) -> Run:
        return Run(self.out, {}, checksums=f"{FOLDER}/{file}")

    def _named(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()
