"""Choices for a device, with simulated cards."""

import sys
import warnings

import pytest
import torch
from torch.torch_version import TorchVersion

from minicos import device
from minicos.errors import MinicosError, MinicosWarning
from minicos.ops import REFERENCE, Ops

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A card as torch reports it, and the outcome of a trial of `token_energy` there."""

    def make(capability=(9, 0), cuda="12.8", energy=lambda x: torch.tensor(2.0)) -> None:
        device.obstacle.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch, "ones", lambda *shape, device: None)
        twins = Ops(token_energy=energy)
        monkeypatch.setattr(Ops, "with_kernels", lambda self: twins)

    yield make
    device.obstacle.cache_clear()


def broken(x):
    raise RuntimeError("Failed to find C compiler.\nand much more")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, ""),
        ({"cuda": None}, "NVIDIA"),
        ({"capability": (7, 5)}, "need compute capability 8.0, and this card has 7.5"),
        ({"energy": broken}, r"a trial failed (Failed to find C compiler.)"),
        ({"energy": lambda x: torch.tensor(3.0)}, "a trial gave 3.0 for 2"),
    ],
)
def test_kernels_are_on_where_they_work(given, reason, card, monkeypatch):
    card(**given)
    monkeypatch.setattr("minicos.attention.best", lambda device: REFERENCE.attention)
    assert (device.obstacle(CARD) == "") == (reason == "")
    assert reason in device.obstacle(CARD)
    chosen = device.operations(CARD)
    assert (chosen == REFERENCE) == bool(reason)
    assert device.operations(CARD, kernels=False) == REFERENCE
    if reason:
        assert reason in device.describe(chosen, CARD)
        with pytest.raises(
            MinicosError, match=r"the kernels do not work here: .* Leave out --kernels"
        ):
            device.operations(CARD, kernels=True)
    else:
        assert device.operations(CARD, kernels=True) == chosen
        assert "kernels are off" in device.describe(REFERENCE, CARD)


def test_without_triton(card, monkeypatch):
    card()
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: None)
    monkeypatch.setitem(sys.modules, "minicos.kernels.add_norm", None)
    assert "Triton is missing" in device.obstacle(CARD)


def test_a_cpu_computes_with_the_reference():
    assert device.operations(CPU) == REFERENCE
    assert not device.with_kernels(REFERENCE)
    assert "they need a CUDA card, and this is cpu" in device.describe(REFERENCE, CPU)


@pytest.mark.parametrize(
    ("version", "cudnn", "told"),
    [
        ("2.8.0", 91002, False),
        ("2.9.0+cu128", 91500, True),
        ("2.9.1+cu128", 91002, True),
        ("2.9.1+cu130", 91500, False),
        ("2.10.0", 91501, False),
    ],
)
def test_slow_convolutions_are_told_with_a_remedy(version, cudnn, told, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", MinicosWarning)
        device.warn_of_slow_convolutions(CARD)
        device.warn_of_slow_convolutions(CPU)
    assert len(heard) == told
    assert all("nvidia-cudnn-cu12>=9.15" in str(w.message) for w in heard)
