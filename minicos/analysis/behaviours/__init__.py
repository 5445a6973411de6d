"""Perception before action, and working memory (paper, Sec. 4)."""
