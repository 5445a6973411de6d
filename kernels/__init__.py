"""Triton kernels for functions in `minicos.ops` and `minicos.measures`, with the same names and
signatures, tested against them. Their common parts are in `rows`.

Imported as `minicos.kernels` (pyproject.toml maps this folder), and only by `Ops.with_kernels`.
This file imports nothing: with the repository's root on `sys.path` it can also be found as
`kernels`, the name of the Hub's package, and must then do no harm. The submodules import torch,
triton and one another, and nothing else of minicos.
"""
