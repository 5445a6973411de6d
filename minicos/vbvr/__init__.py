"""VBVR-Bench: read its samples, run a model on them, write what its scorer takes, and tabulate the
scores.

    cases.py       samples: folders of pictures and prompts, on disk
    fit.py         from a sample's size and length to those that a model supports, and back
    conditions.py  the conditions of the paper by name: plain, ensemble, noise:step=10 ...
    work.py        the work list: what to make, which process makes it, and what is left
    estimate.py    the cost of a work list, before anything runs
    generate.py    runs a model over the work list
    tree.py        the tree of videos that the scorer takes
    finished.py    which of its videos are finished
    evalkit.py     the benchmarks' scorers, external checkouts in separate processes
    puzzles.py     the embedded model's benchmark: the project's own puzzles in the same tree
    score.py       scores of all trees, cached until a video changes
    table.py       scores as tables, with intervals
    steps.py       the score of every step's clean estimate, over sigma
    published.py   numbers from papers and repositories, for comparison
"""
