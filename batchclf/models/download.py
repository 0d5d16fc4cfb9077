"""A file from a server: all that it sends, or an error soon after its last byte."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from uuid import uuid4

from batchclf.system.alive import alive

TIMEOUT_S = 30.0
"""A download is given up after so many seconds without a byte."""
BEAT_S = 0.5
CHUNK = 1 << 20


@contextmanager
def downloaded(url: str, folder: Path) -> Iterator[Path]:
    """What a server sends, in a file of `folder` that is to be moved away: what is left is removed.

    Raises:
        OSError: it cannot be reached, sends nothing for TIMEOUT_S, or the file cannot be written.
        http.client.HTTPException: it does not speak HTTP, or stops too early.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{uuid4().hex}.partial"
    try:
        with open(partial, "xb") as file:
            for piece in _pieces(url):
                file.write(piece)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _pieces(url: str) -> Iterator[bytes]:
    """What the server sends, as it comes; a thread waits for it, and is left where it hangs.

    No timeout of a socket's covers all: not the resolver, and each of a server's addresses anew.
    """
    received: Queue[bytes | Exception] = Queue(maxsize=4)
    ended = Event()
    Thread(target=_receive, args=(url, received, ended), name="download", daemon=True).start()
    try:
        while piece := _next(received):
            yield piece
    finally:
        ended.set()
        with suppress(Empty):
            while True:
                received.get_nowait()


def _next(received: "Queue[bytes | Exception]") -> bytes:
    gives_up_at = time.monotonic() + TIMEOUT_S
    while time.monotonic() < gives_up_at:
        alive()
        with suppress(Empty):
            piece = received.get(timeout=BEAT_S)
            if isinstance(piece, Exception):
                raise piece
            return piece
    raise TimeoutError(f"no byte came for {TIMEOUT_S:g} s")


def _receive(url: str, received: "Queue[bytes | Exception]", ended: Event) -> None:
    """Put what comes into the queue, at its end b"", or what went wrong."""
    request = urllib.request.Request(url, headers={"User-Agent": "batchclf"})  # noqa: S310
    try:
        # Later than who waits: this timeout only lets the thread end.
        with urllib.request.urlopen(request, timeout=2 * TIMEOUT_S) as response:  # noqa: S310
            while (piece := response.read1(CHUNK)) and not ended.is_set():
                received.put(piece)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
        received.put(b"")
    except urllib.error.URLError as error:
        received.put(error)
    except OSError as error:
        received.put(urllib.error.URLError(error))
    except Exception as error:  # noqa: BLE001 - raised by who waits
        received.put(error)
