"""Sampling in the library: the solver, guidance, attention guidance."""
