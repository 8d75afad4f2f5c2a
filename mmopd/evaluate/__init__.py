"""Benchmarks through lmms-eval, and the table of their results."""

from mmopd.evaluate.lmms import Record, evaluate, read_suite
from mmopd.evaluate.table import Results, Row

__all__ = ["Record", "Results", "Row", "evaluate", "read_suite"]
