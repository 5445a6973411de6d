"""What the sections share: their puzzles, in batches, and the network that knows nothing."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from minicos.analysis.tools import cases
from minicos.analysis.tools.cases import Case, held_out
from minicos.dit import DiT
from minicos.wan import Wan

N = 100  # puzzles of an experiment
FULL = 1000  # the same with --full
SHORT = 10  # denoising steps of the interventions
AT_LEAST = 4  # puzzles: the ensemble's wrong donors take three, a yardstick two


def untrained(wan: Wan, seed: int = 0) -> Wan:
    """The same architecture with random weights, as PyTorch draws them: what a measure shows of any network."""
    high = wan.experts["high"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DiT(
            high.cfg, residual_dtype=high.residual_dtype, time_skip=high.time_skip
        ).requires_grad_(False)
    network = network.to(wan.device, wan.dtype).eval()
    return replace(wan, experts=dict.fromkeys(wan.experts, network))


def groups(subjects: Sequence[Case], most: int) -> list[list[Case]]:
    """As few batches as do, of nearly equal size: a rest of one case could be nobody's wrong donor."""
    parts = np.array_split(np.arange(len(subjects)), -(-len(subjects) // most))
    return [[subjects[i] for i in part] for part in parts]


def fewer(n: int) -> int:
    """Puzzles of a curve, where the headline has n."""
    return max(AT_LEAST, n // 4)


def several(n: int) -> list[Case]:
    return held_out("maze", n, keep=cases.ambiguous)
