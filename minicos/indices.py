"""Whole numbers as callers give them: steps, layers, samples, seeds; one or several."""

from collections.abc import Iterable
from itertools import islice
from operator import index
from typing import SupportsIndex

from minicos.errors import MinicosError

MOST = 1 << 20  # in one argument: an endless iterator is a mistake


def numbers(name: str, given: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """One number or several as a tuple of ints; accepts generators, numpy's and torch's integers.

    Raises:
        MinicosError: something else, or more than `MOST` of them. The message names the argument.
    """
    try:
        listed = islice(given, MOST + 1) if isinstance(given, Iterable) and several(given) else None
        found = tuple(map(_whole, (given,) if listed is None else listed))
        if len(found) <= MOST:
            return found
    except TypeError:
        pass
    raise MinicosError(f"{name} is a whole number or several, not {given!r:.80}")


def several(given: object) -> bool:
    """Whether these are several numbers; an array without axes is one."""
    return isinstance(given, Iterable) and getattr(given, "ndim", 1) != 0


def _whole(x: object) -> int:
    """x as an int. A truth value is none: a mask would mean numbers 0 and 1. Raises TypeError."""
    return index(None if "bool" in str(getattr(x, "dtype", type(x))) else x)  # type: ignore[arg-type]
