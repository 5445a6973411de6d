"""The embedded model: its training, its evaluation and its weights. Nothing in minicos imports this package."""
