"""`minicos generate`: make one video."""

import argparse

from minicos.cli import opening, options, recording, run_folder, study, watched

EXAMPLES = """\
  minicos generate --puzzle maze
  minicos generate --image maze.png --prompt "solve the maze" --out solved
  minicos generate --model Wan2.2-I2V-A14B --image cat.png --prompt "the cat jumps" --preset official
  minicos generate --model Wan2.1-FLF2V-14B --image first.png --last last.png --prompt "it turns"
"""


def add(verbs) -> None:
    parser = options.add_parser(verbs, "generate", "Make a video.", EXAMPLES, run)
    study.add_json(parser)
    options.add_condition_options(parser)
    options.add_model_options(parser, out="runs/generate")
    options.add_jsonl(parser)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.tools.record import record

    puzzle = watched.puzzle(args)
    images, files = opening.images(args), opening.layout_or_peer(args)
    watched.check(files, puzzle)
    wan = opening.load(args, files, images["image"])
    condition = opening.condition(args, wan, images)
    noise = wan.noise(condition, args.seed)
    seen = watched.recorders(wan, puzzle)
    subject = run_folder.subject(args, images)
    folder = run_folder.open_run(args, wan, seen, latents=True, **subject)
    with recording.bar(args, wan, seen) as bar:
        watching = [*seen, *watched.preview(args, wan)]
        latent = record(wan, condition, folder, watching, noise, bar=bar)
        recording.finish(args, wan, folder, seen, latent, images, bar)
