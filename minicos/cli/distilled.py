"""`minicos distilled`: convergence and sensitivity to noise over few-step sampling or other
weights.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicos.analysis.options import DistilledOptions
from minicos.cli import run_folder, study
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.analysis.sweep import Setting

HELP = "Convergence and sensitivity to noise over few-step sampling or weights."
EXAMPLES = """\
  minicos distilled --counts 4,8,20,50
  minicos distilled --counts 4,20 --models tiny:distilled,tiny
  minicos distilled --counts 4,50 --models Wan2.2-I2V-A14B-4step,Wan2.2-I2V-A14B \\
    --image cat.png --prompt "the cat jumps"
with --models, one count for each of them
"""


def add(verbs: Any) -> None:
    study.add(verbs, "distilled", HELP, EXAMPLES, DistilledOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import sweep

    asked = study.read(args, DistilledOptions)
    if not asked.models:
        study.run(
            args,
            DistilledOptions,
            sweep.study,
            check=sweep.check,
            load=partial(study.open_model, euler=True),
        )
        return
    study.refuse_mixed(args, asked)
    settings = _models(args, asked)
    first = next(iter(settings.values()))
    weights = {name: setting.wan.weights for name, setting in settings.items()}
    about = study.about(args, asked)
    folder = run_folder.open_run(args, first.wan, [], **about, weights_of=weights)
    study.show(args, folder, sweep.compare(settings, folder, asked))


def _models(args: argparse.Namespace, asked: DistilledOptions) -> "dict[str, Setting]":
    """A setting for each of --models, at its own number of steps."""
    from minicos.analysis import sweep

    if len(asked.models) != len(asked.counts):
        raise MinicosError(
            f"{len(asked.models)} --models and {len(asked.counts)} --counts: give one count for "
            "each model"
        )
    found = {}
    for model, count in zip(asked.models, asked.counts, strict=True):
        args.model, args.steps = model, count
        wan = study.open_model(args, asked, euler=True)
        found[f"{Path(model).name}, {count} steps"] = sweep.few(wan, asked)
    return found
