"""Resizing RGB as Pillow does, to the bit (_resize.c)."""

from batchclf.results.records import Pixels

INSTRUCTIONS: tuple[str, ...]
"""The instruction sets that this CPU has and this module knows, the fastest first."""

def resize_into(
    out_HWC: Pixels,
    source_HWC: Pixels,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    corner: tuple[int, int],
    interpolation: str,
    tall_first: bool,
    instructions: str,
    /,
) -> None:
    """Resize a box of RGB pixels to `size` and write the window of it that has the shape of `out`.

    Both arrays are uint8 of shape (rows, columns, 3), whose rows are dense but may lie apart; they
    share no memory. `box` (left, top, right, bottom) is in pixels of the source; `size` (width,
    height) is that of the whole result, and `corner` (left, top) where in it the window begins.
    `tall_first`: whether much of the height going, columns are summed up before rows, as Pillow
    does since 13. Other threads run meanwhile.

    Raises:
        ValueError: another filter, instruction set or shape; a box or window that is not inside.
        MemoryError: there is not enough.
    """
