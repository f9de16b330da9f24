"""The error raised for invalid user input."""


class InputError(ValueError):
    """Invalid user input; the message states what was wrong and what would be right."""
