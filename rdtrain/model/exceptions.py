"""What an exception of torch or another library says. Imports nothing, as commands that need no torch start with it too."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, which torch says with a RuntimeError on every device."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
