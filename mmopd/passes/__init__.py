"""Passes over a whole mixture: a model answers every prompt once, and what it answered is kept beside the shards."""
