"""Damaged images, the same ones for the same seed: real files cut, flipped, swapped and spliced.

    python -m tests.images.mutations [--seed 0] [--first 0] [--number 20000] [--save FOLDER]

decodes them, each with other settings than the one before, has our own parsers of containers read
them, and prints what became of how many, as JSON; before each one its name, so that the last line
of a crash tells which it was. With `--save`
it writes them instead.
"""

import argparse
import itertools
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from batchclf.images import failures, formats, jpeg, profile, tiff
from batchclf.images.decode import Decoder
from batchclf.images.formats import DECODED, content_format
from batchclf.results.records import DecodeMode, Preprocess
from batchclf.system.machine import peak_rss_mb
from tests.conftest import ODD_IMAGES, ROOT

MAX_ORIGINAL_BYTES = 2**20
"""Larger files would only take longer to damage and to decode."""
NUM_HEADER_BYTES = 600
"""Where most of a format's fields lie, and half of the damage goes."""
EXTREMES = tuple(
    value.to_bytes(width, order)
    for value, width in (
        *((0, 2), (2**15, 2), (2**16 - 1, 2)),
        *((0, 4), (1, 4), (30_000, 4), (2**31 - 1, 4), (2**31, 4), (2**32 - 1, 4)),
    )
    for order in ("little", "big")
)
"""Numbers at which fields overflow."""


def originals() -> list[Path]:
    """Files of the formats decoded, in a fixed order: the odd images, or else the samples."""
    folder = ODD_IMAGES if ODD_IMAGES.is_dir() else ROOT / "samples"
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.stat().st_size <= MAX_ORIGINAL_BYTES
        and content_format(path.read_bytes()) in DECODED
    ]


def mutated(
    seed: int, number: int, files: Sequence[Path], first: int = 0
) -> Iterator[tuple[str, bytes]]:
    """`number` damaged files from the `first` on: each one's name, with its suffix, and content.

    The i-th depends on `seed`, i and `files` alone, so that work can be divided.
    """
    for index in range(first, first + number):
        rng = random.Random(f"{seed}/{index}")
        original = rng.choice(files)
        content = bytearray(original.read_bytes())
        kinds = rng.choices(DAMAGES, k=rng.choice((1, 1, 1, 2, 3)))
        for kind in kinds:
            kind(rng, content, files)
        damage = "_".join(kind.__name__.strip("_") for kind in kinds)
        yield f"{index:06d}_{original.stem[:40]}_{damage}{original.suffix}", bytes(content)


# ---- ways to damage ------------------------------------------------------------------------------


def _flips(rng: random.Random, content: bytearray, files: Sequence[Path]) -> None:
    for _ in range(rng.randint(1, 12)):
        if content:
            content[_place(rng, content)] = rng.choice((0, 0xFF, rng.randrange(256)))


def _extremes(rng: random.Random, content: bytearray, files: Sequence[Path]) -> None:
    for _ in range(rng.randint(1, 3)):
        at, field = _place(rng, content), rng.choice(EXTREMES)
        content[at : at + len(field)] = field


def _cut(rng: random.Random, content: bytearray, files: Sequence[Path]) -> None:
    del content[_place(rng, content) :]


def _head(rng: random.Random, content: bytearray, files: Sequence[Path]) -> None:
    """The start of another file in place of one's own."""
    num_bytes = rng.choice((2, 4, 8, 16, 32, 64, 256, 1024))
    content[:num_bytes] = _block(rng, files, num_bytes, at_start=True)


def _splice(rng: random.Random, content: bytearray, files: Sequence[Path]) -> None:
    """A block of some file, inserted or written over one's own."""
    block = _block(rng, files, rng.choice((4, 16, 64, 512, 4096)), at_start=rng.random() < 0.3)
    at = _place(rng, content)
    content[at : at + rng.choice((0, len(block)))] = block


def _hole(rng: random.Random, content: bytearray, files: Sequence[Path]) -> None:
    """Zeros, as a disk that failed leaves them."""
    at = _place(rng, content)
    num_bytes = min(rng.choice((16, 512, 4096, 65536)), len(content) - at)
    content[at : at + num_bytes] = bytes(num_bytes)


def _loss(rng: random.Random, content: bytearray, files: Sequence[Path]) -> None:
    at = _place(rng, content)
    del content[at : at + rng.choice((1, 2, 4, 64, 512))]


def _repeat(rng: random.Random, content: bytearray, files: Sequence[Path]) -> None:
    at = _place(rng, content)
    block = content[at : at + rng.choice((8, 64, 1024))]
    content[at:at] = block * rng.choice((1, 2, 50))


_Damage = Callable[[random.Random, bytearray, Sequence[Path]], None]
DAMAGES: tuple[_Damage, ...] = (
    _flips,
    _flips,
    _extremes,
    _extremes,
    _cut,
    _head,
    _splice,
    _hole,
    _loss,
    _repeat,
)


def _place(rng: random.Random, content: bytearray) -> int:
    last = max(len(content) - 1, 0)
    return rng.randint(0, min(last, NUM_HEADER_BYTES) if rng.random() < 0.5 else last)


def _block(rng: random.Random, files: Sequence[Path], num_bytes: int, *, at_start: bool) -> bytes:
    content = rng.choice(files).read_bytes()
    at = 0 if at_start else rng.randint(0, len(content))
    return content[at : at + num_bytes]


# ---- the command ---------------------------------------------------------------------------------

SMALL = Preprocess(64, (56, 60), "bilinear", None, None)
DECODE_MODES: tuple[DecodeMode, ...] = ("exact", "fast")
MAX_PIXELS = 20_000_000


def main() -> None:
    """Decode or save damaged images."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("--seed", 0), ("--first", 0), ("--number", 20_000)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    files = mutated(asked.seed, asked.number, originals(), asked.first)
    if asked.save is None:
        _decode(files)
        return
    asked.save.mkdir(parents=True, exist_ok=True)
    for name, content in files:
        (asked.save / name).write_bytes(content)


CONTAINERS = (*DECODED, None)


def read_containers(content: bytes) -> None:
    """Have each of our own parsers read it, whatever it is: none raises anything."""
    for format_ in CONTAINERS:
        formats.promised_bytes(content, format_)
    for parse in (
        formats.describe_stranger,
        formats.png_bits,
        formats.png_significant_bits,
        formats.avif_size,
        tiff.is_tiled_in_strips,
        tiff.unread_form,
        tiff.odd_pixels,
        jpeg.is_reducible,
        jpeg.bits_per_sample,
        profile.is_srgb,
        profile.profile_in_jpeg,
    ):
        parse(content)
    tiff.is_camera_raw(content, named_raw=True)


class _Unforeseen(logging.Handler):
    """Collects what the decoder logs: exceptions that may be faults of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


def _decode(files: Iterator[tuple[str, bytes]]) -> None:
    unforeseen = _Unforeseen()
    failures.LOGGER.addHandler(unforeseen)
    decoders = [
        Decoder(SMALL, mode, exif_transpose, MAX_PIXELS, strict)
        for mode in DECODE_MODES
        for exif_transpose in (False, True)
        for strict in (False, True)
    ]
    slot_HWC = np.zeros((*SMALL.crop, 3), np.uint8)
    codes: Counter[str] = Counter()
    slowest = (0.0, "")
    for decode, (name, content) in zip(itertools.cycle(decoders), files, strict=False):
        print(name, flush=True)
        started = time.process_time()
        loaded = decode(content, name.encode(), slot_HWC)
        slowest = max(slowest, (time.process_time() - started, name))
        read_containers(content)
        codes[loaded.failure.code if loaded.failure else "pixels"] += 1
    cpu_s, slow_name = slowest
    peak_mb = round(peak_rss_mb())
    figures = {"slowest": slow_name, "its_cpu_s": cpu_s, "peak_rss_mb": peak_mb}
    print(json.dumps({"codes": codes, **figures, "unforeseen": unforeseen.found}))


if __name__ == "__main__":
    main()
