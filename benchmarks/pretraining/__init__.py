"""Trains the embedded base and its metric encoder from nothing: `python -m continual_concepts.core.demo.pretraining`."""
