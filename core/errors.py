"""The error class for messages to users."""


class ConceptError(ValueError):
    """Invalid input. The message is one sentence that names the input, its value and the allowed values."""
