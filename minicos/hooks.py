"""Hooks: functions that see, and may replace, any named tensor of a forward pass.

A hook is an argument of the call, not state on the model, so nothing has to be reset:

    hooks = (Hooks().on("blocks.*", record)                                     # the output of every block
                    .on("blocks.20.self_attn", zero, step=range(5), branch="cond"))
    for step in wan.sample(condition, hooks=hooks): ...

A hook is called with the tensor and its `Site` and returns None to observe or a tensor to replace. `a + b` runs a's hooks
before b's, and each sees what the one before it returned: that is the whole rule of composition.
"""

import difflib
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from minicos.errors import MinicosError


@dataclass(frozen=True)
class Site:
    """Where and when a tensor is seen."""

    name: str = ""  # "blocks.12.ffn"
    step: int = 0  # counted from 0
    sigma: float = 0.0
    expert: str = ""  # "high" | "low"
    branch: str = ""  # "cond" | "uncond"
    grid: tuple[int, int, int] = (0, 0, 0)  # f, h, w
    tokens: slice = field(
        default_factory=lambda: slice(None)
    )  # which of the f*h*w tokens the tensor holds (all of them, unless sharded)


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

    def accepts(self, **where: object) -> bool:
        """Whether the rule can fire where step, expert or branch are as given."""
        return all(getattr(self, k) is None or v in getattr(self, k) for k, v in where.items() if k in WHEN)

    def matches(self, name: tuple[str, ...]) -> bool:
        return len(name) == len(self.pattern) and self.inside(name)

    def inside(self, prefix: tuple[str, ...]) -> bool:
        """Whether the pattern begins with `prefix`; `*` stands for exactly one dotted segment."""
        return all(p in ("*", n) for p, n in zip(self.pattern, prefix, strict=False)) and len(prefix) <= len(
            self.pattern
        )


@dataclass(frozen=True)
class Hooks:
    """An immutable list of rules, together with what is known so far about where we are. Falsy when no rule is left."""

    rules: tuple[Rule, ...] = ()
    site: Site = Site()

    def on(
        self, pattern: str, hook: Hook, *, step=None, expert: str | None = None, branch: str | None = None
    ) -> "Hooks":
        """Add a hook on every point that `pattern` names, limited to a step (int or container of ints), expert and branch."""
        if expert not in (None, "high", "low"):
            raise MinicosError(f"expert must be 'high' or 'low', not {expert!r}")
        if branch not in (None, "cond", "uncond"):
            raise MinicosError(f"branch must be 'cond' or 'uncond', not {branch!r}")
        steps = (step,) if isinstance(step, int) else step
        rule = Rule(tuple(pattern.split(".")), hook, steps, expert and (expert,), branch and (branch,))
        return replace(self, rules=(*self.rules, rule))

    def __add__(self, other: "Hooks") -> "Hooks":
        return replace(self, rules=self.rules + other.rules)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def at(self, **where: object) -> "Hooks":
        """The rules that can fire where `where` (fields of Site) holds; NO_HOOKS when there is none."""
        rules = tuple(r for r in self.rules if r.accepts(**where))
        return Hooks(rules, replace(self.site, **where)) if rules else NO_HOOKS

    def scope(self, name: str) -> "Hooks":
        """The rules about points inside the module `name`, e.g. "blocks.3"; its own output does not count."""
        prefix = tuple(name.split("."))
        rules = tuple(
            replace(r, pattern=r.pattern[len(prefix) :])
            for r in self.rules
            if len(r.pattern) > len(prefix) and r.inside(prefix)
        )
        return Hooks(rules, replace(self.site, name=self._name(name))) if rules else NO_HOOKS

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Pass a tensor through the hooks on the point `name` (relative to the scope): this call *is* the hook point."""
        if not self.rules:
            return x
        parts = tuple(name.split("."))
        site = None
        for rule in self.rules:
            if rule.matches(parts):
                site = site or replace(self.site, name=self._name(name))
                out = rule.hook(x, site)
                if out is not None:
                    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
                        raise MinicosError(f"a hook on {site.name} returned {_what(out)}, not {_what(x)}")
                    x = out
        return x

    def check(self, points: Iterable[str]) -> None:
        """Raise MinicosError, with near matches, if a pattern names no point. Called before any step runs."""
        names = list(points)
        split = [tuple(n.split(".")) for n in names]
        for rule in self.rules:
            if not any(rule.matches(name) for name in split):
                wanted = ".".join(rule.pattern)
                near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise MinicosError(f"no hook point matches {wanted!r}{hint} (`minicos points` lists them all)")

    def _name(self, name: str) -> str:
        return f"{self.site.name}.{name}" if self.site.name else name


def _what(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


NO_HOOKS = Hooks()


class Record:
    """A hook that keeps `reduce(tensor)` of everything it sees, with its site: `Record(token_energy)`, `Record(lambda x: x.mean(1))`.

    Reduce on the spot: one residual stream of 81 frames at 832x480 is 335 MB. `entries` is a list of (Site, reduced tensor).
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]):
        self.reduce = reduce
        self.entries: list[tuple[Site, Tensor]] = []

    def __call__(self, x: Tensor, site: Site) -> None:
        self.entries.append((site, self.reduce(x.detach())))
