"""Hooks: functions that observe, and may replace, any named tensor of a forward pass.

A hook is an argument of the call, not state on the model, so nothing has to be reset:

    hooks = (Hooks().on("blocks.*", record)  # the output of every block
                    .on("blocks.20.self_attn", zero, step=range(5), branch="cond"))
    for step in wan.sample(condition, hooks=hooks): ...

A hook is called with the tensor and its `Site`. It returns None to observe or a tensor to replace.
`a + b` runs a's hooks before b's; each hook receives the result of the one before it. There is no
other rule of composition.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, SupportsIndex

from torch import Tensor

from minicos.errors import MinicosError, suggest
from minicos.indices import numbers


@dataclass(frozen=True)
class Site:
    """Where and when a hook is called."""

    name: str = ""  # "blocks.12.ffn"
    step: int = 0  # counted from 0
    sigma: float = 0.0
    expert: str = ""  # "high" | "low"
    branch: str = ""  # pass of the model: "cond", "uncond", or a name that the model chooses
    grid: tuple[int, int, int] = (0, 0, 0)  # f, h, w
    # the tokens of the f*h*w grid that the tensor holds: all of them unless sharded (Python 3.11
    # cannot hash a slice)
    tokens: slice = field(default_factory=lambda: slice(None), hash=False)
    # position of the video among the tensor's tokens: all of them, unless text and video attend
    # jointly
    video: slice = field(default_factory=lambda: slice(None), hash=False)


_FIELDS = frozenset(field.name for field in fields(Site))
Hook = Callable[[Tensor, Site], Tensor | None]
WHEN = ("step", "expert", "branch")  # what a rule can be limited to


@dataclass(frozen=True)
class Rule:
    """One hook, the points that it applies to, and the moments it is limited to (None: always)."""

    pattern: tuple[str, ...]
    hook: Hook
    step: Container | None = None
    expert: Container | None = None
    branch: Container | None = None

    def accepts(self, where: Mapping[str, object]) -> bool:
        """Whether the rule can apply at the given step, expert or branch."""
        limits = ((getattr(self, k), where[k]) for k in WHEN if k in where)
        return all(limit is None or value in limit for limit, value in limits)

    def limits(self) -> str:
        """The limits in words: step 99 and branch uncond."""
        given = ((k, getattr(self, k)) for k in WHEN if getattr(self, k) is not None)
        return " and ".join(
            f"{k} {v[0] if isinstance(v, tuple) and len(v) == 1 else v}" for k, v in given
        )

    def matches(self, name: tuple[str, ...]) -> bool:
        """Whether the pattern matches a name, split at its dots."""
        return len(name) == len(self.pattern) and self.inside(name)

    def inside(self, prefix: tuple[str, ...]) -> bool:
        """Whether the pattern and `prefix` agree in the segments that both have; `*` agrees with
        any one segment.
        """
        return all(p in ("*", n) for p, n in zip(self.pattern, prefix, strict=False))


@dataclass(frozen=True)
class Hooks:
    """An immutable list of rules, together with what is known so far about the current site.

    Falsy if no rule is left.
    """

    rules: tuple[Rule, ...] = ()
    site: Site = Site()

    def on(
        self,
        pattern: str,
        hook: Hook,
        *,
        step: SupportsIndex | Iterable[SupportsIndex] | None = None,
        expert: str | None = None,
        branch: str | None = None,
        layers: SupportsIndex | Iterable[SupportsIndex] | None = None,
    ) -> "Hooks":
        """Add a hook on every point that `pattern` matches.

        `check` compares points, steps, experts and branches with the model when a run begins.

        Args:
            pattern: a dotted name, in which `*` matches exactly one segment: "blocks.*.ffn".
            hook: a function of tensor and `Site` that returns None or the tensor to use instead.
            step: the step or steps at which the hook runs, counted from 0; None: all.
            expert: "high" or "low"; None: both.
            branch: "cond", "uncond" or another pass of the model; None: all.
            layers: the blocks at which the hook runs, for patterns such as "blocks.*.ffn" or
                "blocks" (the outputs of the blocks); None: all.

        Raises:
            MinicosError: `hook` is not callable, `pattern` is not text, a step or layer is not a
                whole number, or `layers` is given for a pattern without blocks.
        """
        if not callable(hook) or not isinstance(pattern, str):
            raise MinicosError(
                f"a hook is a function of tensor and site, at a name, not {hook!r} at {pattern!r}"
            )
        steps = step if step is None or isinstance(step, range) else numbers("step", step)
        names = [pattern]
        if layers is not None:
            blocks, _, inside = pattern.partition(".*")
            if blocks != "blocks":
                raise MinicosError(f"layers are those of 'blocks.*', not of {pattern!r}")
            names = [f"blocks.{i}{inside}" for i in numbers("layers", layers)]
        rules = (
            Rule(tuple(name.split(".")), hook, steps, expert and (expert,), branch and (branch,))
            for name in names
        )
        return replace(self, rules=(*self.rules, *rules))

    def __add__(self, other: "Hooks") -> "Hooks":
        return replace(self, rules=self.rules + other.rules)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def __repr__(self) -> str:
        """Each rule in words: Hooks(blocks.*.ffn: zero at step 3)."""
        shown = "; ".join(
            f"{'.'.join(rule.pattern)}: {getattr(rule.hook, '__name__', type(rule.hook).__name__)}"
            f" at {rule.limits()}".removesuffix(" at ")
            for rule in self.rules
        )
        return f"Hooks({f'{shown:.160} ... {len(self.rules)} rules' if shown[160:] else shown})"

    def at(self, **where: Any) -> "Hooks":
        """The rules that can apply where `where` (fields of `Site`) holds; NO_HOOKS if there are
        none.

        Raises:
            MinicosError: `Site` has no such field.
        """
        for name in where.keys() - _FIELDS:
            raise MinicosError(f"a site has no {name!r}{suggest(name, sorted(_FIELDS))}")
        rules = tuple(r for r in self.rules if r.accepts(where))
        return Hooks(rules, replace(self.site, **where)) if rules else NO_HOOKS

    def scope(self, name: str) -> "Hooks":
        """The rules for points inside the module `name`, e.g. "blocks.3", but not for its own
        output.
        """
        prefix = tuple(name.split("."))
        rules = tuple(
            replace(r, pattern=r.pattern[len(prefix) :])
            for r in self.rules
            if len(r.pattern) > len(prefix) and r.inside(prefix)
        )
        return Hooks(rules, replace(self.site, name=self._name(name))) if rules else NO_HOOKS

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Pass a tensor through the hooks on the point `name` (relative to the scope). This call
        *is* the hook point.
        """
        if not self.rules:
            return x
        parts = tuple(name.split("."))
        site, kind = None, (x.shape, x.dtype, x.device, x.layout)
        for rule in self.rules:
            if rule.matches(parts):
                site = site or replace(self.site, name=self._name(name))
                out = rule.hook(x, site)
                if out is not None:
                    if (
                        not isinstance(out, Tensor)
                        or (out.shape, out.dtype, out.device, out.layout) != kind
                    ):
                        raise MinicosError(
                            f"a hook on {site.name} returned {_what(out)}, not {_what(x)}"
                        )
                    x = out
        return x

    def watches(self, name: str) -> bool:
        """Whether there is a hook on the point `name` (relative to the scope)."""
        parts = tuple(name.split("."))
        return any(rule.matches(parts) for rule in self.rules)

    def replaced(self, name: str, x: Tensor) -> Tensor | None:
        """The tensor that hooks return for x at the point `name`; None if no hook replaced or
        changed x, so that values already computed from x remain valid.
        """
        if not self.watches(name):
            return None
        version = -1 if x.is_inference() else x._version  # counts in-place changes
        y = self(name, x)
        same = y is x and not x.is_inference() and x._version == version
        return None if same else y

    def check(
        self, points: Iterable[str], moments: Iterable[Mapping[str, object]] | None = None
    ) -> None:
        """Check, before a run, that every rule can apply at some point of it.

        Args:
            points: the names of the model's hook points.
            moments: {"step": i, "expert": e, "branch": b} of every forward pass of the run.

        Raises:
            MinicosError: a pattern matches no hook point, or a rule applies to none of the passes.
        """
        names = list(points)
        moments = None if moments is None else list(moments)
        for rule in self.rules:
            wanted = ".".join(rule.pattern)
            if not any(rule.matches(tuple(name.split("."))) for name in names):
                raise MinicosError(
                    f"no hook point matches {wanted!r}{suggest(wanted, names)}"
                    " (`minicos points` lists them all)"
                )
            if moments is not None and not any(rule.accepts(moment) for moment in moments):
                raise MinicosError(
                    f"the hook on {wanted!r} can never run: it is limited to {rule.limits()}, "
                    f"{_extent(moments)}"
                )

    def _name(self, name: str) -> str:
        return f"{self.site.name}.{name}" if self.site.name else name


def _extent(moments: list[Mapping[str, object]]) -> str:
    """The passes of a run in words: this run has steps 0 to 19, expert high, branch cond."""
    steps, experts, branches = ([*dict.fromkeys(str(m[k]) for m in moments)] for k in WHEN)
    return (
        f"and this run has steps {steps[0]} to {steps[-1]}, expert {' and '.join(experts)},"
        f" branch {' and '.join(branches)}"
    )


def _what(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    layout = str(x.layout).replace("torch.strided", "")
    return f"{layout} {x.dtype} {tuple(x.shape)} on {x.device}".strip()


NO_HOOKS = Hooks()
