"""Sites, deltas, noise schedules and the backbone interface. All other packages build on these."""
