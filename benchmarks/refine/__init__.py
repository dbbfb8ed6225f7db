"""Photos that are added to a concept later: what is retained of the old ones, and what is gained."""
