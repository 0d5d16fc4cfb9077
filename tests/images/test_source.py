"""Which files an input holds, in which order; reading one without ever being led astray."""

import base64
import glob
import json
import os
import pickle
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchclf.errors import BatchclfError, EnvironmentFailed, NoImagesError, UsageError
from batchclf.images import lists
from batchclf.images.clutter import clutter_kind
from batchclf.images.decode import Decoder
from batchclf.images.dialect import NormalForm
from batchclf.images.lists import mark_repeated
from batchclf.images.load import Loader
from batchclf.images.local import LocalFiles
from batchclf.images.source import Source, open_source, together
from batchclf.images.store import open_store
from batchclf.results.records import Entry, Failure, ImageRef, Loaded, Preprocess
from tests.conftest import DATA, ROOT, data
from tests.images.common import decode, encode, picture
from tests.mounts import dead_mount

JPEG = encode(picture(40, 30), "JPEG")


def write(root: Path, *names: str | bytes, content: bytes = JPEG) -> None:
    """Files below `root`, with the folders they need."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def listed(source: Source) -> list[bytes]:
    return list(LocalFiles(source).paths())


def read(source: Source, path: bytes, timeout_s: float = 10.0) -> bytes | Failure:
    """Reading that would block for ever fails the test instead."""
    found: list[bytes | Failure] = []

    def work() -> None:
        found.append(LocalFiles(source).read(path))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout_s)
    assert not worker.is_alive(), "reading blocks"
    return found[0]


def code(source: Source, path: bytes) -> str:
    found = read(source, path)
    assert isinstance(found, Failure), "read without a failure"
    assert found.message
    return found.code


# ---- order ---------------------------------------------------------------------------------------

Tree = dict[bytes, "Tree | None"]
"""Name to folder, or None for a file."""

names = (
    st.binary(min_size=1, max_size=6)
    .map(lambda name: name.replace(b"/", b"-").replace(b"\0", b"0"))
    .filter(lambda name: not clutter_kind(name, True) and not clutter_kind(name, False))
)
trees: st.SearchStrategy[Tree] = st.recursive(
    st.dictionaries(names, st.none(), max_size=5),
    lambda inner: st.dictionaries(names, st.none() | inner, max_size=5),
    max_leaves=25,
)


def plant(tree: Tree, folder: bytes) -> list[bytes]:
    """Make the tree's files and return their paths, in no particular order."""
    found = []
    for name, below in tree.items():
        path = os.path.join(folder, name)
        if below is None:
            with open(path, "wb"):
                found.append(path)
        else:
            os.mkdir(path)
            found += plant(below, path)
    return found


@settings(max_examples=80, deadline=None)
@given(tree=trees)
def test_the_listing_is_depth_first_with_names_in_the_order_of_their_bytes(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = os.fsencode(folder)
        files = [os.path.relpath(path, root) for path in plant(tree, root)]
        source = open_source(Path(folder))
        # Depth first with sorted names is the order of the paths taken as lists of names.
        expected = sorted(files, key=lambda path: path.split(b"/"))
        paths = LocalFiles(source).paths()
        assert list(paths) == expected
        assert list(paths) == expected, "and again"
        assert paths.left_out.num == 0


def test_a_folder_comes_before_a_file_whose_name_goes_on_where_its_own_ends(
    tmp_path: Path,
) -> None:
    write(tmp_path, "a/2.jpg", "a.jpg", "a-b.jpg", "a/10.jpg", "B.jpg", "ä.jpg", "z/y/x.jpg")
    assert listed(open_source(tmp_path)) == [
        b"B.jpg",
        b"a/10.jpg",
        b"a/2.jpg",
        b"a-b.jpg",
        b"a.jpg",
        b"z/y/x.jpg",
        "ä.jpg".encode(),
    ]


def test_files_of_one_name_in_several_folders_and_of_one_name_in_two_cases_are_all_listed(
    tmp_path: Path,
) -> None:
    write(tmp_path, "a/1.jpg", "b/1.jpg", "b/1.JPG", "1.jpg")
    assert listed(open_source(tmp_path)) == [b"1.jpg", b"a/1.jpg", b"b/1.JPG", b"b/1.jpg"]


def test_hard_links_are_entries_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    source = open_source(tmp_path)
    assert [read(source, path) for path in listed(source)] == [JPEG, JPEG]


def test_hidden_folders_and_hidden_files_that_are_no_images_are_left_out_and_counted(
    tmp_path: Path,
) -> None:
    write(tmp_path, "a.jpg", ".git/objects/x.jpg", ".DS_Store", ".a.jpg", "b/.thumbs/1.jpg")
    write(tmp_path, "b/.hidden.png", "b/.jpg", "notes.txt")
    source = open_source(tmp_path)
    expected = [b".a.jpg", b"a.jpg", b"b/.hidden.png", b"b/.jpg", b"notes.txt"]
    paths = LocalFiles(source).paths()
    for _ in range(2):
        assert list(paths) == expected
        assert paths.left_out.num == 3


CLUTTER = [
    *("Thumbs.db", "thumbs.DB", "a/Desktop.ini", "ehthumbs.db", "Icon\r", ".DS_Store", "a/._1.jpg"),
    *("$RECYCLE.BIN/S-1-5/$R1.jpg", "$Recycle.Bin/1.jpg", "System Volume Information/x.png"),
    *("@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg", "#recycle/1.jpg", "#snapshot/1.jpg", "@Recycle/1.jpg"),
    *("__MACOSX/a/1.jpg", "lost+found/#123.jpg", ".Trashes/501/1.jpg", ".Spotlight-V100/1.jpg"),
    *("a/.ipynb_checkpoints/1.jpg", ".thumbnails/1.jpg", ".Trash-1000/files/1.jpg"),
]
"""What systems leave among photos, each under a name of its own."""
NO_CLUTTER = [
    *("thumbs.db/1.jpg", "__macosx.jpg", "LOST+FOUND/1.jpg", "recycler/1.jpg", "icon/1.jpg"),
    *("lost+found.png", "System Volume Information.jpg", "@eadir/1.jpg", "desktop.ini.png"),
]


def test_what_systems_leave_among_photos_is_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg", *CLUTTER)
    source = open_source(tmp_path)
    paths = LocalFiles(source).paths()
    assert list(paths) == [b"a/1.jpg"]
    assert paths.left_out.num == len(CLUTTER)
    assert str(paths.left_out) == (
        "7 of Windows ($RECYCLE.BIN), 5 hidden (.Spotlight-V100), 4 of a NAS (#recycle), "
        "4 of macOS (.DS_Store), 1 of the file system (lost+found)"
    )
    assert list(LocalFiles(source).glimpse()) == [b"a/1.jpg"]


def test_what_is_left_out_is_told_on_one_line(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "Icon\r", ".a\n\x1b[2J")
    paths = LocalFiles(open_source(tmp_path)).paths()
    assert list(paths) == [b"1.jpg"]
    assert str(paths.left_out) == r"1 hidden (.a\n\x1b[2J), 1 of macOS (Icon\r)"


@pytest.mark.parametrize("name", NO_CLUTTER)
def test_what_only_looks_like_that_is_listed(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    assert listed(open_source(tmp_path)) == [os.fsencode(name)]
    assert list(LocalFiles(open_source(tmp_path)).glimpse()) == [os.fsencode(name)]


def test_a_photo_whose_name_is_that_of_an_appledouble_file_is_listed(tmp_path: Path) -> None:
    write(tmp_path, "._photo.jpg", "._notes", "1.jpg", "._1.jpg")
    write(tmp_path, "._orphan.jpg", content=b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    paths = LocalFiles(open_source(tmp_path)).paths()
    assert list(paths) == [b"._photo.jpg", b"1.jpg"]
    assert paths.left_out.num == 3


def test_an_appledouble_file_of_a_camera_card_is_no_image(tmp_path: Path) -> None:
    double = data(DATA / "cases" / "appledouble_IMG_0001.JPG").read_bytes()
    write(tmp_path, "._IMG_0001.JPG", content=double)
    with pytest.raises(NoImagesError, match="found 0 images"):
        open_store(open_source(tmp_path)).require_images()
    write(tmp_path, "IMG_0001.JPG")
    assert listed(open_source(tmp_path)) == [b"IMG_0001.JPG"]


def test_the_files_of_a_large_folder_are_held_as_bare_names(tmp_path: Path) -> None:
    num_files = 5000
    for number in range(num_files):
        (tmp_path / f"IMG_{number:08d}.jpg").touch()
    source = open_source(tmp_path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in LocalFiles(source).paths()) == num_files
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / num_files < 90  # 16 of the name, 33 of an object, 8 of a pointer, 8 spare


@pytest.mark.parametrize(
    ("num_lines", "line", "limit"), [(200_000, b"%d\n", 45), (100_000, b"%0500d\n", 300)]
)
def test_a_long_list_costs_few_bytes_a_line_however_long_its_paths_are(
    tmp_path: Path, num_lines: int, line: bytes, limit: int
) -> None:
    source = list_of(tmp_path, b"".join(line % number for number in range(num_lines)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in LocalFiles(source).paths()) == num_lines
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / num_lines < limit  # 16 of the digest, and what is held of the list at once


@pytest.mark.parametrize("spec", [".", "*/*.jpg", "list.txt"])
def test_an_input_is_data_that_lists_and_loads_the_same_in_another_process(
    tmp_path: Path, spec: str
) -> None:
    write(tmp_path, "a/1.jpg", "a/2.jpg", "b/.hidden", "b/x.png", "list.txt", content=JPEG)
    (tmp_path / "list.txt").write_bytes(b"b/x.png\na/1.jpg\ngone.jpg\nb/x.png\n")
    source = open_source(tmp_path / spec)
    loader = Loader(open_store(source), Decoder(Preprocess(8, (8, 8), "bilinear", None, None)))
    paths = LocalFiles(source).paths()
    expected = list(paths), paths.left_out.num, [load(loader, path) for path in paths]
    assert len(expected[0]) > 1
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=pickle.dumps((source, loader)),
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert pickle.loads(done.stdout) == expected
    assert pickle.loads(pickle.dumps(source)) == source


ELSEWHERE = """
import pickle, sys
from batchclf.images.local import LocalFiles
from batchclf.images.store import open_store
from tests.images.test_source import load
source, loader = pickle.load(sys.stdin.buffer)
paths = LocalFiles(source).paths()
found = list(paths), paths.left_out.num, [load(loader, path) for path in paths]
sys.stdout.buffer.write(pickle.dumps(found))
"""


def load(loader: Loader, path: bytes) -> tuple[Loaded, bytes]:
    slot_HWC = np.zeros((8, 8, 3), np.uint8)
    return loader(ImageRef(0, path), slot_HWC), slot_HWC.tobytes()


# ---- names ---------------------------------------------------------------------------------------

ODD_NAMES = {
    "not UTF-8": b"caf\xe9.jpg",
    "newline": b"a\nb.jpg",
    "tab": b"a\tb.jpg",
    "carriage return": b"a\r.jpg",
    "quote": b'a"b.jpg',
    "single quote": b"a'b.jpg",
    "backslash": b"a\\b.jpg",
    "control bytes": bytes(range(1, 32)) + b"\x7f.jpg",
    "line separator": "a\u2028b.jpg".encode(),
    "right to left": "a\u202egpj.b.jpg".encode(),
    "emoji": "🐈‍⬛.jpg".encode(),
    "255 bytes": b"x" * 251 + b".jpg",
    "leading dash": b"-rf.jpg",
    "formula": b"=cmd|' !A1.jpg",
    "markup": b"<script>alert(1)<\\script>.jpg",
    "glob": b"[a]*?.jpg",
    "blank": b" .jpg",
    "tilde": b"~.jpg",
    "percent": b"%2e%2e%2fa.jpg",
    "surrogate": b"\xed\xa0\x80.jpg",
    "every high byte": bytes(range(128, 256)) + b".jpg",
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES.keys())
def test_any_name_is_listed_byte_for_byte_and_read(tmp_path: Path, name: bytes) -> None:
    write(tmp_path, name, name + b".d/" + name if len(name) < 250 else b"d/" + name)
    source = open_source(tmp_path)
    open_store(source).require_images()
    paths = listed(source)
    assert name in paths
    assert len(paths) == 2
    for path in paths:
        content = read(source, path)
        assert content == JPEG
        assert decode(content, path)[1] == Loaded()


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES.keys())
def test_any_name_can_stand_in_a_jsonl_list(tmp_path: Path, name: bytes) -> None:
    write(tmp_path, name)
    record = {"path": "?", "path_b64": base64.b64encode(name).decode()}
    (tmp_path / "list.jsonl").write_text(json.dumps(record) + "\n")
    source = open_source(tmp_path / "list.jsonl")
    assert listed(source) == [name]
    assert read(source, name) == JPEG


def test_a_name_composed_and_decomposed_is_two_files(tmp_path: Path) -> None:
    both = [unicodedata.normalize(form, "é.jpg").encode() for form in ("NFC", "NFD")]
    write(tmp_path, *both)
    if len(os.listdir(tmp_path)) < 2:
        pytest.skip("this file system normalises names")
    assert listed(open_source(tmp_path)) == sorted(both)


def deep_folder(root: Path, num_bytes: int) -> None:
    """A folder whose full path has `num_bytes`, with an image in it; made step by step."""
    descriptor = os.open(root, os.O_RDONLY)
    left = num_bytes - len(os.fsencode(root))
    while left:
        # A slash and a name each; never leave a single byte, which would be a slash alone.
        name = "d" * (min(left - 1, 200) if left - 1 <= 200 or left > 203 else 100)
        os.mkdir(name, dir_fd=descriptor)
        inner = os.open(name, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
        left -= len(name) + 1
    with open(os.open("x.jpg", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor), "wb") as file:
        file.write(JPEG)
    os.close(descriptor)


# The longest path Linux opens has 4,095 bytes; a folder's is also asked for with a slash behind.
@pytest.mark.parametrize("num_bytes", [4089, 4090, 4093, 4094, 4095, 4096, 4300])
def test_a_path_too_long_to_open_costs_its_own_record_only(tmp_path: Path, num_bytes: int) -> None:
    write(tmp_path, "a.jpg", "z.jpg")
    deep_folder(tmp_path, num_bytes)
    source = open_source(tmp_path)
    first, deep, last = listed(source)
    assert (first, last) == (b"a.jpg", b"z.jpg")
    assert read(source, last) == JPEG
    if num_bytes == 4089:
        assert read(source, deep) == JPEG
    else:
        assert code(source, deep) == "path_too_long"


# ---- links ---------------------------------------------------------------------------------------


def test_a_link_to_a_file_of_the_input_is_read_and_flagged_by_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg")
    (tmp_path / "b.jpg").symlink_to("a/1.jpg")
    (tmp_path / "c.jpg").symlink_to("b.jpg")
    source = open_source(tmp_path)
    assert listed(source) == [b"a/1.jpg", b"b.jpg", b"c.jpg"]
    assert [read(source, path) for path in listed(source)] == [JPEG] * 3


def test_a_link_to_a_folder_of_the_input_is_walked(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg")
    (tmp_path / "b").symlink_to("a")
    source = open_source(tmp_path)
    assert listed(source) == [b"a/1.jpg", b"b/1.jpg"]
    assert read(source, b"b/1.jpg") == JPEG


def test_links_that_lead_round_in_a_circle_are_listed_once_and_refused(tmp_path: Path) -> None:
    write(tmp_path, "a/b/1.jpg")
    (tmp_path / "a" / "b" / "up").symlink_to("..")
    (tmp_path / "a" / "root").symlink_to(tmp_path)
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "x.jpg").symlink_to("y.jpg")
    (tmp_path / "y.jpg").symlink_to("x.jpg")
    (tmp_path / "here").symlink_to(".")
    source = open_source(tmp_path)
    expected = {
        b"a/b/up": "symlink_loop",
        b"a/root": "symlink_loop",
        b"here": "symlink_loop",
        b"self.jpg": "symlink_loop",
        b"x.jpg": "symlink_loop",
        b"y.jpg": "symlink_loop",
    }
    assert listed(source) == sorted([*expected, b"a/b/1.jpg"])
    assert {path: code(source, path) for path in expected} == expected


def test_a_dangling_link_is_recorded_as_vanished(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").symlink_to("gone.jpg")
    (tmp_path / "y").symlink_to("gone/folder")
    source = open_source(tmp_path)
    assert [code(source, path) for path in listed(source)] == ["vanished"] * 2


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """An input with links that lead out of it, one to a folder whose name begins like its own."""
    root = tmp_path / "in"
    write(root, "1.jpg")
    write(tmp_path, "in2/secret.jpg", "out/secret.jpg")
    (root / "absolute.jpg").symlink_to(tmp_path / "out" / "secret.jpg")
    (root / "folder").symlink_to(tmp_path / "out")
    (root / "sibling").symlink_to("../in2")
    (root / "twice.jpg").symlink_to("absolute.jpg")
    (root / "up.jpg").symlink_to("../in2/secret.jpg")
    return root


def test_links_out_of_the_input_are_refused_by_default(inside: Path) -> None:
    source = open_source(inside)
    outside = [b"absolute.jpg", b"folder", b"sibling", b"twice.jpg", b"up.jpg"]
    assert listed(source) == [b"1.jpg", *outside]
    assert [code(source, path) for path in outside] == ["outside_root"] * len(outside)


def test_links_out_of_the_input_are_followed_where_the_job_allows_it(inside: Path) -> None:
    source = open_source(inside, allow_outside_links=True)
    assert listed(source) == [
        b"1.jpg",
        b"absolute.jpg",
        b"folder/secret.jpg",
        b"sibling/secret.jpg",
        b"twice.jpg",
        b"up.jpg",
    ]
    assert [read(source, path) for path in listed(source)] == [JPEG] * 6


def test_an_input_that_is_itself_a_link_is_walked(inside: Path, tmp_path: Path) -> None:
    write(inside, "d/2.jpg")
    (inside / "d" / "3.jpg").symlink_to("2.jpg")
    (tmp_path / "link").symlink_to(inside)
    source = open_source(tmp_path / "link")
    assert [path for path in listed(source) if not isinstance(read(source, path), Failure)] == [
        b"1.jpg",
        b"d/2.jpg",
        b"d/3.jpg",
    ]


# ---- entries that are no regular file ------------------------------------------------------------


def test_a_folder_named_like_an_image_is_walked_and_is_no_file_when_a_list_names_it(
    tmp_path: Path,
) -> None:
    write(tmp_path, "x.jpg/1.jpg")
    assert listed(open_source(tmp_path)) == [b"x.jpg/1.jpg"]
    write(tmp_path, "list.txt", content=b"x.jpg\n")
    source = open_source(tmp_path / "list.txt")
    assert code(source, b"x.jpg") == "not_regular_file"


def test_a_fifo_or_socket_named_like_an_image_is_recorded_and_never_blocks(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "link.jpg").symlink_to("fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket.jpg")  # the name proper may be too long
        os.close(here)
        source = open_source(tmp_path)
        assert listed(source) == [b"fifo.jpg", b"link.jpg", b"socket.jpg"]
        assert [code(source, path) for path in listed(source)] == ["not_regular_file"] * 3


def test_a_device_is_recorded_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "tty.jpg").symlink_to("/dev/tty")
    source = open_source(tmp_path, allow_outside_links=True)
    assert code(source, b"zero.jpg") == "not_regular_file"
    assert code(source, b"tty.jpg") == "not_regular_file"


def test_a_device_node_in_the_input_is_recorded_and_not_read(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "null.jpg", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("device nodes can be made by root only")
    source = open_source(tmp_path)
    assert listed(source) == [b"null.jpg"]
    assert code(source, b"null.jpg") == "not_regular_file"


# ---- permissions ---------------------------------------------------------------------------------

NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter, as pytest's own is not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply; root becomes nobody, and itself again afterwards."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o444])
def test_a_file_or_folder_that_may_not_be_read_is_recorded_and_not_passed_over(
    open_folder: Path, mode: int
) -> None:
    write(open_folder, "a.jpg", "locked/1.jpg", "secret.jpg", "z.jpg")
    (open_folder / "locked").chmod(mode)
    (open_folder / "secret.jpg").chmod(0o000)
    with unprivileged():
        source = open_source(open_folder)
        assert listed(source) == [b"a.jpg", b"locked", b"secret.jpg", b"z.jpg"]
        assert read(source, b"a.jpg") == read(source, b"z.jpg") == JPEG
        assert code(source, b"secret.jpg") == "permission_denied"
        assert code(source, b"locked") == "permission_denied"


def test_an_input_folder_that_may_not_be_read_is_an_error_that_names_it(
    open_folder: Path,
) -> None:
    write(open_folder, "in/1.jpg")
    (open_folder / "in").chmod(0o000)
    with unprivileged(), pytest.raises(BatchclfError, match="in"):
        open_store(open_source(open_folder / "in")).require_images()


def test_a_list_that_may_not_be_read_is_an_error_that_names_it(open_folder: Path) -> None:
    write(open_folder, "list.txt", content=b"1.jpg\n")
    (open_folder / "list.txt").chmod(0o000)
    with unprivileged(), pytest.raises(BatchclfError, match=r"list\.txt"):
        open_store(open_source(open_folder / "list.txt")).require_images()


def test_a_list_that_opens_but_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    spec = tmp_path / "list.txt"
    spec.symlink_to("/proc/self/mem")  # reading its beginning is EIO
    with pytest.raises(EnvironmentFailed, match=r"input: .*list\.txt: cannot be read: .*EIO"):
        listed(open_source(spec))


# ---- files that change ---------------------------------------------------------------------------


def test_a_file_or_folder_gone_since_the_listing_is_recorded_as_vanished(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b/1.jpg", "c/1.jpg")
    source = open_source(tmp_path)
    paths = listed(source)
    (tmp_path / "a.jpg").unlink()
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "c").write_bytes(JPEG)
    assert [code(source, path) for path in paths] == ["vanished"] * 3


def test_a_listing_does_not_end_early_where_its_input_goes_away_meanwhile(tmp_path: Path) -> None:
    write(tmp_path, "in/a/1.jpg", "in/b/1.jpg")
    paths = iter(LocalFiles(open_source(tmp_path / "in")).paths())
    assert next(paths) == b"a/1.jpg"
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentFailed, match=r"input: .*/in: is no longer the folder"):
        list(paths)


def test_an_image_is_not_taken_for_vanished_where_its_input_is_another_folder(
    tmp_path: Path,
) -> None:
    write(tmp_path, "in/1.jpg", "in/2.jpg")
    write(tmp_path, "in/list.txt", content=b"1.jpg\n2.jpg\n")
    sources = [open_source(tmp_path / "in" / spec) for spec in (".", "*.jpg", "list.txt")]
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    write(tmp_path, "in/2.jpg")
    for source in sources:
        with pytest.raises(EnvironmentFailed, match="another folder is there now"):
            LocalFiles(source).read(b"1.jpg")
        assert LocalFiles(source).read(b"2.jpg") == JPEG, "as after a file system is mounted again"


def test_an_image_on_a_dead_mount_ends_the_job_wherever_its_list_lies(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    source = list_of(tmp_path, b"mount/1.jpg\n")
    with dead_mount(tmp_path / "mount"), pytest.raises(EnvironmentFailed, match="ENOTCONN"):
        LocalFiles(source).read(b"mount/1.jpg")


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _shrink(path: Path) -> None:
    os.truncate(path, 10)


def _rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0" * 8)


@pytest.mark.parametrize("change", [_grow, _shrink, _rewrite])
@pytest.mark.parametrize("after_reads", [0, 1])
def test_a_file_that_changes_while_it_is_read_is_recorded_as_changed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    after_reads: int,
) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(JPEG)
    os.utime(path, (1e9, 1e9))
    really_read, num_reads = os.read, 0

    def read_and_change(descriptor: int, size: int) -> bytes:
        nonlocal num_reads
        if num_reads == after_reads == 0:
            change(path)
        found = really_read(descriptor, size)
        num_reads += 1
        if num_reads == after_reads:
            change(path)
        return found

    monkeypatch.setattr(os, "read", read_and_change)
    found = LocalFiles(open_source(tmp_path)).read(b"x.jpg")
    assert found == Failure("changed", "changed while it was read")
    assert num_reads >= after_reads


def test_a_file_replaced_while_it_is_read_gives_one_whole_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(JPEG)
    really_open = os.open

    def open_and_replace(*arguments: object, **named: object) -> int:
        descriptor = really_open(*arguments, **named)  # type: ignore[arg-type]
        (tmp_path / "new").write_bytes(b"other")
        (tmp_path / "new").replace(path)
        return descriptor

    monkeypatch.setattr("batchclf.images.disk.os.open", open_and_replace)
    found = LocalFiles(open_source(tmp_path)).read(b"x.jpg")
    assert found == JPEG


@pytest.mark.parametrize("num_bytes", [0, 1, 65535, 65536, 65537, 3_000_000])
def test_a_file_of_any_size_is_read_whole(tmp_path: Path, num_bytes: int) -> None:
    content = bytes(number % 251 for number in range(1000)) * (num_bytes // 1000 + 1)
    (tmp_path / "x").write_bytes(content[:num_bytes])
    assert LocalFiles(open_source(tmp_path)).read(b"x") == content[:num_bytes]


def test_reading_leaves_no_descriptor_open(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    (tmp_path / "d").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    source = open_source(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for path in (b"a.jpg", b"d", b"loop", b"fifo", b"gone") * 20:
        LocalFiles(source).read(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_of_more_bytes_than_the_job_allows_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "x.jpg", content=b"12345")
    source = open_source(tmp_path)
    assert LocalFiles(source).read(b"x.jpg", max_bytes=5) == b"12345"
    found = LocalFiles(source).read(b"x.jpg", max_bytes=4)
    assert found == Failure("too_large_bytes", "5 bytes; loader.max_bytes allows 4")


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(2**40)
    assert code(open_source(tmp_path), b"x.jpg") == "too_large_bytes"


# ---- disks and servers that fail -----------------------------------------------------------------

READ = """
import os, sys
from batchclf.images.source import open_source
from batchclf.images.local import LocalFiles
from batchclf.images.store import open_store
from pathlib import Path
folder = Path(sys.argv[1])
source = open_source(folder)
paths = LocalFiles(source).paths()
print(list(paths), paths.left_out.num)
found = LocalFiles(source).read(b"x.jpg")
print(len(found) if isinstance(found, bytes) else (found.code, found.message))
"""


def with_faults(folder: Path, path: Path, fault: str) -> subprocess.CompletedProcess[str]:
    """List and read `folder` in a process whose system calls on `path` fail as `fault` says."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    (call, _, rest) = fault.partition(":")
    trace = ["strace", "-f", "-o", os.devnull, "-P", str(path), "-e", f"trace={call}"]
    if subprocess.run([*trace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace may not trace here")
    return subprocess.run(
        [*trace, "-e", f"inject={call}:{rest}", sys.executable, "-c", READ, folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("call", ["openat", "read"])
@pytest.mark.parametrize("errno_", ["EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "EAGAIN"])
def test_a_file_that_cannot_be_read_twice_is_read_at_the_third_try(
    tmp_path: Path, call: str, errno_: str
) -> None:
    write(tmp_path, "x.jpg")
    done = with_faults(tmp_path, tmp_path / "x.jpg", f"{call}:error={errno_}:when=1..2")
    assert done.stdout.splitlines()[1:] == [str(len(JPEG))], done.stderr


@pytest.mark.parametrize("call", ["openat", "read"])
@pytest.mark.parametrize("errno_", ["EIO", "ESTALE"])
def test_a_file_that_cannot_be_read_three_times_is_recorded_with_the_cause(
    tmp_path: Path, call: str, errno_: str
) -> None:
    write(tmp_path, "x.jpg")
    done = with_faults(tmp_path, tmp_path / "x.jpg", f"{call}:error={errno_}:when=1..3")
    (found,) = done.stdout.splitlines()[1:]
    assert found.startswith("('io_error', 'tried 3 times: ")
    assert f"({errno_})" in found


@pytest.mark.parametrize("call", ["openat", "read"])
def test_a_file_for_which_memory_does_not_suffice_is_recorded_as_oom(
    tmp_path: Path, call: str
) -> None:
    write(tmp_path, "x.jpg")
    done = with_faults(tmp_path, tmp_path / "x.jpg", f"{call}:error=ENOMEM")
    assert done.stdout.splitlines()[1:] == ["('oom', 'out of memory while reading')"]


@pytest.mark.parametrize("errno_", ["EMFILE", "ENFILE"])
def test_a_lack_of_descriptors_is_the_machines_failure_and_not_the_images(
    tmp_path: Path, errno_: str
) -> None:
    write(tmp_path, "x.jpg")
    done = with_faults(tmp_path, tmp_path / "x.jpg", f"openat:error={errno_}")
    assert done.returncode == 1
    assert "batchclf.errors.EnvironmentFailed" in done.stderr
    assert errno_ in done.stderr
    assert "ulimit -n" in done.stderr


@pytest.mark.parametrize("call", ["openat", "getdents64"])
def test_a_folder_that_cannot_be_listed_twice_is_listed_at_the_third_try(
    tmp_path: Path, call: str
) -> None:
    write(tmp_path, "in/1.jpg", "in/.hidden", "x.jpg")
    done = with_faults(tmp_path, tmp_path / "in", f"{call}:error=EIO:when=1..2")
    assert done.stdout.splitlines()[0] == "[b'in/1.jpg', b'x.jpg'] 1"


def test_a_folder_that_fails_three_times_ends_the_listing_which_would_lack_it_for_good(
    tmp_path: Path,
) -> None:
    write(tmp_path, "in/1.jpg", "x.jpg")
    done = with_faults(tmp_path, tmp_path / "in", "getdents64:error=EIO")
    assert done.returncode == 1
    assert f"input: {tmp_path}/in: cannot be read: Input/output error (EIO)" in done.stderr


# ---- lists ---------------------------------------------------------------------------------------


def list_of(tmp_path: Path, content: bytes, name: str = "list.txt") -> Source:
    write(tmp_path, "a.jpg", "b/1.jpg")
    (tmp_path / name).write_bytes(content)
    return open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "expected", "num_left_out"),
    [
        (b"b/1.jpg\na.jpg\n", [b"b/1.jpg", b"a.jpg"], 0),
        (b"b/1.jpg\na.jpg", [b"b/1.jpg", b"a.jpg"], 0),
        (b"b/1.jpg\r\na.jpg\r\n", [b"b/1.jpg", b"a.jpg"], 0),
        (b"\xef\xbb\xbfa.jpg\r\nb/1.jpg\r\n", [b"a.jpg", b"b/1.jpg"], 0),
        (b"\n\n a.jpg\n   \n\t\r\n", [b"a.jpg"], 0),
        (b"a.jpg\nb/1.jpg\na.jpg\na.jpg\n", [b"a.jpg", b"b/1.jpg"], 2),
        (b"caf\xe9.jpg\n", [b"caf\xe9.jpg"], 0),
        ("a\u2028b.jpg\x0b\x85.jpg\n".encode(), ["a\u2028b.jpg\x0b\x85.jpg".encode()], 0),
    ],
    ids=["order", "no end", "CRLF", "BOM", "blank", "duplicates", "not UTF-8", "odd newlines"],
)
def test_a_list_is_taken_line_by_line(
    tmp_path: Path, content: bytes, expected: list[bytes], num_left_out: int
) -> None:
    paths = LocalFiles(list_of(tmp_path, content)).paths()
    for _ in range(2):
        assert list(paths) == expected
        assert paths.left_out.num == num_left_out


@settings(max_examples=200, deadline=None)
@given(numbers=st.lists(st.integers(0, 60)), chunk=st.integers(1, 40))
def test_of_a_path_that_a_list_names_again_the_first_counts(numbers: list[int], chunk: int) -> None:
    paths = [b"%d.jpg" % number for number in numbers]
    with patch.object(lists, "CHUNK_PATHS", chunk):
        marked = [
            pair
            for some, marks in mark_repeated(paths, bytes)
            for pair in zip(some, marks, strict=True)
        ]
    assert [path for path, _ in marked] == paths
    assert [path for path, repeated in marked if not repeated] == list(dict.fromkeys(paths))


def test_the_first_paths_of_a_list_come_before_its_last_lines_are_read(tmp_path: Path) -> None:
    paths = iter(
        LocalFiles(list_of(tmp_path, b'"a.jpg"\n"b.jpg"\n"c.jpg"\n{}\n', "list.jsonl")).paths()
    )
    assert [next(paths), next(paths), next(paths)] == [b"a.jpg", b"b.jpg", b"c.jpg"]
    with pytest.raises(UsageError, match=r"list\.jsonl:4"):
        next(paths)


def test_a_list_with_many_lines_twice_is_taken_without_the_second_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [b"%d.jpg" % number for number in rng.integers(0, 60_000, 100_000)]
    found = LocalFiles(list_of(tmp_path, b"\n".join(paths))).paths()
    assert list(found) == list(dict.fromkeys(paths))
    assert found.left_out.num == len(paths) - len(set(paths))


def test_paths_in_a_list_are_relative_to_its_folder_or_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    write(tmp_path, "elsewhere/2.jpg")
    absolute = os.fsencode(tmp_path / "a.jpg")
    source = list_of(tmp_path, b"a.jpg\n" + absolute + b"\nb/../elsewhere/2.jpg\ngone.jpg\n")
    *there, gone = listed(source)
    assert [read(source, path) for path in there] == [JPEG] * 3
    assert code(source, gone) == "not_found"


def test_a_list_may_name_links_that_lead_anywhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = list_of(tmp_path / "in", b"link.jpg\n")
    write(tmp_path, "out.jpg")
    (tmp_path / "in" / "link.jpg").symlink_to("../out.jpg")
    assert read(source, b"link.jpg") == JPEG


def test_a_jsonl_list_holds_texts_or_objects_with_a_path(tmp_path: Path) -> None:
    lines = [
        '"a.jpg"',
        '{"path": "b/1.jpg", "label": "cat"}',
        "",
        '{"path":"caf\\u00e9.jpg"}',
        '{"path":"caf\\udce9.jpg","path_b64":"Y2Fm6S5qcGc="}',
        '{"path": "a.jpg"}',
    ]
    source = list_of(tmp_path, "\ufeff".encode() + "\r\n".join(lines).encode(), "list.JSONL")
    paths = LocalFiles(source).paths()
    assert list(paths) == [b"a.jpg", b"b/1.jpg", "café.jpg".encode(), b"caf\xe9.jpg"]
    assert paths.left_out.num == 1


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg",
        "[1]",
        "12",
        "null",
        '{"file": "a.jpg"}',
        '{"path": 3}',
        '{"path": ""}',
        '{"path": "a\\u0000.jpg"}',
        '{"path": "\\udce9.jpg"}',
        '{"path_b64": "???"}',
        '{"path_b64": "é"}',
        '{"path_b64": ""}',
        '{"path": "a.jpg"',
    ],
)
def test_a_line_of_jsonl_without_a_usable_path_is_an_error_that_names_the_line(
    tmp_path: Path, line: str
) -> None:
    source = list_of(tmp_path, f'"a.jpg"\n{line}\n'.encode(), "list.jsonl")
    with pytest.raises(UsageError, match=r"list\.jsonl:2"):
        listed(source)


def found_in(source: Source) -> dict[bytes, bytes | str]:
    """What a list names, as a job would list and read it: the content, or the code of a failure."""
    store = open_store(source)
    store.require_images()
    found: dict[bytes, bytes | str] = {}
    for number, entry in enumerate(store.entries()):
        content = store.read(ImageRef(number, *entry), 10_000)
        found[entry.path] = content.code if isinstance(content, Failure) else content
    return found


LISTS: dict[str, tuple[list[str], bytes, list[str], str]] = {
    "quotes": (["a b.jpg", "c.jpg"], b'"a b.jpg"\nc.jpg\n', ["a b.jpg", "c.jpg"], "quotes"),
    "single quotes": (["a b.jpg"], b"'a b.jpg'\r\n", ["a b.jpg"], "quotes"),
    "quotes that are in the name": (['"a.jpg"'], b'"a.jpg"\n', ['"a.jpg"'], ""),
    "blanks behind": (["a.jpg", "b.jpg"], b"a.jpg  \r\nb.jpg\t\r\n", ["a.jpg", "b.jpg"], "blanks"),
    "blanks before": (["a.jpg"], b"   a.jpg\n", ["a.jpg"], "blanks"),
    "a blank that is in the name": (["a.jpg "], b"a.jpg \n", ["a.jpg "], ""),
    "backslashes": (["cats/1.jpg"], b"cats\\1.jpg\r\n", ["cats/1.jpg"], "`\\`"),
    "a backslash that is in the name": (["cats\\1.jpg"], b"cats\\1.jpg\n", ["cats\\1.jpg"], ""),
    "all at once": (["c d/1.jpg"], b'\xef\xbb\xbf "c d\\1.jpg" \r\n', ["c d/1.jpg"], "blanks"),
    "UTF-16": (["é.jpg", "b.jpg"], "é.jpg\r\nb.jpg\r\n".encode("utf-16"), ["é.jpg", "b.jpg"], ""),
    "UTF-16 big-endian": (["é.jpg"], b"\xfe\xff" + "é.jpg".encode("utf-16-be"), ["é.jpg"], ""),
    "UTF-32": (["é.jpg"], "é.jpg\n".encode("utf-32"), ["é.jpg"], ""),
    "Windows-1252": (["café.jpg"], b"caf\xe9.jpg\r\n", ["café.jpg"], "Windows-1252"),
    "JSON objects": (["a.jpg"], b'{"path": "a.jpg", "label": 1}\n', ["a.jpg"], ""),
    "JSON texts": (["a\tb.jpg"], b'"a\\tb.jpg"\n', ["a\tb.jpg"], ""),
    "comments": (["a.jpg"], b"# my cats\n#\na.jpg\n # the end\n", ["a.jpg"], ""),
    "names with a #": (["#1.jpg", "#2.jpg"], b"#1.jpg\n#no\n#2.jpg\n", ["#1.jpg", "#2.jpg"], ""),
}
"""Files that are there, a list of them, the paths it is to give, and what is said of that."""


@pytest.mark.parametrize(("there", "content", "paths", "said"), LISTS.values(), ids=LISTS.keys())
def test_a_list_is_understood_as_it_is_written(
    tmp_path: Path, there: list[str], content: bytes, paths: list[str], said: str
) -> None:
    write(tmp_path, *there)
    write(tmp_path, "list.txt", content=content)
    source = open_source(tmp_path / "list.txt")
    assert found_in(source) == {os.fsencode(path): JPEG for path in paths}
    assert said in "\n".join(source.remarks())
    assert bool(said) == bool(list(source.remarks()))


def test_comments_are_counted(tmp_path: Path) -> None:
    paths = LocalFiles(list_of(tmp_path, b"# one\na.jpg\na.jpg\n# two\n")).paths()
    for _ in range(2):
        assert list(paths) == [b"a.jpg"]
        assert paths.left_out.num == 3
        assert str(paths.left_out) == "2 in comments (# one), 1 repeated (a.jpg)"


@pytest.mark.parametrize(("listed_as", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_the_other_normal_form_are_found_and_recorded_as_the_list_has_them(
    tmp_path: Path, listed_as: NormalForm, on_disk: NormalForm
) -> None:
    name = unicodedata.normalize(listed_as, "fotos/é.jpg").encode()
    write(tmp_path, unicodedata.normalize(on_disk, "fotos/é.jpg"))
    write(tmp_path, "list.txt", content=name + b"\n")
    source = open_source(tmp_path / "list.txt")
    assert found_in(source) == {name: JPEG}
    assert f"normal form {on_disk}" in "\n".join(source.remarks())


def test_what_the_first_lines_show_holds_for_all_lines_and_no_other_is_looked_up(
    tmp_path: Path,
) -> None:
    write(tmp_path, *(f"c/{number}.jpg" for number in range(400)))
    lines = [f"c\\{number}.jpg" for number in range(400)]
    write(tmp_path, "list.txt", content="\n".join([*lines, "c\\gone.jpg"]).encode())
    with patch.object(os.path, "lexists", wraps=os.path.lexists) as looked:
        source = open_source(tmp_path / "list.txt")
        paths = listed(source)
    assert paths == [*(b"c/%d.jpg" % number for number in range(400)), b"c/gone.jpg"]
    assert looked.call_count <= 3 * lists.NUM_TRIED  # in two folders, and with slashes
    assert code(source, b"c/gone.jpg") == "not_found"


def test_paths_relative_to_the_working_folder_are_found_from_wherever_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "work/photos/1.jpg", "work/photos/2.jpg")
    write(tmp_path, "lists/cats.txt", content=b"photos/1.jpg\nphotos/2.jpg\nphotos/gone.jpg\n")
    monkeypatch.chdir(tmp_path / "work")
    source = open_source(tmp_path / "lists" / "cats.txt")
    assert f"relative to {tmp_path / 'work'}, not to its own" in "\n".join(source.remarks())
    entries = list(open_store(source).entries())
    assert [entry.path for entry in entries] == [
        *(b"photos/1.jpg", b"photos/2.jpg", b"photos/gone.jpg"),
    ]
    monkeypatch.chdir("/")
    for again in (source, open_source(tmp_path / "lists" / "cats.txt")):
        store = open_store(again)
        found = [store.read(ImageRef(0, *entry), 10_000) for entry in entries]
        assert found[:2] == [JPEG] * 2
        assert isinstance(found[2], Failure)
        assert found[2].code == "not_found"


def test_the_lists_own_folder_comes_before_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "lists/1.jpg", content=b"own")
    write(tmp_path, "work/1.jpg")
    write(tmp_path, "lists/cats.txt", content=b"1.jpg\n")
    monkeypatch.chdir(tmp_path / "work")
    assert found_in(open_source(tmp_path / "lists" / "cats.txt")) == {b"1.jpg": b"own"}


def test_a_list_of_archives_relative_to_the_working_folder_is_unpacked_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "work/1.jpg")
    with tarfile.open(tmp_path / "work" / "all.tar", "w") as archive:
        archive.add(tmp_path / "work" / "1.jpg", "cats/1.jpg")
    write(tmp_path, "lists/list.txt", content=b"all.tar\n")
    monkeypatch.chdir(tmp_path / "work")
    store = open_store(open_source(tmp_path / "lists" / "list.txt"))
    (entry,) = store.entries()
    assert entry.path == b"all.tar/cats/1.jpg"
    monkeypatch.chdir("/")
    again = open_store(open_source(tmp_path / "lists" / "list.txt"))
    assert again.read(ImageRef(0, *entry), 10_000) == JPEG


def test_a_list_and_a_folder_are_told_apart_by_where_the_lists_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "lists/1.jpg", content=b"another")
    write(tmp_path, "work/1.jpg", "work/2.jpg")
    write(tmp_path, "lists/list.txt", content=b"1.jpg\n2.jpg\n")
    monkeypatch.chdir(tmp_path / "work")
    sources = (open_source(tmp_path / "lists" / "list.txt"), open_source(tmp_path / "lists"))
    joined = open_store(together(sources))
    entries = [entry for entry in joined.entries() if entry.path.endswith(b".jpg")]
    assert [entry.path for entry in entries] == [b"work/1.jpg", b"work/2.jpg", b"lists/1.jpg"]
    monkeypatch.chdir("/")
    found = [joined.read(ImageRef(0, *entry), 10_000) for entry in entries]
    assert found == [JPEG, JPEG, b"another"]


@pytest.mark.parametrize("spec", [".", "b/*", "list"])
def test_the_records_of_an_earlier_job_are_a_list_relative_to_its_input(
    tmp_path: Path, spec: str
) -> None:
    write(tmp_path, "in/b/1.jpg", "in/b/2.jpg")
    write(tmp_path, "in/list.txt", content=b"b/1.jpg\nb/2.jpg\n")
    given = tmp_path / "in" / {"list": "list.txt"}.get(spec, spec)
    paths = listed(open_source(given))
    records = b"".join(b'{"path":"%s","status":"ok","predictions":[]}\n' % one for one in paths)
    for suffix in ("", "-00000-of-00002"):
        run = {"job": {"input": str(given)}}
        write(tmp_path, f"out/run{suffix}.json", content=json.dumps(run).encode())
        write(tmp_path, f"out/predictions{suffix}.jsonl", content=records)
        found = found_in(open_source(tmp_path / "out" / f"predictions{suffix}.jsonl"))
        assert [path for path, content in found.items() if content == JPEG] == [
            path for path in paths if path.endswith(b".jpg")
        ]


@pytest.mark.parametrize("run", [None, b"", b"{}", b'{"job": {"input": 3}}', b'{"job": 1}'])
def test_records_beside_no_run_that_says_its_input_are_refused_with_where_they_were_looked_for(
    tmp_path: Path, run: bytes | None
) -> None:
    write(tmp_path, "out/predictions.jsonl", content=b'{"path":"1.jpg","status":"ok"}\n')
    if run is not None:
        write(tmp_path, "out/run.json", content=run)
    with pytest.raises(NoImagesError, match=r"predictions\.jsonl:1: .*1\.jpg.*not below .*/out"):
        found_in(open_source(tmp_path / "out" / "predictions.jsonl"))


@pytest.mark.parametrize("num_missing", [5, 6])
def test_a_list_of_which_most_files_are_nowhere_is_refused_with_a_path_and_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_missing: int
) -> None:
    monkeypatch.chdir("/")
    write(tmp_path, *(f"{number}.jpg" for number in range(num_missing, 10)))
    write(tmp_path, "list.txt", content="\n".join(f"{n}.jpg" for n in range(10)).encode())
    source = open_source(tmp_path / "list.txt")
    if num_missing == 5:
        assert list(found_in(source).values()).count("not_found") == 5
    else:
        said = rf"list\.txt:1: 6 of the first 10 .* 0\.jpg.* below {tmp_path}, nor below /;"
        with pytest.raises(NoImagesError, match=said):
            found_in(source)


def test_files_of_a_list_that_are_taken_away_do_not_stop_a_job_that_goes_on(
    tmp_path: Path,
) -> None:
    write(tmp_path, "in/0.jpg", *(f"{number}.jpg" for number in range(10)))
    write(tmp_path, "list.txt", content="\n".join(f"{n}.jpg" for n in range(10)).encode())
    sources = (open_source(tmp_path / "list.txt"), open_source(tmp_path / "in"))
    stores = [open_store(source) for source in (sources[0], together(sources))]
    entries = [list(store.entries()) for store in stores]
    for number in range(9):
        (tmp_path / f"{number}.jpg").unlink()
    for store, some in zip(stores, entries, strict=True):
        store.require_listed(some)
    (tmp_path / "9.jpg").unlink()
    for store, some in zip(stores, entries, strict=True):
        with pytest.raises(NoImagesError, match="is what they lie on mounted"):
            store.require_listed(some)


def test_addresses_of_a_list_are_not_looked_for_on_this_machine(tmp_path: Path) -> None:
    write(tmp_path, "in/0.jpg")
    lines = ["https://example.invalid/1.jpg", "s3://nowhere/2.jpg"]
    for name, paths in (("far.txt", lines), ("mixed.txt", [*lines, str(tmp_path / "gone.jpg")])):
        write(tmp_path, name, content="\n".join(paths).encode())
        source = open_source(tmp_path / name)
        for store in (open_store(source), open_store(together((source, open_source(tmp_path))))):
            store.require_listed(list(store.entries())[: len(paths)])


@pytest.mark.parametrize(
    "line",
    [
        *("a.jpg,cat", "a.jpg\tcat", "a.jpg;cat;0.5", "a.jpg 281", "cat,a.jpg", "a b.jpg 3"),
        *('"a.jpg","cat"', "0.5, a.jpg", "a.jpg b.jpg"),
    ],
)
def test_a_table_is_refused_with_its_line_unless_there_is_such_a_file(
    tmp_path: Path, line: str
) -> None:
    write(tmp_path, "a.jpg", "a b.jpg")
    write(tmp_path, "list.txt", content=f"path,label\n{line}\n".encode())
    with pytest.raises(UsageError, match=r"list\.txt:2: .* only b'a( b)?\.jpg' is there"):
        found_in(open_source(tmp_path / "list.txt"))
    write(tmp_path, line)
    assert found_in(open_source(tmp_path / "list.txt"))[line.encode()] == JPEG


@pytest.mark.parametrize("begin", ["file://", "FILE://localhost", "file://localhost"])
def test_a_list_may_name_files_as_file_managers_write_them(tmp_path: Path, begin: str) -> None:
    write(tmp_path, "ü %20+é.jpg", "b.jpg")
    named = [
        f"{begin}{quote(os.fspath(tmp_path))}/{name}" for name in ("%C3%BC%20%2520+é.jpg", "b.jpg")
    ]
    write(tmp_path, "list.txt", content="\r\n".join(named).encode())
    paths = [os.fsencode(tmp_path / name) for name in ("ü %20+é.jpg", "b.jpg")]
    assert found_in(open_source(tmp_path / "list.txt")) == dict.fromkeys(paths, JPEG)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a.jpg\nb/1.jpg\n".encode("utf-16-le"), r"list\.txt:1: found a NUL byte; save .* UTF-8"),
        (b"a.jpg\0b/1.jpg\0", r"list\.txt:1: found a NUL byte.*find -print0"),
        (b"\xff\xfea\0.\0j", r"list\.txt: its first bytes say that it is utf-16 text"),
        (b"a.jpg\nhttps://me:pass@x.org/1.jpg\n", r"list\.txt:2: the address of 'x\.org/1"),
        (
            b"a.jpg\n" * 200 + b"https://x/1.jpg?sig=ab\n",
            r"list\.txt:201: the address of 'https://x/1",
        ),
        (b"a.jpg\nftp://me:pass@x/1.jpg\n", r"list\.txt:2: .* with ftp://; .* s3://, gs://"),
        (b"a.jpg\nhdfs://x/1.jpg\n", r"list\.txt:2: .* begins with hdfs://"),
        (b"a.jpg\nfile://server/1.jpg\n", r"list\.txt:2: .* begins with file://; .* file:///"),
    ],
    ids=[
        *("UTF-16 without a mark", "print0", "UTF-16 cut", "address", "address far below"),
        *("ftp", "hdfs", "another machine's file"),
    ],
)
def test_a_list_that_cannot_be_understood_is_one_error_that_names_the_line(
    tmp_path: Path, content: bytes, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        found_in(list_of(tmp_path, content))


# ---- globs ---------------------------------------------------------------------------------------

FILES = [
    "1.jpg",
    "2.jpg",
    "10.jpg",
    "1.png",
    "a/1.jpg",
    "a/b/1.jpg",
    "a/b/2.png",
    "b.d/c/x-1.jpg",
    "b.d/x_2.jpg",
    "]/^.jpg",
    "c!/!.jpg",
    "é/ü.jpg",
    "+,-/+.jpg",
]
PATTERNS = [
    "*",
    "*.jpg",
    "**",
    "**/*",
    "**/*.jpg",
    "a/**",
    "a/**/*.jpg",
    "**/b/*.png",
    "**/b/**",
    "*/*.jpg",
    "?.jpg",
    "??.jpg",
    "[12].jpg",
    "[!1].jpg",
    "[0-9]*.jpg",
    "[a-b]*/*",
    "b.?/**/x[-_]*.jpg",
    "b.d/x[_-]2.jpg",
    "[]]/*",
    "[!]]/*",
    "[!]a]*/*.jpg",
    "]/[\\^].jpg",
    "]/[^x].jpg",
    "c!/[!x].jpg",
    "c[!a]/*",
    "[[]*",
    "1.[jp][pn]g",
    "1.jpg[",
    "[z-a].jpg",
    "[+--]*.jpg",
    "a[+-9]1.jpg",
    "é/*",
    "?/ü.jpg",
    "[é]/*",
    "é/[ä-ü].jpg",
    "**/**/1.jpg",
    "nothing/*.jpg",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_selects_what_a_shell_would(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, *FILES)
    found = glob.glob(pattern, root_dir=tmp_path, recursive=True)
    expected = {os.fsencode(path) for path in found if (tmp_path / path).is_file()}
    try:
        source = open_source(tmp_path / pattern)
        # Paths are relative to the folders before the first pattern.
        selected = [
            os.path.relpath(os.path.join(source.root, path), os.fsencode(tmp_path))
            for path in listed(source)
        ]
    except NoImagesError:
        selected = []
    assert selected == sorted(expected, key=lambda path: path.split(b"/"))


def test_a_glob_is_relative_to_the_folders_before_its_first_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *FILES)
    monkeypatch.chdir(tmp_path)
    assert listed(open_source(Path("a/b/*.jpg"))) == [b"1.jpg"]
    assert listed(open_source(Path("*.png"))) == [b"1.png"]


def test_a_folder_whose_name_looks_like_a_glob_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "photos [2020]/1.jpg", "photos 2/1.jpg")
    assert listed(open_source(tmp_path / "photos [2020]")) == [b"1.jpg"]


SETS = {
    "*.{jpg,png}": ["*.jpg", "*.png"],
    "{a,b.d}/*.jpg": ["a/*.jpg", "b.d/*.jpg"],
    "{a/b,b.d/c}/*.{jpg,png}": ["a/b/*.jpg", "a/b/*.png", "b.d/c/*.jpg"],
    "**/{1,x{-1,_2}}.jpg": ["**/1.jpg", "**/x-1.jpg", "**/x_2.jpg"],
    "a{,/b}/1.jpg": ["a/1.jpg", "a/b/1.jpg"],
    "{1,1}.{jpg,jpg}": ["1.jpg"],
    "{1.jpg,{}.jpg}": ["1.jpg"],
    "[12].{jpg,p[nx]g}": ["[12].jpg", "1.png"],
    "{gone,2}.jpg": ["2.jpg"],
}
"""Globs with braces, and globs without that select the same together."""


@pytest.mark.parametrize(("pattern", "alike"), SETS.items(), ids=SETS)
def test_braces_stand_for_one_pattern_with_each_option(
    tmp_path: Path, pattern: str, alike: list[str]
) -> None:
    write(tmp_path, *FILES)
    source = open_source(tmp_path / pattern)
    assert source.root == os.fsencode(tmp_path)
    expected = {path for one in alike for path in glob.glob(one, root_dir=tmp_path, recursive=True)}
    assert set(listed(source)) == {os.fsencode(path) for path in expected}
    assert len(listed(source)) == len(expected)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("{a,b}.jpg", "{a,b}.jpg"),
        ("x/{a,b}.jpg", "*/{a,b}.jpg"),
        ("x/{a,b}.jpg", r"*/\{a,b\}.jpg"),
        ("x/{a}.jpg", "*/{a}.jpg"),
        ("x/a,b}.jpg", "*/a,b}.jpg"),
        ("photos [2020]/a.jpg", "photos [2020]/*.jpg"),
        ("x/photos [2020]/a.jpg", "*/photos [2020]/*.jpg"),
        ("what?/{1,2}/a.jpg", "what?/{1,2}/?.jpg"),
        ("x/[a].jpg", "*/[a].jpg"),
    ],
)
def test_a_name_that_is_there_as_it_is_written_is_itself(
    tmp_path: Path, name: str, pattern: str
) -> None:
    write(tmp_path, name, "photos 2/another.jpg")
    source = open_source(tmp_path / pattern)
    (path,) = listed(source)
    assert os.path.join(source.root, path) == os.fsencode(tmp_path / name)


def test_braces_that_stand_for_too_many_patterns_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg")
    with pytest.raises(UsageError, match="more than 1,000 patterns"):
        listed(open_source(tmp_path / ("{a,b}" * 40)))


def test_a_glob_with_braces_opens_the_archives_among_its_files(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "1.jpg", "2.jpg")
    store = open_store(open_source(tmp_path / "{*.jpg,a*.{jpg,tar}}"))
    assert [entry.path for entry in store.entries()] == [b"1.jpg", b"all.tar/2.jpg"]


OTHERS = {
    "*.jpg": (["1.JPG", "2.JPG", "notes.txt"], "3 files", "2 of which end in .JPG", "*.JPG"),
    "a/*.jpg": (["a/1.JPG", "a/2.Jpg"], "2 files", ".JPG", "*.[jJ][pP][gG]"),
    "*.jpeg": (["a/1.jpeg", "2.png"], "2 files", ".", "**/*.jpeg"),
    "?.jpg": (["a/1.JPG"], "1 files", "1 of which end in .JPG", "**/?.JPG"),
    "*.{jpg,png}": (["1.PNG"], "1 files", "PNG", "*.{[jJ][pP][gG],[pP][nN][gG]}"),
    "IMG*.jpg": (["photo.jpg"], "1 files", "1 of which end in .jpg", "*.jpg"),
    "*.gif": (["a/b/1.webp"], "1 files", "1 of which end in .webp", "**/*.webp"),
}
"""Globs that select nothing, with what is there, and what is said of it."""


@pytest.mark.parametrize("pattern", OTHERS)
def test_a_glob_that_selects_nothing_says_what_is_there_and_what_would_select_it(
    tmp_path: Path, pattern: str
) -> None:
    there, num_files, suffix, remedy = OTHERS[pattern]
    write(tmp_path, *there)
    source = open_source(tmp_path / pattern)
    with pytest.raises(NoImagesError) as raised:
        open_store(source).require_images()
    said = str(raised.value)
    assert said.startswith(f"input: {tmp_path / pattern}: found 0 images: no file matches; ")
    assert num_files in said
    assert suffix in said
    assert said.endswith(f"; write {os.fsdecode(source.root)}/{remedy}")
    better = Path(said.rpartition("; write ")[2])
    assert listed(open_source(better))


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["a/notes.txt"], "1 files are below .*, and none has the suffix of an image"),
        ([".git/1.jpg"], "no files are below"),
    ],
)
def test_a_glob_in_a_folder_without_images_says_so(
    tmp_path: Path, there: list[str], said: str
) -> None:
    write(tmp_path, *there)
    with pytest.raises(NoImagesError, match=said):
        open_store(open_source(tmp_path / "*.jpg")).require_images()


def test_a_glob_does_not_look_into_hidden_folders(tmp_path: Path) -> None:
    write(tmp_path, ".git/1.jpg", "a/1.jpg")
    assert listed(open_source(tmp_path / "**" / "*.jpg")) == [b"a/1.jpg"]


# ---- nothing to do -------------------------------------------------------------------------------


def test_a_missing_folder_or_a_glob_below_one_is_no_images(tmp_path: Path) -> None:
    for spec in ("nowhere", "nowhere/*.jpg"):
        with pytest.raises(NoImagesError, match="found 0 images"):
            open_source(tmp_path / spec)


@pytest.mark.parametrize("files", [(), ("a/b/c.txt", "notes.md"), (".hidden/1.jpg",)])
def test_an_input_without_any_image_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    write(tmp_path, *files, content=b"plain text\n")
    with pytest.raises(NoImagesError, match="found 0 images"):
        open_store(open_source(tmp_path)).require_images()


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf", b"a.txt\nb\n"])
def test_a_list_without_any_image_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(NoImagesError, match="found 0 images"):
        open_store(list_of(tmp_path, content)).require_images()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("photos", b"PK\x03\x04", r"as zip archives do: name it \*\.zip"),
        ("photos.rar", b"Rar!\x1a\x07", "as RAR archives do: unpack it"),
        ("photos.csv", b"path,label\n", "give an image, a folder, a .txt or .jsonl list"),
    ],
)
def test_a_file_that_is_no_input_is_told_by_how_it_begins(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NoImagesError, match=told):
        open_store(open_source(tmp_path / name)).require_images()


def test_an_input_that_is_misspelt_is_told_with_the_nearest_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(NoImagesError, match=f"did you mean {tmp_path / 'photos'}\\?"):
        open_source(tmp_path / "phtos")


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg")
    with pytest.raises(NoImagesError, match="found 0 images"):
        open_store(open_source(tmp_path / "*.png")).require_images()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jpg", b""),
        ("without a suffix", JPEG),
        ("photo.dat", encode(picture(8, 8), "WEBP")),
        ("drawing", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ],
)
def test_one_file_with_the_name_or_content_of_an_image_is_enough(
    tmp_path: Path, name: str, content: bytes
) -> None:
    write(tmp_path, "a/notes.txt", content=b"plain text\n")
    write(tmp_path, name, content=content)
    open_store(open_source(tmp_path)).require_images()


def test_looking_for_an_image_does_not_wait_until_a_large_folder_is_sorted(tmp_path: Path) -> None:
    write(tmp_path, *(f"a/{number}.jpg" for number in range(2000)))
    source = open_source(tmp_path)
    tracemalloc.start()
    try:
        open_store(source).require_images()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        ((".hidden/1.jpg", "a/folder.jpg/notes.txt"), "."),
        (("1.jpg", "a/1.png"), "**/*.gif"),
        (("a/b/1.jpg",), "*/*.jpg"),
    ],
)
def test_what_the_input_leaves_out_is_no_image_of_it(
    tmp_path: Path, names: tuple[str, ...], spec: str
) -> None:
    write(tmp_path, *names, content=b"plain text\n")
    with pytest.raises(NoImagesError, match="found 0 images"):
        open_store(open_source(tmp_path / spec)).require_images()


def test_an_image_behind_a_link_to_a_folder_is_enough(tmp_path: Path) -> None:
    write(tmp_path, "in/notes.txt", content=b"plain text\n")
    write(tmp_path, "out/1.jpg")
    (tmp_path / "in" / "link").symlink_to("../out")
    open_store(open_source(tmp_path / "in", allow_outside_links=True)).require_images()


def test_looking_for_an_image_does_not_block_on_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    code_ = "from batchclf.images.source import *; import pathlib, sys\n"
    code_ += "from batchclf.images.store import open_store\n"
    code_ += "open_store(open_source(pathlib.Path(sys.argv[1]))).require_images()"
    done = subprocess.run(
        [sys.executable, "-c", code_, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert "NoImagesError" in done.stderr


def test_a_single_image_is_an_input_of_one(tmp_path: Path) -> None:
    write(tmp_path, "in/a.jpg", "in/b.jpg")
    store = open_store(open_source(tmp_path / "in" / "a.jpg"))
    store.require_images()
    assert list(store.entries()) == [Entry(b"a.jpg")]
    assert store.read(ImageRef(0, b"a.jpg"), 10_000) == JPEG


def test_a_single_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", content=b"path,label")
    with pytest.raises(NoImagesError, match="1 files, none of them an image"):
        open_store(open_source(tmp_path / "a.csv")).require_images()
