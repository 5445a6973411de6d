"""`minicos demo`: a maze with several right answers, solved by the embedded model."""

import argparse
import time
from typing import Any

from minicos.cli import opening, options, recording, run_folder, study, values

EXAMPLES = """\
  minicos demo
  minicos demo --out demo2 --puzzle 7 --seed 3  # another maze, other noise
open index.html: several routes coexist in the first steps, one survives; x0_sheet.png shows the same
"""
SIZE = 4  # cells along a side


def add(verbs) -> None:
    parser = options.add_parser(
        verbs, "demo", "Solve a maze and show how, on the embedded model.", EXAMPLES, run
    )
    parser.group("the maze").add_argument(
        "--puzzle",
        type=values.whole(0, 10_000),
        default=4,
        help="which of the held-out mazes with several routes, from 0 (default: 4)",
    )
    study.add_json(parser)
    # seed 6: both routes are clearly visible at first
    options.add_model_options(parser, out="demo", seed=6)
    options.add_jsonl(parser)


def run(args: argparse.Namespace) -> None:
    import torch

    from minicos.analysis.answers import Answers
    from minicos.analysis.energy import Energy
    from minicos.analysis.routes import Routes
    from minicos.analysis.steps import Steps, spread
    from minicos.analysis.tools import posterior
    from minicos.analysis.tools.record import record
    from minicos.errors import MinicosError

    puzzle = ambiguous_maze(args.puzzle)
    files = opening.layout(args)
    if files.variant != "tiny":
        raise MinicosError(
            f"the demo's puzzles are for the embedded model, not {files.variant}: try `minicos "
            "steps`."
        )
    wan = opening.load(args, files)
    picture = torch.from_numpy(puzzle.first_frame()).permute(2, 0, 1) / 255
    condition = wan.condition(puzzle.prompt, picture)
    noise = wan.noise(condition, args.seed)
    chosen = spread(8, wan.preset.steps)
    analyses: list[Any] = [
        Steps(wan, chosen),
        Energy(chosen, sheets=("centred",), ops=wan.ops, sigmas=wan.schedule().sigmas),
        Routes(wan, puzzle),
        Answers(wan, posterior.answers(wan, puzzle, wan.preset.frames)),
    ]
    folder = run_folder.open_run(args, wan, analyses, puzzle=puzzle.key, prompt=puzzle.prompt)
    with recording.bar(args, wan, analyses) as bar:
        latent = record(wan, condition, folder, analyses, noise, bar=bar)
        found, _ = recording.draw(args, wan, folder, analyses, latent, picture, bar)
    if study.printed(args, folder, found):
        run_folder.close(args, folder)
        return
    score = puzzle.score(wan.decode(latent)[0])
    verdict = f"solved, by route {score.answer}" if score.solved else f"not solved: {score.detail}"
    about = f"a held-out {SIZE}x{SIZE} maze with {len(puzzle.candidates)} valid routes"
    print(f'\n"{puzzle.prompt}" on {about}: {verdict}')
    run_folder.close(args, folder, quiet=True)
    print(f"{time.monotonic() - args.begin:.0f} s in all. Look at these, in this order:")
    for name, what in (
        ("index.html", "every step in sync, with sliders and token energy: open it in a browser"),
        (
            "x0_sheet.png",
            "the model's estimate at each step: routes coexist in the top rows, one survives",
        ),
        ("routes.png", "the same as numbers, a curve for each valid route"),
        ("answers.png", "how many answers are alive, and an ideal observer's: nearly the same"),
        ("video.mp4", "the result"),
        (f"energy/centred_cond_step_{chosen[-1]:02d}.png", "token energy of every layer"),
        ("energy_layers_cond.png", "energy across layers"),
    ):
        print(f"  {folder.path(name)}  {what}")


def ambiguous_maze(index: int):
    """The index-th held-out maze with two or three valid routes."""
    from itertools import count

    from minicos import puzzles
    from minicos.errors import MinicosError

    if index < 0:
        raise MinicosError(f"--puzzle {index}: count from 0")
    for seed in count():
        puzzle = puzzles.make("maze", seed, size=SIZE, split="test")
        if 2 <= len(puzzle.candidates) <= 3:
            index -= 1
        if index < 0:
            return puzzle
