"""Tar archives of every writer: the same paths and bytes as in the folder that was packed."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchclf.errors import UsageError
from batchclf.images.archives import tar
from batchclf.images.clutter import clutter_kind
from tests.images.archives.common import (
    PHOTOS,
    as_tar,
    look,
    photo,
    tar_member,
    written,
)

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
COMPRESSED = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".txz": "w:xz"}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
def test_every_format_and_compression_gives_the_files_in_order(
    tmp_path: Path, suffix: str, format_: int
) -> None:
    archive = written(tmp_path / f"a{suffix}", as_tar(PHOTOS, COMPRESSED[suffix], format_))
    found = look(archive)
    assert found.images == list(PHOTOS.items())
    assert [line for line in found.log if "read through" in line] == [
        line for line in found.log if suffix != ".tar"
    ]
    assert bool(found.log) == (suffix != ".tar")


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name",
    [
        b"x" * 99 + b".jpg",
        b"folder/" * 60 + b"x.jpg",
        b"caf\xe9.jpg",
        "日本/é.jpg".encode(),
        b"a b\n=1.jpg",
    ],
)
def test_long_and_odd_names_are_kept_byte_by_byte(
    tmp_path: Path, format_: int, name: bytes
) -> None:
    files = {b"first.jpg": b"1", name: b"2", b"last.jpg": b"3"}
    archive = written(tmp_path / "a.tar", as_tar(files, format_=format_))
    assert look(archive).images == list(files.items())


@pytest.mark.parametrize("arguments", [[], ["--format=v7"], ["--format=ustar"], ["--format=posix"]])
@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_what_tar_packs_is_what_the_folder_holds(tmp_path: Path, arguments: list[str]) -> None:
    for name, content in PHOTOS.items():
        path = tmp_path / "in" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    archive = tmp_path / "a.tar"
    subprocess.run(
        ["tar", *arguments, "--sort=name", "-cf", archive, "-C", tmp_path / "in", "."], check=True
    )
    found = look(archive)
    assert found.images == look(tmp_path / "in").images
    assert found.num_left_out == 0


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_sparse_files_of_gnu_tar_are_refused_and_what_follows_is_read(tmp_path: Path) -> None:
    with (tmp_path / "1.jpg").open("wb") as file:
        for number in range(30):  # more pieces than the header has room for
            file.seek(number * 2**16)
            file.write(b"x" * 4096)
    (tmp_path / "2.jpg").write_bytes(b"2")
    for format_ in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={format_}", "-cf", "a.tar", "1.jpg", "2.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        found = look(tmp_path / "a.tar")
        assert found.images == [(b"1.jpg", "unsupported_format"), (b"2.jpg", b"2")]
        assert "--sparse" in found.messages[b"1.jpg"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_times_where_others_have_a_prefix_are_no_part_of_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"1")
    snapshot = ["-g", "snapshot", "--format=gnu"]  # GNU tar keeps two more times then
    subprocess.run(["tar", *snapshot, "-cf", "a.tar", "photos"], cwd=tmp_path, check=True)
    assert look(tmp_path / "a.tar").images == [(b"photos/1.jpg", b"1")]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_hard_links_have_the_bytes_of_what_they_link_to_and_the_rest_is_left_out(
    tmp_path: Path, mode: str
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tar_member(b"a/1.jpg", 3), io.BytesIO(b"one"))
        archive.addfile(tar_member(b"2.jpg", 3), io.BytesIO(b"two"))
        for number, type_ in enumerate(b"123456"):
            member = tar_member(b"link%d.jpg" % number, 0, bytes([type_]))
            member.linkname = "a/1.jpg"
            archive.addfile(member)
        lost = tar_member(b"lost.jpg", 0, tarfile.LNKTYPE)
        lost.linkname = "nowhere.jpg"
        archive.addfile(lost)
    found = look(written(tmp_path / ("a.tar" if mode == "w" else "a.tgz"), buffer.getvalue()))
    assert found.images == [
        (b"a/1.jpg", b"one"),
        (b"link0.jpg", b"one"),
        (b"2.jpg", b"two"),
        (b"lost.jpg", "not_found"),
    ]
    assert found.num_left_out == 4, "a symbolic link, two devices and a FIFO"
    assert "nowhere.jpg" in found.messages[b"lost.jpg"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_last_copy_of_a_name_counts(tmp_path: Path, mode: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in ((b"./1.jpg", b"old"), (b"2.jpg", b"2"), (b"1.jpg", b"new")):
            archive.addfile(tar_member(name, len(content)), io.BytesIO(content))
    found = look(written(tmp_path / ("a.tar" if mode == "w" else "a.tgz"), buffer.getvalue()))
    assert found.images == [(b"2.jpg", b"2"), (b"1.jpg", b"new")]
    assert found.num_left_out == 1


def test_archives_put_one_behind_the_other_are_all_read(tmp_path: Path) -> None:
    first, second = (as_tar({b"%d.jpg" % n: photo(n)}) for n in range(2))
    found = look(written(tmp_path / "a.tar", first + second))
    assert found.images == [(b"%d.jpg" % n, photo(n)) for n in range(2)]


def test_names_that_lead_out_are_refused_and_hidden_ones_left_out(tmp_path: Path) -> None:
    files = {
        b"/etc/1.jpg": b"1",
        b"a/../../2.jpg": b"2",
        b".git/3.jpg": b"3",
        b"__MACOSX/4.jpg": b"4",
        b".DS_Store": b"5",
        b"a//./6.jpg": b"6",
        b"inner.zip": b"7",
        b"..jpg": b"8",
    }
    found = look(written(tmp_path / "a.tar", as_tar(files)))
    assert found.images == [
        (b"/etc/1.jpg", "unsafe_member"),
        (b"a/../../2.jpg", "unsafe_member"),
        (b"a/6.jpg", b"6"),
        (b"inner.zip", "unsupported_format"),
        (b"..jpg", b"8"),
    ]
    assert found.num_left_out == 3
    assert "unpack" in found.messages[b"inner.zip"]


def test_sizes_beyond_octal_digits_are_read(tmp_path: Path) -> None:
    size = 9 * 2**30
    header = tar_member(b"large.jpg", size).tobuf(tarfile.GNU_FORMAT)
    noted = tar_member(b"large.jpg", size).tobuf(tarfile.PAX_FORMAT)
    for data in (header, noted):
        path = written(tmp_path / "a.tar", data)
        with path.open("r+b") as file:  # a hole of 9 GiB
            file.seek(len(data) + size)
            file.write(as_tar({b"next.jpg": b"1"}))
        found = look(path)
        assert found.images == [(b"large.jpg", "too_large_bytes"), (b"next.jpg", b"1")]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_member_larger_than_allowed_is_not_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tar" if mode == "w" else "a.tgz")
    written(path, as_tar({b"1.jpg": bytes(1001), b"2.jpg": bytes(1000)}, mode))
    found = look(path, max_bytes=1000)
    assert found.images == [(b"1.jpg", "too_large_bytes"), (b"2.jpg", bytes(1000))]


def test_what_this_python_cannot_inflate_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_there(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", not_there)
    with pytest.raises(UsageError, match=r"a\.tar\.zst: needs Python 3\.14.*zstd -d"):
        look(written(tmp_path / "a.tar.zst", b"\x28\xb5\x2f\xfd"))


def test_an_archive_without_files_is_told_of(tmp_path: Path) -> None:
    found = look(written(tmp_path / "a.tar", as_tar({})))
    assert (found.images, found.log) == ([], ["a.tar: an archive without files"])
    assert look(written(tmp_path / "b.tar", b"")).images == []


@given(
    st.dictionaries(
        st.binary(min_size=1, max_size=300).filter(
            lambda name: not set(name) & set(b"\0/.") and not clutter_kind(name, is_folder=False)
        ),
        st.binary(max_size=2000),
        max_size=8,
    ),
    st.sampled_from(["w", "w:gz"]),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_any_names_and_bytes_come_back(
    tmp_path_factory: pytest.TempPathFactory, files: dict[bytes, bytes], mode: str, format_: int
) -> None:
    path = tmp_path_factory.mktemp("tar") / ("a.tar" if mode == "w" else "a.tgz")
    assert look(written(path, as_tar(files, mode, format_))).images == list(files.items())


# ---- damaged -------------------------------------------------------------------------------------

SIX = {b"%d.jpg" % number: photo(number) for number in range(6)}
STRIDE = 512 * 3
"""Bytes that each of them takes: a header and two blocks."""


def test_of_a_cut_archive_the_cut_member_is_truncated_and_the_rest_is_not_there(
    tmp_path: Path,
) -> None:
    found = look(written(tmp_path / "a.tar", as_tar(SIX)[: 2 * STRIDE + 512 + 100]))
    assert found.images == [*list(SIX.items())[:2], (b"2.jpg", "truncated")]
    assert found.messages[b"2.jpg"] == f"its archive ends after 100 of its {len(photo(2))} bytes"


def test_a_cut_in_a_header_is_told_of_the_archive(tmp_path: Path) -> None:
    found = look(written(tmp_path / "a.tar", as_tar(SIX)[: 2 * STRIDE + 100]))
    assert found.images == [*list(SIX.items())[:2], (b"a.tar", "damaged_archive")]


def test_behind_a_damaged_header_the_next_one_is_found(tmp_path: Path) -> None:
    data = bytearray(as_tar(SIX))
    data[2 * STRIDE + 3] ^= 1
    found = look(written(tmp_path / "a.tar", bytes(data)))
    rest = [one for one in SIX.items() if one[0] != b"2.jpg"]
    assert found.images == [*rest, (b"a.tar", "damaged_archive")]
    assert "bytes 3,072 to 4,608 cannot be read" in found.messages[b"a.tar"]


def test_a_hole_of_zeros_does_not_end_an_archive_in_silence(tmp_path: Path) -> None:
    data = bytearray(as_tar(SIX))
    data[2 * STRIDE : 2 * STRIDE + 1024] = bytes(1024)
    found = look(written(tmp_path / "a.tar", bytes(data)))
    rest = [one for one in SIX.items() if one[0] != b"2.jpg"]
    assert found.images == [*rest, (b"a.tar", "damaged_archive")]


def test_endless_zeros_are_not_read_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "MAX_ZERO_BLOCKS", 100)
    found = look(written(tmp_path / "a.tar", as_tar(SIX) + bytes(512 * 200)))
    assert found.images == [*SIX.items(), (b"a.tar", "damaged_archive")]
    assert look(written(tmp_path / "b.tar", as_tar(SIX) + bytes(512 * 50))).images == list(
        SIX.items()
    )


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".txz"])
def test_of_a_cut_compressed_archive_what_comes_before_is_read(tmp_path: Path, suffix: str) -> None:
    files = {b"%d.jpg" % number: os.urandom(200_000) for number in range(10)}
    data = as_tar(files, COMPRESSED[suffix])
    found = look(written(tmp_path / f"a{suffix}", data[: len(data) // 2]))
    good = [one for one in found.images if one[1] == files.get(one[0])]
    assert good == list(files.items())[: len(good)]
    assert len(good) >= 3
    assert [content for _, content in found.images[len(good) :]] in (
        ["truncated"],
        ["damaged_archive"],
    )


def test_a_gzip_archive_with_a_wrong_checksum_is_told_of(tmp_path: Path) -> None:
    data = bytearray(as_tar(SIX, "w:gz"))
    data[-8] ^= 1
    found = look(written(tmp_path / "a.tgz", bytes(data)))
    assert found.images == [*SIX.items(), (b"a.tgz", "damaged_archive")]
    assert "CRC" in found.messages[b"a.tgz"]


def test_a_name_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    header = tar_member(b"././@LongLink", 2**30, tarfile.GNUTYPE_LONGNAME)
    path = written(tmp_path / "a.tar", header.tobuf(tarfile.GNU_FORMAT))
    with path.open("r+b") as file:
        file.seek(512 + 2**30)
        file.write(as_tar({b"1.jpg": b"1"}))
    found = look(path)
    assert found.images == [(b"1.jpg", b"1"), (b"a.tar", "damaged_archive")]
