"""remote.py: a bucket is listed as a folder is; what is read is whole, or told of."""

import io
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from batchclf.errors import EnvironmentFailed, NoImagesError, UsageError
from batchclf.images import attempts, health, remote
from batchclf.images.addresses import file_at
from batchclf.images.archives import passage
from batchclf.images.attempts import Content, Patience
from batchclf.images.files import Files
from batchclf.images.remote import RemoteFiles
from batchclf.images.room import NoRoom, claiming
from batchclf.images.source import AnySource, Source, source_of
from batchclf.images.store import FileStore, open_store
from batchclf.results.records import Failure, ImageRef
from batchclf.spec.file import load_job
from tests.proxy import NAME, OTHER, Bucket, Fault
from tests.tiny import write_tiny_job

pytestmark = pytest.mark.usefixtures("no_faults")


def source_at(folder: Path, place: str) -> AnySource:
    return source_of(load_job(write_tiny_job(folder, input=place)))


def files_at(folder: Path, place: str) -> RemoteFiles:
    source = source_at(folder, place)
    assert isinstance(source, Source)
    files = FileStore(source).files
    assert isinstance(files, RemoteFiles)
    return files


# ---- listing -------------------------------------------------------------------------------------

NAMES = (
    *("a/1.jpg", "a-b/1.jpg", "a.jpg", "a b/1.jpg", "a/b/c/1.jpg", "a0/1.jpg", "A/1.jpg"),
    *("ü/é.jpg", "😀.jpg", "%41.jpg", "+&?#[x]{y}~.jpg", "back\\slash.jpg", " lead.jpg", "x"),
    *(".git/config", ".git/1.jpg", "a/.DS_Store", "a/.b.jpg", "z/.c/d/1.jpg", "z/1.jpg"),
)


@pytest.mark.parametrize("below", ["", "/a*", "/**/1.jpg", "/?/[1-9].jpg"])
def test_a_bucket_is_listed_as_the_folder_of_the_same_names(
    tmp_path: Path, bucket: Bucket, below: str
) -> None:
    for name in NAMES:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    bucket.put_folder(tmp_path / "folder", "named")
    bucket.put("named-beside/1.jpg", b"x")
    here = open_store(source_at(tmp_path, f"{tmp_path}/folder{below}")).entries()
    there = open_store(source_at(tmp_path, f"s3://{NAME}/named{below}")).entries()
    assert [one.path for one in there] == [one.path for one in here]
    nums = [re.findall(r"(\d+ [\w ]+) \(", str(found.left_out)) for found in (there, here)]
    assert nums[0] == nums[1] != []


def test_what_consoles_leave_to_mark_folders_is_left_out(tmp_path: Path, bucket: Bucket) -> None:
    for key in ("", "a/", "empty/", "a/b/"):
        bucket.put(f"marked/{key}", b"")
    for key in ("a/1.jpg", "a/b/2.jpg", "nothing.jpg"):
        bucket.put(f"marked/{key}", b"" if key == "nothing.jpg" else b"x")
    paths = files_at(tmp_path, f"s3://{NAME}/marked").paths()
    assert list(paths) == [b"a/1.jpg", b"a/b/2.jpg", b"nothing.jpg"]
    assert paths.left_out.num == 1, "`empty` might be a file"


@pytest.mark.parametrize("name", ["a//b.jpg", "a/../b.jpg", "a/./b.jpg", "tab\t.jpg"])
def test_an_object_that_no_path_can_name_is_told_and_not_lost(
    tmp_path: Path, bucket: Bucket, name: str
) -> None:
    folder = f"odd{len(name)}{ord(name[2])}"
    bucket.put(f"{folder}/1.jpg", b"x")
    bucket.put(f"{folder}/{name}", b"x")
    with pytest.raises(UsageError, match=r"no path can be named as the object .*jpg"):
        list(files_at(tmp_path, f"s3://{NAME}/{folder}").paths())


def test_a_listing_goes_on_where_a_page_of_it_failed(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAGE_KEYS", 7)
    for number in range(30):
        bucket.put(f"paged/{number:02d}.jpg", b"x")
    files = files_at(tmp_path, f"s3://{NAME}/paged")
    bucket.proxy.forget()

    def every_third(method: str, path: str) -> Fault | None:
        return Fault(status=503) if len(bucket.proxy.requests) % 3 == 0 else None

    bucket.proxy.decide = every_third
    assert list(files.paths()) == [b"%02d.jpg" % number for number in range(30)]
    assert len(bucket.proxy.requests) > 5


def test_an_address_is_one_object_or_what_lies_below_or_nothing(
    tmp_path: Path, bucket: Bucket
) -> None:
    bucket.put("a/1.jpg", b"x", OTHER)
    assert list(files_at(tmp_path, f"s3://{OTHER}").paths()) == [b"a/1.jpg"]
    bucket.put("one/1.jpg", b"x")
    bucket.put("one", b"")
    assert list(files_at(tmp_path, f"s3://{NAME}/one/1.jpg").paths()) == [b"1.jpg"]
    for folder in (f"s3://{NAME}/one", f"s3://{NAME}/one/"):
        assert list(files_at(tmp_path, folder).paths()) == [b"1.jpg"]
    for nothing in ("on", "one/2.jpg", "nothing/"):
        with pytest.raises(NoImagesError, match="nothing lies there"):
            source_at(tmp_path, f"s3://{NAME}/{nothing}")


def test_a_place_without_an_image_is_refused(tmp_path: Path, bucket: Bucket) -> None:
    bucket.put("texts/1.txt", b"no image")
    store = open_store(source_at(tmp_path, f"s3://{NAME}/texts"))
    with pytest.raises(NoImagesError, match="found 0 images"):
        store.require_images()


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("*.JPG", "3 files are below {}, 2 of which end in .jpg; write {}/*.jpg"),
        ("*/*.png", "3 files are below {}, 2 of which end in .jpg; write {}/**/*.jpg"),
    ],
)
def test_a_glob_that_finds_nothing_is_refused_with_what_there_is(
    tmp_path: Path, bucket: Bucket, glob: str, said: str
) -> None:
    for name in ("1.jpg", "2.jpg", "texts/1.txt", ".git/1.jpg"):
        bucket.put(f"globbed/{name}", b"x")
    root = f"s3://{NAME}/globbed"
    with pytest.raises(NoImagesError, match=re.escape(said.format(root, root))):
        open_store(source_at(tmp_path, f"{root}/{glob}")).require_images()


# ---- reading -------------------------------------------------------------------------------------


def test_an_opened_file_is_the_object(tmp_path: Path, bucket: Bucket) -> None:
    content = os.urandom(9_000_000)
    bucket.put("large/1.bin", content)
    file = files_at(tmp_path, f"s3://{NAME}/large").open(b"1.bin")
    assert not isinstance(file, Failure)
    with file:
        assert file.read(10) == content[:10]
        assert file.seek(-7, io.SEEK_END) == len(content) - 7
        assert file.read() == content[-7:]
        file.seek(4_000_000)
        assert file.read(5) == content[4_000_000:4_000_005]
        file.seek(0)
        assert file.read() == content


def test_an_object_that_changes_between_two_ranges_is_told(tmp_path: Path, bucket: Bucket) -> None:
    bucket.put("changing/1.bin", b"before" * 100)
    files = files_at(tmp_path, f"s3://{NAME}/changing")
    assert files.read_range(b"1.bin", 6, 6) == b"before"
    bucket.put("changing/1.bin", b"after." * 100)
    found = files.read_range(b"1.bin", 12, 6)
    assert isinstance(found, Failure)
    assert found.code == "changed"
    bucket.put("changing/2.bin", b"short")
    for span in ((0, 6), (9, 6)):
        found = files.read_range(b"2.bin", *span)
        assert isinstance(found, Failure)
        assert found.code == "changed"


def archive_of(contents: list[bytes], place: Path) -> bytes:
    """An archive of the kind that its suffix says."""
    if place.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"image": contents}), place, compression="none")
    else:
        with tarfile.open(place, "w:gz") as archive:
            for number, content in enumerate(contents):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return place.read_bytes()


@pytest.mark.parametrize("kind", ["parquet", "tar.gz"])
def test_an_archive_that_cannot_be_read_on_is_its_images_failure_but_ends_a_listing(
    tmp_path: Path, bucket: Bucket, kind: str
) -> None:
    contents = [os.urandom(3_000_000) for _ in range(3)]
    content = archive_of(contents, tmp_path / f"0.{kind}")
    bucket.put(f"lost/0.{kind}", content)
    store = open_store(source_at(tmp_path, f"s3://{NAME}/lost/*.{kind}"))
    entries = list(store.entries())
    assert len(entries) == 3

    def read(number: int) -> bytes | Failure:
        passage._cursors.clear()  # nothing is read on where another image left it
        return store.read(ImageRef(number, *entries[number]), 1 << 30)

    assert read(2) == contents[2]
    asked: list[str] = []

    def deny_but_the_first(method: str, path: str) -> Fault | None:
        if path.endswith(kind):
            asked.append(path)
        denied = path.endswith(kind) and len(asked) > 1
        return Fault(status=403, code="AccessDenied") if denied else None

    bucket.proxy.decide = deny_but_the_first
    for number in range(3):
        asked.clear()
        found = read(number)
        assert isinstance(found, Failure)
        assert found.code == "permission_denied"
        assert f"0.{kind}: the server says 403" in found.message
    asked.clear()
    with pytest.raises(EnvironmentFailed, match="cannot be read: the server says 403"):
        list(store.entries())
    bucket.proxy.forget()
    bucket.put(f"lost/0.{kind}", content + b"x")
    found = read(1)
    assert isinstance(found, Failure)
    assert found.code == "changed"


def gladly(num_bytes: int) -> None:
    """There is room for everything."""


def test_the_bytes_of_a_read_are_claimed_before_they_are_taken(
    tmp_path: Path, bucket: Bucket, web: str
) -> None:
    bucket.put("sized/1.jpg", b"x" * 1000)
    files = files_at(tmp_path, f"s3://{NAME}/sized")
    claimed: list[int] = []
    size = len(CONTENT)
    with claiming(claimed.append):
        assert files.read(b"1.jpg") == b"x" * 1000
        assert files.read_range(b"1.jpg", 5, 7) == b"x" * 7
        for path in ("plain.jpg", "large.jpg", "chunked"):
            assert isinstance(files.read(f"{web}/{path}".encode()), bytes)
        file = files.open(b"1.jpg")
        assert not isinstance(file, Failure)
        assert file.read() == b"x" * 1000, "of archives more than one image is read"
    assert claimed == [1000, 7, size, 400 * size, 1 << 20]

    def refuse(num_bytes: int) -> None:
        raise NoRoom(num_bytes)

    for address in (b"1.jpg", f"{web}/plain.jpg".encode(), f"{web}/chunked".encode()):
        with claiming(refuse), pytest.raises(NoRoom):
            files.read(address)
    assert files.read(b"1.jpg") == b"x" * 1000


def test_an_object_larger_than_is_allowed_is_not_fetched(tmp_path: Path, bucket: Bucket) -> None:
    bucket.put("sized/1.jpg", b"x" * 1000)
    files = files_at(tmp_path, f"s3://{NAME}/sized")
    assert files.read(b"1.jpg", 1000) == b"x" * 1000
    found = files.read(b"1.jpg", 999)
    assert isinstance(found, Failure)
    assert found.code == "too_large_bytes"
    assert "1,000 bytes" in found.message
    file = file_at(f"s3://{NAME}/sized/1.jpg", Patience.within(10))
    assert file.get_up_to(999, gladly) == replace(file.get_up_to(1000, gladly), data=b"")


def test_a_server_that_does_not_answer_is_given_up_within_the_time_for_an_image(
    tmp_path: Path, bucket: Bucket
) -> None:
    bucket.put("slow/1.jpg", b"x")
    files = files_at(tmp_path, f"s3://{NAME}/slow")
    files = RemoteFiles(replace(files.source, max_seconds=2))
    bucket.proxy.decide = lambda method, path: (
        Fault(breaks="stuck") if path.endswith("1.jpg") else None
    )
    started = time.monotonic()
    found = files.read(b"1.jpg")
    assert isinstance(found, Failure)
    assert found.code == "io_error"
    assert time.monotonic() - started < 60, "it never answers, and nobody gives it up"


def test_a_name_that_is_not_utf8_is_a_failure_and_no_error(tmp_path: Path, bucket: Bucket) -> None:
    bucket.put("bytes/1.jpg", b"x")
    found = files_at(tmp_path, f"s3://{NAME}/bytes").read(b"\xff.jpg")
    assert isinstance(found, Failure)
    assert found.code == "vanished"


def files_of_list(folder: Path, *addresses: str) -> Files:
    (folder / "list.txt").write_text("\n".join(addresses))
    source = source_at(folder, str(folder / "list.txt"))
    assert isinstance(source, Source)
    health.health_of.cache_clear()
    return FileStore(source).files


DEAD = "http://127.0.0.1:1/{}.jpg"


def test_a_list_of_which_nothing_is_to_be_read_any_more_ends_the_job(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "NUM_IN_A_ROW", 5)
    bucket.put("listed/1.jpg", b"x")
    good, bad = (f"s3://{NAME}/listed/{number}.jpg" for number in (1, 2))
    files = files_of_list(tmp_path, good, bad, DEAD.format(0))
    denied = Fault(status=403, code="AccessDenied")
    bucket.proxy.decide = lambda method, path: denied if path.endswith("2.jpg") else None
    assert files.read(good.encode(), 10) == b"x"
    for _ in range(12):
        assert isinstance(files.read(bad.encode(), 10), Failure), "the bucket answers"
    bucket.proxy.decide = lambda *_: denied
    time.sleep(health.ASK_EVERY_S)
    with pytest.raises(EnvironmentFailed, match=f"s3://{NAME}: .*403.*in a row: 13 of its"):
        files.read(bad.encode(), 10)


@pytest.mark.parametrize(
    ("num_dead", "num_good", "is_down"), [(8, 0, True), (8, 1, False), (7, 0, False)]
)
def test_a_dead_server_ends_a_job_only_where_many_files_are_listed_and_none_answers(
    tmp_path: Path,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    num_dead: int,
    num_good: int,
    is_down: bool,
) -> None:
    monkeypatch.setattr(attempts, "PAUSES_S", ())
    bucket.put("listed/1.jpg", b"x")
    others = [f"s3://{NAME}/listed/1.jpg"] * num_good + ["/here/1.jpg"] * 20
    addresses = [DEAD.format(number) for number in range(num_dead)]
    files = files_of_list(tmp_path, *addresses, *others)
    for address in addresses:
        if is_down:
            with pytest.raises(EnvironmentFailed, match=r"http://127\.0\.0\.1:1: cannot be read"):
                files.read(address.encode(), 10)
        else:
            found = files.read(address.encode(), 10)
            assert isinstance(found, Failure)
            assert found.code == "io_error"


def test_a_file_of_which_nothing_comes_is_one_failure_where_others_of_its_server_are_read(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "PAUSES_S", ())
    for number in range(2):
        bucket.put(f"listed/{number}.jpg", b"x")
    addresses = [f"s3://{NAME}/listed/{number}.jpg" for number in range(2)]
    files = files_of_list(tmp_path, *addresses)
    reset = Fault(breaks="reset")
    bucket.proxy.decide = lambda method, path: reset if path.endswith("0.jpg") else None
    found = files.read(addresses[0].encode(), 10)
    assert isinstance(found, Failure)
    assert found.code == "io_error"


def test_credentials_of_a_list_that_have_expired_end_the_job_at_its_first_file(
    tmp_path: Path, bucket: Bucket
) -> None:
    bucket.put("listed/1.jpg", b"x")
    address = f"s3://{NAME}/listed/1.jpg"
    files = files_of_list(tmp_path, address, DEAD.format(0))
    bucket.proxy.decide = lambda *_: Fault(status=400, code="ExpiredToken")
    with pytest.raises(EnvironmentFailed, match=rf"s3://{NAME}: cannot be read: .*ExpiredToken"):
        files.read(address.encode(), 10)


def test_what_a_list_names_and_is_not_there_is_not_found(
    tmp_path: Path, bucket: Bucket, web: str
) -> None:
    addresses = [f"s3://{NAME}/listed/none.jpg", "s3://no-such/1.jpg", f"{web}/missing.jpg"]
    files = files_of_list(tmp_path, *addresses)
    for address in addresses:
        found = files.read(address.encode(), 10)
        assert isinstance(found, Failure)
        assert found.code == "not_found"


@pytest.mark.parametrize("below", ["", "/*.jpg"])
def test_a_place_that_was_emptied_ends_the_job(tmp_path: Path, bucket: Bucket, below: str) -> None:
    bucket.put("emptied/1.jpg", b"x")
    bucket.put("emptied/2.jpg", b"x")
    files = files_at(tmp_path, f"s3://{NAME}/emptied{below}")
    health.health_of.cache_clear()
    bucket.server.client.delete_object(Bucket=NAME, Key="emptied/1.jpg")
    found = files.read(b"1.jpg")
    assert isinstance(found, Failure)
    assert found.code == "vanished"
    bucket.server.client.delete_object(Bucket=NAME, Key="emptied/2.jpg")
    time.sleep(health.ASK_EVERY_S)
    with pytest.raises(EnvironmentFailed, match="nothing lies there any more"):
        files.read(b"2.jpg")


# ---- web servers ---------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 20


class _Web(BaseHTTPRequestHandler):
    """Serves CONTENT; the path says how."""

    times: ClassVar[list[float]] = []

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""

    def do_GET(self) -> None:
        self.times.append(time.monotonic())
        if self.path.startswith("/later") and len(self.times) == 1:
            self.send_response(429)
            self.send_header("Retry-After", "1")
            self.end_headers()
            return
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/plain.jpg")
            self.end_headers()
            return
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        if self.path.startswith("/trickle"):
            self._trickle()
            return
        if self.path.startswith("/tagged"):
            self.send_response(206)
            self.send_header("Content-Range", "bytes 0-4/100")
            self.send_header("Content-Length", "5")
            self.send_header("ETag", f'"{len(self.times) // 3}"')
            self.end_headers()
            self.wfile.write(CONTENT[:5])
            return
        self.send_response(200)
        content = CONTENT * 400 if self.path.startswith("/large") else CONTENT
        if not self.path.startswith("/chunked"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):  # who has enough hangs up
            self.wfile.write(content[:100] if self.path.startswith("/torn") else content)

    def _trickle(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)


class _Lasting(_Web):
    """Keeps connections open."""

    protocol_version = "HTTP/1.1"
    clients: ClassVar[list[object]] = []

    def do_GET(self) -> None:
        self.clients.append(self.client_address)
        super().do_GET()


@pytest.fixture
def web() -> Iterator[str]:
    _Web.times.clear()
    with serving(_Web) as url:
        yield url


@contextmanager
def serving(handler: type[_Web]) -> Iterator[str]:
    """A web server's address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_connection_serves_the_next_read_only_where_the_last_was_read_to_its_end() -> None:
    _Lasting.clients.clear()
    with serving(_Lasting) as url:
        file = file_at(f"{url}/plain.jpg", Patience.within(10))
        for _ in range(2):
            assert file.get_up_to(1 << 20, gladly).data == CONTENT
        assert len(set(_Lasting.clients)) == 1
        large = file_at(f"{url}/large.jpg", Patience.within(10))
        assert large.get((0, 5)).data == CONTENT[:5], "of an answer with all of it"
        assert large.get_up_to(9, gladly) == Content(b"", 400 * len(CONTENT))
        assert file.get_up_to(1 << 20, gladly).data == CONTENT
    assert len(_Lasting.clients) == 5
    assert len(set(_Lasting.clients)) == 3


@pytest.mark.parametrize("path", ["plain.jpg", "a%20b/ü.jpg?size=5&x=y/z", "moved.jpg", "chunked"])
def test_a_file_of_a_web_server_is_read_whole(tmp_path: Path, web: str, path: str) -> None:
    files = files_at(tmp_path, f"{web}/{path}")
    (found,) = files.paths()
    assert os.fsdecode(files.source.root) + "/" + os.fsdecode(found) == f"{web}/{path}"
    assert files.read(found) == CONTENT


def test_a_web_server_is_asked_again_when_it_wants_to_be(tmp_path: Path, web: str) -> None:
    files = files_at(tmp_path, f"{web}/plain.jpg")
    _Web.times.clear()
    assert files.read(f"{web}/later.jpg".encode()) == CONTENT
    first, second = _Web.times
    assert second - first > 0.9


def test_what_a_web_server_breaks_off_is_never_taken_for_whole(tmp_path: Path, web: str) -> None:
    files = files_at(tmp_path, f"{web}/plain.jpg")
    found = files.read(f"{web}/torn.jpg".encode())
    assert isinstance(found, Failure)
    assert found.code == "io_error"
    assert found.message.startswith("tried 4 times: ")


def test_a_file_of_a_web_server_that_changes_between_two_ranges_is_told(
    tmp_path: Path, web: str
) -> None:
    files = files_at(tmp_path, f"{web}/tagged.tar")
    assert files.read_range(b"tagged.tar", 0, 5) == CONTENT[:5]
    found = files.read_range(b"tagged.tar", 0, 5)
    assert isinstance(found, Failure)
    assert found.code == "changed"


def test_a_web_server_that_never_comes_to_an_end_is_given_up(tmp_path: Path, web: str) -> None:
    files = files_at(tmp_path, f"{web}/plain.jpg")
    files = RemoteFiles(replace(files.source, max_seconds=2))
    found = files.read(f"{web}/trickle.jpg".encode())
    assert isinstance(found, Failure)
    assert "bytes in 0.5 s, and not all" in found.message


def test_a_web_server_that_sends_no_parts_is_told(tmp_path: Path, web: str) -> None:
    files = files_at(tmp_path, f"{web}/plain.tar")
    assert files.read_range(b"plain.tar", 0, 5) == CONTENT[:5]
    with pytest.raises(UsageError, match=r"plain\.tar: .* parts .*; download it first"):
        files.read_range(b"plain.tar", 5, 5)


def test_a_web_server_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names a server"):
        source_at(tmp_path, "https://example.com/")
    with pytest.raises(UsageError, match="a list is read from this machine"):
        source_at(tmp_path, "https://example.com/list.txt")
    with pytest.raises(EnvironmentFailed, match=r"cannot be read: .*the connection failed"):
        source_at(tmp_path, "http://127.0.0.1:1/x.jpg")
