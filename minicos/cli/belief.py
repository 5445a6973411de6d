"""`minicos belief`: what the network shows at each step, beside what an ideal observer would believe."""

import argparse

from minicos.cli import opening, options, run_folder, subjects

EXAMPLES = """\
  minicos belief                                      25 held-out mazes with several right answers
  minicos belief --n 100 --steps 50
  minicos belief --puzzle goal --size 5
The latent at a step is a noisy answer; Bayes' rule says how likely each answer is given it, and the mean of the answers under these
weights is what a perfect network's clean estimate would be: several routes at once are no trait of the network. Printed per step:
answers alive for the ideal observer and in the estimate, the estimate's distance from the ideal one (1: as far as another answer),
the part of it that is no mixture of answers, and the distance of an observer who does not look.
"""


def add(verbs) -> None:
    parser = options.add_parser(
        verbs, "belief", "The clean estimate beside an ideal observer's.", EXAMPLES, run
    )
    subjects.add_subject_options(parser, n=25, own=False)
    options.add_model_options(parser, out="runs/belief")


def run(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    import numpy as np

    from minicos.analysis.tools import cases, figures, posterior, stats

    chosen = subjects.subjects(args, keep=cases.ambiguous)
    wan = opening.load(args)
    folder = run_folder.open_run(args, wan, [], **subjects.about(args))
    found = cases.collect(
        folder,
        "beliefs",
        cases.batches(chosen, most=5),
        lambda batch: posterior.beliefs(wan, batch),
    )
    table = {name: [stats.bootstrap(column) for column in found[name].T] for name in COLUMNS}
    folder.save_json(
        "belief.json", {name: [asdict(one) for one in line] for name, line in table.items()}
    )

    def lines(*names: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        rows = {name: np.array([(i.value, i.low, i.high) for i in table[name]]).T for name in names}
        return {COLUMNS[name]: (np.arange(rows[name].shape[1]), rows[name]) for name in names}

    several = np.mean([len(case.puzzle.candidates) for case in chosen])
    figures.bands(
        folder.path("alive.png"),
        lines("ideal", "shown"),
        x="denoising step",
        y="answers alive",
        title=f"How many of {several:.1f} right answers, n = {len(chosen)}",
    )
    figures.bands(
        folder.path("departure.png"),
        lines("departure", "outside", "prior"),
        x="denoising step",
        y="squared distance, 1: another answer",
        title=f"How far the estimate is from the ideal one, n = {len(chosen)}",
    )
    print("means with 95 % intervals, n =", len(chosen))
    print("step  " + "  ".join(f"{title:22}" for title in COLUMNS.values()))
    for step, row in enumerate(zip(*table.values(), strict=True)):
        print(
            f"{step:4}  "
            + "  ".join(f"{f'{i.value:5.3f} [{i.low:5.3f}, {i.high:5.3f}]':22}" for i in row)
        )
    print(folder.path("alive.png"), folder.path("departure.png"))


COLUMNS = {
    "ideal": "alive, ideal",
    "shown": "alive, shown",
    "departure": "from the ideal",
    "outside": "no mixture",
    "prior": "not looking",
}
