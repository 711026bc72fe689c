"""Tables as text: one line for each row, cells between bars, as they are read on paper."""

from __future__ import annotations


def rows_of(text: str) -> list[list[str]]:
    """The cells of each line that is not empty."""
    lines = filter(None, map(str.strip, text.splitlines()))
    return [[cell.strip() for cell in line.split("|")] for line in lines]
