"""Turns a prompt into encoded text and selects the deltas that act for it."""
