"""`minicos steps` and `minicos energy`: run a model once and look inside. `--also` does both in one pass."""

import argparse
from functools import partial

from minicos.cli import common

STEPS_EXAMPLES = """\
  minicos steps --image maze.png --prompt "solve the maze" --out seen
  minicos steps --image maze.png --prompt "solve the maze" --preset cos --at 0,1,2,5,10,20,49 --also energy
writes x0_sheet.png (steps x frames), x0/step_NN.mp4, and every latent as safetensors
"""
ENERGY_EXAMPLES = """\
  minicos energy --image maze.png --prompt "solve the maze" --out busy
  minicos energy --image maze.png --prompt "solve the maze" --also steps --at 0,5,19
writes energy/step_NN.png (latent frames x layers), energy_layers.png, energy.safetensors (step layer f h w, by branch)
"""
CHOICES = ("steps", "energy")


def add(verbs) -> None:
    for name, help, examples in (
        (
            "steps",
            "Decode the clean estimate at every step: what the model believes, as it makes up its mind.",
            STEPS_EXAMPLES,
        ),
        ("energy", "Token energy of every layer: where the network is busy.", ENERGY_EXAMPLES),
    ):
        parser = common.add_parser(verbs, name, help, examples, partial(run, name))
        common.add_condition_options(parser)
        common.add_model_options(parser, out=f"runs/{name}")
        parser.add_argument(
            "--at", type=indices, help="steps to show, e.g. 0,5,19 (default: eight, denser at the start)"
        )
        parser.add_argument("--also", choices=[c for c in CHOICES if c != name], help="do this in the same pass")


def indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of step numbers such as 0,5,19") from None


def run(name: str, args: argparse.Namespace) -> None:
    from minicos.analysis.energy import Energy
    from minicos.analysis.observe import observe, recorded
    from minicos.analysis.steps import Steps, spread
    from minicos.errors import MinicosError

    image = common.image(args)
    files = common.layout(args)
    total = common.plan(args, files).steps
    chosen = args.at or spread(8, total)
    if chosen[0] < 0 or chosen[-1] >= total:
        raise MinicosError(f"--at {','.join(map(str, chosen))}: the run has steps 0 to {total - 1}.")
    wan = common.load(args, files)
    condition = common.condition(args, wan, image)
    noise = wan.noise(condition, args.seed)
    asked = {name, args.also}
    analyses = [Steps(wan, chosen)] * ("steps" in asked) + [Energy(chosen)] * ("energy" in asked)
    folder = common.open_run(args, wan, analyses, **common.subject(args, image))
    observe(wan, condition, folder, analyses, noise)
    for analysis in analyses:
        first, *rest = analysis.draw(recorded(folder, analysis.name, total), folder)
        print(f"{folder.path(first)}  (and {len(rest)} more)")
