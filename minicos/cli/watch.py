"""`minicos steps`, `energy`, `attention`: run a model once and look inside. `--also` does several in the same pass."""

import argparse
from functools import partial

from minicos.cli import opening, options, run_folder, values

STEPS = """\
  minicos steps --image maze.png --prompt "solve the maze" --out seen
  minicos steps --image maze.png --prompt "solve the maze" --preset cos --at 0,1,2,5,10,20,49 --also energy
  minicos steps --image maze.png --prompt "solve the maze" --seeds 4    other seeds, by whose difference convergence is measured
writes x0_sheet.png (steps x frames), convergence.png, x0/step_NN.mp4, and every latent as safetensors
"""
ENERGY = """\
  minicos energy --image maze.png --prompt "solve the maze" --out busy
  minicos energy --image maze.png --prompt "solve the maze" --also steps --at 0,5,19
writes energy/FORM_BRANCH_step_NN.png (latent frames x layers), energy_layers_BRANCH.png ..., energy.safetensors (step layer f h w)
"""
ATTENTION = """\
  minicos attention --image maze.png --prompt "solve the maze" --layers 0,6,11 --at 0,10
  minicos attention --image maze.png --prompt "solve the maze" --heads 0 --branch uncond
  minicos attention --image maze.png --prompt "solve the maze" --queries 8    estimated, with standard errors: for large models
writes attention/received_step_NN.png, attention_frames.png (from which frame to which), attention_padding.png, attention.safetensors
"""
VERBS = {
    "steps": (
        "Decode the clean estimate at every step: what the model believes, as it makes up its mind.",
        STEPS,
    ),
    "energy": ("Token energy of every layer: where the network is busy.", ENERGY),
    "attention": (
        "Where attention goes: to which tokens, from frame to frame, and to padding.",
        ATTENTION,
    ),
}


def add(verbs) -> None:
    for name, (help, examples) in VERBS.items():
        parser = options.add_parser(verbs, name, help, examples, partial(run, name))
        options.add_condition_options(parser)
        options.add_model_options(parser, out=f"runs/{name}")
        parser.add_argument(
            "--at",
            type=values.indices,
            help="steps to show, e.g. 0,5,19 (default: eight, denser at the start)",
        )
        others = [verb for verb in VERBS if verb != name]
        parser.add_argument(
            "--also", nargs="+", choices=others, default=[], help="do these in the same pass"
        )
        parser.add_argument(
            "--seeds",
            type=values.positive,
            default=1,
            help="samples; the first is shown (default: 1)",
        )
        parser.add_argument(
            "--layers", type=values.indices, help="of attention (default: eight, evenly)"
        )
        parser.add_argument(
            "--heads", type=values.indices, help="of attention, e.g. 0,3 (default: the mean of all)"
        )
        parser.add_argument(
            "--branch",
            choices=("cond", "uncond"),
            default="cond",
            help="of attention (default: cond)",
        )
        parser.add_argument(
            "--queries",
            type=values.positive,
            help="of attention: random ones of every latent frame (default: all, exactly)",
        )


def run(name: str, args: argparse.Namespace) -> None:
    from minicos.analysis.attention import Attention, words
    from minicos.analysis.energy import Energy
    from minicos.analysis.steps import Steps, spread
    from minicos.analysis.tools.figures import evenly
    from minicos.analysis.tools.record import record, recorded
    from minicos.errors import MinicosError

    images = opening.images(args)
    files = opening.layout(args)
    total, cfg = opening.plan(args, files).steps, files.experts["high"].config
    chosen = opening.within(args.at, total) or spread(8, total)
    layers = args.layers or tuple(evenly(cfg.num_layers, 8))
    for option, given, count in (
        ("--layers", layers, cfg.num_layers),
        ("--heads", args.heads or (0,), cfg.num_heads),
    ):
        if given[0] < 0 or given[-1] >= count:
            raise MinicosError(f"{option}: this model has them from 0 to {count - 1}.")
    if args.queries == 1:
        raise MinicosError("--queries 1: a standard error needs two or more.")
    wan = opening.load(args, files, images["image"])
    condition = opening.condition(args, wan, images, args.seeds)
    asked = {name, *args.also}
    analyses = []
    if "steps" in asked:
        analyses.append(Steps(wan, chosen))
    if "energy" in asked:
        analyses.append(Energy(chosen, stride=wan.vae.cfg.stride[0], ops=wan.ops))
    if "attention" in asked:
        prompt = words(condition, args.branch)
        analyses.append(
            Attention(layers, chosen, args.heads, args.branch, prompt, args.queries, wan.ops)
        )
    noise = wan.noise(condition, args.seed)
    watched = {"seeds": args.seeds}
    if "attention" in asked:
        watched |= {
            "layers": layers,
            "heads": args.heads,
            "branch": args.branch,
            "queries": args.queries,
            "at": chosen,
        }
    folder = run_folder.open_run(args, wan, analyses, **run_folder.subject(args, images), **watched)
    record(wan, condition, folder, analyses, noise)
    for analysis in analyses:
        first, *rest = analysis.draw(recorded(folder, analysis.name, total), folder)
        print(f"{folder.path(first)}  (and {len(rest)} more)")
