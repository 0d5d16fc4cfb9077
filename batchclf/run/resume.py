"""What of this very job is already written, and can be relied on."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from batchclf.errors import ResumeRefused
from batchclf.models.bundle import Bundle
from batchclf.models.resolve import Log
from batchclf.results.files import RunFiles
from batchclf.results.lines import Done, find_done
from batchclf.results.listing import Listing
from batchclf.results.parts import Committed, find_parts
from batchclf.results.run_record import RunRecord
from batchclf.results.writer import cut_surplus
from batchclf.system.words import images


@dataclass(frozen=True, slots=True)
class Kept:
    """The records that are there, and are to stay: a prefix of the shard."""

    done: Done
    """All of them."""
    parts: tuple[Committed, ...] = ()
    """The last of them, which are to be appended to the others."""

    @property
    def num_bytes(self) -> int:
        """Of those that stand in the file already."""
        return self.done.num_bytes - sum(part.num_bytes for part in self.parts)


def resume(files: RunFiles, record: RunRecord | None, listing: Listing, log: Log) -> Kept:
    """What is there of a shard.

    After a crash of the machine that is what was noted as durable: what lies behind it may be
    anything, even records of an earlier run. After a crash of a process it is every whole record.

    What stands after the last image's record is cut off. Parts that follow the records are counted
    in, whatever the engine is now.

    Raises:
        ResumeRefused: records that no run.json tells of.
        EnvironmentFailed: the records cannot be read, or cut.
    """
    if record is None:
        require_told(files)
        return Kept(Done())
    first, last = files.shard.bounds(listing.num_images)
    durable = record.durable
    # --retry-failed begins with all records, made durable, and puts others in their place at once.
    was_finished = record.status == "complete" or record.retry is not None
    is_whole = was_finished or durable.is_of_this_boot
    max_bytes = None if is_whole else durable.num_bytes
    done = find_done(files.predictions, listing.paths(first, last), max_bytes)
    if done.num_images < durable.num_images:
        log(
            f"{files.predictions}: {durable.num_images:,} records had been safe on disk, but "
            f"only {done.num_images:,} are there and whole; the others are made again"
        )
    parts: tuple[Committed, ...] = ()
    if done.num_images == last - first:
        if num_surplus := cut_surplus(files.predictions, done.num_bytes):
            log(
                f"{files.predictions}: {num_surplus:,} bytes stood after the record of the "
                "last image; they are cut off"
            )
    else:
        parts = tuple(_following(files, listing, first + done.num_images))
        for part in parts:
            done.num_bytes += part.num_bytes
            done.num_ok += part.num_ok
            done.errors_by_code += part.errors_by_code
        if done.num_images:
            log(f"resuming after {done.num_images:,} of {images(last - first)}")
    return Kept(done, parts)


def require_told(files: RunFiles) -> None:
    """Refuse records where there is no run.json.

    Raises:
        ResumeRefused: there are some.
    """
    for path in (files.predictions, files.parts):
        if os.path.exists(path):
            raise ResumeRefused(
                f"output: {path} is there, but no {files.run.name} says which job wrote it; "
                "give another output, or --overwrite"
            )


def _following(files: RunFiles, listing: Listing, position: int) -> Iterator[Committed]:
    """The parts from image `position` on, up to the first one that is not there."""
    for part in find_parts(files, listing, position):
        if part.first != position:
            return
        yield part
        position = part.stop


def require_same_converted(record: RunRecord | None, done: Done, bundle: Bundle) -> None:
    """Refuse to go on with another int8 or fp16 model than the one that wrote the first records.

    Raises:
        ResumeRefused: that one is gone, and images or ONNX Runtime changed since it was calibrated.
    """
    before = converted_digest(record)
    if done.num_images and before not in (None, bundle.digest):
        raise ResumeRefused(
            f"output: {done.num_images:,} records are of a converted model with digest "
            f"{str(before)[:12]}, which is no longer in the model cache. Made anew, its digest is "
            f"{bundle.digest[:12]}: ONNX Runtime or images of its calibration changed. "
            "--overwrite starts anew; `batchclf export` at this precision keeps a converted model"
        )


def converted_digest(record: RunRecord | None) -> str | None:
    """Of the int8 or fp16 model that an earlier run classified with; None: with no such model."""
    if record is None or record.converted_model is None:
        return None
    return str(record.converted_model["digest"])
