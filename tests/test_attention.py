"""Which attention is chosen for which card, and that choosing changes no value on a CPU;
compiled models.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import _cur_sdpa_kernel_backends as order_now
from torch.torch_version import TorchVersion

from minicos import measures
from minicos.analysis.attention import gives_lse
from minicos.attend import attend
from minicos.attention import WITH_LSE, best, cudnn_first, describe, with_best
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.open import load
from minicos.ops import REFERENCE, attention
from minicos.record import Record

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A card of this compute capability, as torch reports it."""

    def make(
        capability: tuple[int, int],
        cuda: str | None = "12.8",
        cudnn: bool = True,
        version: str = "2.10.0",
    ) -> None:
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn)

    return make


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [((9, 0), cudnn_first), ((10, 0), cudnn_first), ((10, 3), cudnn_first)]
    + [((c, 0), attention) for c in (7, 8, 12)]
    + [((8, 9), attention)],
)
def test_hopper_and_datacentre_blackwell_ask_cudnn_first(capability, chosen, card):
    card(capability)
    assert best(CARD) is chosen
    assert best(CPU) is attention


@pytest.mark.parametrize(("version", "asks"), [("2.10.1", True), ("2.11.0+cu130", False)])
def test_from_2_11_on_pytorch_chooses(version, asks, card):
    card((9, 0), version=version)
    assert (best(CARD) is cudnn_first) == asks


@pytest.mark.parametrize(("rows", "keys", "asks"), [(128, 256, 1), (130, 256, 0), (128, 200, 0)])
def test_rows_that_cudnn_may_get_wrong_stay_with_pytorchs_order(rows, keys, asks, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "minicos.attention.sdpa_kernel", lambda *a, **k: asked.append(a) or nullcontext()
    )
    q, k = torch.randn(1, 1, rows, 8), torch.randn(1, 1, keys, 8)
    assert torch.equal(cudnn_first(q, k, k), attention(q, k, k))
    assert len(asked) == asks


@pytest.mark.parametrize("without", [{"cuda": None}, {"cudnn": False}], ids=["AMD", "no cuDNN"])
def test_without_cudnn_the_order_is_that_of_pytorch(without, card):
    card((9, 0), **without)
    assert best(CARD) is attention


def test_an_attention_of_ones_own_stays(card):
    card((9, 0))

    def own(q, k, v):
        return v

    assert (with_best(replace(REFERENCE, self_attention=own), CARD).self_attention) is own
    assert with_best(replace(REFERENCE, self_attention=own), CARD).attention is cudnn_first
    assert with_best(REFERENCE, CPU) == REFERENCE
    described = [
        describe(replace(REFERENCE, self_attention=op)) for op in (attention, cudnn_first, own)
    ]
    assert described[:2] == [
        "scaled_dot_product_attention",
        "scaled_dot_product_attention, cuDNN first",
    ]
    assert described[2].endswith("own")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asking_in_another_order_is_the_same_attention(dtype, compiled):
    """On a CPU the backend is the same either way; and the order is put back, also when traced
    as one graph.
    """
    q, k, v = (
        torch.randn(2, 3, 128, 8, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i in range(3)
    )
    op = torch.compile(cudnn_first, fullgraph=True, backend="eager") if compiled else cudnn_first
    before = order_now(with_priority=True)
    assert torch.equal(op(q, k, v), attention(q, k, v))
    heads, lse = WITH_LSE[cudnn_first](q, k, v)
    assert torch.equal(heads, attention(q, k, v))
    assert (lse - measures.log_sum_exp(q, k)).abs().max() < 1e-4  # measured 3e-5 in bfloat16
    assert order_now(with_priority=True) == before


def test_either_choice_gives_log_sum_exp_as_a_by_product(monkeypatch):
    """On a Hopper before PyTorch 2.11, too: the products q k^T are not computed again."""
    monkeypatch.setattr(measures, "log_sum_exp", lambda q, k: pytest.fail("computed again"))
    q, k, v = torch.randn(3, 1, 2, 128, 8)
    for chosen in (attention, cudnn_first):
        seen = []
        hooks = NO_HOOKS.on("lse", lambda x, site, seen=seen: seen.append(x))
        heads = attend(q, k, v, chosen, hooks)
        assert torch.equal(heads, chosen(q, k, v)) and seen[0].shape == (1, 2, 128)
        assert gives_lse(SimpleNamespace(ops=replace(REFERENCE, self_attention=chosen)))
    assert not gives_lse(SimpleNamespace(ops=replace(REFERENCE, self_attention=max)))


# -- compiled models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(toys21):
    """residency -> a model of two blocks, compiled while it was loaded."""

    def make(residency: str = "auto"):
        try:
            return load(toys21["first frame"], device="cpu", compile=True, residency=residency)
        except MinicosError as error:
            pytest.skip(str(error))

    return make


def last(wan, hooks=Hooks()) -> torch.Tensor:  # noqa: B008
    condition = wan.condition("solve the maze", torch.full((3, 32, 48), 0.5))
    return [*wan.sample(condition, seed=0, hooks=hooks)][-1].next


def test_a_watched_block_fires_and_leaves_nothing_behind(compiled, toys21):
    wan, energies, inside = compiled(), Record(lambda x: x.norm(dim=-1)), Record(lambda x: x.mean())
    before = last(wan)
    assert torch.equal(last(wan, Hooks().on("blocks.*", energies, branch="cond")), before)
    assert [(site.step, site.name) for site, _ in energies.entries] == [
        (s, f"blocks.{i}") for s in (0, 1) for i in (0, 1)
    ]
    last(wan, Hooks().on("blocks.1.self_attn.q", inside, step=0, branch="cond"))
    assert [site.name for site, _ in inside.entries] == ["blocks.1.self_attn.q"]
    assert torch.equal(last(wan), before)
    plain = last(load(toys21["first frame"], device="cpu"))
    assert 0 < (before - plain).norm() / plain.norm() < 1e-5  # compiled it is: last bits differ


@pytest.mark.parametrize("residency", ["swap", "stream"])
def test_compiled_weights_on_the_move(residency, compiled):
    assert torch.equal(last(compiled(residency)), last(compiled()))


def test_without_a_compiler_it_says_what_to_do(toys21, monkeypatch):
    def fail(f):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(
        "minicos.open.load_into", lambda *args, **options: pytest.fail("a weight was read")
    )
    with pytest.raises(
        MinicosError,
        match=r"not work here \(No working C\+\+ compiler found\)\. It needs .* --compile",
    ):
        load(toys21["first frame"], device="cpu", compile=True)
