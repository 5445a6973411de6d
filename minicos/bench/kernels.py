"""Each Triton kernel against its reference in `ops`, eager and compiled, with the arguments of a
pass of A14B at 832x480x81.

Most kernels are limited by memory. Their minimum is every argument read once and every result
written once, bytes = the sum of their sizes, and "ceiling" is the resulting share of a copy's
bandwidth. Attention masses are limited by products, 2 b n l t k operations if the forward's
log-sum-exp is given and twice as many if not; they are also compared with the forward attention of
their layer. For a sample, l is the number of drawn queries. Dtypes follow the official policy:
residual stream, modulation and weights of norms in float32, results of matrix products in bfloat16.
"""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minicos import attention
from minicos.bench.measure import Line, alternate, attempt, ceilings, rate
from minicos.bench.networks import A14B, QUICK
from minicos.config import DiTConfig
from minicos.device import check_compiler, obstacle
from minicos.errors import MinicosError
from minicos.measures import attention_with_lse, stratified
from minicos.ops import REFERENCE, rope

Given = dict[str, Any]  # arguments by name; a function receives those that it takes
COMPILED = "reference, compiled"
DRAWN = 64  # queries per frame in a sample


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    for name, case in CASES.items():
        try:
            kernel, reference = twins(name, device)
            given = case(Shapes(device, quick))
        except (MinicosError, torch.OutOfMemoryError) as error:
            yield Line(name, not_measured=str(error))
            continue
        others = {"reference": reference, COMPILED: torch.compile(reference)}
        if name.startswith("attention_mass"):
            others["attention of its layer"] = attention.best(device)
        for peer, op in others.items():
            sides = bound(kernel, given), bound(op, given)
            yield attempt(name, partial(_measured, name, *sides, peer, device, quick))


def twins(name: str, device: torch.device) -> tuple[Callable, Callable]:
    """Kernel and reference of a case. Raises MinicosError if no kernel can run."""
    if reason := obstacle(device):
        raise MinicosError(reason)
    kernel, reference = (
        getattr(ops, operation(name)) for ops in (REFERENCE.with_kernels(), REFERENCE)
    )
    if kernel is reference:
        raise MinicosError("it has no kernel")
    return kernel, reference


def operation(name: str) -> str:
    """The operation of a case: its name up to a comma."""
    return name.partition(",")[0]


def bound(op: Callable, given: Given) -> partial:
    return partial(op, **{name: given[name] for name in signature(op).parameters if name in given})


def _measured(
    name: str, kernel: partial, other: partial, peer: str, device: torch.device, quick: bool
) -> Line:
    if peer == COMPILED:
        check_compiler(device)
    ours, theirs = alternate(kernel, other, device=device, repeats=2 if quick else 20)
    if name.startswith("attention_mass"):
        flops = products(**kernel.keywords)
        share = ceilings(device, kernel.keywords["q"].dtype).of_matmul(flops, ours)
        return Line(name, ours, peer, theirs, share, rate(flops, ours))
    tensors = [x for x in tree_leaves((kernel.keywords, kernel())) if isinstance(x, Tensor)]
    count = sum(x.nbytes for x in tensors)
    return Line(
        name,
        ours,
        peer,
        theirs,
        ceilings(device).of_copy(count, ours),
        f"{count / ours / 1e6:.4g} GB/s",
    )


def products(
    q: Tensor, k: Tensor, frames: int, lse: Tensor | None = None, rows: Tensor | None = None
) -> int:
    """Floating-point operations of q k^T, computed once or, if the logarithms are needed first,
    twice.
    """
    queries = q.shape[2] if rows is None else frames * rows.shape[-1]
    return 2 * q[:, :, 0].numel() * queries * k.shape[2] * (2 if lse is None else 1)


# -- the arguments of each kernel ------------------------------------------------------------------


class Shapes:
    """Random tensors in the shapes of a pass. Letters as in `ops`."""

    def __init__(self, device: torch.device, quick: bool):
        self.cfg: DiTConfig = QUICK if quick else A14B
        self.grid = (2, 3, 5) if quick else (21, 30, 52)
        self.l = self.grid[0] * self.grid[1] * self.grid[2]
        self.device, self.draw = device, torch.Generator(device).manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.draw, device=self.device, dtype=dtype)

    def stream(self, batch: int = 1) -> Tensor:
        """The residual stream: b l d, float32."""
        return self.randn(batch, self.l, self.cfg.dim)

    def product(self) -> Tensor:
        """The output of a sub-layer: 1 l d, bfloat16."""
        return self.randn(1, self.l, self.cfg.dim, dtype=torch.bfloat16)

    def modulation(self) -> Tensor:
        """1 1 d, float32."""
        return 0.1 * self.randn(1, 1, self.cfg.dim)

    def heads(self) -> Tensor:
        """1 n l k, bfloat16."""
        return self.randn(1, self.cfg.num_heads, self.l, self.cfg.head_dim, dtype=torch.bfloat16)


def _token_energy(s: Shapes) -> Given:
    return {"x": s.stream()}


def _stream_energy(s: Shapes) -> Given:
    x, before = s.stream()[0], s.stream()[0]
    return {"x": x, "before": before, "mean": x.mean(0), "kept": torch.ones_like(x[0])}


def _latent_mean(s: Shapes) -> Given:
    return {"x": s.stream(3), "seeds": 3}


def _modulated_norm(s: Shapes) -> Given:
    scale, shift = s.modulation(), s.modulation()
    return {
        "x": s.stream(),
        "scale": scale,
        "shift": shift,
        "eps": s.cfg.eps,
        "dtype": torch.bfloat16,
    }


def _gated_add(s: Shapes) -> Given:
    return {"x": s.stream(), "y": s.product(), "gate": s.modulation()}


def _gated_add_energy(s: Shapes) -> Given:
    return _gated_add(s) | {"energy": torch.empty(1, s.l, device=s.device)}


def _add_modulated_norm(s: Shapes) -> Given:
    return {"y": s.product()} | _modulated_norm(s)


def _gated_add_norm(s: Shapes) -> Given:
    weight, bias = 1 + 0.1 * s.randn(s.cfg.dim), 0.1 * s.randn(s.cfg.dim)
    last = {"weight": weight, "bias": bias, "eps": s.cfg.eps, "dtype": torch.bfloat16}
    return _gated_add(s) | last


def _rms_rope(s: Shapes) -> Given:
    q, k = s.product(), s.product()
    q_weight, k_weight = (1 + 0.1 * s.randn(s.cfg.dim) for _ in range(2))
    angles = tuple(angle.to(s.device) for angle in rope(s.grid, s.cfg.head_dim))
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    return {"q": q, "k": k, **weights, "angles": angles, "heads": s.cfg.num_heads, "eps": s.cfg.eps}


def _rms_norm(s: Shapes) -> Given:
    weight = 1 + 0.1 * s.randn(s.cfg.dim)
    return {"x": s.product(), "weight": weight, "eps": s.cfg.eps, "dtype": torch.bfloat16}


def _attention_mass(s: Shapes) -> Given:
    return {"q": s.heads(), "k": s.heads(), "v": s.heads(), "frames": s.grid[0]}


def _attention_mass_lse(s: Shapes) -> Given:
    given = _attention_mass(s)
    return given | {"lse": attention_with_lse(given["q"], given["k"], given["v"])[1]}


def _attention_mass_sampled(s: Shapes) -> Given:
    given = _attention_mass(s)
    draw = torch.Generator().manual_seed(0)
    return given | {"rows": stratified(given["q"], s.grid[0], min(DRAWN, s.l // s.grid[0]), draw)}


CASES: dict[str, Callable[[Shapes], Given]] = {  # operation, and a suffix for the case
    "token_energy": _token_energy,
    "stream_energy": _stream_energy,
    "latent_mean": _latent_mean,
    "modulated_norm": _modulated_norm,
    "gated_add": _gated_add,
    "gated_add, energy": _gated_add_energy,
    "gated_add_norm": _gated_add_norm,
    "add_modulated_norm": _add_modulated_norm,
    "rms_norm": _rms_norm,
    "rms_rope": _rms_rope,
    "attention_mass": _attention_mass,
    "attention_mass, lse": _attention_mass_lse,
    "attention_mass_sampled": _attention_mass_sampled,
}
