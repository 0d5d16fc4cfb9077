"""What was measured of a session once, kept in the cache for all later starts."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

import orjson

from batchclf.models.bundle import cache_folder, digest_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kept = TypeVar("Kept", bound="DataclassInstance")


def remembered(
    folder: str, key: object, kind: type[Kept], measure: Callable[[], Kept]
) -> tuple[Kept, bool]:
    """What `measure` returned once for this key, and whether that was earlier.

    Args:
        folder: of the cache, for what is of this kind.
        key: all that the answer depends on; as of `digest_of`.
        kind: a dataclass of plain values, as which the answer is read.
    """
    path = cache_folder().parent / folder / f"{digest_of(key)[:24]}.json"
    with suppress(OSError, ValueError, TypeError):  # none yet, or of another version
        return kind(**orjson.loads(path.read_bytes())), True
    found = measure()
    temporary = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # a cache that can only be read: the next run measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(orjson.dumps(asdict(found)))
        os.replace(temporary, path)
    return found, False
