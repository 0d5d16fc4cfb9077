"""Lists that can be read once only, kept as files, so that all of a job's processes can read them.

A run keeps them in its output, where a later run finds them: to go on needs the stream no more.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchclf.errors import NoImagesError
from batchclf.images.streams import is_stream, read_stream
from batchclf.results.files import output_failed, sync_folder
from batchclf.results.listing import file_of
from batchclf.results.mirror import working_folder
from batchclf.results.records import Shard
from batchclf.run.request import files_of
from batchclf.spec.input import STDIN, Place, as_text, places_of, with_places
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions

Wait = Callable[[], None]


def keep_for_run(job: JobSpec, options: RunOptions, wait: Wait) -> JobSpec:
    """The job with such lists in its output folder, which the caller holds.

    They are read where the input is listed anew. A run that goes on has its listing: it takes the
    lists of the first run, and on another machine, where a bucket does not bring them, none.
    `wait` may raise what ends the waiting for them.

    Raises:
        BatchclfError: as `keep_lists`.
    """
    files = files_of(job, options.shard)
    is_listed = not (options.overwrite or options.extend) and file_of(files) is not None
    return keep_lists(job, files.folder, wait, is_listed, options.shard.suffix)


def input_of(job: JobSpec) -> str:
    """A job's input as text; a list that is kept, or is to be, is `-` there, wherever that is."""
    places = [
        STDIN if is_stream(place) or _is_kept(job, place) else place
        for place in places_of(job.input)
    ]
    return as_text(with_places(job.input, tuple(places)))


def _is_kept(job: JobSpec, place: Place) -> bool:
    if not isinstance(place, Path) or not re.fullmatch(r"input\d*\.txt", place.name):
        return False
    if isinstance(job.output, str):  # each shard has a folder of its own
        return place.parent.parent == working_folder(job.output, Shard()).parent
    return place.parent == job.output


def keep_lists(
    job: JobSpec, folder: Path, wait: Wait, is_listed: bool = False, suffix: str = ""
) -> JobSpec:
    """The job with such lists in a folder; where it `is_listed`, those that are there.

    `suffix`: of the temporary files, since other shards may write the same ones.

    Raises:
        NoImagesError: nothing is in one.
        UsageError, EnvironmentFailed: one cannot be read, or not be written.
    """
    places = list(places_of(job.input))
    for number, place in enumerate(places):
        if not is_stream(place):
            continue
        places[number] = kept = folder / f"input{number or ''}.txt"
        if is_listed:
            with _writing(kept):
                kept.touch()
        else:
            _write(kept, folder / f".{kept.name}{suffix}.tmp", place, wait)
    return job.model_copy(update={"input": with_places(job.input, tuple(places))})


def _write(path: Path, temporary: Path, place: Place, wait: Wait) -> None:
    """Write a stream's content whole, or leave what is there; no link in its place is followed."""
    with _writing(path):
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.writelines(read_stream(place, wait))
                if not file.tell():
                    raise NoImagesError(f"input: {place}: found 0 images: it holds no path")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise output_failed(path, error) from error
