"""What lies below the address of a bucket, as whole objects; obstore speaks to its server."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from batchclf.errors import EnvironmentFailed, UsageError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

RETRIES = 4
RETRY_S = 30.0
"""A request is tried so often, within so many seconds; the library waits longer each time."""
TIMEOUT_S, NO_BYTE_S = 300.0, 20.0
"""Of one request, which may send a listing of some 100 MB, and of a server that sends nothing."""
PIECE_BYTES = 1 << 22
MAX_CAUSE_CHARS = 300
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_ENDPOINT")
"""Of the environment: where a server other than the provider's own is; the user's choice."""
ALLOWING = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
"""Of the environment: whether to speak to a server without TLS, as for an emulator."""
MISSING = (
    "obstore, which reads and writes buckets, is not installed: pip install 'batchclf[remote]'"
)


class AlreadyThere(Exception):
    """An object that was to be created is there."""


class Bucket:
    """The objects below an address, such as s3://bucket/runs/1; names are relative to it.

    Credentials are the library's own affair: the environment, or what the machine is given.
    """

    def __init__(self, address: str, key: str) -> None:
        """`key`: of the job file, for messages.

        Raises:
            UsageError: obstore is not installed, or the address is none.
        """
        self.address = address.rstrip("/")
        self._key = key
        self._store = open_store(
            self.address,
            key,
            {
                "timeout": timedelta(seconds=TIMEOUT_S),
                "read_timeout": timedelta(seconds=NO_BYTE_S),
            },
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
            with path.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
        return True

    def create(self, name: str, data: bytes) -> None:
        """Write an object that is not there yet, whole or not at all.

        Raises:
            AlreadyThere: it is there; it stays as it is.
            EnvironmentFailed: the bucket does not take it.
        """
        from obstore.exceptions import AlreadyExistsError

        with self._telling(name, "written"):
            try:
                self._store.put(name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                raise AlreadyThere from None

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
        with self._telling(folder, "listed"):
            found = self._store.list_with_delimiter(folder or None)["objects"]
            return sorted(one["path"] for one in found)

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
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise EnvironmentFailed(
                f"{self._key}: {self.address}/{name}: cannot be {deed}: {cause_of(error)}; "
                "mend it and run the same command to resume"
            ) from error


def cause_of(error: Exception) -> str:
    """What a server or the library said, in one line, without what may hold a secret."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    if isinstance(error, PermissionDeniedError):
        return "its server forbids it (403); are the credentials those of this bucket?"
    if isinstance(error, UnauthenticatedError):
        return "its server takes no credentials of ours (401); are there any, and not expired?"
    said = str(error).partition("Debug source")[0]
    code = re.search(r"<Code>(\w+)</Code>", said)
    first = said.partition("\n")[0].strip()[:MAX_CAUSE_CHARS]
    return f"{code[1]}: {first}" if code else first


def open_store(
    address: str, key: str, client: "ClientConfig", retry: "RetryConfig"
) -> "ObjectStore":
    """What speaks to the server of an address; nothing is asked of it yet.

    Raises:
        UsageError: obstore is not installed, the address is none, or the environment lacks
            something or holds what is none of its values.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise UsageError(f"{key}: {address}: {MISSING}") from None
    try:
        return from_url(
            address, client_options={**client, "allow_http": _allows_http()}, retry_config=retry
        )
    except (BaseError, ValueError) as error:
        raise UsageError(f"{key}: {address}: {cause_of(error)}") from error


def _allows_http() -> bool:
    """Whether the environment names a server without TLS, or allows one.

    Of the environment the library takes this no more, once any of these options is given.
    """
    names_one = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
    return names_one or any(os.environ.get(name, "").lower() in ("1", "true") for name in ALLOWING)
