"""Buckets: how one is opened, and what an error of obstore, which speaks to their servers, means.

Of S3 and what speaks like it, of Google Cloud Storage, of Azure's blob storage. Which objects are
read and written, and how often they are asked for, is for who does it: images/buckets.py reads an
input, results/bucket.py keeps an output.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Literal

from batchclf.errors import UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_ENDPOINT")
"""Of the environment: where a server other than the provider's own is; the user's choice."""
ALLOWING = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
"""Of the environment: whether to speak to a server without TLS, as for an emulator."""
MISSING = (
    "obstore, which reads and writes buckets, is not installed: pip install 'batchclf[remote]'"
)
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers of servers (statuses of HTTP) that may be others a little later."""
MAX_WHY_CHARS = 300
_IMPORTING = threading.Lock()
"""The library's parts import each other: threads that begin at once saw one that was half there."""
Kind = Literal["denied", "missing", "changed", "exists", "bad_name", "failed"]
"""`exists`: it was to be created; `bad_name`: no path can be named as an object that is there."""
_KINDS: Final[dict[int, Kind]] = {
    **dict.fromkeys((401, 403), "denied"),
    404: "missing",
    **dict.fromkeys((412, 416), "changed"),
}
_EVERYWHERE: Final[dict[Kind, re.Pattern[str]]] = {
    "denied": re.compile(
        "AccessDeniedException|AuthenticationFailed|ExpiredToken|InvalidAccessKeyId|InvalidToken|"
        "RequestTimeTooSkewed|SignatureDoesNotMatch|TokenRefreshRequired"
    ),
    "missing": re.compile("NoSuchBucket|ContainerNotFound"),
}
"""Codes of answers that no other object of a bucket would get rid of."""
_NO_CREDENTIALS = "no credentials were found"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a bucket did not do what it was asked to."""

    kind: Kind
    why: str
    """In plain words, on one line, without an address: some carry a signature."""
    may_pass: bool = False
    """Whether the same request may be answered a little later."""
    is_everywhere: bool = False
    """Whether it is said of the whole bucket: credentials that have expired, no such bucket."""
    is_unanswered: bool = False
    """Whether nothing came from the server: it may be down, or the network."""


def open_store(
    address: str, key: str, request_s: float, no_byte_s: float, retry: "RetryConfig"
) -> "ObjectStore":
    """What speaks to the server of an address; nothing is asked of it yet.

    Credentials are the library's own affair: the environment, or what the machine is given.
    `key`: of the job file, for messages; `no_byte_s`: of a server that sends nothing.

    Raises:
        UsageError: obstore is not installed, the address is none, or the environment lacks
            something or holds what is none of its values.
    """
    try:
        with _IMPORTING:
            import obstore  # noqa: F401 - whole, before its parts are used
            from obstore.exceptions import BaseError
            from obstore.store import from_url
    except ImportError:
        raise UsageError(f"{key}: {address}: {MISSING}") from None
    try:
        return from_url(
            address,
            client_options={
                "timeout": timedelta(seconds=request_s),
                "read_timeout": timedelta(seconds=no_byte_s),
                "allow_http": _allows_http(),
            },
            retry_config=retry,
        )
    except (BaseError, ValueError) as error:
        raise UsageError(f"{key}: {address}: {_first_line(str(error))}") from error


def _allows_http() -> bool:
    """Whether the environment names a server without TLS, or allows one.

    Of the environment the library takes this no more, once any of these options is given.
    """
    names_one = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
    return names_one or any(os.environ.get(name, "").lower() in ("1", "true") for name in ALLOWING)


@contextmanager
def raising(error_of: Callable[[Fault], Exception], *, listing: bool = False) -> Iterator[None]:
    """Raise in place of the library's errors what `error_of` makes of them."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, ValueError, OSError) as error:
        raise error_of(fault_of(error, listing=listing)) from error


def fault_of(error: Exception, *, listing: bool = False) -> Fault:
    """What an error of the library means.

    Of a listing, whatever is refused is refused of all that lies there.
    """
    from obstore.exceptions import AlreadyExistsError

    text = str(error)
    if isinstance(error, AlreadyExistsError):
        return Fault("exists", "it is there already")
    if listing and (name := re.search(r'invalid path: .*?"(.*?)"', text)):
        return Fault("bad_name", f"no path can be named as the object {name[1]!r}")
    why = _why(text)
    for kind, said in _EVERYWHERE.items():
        if said.search(text):
            return Fault(kind, why, is_everywhere=True)
    if status := re.search(r"status code: (\d{3})", text):
        number = int(status[1])
        kind = _KINDS.get(number, "failed")
        return Fault(kind, why, number in PASSING, is_everywhere=listing and kind != "changed")
    if isinstance(error, ValueError):
        return Fault("missing", "no object can have this name", is_everywhere=listing)
    may_pass = re.search(r"HTTP error|error sending request|error decoding|timed out", text)
    is_everywhere = listing or why == _NO_CREDENTIALS
    is_unanswered = "error sending request" in text
    return Fault("failed", why, may_pass is not None, is_everywhere, is_unanswered)


def _why(text: str) -> str:
    """A few words on what went wrong; the library's own hold addresses, and go on for pages."""
    first, _, details = text.partition("\n")
    if re.search(r"169\.254\.169\.254|metadata\.google|token request|credentials", first):
        return _NO_CREDENTIALS
    if status := re.search(r"status code: (\d{3} [A-Za-z -]+\w)", text):
        code = re.search(r"<Code>([\w.-]{1,80})</Code>", text)
        return f"the server says {status[1]}" + (f" ({code[1]})" if code else "")
    if "redirect without LOCATION" in text:
        return "the bucket lies in another region; set AWS_REGION to it"
    if "kind: Timeout" in details or "TimedOut" in details:
        return "no answer in time"
    deepest = re.findall(r"(?:message|error): \"([^\"]{1,120})\"", details)
    if "HTTP error" in first:
        return "the connection failed: " + (deepest[-1] if deepest else first.rpartition(": ")[2])
    return re.sub(r"\S*://\S+", "the server", _first_line(text))


def _first_line(text: str) -> str:
    return text.partition("Debug source")[0].partition("\n")[0].strip()[:MAX_WHY_CHARS]
