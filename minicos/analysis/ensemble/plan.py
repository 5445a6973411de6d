"""The ensembles to try: modes, windows and steps, their controls, and rivals; from options to
`Ensemble`s.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from minicos.analysis.ensemble.share import Ensemble, window
from minicos.analysis.options import EnsembleOptions, spans
from minicos.analysis.outline import Outline
from minicos.errors import MinicosError

# of 40 blocks; the paper's window first
WINDOWS: tuple[tuple[int, int], ...] = ((20, 29), (0, 9), (0, 39))


def plan(wan: Outline, options: EnsembleOptions) -> list[dict[str, Ensemble]]:
    """The arms that the options ask for, one `ablation` for each set of steps, the paper's first.

    Puzzles by default use override and update with three windows, at step 0 and over the first
    quarter; a case of the user's own uses the paper's window at step 0.

    Raises:
        MinicosError: there is no such mode, window, carrier or arm.
    """
    if options.carrier != "all" and not options.carrier.isdecimal():
        raise MinicosError(f"--carrier {options.carrier}: a number from 0, or all")
    scored, depth = options.prompt is None, wan.depth
    like = Ensemble(
        (0,),
        seeds=options.seeds,
        alpha=options.alpha,
        mode="mix",
        keep_norm=options.keep_norm,
        branches=("cond", "uncond") if options.branch == "both" else ("cond",),
        carrier=None if options.carrier == "all" else int(options.carrier),
    )
    if options.arms:
        return [_arms(options.arms, depth, like)]
    modes = options.modes or (("override", "update") if scored else ("override",))
    windows = WINDOWS if scored else WINDOWS[:1]
    if options.windows is not None:
        windows = tuple(spans(options.windows, "--windows"))
    quarter = (0, max(1, wan.preset.steps // 4) - 1)
    at = [(0, 0), quarter] if scored else [(0, 0)]
    if options.share_at is not None:
        at = spans(options.share_at, "--share-at")
    return [
        ablation(depth, windows, modes, replace(like, steps=tuple(range(a, b + 1))))
        for a, b in dict.fromkeys(at)
    ]


def _arms(names: Sequence[str], depth: int, like: Ensemble) -> dict[str, Ensemble]:
    """Arms by their names, such as "override 20-29 @0" and "update 0-9 @0-4"."""
    found: dict[str, Ensemble] = {}
    for name in names:
        match = re.fullmatch(r"(\S+) (\S+) @(\S+)", name)
        if not match:
            raise MinicosError(f"--arms {name}: give names such as 'override 20-29 @0'")
        mode, blocks, at = match.groups()
        for a, b in spans(at, "--arms"):
            steps = replace(like, steps=tuple(range(a, b + 1)))
            found |= ablation(depth, spans(blocks, "--arms"), (mode,), steps)
    return found


def ablation(
    depth: int, windows: Sequence[tuple[int, int]], modes: Sequence[str], like: Ensemble
) -> dict[str, Ensemble]:
    """An arm for each mode and window (in blocks of 40), otherwise equal to `like`; by name, e.g.
    "override 20-29 @0".
    """
    return {
        f"{mode} {a}-{b} @{span(like.steps)}": replace(
            like, layers=window(a, b, depth), mode=mode, alpha=like.alpha if mode == "mix" else 1.0
        )
        for mode in modes
        for a, b in windows
    }


def controls(name: str, e: Ensemble) -> dict[str, Ensemble]:
    """The same arm with wrong donors, and with a random direction of equal norm (only at the layers
    that count, so that it acts once).
    """
    return {
        f"{name}, other cases": replace(e, donors="others"),
        f"{name}, random direction": replace(e, layers=e.counting, donors="random"),
    }


def rivals(like: Ensemble) -> dict[str, Ensemble]:
    """Alternatives to average, at the same steps: clean estimates, and latents with their norm
    preserved.
    """
    estimate = replace(like, layers=(), alpha=1.0, donors="own", mode="x0", keep_norm=False)
    at = span(like.steps)
    return {
        f"clean estimate @{at}": estimate,
        f"latent, norm kept @{at}": replace(estimate, mode="latent", keep_norm=True),
    }


def span(steps: Sequence[int]) -> str:
    """Steps in words: 0, 0-4, or 0,2,5."""
    low, high = min(steps), max(steps)
    consecutive = len(steps) == high - low + 1 > 1
    return f"{low}-{high}" if consecutive else ",".join(map(str, steps))
