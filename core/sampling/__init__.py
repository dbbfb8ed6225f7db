"""Sampling in the library, with classifier-free guidance and attention guidance."""
