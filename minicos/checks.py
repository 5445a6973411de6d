"""Checks of what callers of the loop can get wrong, each with a one-sentence error, and checks for
numbers that are not finite.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import Hooks


def check_types(condition: object, hooks: object, state: object = None) -> None:
    if not isinstance(condition, Condition):
        raise MinicosError(
            f"a run needs a condition, not {type(condition).__name__}; see `Wan.condition`"
        )
    if condition.shape[0] < 1:
        raise MinicosError("this condition has no samples: take one or more of it")
    if not isinstance(hooks, Hooks):
        raise MinicosError(f"hooks are made by Hooks().on(...), not {type(hooks).__name__}")
    if state is not None:
        check_state(state)


def check_state(state: object) -> None:
    """Raise MinicosError unless it is a `State`, whose module imports this one."""
    if not hasattr(state, "beside"):
        raise MinicosError(f"the state of a run is that of a step, not {type(state).__name__}")


def check_numbers(tensor: Tensor, what: str) -> None:
    """Raise MinicosError for a tensor whose numbers are not there to compute with."""
    kinds = {
        "nested": tensor.is_nested,
        "sparse": not tensor.is_nested and tensor.layout != torch.strided,
        "on the meta device": tensor.is_meta,
        "quantised": tensor.is_quantized,
        "complex": tensor.is_complex(),
        "of 8-bit floats": tensor.is_floating_point() and tensor.element_size() == 1,
    }
    if kind := next((kind for kind, found in kinds.items() if found), None):
        raise MinicosError(f"{what} is a tensor of real numbers in memory, and this one is {kind}")


def check_noise(noise: object, shape: Sequence[int]) -> None:
    """Raise MinicosError unless it is a float32 tensor of this shape."""
    if not isinstance(noise, Tensor):
        raise MinicosError(f"noise is a tensor, not {type(noise).__name__}; see `Wan.noise`")
    check_numbers(noise, "noise")
    if tuple(noise.shape) != tuple(shape) or noise.dtype != torch.float32:
        raise MinicosError(
            f"the noise is {noise.dtype} {tuple(noise.shape)}; this condition needs float32 "
            f"{tuple(shape)}"
        )


def check_finite(latents: Mapping[str, Tensor], step: int, expert: str, cause: str) -> None:
    """Raise MinicosError if a number is NaN or infinite: such a video is black."""
    for name, x in latents.items():
        if not torch.isfinite(x).all():
            raise MinicosError(
                f"step {step}, expert {expert}: the latent of the {name} is no longer finite; it "
                f"{cause}."
            )


def check_latent(latent: object, channels: int) -> None:
    """Raise MinicosError for a latent that cannot be decoded by a VAE of so many channels."""
    if isinstance(latent, Tensor):
        check_numbers(latent, "a latent")
    shape = tuple(getattr(latent, "shape", ()))
    if not isinstance(latent, Tensor) or len(shape) != 5 or shape[1] != channels or 0 in shape:
        raise MinicosError(
            f"latents are b c f h w, not {type(latent).__name__} {shape}; c is {channels} here, "
            "and none is 0"
        )
    if not torch.isfinite(latent).all():
        raise MinicosError("the latent is not finite, and its video would be black")


def check_edit(index: int, left: object, given: Tensor, grad: bool = False) -> None:
    """Raise MinicosError if the loop cannot continue from what its body left."""
    if not isinstance(left, Tensor):
        raise MinicosError(
            f"step {index}: its `next` is a tensor, and {type(left).__name__} was assigned"
        )
    check_numbers(left, f"step {index}: its `next`")
    made, wanted = ((x.dtype, tuple(x.shape), x.device) for x in (left, given))
    if made != wanted:
        raise MinicosError(
            f"step {index}: its `next` is {' '.join(map(str, wanted))}, and "
            f"{' '.join(map(str, made))} was assigned"
        )
    if not grad:
        check_gradients(left)


def check_gradients(*given: object) -> None:
    """Raise MinicosError for tensors that require gradients: networks run without gradients, so the
    tensors would count as constants.
    """
    tensors = (x for x in given if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise MinicosError(
            "this run keeps no gradients, and its noise, condition or latent expects some: sample "
            "with grad=True, detach it, or sample under torch.no_grad()"
        )
