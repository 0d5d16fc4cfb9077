"""Hostile job files, labels, bundles, caches and names: refused or made harmless, and never run.

What hides in ONNX files is in models/test_onnx_guard.py, code in weights in models/test_weights.py.
"""

import json
import os
import random
import re
import stat
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchclf.cli.streams import printable
from batchclf.errors import EnvironmentFailed, JobFileError, ModelError
from batchclf.models.bundle import Bundle, cache_folder, copy_bundle, open_bundle, private_folder
from batchclf.models.labels import MAX_LABELS_BYTES, read_labels, require_label_count
from batchclf.models.resolve import check_model, resolve_model
from batchclf.runtime.classifier import open_reference
from batchclf.spec.file import load_job, parse_set
from batchclf.spec.job import JobSpec, ModelSpec
from tests.conftest import ROOT, Batchclf
from tests.tiny import tiny_model, write_tiny_job

# ---- job files -----------------------------------------------------------------------------------

HEAD = "input: i\noutput: o\nmodel: {name: resnet18}\n"
MB = 990_000
BOMBS: Mapping[str, tuple[str, str]] = {
    "a long list": ("x: [" + "a," * (MB // 2) + "]", "more than 10,000 keys and values"),
    "many empty lists": ("x: [" + "[]," * (MB // 3) + "]", "more than 10,000 keys"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(80_000)), "more than 10,000 keys"),
    "unknown keys": ("".join(f"k{n}: 1\n" for n in range(4_000)), "and 3,980 more problems"),
    "a number in base 60": ("top_k: " + "1:" * 400_000 + "1", "longer than 8,192 characters"),
    "a float in base 60": ("top_k: " + "1:" * 400 + "1.5", "too large to convert"),
    "a long text": ('input: "' + "\\u0041" * (MB // 6) + '"', "longer than 8,192"),
    "a long key": ("? " + "k" * MB + "\n: 1", "longer than 8,192"),
    "a key that is shown": ("k" * 1000 + ": 1", "unknown key `kkk"),
    "a value that is shown": ("top_k: " + "k" * 8000, "top_k: found 'kkk"),
    "a home that is shown": ("input: ~" + "k" * 8000, "no such user's home"),
    "a long tag": ("x: !" + "t" * MB + " a", "could not determine a constructor"),
    "long keys in long keys": (
        "\n".join(" " * depth + "k" * 999 + ":" for depth in range(15)),
        "unknown key",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_job_file_made_to_cost_time_or_to_flood_the_terminal_is_refused_in_a_page(
    tmp_path: Path, kind: str
) -> None:
    text, expected = BOMBS[kind]
    path = tmp_path / "job.yaml"
    path.write_text(text if text.startswith("input") else HEAD + text)
    started = time.process_time()
    with pytest.raises(JobFileError) as caught:
        load_job(path)
    assert time.process_time() - started < 10, "CPU time; without the limits some take minutes"
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 6000
    assert max(map(len, str(caught.value).splitlines())) < 800


@pytest.mark.parametrize(
    "text",
    [
        "top_k=" + "[" * 30 + "]" * 30,
        "top_k=" + "[" * 60_000,
        "top_k=" + "1:" * 60_000 + "1",
        "top_k=&a [*a]",
        "top_k=!!python/object/apply:os.system ['true']",
        "top_k" + ".a" * 50_000 + "=1",
        "a" * 100_000,
        "top_k='" + "a" * 100_000,
    ],
    ids=lambda text: str(text)[:24],
)
def test_set_takes_no_bombs_either(text: str) -> None:
    with pytest.raises(JobFileError) as caught:
        parse_set(text)
    assert len(str(caught.value)) < 1000


WHOLE = HEAD + "provider: {name: openvino, device_type: GPU}\nloader:\n  workers: 2 # two\n"
PIECES = ("1:" * 300, ".5", "!!int ", "&a ", "*a", "<<: ", "[", "{", "? ", "\n", "\t", "0x", "\x85")


@st.composite
def damaged_jobs(draw: st.DrawFn) -> bytes:
    """The bytes of a good job file with pieces of YAML, or any bytes, put in or over it."""
    found = WHOLE.encode()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        piece = draw(st.binary(max_size=4) | st.sampled_from(PIECES).map(str.encode))
        found = found[:at] + piece + found[at + draw(st.integers(0, 5)) :]
    return found


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One folder for all examples of a property."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(deadline=None, max_examples=400)
@given(data=damaged_jobs())
def test_any_damage_to_a_job_file_is_a_job_file_error_or_no_matter(
    folder: Path, data: bytes
) -> None:
    path = folder / "job.yaml"
    path.write_bytes(data)
    with suppress(JobFileError):
        assert isinstance(load_job(path), JobSpec)


def test_editing_a_job_file_writes_through_no_link_that_waits_for_it(tmp_path: Path) -> None:
    pytest.importorskip("ruamel.yaml")
    from batchclf.spec.edit import write_settings

    victim, job = tmp_path / "victim", tmp_path / "job.yaml"
    victim.write_text("precious")
    job.write_text(HEAD)
    (tmp_path / f".job.yaml.{os.getpid()}").symlink_to(victim)
    write_settings(job, {"batch_size": 7})
    assert victim.read_text() == "precious"
    assert load_job(job).batch_size == 7


# ---- labels --------------------------------------------------------------------------------------


def test_labels_without_end_are_refused(tmp_path: Path) -> None:
    large = tmp_path / "labels.txt"
    with large.open("wb") as file:
        file.truncate(MAX_LABELS_BYTES + 1)
    for path in (large, Path("/dev/zero")):
        with pytest.raises(ModelError, match="larger than"):
            read_labels(path)


def test_a_huge_label_is_not_shown_whole() -> None:
    with pytest.raises(ModelError) as caught:
        require_label_count(("x" * 100_000, "bee"), 1, "labels.txt")
    assert len(str(caught.value)) < 400


# ---- bundles -------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, which is not there yet."""
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return ModelSpec.model_validate(tiny_model(tmp_path))


def resolve(spec: ModelSpec, log: Callable[[str], None] = print) -> Bundle:
    return resolve_model(spec, batch_size=2, open_reference=open_reference, log=log).bundle


@pytest.fixture
def bundle(cache: Path, spec: ModelSpec, tmp_path: Path) -> Path:
    """A good bundle of the user's."""
    found = resolve(spec)
    copy_bundle(found, tmp_path / "own", labels=found.meta.labels, preprocess=found.meta.preprocess)
    return tmp_path / "own"


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    meta = json.loads((bundle / "model.json").read_bytes())
    change(meta)
    (bundle / "model.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "name",
    [
        *("../victim", "/etc/hostname", "..", ".", "", "a/b", "model.onnx/../../victim", ".hidden"),
        *("a\0b", "a\nb", "\x1b[2J", "x" * 300, "a\\b", "\u202egnp.exe"),
    ],
)
def test_a_bundle_names_files_of_its_own_folder_only(
    batchclf: Batchclf, tmp_path: Path, bundle: Path, name: str
) -> None:
    """Or exporting it would read, and write, anywhere."""
    (tmp_path / "victim").write_bytes(b"precious")
    rewritten(bundle, lambda meta: meta["files"].update({name: "0" * 64}))
    with pytest.raises(ModelError, match="not a bundle of this version: files") as caught:
        open_bundle(bundle)
    assert len(str(caught.value)) < 600
    assert "\x1b" not in printable(str(caught.value))


def test_a_bundle_without_a_digest_of_its_model_is_refused(bundle: Path) -> None:
    rewritten(bundle, lambda meta: meta["files"].pop("model.onnx"))
    with pytest.raises(ModelError, match=r"files .*model\.onnx is missing"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.json", "golden.npz"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_bundle_with_a_link_or_a_special_file_in_it_is_refused(
    bundle: Path, name: str, kind: str
) -> None:
    (bundle / name).rename(bundle.parent / "elsewhere")
    if kind == "link":
        (bundle / name).symlink_to("../elsewhere")
    else:
        os.mkfifo(bundle / name)
    with pytest.raises(ModelError, match=rf"own/{name}: is (a symbolic link|no regular file)"):
        open_bundle(bundle)


def test_a_model_json_without_end_is_refused(bundle: Path) -> None:
    with (bundle / "model.json").open("wb") as file:
        file.truncate(65_000_000)
    with pytest.raises(ModelError, match=r"model\.json: larger than 64,000,000 bytes"):
        open_bundle(bundle)


def test_a_model_in_a_bundle_is_looked_at_like_one_of_the_users(
    batchclf: Batchclf, tmp_path: Path, bundle: Path
) -> None:
    """Its digests are right: whoever made the bundle wrote them as well."""
    import hashlib

    import onnx
    from onnx import TensorProto, helper

    good = onnx.load(bundle / "model.onnx")

    def put(change: Callable[[onnx.ModelProto], object]) -> str:
        model = onnx.ModelProto()
        model.CopyFrom(good)
        change(model)
        data = model.SerializeToString()
        (bundle / "model.onnx").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        rewritten(bundle, lambda meta: meta["files"].update({"model.onnx": digest}))
        done = batchclf("validate", write_tiny_job(tmp_path, model={"bundle": str(bundle)}))
        assert done.exit_code == 2, done.stderr
        return done.stderr

    def external(location: str) -> TensorProto:
        found = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
        found.data_location = TensorProto.EXTERNAL
        found.external_data.add(key="location", value=location)
        return found

    custom = helper.make_node("Riddle", ["pixels"], ["x"], domain="com.example")
    assert "com.example:Riddle" in put(lambda model: model.graph.node.append(custom))
    assert "'/etc/hostname'" in put(
        lambda model: model.graph.initializer.append(external("/etc/hostname"))
    )
    (bundle / "more.bin").write_bytes(bytes(4))
    assert "more.bin, of which model.json has no SHA-256" in put(
        lambda model: model.graph.initializer.append(external("more.bin"))
    )


# ---- the cache -----------------------------------------------------------------------------------


def test_the_cache_is_made_for_this_user_alone(cache: Path, spec: ModelSpec) -> None:
    before = os.umask(0)
    try:
        found = resolve(spec)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert found.folder.parent == cache


@pytest.mark.parametrize("which", ["the cache", "the bundle"])
def test_a_cached_model_that_anybody_could_have_written_is_refused(
    batchclf: Batchclf, tmp_path: Path, cache: Path, spec: ModelSpec, which: str
) -> None:
    made = resolve(spec).folder
    (cache if which == "the cache" else made).chmod(0o777)
    job = write_tiny_job(tmp_path)
    for command in ("run", "validate"):
        done = batchclf(command, job)
        assert done.exit_code == 5, done.stderr
        assert f"{cache}" in done.stderr
        assert "may be written by everybody" in done.stderr
        assert "set BATCHCLF_CACHE_DIR to a folder of your own" in done.stderr
    (cache if which == "the cache" else made).chmod(0o770)
    assert check_model(spec)


def test_an_empty_cache_that_anybody_may_write_to_is_refused_before_anything_is_built(
    cache: Path, spec: ModelSpec
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o1777)
    with pytest.raises(EnvironmentFailed, match="may be written by everybody"):
        resolve(spec)
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
@pytest.mark.parametrize("which", ["the cache", "the bundle"])
def test_a_cached_model_of_another_user_is_refused(
    cache: Path, spec: ModelSpec, which: str
) -> None:
    made = resolve(spec).folder
    os.chown(cache if which == "the cache" else made, 12345, -1)
    for use in (resolve, check_model):
        with pytest.raises(EnvironmentFailed, match="belongs to the user with id 12345"):
            use(spec)


def test_a_private_folder_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o750)
    assert private_folder(tmp_path / "shared").stat().st_mode & 0o777 == 0o750


# ---- the output and the input --------------------------------------------------------------------


def test_a_list_in_the_output_is_refused_so_that_no_run_overwrites_it(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    listed = out / "predictions.jsonl"
    listed.write_text(f'"{next((ROOT / "samples" / "digits" / "0").iterdir())}"\n')
    (tmp_path / "link.jsonl").symlink_to(listed)
    for name in (listed, tmp_path / "link.jsonl"):
        job = write_tiny_job(tmp_path, input=str(name))
        for arguments in (("validate", job), ("run", job, "--overwrite")):
            done = batchclf(*arguments)
            assert done.exit_code == 2, done.stderr
            assert f"output: {out} holds the input {name}" in done.stderr
    assert len(listed.read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    ("input_", "output"),
    [
        ("photos", "photos"),
        ("photos", "photos/deep/out"),
        ("photos", "link/out"),
        ("link", "photos/out"),
        ("link", "link"),
        ("photos", "other/../photos/out"),
        ("photos/*", "photos"),
        ("link/**/*", "photos/deep/out"),
    ],
)
def test_an_output_in_the_input_is_refused_whichever_way_it_is_reached(
    batchclf: Batchclf, tmp_path: Path, input_: str, output: str
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("photos")
    job = write_tiny_job(tmp_path, input=str(tmp_path / input_), output=str(tmp_path / output))
    done = batchclf("validate", job)
    assert done.exit_code == 2
    assert "lies inside the input" in done.stderr
    assert list((tmp_path / "photos").iterdir()) == []


def test_a_folder_of_images_in_the_output_is_taken(batchclf: Batchclf, tmp_path: Path) -> None:
    digits = tmp_path / "out" / "digits"
    digits.parent.mkdir()
    digits.symlink_to(ROOT / "samples" / "digits" / "0")
    job = write_tiny_job(tmp_path, input=str(digits))
    assert batchclf("validate", job).exit_code == 0


# ---- names on the terminal -----------------------------------------------------------------------


def test_nothing_that_drives_a_terminal_passes() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = set(printable(everything)) - {"\n"}
    for category in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        assert [one for one in shown if unicodedata.category(one) == category] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x07\r", r"\x1b[2J\x07\r"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u202egnp.exe\u202c", r"\u202egnp.exe\u202c"),
        ("\u2066a\u2067b\u2068c\u2069", r"\u2066a\u2067b\u2068c\u2069"),
        ("\u202a\u202b\u202d\u200e\u200f\u061c", r"\u202a\u202b\u202d\u200e\u200f\u061c"),
        ("a\u2028b\u2029c\u0085d\vd\f", r"a\u2028b\u2029c\x85d\x0bd\x0c"),
        ("\udce9", r"\udce9"),
        ("naïve 日本 é 🙂", "naïve 日本 é 🙂"),
        ("a\nbatchclf: complete", "a\n  batchclf: complete"),
        ("a\n  b\n\nc", "a\n  b\n\n  c"),
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


HOSTILE = "a\x1b[31m\u202egnp\u2028\x9b2J\nbatchclf: complete: all is well"


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize("key", ["input", "model.onnx", "model.labels", "provider.device_type"])
def test_a_hostile_name_reaches_the_terminal_escaped(
    batchclf: Batchclf, tmp_path: Path, key: str, command: str
) -> None:
    job = write_tiny_job(tmp_path)
    options = ["--set", f"{key}={json.dumps(str(tmp_path / HOSTILE))}"]
    done = batchclf(command, job, *options, timeout=60)
    assert done.exit_code in (2, 4), done.stderr
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", done.stderr) is None
    assert all(
        line.startswith(("batchclf: ", " ")) and not line.startswith("batchclf: complete")
        for line in done.stderr.splitlines()
    ), done.stderr


# ---- secrets -------------------------------------------------------------------------------------


def test_nothing_of_the_environment_is_written(batchclf: Batchclf, tmp_path: Path) -> None:
    secret = f"{random.Random(1).getrandbits(64):x}"
    names = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "https_proxy", "BATCHCLF_SECRET")
    environment = dict.fromkeys(names, f"http://user:{secret}@127.0.0.1:1")
    done = batchclf("run", write_tiny_job(tmp_path), "--json", env=environment)
    assert done.exit_code == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "out" / "run.json" in written
    for found in (done.stdout.encode(), done.stderr.encode(), *map(Path.read_bytes, written)):
        assert secret.encode() not in found
