"""Formats that other packages decode, where they are installed: HEIC, JPEG XL and camera raw.

They are imported for the first such file, since hardly any job has one.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final, NamedTuple

from batchclf.images.formats import converter_of


class Extra(NamedTuple):
    """What reads a format."""

    name: str
    """The extra of batchclf that installs it."""
    package: str


EXTRAS: Final[Mapping[str, Extra]] = {
    "HEIC": Extra("heif", "pillow-heif"),
    "JPEG XL": Extra("jxl", "pillow-jxl-plugin"),
    "camera raw": Extra("raw", "rawpy"),
}


def advice(format_: str) -> str:
    """What to do about a file that is not decoded here."""
    convert = f"convert it, for example with {converter_of(format_)}"
    extra = EXTRAS.get(format_)
    return f"pip install 'batchclf[{extra.name}]' reads it, or {convert}" if extra else convert


def installed_readers() -> Mapping[str, str]:
    """The packages that are installed, with their versions."""
    found = {}
    for extra in EXTRAS.values():
        try:
            found[extra.package] = version(extra.package)
        except PackageNotFoundError:
            continue
    return found
