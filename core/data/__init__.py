"""Photos, captions and masks as training batches."""
