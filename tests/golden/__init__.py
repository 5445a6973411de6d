"""Outputs of the official code for small random networks, and the reader of their compact weight
files.
"""

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent


def read(name: str) -> dict[str, Tensor]:
    """Tensors of `tests/golden/NAME.safetensors` in float32.

    To stay small, weights are stored in 8 or 16 bits (their converted value is the weight,
    exactly), and a key that ends in `.toeplitz` is a vector v for a matrix W[i, j] = v[i - j +
    columns - 1] whose shape stands in the file's metadata.
    """
    out = {}
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        shapes = json.loads((file.metadata() or {}).get("toeplitz", "{}"))
        for key in file.keys():  # noqa: SIM118  (safe_open is not a dict)
            tensor = file.get_tensor(key)
            if key.endswith(".toeplitz"):
                key = key.removesuffix(".toeplitz")
                rows, columns = shapes[key][-2:]
                index = torch.arange(rows)[:, None] - torch.arange(columns) + columns - 1
                tensor = tensor.float()[index].reshape(shapes[key])
            out[key] = tensor.float() if tensor.is_floating_point() else tensor
    return out


def info(name: str) -> dict:
    """The JSON beside a case: its configuration, tolerances and the differences measured between
    implementations.
    """
    return json.loads((FOLDER / f"{name}.json").read_text())


def config(cls: type, name: str):
    """The case's configuration as one of minicos' dataclasses: the fields that both have."""
    known = {f.name for f in fields(cls)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in info(name)["config"].items()}
    return cls(**{k: v for k, v in given.items() if k in known})


def rel_max(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def rel_l2(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||."""
    return ((actual - expected).norm() / expected.norm()).item()
