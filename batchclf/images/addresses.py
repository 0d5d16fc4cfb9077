"""Addresses: which server or bucket they name, and what lies there."""

import os
import re
from dataclasses import dataclass
from typing import Literal, Protocol

from batchclf.errors import EnvironmentFailed, UsageError
from batchclf.images import buckets
from batchclf.images.attempts import OPENING_S, Content, Patience, Refused, insist
from batchclf.images.buckets import Bucket
from batchclf.images.globs import selects
from batchclf.images.room import Claim
from batchclf.images.web import WebFile
from batchclf.spec.input import BUCKETS

OPENING = Patience.within(2 * OPENING_S)
_ADVICE = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL for a server "
    "that is not Amazon's, AWS_SKIP_SIGNATURE=true for a public bucket; for those of a profile: "
    'eval "$(aws configure export-credentials --format env)"',
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true "
    "for a public container",
}


class RemoteFile(Protocol):
    """One file of another machine, whether it is there or not."""

    def get(self, span: tuple[int, int], tag: str | None = None) -> Content:
        """Its bytes from the first number of `span` up to the second, or to its end.

        Raises:
            Refused: they are not to be had, or not with this `tag` any more.
        """

    def get_up_to(self, max_bytes: int, claim: Claim) -> Content:
        """All of it, unless it is larger; its bytes are claimed before they are taken.

        Raises:
            Refused: it is not to be had.
            NoRoom: as `claim`.
        """


@dataclass(frozen=True, slots=True)
class Address:
    """An address in its parts, as it is written: nothing in it is decoded."""

    scheme: str
    name: str
    """Of the bucket, the container or the server."""
    key: str
    """What comes behind that, without the slash."""

    @property
    def server(self) -> str:
        """The address of what holds it: a bucket, a container or a server."""
        return f"{self.scheme}://{self.name}"

    @property
    def is_bucket(self) -> bool:
        """Whether what lies there can be listed."""
        return self.scheme in BUCKETS


def split_address(address: str) -> Address:
    """The parts of an address."""
    scheme, _, rest = address.partition("://")
    name, _, key = rest.partition("/")
    return Address(scheme.lower(), name, key)


def split_address_glob(address: str) -> tuple[str, tuple[str, ...]]:
    """The folder above the first name with a wildcard, and the names from there on.

    In the address of a web server nothing is a wildcard: `?` begins a query there.
    """
    root, *names = address.rstrip("/").split("/")
    if not split_address(address).is_bucket:
        return address, ()
    first = next((i for i, name in enumerate(names) if re.search(r"[*?\[{]", name)), len(names))
    return "/".join([root, *names[:first]]), tuple(names[first:])


def would_hold(place: str, address: str) -> bool:
    """Whether the listing of a folder or a glob of a bucket would hold a file at an address."""
    root, names = split_address_glob(place)
    if not address.startswith(f"{root}/"):
        return False
    return not names or selects(names)(os.fsencode(address.removeprefix(f"{root}/")))


def split_file(address: str) -> tuple[str, str]:
    """The folder that a file lies in, and its name, with the query behind it."""
    path, question, query = address.partition("?")
    folder, _, name = path.rpartition("/")
    return folder, name + question + query


def bucket_at(address: str, patience: Patience) -> Bucket:
    """The bucket that an address names.

    Raises:
        UsageError: the library is not installed, or the environment lacks something.
    """
    parts = split_address(address)
    return buckets.open_bucket(parts.scheme, parts.name, patience)


def file_at(address: str, patience: Patience) -> RemoteFile:
    """The file that an address names.

    Raises:
        UsageError: the library is not installed, or the environment lacks something.
    """
    parts = split_address(address)
    if parts.is_bucket:
        return bucket_at(address, patience).file(parts.key)
    return WebFile(address, patience)


def kind_at(address: str) -> Literal["folder", "file", "nothing"]:
    """What lies at an address; `folder`: objects whose keys go on behind it and a slash.

    Raises:
        UsageError: the library is not installed, or no file can be meant.
        EnvironmentFailed: the server refuses to tell, or does not answer.
    """
    parts = split_address(address)
    if not (parts.is_bucket or parts.key):
        raise UsageError(f"input: {address}: names a server; give the address of a file on it")
    try:
        if parts.is_bucket:
            return _kind_in(bucket_at(address, OPENING), parts.key)
        insist(lambda: WebFile(address, OPENING).get((0, 1)), OPENING_S)
    except Refused as refused:
        if not parts.is_bucket and refused.code in ("vanished", "changed"):
            return "nothing" if refused.code == "vanished" else "file"
        raise unreadable(address, refused) from refused
    return "file"


def _kind_in(bucket: Bucket, key: str) -> Literal["folder", "file", "nothing"]:
    refused = None
    folder = key.rstrip("/")
    if folder == key != "":
        try:
            if insist(lambda: bucket.size_of(key), OPENING_S):
                return "file"
        except Refused as error:
            # S3 says neither why, nor whether it is there where listing is forbidden.
            if error.may_pass:
                raise
            refused = error
    if any(insist(lambda: next(bucket.pages(folder, None, 1), []), OPENING_S)):
        return "folder"
    if folder != key or not key:
        return "nothing"
    if refused is None:
        return "file"  # without content
    if refused.code != "vanished":
        raise refused
    return "nothing"


def unreadable(address: str, refused: Refused) -> EnvironmentFailed | UsageError:
    """The error for a place of which nothing is to be had."""
    if refused.code == "bad_name":
        return UsageError(
            f"input: {address}: {refused}; rename that object, or give what lies beside it as a "
            "list of inputs"
        )
    if refused.code == "no_parts":
        return UsageError(f"input: {address}: {refused}, as archives are read; download it first")
    advice = "is the address right, and the network up?"
    scheme = split_address(address).scheme
    if scheme in _ADVICE:
        advice += f" The environment says how to open it: {_ADVICE[scheme]}."
    return EnvironmentFailed(
        f"input: {address}: cannot be read: {refused}; {advice} The same command goes on"
    )
