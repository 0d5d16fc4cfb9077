"""Buckets: of S3 and what speaks like it, of Google Cloud Storage, of Azure's blob storage.

What `system.bucket` is to an output; but here each refusal is told apart, and attempts.py alone
asks again.

16 threads read 10,000 objects of 50 kB from a server on the same two busy cores: with obstore in
1.4 to 4.1 s (0.13 to 0.18 ms of CPU each), boto3 16 s (1.5 ms), s3fs 24 to 31 s (2.2 ms).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Final

from batchclf.images.attempts import CHANGED, PASSING, Code, Content, Patience, Refused
from batchclf.images.room import Claim
from batchclf.system.bucket import open_store

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, ObjectStore

NO_BYTE_S = 10.0
"""A server that sends nothing for so long is asked again."""
_EVERYWHERE: Final[dict[Code, re.Pattern[str]]] = {
    "permission_denied": re.compile(
        "AccessDeniedException|AuthenticationFailed|ExpiredToken|InvalidAccessKeyId|InvalidToken|"
        "RequestTimeTooSkewed|SignatureDoesNotMatch|TokenRefreshRequired"
    ),
    "vanished": re.compile("NoSuchBucket|ContainerNotFound"),
}
"""Codes of answers that no other object of a bucket would get rid of."""
_NO_CREDENTIALS = "no credentials were found"


@dataclass(frozen=True, slots=True)
class Object:
    """One object of a bucket, as it is listed."""

    key: str
    size: int


@cache
def open_bucket(scheme: str, name: str, patience: Patience) -> "Bucket":
    """A bucket; nothing is asked of it yet.

    Raises:
        UsageError: as `open_store`.
    """
    client: ClientConfig = {
        "timeout": timedelta(seconds=patience.request_s),
        "read_timeout": timedelta(seconds=min(NO_BYTE_S, patience.request_s)),
    }
    # attempts.py tries again, in one way wherever files lie.
    return Bucket(open_store(f"{scheme}://{name}", "input", client, {"max_retries": 0}))


class Bucket:
    """What is read of one bucket; may be used by several threads."""

    def __init__(self, store: "ObjectStore") -> None:
        self.store = store

    def file(self, key: str) -> "BucketFile":
        """One object, whether it is there or not."""
        return BucketFile(self.store, key)

    def size_of(self, key: str) -> int:
        """The bytes of an object.

        Raises:
            Refused: it is not there.
        """
        import obstore
        from obstore.exceptions import BaseError

        try:
            return obstore.head(self.store, key)["size"]
        except (BaseError, ValueError, OSError) as error:
            raise refused(error) from error

    def pages(self, prefix: str, after: str | None, num_keys: int) -> Iterator[list[Object]]:
        """The objects below a prefix, those with keys behind `after`, some at a time.

        Raises:
            Refused: while it is iterated.
        """
        import obstore
        from obstore.exceptions import BaseError

        try:
            stream = obstore.list(self.store, prefix or None, offset=after, chunk_size=num_keys)
            for page in stream:
                yield [Object(one["path"], one["size"]) for one in page]
        except (BaseError, ValueError, OSError) as error:
            raise refused(error, listing=True) from error


@dataclass(frozen=True, slots=True)
class BucketFile:
    """One object of a bucket."""

    store: "ObjectStore"
    key: str

    def get(self, span: tuple[int, int], tag: str | None = None) -> Content:
        """Its bytes from the first number of `span` up to the second, or to its end.

        Raises:
            Refused: they are not to be had, or not with this `tag` any more.
        """
        options: GetOptions = {"range": span}
        if tag is not None:
            options["if_match"] = tag
        return self._get(options, span[1])

    def get_up_to(self, max_bytes: int, claim: Claim) -> Content:
        """All of it, unless it is larger; its bytes are claimed before they are taken.

        Raises:
            Refused: it is not to be had.
            NoRoom: as `claim`.
        """
        return self._get({}, max_bytes, claim)

    def _get(
        self, options: "GetOptions", max_bytes: int, claim: Claim = lambda num_bytes: None
    ) -> Content:
        import obstore
        from obstore.exceptions import BaseError

        try:
            found = obstore.get(self.store, self.key, options=options)
            size, tag = found.meta["size"], found.meta["e_tag"]
            first, end = found.range
            if end > max_bytes:
                return Content(b"", size, tag)
            claim(end - first)
            data = bytes(found.bytes())
        except (BaseError, ValueError, OSError) as error:
            raise refused(error) from error
        if len(data) != end - first:
            raise Refused(f"ended after {len(data):,} of {end - first:,} bytes", may_pass=True)
        return Content(data, size, tag)


def refused(error: Exception, *, listing: bool = False) -> Refused:
    """What the library's error says, without the address in it.

    Of a listing, whatever is refused is refused of all that lies there.
    """
    text = str(error)
    if listing and (name := re.search(r'invalid path: .*?"(.*?)"', text)):
        return Refused(f"no path can be named as the object {name[1]!r}", "bad_name")
    why = _why(text)
    for code, said in _EVERYWHERE.items():
        if said.search(text):
            return Refused(why, code, is_everywhere=True)
    if status := re.search(r"status code: (\d{3})", text):
        number = int(status[1])
        if number in (401, 403):
            return Refused(why, "permission_denied", is_everywhere=listing)
        if number == 404:
            return Refused(why, "vanished", is_everywhere=listing)
        if number in (412, 416):
            return Refused(CHANGED, "changed")
        return Refused(why, may_pass=number in PASSING, is_everywhere=listing)
    if isinstance(error, ValueError):
        return Refused("no object can have this name", "vanished", is_everywhere=listing)
    may_pass = re.search(r"HTTP error|error sending request|error decoding|timed out", text)
    is_everywhere = listing or why == _NO_CREDENTIALS
    return Refused(why, may_pass=may_pass is not None, is_everywhere=is_everywhere)


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
    return re.sub(r"\S*://\S+", "the server", first)[:200]
