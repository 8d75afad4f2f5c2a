"""Passes over a whole mixture: a model answers every prompt once, and its answers are stored next to the shards."""
