"""Measures how well a concept was learned: features and a classifier that share nothing with the model under test."""
