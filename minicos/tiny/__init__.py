"""The embedded model: its training, its evaluation, its weights. Not imported by minicos itself."""
