"""`minicos generate`: make one video."""

import argparse

from minicos.cli import opening, options, run_folder

EXAMPLES = """\
  minicos generate --image maze.png --prompt "solve the maze" --out solved
  minicos generate --model Wan2.2-I2V-A14B --image cat.png --prompt "the cat jumps" --preset official
  minicos generate --model Wan2.1-FLF2V-14B --image first.png --last last.png --prompt "the cat jumps"
"""


def add(verbs) -> None:
    parser = options.add_parser(verbs, "generate", "Make a video.", EXAMPLES, run)
    options.add_condition_options(parser)
    options.add_model_options(parser, out="runs/generate")
    options.add_jsonl(parser)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.tools.record import record
    from minicos.media import save_video

    images = opening.images(args)
    wan = opening.load(args, image=images["image"])
    condition = opening.condition(args, wan, images)
    noise = wan.noise(condition, args.seed)
    folder = run_folder.open_run(args, wan, [], latents=True, **run_folder.subject(args, images))
    latent = record(wan, condition, folder, [], noise)
    save_video(folder.path("video.mp4"), wan.frames(latent[0]), fps=wan.preset.fps)
    print(folder.path("video.mp4"))
