"""The measurements for which a graphics card is needed, in one command of a few minutes."""
