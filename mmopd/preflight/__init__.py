"""Proof before training: each replica of each teacher is examined before a run believes its scores."""
