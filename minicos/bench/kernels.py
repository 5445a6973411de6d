"""Each Triton kernel beside its reference in `ops`, as it is and compiled, on what a pass of A14B at 832x480x81 hands it.

Most are bound by memory. Their floor is every argument read once and every result written once, bytes = the sum of their sizes, and
"ceiling" is the share of a copy's bandwidth that this makes. The exact attention_mass is bound by its products, 2 b n l t k
operations; it is also held against the forward attention of its layer. Types are those of the official policy: residual stream,
modulation and weights of norms in float32, what comes out of a matrix product in bfloat16.
"""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minicos import attention
from minicos.bench.measure import Line, alternate, attempt, ceilings, rate
from minicos.bench.networks import A14B, QUICK, with_kernels
from minicos.config import DiTConfig
from minicos.errors import MinicosError
from minicos.ops import REFERENCE, rope

Given = dict[str, object]  # arguments by name; a function takes those that it knows


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    for name, case in CASES.items():
        try:
            kernel, reference = twins(name, device)
            given = case(Shapes(device, quick))
        except (MinicosError, torch.OutOfMemoryError) as error:
            yield Line(name, not_measured=str(error))
            continue
        others = {"reference": bound(reference, given), "reference, compiled": bound(torch.compile(reference), given)}
        if name == "attention_mass":
            others["attention of its layer"] = partial(attention.best(device), *(given[x] for x in ("q", "k", "v")))
        for peer, run in others.items():
            yield attempt(name, partial(_measured, name, bound(kernel, given), peer, run, device, quick))


def twins(name: str, device: torch.device) -> tuple[Callable, Callable]:
    """Kernel and reference of an operation. Raises MinicosError where there is no kernel, or none can run."""
    kernel, reference = (getattr(ops, name, None) for ops in (with_kernels(REFERENCE, device), REFERENCE))
    if kernel is reference:
        raise MinicosError("it has no kernel")
    return kernel, reference


def bound(op: Callable, given: Given) -> Callable[[], object]:
    return partial(op, **{name: given[name] for name in signature(op).parameters if name in given})


def _measured(name: str, kernel: partial, peer: str, other: Callable, device: torch.device, quick: bool) -> Line:
    ours, theirs = alternate(kernel, other, device=device, repeats=2 if quick else 20)
    if name == "attention_mass":
        q, k = (kernel.keywords[x] for x in ("q", "k"))
        flops = 2 * q.numel() * k.shape[2]
        share = ceilings(device, q.dtype).of_matmul(flops, ours)
        return Line(name, ours, peer, theirs, share, rate(flops, ours))
    tensors = [x for x in tree_leaves((kernel.keywords, kernel())) if isinstance(x, Tensor)]
    count = sum(x.nbytes for x in tensors)
    return Line(name, ours, peer, theirs, ceilings(device).of_copy(count, ours), f"{count / ours / 1e6:.4g} GB/s")


# -- what each is given -------------------------------------------------------------------------------------------------


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
        """What a sub-layer adds to it: 1 l d, bfloat16."""
        return self.randn(1, self.l, self.cfg.dim, dtype=torch.bfloat16)

    def modulation(self) -> Tensor:
        """1 1 d, float32."""
        return 0.1 * self.randn(1, 1, self.cfg.dim)

    def heads(self) -> Tensor:
        """1 n l k, bfloat16."""
        return self.randn(1, self.cfg.num_heads, self.l, self.cfg.head_dim, dtype=torch.bfloat16)


def _token_energy(s: Shapes) -> Given:
    return {"x": s.stream()}


def _latent_mean(s: Shapes) -> Given:
    return {"x": s.stream(3), "seeds": 3}


def _modulated_norm(s: Shapes) -> Given:
    scale, shift = s.modulation(), s.modulation()
    return {"x": s.stream(), "scale": scale, "shift": shift, "eps": s.cfg.eps, "dtype": torch.bfloat16}


def _gated_add(s: Shapes) -> Given:
    return {"x": s.stream(), "y": s.product(), "gate": s.modulation()}


def _add_norm(s: Shapes) -> Given:
    return _gated_add(s) | _modulated_norm(s)


def _rms_rope(s: Shapes) -> Given:
    q, k = s.product(), s.product()
    q_weight, k_weight = (1 + 0.1 * s.randn(s.cfg.dim) for _ in range(2))
    angles = tuple(angle.to(s.device) for angle in rope(s.grid, s.cfg.head_dim))
    each = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "x": q, "weight": q_weight}
    return each | {"angles": angles, "heads": s.cfg.num_heads, "eps": s.cfg.eps}


def _attention_mass(s: Shapes) -> Given:
    q, k, v = s.heads(), s.heads(), s.heads()
    scale, rows = s.cfg.head_dim**-0.5, q.split(s.l // s.grid[0], 2)
    lse = torch.cat([torch.logsumexp(row.float() @ k.float().mT * scale, -1) for row in rows], dim=2)  # the forward's
    return {"q": q, "k": k, "v": v, "frames": s.grid[0], "lse": lse}


CASES: dict[str, Callable[[Shapes], Given]] = {
    "token_energy": _token_energy,
    "latent_mean": _latent_mean,
    "modulated_norm": _modulated_norm,
    "gated_add": _gated_add,
    "add_norm": _add_norm,
    "rms_rope": _rms_rope,
    "attention_mass": _attention_mass,
}
