"""Hidden states swapped between two runs (paper, Sec. 5.2)."""
