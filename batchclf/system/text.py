"""Text that others wrote, such as the names of files, as it may be shown."""


def escaped(text: str) -> str:
    """Text on one line that cannot drive the terminal.

    Escaped is all that is not printable: control characters, also those beyond ASCII, marks that
    turn the direction of text (U+202A to U+202E, U+2066 to U+2069), line and paragraph separators,
    halves of surrogate pairs.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
