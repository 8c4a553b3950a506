"""Numbers and tables as people read them, in a terminal and in Markdown."""

from collections.abc import Iterable


def columns(lines: list[list[str]]) -> str:
    """A table: the first column to the left, all others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]).rstrip() for line in lines
    )


def markdown_lines(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a Markdown table. A bar in a cell, as names may have, would begin another one, and is escaped."""
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, ["---"] * len(header), *rows)]


def bytes_text(count: float) -> str:
    """A number of bytes, in the unit that suits it."""
    power = min(4, max(0, int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:,.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
