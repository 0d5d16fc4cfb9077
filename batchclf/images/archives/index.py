"""The members of one archive, held while it is listed: 250 bytes for each, names of 25 included.

Held, since only the whole archive tells which copy of a name is the last, what a hard link leads
to, and which label belongs to which image.
"""

from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from batchclf.images.archives.location import File, failed, located
from batchclf.images.archives.members import Damage, Found, LeftOut, Link, Member
from batchclf.images.archives.names import left_out_as, refused_name, tidy
from batchclf.images.archives.sides import key_of, may_hold_truth, side_kind, truth_in
from batchclf.images.formats import suffix_format
from batchclf.images.omissions import Omissions
from batchclf.results.records import Entry, Failure

MAX_DAMAGES = 5
"""Of those in one archive, that are told of."""
_FILE, _LINK, _SIDE, _TRUTH, _BEST_TRUTH = range(5)
"""Of a side file: that no label is in it, or one is; that in .cls goes before that in .json."""
_Digests = NDArray[np.bytes_]
"""16 bytes each, however long the name; two of a million are equal in one of 10^26 archives."""
_Numbers = NDArray[np.int64]
"""Of members, in the order in which they were found; -1: none."""


class Index:
    """What was found in one archive."""

    def __init__(self) -> None:
        self.left_out = Omissions()
        """Hidden ones, and what is no file; once its entries were asked for, all of them."""
        self.damages: list[Failure] = []
        self._kinds = bytearray()
        self._places = array("q")
        self._digests = bytearray()
        self._texts = bytearray()
        """Of each member its name and, behind a NUL, its fields, its target, or its fields, a NUL
        and its truth."""
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._kinds)

    def add(self, found: Found) -> None:
        """Take one up, unless it is to be left out."""
        if isinstance(found, Damage):
            self.damages.append(found.failure)
            return
        name = tidy(found.name)
        if isinstance(found, LeftOut):
            self.left_out.add("not regular", name)
        elif kind := left_out_as(name):
            self.left_out.add(kind, name)
        elif isinstance(found, Link):
            self._put(_LINK, name, found.place, tidy(found.target))
        elif name:
            self._put_member(name, found)

    def _put_member(self, name: bytes, member: Member) -> None:
        side = side_kind(name)
        if side is None:
            self._put(_FILE, name, member.place, member.fields)
            return
        truth = b""
        if may_hold_truth(side, member.size):
            content = member.content()
            truth = b"" if isinstance(content, Failure) else truth_in(side, content)
        kind = _SIDE if not truth else _BEST_TRUTH if side == b"cls" else _TRUTH
        self._put(kind, name, member.place, member.fields + b"\0" + truth)

    def _put(self, kind: int, name: bytes, place: int, text: bytes) -> None:
        self._kinds.append(kind)
        self._places.append(place)
        self._digests += _digest(name)
        self._texts += b"%s\0%s" % (name, text)
        self._ends.append(len(self._texts))

    def _text(self, number: int) -> tuple[bytes, bytes, bytes]:
        """A member's name, its fields or its target, its truth."""
        text = bytes(self._texts[self._ends[number] : self._ends[number + 1]])
        name, _, rest = text.partition(b"\0")
        fields, _, truth = rest.partition(b"\0")
        return name, fields, truth

    def entries(self, archive: File) -> Iterator[Entry]:
        """The images in the order of their bytes; last, if there is any, the damage."""
        if len(self):
            names = _Lookup(np.frombuffer(self._digests, "S16"))
            listed, truths = self._without_sides(np.sort(names.numbers))
            self._leave_out("replaced", np.arange(len(self)), names.numbers)
            self._leave_out("beside an image", names.numbers, listed)
            sources = self._sources(names, listed)
            places = np.frombuffer(self._places, np.int64)[np.where(sources < 0, listed, sources)]
            order = np.argsort(places, kind="stable")
            for number, source, truth in zip(
                listed[order].tolist(), sources[order].tolist(), truths[order].tolist(), strict=True
            ):
                yield self._entry(archive, number, source, truth)
        if self.damages:
            yield Entry(archive.path, located(failed(_together(self.damages)), archive))

    def _leave_out(self, kind: str, numbers: _Numbers, kept: _Numbers) -> None:
        if num := len(numbers) - len(kept):
            first = np.setdiff1d(numbers, kept)[0]
            self.left_out.add(kind, self._text(int(first))[0], num)

    def _entry(self, archive: File, number: int, source: int, truth: int) -> Entry:
        name, target, _ = self._text(number)
        if refused := refused_name(name):
            fields = failed(refused)
        elif source < 0:
            shown = target[:200].decode(errors="backslashreplace")
            why = f"a hard link to {shown}, which is not a file in the archive"
            fields = failed(Failure("not_found", why))
        else:
            fields = self._text(source)[1]
        label = b"" if truth < 0 else self._text(truth)[2]
        return Entry(b"%s/%s" % (archive.path, name), located(fields, archive, label))

    def _sources(self, names: "_Lookup", listed: _Numbers) -> _Numbers:
        """Of each member that one which has its bytes: itself, but for hard links."""
        kinds = np.frombuffer(self._kinds, np.uint8)
        is_link = kinds[listed] == _LINK
        sources = listed.copy()
        if is_link.any():
            targets = (self._text(number)[1] for number in listed[is_link].tolist())
            found = names.find(_digests(targets))
            found[kinds[found] == _LINK] = -1
            sources[is_link] = found
        return sources

    def _without_sides(self, listed: _Numbers) -> tuple[_Numbers, _Numbers]:
        """Those that stand for themselves, and of each the side file with its true label."""
        kinds = np.frombuffer(self._kinds, np.uint8)
        truths = np.full(len(self), -1)
        is_side = kinds[listed] >= _SIDE
        # By their worth: the last with the same key is the one that is found.
        sides = listed[is_side][np.argsort(kinds[listed[is_side]], kind="stable")]
        if not len(sides):
            return listed, truths[listed]
        images = np.array(
            [one for one in listed[~is_side].tolist() if suffix_format(self._text(one)[0])],
            np.int64,
        )
        image_keys, side_keys = map(self._keys, (images, sides))
        is_beside = np.isin(side_keys, image_keys)
        has_truth = kinds[sides] >= _TRUTH
        truths[images] = _Lookup(side_keys[has_truth], sides[has_truth]).find(image_keys)
        listed = np.sort(np.concatenate((listed[~is_side], sides[~is_beside])))
        return listed, truths[listed]

    def _keys(self, numbers: _Numbers) -> _Digests:
        return _digests(key_of(self._text(number)[0]) for number in numbers.tolist())


class _Lookup:
    """Numbers by digests; the last number of each."""

    def __init__(self, digests: _Digests, numbers: _Numbers | None = None) -> None:
        order = np.argsort(digests, kind="stable")
        in_order = digests[order]
        is_last = np.append(in_order[1:] != in_order[:-1], True)[: len(order)]
        self._digests = in_order[is_last]
        self.numbers: _Numbers = order[is_last] if numbers is None else numbers[order[is_last]]

    def find(self, digests: _Digests) -> _Numbers:
        """The number of each; -1: it is not there."""
        if not len(self.numbers):
            return np.full(len(digests), -1)
        places = np.minimum(np.searchsorted(self._digests, digests), len(self.numbers) - 1)
        return np.where(self._digests[places] == digests, self.numbers[places], -1)


def _digest(name: bytes) -> bytes:
    return blake2b(name, digest_size=16).digest()


def _digests(names: Iterable[bytes]) -> _Digests:
    joined = b"".join(map(_digest, names))
    return np.frombuffer(joined, "S16") if joined else np.empty(0, "S16")


def _together(damages: list[Failure]) -> Failure:
    told = [one.message for one in damages[:MAX_DAMAGES]]
    if len(damages) > MAX_DAMAGES:
        told.append(f"and {len(damages) - MAX_DAMAGES:,} more")
    return Failure(damages[0].code, "; ".join(told))
