"""An output in a bucket: the job writes to a folder of this machine, and what is durable is sent.

parts/00000042.jsonl holds records from image 42 of the listing on: written whole or not at all, and
only where no such part is. So of two runs that write to one address, the later one at a part ends.
predictions.jsonl comes last, by multipart upload; run.json says `complete` only after it.

A run begins with what the bucket holds, not with what an earlier run left in the folder: it may
have been another machine's.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path

from batchclf.errors import BatchclfError, ResumeRefused
from batchclf.results.bucket import AlreadyThere, Bucket
from batchclf.results.files import RunFiles, output_failed, read_bytes, remove
from batchclf.results.listing import Listing, open_listing
from batchclf.results.output import files_of_parts
from batchclf.results.records import Shard
from batchclf.results.run_record import Durable, RunRecord, read_run, write_run
from batchclf.system.cache import cache_failed, cache_root, passing_folder
from batchclf.system.machine import boot_id

MAX_PART_BYTES = 1 << 25
END_BYTES = 1 << 20
"""Of a listing, what stands behind its paths is in there; of figures, the last."""
_PART = re.compile(r"parts/(\d{8,})\.jsonl")
_TO_READ = re.compile(r"listing\.nul|(run|stats)(-\d{5}-of-\d{5})?\.jsonl?")


def working_folder(address: str, shard: Shard) -> Path:
    """The folder of this machine in which a job writes what goes to an address."""
    digest = sha256(f"{address.rstrip('/')}{shard.suffix}".encode()).hexdigest()
    return cache_root() / "outputs" / digest[:16]


@contextmanager
def fetched_output(address: str) -> Iterator[Path]:
    """What a job has sent to an address, in a folder of this machine for as long as it is read.

    Not below /tmp, which often is memory.

    Raises:
        ResumeRefused: parts are missing.
        EnvironmentFailed: the bucket does not give it, or the folder cannot be written.
    """
    with _folder_for(address) as folder:
        _fetch_output(address, folder)
        yield folder


@contextmanager
def fetched_figures(address: str) -> Iterator[Path]:
    """The same without records: only what tells how far the job is, with the times of the bucket.

    Raises:
        EnvironmentFailed: as `fetched_output`.
    """
    bucket = Bucket(address, "output")
    with _folder_for(address) as folder:
        for name, size in bucket.sizes().items():
            if _TO_READ.fullmatch(name):
                is_whole = name.endswith(".json")
                bucket.fetch_end(name, folder / name, 0 if is_whole else size - END_BYTES)
        yield folder


@contextmanager
def _folder_for(address: str) -> Iterator[Path]:
    """A folder in which what lies at an address is read; errors within name that."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(passing_folder("fetched"))
        except OSError as error:
            raise cache_failed(error) from error
        try:
            yield folder
        except BatchclfError as error:
            error.args = (str(error).replace(str(folder), address.rstrip("/")), *error.args[1:])
            raise


def _fetch_output(address: str, folder: Path) -> None:
    bucket = Bucket(address, "output")
    for name in bucket.names():
        if _TO_READ.fullmatch(name):
            bucket.fetch(name, folder / name)
    listing = open_listing(RunFiles(folder))
    if listing is None:
        return
    read = files_of_parts(folder)
    for files in (RunFiles(folder), *RunFiles(folder).of_others()):
        record = read_run(files)
        # Shards beside what they were merged to: they may be merged once more.
        if record is not None and (files in read or record.status == "complete"):
            bounds = files.shard.bounds(listing.num_images)
            Mirror(bucket, files, overwrite=False).take_records(record, *bounds)


def send_merged(address: str, files: RunFiles) -> None:
    """Send the files of a whole job that was merged from shards; run.json, as ever, comes last.

    Raises:
        EnvironmentFailed: the bucket does not take them.
    """
    bucket = Bucket(address, "output")
    for path in (files.predictions, files.stats, files.run):
        bucket.write(path.name, path)


class Mirror:
    """What of a job's output lies in a bucket, and what is still to be sent."""

    def __init__(self, bucket: Bucket, files: RunFiles, *, overwrite: bool) -> None:
        self._bucket = bucket
        self._files = files
        self._overwrite = overwrite
        self._parts: dict[int, int] = {}
        """Of each part there, by the number of its first image: how many images."""
        self._num_bytes = 0
        self._num_images = 0
        """Sent in parts."""
        self._pulled_run: bytes | None = None
        self._pulled_listing: Listing | None = None
        """What the bucket held of this shard's run record, and of the listing."""
        self._num_retries = 0
        self._first: int | None = None
        """The first image of this shard, once the run has begun."""

    # ---- before the run --------------------------------------------------------------------------

    def pull(self) -> None:
        """Make the working folder what the bucket holds.

        Raises:
            ResumeRefused: what is there cannot be gone on from.
            EnvironmentFailed: the bucket does not give it, or the folder cannot be written.
        """
        files = self._files
        for path in (*files.folder.glob("run*.json"), files.predictions, files.stats, files.retry):
            remove(path)
        self._fetch(files.listing)
        for name in self._bucket.names():
            if re.fullmatch(r"run(-\d{5}-of-\d{5})?\.json", name):
                self._fetch(files.folder / name)
        self._pulled_run = read_bytes(files.run)
        listing = open_listing(files)
        self._pulled_listing = listing
        if self._overwrite or listing is None:
            return
        self._fetch(files.stats)
        record = read_run(files)
        if record is None:
            return
        self._num_retries = len(record.retries)
        first, last = files.shard.bounds(listing.num_images)
        if self.take_records(record, first, last):
            return
        if record.status == "complete":
            record = replace(record, status="interrupted")  # by whoever was to send them
        # Parts are whole, and here: as good as synced since this machine was started.
        durable = Durable(self._num_bytes, self._num_images, boot_id())
        write_run(files, replace(record, durable=durable))
        self._pulled_run = read_bytes(files.run)

    def take_records(self, record: RunRecord, first: int, last: int) -> bool:
        """Bring the records that are there, as predictions.jsonl; whether that was in the bucket.

        One that is there though the job is not complete is an earlier run's, from before images
        were added.

        Raises:
            ResumeRefused, EnvironmentFailed: as `_take_parts`.
        """
        if record.status == "complete" and self._take_predictions(first, last):
            return True
        self._take_parts(first, last)
        return False

    def _fetch(self, path: Path) -> bool:
        """Bring a file here; whether the bucket has it."""
        is_there = self._bucket.fetch(path.name, path)
        if not is_there:
            remove(path)
        return is_there

    def _take_predictions(self, first: int, last: int) -> bool:
        """All records of a complete job; a retry may have replaced some of those in the parts."""
        path = self._files.predictions
        if not self._fetch(path):
            return False
        numbers = self._numbers_of_parts(first, last)
        self._parts = {one: after - one for one, after in pairwise((*numbers, last))}
        self._num_bytes = path.stat().st_size
        self._num_images = last - first
        return True

    def _take_parts(self, first: int, last: int) -> None:
        """Bring the parts, which follow each other from the first image on, as predictions.jsonl.

        Raises:
            ResumeRefused: one is missing.
            EnvironmentFailed: the bucket does not give one, or the file cannot be written.
        """
        path = self._files.predictions
        try:
            with path.open("wb") as file:
                for number in self._numbers_of_parts(first, last):
                    expected = first + self._num_images
                    data = self._bucket.read(_name_of(number)) if number == expected else None
                    if data is None:
                        raise ResumeRefused(
                            f"output: {self._bucket.address}/{_name_of(expected)} is not there, "
                            f"but {_name_of(number)} is; give another output, or --overwrite to "
                            "start anew"
                        )
                    file.write(data)
                    self._note(number, data)
        except OSError as error:
            raise output_failed(path, error) from error

    def _note(self, number: int, data: bytes) -> None:
        self._parts[number] = data.count(b"\n")
        self._num_images += self._parts[number]
        self._num_bytes += len(data)

    def _numbers_of_parts(self, first: int, last: int) -> list[int]:
        names = self._bucket.names("parts")
        numbers = [int(found[1]) for name in names if (found := _PART.fullmatch(name))]
        return sorted(number for number in numbers if first <= number < last)

    # ---- during the run --------------------------------------------------------------------------

    def push(self, *, is_over: bool = False) -> bool:
        """Send what has become durable since; `is_over`: the run has ended.

        Returns:
            Whether the run has begun, so that there was something to send.

        Raises:
            ResumeRefused: another run has written the same part, or begun with another listing.
            EnvironmentFailed: the bucket does not take it.
        """
        files = self._files
        said = read_bytes(files.run)
        record = read_run(files)
        if record is None or said is None or not self._begin(record, is_over):
            return False
        # Of a retry, all is sent at once when it is over; so is that a job is complete.
        is_retried = record.retry is not None or len(record.retries) != self._num_retries
        if not is_retried and record.status != "complete":
            self._send_parts(record.durable.num_bytes)
            self._send(files.stats)
            # As it was before: what it says is durable is there by now.
            self._bucket.write(files.run.name, said)
        return True

    def _begin(self, record: RunRecord, is_over: bool) -> bool:
        """Claim the output in the bucket once the run has claimed its folder; whether it has."""
        files = self._files
        if self._first is not None:
            return True
        if read_bytes(files.run) == self._pulled_run:
            return False
        if record.status != "running" and not is_over:
            return False
        if (listing := open_listing(files)) is None:
            return False
        first, last = files.shard.bounds(listing.num_images)
        if self._overwrite:
            self._discard(first, last)
        self._place_listing(listing)
        self._first = first
        return True

    def _place_listing(self, listing: Listing) -> None:
        path = self._files.listing
        if self._pulled_listing is not None:
            if self._pulled_listing != listing:  # extended, or begun anew for another job
                self._bucket.write(path.name, path)
            return
        data = read_bytes(path)
        assert data is not None, "it was opened"
        try:
            self._bucket.create(path.name, data)
        except AlreadyThere:
            if self._bucket.read(path.name) != data:
                raise ResumeRefused(
                    f"output: {self._bucket.address}/{path.name}: another run placed a listing "
                    "while this one began; run the same command again"
                ) from None

    def _discard(self, first: int, last: int) -> None:
        """Remove what --overwrite throws away; run.json goes last."""
        files = self._files
        parts = {*self._numbers_of_parts(first, last)}
        if self._pulled_listing is not None:  # it may have been longer
            before = files.shard.bounds(self._pulled_listing.num_images)
            parts |= {*self._numbers_of_parts(*before)}
        self._bucket.remove([_name_of(number) for number in sorted(parts)])
        self._bucket.remove([files.predictions.name, files.stats.name])
        self._bucket.remove([files.run.name])

    def _send_parts(self, num_bytes: int) -> None:
        """Send the records up to so many bytes, as far as they are not there."""
        assert self._first is not None
        with self._files.predictions.open("rb") as file:
            file.seek(self._num_bytes)
            while (num_left := num_bytes - self._num_bytes) > 0:
                data = file.read(min(MAX_PART_BYTES, num_left))
                if num_left > MAX_PART_BYTES:
                    data += file.readline()
                self._create_part(self._first + self._num_images, data)

    def _create_part(self, number: int, data: bytes) -> None:
        try:
            self._bucket.create(_name_of(number), data)
        except AlreadyThere:
            if self._bucket.read(_name_of(number)) != data:  # else the answer to it was lost
                raise ResumeRefused(
                    f"output: {self._bucket.address}/{_name_of(number)} is there already: another "
                    "batchclf is writing to this output; wait for it, or give another one"
                ) from None
        self._note(number, data)

    def _send(self, path: Path) -> None:
        if (data := read_bytes(path)) is not None:
            self._bucket.write(path.name, data)

    # ---- after the run ---------------------------------------------------------------------------

    def finish(self) -> None:
        """Send all that is left of a complete job; the bucket says that it is, too, then.

        Nothing of it stays in the folder, but for what tells who holds that.

        Raises:
            ResumeRefused, EnvironmentFailed: as `push`.
        """
        record = read_run(self._files)
        # It may have been complete.
        if record is not None and read_bytes(self._files.run) != self._pulled_run:
            self._send_rest(record)
        self._empty_folder()

    def _send_rest(self, record: RunRecord) -> None:
        files = self._files
        has_begun = self._begin(record, is_over=True)
        assert has_begun, "a complete job has its listing"
        if len(record.retries) == self._num_retries:
            self._send_parts(record.durable.num_bytes)
        else:
            self._rewrite_parts()
        self._bucket.write(files.predictions.name, files.predictions)
        self._send(files.stats)
        self._send(files.run)

    def _empty_folder(self) -> None:
        with suppress(OSError):  # what stays is overwritten by the next run
            for path in [*self._files.folder.iterdir()]:
                if path not in (self._files.lock, self._files.lease):
                    path.unlink()

    def _rewrite_parts(self) -> None:
        """Put the records of a retry into the parts as well."""
        with self._files.predictions.open("rb") as file:
            for number, num_images in sorted(self._parts.items()):
                lines = islice(file, num_images)
                self._bucket.write(_name_of(number), b"".join(lines))


def _name_of(part: int) -> str:
    return f"parts/{part:08d}.jsonl"
