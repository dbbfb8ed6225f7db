"""What a site does beside its frozen weights: word-bound deltas, packed keys and values, attention maps."""
