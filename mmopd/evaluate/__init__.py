"""Runs benchmarks, by lmms-eval or by sampling responses itself, and tabulates their results."""

from mmopd.evaluate.run import evaluate, read_suite
from mmopd.evaluate.score import BenchmarkScore
from mmopd.evaluate.table import Results, Row

__all__ = ["BenchmarkScore", "Results", "Row", "evaluate", "read_suite"]
