"""The embedded base: networks, vocabulary, drawn scenes, and models that judge its pictures."""
