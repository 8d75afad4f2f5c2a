"""Needs of a run on given machines: memory of each role, seconds of a step (`mmopd plan`)."""
