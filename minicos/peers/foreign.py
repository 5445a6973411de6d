"""Hooks on the networks of other libraries, with the rules of `minicos.hooks`.

    with hooked(network, places, hooks): network(...)

A place defines where a hook point is. Most are the output of a module, or a part of it (`Spot`):
for the duration of the call, torch forward hooks are registered on the modules that a rule needs,
and on no others. Queries, keys, values and heads are not outputs of a module (`Attends`): a
`TorchFunctionMode` intercepts every `scaled_dot_product_attention`, after norms and rotary
embedding, and the enclosing module identifies it.

When the call ends, also by an exception, all hooks are removed. If hooks leave a tensor unchanged,
the network continues with its own, so observing does not change a single bit.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minicos.attend import attend
from minicos.errors import MinicosError
from minicos.hooks import Hooks

# the points inside an attention, and their shapes: t keys, or j if text and video attend jointly
PARTS = dict.fromkeys(("q", "k", "v", "heads"), "b n l k") | {
    "allowed": "b n l t",
    "pattern": "b n l t",
    "lse": "b n l",
}


@dataclass(frozen=True)
class Spot:
    """A hook point that is the output of a module, or a part of it."""

    module: str  # its name in the network: "transformer_blocks.3.attn1"
    shape: str  # of the point, in letters
    items: tuple[int, ...] = ()  # of a returned tuple; several are joined along the tokens
    rows: slice = field(default_factory=lambda: slice(None), hash=False)  # of the tokens
    video: slice = field(default_factory=lambda: slice(None), hash=False)  # see `Site.video`

    def take(self, out: Any) -> Tensor:
        """The point's tensor."""
        parts = [out[i] for i in self.items] or [out]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[:, self.rows]

    def put(self, out: Any, x: Tensor) -> Any:
        """The module's output with x in place of the point's tensor."""
        if not self.items:
            return self._within(out, x)
        parts = list(out)
        sizes = [out[i].shape[1] for i in self.items]
        pieces = x.split(sizes, dim=1) if len(sizes) > 1 else [self._within(out[self.items[0]], x)]
        for i, piece in zip(self.items, pieces, strict=True):
            parts[i] = piece
        return tuple(parts)

    def _within(self, whole: Tensor, x: Tensor) -> Tensor:
        start, stop, _ = self.rows.indices(whole.shape[1])
        if (start, stop) == (0, whole.shape[1]):
            return x
        return torch.cat([whole[:, :start], x, whole[:, stop:]], dim=1)


@dataclass(frozen=True)
class Attends:
    """A module that computes one attention: the points NAME.q, .k, .v and .heads, and those of
    `minicos.attend`.
    """

    module: str
    video: slice = field(default_factory=lambda: slice(None), hash=False)  # see `Site.video`


@dataclass(frozen=True)
class Places:
    """The locations of a network's hook points, by name."""

    spots: Mapping[str, Spot] = field(default_factory=dict)  # those of one module run in order
    attentions: Mapping[str, Attends] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, str]:
        """Every hook point and its shape in letters; j counts the rows of video and text."""
        within = {f"{name}.{p}": shape for name in self.attentions for p, shape in PARTS.items()}
        return {name: spot.shape for name, spot in self.spots.items()} | within

    def watched(self, hooks: Hooks) -> "Places":
        """The places at which a rule can apply."""
        spots = {name: spot for name, spot in self.spots.items() if _any(hooks, [name])}
        within = {
            name: place
            for name, place in self.attentions.items()
            if _any(hooks, [f"{name}.{part}" for part in PARTS])
        }
        return Places(spots, within)

    def computed(self, hooks: Hooks, skipped: Container[str]) -> "Places":
        """The places without the skipped attentions. Raises MinicosError for a rule on one of them
        that is limited to the branch of this pass.
        """
        for name in filter(skipped.__contains__, self.attentions):
            own = Hooks(tuple(rule for rule in hooks.rules if rule.branch))
            if _any(own, [f"{name}.{part}" for part in PARTS]):
                raise MinicosError(
                    f"{name} is not computed in the pass {hooks.site.branch}, so it has no hook "
                    "points there: take other layers or another branch"
                )
        kept = {name: at for name, at in self.attentions.items() if name not in skipped}
        return replace(self, attentions=kept)


def joint(name: str, module: str, text: int) -> dict[str, Spot]:
    """The points of a module that returns video and text: NAME, NAME.text, and both as NAME.joint,
    the video first. `text` is the number of text rows.
    """
    return {
        name: Spot(module, "b l d", (0,)),
        f"{name}.text": Spot(module, "b t d", (1,)),
        f"{name}.joint": Spot(module, "b j d", (0, 1), video=slice(None, -text or None)),
    }


def joint_blocks(network: Any, text: int) -> Places:
    """The places in a network whose blocks process video and text, the text last: first blocks
    with weights for each, then perhaps `single` ones with shared weights, which compute attention
    and feed-forward in one projection.
    """
    names = [f"transformer_blocks.{k}" for k, _ in enumerate(network.transformer_blocks)]
    double, single = len(names), getattr(network, "single_transformer_blocks", ())
    names += [f"single_transformer_blocks.{k}" for k, _ in enumerate(single)]
    spots = {"embed": Spot("x_embedder", "b l d"), "text": Spot("context_embedder", "b t d")}
    attentions = {}
    for k, theirs in enumerate(names):
        ours, attention = f"blocks.{k}", f"{theirs}.attn"
        spots |= joint(ours, theirs, text) | joint(f"{ours}.self_attn", attention, text)
        if k < double:
            spots[f"{ours}.ffn"] = Spot(f"{theirs}.ff", "b l d")
            spots[f"{ours}.ffn.text"] = Spot(f"{theirs}.ff_context", "b t d")
        attentions[f"{ours}.self_attn"] = Attends(attention, video=slice(None, -text or None))
    return Places(spots, attentions)


@contextmanager
def hooked(
    network: nn.Module, places: Places, hooks: Hooks, *, skipped: Container[str] = ()
) -> Iterator[None]:
    """Apply `hooks` to the points of one call of `network` (a context).

    Args:
        skipped: attentions that this call does not compute. Nothing flows there: a hook of all
            passes does not run, and one of this branch alone is refused.

    Raises:
        MinicosError: the network is compiled as a whole, so hooks would not run, or an attention is
            not computed by torch, or not in this pass.
    """
    watched = places.watched(hooks).computed(hooks, skipped)
    if not watched.spots and not watched.attentions:
        yield
        return
    check_watchable(network)
    with ExitStack() as stack:
        # Blocks that are compiled one by one run eagerly: their graph may exist already.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, spot in watched.spots.items():
            module = network.get_submodule(spot.module)
            handle = module.register_forward_hook(partial(_shown, name, spot, hooks))
            stack.callback(handle.remove)
        if watched.attentions:
            mode = _Attentions(hooks)
            for name, place in watched.attentions.items():
                module = network.get_submodule(place.module)
                enter = module.register_forward_pre_hook(partial(mode.enter, name, place))
                leave = module.register_forward_hook(mode.leave, always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            stack.enter_context(mode)
        yield


def check_watchable(network: nn.Module) -> None:
    """Raise MinicosError if hooks inside a network would be ignored."""
    whole = type(network).__name__ == "OptimizedModule" or network._compiled_call_impl is not None
    if whole:
        raise MinicosError(
            "the transformer is compiled whole, so that no hook inside it would run: load it "
            "without, or compile it by pipe.transformer.compile_repeated_blocks()"
        )
    if getattr(network, "is_cache_enabled", False):
        raise MinicosError(
            "the transformer has a cache that skips blocks: call pipe.transformer.disable_cache()"
        )


def _any(hooks: Hooks, names: Iterable[str]) -> bool:
    split = [tuple(name.split(".")) for name in names]
    return any(rule.matches(name) for rule in hooks.rules for name in split)


def _shown(name: str, spot: Spot, hooks: Hooks, module: nn.Module, given: Any, out: Any) -> Any:
    """A torch forward hook; None keeps the module's output."""
    x = spot.take(out)
    y = hooks.at(video=spot.video)(name, x)
    return None if y is x else spot.put(out, y)


class _Attentions(TorchFunctionMode):
    """Passes the attentions of the running modules to hooks."""

    def __init__(self, hooks: Hooks):
        super().__init__()
        self.hooks = hooks
        self._running: list[tuple[str, Attends]] = []
        self._seen = False

    def enter(self, name: str, place: Attends, module: nn.Module, given: Any) -> None:
        """Called before an attention module."""
        self._running.append((name, place))
        self._seen = False

    def leave(self, module: nn.Module, given: Any, out: Any) -> None:
        """Called after it, also if it failed (then `out` is None)."""
        name, _ = self._running.pop()
        if not self._seen and out is not None:
            raise MinicosError(
                f"{name} did not use torch's attention, so its q, k, v and heads cannot be seen: "
                'call pipe.transformer.set_attention_backend("native")'
            )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or not self._running:
            return func(*args, **(kwargs or {}))
        self._seen = True
        name, place = self._running[-1]
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        hooks = self.hooks.at(video=place.video).scope(name)
        q, k, v = (hooks(x, given.pop(y)) for x, y in zip("qkv", names[:3], strict=True))
        mask = given.pop("attn_mask", None)
        if any(map(hooks.watches, ("allowed", "pattern", "lse"))):
            if given.get("scale") is not None or given.get("enable_gqa"):
                raise MinicosError(f"{name} scales or groups its heads in a way of its own")
            mask = _allowed(mask, name)
            return hooks("heads", attend(q, k, v, partial(func, **given), hooks, mask=mask))
        return hooks("heads", func(q, k, v, attn_mask=mask, **given))


def _allowed(mask: Tensor | None, name: str) -> Tensor | None:
    """The keys that a mask allows: a bool mask as it is, and a mask of numbers added to scores
    where they are 0 or so negative that nothing of the key is left.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    allowed = mask > -1000
    if mask[allowed].any():
        raise MinicosError(
            f"{name} adds numbers to its scores, which has no place in the points allowed and"
            " pattern: watch others"
        )
    return allowed
