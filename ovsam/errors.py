"""The error raised for invalid user input, and recognition of errors about memory."""

MEMORY_SIGNS = (
    "out of memory",
    "not enough memory",
    "cannot allocate memory",
    "can't allocate memory",
    "failed to map segment",
    "bad_alloc",
)


class InputError(ValueError):
    """Invalid user input; the message states what was wrong and what would be right, in one line."""

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


def one_line(message: object) -> str:
    """A message without line breaks, which names of files and words of a user may have."""
    return " ".join(str(message).splitlines())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has an error of its own for a GPU, a RuntimeError for the CPU; libraries may fail
    to load."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | ImportError) and any(sign in text for sign in MEMORY_SIGNS)
