"""An identity, a run record and a listing, as small as they get."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from batchclf.results.files import RunFiles
from batchclf.results.identity import Extent, Fingerprint, Identity
from batchclf.results.listing import Listing, drafted, place
from batchclf.results.records import ActiveProvider, Entry, Part
from batchclf.results.run_record import NOTHING_DURABLE, RunRecord

IDENTITY = Identity(
    recipe={"pixels": 1, "records": 1},
    model="aa",
    preprocess={"crop": [8, 8]},
    labels="bb",
    top_k=5,
    precision="fp32",
    converted=None,
    input="caf\udce9",  # a name that is not UTF-8
    limit=None,
    allow_outside_links=False,
)


def a_record(**changes: Any) -> RunRecord:
    """A run that has just begun."""
    record = RunRecord(
        job={},
        fingerprint=Fingerprint(**vars(IDENTITY), listing=Extent(1, "cc"), num_images=1),
        started_at="2026-01-01T00:00:00+00:00",
        num_images=1,
        num_left_out=0,
        model={"name": "tiny"},
        converted_model=None,
        num_streams=1,
        num_workers=1,
        backend="threads",
        jpeg_decoder="simplejpeg",
        resampler="native (plain)",
        batch_size=8,
        part=Part(2, "asked"),
        provider=ActiveProvider("cpu", "CPUExecutionProvider", "CPU", {"x": 1}, ("a b",)),
        precision="fp32",
        precision_check=None,
        decode="exact",
        versions={},
        durable=NOTHING_DURABLE,
        segments=(),
        format_version=1,
        status="running",
        ended_at=None,
        error=None,
        retry=None,
        retries=(),
    )
    return replace(record, **changes)


class Entries:
    """Paths to be listed, of an input with so many others; some with a location."""

    def __init__(
        self, paths: Sequence[bytes], num_left_out: int = 0, locations: Sequence[bytes] = ()
    ) -> None:
        self._entries = list(map(Entry, paths, locations or [b""] * len(paths)))
        self.num_left_out = num_left_out
        self.located = bool(locations)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def after(self, listed: Iterable[Entry]) -> Iterator[Entry]:
        known = list(listed)
        return iter(known + [one for one in self if one not in known])


def placed(files: RunFiles, paths: Sequence[bytes], locations: Sequence[bytes] = ()) -> Listing:
    """The listing of these paths, in its place, or the one that is there."""
    with drafted(files, IDENTITY, Entries(paths, locations=locations)) as draft:
        return place(files, draft)
