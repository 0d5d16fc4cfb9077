"""What lies below the address of a bucket, as whole objects: what is kept of an output."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from batchclf.errors import EnvironmentFailed
from batchclf.system.bucket import Fault, open_store, raising
from batchclf.system.cache import cache_failed

RETRIES = 4
RETRY_S = 30.0
"""A request is tried so often, within so many seconds; the library waits longer each time."""
TIMEOUT_S, NO_BYTE_S = 300.0, 20.0
"""Of one request, which may send a listing of some 100 MB, and of a server that sends nothing."""
PIECE_BYTES = 1 << 22
_Piece = TypeVar("_Piece")


class AlreadyThere(Exception):
    """An object that was to be created is there."""


class Bucket:
    """The objects below an address, such as s3://bucket/runs/1; names are relative to it."""

    def __init__(self, address: str, key: str) -> None:
        """`key`: of the job file, for messages.

        Raises:
            UsageError: as `open_store`.
        """
        self.address = address.rstrip("/")
        self._key = key
        self._store = open_store(
            self.address,
            key,
            TIMEOUT_S,
            NO_BYTE_S,
            {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
        )

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None: it is not there.

        Raises:
            EnvironmentFailed: the bucket does not give it.
        """
        with self._telling(name, "read"):
            try:
                return bytes(self._store.get(name).bytes())
            except FileNotFoundError:
                return None

    def fetch(self, name: str, path: Path) -> bool:
        """Write an object's bytes to a file, in pieces; False: it is not there, and no file is.

        Raises:
            EnvironmentFailed: the bucket does not give it, or the file cannot be written.
        """
        with self._telling(name, "read"):
            try:
                pieces = self._store.get(name).stream(PIECE_BYTES)
            except FileNotFoundError:
                return False
        try:
            with path.open("wb") as file:
                for piece in self._taken(name, pieces):
                    file.write(piece)
        except OSError as error:
            raise cache_failed(error) from error
        return True

    def fetch_end(self, name: str, path: Path, offset: int) -> None:
        """Write an object's bytes from `offset` on, or all, to a file that gets the object's time.

        An object that is not there any more leaves no file.

        Raises:
            EnvironmentFailed: as `fetch`.
        """
        with self._telling(name, "read"):
            try:
                found = self._store.get(
                    name, options={"range": {"offset": offset}} if offset > 0 else {}
                )
                data = found.bytes()
            except FileNotFoundError:
                return
        written_at = found.meta["last_modified"].timestamp()
        try:
            path.write_bytes(data)
            os.utime(path, (written_at, written_at))
        except OSError as error:
            raise cache_failed(error) from error

    def _taken(self, name: str, pieces: Iterable[_Piece]) -> Iterator[_Piece]:
        """Pieces of an object; told is what fails while one comes, not what is done with it."""
        with self._telling(name, "read"):
            yield from pieces

    def create(self, name: str, data: bytes) -> None:
        """Write an object that is not there yet, whole or not at all.

        Raises:
            AlreadyThere: it is there; it stays as it is.
            EnvironmentFailed: the bucket does not take it.
        """
        with self._telling(name, "written"):
            self._store.put(name, data, mode="create", use_multipart=False)

    def write(self, name: str, data: bytes | Path) -> None:
        """Write an object, or replace it, whole; a file is sent in pieces.

        Raises:
            EnvironmentFailed: the bucket does not take it.
        """
        with self._telling(name, "written"):
            self._store.put(name, data)

    def names(self, folder: str = "") -> list[str]:
        """The names of the objects in a folder, without those in folders below it, sorted.

        Raises:
            EnvironmentFailed: the bucket does not list them.
        """
        return sorted(self.sizes(folder))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The same, not sorted, and how many bytes each has.

        Raises:
            EnvironmentFailed: as `names`.
        """
        with self._telling(folder, "listed"):
            found = self._store.list_with_delimiter(folder or None)["objects"]
            return {one["path"]: one["size"] for one in found}

    def remove(self, names: list[str]) -> None:
        """Remove objects, those that are there.

        Raises:
            EnvironmentFailed: the bucket does not let them go.
        """
        with self._telling(names[0] if names else "", "removed"):
            if names:
                self._store.delete(names)

    @contextmanager
    def _telling(self, name: str, deed: str) -> Iterator[None]:
        """Raise in place of the library's errors what they mean for the job."""

        def error_of(fault: Fault) -> Exception:
            if fault.kind == "exists":
                return AlreadyThere(name)
            what = f"{self._key}: {self.address}/{name}: cannot be {deed}: {fault.why}"
            if fault.kind == "denied":
                what += "; are the credentials those of this bucket, and not expired?"
            return EnvironmentFailed(f"{what}; mend it and run the same command to resume")

        with raising(error_of):
            yield
