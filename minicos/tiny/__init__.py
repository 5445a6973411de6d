"""The embedded model: its training, its evaluation, its weights. Nothing in minicos imports it."""
