"""Ensembles: middle-layer states averaged over seeds (paper, Sec. 6)."""
