"""Benchmark of all methods on sequences of concepts."""
