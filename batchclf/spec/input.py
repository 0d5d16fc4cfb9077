"""The job's `input`: a path or an address, a list of these, or the rows of Parquet files."""

import json
import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, unquote_to_bytes

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

SCHEMES = ("s3", "gs", "az", "https", "http")
"""How the addresses begin that are read from elsewhere."""
BUCKETS = SCHEMES[:3]
"""And of those, to which can be written."""
STDIN = "-"
"""The input that is a list on stdin; a file of this name is `./-`."""
_SECRETS = re.compile(
    r"(?i)(^|[&;?#])([\w.~\[-]*[-_.\[])?"
    r"(sig|signature|hmac|policy|credentials?|[a-z]*token|jwt|o?auth|authorization|[a-z]*secret|"
    r"(api|auth|access|account|private|secret|shared|subscription)?key|awsaccesskeyid|key-pair-id|"
    r"pass|pwd|passwd|[a-z]*password|passcode|passphrase)\]?="
)
"""In queries; what signed addresses of Amazon, Google, Azure and CloudFront hold, and the like."""
MAX_INPUTS = 10_000
TAGS = ("(place)", "(places)", "(parquet)")
"""Which form an input has, as validation names it; no key that a user wrote."""
Place = Path | str
"""A path of this machine, or the address (`s3://bucket/photos`) of another."""


def is_address(value: str) -> bool:
    """Whether a text is an address, such as s3://bucket/photos, rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) is not None


def reveals_secret(address: str) -> bool:
    """Whether an address holds a password, or the signature of one that was signed beforehand."""
    server, _, rest = address.partition("://")[2].partition("/")
    query = re.search(r"[?#].*", rest, re.DOTALL)
    return "@" in server or (query is not None and _SECRETS.search(unquote(query[0])) is not None)


def path_named_by(address: str) -> str | None:
    """The path of this machine that a `file://` address names; None: it is none such."""
    scheme, _, rest = address.partition("://")
    host, slash, name = rest.partition("/")
    if scheme.lower() != "file" or host.lower() not in ("", "localhost") or not slash:
        return None
    return "/" + os.fsdecode(unquote_to_bytes(os.fsencode(name)))


def can_name_a_file(value: str) -> bool:
    """Whether a text can be turned into the bytes of a path."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def as_path(value: object) -> object:
    """A path as text, as a Path."""
    if isinstance(value, Path) or (isinstance(value, str) and value and can_name_a_file(value)):
        return Path(value)
    raise PydanticCustomError("path", "a path, as text")


_SECRET = PydanticCustomError(
    "secret",
    "an address without a password or a signature, which run.json would tell; the environment "
    "says how to open it",
)


def _as_place(value: object) -> object:
    if (place := _as_path_or_address(value, SCHEMES)) is not None:
        return place
    raise PydanticCustomError(
        "address", "a path, or the address of a bucket or server: s3://, gs://, az:// or https://"
    )


def _as_output(value: object) -> object:
    if (place := _as_path_or_address(value, BUCKETS)) is not None:
        return place
    raise PydanticCustomError("bucket", "a path, or an address in a bucket: s3://, gs:// or az://")


def _as_path_or_address(value: object, schemes: tuple[str, ...]) -> object:
    """None: an address of none of these schemes."""
    if not isinstance(value, str) or not is_address(value):
        return as_path(value)
    if (path := path_named_by(value)) is not None:
        return as_path(path)
    if reveals_secret(value):
        raise _SECRET
    return value if _is_of(value, schemes) else None


def _is_of(address: str, schemes: tuple[str, ...]) -> bool:
    scheme, _, rest = address.partition("://")
    return scheme in schemes and bool(rest.strip("/")) and address.isprintable()


def _as_places(value: object) -> object:
    """Several, also where one is given."""
    places = tuple(value) if isinstance(value, list | tuple) else (value,)
    if 1 <= len(places) <= MAX_INPUTS:
        return places
    raise PydanticCustomError("places", "from one path to {most}", {"most": f"{MAX_INPUTS:,}"})


def _form(value: object) -> str:
    if isinstance(value, dict | ParquetSpec):
        return "(parquet)"
    return "(places)" if isinstance(value, list | tuple) else "(place)"


def _place_schema(schemes: tuple[str, ...]) -> dict[str, JsonValue]:
    """A path, or an address of one of these schemes or of a file."""
    known = f"({'|'.join(schemes)}|[Ff][Ii][Ll][Ee])://"
    return {
        "type": "string",
        "minLength": 1,
        "pattern": f"^({known}|(?![A-Za-z][A-Za-z0-9+.\\-]*://))",
    }


_PLACE_SCHEMA = _place_schema(SCHEMES)
_Place = Annotated[Path | str, BeforeValidator(_as_place), WithJsonSchema(_PLACE_SCHEMA)]
OutputSpec = Annotated[
    Path | str, BeforeValidator(_as_output), WithJsonSchema(_place_schema(BUCKETS))
]
_SEVERAL_SCHEMA: dict[str, JsonValue] = {
    "type": "array",
    "items": _PLACE_SCHEMA,
    "minItems": 1,
    "maxItems": MAX_INPUTS,
}
_Places = Annotated[tuple[_Place, ...], BeforeValidator(_as_places)]
_Name = Annotated[str, Field(min_length=1)]


class ParquetSpec(BaseModel):
    """Rows of Parquet files, with an image in each."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    parquet: Annotated[_Places, WithJsonSchema({"anyOf": [_PLACE_SCHEMA, _SEVERAL_SCHEMA]})] = (
        Field(description="A .parquet file, a folder of these, a glob, or a list of any.")
    )
    column: _Name | None = Field(
        None,
        description="The column with the images: binary, or a struct of `bytes` and `path`; "
        "default: the only such column.",
    )
    id: _Name | None = Field(
        None, description="The column with the path of each record; default: the image's own path."
    )


InputSpec = Annotated[
    Annotated[_Place, Tag("(place)")]
    | Annotated[_Places, WithJsonSchema(_SEVERAL_SCHEMA), Tag("(places)")]
    | Annotated[ParquetSpec, Tag("(parquet)")],
    Discriminator(_form),
]


def places_of(given: Place | tuple[Place, ...] | ParquetSpec) -> tuple[Place, ...]:
    """Each place that an input names."""
    if isinstance(given, ParquetSpec):
        return given.parquet
    return given if isinstance(given, tuple) else (given,)


def with_places(
    given: Place | tuple[Place, ...] | ParquetSpec, places: tuple[Place, ...]
) -> Place | tuple[Place, ...] | ParquetSpec:
    """The same form of input with other places."""
    if isinstance(given, ParquetSpec):
        return given.model_copy(update={"parquet": places})
    return places if isinstance(given, tuple) else places[0]


def as_text(given: Place | tuple[Place, ...] | ParquetSpec) -> str:
    """An input as messages and the run record say it: a single one is just its path."""
    if isinstance(given, ParquetSpec):
        return json.dumps(given.model_dump(mode="json"))
    texts = [os.fspath(place) for place in places_of(given)]
    return json.dumps(texts) if isinstance(given, tuple) else texts[0]


def shown(given: Place | tuple[Place, ...] | ParquetSpec) -> str:
    """An input in words."""
    return ", ".join(map(str, places_of(given)))
