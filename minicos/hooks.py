"""Hooks: functions that see, and may replace, any named tensor of a forward pass.

A hook is an argument of the call, not state on the model, so nothing has to be reset:

    hooks = (Hooks().on("blocks.*", record)  # the output of every block
                    .on("blocks.20.self_attn", zero, step=range(5), branch="cond"))
    for step in wan.sample(condition, hooks=hooks): ...

A hook is called with the tensor and its `Site` and returns None to observe or a tensor to replace.
`a + b` runs a's hooks before b's, and each sees what the one before it returned: that is the whole
rule of composition.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from operator import index
from typing import Any, SupportsIndex

from torch import Tensor

from minicos.errors import MinicosError, suggest


@dataclass(frozen=True)
class Site:
    """Where and when a tensor is seen."""

    name: str = ""  # "blocks.12.ffn"
    step: int = 0  # counted from 0
    sigma: float = 0.0
    expert: str = ""  # "high" | "low"
    branch: str = ""  # a pass of the model: "cond", "uncond", or one that it names itself
    grid: tuple[int, int, int] = (0, 0, 0)  # f, h, w
    # which of the f*h*w tokens the tensor holds: all of them, unless sharded (Python 3.11 cannot
    # hash a slice)
    tokens: slice = field(default_factory=lambda: slice(None), hash=False)
    # where the video is among the tokens that the tensor holds: all of them are, but where text and
    # video attend jointly
    video: slice = field(default_factory=lambda: slice(None), hash=False)


_FIELDS = frozenset(field.name for field in fields(Site))
Hook = Callable[[Tensor, Site], Tensor | None]
WHEN = ("step", "expert", "branch")  # what a rule may be limited to


@dataclass(frozen=True)
class Rule:
    """One hook, the points it looks at and the moments it is limited to (None: always)."""

    pattern: tuple[str, ...]
    hook: Hook
    step: Container | None = None
    expert: Container | None = None
    branch: Container | None = None

    def accepts(self, where: Mapping[str, object]) -> bool:
        """Whether the rule can fire where step, expert or branch are as given."""
        limits = ((getattr(self, k), where[k]) for k in WHEN if k in where)
        return all(limit is None or value in limit for limit, value in limits)

    def limits(self) -> str:
        """In words: it is limited to step 99 and branch uncond."""
        given = {k: getattr(self, k) for k in WHEN if getattr(self, k) is not None}
        words = (
            f"{k} {v[0] if isinstance(v, tuple) and len(v) == 1 else v}" for k, v in given.items()
        )
        return f"it is limited to {' and '.join(words)}"

    def matches(self, name: tuple[str, ...]) -> bool:
        return len(name) == len(self.pattern) and self.inside(name)

    def inside(self, prefix: tuple[str, ...]) -> bool:
        """Whether the pattern begins with `prefix`; `*` stands for exactly one dotted segment."""
        return all(p in ("*", n) for p, n in zip(self.pattern, prefix, strict=False)) and len(
            prefix
        ) <= len(self.pattern)


@dataclass(frozen=True)
class Hooks:
    """An immutable list of rules, together with what is known so far about where we are. Falsy
    when no rule is left.
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
        """Add a hook on every point that `pattern` names, limited to a step or several (any whole
        numbers), expert and branch. Points, experts and branches are the model's: `check` refuses
        others when a run begins. Raises MinicosError for a hook that cannot be called.

        layers  only these blocks: of "blocks.*.ffn" the feed-forwards, of "blocks" the outputs
        """
        if not callable(hook):
            raise MinicosError(f"a hook is a function of tensor and site, not {hook!r}")
        steps = step if step is None or isinstance(step, range) else _numbers(step)
        names = [pattern]
        if layers is not None:
            blocks, _, inside = pattern.partition(".*")
            if blocks != "blocks":
                raise MinicosError(f"layers are those of 'blocks.*', not of {pattern!r}")
            names = [f"blocks.{i}{inside}" for i in _numbers(layers)]
        limits = steps, expert and (expert,), branch and (branch,)
        rules = (Rule(tuple(name.split(".")), hook, *limits) for name in names)
        return replace(self, rules=(*self.rules, *rules))

    def __add__(self, other: "Hooks") -> "Hooks":
        return replace(self, rules=self.rules + other.rules)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def at(self, **where: Any) -> "Hooks":
        """The rules that can fire where `where` (fields of Site) holds; NO_HOOKS when there is
        none.

        Raises MinicosError for a field that Site does not have.
        """
        for name in where.keys() - _FIELDS:
            raise MinicosError(f"a site has no {name!r}{suggest(name, sorted(_FIELDS))}")
        rules = tuple(r for r in self.rules if r.accepts(where))
        return Hooks(rules, replace(self.site, **where)) if rules else NO_HOOKS

    def scope(self, name: str) -> "Hooks":
        """The rules about points inside the module `name`, e.g. "blocks.3"; its own output does
        not count.
        """
        prefix = tuple(name.split("."))
        rules = tuple(
            replace(r, pattern=r.pattern[len(prefix) :])
            for r in self.rules
            if len(r.pattern) > len(prefix) and r.inside(prefix)
        )
        return Hooks(rules, replace(self.site, name=self._name(name))) if rules else NO_HOOKS

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Pass a tensor through the hooks on the point `name` (relative to the scope): this call
        *is* the hook point.
        """
        if not self.rules:
            return x
        parts = tuple(name.split("."))
        site, kind = None, (x.shape, x.dtype, x.device)
        for rule in self.rules:
            if rule.matches(parts):
                site = site or replace(self.site, name=self._name(name))
                out = rule.hook(x, site)
                if out is not None:
                    if not isinstance(out, Tensor) or (out.shape, out.dtype, out.device) != kind:
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
        """What hooks have made of x at the point `name`; None where they left it as it was, so that
        what has been computed from x still holds.
        """
        if not self.watches(name):
            return None
        version = -1 if x.is_inference() else x._version  # it counts changes in place
        y = self(name, x)
        same = y is x and not x.is_inference() and x._version == version
        return None if same else y

    def check(
        self, points: Iterable[str], moments: Iterable[Mapping[str, object]] | None = None
    ) -> None:
        """Raise MinicosError if a rule can never fire: called before any step runs.

        points   the names there are; a pattern that matches none is told with near matches
        moments  {"step": i, "expert": e, "branch": b} of every forward pass of a run; each rule
                 must accept one of them
        """
        names = list(points)
        split = [tuple(n.split(".")) for n in names]
        moments = None if moments is None else list(moments)
        for rule in self.rules:
            wanted = ".".join(rule.pattern)
            if not any(rule.matches(name) for name in split):
                raise MinicosError(
                    f"no hook point matches {wanted!r}{suggest(wanted, names)}"
                    " (`minicos points` lists them all)"
                )
            if moments is not None and not any(rule.accepts(moment) for moment in moments):
                raise MinicosError(
                    f"the hook on {wanted!r} can never run: {rule.limits()}, {_extent(moments)}"
                )

    def _name(self, name: str) -> str:
        return f"{self.site.name}.{name}" if self.site.name else name


def _numbers(step: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """One number or several; a generator is read once, and numbers of numpy become Python's."""
    with suppress(TypeError):
        return (index(step),)  # type: ignore[arg-type]
    try:
        return tuple(map(index, step))  # type: ignore[arg-type]
    except TypeError:
        raise MinicosError(f"step is a whole number or several, not {step!r}") from None


def _extent(moments: list[Mapping[str, object]]) -> str:
    """In words: this run has steps 0 to 19, expert high, branch cond."""
    steps, experts, branches = ([*dict.fromkeys(str(m[k]) for m in moments)] for k in WHEN)
    return (
        f"and this run has steps {steps[0]} to {steps[-1]}, expert {' and '.join(experts)},"
        f" branch {' and '.join(branches)}"
    )


def _what(x: object) -> str:
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


NO_HOOKS = Hooks()
