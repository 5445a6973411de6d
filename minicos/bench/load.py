"""Reading a checkpoint of float32 shards: `load_into` against safetensors' `load_file` and torch's
`load_state_dict`.

The shards are written to a temporary folder and read from the page cache, so the disk has no
influence. They hold 4 GB on a card and 1 GB on a CPU, or what `--gb` says, and at most a third of
the free disk. "ceiling" is the time to read their bytes once, divided by ours; a mapped file is not
copied, which takes less. Both sides compare names and shapes with the network. "ours checked" is
what `minicos.load` does: every value is checked for NaN and infinity. The peer checks nothing; in
lines with "both checked" it is followed by torch's `isfinite` of every tensor. Without a cast, on a
CPU, files are mapped: without the check neither side reads a value, and the time is spent on
headers and modules. "peak" is the growth of anonymous host memory, ours | the peer's, on Linux: the
weights if they are on the host, and temporary memory. Memory mapped from files is not anonymous.
"""

import ctypes
import json
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path

import torch
from safetensors.torch import load_file

from minicos.bench.measure import Line, alternate, attempt
from minicos.bench.networks import A14B, QUICK
from minicos.config import VARIANTS
from minicos.dit import FLOAT32, DiT
from minicos.weights.load import load_into

STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
GB = {"cuda": 4.0, "cpu": 1.0}  # of blocks by default; a whole A14B would be read for an hour
SHARD = {"cuda": 10**9, "cpu": 10**8}  # bytes: several shards, as in published checkpoints
ABOVE = "above the ceiling: a mapped file is not copied, and the ceiling is a read that copies"
CHECKS = {  # who checks values: ours, theirs
    "": (False, False),
    ", ours checked": (True, False),
    ", both checked": (True, True),
}


def lines(device: torch.device, quick: bool = False, gb: float | None = None) -> Iterator[Line]:
    # each load touches new memory, as in a new process; glibc would otherwise reuse freed memory
    if not quick:
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    with tempfile.TemporaryDirectory() as name:
        network = subject(device, quick, shutil.disk_usage(name).free, gb)
        shapes = {key: p.shape for key, p in network.state_dict().items()}
        write(Path(name), shapes, SHARD[device.type])
        size = 4 * sum(shape.numel() for shape in shapes.values()) / 1e9
        for dtype, (checks, checked) in product((torch.float32, torch.bfloat16), CHECKS.items()):
            how = "as stored" if dtype == torch.float32 else "to bfloat16"
            what = f"{size:.2g} GB {how}{checks}"
            repeats = 2 if quick else 9
            yield attempt(
                what, partial(_measured, what, network, Path(name), dtype, device, checked, repeats)
            )


def subject(device: torch.device, quick: bool, free: int, gb: float | None = None) -> DiT:
    """A network on the meta device: blocks of A14B on a card, of Wan2.1-T2V-1.3B on a CPU, as many
    as `gb` (default: `GB`) and a third of the free disk hold.
    """
    card = device.type == "cuda"
    cfg = QUICK if quick else A14B if card else VARIANTS["Wan2.1-T2V-1.3B"]
    with torch.device("meta"):
        network = DiT(cfg)
    if not quick:
        block = 4 * sum(p.numel() for p in network.blocks[0].parameters())
        room = min(int(1e9 * (gb or GB[device.type])), free // 3)
        network.blocks = network.blocks[: max(1, room // block)]
    return network


def _measured(
    what: str,
    network: DiT,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    checked: tuple[bool, bool],
    repeats: int,
) -> Line:
    sides = [
        partial(side, network, folder, dtype, device, check_finite=check)
        for side, check in zip((ours, theirs), checked, strict=True)
    ]
    if STATUS.exists():
        peaks = []
        for side in sides:
            before = anonymous()
            with Peak() as peak:
                side()
            peaks.append((peak.bytes - before) / 1e9)
        what += ", peak {:.2g} | {:.2g} GB".format(*peaks)
    ms, peer_ms, read_ms = alternate(*sides, partial(_read, folder), device=device, repeats=repeats)
    peer = "load_file, load_state_dict" + ", isfinite" * checked[1]
    return Line(what, ms, peer, peer_ms, read_ms / ms, above=ABOVE)


def policy(dtype: torch.dtype, name: str) -> torch.dtype:
    return torch.float32 if any(part in name for part in FLOAT32) else dtype


def ours(
    network: DiT, folder: Path, dtype: torch.dtype, device: torch.device, check_finite: bool = False
) -> DiT:
    with torch.device("meta"):
        twin = _twin(network)
    load_into(twin, folder, dtype=partial(policy, dtype), device=device, check_finite=check_finite)
    return twin


def theirs(
    network: DiT, folder: Path, dtype: torch.dtype, device: torch.device, check_finite: bool = False
) -> DiT:
    """Load the whole state dict, then cast."""
    with torch.device("meta"):
        twin = _twin(network)
    state = {
        k: v
        for file in sorted(folder.glob("*.safetensors"))
        for k, v in load_file(file, str(device)).items()
    }
    twin.load_state_dict({k: v.to(policy(dtype, k)) for k, v in state.items()}, assign=True)
    if check_finite and not all(p.isfinite().all() for p in twin.parameters()):
        raise ValueError(f"{folder}: a value is not finite")
    return twin


def _twin(network: DiT) -> DiT:
    return DiT(replace(network.cfg, num_layers=len(network.blocks)))


def _read(folder: Path) -> None:
    """Read every byte once, into one buffer."""
    buffer = memoryview(bytearray(2**21))
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def write(folder: Path, shapes: Mapping[str, torch.Size], shard: int) -> None:
    """Write shards of about `shard` bytes at most, with an index, as published; one million random
    numbers are repeated.
    """
    numbers = torch.randn(2**20 - 1, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size and size + 4 * shape.numel() > shard:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += 4 * shape.numel()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name in names:
            begin, end = end, end + 4 * shapes[name].numel()
            header[name] = {
                "dtype": "F32",
                "shape": list(shapes[name]),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for piece in cycle([numbers]):
                out.write(piece[: min(end, len(piece))])
                end -= min(end, len(piece))
                if not end:
                    break
        weight_map |= dict.fromkeys(names, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )


def anonymous() -> int:
    """Bytes of this process's memory that do not belong to a file."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The largest `anonymous()` while a block runs."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()
