"""Sites, deltas, schedules and the backbone interface: what every other room is built on."""
