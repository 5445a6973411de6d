"""Write the golden of a peer: what diffusers alone computes with a small random pipeline.

    pipe = diffusers.XImageToVideoPipeline(transformer=..., vae=..., scheduler=..., ...)
    peer_golden.randomise(pipe)
    peer_golden.write(folder, "x", pipe, given, points, size=(64, 48), frames=9, guidance=6.0)

`tests/peers.py` describes what the three files hold, and reads them.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.peers import STEPS

PICTURE_SEED = 7  # of random choices of the pipeline; the tests use the same


def randomise(pipe: Any, seed: int = 0) -> None:
    """Random weights that are exact in float16: no parameter is left at 0 or 1 throughout, which
    would hide mistakes.
    """
    draw = torch.Generator().manual_seed(seed)
    for network in _networks(pipe).values():
        for p in network.requires_grad_(False).eval().parameters():
            p.copy_((p + 0.1 * torch.randn(p.shape, generator=draw)).half())


def write(
    folder: Path,
    name: str,
    pipe: Any,
    given: Mapping[str, Tensor],
    points: Mapping[str, tuple[str, int | None]],
    *,
    size: tuple[int, int],
    frames: int,
    guidance: float = 1.0,
    ours: Callable[[Tensor], Tensor] = lambda x: x,
    **arguments: Any,
) -> None:
    """Write peer_NAME.safetensors, peer_NAME.weights.safetensors and peer_NAME.json.

    Args:
        given: `image` and rows of text, by the names of the pipeline's arguments.
        points: hook point -> a module of the transformer, and the item of its output that the point
            shows (None: all of it).
        guidance: as the peer's preset has it.
        ours: latents in the pipeline's layout -> b c f h w.
        arguments: further ones of the pipeline, such as true_cfg_scale; with `latents`, in its own
            layout, the run starts from these.
    """
    seen: dict[str, list[Tensor]] = {point: [] for point in points}
    found = {f"given.{k}": v for k, v in given.items()}

    def note(point: str, item: int | None) -> Callable[..., None]:
        return lambda module, inputs, out: seen[point].append(out if item is None else out[item])

    def keep(pipe: Any, i: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        found[f"loop.x.{i + 1}"] = ours(values["latents"])
        return values

    handles = [
        pipe.transformer.get_submodule(module).register_forward_hook(note(point, item))
        for point, (module, item) in points.items()
    ]
    found["loop.x.0"] = ours(arguments["latents"])
    height, width = size
    shape = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": STEPS}
    with torch.no_grad():
        pipe(
            **given,
            **shape,
            **arguments,
            generator=torch.Generator().manual_seed(PICTURE_SEED),
            output_type="latent",
            callback_on_step_end=keep,
        )
    for handle in handles:
        handle.remove()
    # the prompted pass is the first of a step, or the last row of a pass for both prompts
    found |= {f"out.{point}": each[len(each) // STEPS][-1:] for point, each in seen.items()}
    save_file(
        {k: v.clone().contiguous() for k, v in found.items()}, folder / f"peer_{name}.safetensors"
    )
    weights = {
        f"{part}.{k}": v.half().contiguous()
        for part, network in _networks(pipe).items()
        for k, v in network.state_dict().items()
    }
    save_file(weights, folder / f"peer_{name}.weights.safetensors")
    parts = (*_networks(pipe), "scheduler")
    facts = {
        "pipeline": type(pipe).__name__,
        "configs": {part: _config(pipe.components[part]) for part in parts},
        "size": list(size),
        "frames": frames,
        "guidance": guidance,
    }
    (folder / f"peer_{name}.json").write_text(json.dumps(facts))


def _config(part: Any) -> dict[str, Any]:
    return {k: v for k, v in dict(part.config).items() if not k.startswith("_")}


def _networks(pipe: Any) -> dict[str, torch.nn.Module]:
    return {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
