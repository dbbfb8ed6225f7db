"""Trains the embedded base and its metric encoder from scratch."""
