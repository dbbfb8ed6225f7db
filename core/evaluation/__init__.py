"""Evaluation of concepts and banks. Its features and classifiers are independent of the evaluated model."""
