"""Training a concept with any method: settings, the trainer, checkpoints, and the record of a run."""
