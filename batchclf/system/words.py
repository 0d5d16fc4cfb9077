"""Amounts in words, as people read them."""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `1:02:03`; infinite where nothing tells."""
    if seconds == float("inf"):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def images(num: int) -> str:
    """A number of images: `1 image`, `1,227 images`."""
    return counted(num, "image")


def counted(num: int, noun: str) -> str:
    """So many of something: `1 node`, `2 nodes`."""
    return f"{num:,} {noun}" if num == 1 else f"{num:,} {noun}s"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: `12.3 MB`."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} TB"
