"""How much memory does loading take beyond the weights, and how fast is it? Writes a checkpoint of
random numbers and loads it.

    python -m tests.measure_load                                       TI2V-5B, 20 GB of float32 in
                                                                       shards, loaded as bfloat16
    python -m tests.measure_load --variant Wan2.2-I2V-A14B --layers 10 --lora 64

Prints one JSON object. `over` is the peak of anonymous host memory (RssAnon; Linux) over what is
there when loading is done. The checkpoint lies in a temporary folder (`--folder` says where) and is
deleted.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from minicos.bench.load import Peak, anonymous, write
from minicos.config import VARIANTS
from minicos.dit import FLOAT32, DiT
from minicos.tiny.lora import save_lora
from minicos.weights import lora
from minicos.weights.header import weight_files
from minicos.weights.load import load_into


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", default="Wan2.2-TI2V-5B", choices=VARIANTS)
    parser.add_argument("--layers", type=int)
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="merge one into every matrix of the blocks"
    )
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
                k: lora.LowRank(
                    *(
                        torch.randn(s)
                        for s in ((shapes[k][0], args.lora), (args.lora, shapes[k][1]))
                    )
                )
                for k in matrices
            }
            save_lora(folder / "lora", deltas, torch.bfloat16)
            loras = [lora.read(folder / "lora")]
            del deltas
        before = anonymous()
        begin = time.monotonic()
        with Peak() as peak:
            load_into(
                network,
                folder,
                lora=loras,
                label="load",
                dtype=lambda name: (
                    torch.float32 if any(n in name for n in FLOAT32) else torch.bfloat16
                ),
            )
        seconds = time.monotonic() - begin
        sizes = [file.stat().st_size for file in weight_files(folder)]
    weights = sum(p.nbytes for p in network.parameters())
    after = anonymous()
    print(
        json.dumps(
            {
                "variant": args.variant,
                "shards": len(sizes),
                "file_bytes": sum(sizes),
                "weights_bytes": weights,
                "merged": len({name for lora in loras for name in lora.deltas}),
                "before": before,
                "after": after,
                "peak": peak.bytes,
                "over": peak.bytes - after,
                "seconds": round(seconds, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
