"""Run a model over the work list: each unit makes the videos of one batch under one condition."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from minicos.config import DiTConfig, Preset, VAEConfig
from minicos.errors import MinicosError
from minicos.vbvr import tree
from minicos.vbvr.cases import Found, Sample, load_picture, other
from minicos.vbvr.conditions import Arm, Batch, final, image_batch
from minicos.vbvr.finished import Finished
from minicos.vbvr.fit import Fit, fit, made_frames
from minicos.vbvr.work import Job, Unit
from minicos.wan import Wan
from minicos.weights.layouts import Layout

# The embedded model was trained on pictures of at most 6 x 6 cells of 16 pixels and at most 33
# frames: samples within these limits keep their size and length, others get the preset's.
EMBEDDED_SIDE, EMBEDDED_FRAMES = 96, 33


@dataclass(frozen=True)
class Making:
    """The size and length of a model's videos for a sample."""

    variant: str
    preset: Preset
    step: int  # both sides are multiples of it
    stride: int  # and the frames are stride * n + 1
    area: int | None = None  # most pixels, if the user limits them
    longest: int | None = None  # most frames, likewise

    @classmethod
    def of(
        cls, files: Layout, preset: Preset, area: int | None = None, longest: int | None = None
    ) -> "Making":
        """The sizes of a model that is known by its files."""
        dit, vae = files.experts["high"].config, files.vae.config
        if not isinstance(dit, DiTConfig) or not isinstance(vae, VAEConfig):
            raise MinicosError(f"{files.variant} is not a model of videos.")
        step = vae.stride[1] * dit.patch_size[1]
        return cls(files.variant, preset, step, vae.stride[0], area, longest)

    def fit(self, sample: Sample) -> Fit:
        """The conversion from a sample's picture to the model's size."""
        area = self.area or self.preset.area
        if self.variant == "tiny" and self.area is None:
            height, width = (side // sample.scale for side in sample.size)
            if (
                max(height, width) <= EMBEDDED_SIDE
                and not height % self.step
                and not width % self.step
            ):
                return Fit(sample.size, (height, width))
            area = self.preset.size[0] * self.preset.size[1]
        return fit(sample.size, self.step, area)

    def frames(self, sample: Sample, arm: Arm) -> int:
        """The number of frames that a model makes of a sample under a condition."""
        if arm.frames is not None:
            return arm.frames
        given = sample.frames or self.preset.frames
        if self.variant == "tiny" and given > EMBEDDED_FRAMES:
            given = self.preset.frames
        return made_frames(given, self.stride, self.longest)

    def job(self, sample: Sample, arm: Arm) -> Job:
        return Job(sample.name, (self.frames(sample, arm), *self.fit(sample).made))


def fitting(found: Found, sizes: Iterable[Making]) -> Found:
    """The samples whose shape suits all of the models; the others become problems."""
    problems = {}
    for making in sizes:
        for sample in found.samples:
            try:
                making.fit(sample)
            except MinicosError as error:
                problems[sample.name] = str(error)
    kept = tuple(sample for sample in found.samples if sample.name not in problems)
    return replace(found, samples=kept, problems={**found.problems, **problems})


@dataclass(frozen=True)
class Maker:
    """Makes units: `left` lists the unfinished ones, `make(unit)` writes the unit's videos."""

    finished: Finished
    samples: Mapping[str, Sample]
    arms: Mapping[str, Arm]  # by name
    models: Mapping[str, Wan] = field(default_factory=dict)  # by the weights of the arms
    # Arm -> the steps whose clean estimates are also written.
    every: Mapping[str, Sequence[int]] = field(default_factory=dict)
    main_seed: int = 1  # its tree has the condition's name without a suffix
    # Whether each sample has its own noise: seed, seed + 1 ... in the order of names.
    own_seeds: bool = False

    def tree(self, arm: Arm, seed: int) -> str:
        """The name of the tree of a condition and a seed."""
        return arm.folder if seed == self.main_seed else f"{arm.folder}_seed={seed}"

    def root(self, unit: Unit, step: int | None = None) -> Path:
        """Where a unit's videos go, or the clean estimates of one of its steps."""
        named = self.tree(self.arms[unit.condition], unit.seed)
        return tree.folder(self.finished.out, named, step)

    def videos(self, unit: Unit) -> Iterator[Path]:
        """Every video of a unit."""
        for step in (None, *self.every.get(unit.condition, ())):
            root = self.root(unit, step)
            yield from (tree.path(root, name) for name in unit.samples)

    def left(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that are not finished."""
        known, holds = self.finished.known(), self.finished.holds
        return [unit for unit in units if not all(holds(path, known) for path in self.videos(unit))]

    def damaged(self, units: Sequence[Unit]) -> list[Path]:
        """The videos of units that exist but are damaged."""
        known, holds = self.finished.known(), self.finished.holds
        videos = (path for unit in units for path in self.videos(unit) if path.is_file())
        return [path for path in videos if not holds(path, known)]

    def make(self, unit: Unit) -> None:
        """Make a unit's videos. If steps are also written, the final video comes last."""
        arm = self.arms[unit.condition]
        root = self.root(unit)
        if arm.baseline:
            for name in unit.samples:
                write = tree.write_static if arm.kind == "static" else tree.write_truth
                write(root, self.samples[name], self.finished.save)
            return
        wan = self.models[arm.weights].with_preset(area=None)
        every, estimates = self.every.get(unit.condition, ()), dict[int, Tensor]()

        def see(index: int, x0: Tensor) -> None:
            if index in every:
                estimates[index] = x0.cpu()

        latent = final(wan, arm, self.batch(unit), see if every else None)
        for index, x0 in estimates.items():
            self._write(unit, wan, x0, self.root(unit, index))
        self._write(unit, wan, latent, root)

    def batch(self, unit: Unit) -> Batch:
        """The samples of a unit as a model takes them."""
        samples = [self.samples[name] for name in unit.samples]
        ways = [Fit(sample.size, unit.shape[1:]) for sample in samples]
        pictures = [w.forward(load_picture(s)) for w, s in zip(ways, samples, strict=True)]
        takes = self.models[self.arms[unit.condition].weights].preset.takes_image
        every = list(self.samples.values())
        places = [every.index(sample) for sample in samples]
        return Batch(
            [sample.prompt for sample in samples],
            image_batch(pictures) if takes else None,
            [other(every, sample) for sample in samples],
            [unit.seed + place * self.own_seeds for place in places],
            unit.shape[0],
        )

    def _write(self, unit: Unit, wan: Wan, latent: Tensor, root: Path) -> None:
        arm = self.arms[unit.condition]
        for name, one in zip(unit.samples, latent, strict=True):
            sample = self.samples[name]
            video = np.concatenate(list(wan.frames(one)))
            frames = sample.frames if arm.frames is None else None
            way = Fit(sample.size, unit.shape[1:])
            tree.write(root, sample, video, way, frames, self.finished.save)
