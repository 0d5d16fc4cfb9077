"""What the records of a job depend on: the same for all of its shards and all of its runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A part of a file of ours: unknown keys are those of another version."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class Fingerprint(Identity):
    """An identity, and the part of a listing that the records are of."""

    listing: Extent
    num_images: int
    """Of the shard."""
