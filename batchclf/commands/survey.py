"""What an input holds, counted.

Archives are listed in a process of its own: one that ends it is counted as the record that it will
be, as `run` does.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from subprocess import Popen

from batchclf.errors import BatchclfError, EnvironmentFailed
from batchclf.images.archives.alone import list_alone
from batchclf.images.archives.listing import Archive, Listing, Unlistable, listing_with
from batchclf.images.archives.members import Log
from batchclf.images.source import AnySource, Sources, source_of
from batchclf.images.store import open_store
from batchclf.results.records import Entry, Failure, ImageRef
from batchclf.sessions.sample import spread
from batchclf.spec.input import shown
from batchclf.spec.job import JobSpec
from batchclf.system.alive import alive, watched
from batchclf.system.children import end_with_parent, how_it_ended, start_serving
from batchclf.system.interrupt import SIGNALS

BEAT_S = 0.5
SAMPLE_SIZE = 4096
"""Images of the sample, or up to twice as many."""


@dataclass(frozen=True, slots=True)
class Survey:
    """How much there is."""

    num_images: int
    num_left_out: int
    left_out: str
    """The same in words: how much of which kind."""
    sample: Sequence[ImageRef]
    """Some of them, evenly spread, by their numbers in the listing."""
    located: bool
    """Whether some may lie in archives."""


def survey(job: JobSpec, log: Log) -> Survey:
    """List a job's input, as `run` would.

    Raises:
        BatchclfError: it cannot be listed.
    """
    source = source_of(job)
    for remark in source.remarks():
        log(remark)
    if not _opens_archives(source):
        return _look_through(source, log)
    unlistable: dict[Archive, Failure] = {}
    while True:
        found = _look_through_apart(job, source, unlistable, log)
        if isinstance(found, Survey):
            return found
        archive, failure = found
        log(f"{os.fsdecode(archive.file.path)}: {failure.code}: {failure.message}")
        unlistable[archive] = failure


def _opens_archives(source: AnySource) -> bool:
    parts = source.parts if isinstance(source, Sources) else (source,)
    return any(part.opens_archives for part in parts)


def _look_through(source: AnySource, log: Log) -> Survey:
    store = open_store(source)
    store.require_images()
    entries = store.entries(log)
    sample, num_images, _ = spread(_lively(entries), SAMPLE_SIZE, lambda: False)
    return Survey(num_images, entries.num_left_out, str(entries.left_out), sample, entries.located)


def _lively(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The same; each shows that listing goes on."""
    for entry in entries:
        alive()
        yield entry


# ---- in a process of its own ---------------------------------------------------------------------


def _look_through_apart(
    job: JobSpec, source: AnySource, unlistable: Unlistable, log: Log
) -> Survey | tuple[Archive, Failure]:
    """What the process found, or the archive that ended it, or held it up, and does so alone.

    Raises:
        EnvironmentFailed: it ended otherwise.
        BatchclfError: what it met.
    """
    archive: Archive | None = None
    with _lister() as (process, connection):
        connection.send((source, unlistable))
        try:
            while connection.poll(job.loader.max_seconds):
                word, what = connection.recv()
                if word == "found":
                    found: Survey = what
                    return found
                if word == "error":
                    raise what
                if word == "log":
                    log(what)
                elif word == "at":
                    archive = what
            how = f"silent for {job.loader.max_seconds:g} s"
        except (EOFError, ConnectionError):
            how = how_it_ended(process.wait())
    failure = list_alone(archive, job.loader.max_seconds) if archive is not None else None
    if archive is None or failure is None:
        where = f" at {os.fsdecode(archive.file.path)}" if archive is not None else ""
        raise EnvironmentFailed(
            f"input: {shown(job.input)}: the process that lists it was {how}{where}; run it again"
        )
    return archive, failure


@contextmanager
def _lister() -> Iterator[tuple[Popen[bytes], Connection]]:
    process, connection = start_serving(__name__, held=SIGNALS, stdout=2)
    with connection:
        try:
            yield process, connection
        finally:
            process.kill()
            process.wait()


def serve(descriptor: int, parent_pid: int) -> None:
    """Look through what the parent sends, and tell it how that goes."""
    end_with_parent(parent_pid)
    with Connection(descriptor) as connection:
        source, unlistable = connection.recv()
        told_at = time.monotonic()

        def beat() -> None:
            nonlocal told_at
            if time.monotonic() - told_at > BEAT_S:
                told_at = time.monotonic()
                connection.send(("beat", None))

        listing = Listing(unlistable, lambda archive: connection.send(("at", archive)))
        with watched(beat), listing_with(listing):
            try:
                found = _look_through(source, lambda text: connection.send(("log", text)))
            except BatchclfError as error:
                connection.send(("error", error))
            else:
                connection.send(("found", found))
