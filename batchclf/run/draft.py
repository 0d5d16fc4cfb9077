"""A range's records while they are written, until they are committed as a part."""

from collections.abc import Iterator, Mapping

from batchclf.results.lines import Lines, failure_code, find_done
from batchclf.results.listing import Listing
from batchclf.results.parts import Committed, read_part
from batchclf.results.writer import RecordWriter, Timed, untimed
from batchclf.run.duty import Attempt

MISSING = ("vanished", "not_found")
"""Codes of images that are not there, be it that the folder around them is not."""
MANY = 10
"""So many of a range, or half of it, are asked about elsewhere."""


def num_missing(errors_by_code: Mapping[str, int]) -> int:
    """Of some errors, those of images that are not there."""
    return sum(errors_by_code.get(code, 0) for code in MISSING)


class Draft:
    """The records of one attempt at a range; who comes after its process goes on with them."""

    def __init__(self, attempt: Attempt, listing: Listing, timed: Timed = untimed) -> None:
        """An earlier process may have written some.

        Raises:
            EnvironmentFailed: the draft cannot be read or written.
        """
        self.attempt = attempt
        self._listing = listing
        self._done = find_done(attempt.draft, self._paths())
        self._writer = RecordWriter(attempt.draft, self._done.num_bytes, timed)

    def _paths(self) -> Iterator[bytes]:
        return (ref.path for ref in self.attempt.range.refs(self._listing))

    @property
    def num_images(self) -> int:
        return self._done.num_images

    @property
    def num_left(self) -> int:
        return self.attempt.range.num_images - self.num_images

    @property
    def is_doubtful(self) -> bool:
        """Whether its images may be missing by the fault of this machine.

        So many are, or the last one is: then all that follow may be, as after a mount was lost.
        """
        missing = num_missing(self._done.errors_by_code)
        is_much = missing >= min(MANY, max(1, self.num_images / 2))
        return (is_much or self._done.last in MISSING) and not self.attempt.is_confirmed

    def write(self, lines: Lines) -> None:
        """Append the next records.

        Raises:
            EnvironmentFailed: as `RecordWriter.write`.
        """
        self._writer.write(lines)
        self._done.num_ok += lines.num_ok
        self._done.errors_by_code.update(lines.errors_by_code)
        last = lines.data.splitlines()[-1] if lines.num_errors else b""
        self._done.last = failure_code(last) or "ok"

    def commit(self) -> Committed:
        """Put what is there in its place, for good; what is there then, ours or another's.

        Raises:
            EnvironmentFailed: the disk does not take it, or another start of the job came.
        """
        attempt, done = self.attempt, self._done
        first = attempt.range.first
        with self._writer:
            num_bytes = self._writer.num_bytes
        if attempt.folders.commit(attempt.draft, first):
            return Committed(first, num_bytes, done.num_ok, done.errors_by_code)
        return read_part(attempt.folders, first, self._paths())

    def give_up(self) -> None:
        """Leave it as it is; the folder that it lies in is taken away when the job ends."""
        with self._writer:
            pass
