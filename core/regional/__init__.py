"""Several concepts in one picture: regions, region attention, region noise, crops. Works in any host."""
