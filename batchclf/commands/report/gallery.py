"""Which images a report shows, and their pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from batchclf.commands.report.digest import Digest, Example, Kind
from batchclf.errors import BatchclfError
from batchclf.images.source import source_of
from batchclf.images.thumbnails import Limits, thumbnails
from batchclf.results.output import Output
from batchclf.results.records import Failure
from batchclf.spec.job import recorded_job
from batchclf.system.words import images

MAX_CARDS = 240
MAX_BYTES = 4_000_000
"""Of all pictures together; in the page they take a third more."""
MAX_SECONDS = 60.0


@dataclass(slots=True)
class Card:
    """One image that is shown: its record, and its picture where there is one."""

    example: Example
    kinds: list[Kind] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pictures:
    """JPEGs of images, by their number in the listing, and what is missing."""

    jpegs: Mapping[int, bytes]
    why_missing: str | None = None


def choose(digest: Digest, max_cards: int = MAX_CARDS) -> list[Card]:
    """The images to show, what most deserves a look first; each once."""
    found: dict[int, Card] = {}
    for kind, example in digest.examples():
        number = example.ref.index
        if number not in found:
            if len(found) == max_cards:
                continue
            found[number] = Card(example)
        found[number].kinds.append(kind)
    return list(found.values())


def pictures_of(output: Output, cards: Sequence[Card]) -> Pictures:
    """Pictures of those images that have a prediction, as far as they are to be had.

    What cannot be had is said in the page: a report is worth writing where the images are not.
    """
    refs = sorted(
        (card.example.ref for card in cards if card.example.line["status"] == "ok"),
        key=lambda ref: ref.index,  # archives are read in passing
    )
    jpegs: dict[int, bytes] = {}
    failed: list[Failure] = []
    job = recorded_job(output.record.job)
    limits = Limits(MAX_BYTES, MAX_SECONDS)
    if not refs:
        return Pictures(jpegs)
    try:
        for ref, found in thumbnails(job, source_of(job), refs, limits):
            if isinstance(found, bytes):
                jpegs[ref.index] = found
            else:
                failed.append(found)
    except BatchclfError as error:
        return Pictures(jpegs, f"The images cannot be read here. {error}")
    pictures = Pictures(jpegs)
    if failed:
        why = f"{images(len(failed))} cannot be read any more: {failed[0].message}."
        return replace(pictures, why_missing=why)
    if len(jpegs) < len(refs):
        why = (
            f"Pictures of {images(len(refs) - len(jpegs))} are left out: all may take "
            f"{MAX_BYTES // 10**6} MB and {MAX_SECONDS:.0f} s."
        )
        return replace(pictures, why_missing=why)
    return pictures
