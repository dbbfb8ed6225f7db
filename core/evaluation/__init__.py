"""Evaluation of concepts and banks, with features and classifiers that share nothing with the model under
test."""
