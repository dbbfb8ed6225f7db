"""One training loop for every method: data, objective, loop, checkpoints. Knows no method by name."""
