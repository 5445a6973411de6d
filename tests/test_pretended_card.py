"""What only a CUDA card runs, on a stand-in: streams and events that write down their order, and
memory that belongs to the CPU. A real card checks the rest (test_on_a_card.py).
"""

from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minicos import load, plan, runs, selfcheck
from minicos.cli import vbvr
from minicos.errors import MinicosWarning
from minicos.stream import CudaCopyQueue, FileBuffer, HostBuffer
from minicos.weights import load as loading
from minicos.weights.header import read_part

CARD = torch.device("cuda", 1)


class Card:
    """Streams by name, and everything that they are asked to do, in order."""

    def __init__(self, monkeypatch):
        self.log: list[tuple] = []
        self.current, self.count = "compute", 0
        for name in ("Stream", "Event", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device):
        return SimpleNamespace(
            name="copies", wait_event=lambda event: self.log.append(("copies waits", event.number))
        )

    def Event(self):
        self.count += 1
        number = self.count
        return SimpleNamespace(
            number=number,
            record=lambda stream: self.log.append((stream.name, "records", number)),
            synchronize=lambda: self.log.append(("host waits", number)),
        )

    def current_stream(self, device):
        return SimpleNamespace(
            name=self.current,
            wait_event=lambda event: self.log.append((f"{self.current} waits", event.number)),
        )

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def target(self, name):
        """A tensor that says when, and on which stream, it is filled."""

        def copy_(source, non_blocking):
            self.log.append((self.current, "copies", name, non_blocking))

        return SimpleNamespace(copy_=copy_)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def test_a_copy_waits_for_the_computation_before_it_and_computation_for_the_copy(card):
    queue = CudaCopyQueue(CARD)
    source = HostBuffer(nn.Linear(1, 1), lambda name: torch.float32, pin=False)
    copied = queue.copy(card.target("block"), source, queue.event())
    queue.wait(copied)
    assert card.log == [
        ("compute", "records", 1),
        ("copies waits", 1),
        ("copies", "copies", "block", True),
        ("copies", "records", 2),
        ("compute waits", 2),
    ]


@pytest.fixture
def stored(tmp_path):
    """A tensor of a file, larger than both buffers together."""
    from safetensors.torch import save_file

    x = torch.randn(37, 6, generator=torch.Generator().manual_seed(0))
    save_file({"weight": x}, tmp_path / "a.safetensors")
    (header,) = read_part(tmp_path / "a.safetensors", "")
    return x, loading.Stored(header, "weight", loading.open_tensors(header))


def test_weights_from_a_file_come_on_the_stream_of_copies(stored, card, monkeypatch):
    """Pinned buffers belong to that stream, and the block's event comes after the last of them."""
    monkeypatch.setattr(loading, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(loading, "PINNED", 20 * 6 * 4)
    bring = loading.PinnedCopies(torch.device("cpu"))
    x, one = stored
    source = FileBuffer(nn.Linear(6, 37, bias=False), lambda name: x.dtype, pin=False, kept=False)
    source.read = lambda name, place: loading._fill(place(name, x.shape, x.dtype), one, None, bring)
    target = torch.empty(source.size, dtype=torch.uint8)
    queue = CudaCopyQueue(CARD)
    queue.copy(target, source, queue.event())
    assert torch.equal(source.view("weight", target), x)
    assert card.log == [
        ("compute", "records", 3),
        ("copies waits", 3),
        ("host waits", 2),
        ("copies", "records", 2),
        ("host waits", 1),
        ("copies", "records", 1),
        ("copies", "records", 4),
    ]


@pytest.mark.parametrize("refused", [False, True])
def test_a_buffer_is_filled_again_only_after_its_copy(refused, stored, card, monkeypatch):
    empty, asked = torch.empty, []

    def allocate(*size, pin_memory=False, **options):
        asked.append(pin_memory)
        if pin_memory and refused:
            raise RuntimeError("CUDA error: out of memory\nand more")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(loading, "PINNED", 5 * 6 * 4)  # five rows
    if refused:
        with pytest.warns(MinicosWarning, match=r"cannot be pinned \(CUDA error: out of memory\)"):
            bring = loading.PinnedCopies(torch.device("cpu"))
        assert asked == [True, False, True, False]
    else:
        bring = loading.PinnedCopies(torch.device("cpu"))
        assert asked == [True, True]
    x, one = stored
    found = loading._fill(empty(x.shape, dtype=torch.bfloat16), one, None, bring)
    assert torch.equal(found, x.bfloat16())
    waits = [entry[-1] for entry in card.log if entry[0] == "host waits"]
    records = [entry[-1] for entry in card.log if entry[1] == "records"]
    assert waits == records == [2, 1] * 4  # 37 rows in eight pieces, the buffers in turn
    assert [entry[0] for entry in card.log] == ["host waits", "compute"] * 8


def test_free_memory_of_a_card_counts_what_torch_keeps_for_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    assert plan.available(CARD) == 75
    assert plan.available(torch.device("meta")) is None


def test_selfcheck_names_the_card_and_its_peak(monkeypatch):
    wan = load("tiny", device="cpu")
    residency = SimpleNamespace(plan=replace(wan.residency.plan, device=CARD))
    about = SimpleNamespace(name="H200", total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("minicos.cost.throughput", lambda device, dtype: 7.5e14)
    there = replace(wan, residency=residency)
    machine = selfcheck._machine(there)
    assert machine["device"] == "cuda:1 (H200, 141 GiB, CUDA 12.8)"
    assert machine["matrix products"] == "750.00 TFLOP/s in float32"
    assert selfcheck._memory(there).startswith("peak 3.00 GiB, planned ")


def test_a_run_writes_down_the_cards_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert runs._peak_memory()["peak_cuda_memory"] == 123


@pytest.mark.parametrize(("given", "device"), [(None, "cuda:1"), ("cpu", "cpu")])
def test_processes_of_a_machine_share_its_cards(given, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = Namespace(device=given)
    vbvr._choose_card(args, SimpleNamespace(local=3))
    assert args.device == device
