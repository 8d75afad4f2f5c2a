"""Preflight: examine each replica of each teacher before a run relies on its scores."""
