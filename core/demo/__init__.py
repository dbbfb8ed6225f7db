"""The embedded base: networks, vocabulary, drawn scenes, and models that evaluate its pictures."""
