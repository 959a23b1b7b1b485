"""Classifiers by name and from files: sources, weights, checkpoints (§4.2)."""
