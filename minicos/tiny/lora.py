"""Write a LoRA file, as the embedded model's low-noise expert is stored."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from minicos.errors import MinicosError
from minicos.runs import replace_file
from minicos.weights.lora import WHOLE, Delta, LowRank, Whole


def save_lora(
    path: str | Path, deltas: Mapping[str, Delta], dtype: torch.dtype = torch.float32
) -> None:
    """Write changes atomically in the dialect of DiffSynth (whole differences as in lightx2v).

    Args:
        deltas: official parameter name -> LowRank or Whole. A scale other than 1 is multiplied
            into `up`.
    """
    tensors = {}
    for name, delta in deltas.items():
        module, _, leaf = name.rpartition(".")
        if isinstance(delta, LowRank):
            tensors[f"{module}.lora_A.default.weight"] = delta.down
            tensors[f"{module}.lora_B.default.weight"] = delta.scale * delta.up.float()
        elif isinstance(delta, Whole):
            ending = next(ending for ending, parameter in WHOLE.items() if parameter == leaf)
            tensors[f"{module}.{ending}"] = delta.scale * delta.value.float()
        else:
            raise MinicosError(
                f"the change of {name} is not a product of two matrices: it cannot be saved."
            )
    tensors = {k: t.detach().to("cpu", dtype, copy=True).contiguous() for k, t in tensors.items()}
    replace_file(Path(path), lambda temporary: save_file(tensors, temporary))
