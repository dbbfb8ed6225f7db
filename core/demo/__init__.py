"""The embedded bases: networks, vocabulary, scenes, and the judges that look at their pictures."""
