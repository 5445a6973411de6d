"""How much memory does loading take beyond the weights, and how fast is it? Writes a checkpoint of random numbers and loads it.

    python -m tests.measure_load                                       TI2V-5B, 20 GB of float32 in shards, loaded as bfloat16
    python -m tests.measure_load --variant Wan2.2-I2V-A14B --layers 10 --lora 64

Prints one JSON object. `over` is the peak of anonymous host memory (RssAnon; Linux) over what is there when loading is done.
The checkpoint lies in a temporary folder (`--folder` says where) and is deleted.
"""

import argparse
import json
import struct
import tempfile
import threading
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch

from minicos.config import VARIANTS
from minicos.dit import FLOAT32, DiT
from minicos.weights import lora
from minicos.weights.load import READERS, load_into


def write(folder: Path, shapes: dict[str, torch.Size], shard: int) -> None:
    """Shards of at most `shard` bytes or so with an index, as published; the numbers are one million random ones, again and again."""
    numbers = torch.randn(2**20 - 1, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    shards, size = [[]], 0
    for name, shape in shapes.items():
        if size and size + 4 * shape.numel() > shard:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += 4 * shape.numel()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name in names:
            begin, end = end, end + 4 * shapes[name].numel()
            header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for piece in cycle([numbers]):
                out.write(piece[: min(end, len(piece))])
                end -= min(end, len(piece))
                if not end:
                    break
        weight_map |= dict.fromkeys(names, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def anonymous() -> int:
    """Bytes of this process's memory that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", default="Wan2.2-TI2V-5B", choices=VARIANTS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--lora", type=int, metavar="RANK", help="merge one into every matrix of the blocks")
    parser.add_argument("--readers", type=int, default=READERS)
    parser.add_argument("--shard", type=int, default=10**10, help="bytes")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    cfg = VARIANTS[args.variant]
    with torch.device("meta"):
        network = DiT(replace(cfg, num_layers=args.layers or cfg.num_layers))
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    matrices = [name for name in shapes if name.startswith("blocks.") and len(shapes[name]) == 2]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write(folder, shapes, args.shard)
        loras = []
        if args.lora:
            deltas = {
                k: lora.LowRank(*(torch.randn(s) for s in ((shapes[k][0], args.lora), (args.lora, shapes[k][1]))))
                for k in matrices
            }
            lora.save(folder / "lora", deltas, torch.bfloat16)
            loras = [lora.read(folder / "lora")]
            del deltas
        before = anonymous()
        begin = time.monotonic()
        with Peak() as peak:
            loaded = load_into(
                network, folder, lora=loras, readers=args.readers, label="load",
                dtype=lambda name: torch.float32 if any(n in name for n in FLOAT32) else torch.bfloat16,
            )  # fmt: skip
        seconds = time.monotonic() - begin
        files = sum(Path(file).stat().st_size for file in loaded.files)
    weights = sum(p.nbytes for p in network.parameters())
    after = anonymous()
    print(json.dumps({
        "variant": args.variant, "shards": len(loaded.files), "file_bytes": files, "weights_bytes": weights, "merged": loaded.merged,
        "before": before, "after": after, "peak": peak.bytes, "over": peak.bytes - after, "seconds": round(seconds, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
