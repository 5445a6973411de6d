"""Obtain the arguments with which a pipeline would call its transformer.

Prompts, pictures, masks and positions are prepared by the pipeline. `prepared` runs it with the
transformer replaced by a stub, records the arguments of the calls of its first two steps, and stops
it there. What differs between the two calls changes with the latent; the rest is the condition.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from minicos.errors import MinicosError

Call = Mapping[str, Any]  # the keyword arguments of a transformer


class _Enough(Exception):
    """Raised when two steps have been recorded."""


def prepared(
    pipe: Any,
    answer: Callable[[Call], tuple[Tensor, ...]],
    moving: frozenset[str],
    given: Call,
    parts: Mapping[str, Any],
) -> Call:
    """The arguments of the transformer's first call in `pipe(**given)`. Of the networks only the
    encoders run; the pipeline is restored afterwards.

    Args:
        answer: a call -> zeros in the shapes of the transformer's output.
        moving: the arguments that may change from step to step.
        parts: attributes of the pipeline that are replaced meanwhile.

    Raises:
        MinicosError: other arguments change, or the pipeline makes no call or refuses `given`.
    """
    calls: list[Call] = []

    def stub(**call: Any) -> tuple[Tensor, ...]:
        calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()})
        if len(calls) == 2:
            raise _Enough
        return answer(call)

    with torch.no_grad(), _unplugged(pipe, stub, parts):
        try:
            pipe(**given)
        except _Enough:
            pass
        except (ValueError, TypeError) as error:
            raise MinicosError(
                f"{type(pipe).__name__} refuses what it was given: {error}"
            ) from error
    if len(calls) < 2:
        raise MinicosError(
            f"{type(pipe).__name__} made {len(calls)} calls of its transformer in a run"
        )
    first, second = calls
    moved = {k for k in first.keys() | second.keys() if not _same(first.get(k), second.get(k))}
    if unknown := ", ".join(sorted(moved - moving)):
        raise MinicosError(
            f"{type(pipe).__name__} changes {unknown} from step to step, which minicos does not "
            "expect: this version of diffusers is another than the one it was written for"
        )
    return first


def noted(pipe: Any, given: Call, parts: Mapping[str, Any]) -> list[Call]:
    """The arguments of all calls of the transformer in a normal run of `pipe(**given)`, with some
    `parts` of the pipeline replaced.
    """
    calls: list[Call] = []
    forward = pipe.transformer.forward

    def note(**call: Any) -> Any:
        calls.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()})
        return forward(**call)

    with torch.no_grad(), _unplugged(pipe, note, parts):
        pipe(**given)
    return calls


@contextmanager
def _unplugged(pipe: Any, stub: Callable[..., Any], parts: Mapping[str, Any]) -> Iterator[None]:
    """The pipeline with `stub` as its transformer's forward, a copy of its scheduler, no progress
    bar, and these `parts` instead of its own. Attributes are restored, including the forward of
    an offloader.
    """
    before, own = dict(vars(pipe)), vars(pipe.transformer)
    kept = {name: own[name] for name in ("forward",) if name in own}
    quiet = {"scheduler": deepcopy(pipe.scheduler), "_progress_bar_config": {"disable": True}}
    vars(pipe).update(quiet, **parts)
    own["forward"] = stub
    try:
        yield
    finally:
        del own["forward"]
        own.update(kept)
        vars(pipe).clear()
        vars(pipe).update(before)
        pipe.maybe_free_model_hooks()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or a == b
