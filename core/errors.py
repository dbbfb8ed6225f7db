"""The one error that a person is meant to read."""


class ConceptError(ValueError):
    """Bad input. The message is one sentence: the input, the value it had, what is allowed."""
