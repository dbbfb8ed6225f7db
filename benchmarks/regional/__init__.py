"""Benchmarks of quality and cost of regions, with several concepts in one picture."""
