"""Benchmarks, which are not installed. From a clone: python -m continual_concepts.benchmarks."""
