"""Check that our loop reproduces a pipeline's own latents, with the same noise, picture and words.

The pipeline runs by itself, with guidance, while the calls of its transformer are recorded. Our
loop starts from the latents of the first call; each later call shows the latents between steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minicos.errors import MinicosError
from minicos.peers.peer import Peer
from minicos.peers.prepare import noted
from minicos.sample import VIDEO, State
from minicos.verify import TOLERANCE, Part, Row, distance

STEPS = 5
WHOLE = 32  # pixels; sizes are multiples of it, as some pipelines require
PROMPT = "a ball rolls to the left"


def verify(
    model: Peer, grid: tuple[int, int, int] = (3, 4, 6), *, tolerance: float | None = None
) -> Iterator[Part]:
    """Compare the latents that enter each step of a short run; yields one `Part`.

    Args:
        grid: smallest number of tokens along frames, height and width. A small grid suffices, since
            errors in the code show at any size.
        tolerance: largest allowed rel_l2, instead of `TOLERANCE` of the dtype.
    """
    (t, sh, sw), (pf, ph, pw), (f, h, w) = model.stride, model.patch, grid
    height, width = (-(-side // WHOLE) * WHOLE for side in (h * ph * sh, w * pw * sw))
    size, frames = (height, width), (f * pf - 1) * t + 1
    model = model.with_preset(steps=STEPS, frames=frames, size=size, area=None)
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    picture = picture.mul(255).round() / 255  # as a file would have it
    condition = model.condition(PROMPT, picture)
    theirs = their_latents(model, picture)
    start = theirs[0]
    state = State(beside={name: x for name, x in start.items() if name != VIDEO})
    allowed, found = tolerance or TOLERANCE[model.dtype], []
    for step, seen in zip(
        model.sample(condition, noise=start[VIDEO], state=state), theirs[1:], strict=False
    ):
        ours = {VIDEO: step.next, **step.state.beside}
        for name, x in seen.items():
            point = f"{name} latents after step {step.index}"
            found.append(Row(point, *distance(ours[name], x), allowed))
    yield Part("loop", tuple(found))


def their_latents(model: Peer, picture: Tensor) -> list[dict[str, Tensor]]:
    """The latents that enter each step when the pipeline runs by itself on one picture."""
    given = model.arguments_of_a_run([PROMPT], model.compressed(picture[None]))
    calls = noted(model.pipe, given, model.parts(guided=model.preset.guided))
    times = [float(call["timestep"].max()) for call in calls]
    firsts = [c for c, t, before in zip(calls, times, [None, *times], strict=False) if t != before]
    if len(firsts) != model.preset.steps:
        raise MinicosError(
            f"{type(model.pipe).__name__} made {len(firsts)} steps of {model.preset.steps}"
        )
    return [{name: x[:1] for name, x in model.received(call).items()} for call in firsts]
