"""Stub until the input is data."""

from collections.abc import Iterator

from batchclf.images.source import Source, require_images

__all__ = ["list_paths", "require_images"]


class list_paths:  # noqa: N801
    """Stub."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def num_left_out(self) -> int:
        return self._source.num_left_out

    def __iter__(self) -> Iterator[bytes]:
        return self._source.paths()
