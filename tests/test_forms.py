"""Each form of an input that the guide and `init` show, run as it stands there."""

import http.server
import re
import shutil
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.buckets import Server, running_server
from tests.conftest import ROOT, Batchclf, command, read_records
from tests.tiny import DIGITS, tiny_model

GUIDE = (ROOT / "docs" / "images.md").read_text()
FORMS = re.findall(r"^input: (.+?)(?:  +#.*)?$", GUIDE, re.M)
SITE = "https://example.org"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with the ranges that archives are read by."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        span = self.headers.get("Range")
        first, last = re.findall(r"\d+", span) if span else (0, len(data) - 1)
        part = data[int(first) : int(last) + 1]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(part)))
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)


def write_photos(folder: Path) -> None:
    """All that the forms name, below a folder."""
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    images = sorted(path for path in DIGITS.rglob("*") if path.is_file())[:4]
    for number, path in enumerate(images):
        place = (
            folder
            / "photos"
            / ("1.jpg" if number == 0 else f"{['cats', 'dogs'][number % 2]}/{number}.JPG")
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    photos = sorted(path for path in (folder / "photos").rglob("*") if path.is_file())
    names = [path.relative_to(folder / "photos").as_posix() for path in photos]
    (folder / "photos.txt").write_text("".join(f"photos/{name}\n" for name in names))
    (folder / "shards").mkdir()
    for suffix in ("tar", "tar.gz"):
        with tarfile.open(folder / "shards" / f"0000.{suffix}", f"w:{suffix[4:]}") as archive:  # type: ignore[call-overload]
            archive.add(folder / "photos", ".")
    with zipfile.ZipFile(folder / "photos.zip", "w") as packed:
        for path, name in zip(photos, names, strict=True):
            packed.write(path, name)
    contents = [path.read_bytes() for path in photos]
    rows = [{"bytes": data, "path": name} for data, name in zip(contents, names, strict=True)]
    pq.write_table(pa.table({"image": rows}), folder / "train.parquet")
    (folder / "train").mkdir()
    table = pa.table({"image": contents, "thumbnail": contents, "key": names})
    pq.write_table(table, folder / "train" / "0.parquet")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the forms name."""
    folder = tmp_path_factory.mktemp("forms")
    write_photos(folder)
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    """A bucket with the same."""
    with running_server() as found:
        for path in place.rglob("*"):
            if path.is_file():
                key = path.relative_to(place).as_posix()
                found.client.put_object(Bucket="bucket", Key=key, Body=path.read_bytes())
        yield found


@pytest.fixture(scope="module")
def site(place: Path) -> Iterator[str]:
    """A web server with the same."""
    handler = partial(Quiet, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


def test_the_readme_and_init_show_the_same_forms(batchclf: Batchclf, tmp_path: Path) -> None:
    assert len(FORMS) >= 14
    assert batchclf("init", "job.yaml", "-i", "photos", cwd=tmp_path).exit_code == 0
    text = (tmp_path / "job.yaml").read_text()
    assert re.findall(r"^# input: (.+?)(?:  +#.*)?$", text, re.M) == FORMS[1:]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_input_runs_as_it_is_shown(
    place: Path,
    server: Server,
    site: str,
    tmp_path: Path,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    job = place / f"{tmp_path.name}.yaml"
    lines = [f"input: {form.replace(SITE, site)}", f"output: {tmp_path / 'out'}"]
    job.write_text("\n".join([*lines, f"model: {tiny_model(tmp_path)}"]))
    listed = (place / "photos.txt").read_bytes()
    done = subprocess.run(
        command("run", job), input=listed, capture_output=True, check=False, cwd=place
    )
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "out")
    expected = {"photos/1.jpg": 1, "[photos/cats, photos/dogs]": 3}
    assert len(records) == expected.get(form, 4)
    assert {one["status"] for one in records} == {"ok"}
