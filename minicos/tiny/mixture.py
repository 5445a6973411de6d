"""The training data of the embedded model: every source of puzzles, with its share of the training
compute.

A source is a family of `puzzles.FAMILIES` in its own length, or the same puzzles with another grid
size or number of frames. Out-of-domain families and held-out compositions are never in this table.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from minicos import puzzles
from minicos.puzzles import Family


@dataclass(frozen=True)
class Source:
    """Training puzzles of one family, one grid size and one length."""

    family: Family
    frames: int
    share: float  # of the training compute; shares need not add up to 1

    @property
    def name(self) -> str:
        """Also the folder of its shards."""
        return f"{self.family.name.replace('/', '-')}-{self.frames}"

    @property
    def shape(self) -> tuple[int, int]:
        """(cells along a side, frames): what the videos of a batch have in common."""
        return self.family.size, self.frames

    @property
    def tokens(self) -> int:
        """Of one video."""
        return self.family.size**2 * ((self.frames - 1) // 4 + 1)


# Family, or kind/size -> share at the length that the family has. The twins with one answer
# (`-one`) have pictures that their family also draws, and need little of their own.
SHARES: dict[str, float] = {
    "maze": 0.05,
    "maze-one": 0.01,
    "maze-3x3": 0.005,
    "maze-4x4": 0.015,
    "latin": 0.07,
    "latin-one": 0.02,
    "latin-many": 0.06,
    "sequence": 0.10,
    "sequence-short": 0.05,
    "pick": 0.07,
    "partner": 0.02,
    "goal": 0.015,
    "mark": 0.01,
    "memory": 0.025,
    "turn": 0.06,
    "turn-one": 0.04,
    "mirror": 0.08,
    "mirror-one": 0.05,
    "reveal": 0.12,
    "shell": 0.06,
    "shell-one": 0.03,
    "shell-short": 0.03,
    "balls": 0.05,
    "balls-one": 0.05,
    "balls-three": 0.04,
    "count": 0.04,
    "count-one": 0.02,
}
# (Family or kind/size, frames) -> share: other lengths than the family's own.
LENGTHS: dict[tuple[str, int], float] = {
    ("maze-4x4", 1): 0.002,
    ("maze-4x4", 5): 0.004,
    ("maze-4x4", 9): 0.006,
    ("maze-4x4", 17): 0.006,
    ("maze-3x3", 33): 0.006,
}
# Families that are also trained by another one's clips: `data.told` writes their prompts.
WITHIN = {"reveal-colour": "reveal", "reveal-one": "reveal"}


def source(name: str, share: float, frames: int | None = None) -> Source:
    """A source by the name of its family, or kind/size. Raises MinicosError for a name that is
    neither."""
    kind, _, size = name.partition("/")
    family = puzzles.of_kind(kind, int(size)) if size else puzzles.family(name)
    return Source(family, frames or family.draw(0).frames, share)


def sources() -> tuple[Source, ...]:
    """The whole mixture."""
    own = [source(name, share) for name, share in SHARES.items()]
    other = [source(name, share, frames) for (name, frames), share in LENGTHS.items()]
    return (*own, *other)


def unseen() -> tuple[Source, ...]:
    """Families that the DiT is not trained on. The decoder sees their pictures, so that a score of
    zero there is the DiT's own."""
    return tuple(source(name, 0.02) for name, f in puzzles.FAMILIES.items() if f.domain == "out")


def shapes(table: Iterable[Source]) -> dict[tuple[int, int], float]:
    """Shape -> probability that a step trains on it, so that compute is shared as `Source.share`
    says.

    Batches have about the same number of tokens whatever their shape, so every step costs about the
    same.
    """
    total: dict[tuple[int, int], float] = {}
    for one in table:
        total[one.shape] = total.get(one.shape, 0.0) + one.share
    whole = sum(total.values())
    return {shape: share / whole for shape, share in total.items()}
