"""Basics of every process of a run: child processes, ranks, run folders, locks, progress, logs, addresses."""
