"""Concept neurons: how they are scored and selected."""
