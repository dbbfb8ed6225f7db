"""From a prompt to encoded text and to the deltas that it asks for."""
