"""Measurements of this project; not part of what is installed. Run them from a clone: python -m continual_concepts.benchmarks."""
