"""Noise injected at a step or into a frame (paper, Fig. 3)."""
