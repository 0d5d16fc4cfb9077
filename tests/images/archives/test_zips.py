"""Zip archives of every writer: the same paths and bytes as in the folder that was packed."""

import io
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.images.archives import zips
from batchclf.results.records import Failure
from tests.images.archives.common import PHOTOS, as_zip, look, photo, written

METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflate": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


class NoSeek(io.BytesIO):
    """Somewhere that cannot be sought: sizes and checksums stand behind the bytes."""

    def seekable(self) -> bool:
        return False

    def seek(self, *arguments: int) -> int:
        raise io.UnsupportedOperation


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", [io.BytesIO, NoSeek])
def test_every_method_gives_the_files_in_order(
    tmp_path: Path, method: int, kind: type[io.BytesIO]
) -> None:
    buffer = kind()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in PHOTOS.items():
            archive.writestr(name.decode(), content)
        archive.mkdir("folder")
    found = look(written(tmp_path / "a.zip", buffer.getvalue()))
    assert found.images == list(PHOTOS.items())
    assert (found.num_left_out, found.log) == (0, [])


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs zip")
@pytest.mark.parametrize(
    "arguments", [["-r"], ["-r0"], ["-r9"], ["-rfz"], ["-ry"], ["-rX", "-Z", "bzip2"]]
)
def test_what_zip_packs_is_what_the_folder_holds(tmp_path: Path, arguments: list[str]) -> None:
    files = {**PHOTOS, "日本.jpg".encode(): b"1", b"caf\xe9.jpg": b"2"}
    for name, content in files.items():
        path = tmp_path.joinpath("in").joinpath(name.decode(errors="surrogateescape"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "in" / "link.jpg").symlink_to("a/0.jpg")
    if "-ry" not in arguments:  # which keeps links
        (tmp_path / "in" / "link.jpg").unlink()
    command = ["zip", "-q", *arguments, str(tmp_path / "a.zip"), "."]
    done = subprocess.run(command, cwd=tmp_path / "in", check=False)
    if done.returncode:
        pytest.skip("this zip cannot do that")
    found = look(tmp_path / "a.zip")
    expected = dict(look(tmp_path / "in").images)
    expected.pop(b"link.jpg", None)
    assert dict(found.images) == expected
    assert found.num_left_out == ("-ry" in arguments)


def test_zip64_is_read_wherever_a_number_is_wide(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        with archive.open("1.jpg", "w", force_zip64=True) as member:
            member.write(b"one")
        archive.writestr("2.jpg", b"two")
    assert look(written(tmp_path / "a.zip", buffer.getvalue())).images == [
        (b"1.jpg", b"one"),
        (b"2.jpg", b"two"),
    ]


def test_an_archive_of_more_than_65535_members_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(66_000):
            archive.writestr(f"{number}.jpg", b"")
    found = look(tmp_path / "a.zip")
    assert len(found.images) == 66_000
    assert (found.images[-1], found.num_left_out) == ((b"65999.jpg", b""), 0)


def test_wide_numbers_in_the_directory_are_taken_from_their_extra_field(tmp_path: Path) -> None:
    data = as_zip({b"1.jpg": photo(1)}, zipfile.ZIP_STORED)
    at = data.index(b"PK\1\2")
    entry, name = bytearray(data[at : at + 46]), data[at + 46 : at + 51]
    wide = struct.pack("<HHQQQ", 1, 24, len(photo(1)), len(photo(1)), 0)
    entry[20:28] = b"\xff" * 8
    entry[42:46] = b"\xff" * 4
    entry[30:32] = struct.pack("<H", len(wide))
    directory = bytes(entry) + name + wide
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory), at, 0)
    found = look(written(tmp_path / "a.zip", data[:at] + directory + end))
    assert found.images == [(b"1.jpg", photo(1))]


def test_names_are_bytes_unless_a_field_says_them_in_unicode(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("\xfc1.jpg", b"1")  # flagged as UTF-8
        old = zipfile.ZipInfo("xx2.jpg")
        text = "日本2.jpg".encode()
        field = b"\1" + struct.pack("<L", zlib.crc32(b"\x93\xfa2.jpg")) + text
        old.extra = struct.pack("<HH", 0x7075, len(field)) + field
        archive.writestr(old, b"2")
        archive.writestr("xx3.jpg", b"3")
        windows = zipfile.ZipInfo("a:b4.jpg")
        windows.create_system = 0
        archive.writestr(windows, b"4")
    data = buffer.getvalue()
    for there, wanted in ((b"xx2", b"\x93\xfa2"), (b"xx3", b"\x81x3"), (b"a:b4", b"a\\b4")):
        data = data.replace(there, wanted)
    found = look(written(tmp_path / "a.zip", data))
    assert found.images == [
        ("\xfc1.jpg".encode(), b"1"),
        ("日本2.jpg".encode(), b"2"),
        (b"\x81x3.jpg", b"3"),
        (b"a/b4.jpg", b"4"),
    ]


def test_what_cannot_be_read_is_its_own_record(tmp_path: Path) -> None:
    data = bytearray(as_zip({b"%d.jpg" % n: photo(n) for n in range(4)}))
    entries = [at for at in range(len(data)) if data[at:].startswith(b"PK\1\2")]
    data[entries[0] + 8] |= 1  # encrypted
    data[entries[1] + 10] = 9  # deflate64
    data[entries[2] + 42 : entries[2] + 46] = b"\xf0\xff\xff\x7f"  # far behind the end
    found = look(written(tmp_path / "a.zip", bytes(data)))
    assert dict(found.images) == {
        b"0.jpg": "unsupported_format",
        b"1.jpg": "unsupported_format",
        b"2.jpg": "truncated",
        b"3.jpg": photo(3),
    }
    assert "encrypted" in found.messages[b"0.jpg"]
    assert "deflate64" in found.messages[b"1.jpg"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_damaged_bytes_are_corrupt_and_the_next_member_is_read(tmp_path: Path, method: int) -> None:
    data = bytearray(as_zip({b"1.jpg": photo(1), b"2.jpg": photo(2)}, method))
    data[data.index(b"PK\3\4", 4) - 3] ^= 0xFF
    found = look(written(tmp_path / "a.zip", bytes(data)))
    assert found.images == [(b"1.jpg", "corrupt"), (b"2.jpg", photo(2))]


def test_the_last_copy_of_a_name_counts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.jpg", b"old")
        archive.writestr("2.jpg", b"2")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("1.jpg", b"new")
    found = look(tmp_path / "a.zip")
    assert (found.images, found.num_left_out) == ([(b"2.jpg", b"2"), (b"1.jpg", b"new")], 1)


def test_what_stands_before_and_behind_an_archive_does_not_move_its_members(tmp_path: Path) -> None:
    data = b"#!/bin/sh\n" * 10 + as_zip({b"1.jpg": photo(1)})
    assert look(written(tmp_path / "a.zip", data)).images == [(b"1.jpg", photo(1))]
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.comment = b"a comment" * 1000
    assert look(tmp_path / "a.zip").images == [(b"1.jpg", photo(1))]


# ---- bombs ---------------------------------------------------------------------------------------


def with_size(data: bytes, size: int) -> bytes:
    """An archive of one member, whose directory says another size."""
    changed = bytearray(data)
    at = data.index(b"PK\1\2")
    changed[at + 24 : at + 28] = struct.pack("<L", size)
    return bytes(changed)


BOMB = as_zip({b"1.jpg": bytes(2**24)})
CASES: dict[str, tuple[bytes, int, str]] = {
    "an honest size": (BOMB, 2**20, "too_large_bytes"),
    "a size that lies": (with_size(BOMB, 10), 2**20, "too_large_bytes"),
    "a size that lies, within the limit": (with_size(BOMB, 10), 2**25, "corrupt"),
    "fewer bytes than it says": (with_size(BOMB, 2**24 + 1), 2**25, "corrupt"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_more_is_inflated_than_may_be(tmp_path: Path, case: str) -> None:
    data, max_bytes, code = CASES[case]
    found = look(written(tmp_path / "a.zip", data), max_bytes=max_bytes)
    assert found.images == [(b"1.jpg", code)]


@pytest.mark.parametrize("method", list(METHODS.values())[1:], ids=list(METHODS)[1:])
def test_what_lies_about_its_size_is_never_held_in_memory(method: int) -> None:
    held: list[int] = []
    step = zips._inflater(packed(bytes(2**22), method), method, 2, 10)

    def watched(max_length: int) -> bytes:
        held.append(max_length)
        return step(max_length)

    assert isinstance(zips._inflated(watched, 10, 2**20), Failure)
    assert max(held) == zips.INFLATE_BYTES


def packed(content: bytes, method: int) -> bytes:
    """A member's bytes as they stand in an archive."""
    data = as_zip({b"1.jpg": content}, method)
    return data[35 : data.index(b"PK\1\2")]


def test_a_dictionary_that_takes_all_memory_is_refused(tmp_path: Path) -> None:
    data = bytearray(as_zip({b"1.jpg": photo(1)}, zipfile.ZIP_LZMA))
    assert data[35:39] == b"\x09\x04\x05\x00"
    data[40:44] = b"\xff\xff\xff\xff"
    assert look(written(tmp_path / "a.zip", bytes(data))).images == [(b"1.jpg", "corrupt")]


# ---- damaged directories -------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda data: data[: len(data) // 2], "ends without the directory"),
    "no archive": (lambda data: b"<html>404", "an HTML page"),
    "empty": (lambda data: b"", "an empty file"),
    "one of several": (
        lambda data: data[:-18] + b"\1\0\1\0" + data[-14:],
        "one of several parts",
    ),
    "before the beginning": (
        lambda data: data[:-10] + b"\xff\xff\xff\x7f" + data[-6:],
        "before the archive",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_archive_that_cannot_be_listed_is_one_record(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    found = look(written(tmp_path / "a.zip", change(as_zip(PHOTOS))))
    assert found.images == [(b"a.zip", "damaged_archive")]
    assert message in found.messages[b"a.zip"]


def test_of_a_damaged_directory_what_comes_before_is_listed(tmp_path: Path) -> None:
    data = as_zip(PHOTOS)
    third = [at for at in range(len(data)) if data[at:].startswith(b"PK\1\2")][2]
    found = look(written(tmp_path / "a.zip", data[:third] + b"XX" + data[third + 2 :]))
    assert found.images == [*list(PHOTOS.items())[:2], (b"a.zip", "damaged_archive")]
    assert "2 of its 6 members are listed" in found.messages[b"a.zip"]


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0/.\\"), min_size=1).filter(
            lambda name: len(name.encode()) < 1000
        ),
        st.binary(max_size=2000),
        max_size=8,
    ),
    st.sampled_from(list(METHODS.values())),
)
def test_any_names_and_bytes_come_back(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], method: int
) -> None:
    encoded = {name.encode(): content for name, content in files.items()}
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    assert look(written(path, as_zip(encoded, method))).images == list(encoded.items())
