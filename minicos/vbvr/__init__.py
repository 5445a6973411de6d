"""VBVR-Bench: read its samples, run a model on them, write what its scorer takes, and tabulate the
scores.

cases.py       samples: folders of pictures and prompts, on disk
fit.py         from a picture's size and a clip's length to what a model can make, and back
conditions.py  the conditions of the paper by name: plain, ensemble, noise:step=10, swap:layer=20
               ...
work.py        the work list: what is to be made, by whom, and what is left of it
generate.py    runs a model over the work list
tree.py        the tree of videos that the scorer takes
evalkit.py     the benchmark's scorer, an external checkout in a process of its own
puzzles.py     the embedded model's benchmark: the project's own puzzles under the same tree
table.py       scores as tables, with intervals
published.py   what the papers report, for comparison
"""
