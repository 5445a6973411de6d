"""The network with every Triton kernel in place against the reference, see `tests/on_device.py`."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from minicos import ops
from minicos.dit import FLOAT32, DiT
from minicos.hooks import NO_HOOKS, Hooks
from minicos.ops import REFERENCE, Ops
from minicos.points import points
from tests.golden import rel_l2, rel_max

# isort: skip  finds minicos.kernels
from tests.on_device import DEVICE, on_device, randn

KERNELS = REFERENCE.with_kernels()


def test_with_kernels_swaps_in_twins_and_nothing_else():
    swapped = {
        f.name: getattr(KERNELS, f.name)
        for f in fields(Ops)
        if getattr(KERNELS, f.name) != getattr(ops, f.name)
    }
    assert set(swapped) == {
        "rms_norm",
        "rms_rope",
        "modulated_norm",
        "gated_add",
        "gated_add_norm",
        "add_modulated_norm",
        "token_energy",
        "stream_energy",
        "latent_mean",
        "attention_mass",
        "attention_mass_sampled",
    }
    for name, op in swapped.items():
        assert op.__name__ == name and op.__module__.startswith("minicos.kernels.")


@pytest.fixture
def network(small_dit):
    """dtype of matrices, of the residual stream, ops, changes of the configuration -> the same
    random network, on the device.
    """

    def make(dtype: torch.dtype, residual: torch.dtype, bundle: Ops, **changes) -> DiT:
        plain = small_dit(**changes)
        made = DiT(plain.cfg, bundle, residual).requires_grad_(False)
        made.load_state_dict(plain.state_dict())
        for name, p in made.named_parameters():
            if not any(part in name for part in FLOAT32):
                p.data = p.data.to(dtype)
        return made.to(DEVICE)

    return make


def run(network: DiT, hooks: Hooks = NO_HOOKS, per_frame: bool = False) -> Tensor:
    """The velocity of two different samples, two frames of two tokens."""
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 2, 2, 4, generator=draw), torch.randn(2, 5, 8, generator=draw)
    t = torch.tensor([[0.0, 900], [0, 30.5]] if per_frame else [900.0, 30.5])
    m = network.cfg.image_tokens
    clip = torch.randn(2, m, 6, generator=draw).to(DEVICE) if m else None
    return network(x.to(DEVICE), t.to(DEVICE), text.to(DEVICE), None, clip, hooks)


def watch(network: DiT) -> tuple[Tensor, dict[str, Tensor]]:
    """The velocity, and every tensor that hooks see, in their order."""
    seen: dict[str, Tensor] = {}
    hooks = Hooks()
    for depth in range(1, 5):
        hooks = hooks.on(".".join("*" * depth), lambda x, site: seen.update({site.name: x.clone()}))
    return run(network, hooks), seen


FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
# tolerances hold for the velocity and for every tensor before it; measured in the interpreter
POLICIES = [
    (torch.float32, torch.float32, 2e-6),  # measured 2.3e-7
    (FLOAT16, torch.float32, 5e-4),  # measured 8.7e-8: no float16 was rounded another way
    (FLOAT16, FLOAT16, 5e-4),  # measured 0
    (
        BFLOAT16,
        torch.float32,
        3e-2,
    ),  # measured 9.0e-3, for there bfloat16 is cut off instead of rounded
    (BFLOAT16, BFLOAT16, 3e-2),  # measured 1.3e-2
]


@on_device
@pytest.mark.parametrize(("dtype", "residual", "tolerance"), POLICIES)
def test_with_times_per_frame_and_an_image_the_velocity_is_the_references(
    dtype, residual, tolerance, network
):
    image = {"image_tokens": 257, "image_dim": 6, "num_layers": 1}
    actual, expected = (
        run(network(dtype, residual, o, **image), per_frame=True) for o in (KERNELS, REFERENCE)
    )
    assert actual.dtype == torch.float32
    assert rel_l2(actual, expected) < tolerance


@on_device
@pytest.mark.parametrize(("dtype", "residual", "tolerance"), POLICIES)
def test_hooks_see_the_same_tensors_in_the_same_order_and_change_no_bit(
    dtype, residual, tolerance, network
):
    with_kernels, reference = (
        network(dtype, residual, bundle, num_layers=1) for bundle in (KERNELS, REFERENCE)
    )
    (velocity, seen), (true, expected) = watch(with_kernels), watch(reference)
    assert rel_l2(velocity, true) < tolerance
    assert torch.equal(velocity, run(with_kernels))
    assert list(seen) == list(expected) == list(points(with_kernels.cfg))
    for name, tensor in seen.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype), name
        assert rel_l2(tensor.float(), expected[name].float()) < tolerance, name


@on_device
def test_a_compiled_block_is_one_graph_with_the_kernels_in_it(network):
    """Each kernel is an operation of the graph; compiled by a backend that changes nothing."""
    made = network(torch.float32, torch.float32, KERNELS, num_layers=1)
    before = run(made)
    for block in made.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(run(made), before)
    assert torch.equal(watch(made)[0], before)


@on_device
@pytest.mark.parametrize(
    "name", ["token_energy", "latent_mean", "attention_mass", "attention_mass_sampled"]
)
def test_what_analyses_call_may_stand_in_a_compiled_function(name):
    """As reducers do. Dynamo leaves these kernels out as well: where it traces one, the
    interpreter fails.
    """
    op, x = getattr(KERNELS, name), randn(2, 1, 6, 8)
    rows = torch.zeros(2, 1, 2, 2, dtype=torch.int64, device=DEVICE)
    given = {
        "token_energy": (),
        "latent_mean": (2,),
        "attention_mass": (x, 2),
        "attention_mass_sampled": (x, 2, rows),
    }

    def reduce(x: Tensor) -> object:
        return op(2 * x, *given[name])

    actual, expected = (tree_leaves(f(x)) for f in (torch.compile(reduce, backend="eager"), reduce))
    assert all(map(torch.equal, actual, expected))


@on_device
def test_a_network_with_gradients_is_refused(network):
    made = network(torch.float32, torch.float32, KERNELS, num_layers=1).requires_grad_(True)
    with pytest.raises(ValueError, match=r"no gradient.*minicos\.ops\.modulated_norm"):
        run(made)
    with torch.no_grad():
        assert (
            rel_max(run(made), run(network(torch.float32, torch.float32, REFERENCE, num_layers=1)))
            < 2e-6
        )
