"""The end of a run told to a web address: `--notify URL`."""

import json
import re
import threading
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection, InvalidURL
from typing import Any
from urllib.parse import SplitResult, urlsplit

from batchclf import __version__
from batchclf.cli.streams import say
from batchclf.errors import UsageError

TIMEOUT_S = 10.0
STOPPED_TIMEOUT_S = 1.0
"""The same after a signal, which leaves little time."""
_NOT_IN_ADDRESSES = re.compile(r"[\x00-\x20\x7f]")


class Webhook:
    """Takes the summary of a run, by POST, as JSON. What becomes of it changes nothing.

    Only its host is ever told: the rest of such an address is often a secret.
    """

    def __init__(self, url: str) -> None:
        """Look at the address; nothing is sent.

        Raises:
            UsageError: it is none of http or https, or none that can be asked.
        """
        url = url.strip()  # as the end of the line that a secret was read from
        try:
            self._url = urlsplit(url)
            is_usable = self._url.scheme in ("http", "https") and bool(self._url.hostname)
            is_usable = is_usable and f"{self._url.path}{self._url.query}".isascii()
            self._port = self._url.port
        except ValueError:
            is_usable = False
        if not is_usable or _NOT_IN_ADDRESSES.search(url):
            raise UsageError(
                "--notify: give an address such as https://example.org/hook, with blanks and what "
                "is not ASCII written as %20 and the like"
            )
        if "@" in self._url.netloc:
            raise UsageError(
                "--notify: user:password@ before the host is not sent; give an address whose path "
                "or query says who asks, as https://example.org/hook?key=..."
            )

    def tell(self, answer: Mapping[str, Any], *, is_stopped: bool) -> None:
        """Send the summary, for some seconds at most; what goes wrong is a line of the log."""
        problems: list[str] = []
        seconds = STOPPED_TIMEOUT_S if is_stopped else TIMEOUT_S

        def post() -> None:
            try:
                problem = _post(self._url, self._port, json.dumps(answer), seconds)
            except InvalidURL:  # its text holds the address
                problem = "its address is not one that can be asked"
            except (OSError, HTTPException, ValueError) as error:
                problem = str(error) or type(error).__name__
            problems.extend([problem] if problem else [])

        # Looking up a name has no time-out of its own.
        posting = threading.Thread(target=post, name="notify", daemon=True)
        posting.start()
        posting.join(seconds)
        if posting.is_alive():
            problems.append(f"no answer within {seconds:g} s")
        for problem in problems[:1]:
            say(f"batchclf: --notify: {self._url.hostname} was not told: {problem}", "warning")


def _post(url: SplitResult, port: int | None, body: str, seconds: float) -> str | None:
    """Send it; what was refused, None: nothing."""
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    assert url.hostname is not None, "it was looked at"
    connection = kind(url.hostname, port, timeout=seconds)
    try:
        headers = {"Content-Type": "application/json", "User-Agent": f"batchclf/{__version__}"}
        path = f"{url.path or '/'}{'?' if url.query else ''}{url.query}"
        connection.request("POST", path, body.encode(), headers)
        answer = connection.getresponse()
        return None if answer.status < 300 else f"it answers {answer.status} {answer.reason}"
    finally:
        connection.close()
