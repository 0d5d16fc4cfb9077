"""Text as it may be shown: what others wrote, such as the names of files; many numbers."""

from collections.abc import Iterable


def escaped(text: str) -> str:
    """Text on one line that cannot drive the terminal.

    Escaped is all that is not printable: control characters, also those beyond ASCII, marks that
    turn the direction of text (U+202A to U+202E, U+2066 to U+2069), line and paragraph separators,
    halves of surrogate pairs.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers in words, those that follow each other as one: `3, 7-9`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, one)) for one in found)
