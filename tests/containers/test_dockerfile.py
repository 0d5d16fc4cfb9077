"""What the Dockerfile and the pinned requirements say, without building anything."""

import configparser
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

from batchclf.runtime.providers import FLAVOURS
from tests.conftest import ROOT
from tests.test_docs import is_accepted

PINS = ROOT / ".docker"
TARGETS = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}
"""Each target, and the ONNX Runtime that its image holds."""
EXTRAS = {"cpu": ("cpu",), "gpu": ("gpu",), "openvino": ("openvino",), "export": ("cpu", "export")}
"""Each file of pinned requirements, and the extras of setup.cfg that it pins."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
GUIDE = (ROOT / "docs" / "containers.md").read_text()
TOLD = [
    line
    for page in (GUIDE, (ROOT / ".github" / "SECURITY.md").read_text())
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
"""The commands of the pages that a container engine runs."""
BUILDS = [line for line in TOLD if line.startswith("docker build ")]
RUNS = [line for line in TOLD if line.startswith("docker run ")]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the Dockerfile: what it starts from, and its (instruction, rest) pairs."""

    base: str
    steps: tuple[tuple[str, str], ...]

    def of(self, instruction: str) -> list[str]:
        """What this stage gives to every such instruction."""
        return [rest for word, rest in self.steps if word == instruction]


def stages() -> dict[str, Stage]:
    """The Dockerfile's stages by name; a step that goes on over several lines is one."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    steps = [line.split(None, 1) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    found: dict[str, Stage] = {}
    for word, rest in steps:
        if word == "FROM":
            base, _, name = rest.split()
            found[name] = Stage(base, ())
        elif found:
            found[name] = Stage(found[name].base, (*found[name].steps, (word, rest.strip())))
    return found


STAGES = stages()


def pins(name: str, python: str = "3.12") -> dict[str, str]:
    """What a file of pinned requirements installs with this Python on Linux: name to version."""
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    where |= {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
    found: dict[str, str] = {}
    for requirement, marker in lines(name):
        if marker is None or marker.evaluate(where):
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            assert requirement.name not in found, f"{name}.txt: {requirement.name} is there twice"
            found[requirement.name] = specifier.version
    return found


def lines(name: str) -> Iterator[tuple[Requirement, Marker | None]]:
    text = (PINS / f"{name}.txt").read_text().replace("\\\n", "")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = line.split(" --hash=")
            assert hashes, f"{name}.txt: {requirement} has no hash"
            parsed = Requirement(requirement)
            yield parsed, parsed.marker


def wanted(name: str) -> list[Requirement]:
    """What setup.cfg asks for in the environment that this file fills."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = config["options"]["install_requires"]
    text += "".join(config["options.extras_require"][extra] for extra in EXTRAS[name])
    return [Requirement(one) for one in text.splitlines() if one and not one.startswith("#")]


# ---- the pinned requirements ---------------------------------------------------------------------


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", EXTRAS)
def test_the_pins_satisfy_what_setup_cfg_asks_for(name: str, python: str) -> None:
    pinned = pins(name, python)
    unmet = [
        str(one) for one in wanted(name) if not one.specifier.contains(pinned.get(key(one), "0"))
    ]
    assert unmet == [], f"run .docker/renew: .docker/{name}.txt has {pinned}"


def key(requirement: Requirement) -> str:
    """A requirement's name as the pins spell it."""
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


@pytest.mark.parametrize("name", EXTRAS)
def test_each_environment_has_exactly_one_onnx_runtime(name: str) -> None:
    assert set(pins(name)) & set(FLAVOURS) == {TARGETS.get(name, "onnxruntime")}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_only_exporting_needs_is_pinned_for_a_run(name: str) -> None:
    assert set(pins(name)) & {"torch", "torchvision", "onnx", "onnxscript"} == set()


def test_the_gpu_image_gets_its_cuda_libraries_from_wheels() -> None:
    libraries = {"nvidia-cublas", "nvidia-cuda-runtime", "nvidia-cudnn-cu13", "nvidia-cufft"}
    assert libraries <= set(pins("gpu"))
    assert not any("apt-get" in step for step in STAGES["gpu"].of("RUN"))


def test_a_model_is_exported_with_the_packages_that_the_cpu_image_runs_it_with() -> None:
    cpu, export = pins("cpu"), pins("export")
    assert {name: export[name] for name in cpu} == cpu


def test_the_build_tools_are_those_that_pyproject_asks_for() -> None:
    system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    for requirement in map(Requirement, system["requires"]):
        assert requirement.specifier.contains(pins("build")[key(requirement)])


# ---- the Dockerfile ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_holds_its_own_environment_and_the_model(target: str) -> None:
    copies = STAGES[target].of("COPY")
    assert copies == [
        f"--from=build-{target} /opt/batchclf /opt/batchclf",
        "--from=model /bundle /bundle",
    ]
    assert f".docker/{target}.txt /requirements/" in STAGES[f"build-{target}"].of("COPY")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_a_user_who_is_not_root(target: str) -> None:
    word, user = STAGES[target].steps[-1]
    assert word == "USER"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


@pytest.mark.parametrize("target", TARGETS)
def test_the_entry_point_is_the_command_itself_and_no_shell(target: str) -> None:
    assert STAGES[target].base == "runtime"
    assert STAGES[target].of("ENTRYPOINT") == []
    assert [json.loads(one) for one in STAGES["runtime"].of("ENTRYPOINT")] == [["batchclf"]]
    assert [json.loads(one) for one in STAGES["runtime"].of("CMD")] == [["--help"]]


def whole(target: str) -> Stage:
    """A stage with the steps of those that it starts from, theirs first."""
    stage = STAGES[target]
    if stage.base not in STAGES:
        return stage
    base = whole(stage.base)
    return Stage(base.base, base.steps + stage.steps)


def environment(target: str) -> dict[str, str]:
    """The variables that an image sets."""
    return dict(pair.split("=", 1) for step in whole(target).of("ENV") for pair in step.split())


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_goes_to_volumes_that_any_user_can_write_to(target: str) -> None:
    image, found = whole(target), environment(target)
    assert image.of("VOLUME") == ["/cache /tmp"]
    assert (found["BATCHCLF_CACHE_DIR"], found["HOME"]) == ("/cache", "/tmp")
    assert "The model cache is the volume /cache." in " ".join(GUIDE.split())
    words = [word for word, _ in image.steps]
    made = ["mkdir --mode=1777 /cache" in rest for _, rest in image.steps]
    assert made.index(True) < words.index("VOLUME"), "later changes would be lost"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_reports_nothing_to_anybody(target: str) -> None:
    assert environment(target)["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_finds_its_command_first_and_works_in_data(target: str) -> None:
    assert environment(target)["PATH"] == "/opt/batchclf/bin:$PATH"
    assert whole(target).of("WORKDIR") == ["/data"]


def test_the_wheel_is_compiled_in_a_stage_whose_compiler_no_image_has() -> None:
    (install, build) = STAGES["wheel"].of("RUN")[-2:]
    assert " gcc libc6-dev " in install
    assert build.endswith("python3 -c 'import _resize'"), "a wheel without it would pass"
    assert "wheel" not in {stage.base for stage in STAGES.values()}
    for target in TARGETS:
        assert not any("gcc" in step for step in whole(target).of("RUN"))


def test_only_the_python_image_is_foreign() -> None:
    foreign = {stage.base for stage in STAGES.values()} - set(STAGES)
    assert foreign == {"${PYTHON_IMAGE}", "scratch", "model-${MODEL}"}
    assert {"model-none", "model-export"} <= set(STAGES)
    named = set(re.findall(r"PYTHON_IMAGE=(python:\S+?)[\s\"]", DOCKERFILE + GUIDE))
    assert {suite for one in named for suite in re.findall(r"-slim-(\w+)$", one)} == {
        "trixie",
        "bookworm",
    }
    (version,) = {one.rpartition("-slim-")[0] for one in named}
    assert re.fullmatch(r"python:3\.\d+\.\d+", version), "a tag that moves"


def test_what_is_copied_from_the_repository_is_there_and_let_in() -> None:
    let_in = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert {one for one in let_in if not (ROOT / one).exists()} == set()
    copied = [
        step.split()[0]
        for stage in STAGES.values()
        for step in stage.of("COPY")
        if not step.startswith("--from=")
    ]
    assert "." in copied
    for source in set(copied) - {"."}:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in let_in


# ---- the commands of the pages -------------------------------------------------------------------


def values(line: str, option: str) -> list[str]:
    """What a command line gives to an option, each time."""
    words = shlex.split(line)
    return [value for word, value in itertools.pairwise(words) if word == option]


@pytest.mark.parametrize("line", BUILDS)
def test_an_image_of_the_pages_is_built_from_what_is_there(line: str) -> None:
    (target,), (tag,) = values(line, "--target"), values(line, "-t")
    assert target in TARGETS
    assert tag == f"batchclf:{target}"
    given = dict(value.split("=", 1) for value in values(line, "--build-arg"))
    assert set(given) <= set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.M))
    assert f"model-{given.get('MODEL', 'none')}" in STAGES
    assert (ROOT / given.get("JOB", "jobs/sample.yaml")).is_file()


@pytest.mark.parametrize("line", RUNS)
def test_a_container_of_the_pages_runs_an_image_that_they_build(line: str) -> None:
    options, image, arguments = re.split(r"(batchclf:\w+) +", line)
    assert image in {values(build, "-t")[0] for build in BUILDS}
    assert values(options, "-v") == ["$PWD:/data"]
    command, *words = shlex.split(arguments)
    assert is_accepted(command, words)
    assert words[0] == "job.yaml" or (ROOT / words[0]).is_file()
    if "/bundle" in arguments:
        assert any("MODEL=export" in build and image in build for build in BUILDS)


def test_the_pages_build_and_run_every_target() -> None:
    assert {values(line, "--target")[0] for line in BUILDS} == set(TARGETS)
    assert all(any(f"batchclf:{target} run" in line for line in RUNS) for target in TARGETS)
    assert set(TOLD) == {*BUILDS, *RUNS}


@pytest.mark.skipif(not shutil.which("docker"), reason="docker's client parses its options")
@pytest.mark.parametrize("line", [*BUILDS, *RUNS, "docker run --gpu all batchclf:gpu"])
def test_docker_knows_every_option_of_the_pages(line: str, tmp_path: Path) -> None:
    """Its client parses them before it finds that there is no engine."""
    nowhere = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=nowhere, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert ("unknown flag" in done.stderr) == (line not in TOLD), done.stderr
