"""Every method on sequences of concepts."""
