"""`minicos commitment`: at which step is the answer decided?"""

import argparse

from minicos.cli import opening, options, run_folder, subjects, values
from minicos.errors import MinicosError

EXAMPLES = """\
  minicos commitment                                          20 held-out mazes with several right answers
  minicos commitment --n 100 --count 16 --steps 50 --at 0,2,5,10,20,40
  minicos commitment --model Wan2.2-I2V-A14B --image maze.png --prompt "solve the maze" --count 4
at each step the clean estimate is thrown back to its noise level with fresh noise and completed --count times: commitment is
0 where the completions answer every which way, 1 where they always agree. Without a scorer: how far apart they end.
"""


def add(verbs) -> None:
    parser = options.add_parser(verbs, "commitment", "When is the answer decided?", EXAMPLES, run)
    subjects.add_subject_options(parser, n=20)
    options.add_model_options(parser, out="runs/commitment")
    parser.add_argument(
        "--at",
        type=values.indices,
        help="steps to complete from (default: six, denser at the start)",
    )
    parser.add_argument(
        "--count", type=values.positive, default=8, help="completions of each step (default: 8)"
    )


def run(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from minicos.analysis import commitment
    from minicos.analysis.steps import spread
    from minicos.analysis.tools import cases, figures, stats

    if args.prompt is not None and args.count < 2:
        raise MinicosError(
            "--count 1: without a scorer, completions are held against each other: take 2 or more"
        )
    chosen = subjects.subjects(args, keep=cases.ambiguous)
    wan = opening.load(args)
    at = opening.within(args.at, wan.preset.steps) or spread(6, wan.preset.steps)
    folder = run_folder.open_run(args, wan, [], **subjects.about(args), at=at, count=args.count)
    if args.prompt is not None:
        kept = cases.collect(
            folder,
            "spread",
            [chosen],
            lambda batch: {"apart": commitment.spread(wan, batch[0], at, args.count)[None]},
        )
        apart = kept["apart"][0]
        figures.curves(
            folder.path("spread.png"),
            {"completions": apart},
            x="step",
            y="distance of completions, 1: another seed",
            title="How far apart the completions of each step end",
            at=at,
        )
        for step, value in zip(at, apart, strict=True):
            print(f"step {step:3}  completions end {value:.3f} of a seed's difference apart")
        return

    def compute(batch):
        return {"answers": commitment.completions(wan, batch, at, args.count)}

    answers = torch.from_numpy(
        cases.collect(folder, "completions", cases.batches(chosen, most=5), compute)["answers"]
    )
    several = [len(case.puzzle.candidates) for case in chosen]
    committed = np.stack(
        [
            commitment.commitment(commitment.shares(a, r)).numpy()
            for a, r in zip(answers, several, strict=True)
        ]
    )
    decided = [commitment.decision(line, at) for line in committed]
    figures.curves(
        folder.path("commitment.png"),
        {"mean": np.nanmean(committed, 0), "valid": (answers >= 0).double().mean((0, 2)).numpy()},
        x="step",
        y="commitment; share of valid completions",
        title=f"When is the answer decided? n = {len(chosen)}",
        at=at,
    )
    print("step  commitment (95 % interval)            valid completions")
    for k, step in enumerate(at):
        line = committed[:, k][np.isfinite(committed[:, k])]
        print(f"{step:4}  {stats.bootstrap(line)!s:36}  {(answers[:, k] >= 0).double().mean():.2f}")
    found = [step for step in decided if step is not None]
    print(
        f"decided (commitment >= {commitment.DECIDED}) by the end: {len(found)} of {len(chosen)}",
        end="",
    )
    print(f"; median decision step {int(np.median(found))}" if found else "")
    print(folder.path("commitment.png"))
