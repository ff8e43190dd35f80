"""Activations become coverage: counts and exemplars, the relevant features, and those that are missing."""
