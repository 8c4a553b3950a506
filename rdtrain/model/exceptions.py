"""What an exception of torch or another library says, and which transformers is refused with what words.

Imports nothing, as commands that need no torch start with it too.
"""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, which torch says with a RuntimeError on every device."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refusal_of_transformers(version: str, what: str) -> str | None:
    """What is said where an export's model, or what else of it, cannot be loaded by a version of transformers; None for one that can.

    Before 5.10 transformers does not take all files of a model's code along.
    """
    major, minor = map(int, version.split(".")[:2])
    if major == 5 and minor >= 10:
        return None
    return f"this {what} needs transformers 5, from 5.10 on, and {version} is installed: pip install 'transformers>=5.10,<6'"
