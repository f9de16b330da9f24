"""The one error a user's input can cause."""


class InputError(ValueError):
    """Something the user passed cannot work; the message says what was wrong and what would be right."""
