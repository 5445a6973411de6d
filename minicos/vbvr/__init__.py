"""VBVR-Bench: read its samples, run a model on them, write what its scorer takes, and tabulate the
scores.

cases.py       samples: folders of pictures and prompts, on disk
fit.py         from a picture's size and a clip's length to what a model can make, and back
conditions.py  the conditions of the paper by name: plain, ensemble, noise:step=10 ...
work.py        the work list: what is to be made, by whom, and what is left of it
estimate.py    what a work list costs, before anything runs
generate.py    runs a model over the work list
tree.py        the tree of videos that the scorer takes
finished.py    which of its videos are finished
evalkit.py     the benchmarks' scorers, external checkouts in a process of their own
puzzles.py     the embedded model's benchmark: the project's own puzzles under the same tree
score.py       scores of all trees, remembered until a video changes
table.py       scores as tables, with intervals
steps.py       the score of every step's clean estimate, over sigma
published.py   what papers and repositories report, for comparison
"""
