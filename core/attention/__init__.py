"""Changes to cross-attention: trainable and word-bound deltas, packed keys and values, attention maps."""
