"""Files of web servers, each with an address of its own."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import batchclf
from batchclf.errors import UsageError
from batchclf.images.attempts import CHANGED, Code, Content, Patience, Refused
from batchclf.images.room import Claim
from batchclf.system.bucket import PASSING

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

NUM_CONNECTIONS = 64
"""Kept open, of one server; and servers with any."""
MAX_REDIRECTS = 5
PIECE_BYTES = 1 << 16
FIRST_CLAIM_BYTES = 1 << 20
"""For what the server does not say the size of; then twice as much as has come."""
_MISSING = (
    "input: urllib3, which reads from web servers, is not installed: pip install 'batchclf[remote]'"
)
_CODES: dict[int, Code] = {
    **dict.fromkeys((401, 403), "permission_denied"),
    **dict.fromkeys((404, 410), "vanished"),
    **dict.fromkeys((412, 416), "changed"),
}


@dataclass(frozen=True, slots=True)
class WebFile:
    """What lies at one address."""

    url: str
    patience: Patience

    def get(self, span: tuple[int, int], tag: str | None = None) -> Content:
        """Its bytes from the first number of `span` up to the second, or to its end.

        Raises:
            Refused: they are not to be had, or not with this `tag` any more.
            UsageError: the library is not installed.
        """
        headers = {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        with _answer(self.url, self.patience, headers) as found:
            is_part = found.status == 206
            if not is_part and span[0] > 0:
                raise Refused("the server does not send parts of a file", "no_parts")
            found_tag = found.headers.get("ETag")
            if tag is not None and found_tag != tag:
                raise Refused(CHANGED, "changed")
            data = _content(found, self.patience, None if is_part else span[1])
            size = _size(found)
            return Content(data, len(data) if size is None else size, found_tag)

    def get_up_to(self, max_bytes: int, claim: Claim) -> Content:
        """All of it, unless it is larger; its bytes are claimed before they are taken.

        Raises:
            Refused: it is not to be had.
            NoRoom: as `claim`.
            UsageError: the library is not installed.
        """
        with _answer(self.url, self.patience, {}) as found:
            size = _size(found)
            if size is not None and size > max_bytes:
                return Content(b"", size)
            if size is not None:
                claim(size)
            grows = claim if size is None else None
            data = _content(found, self.patience, max_bytes + 1, grows)
            return Content(b"" if len(data) > max_bytes else data, len(data))


@contextmanager
def _answer(url: str, patience: Patience, headers: dict[str, str]) -> Iterator["BaseHTTPResponse"]:
    """The answer of a server, its content not read yet.

    Raises:
        Refused: another status than 200 and 206; also within, where the connection fails.
    """
    pool = _pool(urlsplit(url).scheme, urlsplit(url).hostname or "")
    from urllib3 import Retry, Timeout
    from urllib3.exceptions import HTTPError

    found = None
    try:
        found = pool.request(
            "GET",
            url,
            headers={"User-Agent": f"batchclf/{batchclf.__version__}", **headers},
            preload_content=False,
            # attempts.py tries again, and waits for as long as the server wants it.
            retries=Retry(
                total=None,
                connect=0,
                read=0,
                redirect=MAX_REDIRECTS,
                status=0,
                other=0,
                raise_on_status=False,
                respect_retry_after_header=False,
            ),
            timeout=Timeout(patience.request_s / 2),
        )
        if found.status not in (200, 206):
            raise _refused(found)
        yield found
    except (HTTPError, OSError, UnicodeError) as error:
        raise Refused(
            _why(error),
            may_pass=not isinstance(error, UnicodeError),
            is_unanswered=found is None and _is_of_connection(error),
        ) from error
    finally:
        if found is not None:
            found.close()  # its connection as well, unless all was read: the next one may use that


def _content(
    found: "BaseHTTPResponse",
    patience: Patience,
    max_bytes: int | None,
    claim: Claim | None = None,
) -> bytes:
    """What is sent, or so many bytes of it; `claim`: of what the server does not say the size.

    Raises:
        Refused: it takes too long; each of its pieces may come in time.
        NoRoom: as `claim`.
    """
    ends_at = time.monotonic() + patience.request_s
    content = bytearray()
    claimed = 0
    while max_bytes is None or len(content) < max_bytes:
        piece = found.read1(PIECE_BYTES, decode_content=True)
        if not piece:
            break
        content += piece
        if claim is not None and len(content) > claimed:
            claimed = max(FIRST_CLAIM_BYTES, 2 * len(content))
            claim(claimed)
        if time.monotonic() > ends_at:
            raise Refused(f"sent {len(content):,} bytes in {patience.request_s:g} s, and not all")
    return bytes(content[:max_bytes])


@cache
def _pool(scheme: str, host: str) -> "PoolManager":
    """What keeps connections open; through the proxy that the environment names, if any.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        from urllib3 import PoolManager, ProxyManager
    except ImportError as error:
        raise UsageError(_MISSING) from error
    from urllib.request import getproxies, proxy_bypass  # which takes a while to import

    proxy = None if proxy_bypass(host) else getproxies().get(scheme)
    if proxy:
        return ProxyManager(proxy, maxsize=NUM_CONNECTIONS)
    return PoolManager(maxsize=NUM_CONNECTIONS)


def _size(found: "BaseHTTPResponse") -> int | None:
    """Of the whole file; None: the server does not say."""
    if found.status == 206:
        total = re.search(r"/(\d+)$", found.headers.get("Content-Range", ""))
        return int(total[1]) if total else None
    if found.headers.get("Content-Encoding", "identity") != "identity":
        return None
    length = found.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _refused(found: "BaseHTTPResponse") -> Refused:
    after = found.headers.get("Retry-After", "")
    return Refused(
        f"the server says {found.status} {found.reason or ''}".rstrip(),
        _CODES.get(found.status, "io_error"),
        may_pass=found.status in PASSING,
        after_s=float(after) if after.isdigit() else None,
    )


def _is_of_connection(error: Exception) -> bool:
    """Whether no answer came; else the address may be bad, or lead back to itself."""
    from urllib3 import exceptions as of

    kinds = (of.TimeoutError, of.ProtocolError, of.SSLError, of.NewConnectionError, of.ProxyError)
    return isinstance(_cause(error), (*kinds, OSError))


def _cause(error: Exception) -> Exception:
    from urllib3.exceptions import MaxRetryError

    if isinstance(error, MaxRetryError) and error.reason is not None:
        return error.reason
    return error


def _why(error: Exception) -> str:
    """What went wrong, without the address, which may carry a signature."""
    from urllib3 import exceptions

    error = _cause(error)
    if isinstance(error, exceptions.NewConnectionError):
        reason = getattr(error.__cause__, "strerror", None) or "no connection"
        return f"the connection failed: {reason}"
    if isinstance(error, exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(error, UnicodeError):
        return "no address can be so written"
    cause = next((one for one in error.args if isinstance(one, Exception)), error)
    if isinstance(cause, exceptions.IncompleteRead):
        return f"ended after {cause.partial:,} bytes"
    reason = getattr(cause, "strerror", None) or type(cause).__name__
    return f"the connection failed: {reason}"
