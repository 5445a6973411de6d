"""Activations on disk, for probes and sparse autoencoders: written while a model runs,
memory-mapped afterwards.

    a = Activations("runs/capture")
    x, where = a.rows("blocks.6", step=0, branch="cond")  # all tokens of all samples (n, d), and
                                                          # where each row comes from

A folder holds one file per sample, shards/00012.safetensors, and an index.json that describes them.
The key of a tensor is "003/cond/blocks.6" (step, branch, hook point). `reduce` determines what is
kept of a tensor b l d:

    whole   every token                    l d
    frames  the mean of each latent frame  f d
    mean    the mean of all tokens         d
    norm    the L2 norm of every token     l

A file appears complete or not at all, so a killed capture continues after the last finished sample.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
from einops import reduce as pool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.runs import read_json, replace_file, write_json
from minicos.sample import Model

REDUCE = ("whole", "frames", "mean", "norm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMA = 1


@dataclass(frozen=True)
class Wanted:
    """What to capture: hook points (patterns as in `Hooks.on`), steps, branches, and the form in
    which they are kept.
    """

    points: tuple[str, ...]
    steps: tuple[int, ...]
    branches: tuple[str, ...] = ("cond",)
    reduce: str = "whole"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.reduce not in REDUCE or self.dtype not in DTYPES:
            raise MinicosError(
                f"--reduce is one of {', '.join(REDUCE)}, --dtype one of {', '.join(DTYPES)}."
            )

    def matching(self, points: Mapping[str, str]) -> list[str]:
        """The hook points of a model (name -> shape in letters) that match. Raises MinicosError for
        a point that cannot be captured.
        """
        found = [name for name in points if any(_matches(name, pattern) for pattern in self.points)]
        for name in found:
            if points[name] != "b l d":
                raise MinicosError(
                    f"{name} is {points[name]}: only points of tokens, b l d, can be captured."
                )
        return found

    def check(self, points: Mapping[str, str]) -> None:
        """Raise MinicosError if a pattern matches no hook point, or one that cannot be captured."""
        for pattern in self.points:
            if not any(_matches(name, pattern) for name in points):
                raise MinicosError(
                    f"no hook point matches {pattern!r} (`minicos points` lists them all)."
                )
        self.matching(points)

    def bytes(self, points: Mapping[str, str], grid: tuple[int, int, int], width: int) -> int:
        """Bytes of one sample on disk without headers, for a token grid f h w and width d."""
        f, h, w = grid
        values = {
            "whole": f * h * w * width,
            "frames": f * width,
            "mean": width,
            "norm": f * h * w,
        }[self.reduce]
        count = len(self.matching(points)) * len(self.steps) * len(self.branches)
        return count * values * DTYPES[self.dtype].itemsize

    def hooks(self, kept: dict[str, Tensor], grids: list[tuple[int, int, int]]) -> Hooks:
        """Hooks that store the wanted tensors of a batch's first sample in `kept`, under their
        keys, and the token grid in `grids`.
        """

        def keep(x: Tensor, site: Site) -> None:
            value = reduced(x[:1], site.grid, self.reduce)[0]
            kept[key(site.step, site.branch, site.name)] = value.to(DTYPES[self.dtype]).cpu()
            grids[:] = [site.grid]

        hooks = NO_HOOKS
        for pattern in self.points:
            for branch in self.branches:
                hooks = hooks.on(pattern, keep, step=self.steps, branch=branch)
        return hooks


def key(step: int, branch: str, point: str) -> str:
    """The key of a tensor in a shard: "003/cond/blocks.6"."""
    return f"{step:03d}/{branch}/{point}"


def reduced(x: Tensor, grid: tuple[int, int, int], how: str) -> Tensor:
    """Tokens b l d in the form `how` (see the top of this file), float32 if they are reduced."""
    if how == "whole":
        return x
    if how == "norm":
        return x.float().norm(dim=-1)
    if how == "mean":
        return x.float().mean(dim=1)
    return pool(x.float(), "b (f l) d -> b f d", "mean", f=grid[0])


def write(
    folder: Path, number: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write one sample's shard atomically; `about` (JSON values) describes the sample."""
    values = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"about": json.dumps(dict(about))}
    replace_file(shard(folder, number), lambda temporary: save_file(values, temporary, metadata))


def capture(
    model: Model,
    condition: Condition,
    wanted: Wanted,
    folder: Path,
    number: int,
    *,
    seed: int,
    about: Mapping[str, Any],
) -> None:
    """Run the first sample of a condition up to the last wanted step, and write its shard.

    `about` (JSON values) says what the sample is: its "sample" is its name in a `Row`.
    """
    kept: dict[str, Tensor] = {}
    grids: list[tuple[int, int, int]] = []
    noise = model.noise(condition, seed)
    for step in model.sample(condition, noise=noise, hooks=wanted.hooks(kept, grids)):
        if step.index == max(wanted.steps):
            break
    write(folder, number, kept, {**about, "seed": seed, "grid": grids[0]})


def shard(folder: Path, number: int) -> Path:
    """The path of a sample's shard, which need not exist yet."""
    return folder / "shards" / f"{number:05d}.safetensors"


@dataclass(frozen=True)
class Entry:
    """One tensor in a folder."""

    file: str
    key: str
    sample: str
    step: int
    branch: str
    point: str
    layer: int | None  # None for points outside blocks
    grid: tuple[int, int, int]  # f h w of the tokens
    shape: tuple[int, ...]
    dtype: str


def index(folder: Path, wanted: Wanted, settings: Mapping[str, Any]) -> None:
    """Write index.json from the headers of the shards."""
    entries = [
        asdict(entry)
        for file in sorted((folder / "shards").glob("*.safetensors"))
        for entry in _entries(file)
    ]
    about = {
        "schema": SCHEMA,
        "wanted": asdict(wanted),
        "settings": dict(settings),
        "entries": entries,
    }
    write_json(folder / "index.json", about)


def _entries(file: Path) -> Iterator[Entry]:
    with _open(file) as tensors:
        about = json.loads((tensors.metadata() or {}).get("about", "{}"))
        for name in tensors.keys():  # noqa: SIM118  not a dictionary
            step, branch, point = name.split("/")
            view = tensors.get_slice(name)
            parts = point.split(".")
            layer = int(parts[1]) if parts[0] == "blocks" else None
            yield Entry(
                file=f"shards/{file.name}",
                key=name,
                sample=about["sample"],
                step=int(step),
                branch=branch,
                point=point,
                layer=layer,
                grid=tuple(about["grid"]),
                shape=tuple(view.get_shape()),
                dtype=view.get_dtype(),
            )


@dataclass(frozen=True)
class Row:
    """The origin of a row of a matrix: the sample, and its token or latent frame (0 for a mean)."""

    sample: str
    token: int


class Activations:
    """A folder written by `minicos capture`. Tensors are mapped from the files on request."""

    def __init__(self, folder: str | Path):
        """Raises MinicosError if the folder has no index of this version."""
        self.folder = Path(folder)
        kept = read_json(self.folder / "index.json")
        if not isinstance(kept, dict) or kept.get("schema") != SCHEMA:
            raise MinicosError(
                f"{self.folder / 'index.json'} is not an index of this version. Capture again."
            )
        try:
            self.settings: dict[str, Any] = kept["settings"]
            self.reduce: str = kept["wanted"]["reduce"]
            self.entries = [_entry(one) for one in kept["entries"]]
        except (KeyError, TypeError, ValueError) as error:
            raise MinicosError(
                f"{self.folder / 'index.json'} cannot be understood ({error!r}). Capture again."
            ) from error

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def samples(self) -> list[str]:
        """The names of the samples, in order."""
        return list(dict.fromkeys(entry.sample for entry in self.entries))

    @property
    def points(self) -> list[str]:
        """The hook points that were captured."""
        return list(dict.fromkeys(entry.point for entry in self.entries))

    def select(
        self,
        point: str = "*",
        step: int | None = None,
        branch: str | None = None,
        sample: str | None = None,
    ) -> list[Entry]:
        """The matching entries; `point` may be a pattern, and None matches everything."""
        return [
            e
            for e in self.entries
            if fnmatchcase(e.point, point)
            and (step is None or e.step == step)
            and (branch is None or e.branch == branch)
            and (sample is None or e.sample == sample)
        ]

    def load(self, entry: Entry) -> Tensor:
        """One tensor as it was stored. Raises MinicosError if its file is missing, damaged or
        outside the folder.
        """
        file = self.folder / entry.file
        # `resolve` raises RuntimeError for a link to itself, `realpath` leaves it.
        if not Path(os.path.realpath(file)).is_relative_to(self.folder.resolve()):
            raise MinicosError(f"{entry.file} leads out of {self.folder}.")
        with _open(file) as tensors:
            return tensors.get_tensor(entry.key)

    def rows(self, point: str, step: int, branch: str = "cond") -> tuple[Tensor, list[Row]]:
        """All rows of a hook point at a step, one per token (or frame, or sample): a matrix (n, d),
        and the origin of each row.

        Raises:
            MinicosError: nothing was captured there, or only norms, which have no width.
        """
        found = [entry for entry in self.select(point, step, branch) if entry.point == point]
        if not found or self.reduce == "norm":
            raise MinicosError(
                f"{self.folder} holds no rows of {point} at step {step}, branch {branch}."
            )
        parts = [self.load(entry).reshape(-1, entry.shape[-1]) for entry in found]
        where = [
            Row(e.sample, i) for e, part in zip(found, parts, strict=True) for i in range(len(part))
        ]
        return torch.cat(parts), where


def _entry(one: Mapping[str, Any]) -> Entry:
    return Entry(**{**one, "grid": tuple(one["grid"]), "shape": tuple(one["shape"])})


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise MinicosError(
            f"{file} cannot be read: {error}. Delete it and capture again."
        ) from error


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern of `Hooks.on` matches a name: `*` matches exactly one dotted segment."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(
        w in ("*", p) for p, w in zip(parts, wanted, strict=True)
    )


def megabytes(
    wanted: Wanted, points: Mapping[str, str], grids: Sequence[tuple[int, int, int]], width: int
) -> float:
    """The size of all samples, one token grid each, in units of 10^6 bytes."""
    return sum(wanted.bytes(points, grid, width) for grid in grids if prod(grid)) / 1e6
