"""Runs benchmarks with lmms-eval, and tabulates their results."""

from mmopd.evaluate.lmms import BenchmarkScore, evaluate, read_suite
from mmopd.evaluate.table import Results, Row

__all__ = ["BenchmarkScore", "Results", "Row", "evaluate", "read_suite"]
