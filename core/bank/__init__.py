"""Concepts, their learned words, the bank that holds them, and its file."""
