"""The error classes for messages to users."""


class ConceptError(ValueError):
    """Invalid input. The message is one sentence that names the input, its value and the allowed values."""


class WriteError(ConceptError):
    """A file cannot be written, although what it should hold is valid."""
