"""Record what hooks observe, reduced immediately, and stack it into one tensor with named axes.

```python
norms = Record(lambda x: x.norm(dim=-1), axes="b l")
for step in wan.sample(condition, hooks=Hooks().on("blocks.*", norms)): ...
found = norms.stack()                       # step branch point b l
found.at(step=3, branch="cond")             # point b l
```
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minicos.errors import MinicosError
from minicos.hooks import Site

SITES = ("step", "branch", "point")  # the axes along which sites are stacked


@dataclass(frozen=True, repr=False)
class Stacked:
    """All recorded values in one tensor, with the meaning of its axes."""

    values: Tensor
    axes: tuple[str, ...]  # SITES, then the axes of a recorded value
    labels: dict[str, list]  # for each axis in SITES: its steps, branches or points, in order

    def at(self, **chosen: int | str) -> Tensor:
        """The values at a step, branch or point, or at several of these, without the named axes.

        Raises:
            MinicosError: nothing was recorded there.
        """
        x = self.values
        for name, label in chosen.items():
            if label not in self.labels.get(name, ()):
                known = ", ".join(f"{k} {v}" for k, v in self.labels.items())
                raise MinicosError(f"{name} {label!r} was not recorded; what was: {known}")
        for axis in reversed(range(len(SITES))):
            if (name := SITES[axis]) in chosen:
                x = x.select(axis, self.labels[name].index(chosen[name]))
        return x

    def __repr__(self) -> str:
        sizes = ", ".join(f"{a} {n}" for a, n in zip(self.axes, self.values.shape, strict=True))
        return f"Stacked: {sizes}; {self.values.dtype}"


class Record:
    """A hook that keeps `reduce(tensor)` of everything it observes, on the host, with its site:
    `Record(token_energy, axes="b l")`.

    Reduce as much as possible: one residual stream of 81 frames at 832x480 takes 335 MB. `entries`
    is a list of (Site, reduced tensor), without gradients. `axes` names the axes of the result of
    `reduce`. Of results that are neither tensors nor numbers, only `entries` can be read.

    Raises:
        MinicosError: `reduce` is not callable, or `axes` is not text.
    """

    def __init__(self, reduce: Callable[[Tensor], Any], axes: str = ""):
        if not callable(reduce) or not isinstance(axes, str):
            raise MinicosError(
                f"a record takes a function of a tensor, and axes such as 'b l', not {reduce!r} and"
                f" {axes!r}"
            )
        self.reduce, self.axes = reduce, tuple(axes.split())
        self.entries: list[tuple[Site, Any]] = []

    def __call__(self, x: Tensor, site: Site) -> None:
        kept = self.reduce(x.detach())
        if isinstance(kept, Tensor):
            shared = kept.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            kept = kept.clone() if shared else kept  # a later hook may modify x
            kept = kept.cpu()
        self.entries.append((site, kept))

    def __repr__(self) -> str:
        sites = [site for site, _ in self.entries]
        points = [*dict.fromkeys(site.name for site in sites)]
        shown = ", ".join(points[:3]) + (f" and {len(points) - 3} more" if len(points) > 3 else "")
        steps = len({site.step for site in sites})
        return f"Record: {len(sites)} entries" + (f" of {shown}, {steps} steps" if sites else "")

    def stack(self) -> Stacked:
        """All entries in one tensor: step branch point, then the axes of a recorded value.

        Raises:
            MinicosError: the entries are no numbers or do not form a table: some step lacks a
                branch or point, or has it twice, or the shapes differ.
        """
        if not self.entries:
            raise MinicosError("nothing was recorded: has the run been made?")
        for site, x in self.entries:
            if not isinstance(x, (Tensor, int, float)):
                raise MinicosError(
                    f"of {site.name}, {type(x).__name__} was recorded, which is no number: read"
                    " `entries`"
                )
        found = {
            (site.step, site.branch, site.name): torch.as_tensor(x) for site, x in self.entries
        }
        labels = [[*dict.fromkeys(key[axis] for key in found)] for axis in range(len(SITES))]
        shapes = {tuple(x.shape) for x in found.values()}
        count = len(labels[0]) * len(labels[1]) * len(labels[2])
        if len(found) < len(self.entries):
            raise MinicosError(
                "it holds some points twice: make a new Record for each run, or read `entries`"
            )
        if len(found) != count or len(shapes) > 1:
            raise MinicosError(
                f"{len(self.entries)} entries of {len(shapes)} shapes are no table of"
                f" {' x '.join(f'{len(v)} {k}' for k, v in zip(SITES, labels, strict=True))}:"
                " read `entries`, or record points with one shape"
            )
        (shape,) = shapes
        names = self.axes or tuple(f"axis{i}" for i in range(len(shape)))
        if len(names) != len(shape):
            raise MinicosError(f"axes {' '.join(names)!r} for tensors of shape {shape}")
        flat = torch.stack([found[key] for key in _product(labels)])
        values = flat.view(*map(len, labels), *shape)
        return Stacked(values, SITES + names, dict(zip(SITES, labels, strict=True)))


def _product(labels: Sequence[list]) -> list[tuple]:
    steps, branches, points = labels
    return [(s, b, p) for s in steps for b in branches for p in points]
