"""How a list writes its paths: found from its first lines, by what of them is there.

People's lists are made by shells, spreadsheets, Windows and earlier jobs. Of all the ways to read
the first lines, the simplest one that finds the most files is that of the whole list, so that no
further line has to be looked up.
"""

import base64
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Final, Literal

import orjson

from batchclf.errors import UsageError
from batchclf.spec.input import SCHEMES, is_address, path_named_by, reveals_secret

NormalForm = Literal["NFC", "NFD"]
Exists = Callable[[bytes], bool]
_FORMS: Final[tuple[NormalForm, ...]] = ("NFC", "NFD")


def _without_quotes(path: bytes) -> bytes:
    is_quoted = len(path) > 1 and path[:1] == path[-1:] and path[:1] in (b'"', b"'")
    return path[1:-1] if is_quoted else path


def _from_windows_1252(path: bytes) -> bytes:
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        return path.decode("cp1252", "replace").encode("utf-8")
    return path


_REPAIRS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "blanks around its paths are left out": lambda path: path.strip(b" \t"),
    "quotes around its paths are left out": _without_quotes,
    "it is read as Windows-1252 text": _from_windows_1252,
    "`\\` in its paths is read as `/`": lambda path: path.replace(b"\\", b"/"),
}
"""What is done to a path as it is written, by what is said of that; in this order."""


_FAR: Final = re.compile(rb"(?i)(%s)://" % "|".join(SCHEMES).encode())


def is_far(path: bytes) -> bool:
    """Whether a path is the address of another machine's file."""
    return _FAR.match(path) is not None


def _without_scheme(path: bytes, where: str) -> bytes:
    """A path, or the address of another machine's file, as it is; what `file://` names.

    Raises:
        UsageError: nothing reads such an address.
    """
    if b"://" not in path or is_far(path) or not is_address(address := os.fsdecode(path)):
        return path
    if (named := path_named_by(address)) is not None:
        return os.fsencode(named)
    scheme = address.partition("://")[0]
    raise UsageError(
        f"{where}: found an address that begins with {scheme}://; a list has paths, file:/// and "
        f"a path, or addresses: {', '.join(f'{one}://' for one in SCHEMES)}"
    )


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a list writes its paths, as plain data."""

    root: bytes
    """The folder that they are relative to."""
    encoding: str | None = None
    """None: the bytes of file names, one path a line."""
    is_json: bool = False
    """Whether a line is a JSON text, or an object with `path`."""
    repairs: tuple[str, ...] = ()
    """Keys of _REPAIRS."""
    form: NormalForm | None = None
    """Unicode's normal form of the names on disk, where the list has the other one."""

    @property
    def is_usual(self) -> bool:
        """Whether paths are what the lines say, up to the folder they are relative to."""
        return not self.repairs and self.form is None

    def path_in(self, line: bytes, where: str) -> bytes:
        """The path in a line, whose end is cut off; `where`: the line, for messages.

        Raises:
            UsageError: it holds none that could be one of a file.
        """
        path = _json_path(line, where) if self.is_json else line
        for repair in self.repairs:
            path = _REPAIRS[repair](path)
        if b"\0" in path and not self.is_json:
            raise UsageError(
                f"{where}: found a NUL byte; save the list as UTF-8 text with one path a line "
                "(`tr '\\0' '\\n'` makes one of what `find -print0` printed)"
            )
        path = _without_scheme(path, where)
        if not path or b"\0" in path:
            raise UsageError(f"{where}: found no usable path: {path[:80]!r}")
        if is_far(path) and reveals_secret(text := os.fsdecode(path)):
            shown = re.split(r"[?#]", text)[0].rpartition("@")[2]
            raise UsageError(
                f"{where}: the address of {shown!r} holds a password or a signature, which the "
                "records would tell; list addresses without"
            )
        return path

    def locate(self, path: bytes) -> bytes:
        """Where the file lies that a path of the list names; an address says so itself."""
        if is_far(path):
            return path
        if self.form is not None:
            path = os.fsencode(unicodedata.normalize(self.form, os.fsdecode(path)))
        return os.path.join(self.root, path)

    def is_comment(self, line: bytes, path: bytes, exists: Exists) -> bool:
        """Whether a line is none with a path: it begins with `#`, and no such file is there."""
        is_marked = not self.is_json and line.lstrip().startswith(b"#")
        return is_marked and not exists(self.locate(path))

    def remarks(self) -> Iterator[str]:
        """What of it a user should know, in words."""
        if not self.is_usual:
            yield from self.repairs
        if self.form is not None:
            yield f"its names are looked for in Unicode's normal form {self.form}"


def find_dialect(
    head: Sequence[bytes], roots: Sequence[bytes], encoding: str | None, is_json: bool | None
) -> Dialect:
    """The simplest dialect in which the most of a list's first lines name something that is there.

    `roots`: the folders that the paths may be relative to, the likeliest first; `is_json`: None
    where the lines say it.
    """
    exists = cache(lambda path: is_far(path) or os.path.lexists(path))
    best, most = Dialect(roots[0], encoding, bool(is_json)), -1
    for kind in _kinds(head) if is_json is None else (is_json,):
        for plain in _dialects(head, Dialect(roots[0], encoding, kind), roots, exists):
            paths = _paths_in(head, plain, exists)
            num_found = sum(exists(plain.locate(path)) for path in paths)
            if num_found > most:
                best, most = plain, num_found
            if num_found == len(paths):
                return best
    return best


def _kinds(head: Sequence[bytes]) -> tuple[bool, ...]:
    """Whether lines are JSON, as far as they say it: a text in quotes may be a path as well."""
    try:
        for line in head:
            _json_path(line, "")
    except UsageError:
        return (False,)
    return (True,) if head and head[0].lstrip().startswith(b"{") else (False, True)


def _dialects(
    head: Sequence[bytes], plain: Dialect, roots: Sequence[bytes], exists: Exists
) -> Iterator[Dialect]:
    """All that could make a difference to these lines, simpler ones first."""
    paths = _paths_in(head, plain, exists)
    useful = []
    for name, repair in _REPAIRS.items():
        repaired = [repair(path) for path in paths]
        if repaired != paths:
            useful.append(name)
        paths = repaired
    texts = [os.fsdecode(path) for path in paths]
    forms = [
        form for form in _FORMS if any(unicodedata.normalize(form, text) != text for text in texts)
    ]
    for num_repairs, form in product(range(len(useful) + 1), (None, *forms)):
        for repairs, root in product(combinations(useful, num_repairs), roots):
            yield Dialect(root, plain.encoding, plain.is_json, repairs, form)


def _paths_in(head: Sequence[bytes], dialect: Dialect, exists: Exists) -> list[bytes]:
    """The paths in the first lines, up to one without a usable path: who reads the list tells."""
    paths = []
    for line in head:
        try:
            path = dialect.path_in(line, "")
        except UsageError:
            break
        if not dialect.is_comment(line, path, exists):
            paths.append(path)
    return paths


def _json_path(line: bytes, where: str) -> bytes:
    """The path in one line: a JSON string, or an object with `path` (and `path_b64`)."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if b'"path_b64"' not in line:
            raise UsageError(f"{where}: not a line of JSON: {error}") from None
        # A name that is not UTF-8 is written with escapes that strict parsers refuse.
        match = re.search(rb'"path_b64":\s*"([^"]*)"', line)
        value = {"path_b64": match[1].decode("ascii", "replace") if match else ""}
    if isinstance(value, dict) and isinstance(value.get("path_b64"), str):
        try:
            return base64.b64decode(value["path_b64"], validate=True)
        except ValueError:  # not base64, or not even ASCII
            raise UsageError(f"{where}: `path_b64` is not base64") from None
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise UsageError(
            f'{where}: found no path; write {{"path": "cats/1.jpg"}} or "cats/1.jpg", one a line'
        )
    return os.fsencode(path)
