"""What only a CUDA card runs, on a stand-in: streams and events that write down their order, and
memory that belongs to the CPU. A real card checks the rest (test_on_a_card.py).
"""

import os
import threading
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minicos import load, plan, runs, selfcheck
from minicos.cli import vbvr
from minicos.errors import MinicosError, MinicosWarning
from minicos.stream import CudaCopyQueue, FileBuffer, HostBuffer, Streamer
from minicos.weights import load as loading
from minicos.weights.header import read_part

CARD = torch.device("cuda", 1)


class Card:
    """Streams by name, and everything that they are asked to do, in order."""

    def __init__(self, monkeypatch):
        self.log: list[tuple] = []
        self.count, self._streams = 0, threading.local()  # each thread has a current stream
        for name in ("Stream", "Event", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @property
    def current(self):
        return getattr(self._streams, "current", "compute")

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
        before, self._streams.current = self.current, stream.name
        try:
            yield
        finally:
            self._streams.current = before

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
    queue.copy(target, source, queue.event()).result()
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


class SlowCard(Card):
    """A card that computes until the test says that a block is done. Who waits for an event behind
    a block's computation waits for that, and not for ever.
    """

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.launched, self.done = 0, 0  # blocks
        self._changed = threading.Condition()
        self._copies = SimpleNamespace(name="copies", behind=0, wait_event=self._copies_wait)

    def Stream(self, device):
        return self._copies

    def current_stream(self, device):
        if self.current == "copies":
            return self._copies
        return SimpleNamespace(
            name="compute", behind=self.launched, wait_event=lambda event: event.behind
        )

    def Event(self):
        event = SimpleNamespace(behind=0)  # as many blocks must be done before it occurs
        event.record = lambda stream: setattr(event, "behind", stream.behind)
        event.synchronize = lambda: self._wait(event.behind)
        return event

    def finish(self, behind=0):
        """All blocks that were launched are done, but for the last ones."""
        with self._changed:
            self.done = self.launched - behind
            self._changed.notify_all()

    def _copies_wait(self, event):
        self._copies.behind = max(self._copies.behind, event.behind)

    def _wait(self, behind):
        with self._changed:
            if not self._changed.wait_for(lambda: self.done >= behind, timeout=5):
                raise TimeoutError(f"the host waits for block {behind - 1}, which computes")


@pytest.fixture
def slow(monkeypatch):
    return SlowCard(monkeypatch)


@pytest.fixture
def from_disk(slow, tmp_path, monkeypatch):
    """Blocks in a file, each of seven pieces, and their streamer."""
    monkeypatch.setattr(loading, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(loading, "PINNED", 6 * 6 * 4)
    draw = torch.Generator().manual_seed(0)
    weights = {f"blocks.{i}.weight": torch.randn(37, 6, generator=draw) for i in range(5)}
    save_file(weights, tmp_path / "a.safetensors")
    (header,) = read_part(tmp_path / "a.safetensors", "")
    opened, bring = loading.open_tensors(header), loading.PinnedCopies(torch.device("cpu"))

    def read(name, place):
        x, one = weights[name], loading.Stored(header, name, opened)
        return loading._fill(place(name, x.shape, x.dtype), one, None, bring)

    streamer = Streamer(CudaCopyQueue(CARD), torch.device("cpu"))
    blocks = [nn.Linear(6, 37, bias=False).requires_grad_(False) for _ in range(5)]
    for i, block in enumerate(blocks):
        host = FileBuffer(block, lambda name: torch.float32, False, f"blocks.{i}.", kept=False)
        streamer.host[block], host.read = host, read
    return SimpleNamespace(
        path=header.path, weights=[*weights.values()], run=streamer.stream, blocks=blocks
    )


def launch(slow, disk, count=None):
    """Launch the blocks of a pass, or the first ones. Each computes until the next is launched: the
    card is never idle.
    """
    for block, weight in zip(islice(disk.run(disk.blocks), count), disk.weights, strict=not count):
        assert torch.equal(block.weight, weight)
        slow.launched += 1
        slow.finish(behind=1)


def test_a_block_read_from_its_file_is_launched_while_the_one_before_computes(slow, from_disk):
    """Of its pieces most wait for the computation before the copy, and a thread waits with them."""
    for _ in range(3):
        launch(slow, from_disk)


@pytest.mark.parametrize("count", range(1, 5))
def test_what_a_pass_that_ends_early_still_copies_harms_no_other(slow, from_disk, count):
    for _ in range(2):
        launch(slow, from_disk, count)
        threading.Timer(0.05, slow.finish).start()  # the next pass waits for the last block
    launch(slow, from_disk)


def test_a_file_that_changes_is_an_error_of_the_pass_and_of_no_other(slow, from_disk):
    launch(slow, from_disk)
    size = from_disk.path.stat().st_size
    with from_disk.path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(MinicosError, match="has become shorter or longer while it was read"):
        launch(slow, from_disk)
    slow.finish()
    os.truncate(from_disk.path, size)
    launch(slow, from_disk)


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
