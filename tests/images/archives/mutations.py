"""Damaged archives, the same ones for the same seed: each is listed, and what it lists is read.

    python -m tests.images.archives.mutations [--seed 0] [--first 0] [--number 2000]

Prints what became of how many members, as JSON, and before each archive its name, so that the last
line of a crash tells which it was.
"""

import argparse
import importlib.util
import io
import json
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

from batchclf.errors import UsageError
from batchclf.images.archives import passage
from batchclf.system.machine import peak_rss_mb
from tests.images.archives.common import as_tar, as_zip, look, photo
from tests.images.mutations import mutated

FILES = {b"%sa/%d.jpg" % (b"folder" * (n % 4), n): photo(n, 300 * n) for n in range(8)}
FILES |= {b"0.cls": b"3", b"x" * 120 + b".jpg": b"long", "é.jpg".encode(): b"odd"}


def write_originals(folder: Path) -> list[Path]:
    """One archive of each kind."""
    contents = {
        "a.tar": as_tar(FILES),
        "a.tgz": as_tar(FILES, "w:gz"),
        "a.txz": as_tar(FILES, "w:xz"),
        "a.tbz": as_tar(FILES, "w:bz2"),
        "stored.zip": as_zip(FILES, zipfile.ZIP_STORED),
        "deflated.zip": as_zip(FILES),
        "lzma.zip": as_zip(FILES, zipfile.ZIP_LZMA),
        "bzip2.zip": as_zip(FILES, zipfile.ZIP_BZIP2),
    }
    if importlib.util.find_spec("pyarrow"):
        contents |= {"snappy.parquet": _parquet("snappy"), "plain.parquet": _parquet("none")}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def _parquet(compression: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": content, "path": name.decode()} for name, content in FILES.items()]
    buffer = io.BytesIO()
    table = pa.table({"image": rows, "label": list(range(len(rows)))})
    pq.write_table(table, buffer, row_group_size=4, compression=compression)
    return buffer.getvalue()


def main() -> None:
    """List and read damaged archives."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("--seed", 0), ("--first", 0), ("--number", 2000)):
        parser.add_argument(name, type=int, default=default)
    asked = parser.parse_args()
    outcomes: Counter[str] = Counter()
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        originals = write_originals(folder)
        for title, content in mutated(asked.seed, asked.number, originals, asked.first):
            print(title, flush=True)
            path = folder / f"damaged{Path(title).suffix}"
            path.write_bytes(content)
            started = time.process_time()
            outcomes.update(_outcomes(path))
            slowest = max(slowest, (time.process_time() - started, title))
            passage._cursors.clear()
    cpu_s, slow_name = slowest
    figures = {"outcomes": outcomes, "slowest": slow_name, "its_cpu_s": cpu_s}
    print(json.dumps({**figures, "peak_rss_mb": round(peak_rss_mb())}))


def _outcomes(path: Path) -> Counter[str]:
    try:
        found = look(path)
    except UsageError:  # of Parquet: a column that is not there
        return Counter({"refused": 1})
    return Counter(one if isinstance(one, str) else "bytes" for _, one in found.images)


if __name__ == "__main__":
    main()
