"""Benchmarks. They are not installed; run them from a clone: python -m continual_concepts.benchmarks."""
