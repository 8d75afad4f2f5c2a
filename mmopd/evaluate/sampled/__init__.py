"""Benchmarks of text that mmopd samples itself: n responses to each problem, judged by the judge of their project."""
