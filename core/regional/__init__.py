"""Several concepts in one picture, for any host: regions, region attention, region noise and crops."""
