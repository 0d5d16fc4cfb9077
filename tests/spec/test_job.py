"""The job file: what is refused and how it is said, paths, overrides, the JSON Schema."""

import copy
import datetime
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from batchclf.cli import main
from batchclf.errors import JobFileError
from batchclf.spec.file import MAX_JOB_FILE_BYTES, Override, load_job, parse_set
from batchclf.spec.job import JobSpec, RuntimeSpec, recorded_job
from tests.conftest import JOBS, ROOT, Batchclf

MINIMAL: Mapping[str, Any] = {"input": "images", "output": "out", "model": {"name": "resnet18"}}
PREPROCESS: Mapping[str, Any] = {
    "resize": [8, 9],
    "crop": 8,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 1],
    "interpolation": "bicubic",
    "exif_transpose": True,
}
MODELS: tuple[Mapping[str, Any], ...] = (
    {"name": "resnet18", "weights": "none", "labels": "l.txt", "num_classes": 10},
    {"onnx": "my.onnx", "layout": "NCHW", "output_name": "scores", "preprocess": PREPROCESS},
    {"bundle": "exported", "labels": "imagenet", "preprocess": {"resize": 8}},
)
WHOLE: Mapping[str, Any] = {
    **MINIMAL,
    "provider": {"name": "openvino", "device_type": "GPU", "options": {"num_streams": 2}},
    "precision": "fp32",
    "batch_size": 8,
    "top_k": 3,
    "loader": {
        "workers": 2,
        "prefetch": "auto",
        "decode": "fast",
        "max_pixels": 1000,
        "max_bytes": 2000,
        "max_memory": 3000,
        "max_seconds": 2.5,
        "strict": True,
        "sixteen_bit": "stretch",
        "allow_outside_links": True,
    },
    "runtime": {"streams": 1, "threads": "auto", "part": "auto"},
    "stall_timeout": 60,
    "errors": {"max": "2%"},
    "engine": {
        "name": "ray",
        "address": "ray://head:10001",
        "workers": 16,
        "num_cpus": 4,
        "num_gpus": 0.5,
        "resources": {"fast_disk": 1},
        "max_retries": 0,
        "runtime_env": {"env_vars": {"A": "b"}},
        "allow_fewer": True,
        "wait_for_nodes": 600,
    },
}
ALL_KEYS: Mapping[str, object] = {
    "input": "elsewhere",
    "output": "elsewhere",
    "model.name": "resnet34",
    "model.weights": "w.pth",
    "model.labels": "names.txt",
    "model.num_classes": 7,
    "model.transform_input": False,
    "model.activation": "sigmoid",
    "model.onnx": "other.onnx",
    "model.layout": "NHWC",
    "model.output_name": "logits",
    "model.bundle": "other",
    "model.preprocess.resize": 99,
    "model.preprocess.crop": [5, 6],
    "model.preprocess.mean": [0, 0.25, 1],
    "model.preprocess.std": [1, 2, 3],
    "model.preprocess.channels": "bgr",
    "model.preprocess.interpolation": "lanczos",
    "model.preprocess.exif_transpose": True,
    "provider.name": "cuda",
    "provider.device_type": "NPU",
    "provider.devices": [0, 2],
    "provider.options": {"a": 1},
    "provider.allow_fallback": True,
    "precision": "bf16",
    "min_agreement": 0.5,
    "batch_size": 5,
    "top_k": 2,
    "loader.workers": 7,
    "loader.backend": "processes",
    "loader.prefetch": 3,
    "loader.decode": "fast",
    "loader.max_pixels": 5,
    "loader.max_bytes": 6,
    "loader.max_memory": 7,
    "loader.max_seconds": 1.5,
    "loader.strict": True,
    "loader.sixteen_bit": "clip",
    "loader.allow_outside_links": True,
    "runtime.streams": 4,
    "runtime.threads": 3,
    "runtime.part": 4,
    "stall_timeout": 30.5,
    "errors.max": "1.5%",
    "engine.name": "ray",
    "engine.address": "10.0.0.1:6379",
    "engine.workers": 3,
    "engine.num_cpus": 2.5,
    "engine.num_gpus": 2,
    "engine.resources": {"tpu": 1.5},
    "engine.max_retries": 9,
    "engine.runtime_env": {"pip": ["x"]},
    "engine.allow_fewer": True,
    "engine.wait_for_nodes": 7.5,
}
"""Every key of the job file with a value that is not its default."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One folder for all examples of a property."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write(folder: Path, job: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(job if isinstance(job, str) else yaml.safe_dump(job), encoding="utf-8")
    return path


def refusal(path: Path, *sets: str) -> str:
    with pytest.raises(JobFileError) as refused:
        load_job(path, [parse_set(text) for text in sets])
    assert refused.value.exit_code == 2
    return str(refused.value)


def at(spec: object, key: str) -> object:
    for part in key.split("."):
        spec = spec[part] if isinstance(spec, Mapping) else getattr(spec, part)
    return spec


# ---- through the real command --------------------------------------------------------------------

HEAD = b"input: images\noutput: out\nmodel: {name: resnet18}\n"
BOMB = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c]\n" % (one, one, one - 1, one - 1) for one in b"bcdefghij"
)
WRONG_FILES: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "unknown key": (
        HEAD + b"batchsize: 3\n",
        ("job.yaml:4", "unknown key `batchsize`", "did you mean `batch_size`?"),
    ),
    "unknown nested key": (
        HEAD + b"loader:\n  wrokers: 3\n",
        ("job.yaml:5", "unknown key `loader.wrokers`", "did you mean `workers`?", "prefetch"),
    ),
    "misspelt provider": (
        HEAD + b"provider: cdua\n",
        ("job.yaml:4", "provider", "'cdua'", "'cpu', 'cuda' or 'openvino'", "mean `cuda`?"),
    ),
    "negative batch size": (
        HEAD + b"batch_size: -1\n",
        ("job.yaml:4", "batch_size", "found -1", "greater than or equal to 1"),
    ),
    "text as a number": (HEAD + b"top_k: five\n", ("job.yaml:4", "top_k", "'five'", "integer")),
    "aliases to a bomb": (BOMB + HEAD, ("job.yaml:2", "aliases", "not allowed")),
    "duplicate key": (HEAD + b"top_k: 1\ntop_k: 2\n", ("job.yaml:5", "duplicate key `top_k`")),
    "duplicate nested key": (
        HEAD + b"loader:\n  workers: 1\n  workers: 2\n",
        ("job.yaml:6", "duplicate key `workers`"),
    ),
    "binary": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), ("not UTF-8", "0x89")),
    "control characters": (b"input: a\0b\n", ("not a text file", "0x0", "offset 8")),
    "not UTF-8": (b"input: caf\xe9\n", ("not UTF-8", "0xe9", "offset 10")),
    "missing": (None, ("cannot be read", "No such file", "batchclf init")),
    "empty": (b"", ("an empty file", "input, output, model")),
    "comments only": (b"# nothing yet\n", ("an empty file",)),
    "list": (b"- input\n- output\n", ("found a list", "a mapping")),
    "scalar": (b"resnet50\n", ("found a str", "a mapping")),
    "too deep": (
        HEAD + b"loader: " + b"[" * 200 + b"]" * 200 + b"\n",
        ("job.yaml:4", "nested deeper than 20 levels"),
    ),
    "too deep beyond any stack": (HEAD + b"loader: " + b"[" * 100_000, ("nested deeper",)),
    "larger than 1 MB": (HEAD + b"#" * MAX_JOB_FILE_BYTES, ("larger than 1 MB",)),
    "python tag": (
        HEAD + b"top_k: !!python/object/apply:os.system ['touch pwned']\n",
        ("job.yaml:4", "python/object/apply:os.system"),
    ),
    "two documents": (HEAD + b"---\n" + HEAD, ("job.yaml:4", "another document")),
    "not YAML": (HEAD + b"top_k: [1\nx: }\n", ("job.yaml:5", "not a valid job file")),
    "tabs": (b"input: i\noutput: o\nmodel:\n\tname: x\n", ("job.yaml:4", "not with tabs")),
    "no space after a colon": (
        b"input:i\noutput: o\nmodel: {name: resnet18}\n",
        ("job.yaml:2", "write `key: value`, with a space after the colon"),
    ),
    "a template that nobody filled in": (
        b"input: {{ folder }}\noutput: o\n",
        ("job.yaml:1", "fill the template in"),
    ),
    "a Windows path in double quotes": (
        b'input: "D:\\images"\noutput: o\nmodel: {name: resnet18}\n',
        ("job.yaml:1", "write the path in single quotes"),
    ),
    "a sign that begins no value": (HEAD + b"top_k: @5\n", ("job.yaml:4", "in quotes")),
    "a GPU as people call it": (HEAD + b"provider: gpu\n", ("job.yaml:4", "mean `cuda`?")),
    "a precision as PyTorch calls it": (HEAD + b"precision: float16\n", ("mean `fp16`?",)),
    "a provider in capitals": (HEAD + b"provider: OpenVINO\n", ("mean `openvino`?",)),
    "a key of which several begin so": (
        HEAD + b"provider: {name: openvino, device: GPU}\n",
        ("job.yaml:4", "did you mean `device_type` or `devices`?"),
    ),
    "a number in quotes": (
        HEAD + b"batch_size: '16'\n",
        ("job.yaml:4", "batch_size", "found '16'", "without quotes"),
    ),
    "a name instead of a mapping": (
        b"input: i\noutput: o\nmodel: resnet18\n",
        ("job.yaml:3", "model", "write {name: 'resnet18'}"),
    ),
    "a limit instead of a mapping": (HEAD + b"errors: 2%\n", ("write {max: '2%'}",)),
    "no keys": (b"{}\n", ("`input` is missing", "`output` is missing", "`model` is missing")),
    "two models": (
        b"input: i\noutput: o\nmodel: {name: resnet18, onnx: a.onnx}\n",
        ("job.yaml:3", "model", "exactly one of name, onnx and bundle", "name and onnx"),
    ),
    "no model": (b"input: i\noutput: o\nmodel: {labels: l.txt}\n", ("exactly one", "none of them")),
    "weights with onnx": (
        b"input: i\noutput: o\nmodel: {onnx: a.onnx, weights: b.pth}\n",
        ("job.yaml:3", "`weights` goes with `name`, not with `onnx`"),
    ),
    "layout with name": (
        b"input: i\noutput: o\nmodel: {name: resnet18, layout: NCHW}\n",
        ("`layout` goes with `onnx`, not with `name`",),
    ),
    "device of the cpu": (
        HEAD + b"provider: {name: cpu, device_type: GPU}\n",
        ("job.yaml:4", "`device_type` goes with openvino only"),
    ),
    "GPUs of OpenVINO": (
        HEAD + b"provider: {name: openvino, devices: [0]}\n",
        ("job.yaml:4", "`devices` goes with cuda only"),
    ),
    "the same GPU twice": (
        HEAD + b"provider: {name: cuda, devices: [1, 1]}\n",
        ("job.yaml:4", "provider.devices", "each GPU once"),
    ),
    "no GPU": (
        HEAD + b"provider: {name: cuda, devices: []}\n",
        ("job.yaml:4", "provider.devices"),
    ),
    "agreement in per cent": (
        HEAD + b"min_agreement: 93\n",
        ("job.yaml:4", "min_agreement", "93", "less than or equal to 1"),
    ),
    "an engine that is not there": (
        HEAD + b"engine: rai\n",
        ("job.yaml:4", "engine", "'rai'", "`ray`"),
    ),
    "a key of another engine": (
        HEAD + b"engine: {name: local, workers: 3}\n",
        ("job.yaml:4", "engine", "`workers` goes with ray only"),
    ),
    "a bucket that Ray's workers do not write to": (
        HEAD.replace(b"output: out", b"output: s3://bucket/out") + b"engine: ray\n",
        ("job.yaml", "a folder as `output` with engine ray"),
    ),
    "GPUs that Ray deals out": (
        HEAD + b"engine: ray\nprovider: {name: cuda, devices: [1]}\n",
        ("job.yaml", "no `provider.devices` with engine ray", "engine.num_gpus"),
    ),
}


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_job_file_ends_with_2_and_a_message_that_says_where_and_what(
    batchclf: Batchclf, tmp_path: Path, kind: str, command: str
) -> None:
    content, expected = WRONG_FILES[kind]
    job = tmp_path / "job.yaml"
    if content is not None:
        job.write_bytes(content)
    done = batchclf(command, job, timeout=30)
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("batchclf: ")
    assert len(done.stderr) < 1500
    for text in (str(job), *expected):
        assert text in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"job.yaml"}
    assert not (ROOT / "pwned").exists()


def test_a_folder_given_as_the_job_is_told_how_it_becomes_one(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    refused = batchclf("run", tmp_path)
    assert refused.exit_code == 2
    assert f"{tmp_path}: is a folder" in refused.stderr
    assert f"`batchclf init job.yaml -i {tmp_path}` writes one" in refused.stderr


def test_a_job_file_that_is_not_there_is_told_with_the_nearest_that_is(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write(tmp_path, dict(MINIMAL))
    assert f"did you mean {job}?" in batchclf("run", tmp_path / "jbo.yaml").stderr


@pytest.mark.parametrize("command", ["run", "validate"])
def test_an_input_without_images_ends_with_2_and_names_the_folder(
    batchclf: Batchclf, tmp_path: Path, command: str
) -> None:
    job = write(tmp_path, dict(MINIMAL))
    missing = batchclf(command, job)
    assert missing.exit_code == 2
    assert f"{tmp_path / 'images'}: found 0 images" in missing.stderr
    (tmp_path / "images").mkdir()
    empty = batchclf(command, job)
    assert empty.exit_code == 2
    assert f"{tmp_path / 'images'}: found 0 images" in empty.stderr
    assert "Traceback" not in missing.stderr + empty.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", "top_k"),
        ("--set", "=3"),
        ("--set", "top_k=[1"),
        ("--set", "top_k=*a"),
        ("--set", "topk=3"),
        ("--set", "foo.bar=3"),
        ("--set", "model.name.x=3"),
        ("--set", "a..b=3"),
        ("--set", "top_k=2024-99-99"),
        ("--set", "top_k=!!int ''"),
        ("--set", "input=~nobody-of-this-name/x"),
        ("-b", "0"),
        ("-b", "many"),
        ("--provider", "tpu"),
        ("--precision", "fp8"),
        ("--top-k", "0"),
        ("--limit", "0"),
        ("--no-such-option",),
    ],
)
def test_a_wrong_option_ends_with_2_and_is_named(
    batchclf: Batchclf, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = batchclf("run", write(tmp_path, dict(MINIMAL)), *arguments)
    assert done.exit_code == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert arguments[0] in done.stderr or f"'{arguments[0]}'" in done.stderr
    if arguments[0] == "--set":
        assert f"--set {arguments[1]}" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["input", "output", "model.labels", "model.weights"])
@pytest.mark.parametrize("value", ['"a\\0b.pth"', '"\\ud800.pth"'])
def test_a_path_that_no_file_can_have_ends_with_2(
    batchclf: Batchclf, tmp_path: Path, key: str, value: str
) -> None:
    job = {**MINIMAL, "input": str(ROOT / "samples" / "digits")}
    done = batchclf("run", write(tmp_path, job), "--set", f"{key}={value}")
    assert done.exit_code == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert key in done.stderr


# ---- any junk ------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "cpu", "none", "imagenet", "2%", "101%", "~", "~nobody/x", "a\0b"])
    | st.dates()
    | st.datetimes(timezones=st.just(datetime.UTC))
    | st.binary(max_size=8)
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.integers() | st.none(), inner, max_size=3)
        | st.sets(st.text(max_size=3), max_size=3)
    ),
    max_leaves=6,
)


def paths_in(data: object, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if prefix:
        yield prefix
    items: Any = ()
    if isinstance(data, Mapping):
        items = data.items()
    elif isinstance(data, list):
        items = enumerate(data)
    for key, value in items:
        yield from paths_in(value, (*prefix, key))


@st.composite
def junk_jobs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid job of which one or two values, wherever they stand, are junk."""
    job = {**copy.deepcopy(dict(WHOLE)), "model": copy.deepcopy(draw(st.sampled_from(MODELS)))}
    for _ in range(draw(st.integers(1, 2))):
        *parents, leaf = draw(st.sampled_from(list(paths_in(job))))
        node: Any = job
        for parent in parents:
            node = node[parent]
        node[leaf] = draw(JUNK)
    return job


def outcome(path: Path) -> JobSpec | str:
    try:
        return load_job(path)
    except JobFileError as error:
        return str(error)


def dumped(job: object) -> str:
    """YAML; numbers that Python would not print in decimal are written in hexadecimal."""

    def number(dumper: yaml.SafeDumper, value: int) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:int", hex(value))

    class Dumper(yaml.SafeDumper):
        """No aliases: they are refused."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_representer(int, number)
    return yaml.dump(job, Dumper=Dumper)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(job=junk_jobs())
def test_any_value_replaced_by_junk_is_refused_as_a_job_file_error_or_taken(
    folder: Path, job: dict[str, Any]
) -> None:
    found = outcome(write(folder, dumped(job)))
    if isinstance(found, str):
        assert str(folder / "job.yaml") in found
        assert max(map(len, found.splitlines())) < 600
    else:
        # What is taken goes into run.json.
        orjson.dumps(found.model_dump(mode="json"))


YAML_BITS = st.sampled_from(
    [
        *("{", "}", "[", "]", ": ", ", ", "- ", "? ", "&a ", "*a ", "\n", " ", "\t", "''", '"'),
        *("!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap "),
        *("!!pairs ", "!!str ", "<<: ", "input", "model", "0x", "1", ".inf", "|", ">"),
        *("%YAML 1.1", "---", "..."),
    ]
)


@settings(deadline=None, max_examples=150)
@given(text=st.lists(YAML_BITS, max_size=12).map("".join))
def test_any_text_of_yaml_signs_is_a_job_file_error(folder: Path, text: str) -> None:
    assert isinstance(outcome(write(folder, text)), str)


@settings(deadline=None, max_examples=50)
@given(data=st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_any_bytes_are_a_job_file_error(folder: Path, data: bytes) -> None:
    path = folder / "job.yaml"
    path.write_bytes(data)
    assert isinstance(outcome(path), str)


@pytest.mark.parametrize(
    "value",
    [
        *("!!int ''", "!!int x", "!!float ''", "!!float x", "!!bool x", "!!timestamp x"),
        *("!!binary x", "2024-99-99", "0x", "0o9", "1" * 5000, "0x" + "f" * 5000),
        *("!!omap [a]", "!!pairs {a: 1}", "!!set [a]"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_scalar_that_its_type_does_not_take_is_refused(tmp_path: Path, value: str) -> None:
    job = write(tmp_path, f"{HEAD.decode()}top_k: {value}\n")
    assert str(job) in refusal(job)
    with pytest.raises(JobFileError, match="--set top_k="):
        load_job(write(tmp_path, dict(MINIMAL)), [parse_set(f"top_k={value}")])


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("batch_size", True, "integer"),
        ("batch_size", 2.0, "integer"),
        ("batch_size", 65537, "less than or equal to 65536"),
        ("top_k", 0, "greater than or equal to 1"),
        ("precision", "fp8", "'fp32', 'fp16', 'bf16' or 'int8'"),
        ("input", 3, "a path, as text"),
        ("input", "", "a path, as text"),
        ("input", None, "a path, as text"),
        ("loader", None, "a mapping with workers, backend"),
        ("loader.workers", 0, "`auto` or a whole number"),
        ("loader.workers", "all", "`auto` or a whole number"),
        ("loader.decode", "exactly", "'exact' or 'fast'; did you mean `exact`?"),
        ("loader.allow_outside_links", "yes", "boolean"),
        ("runtime.streams", 1.5, "`auto` or a whole number"),
        ("runtime.part", 0, "`auto` or a whole number"),
        ("errors.max", -1, "null (no limit), a count"),
        ("errors.max", "200%", "null (no limit), a count"),
        ("errors.max", "two", "null (no limit), a count"),
        ("errors.max", True, "null (no limit), a count"),
        ("model", "resnet18", "a mapping with name, weights"),
        ("model.name", "", "at least 1 character"),
        ("model.num_classes", 0, "greater than or equal to 1"),
        ("model.preprocess.resize", 0, "from 1 to 8192"),
        ("model.preprocess.crop", [1, 2, 3], "[height, width]"),
        ("model.preprocess.mean", [1, 2], "three numbers"),
        ("model.preprocess.std", [1, 0, 1], "above zero"),
        ("model.preprocess.interpolation", "cubic", "mean `bicubic`?"),
        ("provider", 3, "a mapping with name"),
        ("provider.device_type", 3, "string"),
        ("engine", None, "a mapping with name"),
        ("engine.address", "somewhere", "`auto`, `local`, HOST:PORT or ray://HOST:PORT"),
        ("engine.workers", 0, "`auto` or a whole number from 1 to 100000"),
        ("engine.num_cpus", 0, "greater than 0"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_key_found_and_allowed(
    tmp_path: Path, key: str, value: object, allowed: str
) -> None:
    text = refusal(write(tmp_path, dict(MINIMAL)), f"{key}={json.dumps(value)}")
    assert text.startswith(f"--set {key}=")
    assert allowed in text
    if key != "model.preprocess.std":
        assert f"{key}: found " in text
        assert repr(value) in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (  # MMPretrain, PaddleClas
            {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
            "mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]",
        ),
        (  # Caffe: nothing is divided
            {"mean": [103.939, 116.779, 123.68], "std": [1, 1, 1]},
            "mean: [0.407604, 0.457957, 0.48502], std: [0.00392157, 0.00392157, 0.00392157]",
        ),
        ({"mean": [123.675, 116.28, 103.53]}, "mean: [0.485, 0.456, 0.406]"),
        ({"mean": [0], "std": [255]}, "mean: [0, 0, 0], std: [1, 1, 1]"),
        (
            {"mean": [123.675, 116.28, 103.53], "std": [0.229, 0.224, 0.225]},
            "mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]",
        ),
        ({"std": [58.395, 57.12, 57.375]}, "std: [0.229, 0.224, 0.225]"),
        ({"mean": [127.5], "std": [127.5]}, "mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]"),
    ],
)
def test_mean_and_std_of_pixels_in_0_to_255_are_refused_with_what_to_write(
    tmp_path: Path, given: dict[str, object], ours: str
) -> None:
    model = {"onnx": "my.onnx", "preprocess": {"resize": 256, **given}}
    text = refusal(write(tmp_path, {**MINIMAL, "model": model}))
    assert "these are of pixels in 0..255" in text
    assert text.endswith(f"write {ours}")
    assert len(text.splitlines()) == 1


def test_one_number_of_mean_and_std_is_that_of_every_channel(tmp_path: Path) -> None:
    preprocess = {"resize": 28, "mean": [0.1307], "std": 0.3081}
    job = load_job(write(tmp_path, {**MINIMAL, "model": {"onnx": "a", "preprocess": preprocess}}))
    assert job.model.preprocess is not None
    assert job.model.preprocess.mean == (0.1307,) * 3
    assert job.model.preprocess.std == (0.3081,) * 3


def test_every_problem_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, {**MINIMAL, "topk": 3, "batch_size": 0, "errors": {"mx": 1}}))
    assert len(text.splitlines()) == 3
    for key in ("topk", "batch_size", "errors.mx"):
        assert key in text


def test_an_option_of_a_provider_that_is_no_scalar_is_told_in_one_line(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, dict(MINIMAL)), "provider.options.x=[1]")
    assert len(text.splitlines()) == 1


# ---- paths and overrides -------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_and_overrides_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, cwd = tmp_path / "jobs", tmp_path / "cwd"
    jobs.mkdir()
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    model = {"name": "resnet18", "weights": "w/x.pth", "labels": "labels.txt"}
    job = write(jobs, {"input": "../images", "output": "./out", "model": model})
    relative = Path(os.path.relpath(job))
    for path in (job, relative):
        spec = load_job(path)
        assert spec.input == tmp_path / "images"
        assert spec.output == jobs / "out"
        assert spec.model.weights_path == jobs / "w" / "x.pth"
        assert spec.model.labels_path == jobs / "labels.txt"
    spec = load_job(job, [parse_set("input=here/*.jpg"), parse_set("model.labels=names")])
    assert spec.input == cwd / "here" / "*.jpg"
    assert spec.model.labels_path == cwd / "names"
    spec = load_job(job, [Override("output", "/abs/../out", "--output")])
    assert spec.output == Path("/out")


def test_names_that_are_no_paths_stay_as_they_are(tmp_path: Path) -> None:
    model = {"name": "resnet18", "weights": "IMAGENET1K_V1", "labels": "imagenet"}
    spec = load_job(write(tmp_path, {**MINIMAL, "model": model}))
    assert (spec.model.weights, spec.model.weights_path) == ("IMAGENET1K_V1", None)
    assert (spec.model.labels, spec.model.labels_path) == ("imagenet", None)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    spec = load_job(write(tmp_path, {**MINIMAL, "input": "~/photos"}))
    assert spec.input == tmp_path / "home" / "photos"


def leaves(spec: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in spec.model_fields.items():
        inner = [one for one in _classes(info.annotation) if issubclass(one, BaseModel)]
        if inner:
            yield from leaves(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _classes(annotation: Any) -> Iterator[type[Any]]:
    if isinstance(annotation, type):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        if isinstance(inner, type):
            yield inner


def test_the_table_of_keys_holds_every_key_of_the_job_file() -> None:
    assert set(ALL_KEYS) == set(leaves(JobSpec))


@pytest.mark.parametrize("key", ALL_KEYS)
def test_every_key_of_the_job_file_can_be_overridden(tmp_path: Path, key: str) -> None:
    value = ALL_KEYS[key]
    job: dict[str, Any] = copy.deepcopy(dict(MINIMAL))
    if key in ("model.onnx", "model.bundle"):
        job["model"] = {key.removeprefix("model."): "first"}
    elif key in ("model.layout", "model.output_name"):
        job["model"] = {"onnx": "my.onnx"}
    elif key == "provider.device_type":
        job["provider"] = "openvino"
    elif key == "provider.devices":
        job["provider"] = "cuda"
    elif key.startswith("engine.") and key != "engine.name":
        job["engine"] = "ray"
    path = write(tmp_path, job)
    found = at(load_job(path, [parse_set(f"{key}={json.dumps(value)}")]), key)
    if isinstance(found, Path) or key in ("model.weights", "model.labels"):
        assert str(found) == str(Path.cwd() / str(value))
    else:
        assert json.loads(json.dumps(found)) == value


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["provider=cuda"], {"name": "cuda", "options": {}}),
        (["provider.options.x=1"], {"name": "cpu", "options": {"x": 1}}),
        (
            ["provider=openvino", "provider.device_type=GPU.1", "provider.options.num_streams=4"],
            {"name": "openvino", "device_type": "GPU.1", "options": {"num_streams": 4}},
        ),
        (
            ["provider={name: cuda, options: {a: b}}", "provider.options.c=true"],
            {"name": "cuda", "options": {"a": "b", "c": True}},
        ),
    ],
)
def test_a_provider_given_as_a_name_takes_further_keys(
    tmp_path: Path, sets: list[str], expected: dict[str, Any]
) -> None:
    job = write(tmp_path, {**MINIMAL, "provider": "cpu"})
    spec = load_job(job, [parse_set(text) for text in sets])
    assert spec.provider.model_dump(exclude_defaults=True) == {
        key: value for key, value in expected.items() if value
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=3", 3),
        ("a=3.5", 3.5),
        ("a=true", True),
        ("a=null", None),
        ("a=", None),
        ("a=x=y", "x=y"),
        ("a='3'", "3"),
        ("a=[1, 2]", [1, 2]),
        (" a = {b: c}", {"b": "c"}),
        ("a=2%", "2%"),
    ],
)
def test_the_value_of_set_is_yaml(text: str, value: object) -> None:
    override = parse_set(text)
    assert (override.key, override.value) == ("a", value)


def test_the_last_of_two_overrides_holds(tmp_path: Path) -> None:
    job = write(tmp_path, dict(MINIMAL))
    assert load_job(job, [parse_set("top_k=2"), parse_set("top_k=3")]).top_k == 3


def test_direct_options_override_the_file_and_set(batchclf: Batchclf, tmp_path: Path) -> None:
    digits = ROOT / "samples" / "digits"
    job = write(tmp_path, {**MINIMAL, "provider": {"name": "cuda", "options": {"device_id": 1}}})
    options = ("-b", "0", "--top-k", "0", "--provider", "tpu", "--precision", "fp1")
    done = batchclf("run", job, *options, "--set", "batch_size=9", "-i", digits)
    assert done.exit_code == 2
    for text in (
        "--batch-size 0: batch_size: found 0",
        "--top-k 0: top_k: found 0",
        "--provider tpu: provider: found 'tpu'",
        "--precision fp1: precision: found 'fp1'",
    ):
        assert text in done.stderr


def test_a_minimal_job_has_the_defaults_of_the_contract(tmp_path: Path) -> None:
    spec = load_job(write(tmp_path, dict(MINIMAL)))
    assert (spec.provider.name, spec.precision, spec.top_k) == ("cpu", "fp32", 5)
    assert (spec.model.weights, spec.model.labels, spec.model.preprocess) == ("DEFAULT", None, None)
    assert (spec.loader.workers, spec.loader.prefetch, spec.loader.decode) == (
        "auto",
        "auto",
        "exact",
    )
    assert spec.runtime == RuntimeSpec(streams="auto", threads="auto", part="auto")
    assert (spec.errors.max, spec.engine.name) == (None, "local")


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.replace(b"\n", b"\r\n"))
    assert load_job(path).model.name == "resnet18"


def test_a_spec_cannot_be_changed(tmp_path: Path) -> None:
    spec = load_job(write(tmp_path, dict(MINIMAL)))
    with pytest.raises(ValueError, match="frozen"):
        spec.top_k = 9  # type: ignore[misc]


# ---- the JSON Schema -----------------------------------------------------------------------------


class Schema:
    """What `batchclf schema` prints, and what it says of a job."""

    def __init__(self, document: dict[str, Any]) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.Draft202012Validator.check_schema(document)
        self.document = document
        self._validator = jsonschema.Draft202012Validator(document)

    def errors(self, job: object) -> list[str]:
        return [error.message for error in self._validator.iter_errors(job)]


@pytest.fixture(scope="module")
def schema() -> Schema:
    printed = CliRunner().invoke(main, ["schema"])
    assert printed.exit_code == 0
    document = json.loads(printed.stdout)
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    return Schema(document)


def plain(job: object) -> Any:
    """A job as JSON has it: no dates, bytes or sets, no numbers that JSON lacks."""
    return json.loads(json.dumps(job, allow_nan=False))


@pytest.mark.parametrize("model", MODELS, ids=["name", "onnx", "bundle"])
def test_the_schema_takes_whole_and_minimal_jobs(schema: Schema, model: Mapping[str, Any]) -> None:
    for job in (WHOLE, MINIMAL, {**WHOLE, "provider": "cuda", "engine": "local"}):
        assert schema.errors({**plain(job), "model": plain(model)}) == []


JSON_JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**6)
    | st.sampled_from([0.5, 1.25, "", "a", "auto", "cpu", "cuda", "2%", "101%", "2%%", "local"])
    | st.sampled_from(["fp16", "fast", "NCHW", "bicubic", "imagenet", 8192, 8193, 65536, 65537]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "max", "x", "options"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=250)
@given(
    model=st.sampled_from(MODELS), where=st.integers(0, 10**6), junk=JSON_JUNK, add=st.booleans()
)
def test_the_schema_takes_and_refuses_what_the_command_does(
    folder: Path, schema: Schema, model: Mapping[str, Any], where: int, junk: Any, add: bool
) -> None:
    job = plain({**WHOLE, "model": model})
    places = list(paths_in(job))
    *parents, leaf = places[where % len(places)]
    node: Any = job
    for parent in parents:
        node = node[parent]
    if add and isinstance(node, dict):
        node["extra"] = junk
    else:
        node[leaf] = junk
    found = outcome(write(folder, json.dumps(job)))
    errors = schema.errors(job)
    assert isinstance(found, str) == bool(errors), (job, found, errors)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("input", "ftp://host/photos"),
        ("output", "https://host/out"),
        ("engine", {"name": "ray", "address": ""}),
        ("engine", {"name": "ray", "address": "head"}),
    ],
)
def test_the_schema_and_the_command_refuse_the_same_addresses(
    tmp_path: Path, schema: Schema, where: str, value: object
) -> None:
    job = {**MINIMAL, where: value}
    assert isinstance(outcome(write(tmp_path, json.dumps(plain(job)))), str)
    assert schema.errors(plain(job))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("input", "file:///photos"),
        ("input", ["photos", "https://host/photos.tar"]),
        ("output", "s3://bucket/out"),
        ("output", "a:b"),
        ("engine", {"name": "ray", "address": "ray://head-1.example:10001"}),
        ("engine", {"name": "ray", "address": "[::1]:6379"}),
    ],
)
def test_the_schema_and_the_command_take_the_same_addresses(
    tmp_path: Path, schema: Schema, where: str, value: object
) -> None:
    job = {**MINIMAL, where: value}
    assert not isinstance(outcome(write(tmp_path, json.dumps(plain(job)))), str)
    assert schema.errors(plain(job)) == []


@pytest.mark.parametrize(
    "kind",
    [
        *("two models", "no model", "weights with onnx", "device of the cpu"),
        *("GPUs that Ray deals out", "a bucket that Ray's workers do not write to"),
    ],
)
def test_the_schema_refuses_keys_that_do_not_go_together(schema: Schema, kind: str) -> None:
    content, _ = WRONG_FILES[kind]
    assert content is not None
    assert schema.errors(yaml.safe_load(content))


def test_the_schema_describes_its_keys(schema: Schema) -> None:
    properties = schema.document["properties"]
    assert set(properties) == {name.split(".")[0] for name in ALL_KEYS}
    assert properties["input"]["description"]


@pytest.mark.parametrize("job", JOBS, ids=lambda path: str(path.name))
def test_the_jobs_that_come_with_the_project_are_valid(schema: Schema, job: Path) -> None:
    load_job(job)
    assert schema.errors(yaml.safe_load(job.read_text())) == []


def test_set_adds_keys_to_the_provider_that_is_named_on_the_command_line(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    job = write(tmp_path, {**MINIMAL, "provider": {"name": "openvino", "device_type": "GPU"}})
    done = batchclf("run", job, "--set", "provider.devices=[0, 0]", "--provider", "cuda")
    assert done.exit_code == 2
    assert "provider.devices: found [0, 0]; allowed: each GPU once" in done.stderr


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "images", ["photos", ["a", "s3://bucket/b"], {"parquet": "train", "column": "image"}]
)
def test_the_job_that_a_run_recorded_is_read_back(model: Mapping[str, Any], images: object) -> None:
    job = JobSpec.model_validate({**WHOLE, "model": model, "input": images})
    assert recorded_job(json.loads(json.dumps(job.model_dump(mode="json")))) == job
