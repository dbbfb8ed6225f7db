"""Several concepts in one picture: quality and cost of regions."""
