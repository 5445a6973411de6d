"""Sampling settings in a diffusers folder, and where they differ from the preset.

Such a folder has `scheduler/scheduler_config.json` with a `flow_shift` and, for two experts,
`model_index.json` with a `boundary_ratio`. Conversion scripts wrote shift 3 for Wan2.2's A14B
models, whose own code uses 5 and 12. Therefore the preset takes precedence by default, and the
preset "diffusers" follows the folder. Noise levels are then still spaced as by the official solver;
diffusers' own table differs by up to 4e-3.
"""

import math
from pathlib import Path

from minicos.config import get_preset
from minicos.errors import MinicosError
from minicos.weights.files import read_table

FOLLOW = "diffusers"  # the preset that follows the folder


def stated(folder: Path, experts: int) -> dict[str, float]:
    """Fields of a preset that the folder contains: shift and boundary, if they exist.

    Raises:
        MinicosError: a value is not a number in range; the message names file, key and value.
    """
    places = {"shift": (folder / "scheduler/scheduler_config.json", "flow_shift", math.inf)}
    if experts == 2:
        places["boundary"] = (folder / "model_index.json", "boundary_ratio", 1.0)
    out: dict[str, float] = {}
    for field, (path, key, most) in places.items():
        value = read_table(path).get(key) if path.is_file() else None
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:
            raise MinicosError(f"{path}: {key} is {value!r}, and should be a number above 0")
        out[field] = float(value)
    return out


def departures(variant: str, fields: dict[str, float]) -> tuple[str, ...]:
    """A note if the folder's values differ from the variant's default preset."""
    preset = get_preset(variant)
    other = [
        f"{name} {value:g} (the preset has {getattr(preset, name)})"
        for name, value in fields.items()
        if getattr(preset, name) != value
    ]
    if not other:
        return ()
    return (
        f"the folder states {' and '.join(other)}; the preset wins, --preset diffusers does not",
    )
