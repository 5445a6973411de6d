"""Triton twins of functions in `minicos.ops` and `minicos.measures`: same names, same signatures,
tested against them.

What several of them share is in `rows`.

Imported as `minicos.kernels` (pyproject.toml maps this folder), and by nobody but
`Ops.with_kernels`. This file imports nothing: with the repository's root on `sys.path` it also
answers to `kernels`, the name of the Hub's package, and must then do no harm. The submodules import
torch, triton and one another, and nothing else of minicos.
"""
