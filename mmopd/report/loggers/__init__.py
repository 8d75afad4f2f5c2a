"""Loggers: where people look at runs. A recipe lists them (`loggers`); `metrics.jsonl` is always written.

A logger reads the files that a run writes, in a process of its own. So it cannot stop or slow a step, it goes on after
a resume where it was, and it sends later what it could not send before.
"""
