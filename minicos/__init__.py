"""minicos: Wan2.2 video diffusion from scratch, with a hook point on every tensor worth watching.

    import minicos

    wan = minicos.load("tiny")
    for step in wan.sample(wan.condition("solve the maze", image)):
        print(step.index, step.sigma, step.x0.shape)

The public API consists of the names in `__all__` and of the modules that
.github/workflows/reference.yml documents. All other names may change between versions.
"""

from importlib import import_module
from sys import modules
from typing import TYPE_CHECKING

# public name -> the module that defines it; imported on first use, so that `minicos inspect` does
# not import torch
_HOME = {
    "load": "open",
    "from_diffusers": "peers.families",
    "Wan": "wan",
    "Model": "sample",
    "State": "sample",
    "Step": "sample",
    "Condition": "condition",
    "Hooks": "hooks",
    "Site": "hooks",
    "Record": "record",
    "MinicosError": "errors",
}
__all__ = [
    "Condition",
    "Hooks",
    "MinicosError",
    "Model",
    "Record",
    "Site",
    "State",
    "Step",
    "Wan",
    "__version__",
    "from_diffusers",
    "load",
]
__version__ = "0.2.0"


if TYPE_CHECKING or "pdoc" in modules:  # type checkers, editors and pdoc do not look names up
    from minicos.condition import Condition
    from minicos.errors import MinicosError
    from minicos.hooks import Hooks, Site
    from minicos.open import load
    from minicos.peers.families import from_diffusers
    from minicos.record import Record
    from minicos.sample import Model, State, Step
    from minicos.wan import Wan


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minicos' has no attribute {name!r}")
    return getattr(import_module(f"minicos.{_HOME[name]}"), name)
