"""What the records of a job depend on: the same for all of its shards and all of its runs."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar, cast

from pydantic import TypeAdapter

_Kind = TypeVar("_Kind")


class Strict:
    """A part of a file of ours, as a dataclass: unknown keys are those of another version."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}


def as_written(kind: type[_Kind], value: object) -> _Kind:
    """What a file's JSON says, as the dataclass that was written there.

    Raises:
        ValidationError: a key is missing, unknown, or of another type.
    """
    found: _Kind = _adapter(cast(Hashable, kind)).validate_python(value)
    return found


@cache  # making one takes milliseconds, so it is made once, and where a file is read
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@dataclass(frozen=True, kw_only=True)
class Identity(Strict):
    """What the records of a job depend on, and all of its shards must have in common."""

    recipe: Mapping[str, int]
    """Versions of what decides how pixels and records come to be."""
    model: str
    """Digest of the bundle."""
    preprocess: Mapping[str, Any]
    labels: str
    """Their digest."""
    top_k: int
    precision: str
    converted: str | None
    """Digest of the model at that precision, where it was exported with the bundle."""
    input: str
    limit: int | None
    allow_outside_links: bool
    """As it was when the input was listed; later runs may follow more links, or fewer."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The first `num_images` paths of a listing, and the SHA-256 of these with their NULs."""

    num_images: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Fingerprint(Identity):
    """An identity, and the part of a listing that the records are of."""

    listing: Extent
    num_images: int
    """Of the shard."""
