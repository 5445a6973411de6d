"""The residual stream of a pass that stops early: later blocks are not computed."""

from typing import SupportsIndex

from torch import Tensor

from minicos.checks import check_gradients
from minicos.condition import WanCondition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.precision import undisturbed
from minicos.sample import Moment
from minicos.wan import Wan


def stream(
    wan: Wan,
    x: Tensor,
    step: int,
    condition: WanCondition,
    layer: int,
    *,
    branch: str = "cond",
    hooks: Hooks = NO_HOOKS,
    grad: bool = False,
) -> Tensor:
    """The residual stream that enters block `layer` in a pass at latent x and a step. Layer
    `wan.depth` is the stream that leaves the last block.

    Args:
        x: latent entering the step, b c f h w.
        grad: keep the graph, as `sample` does.

    Returns:
        The stream, b l d.

    Raises:
        MinicosError: there is no such step or layer, or gradients are required and do not flow.
    """
    schedule = wan.schedule()
    whole = isinstance(step, SupportsIndex) and isinstance(layer, SupportsIndex)
    if not whole or not 0 <= step < len(schedule) or not 0 <= layer <= wan.depth:
        raise MinicosError(
            f"step {step}, layer {layer}: this run has steps 0 to {len(schedule) - 1}, and a stream"
            f" enters layers 0 to {wan.depth}"
        )
    if grad:
        wan.check_differentiable()
    else:
        check_gradients(x, *vars(condition).values())
    timestep = schedule.timesteps[step]
    moment = Moment(step, schedule.sigmas[step], timestep, wan.expert_name(timestep))
    where = {"step": step, "expert": moment.expert, "branch": branch}
    hooks.check(wan.points, [where])
    here = hooks.at(**where, sigma=moment.sigma)
    with undisturbed(grad):
        return wan.run_network(condition.impose(x), moment, branch, condition, here, layer)
