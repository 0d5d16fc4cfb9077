"""A container engine small enough for tests: buildah builds, the kernel's namespaces run.

It stands in for a daemon, which test machines often lack; a container gets what
`docker run --read-only --network none --user UID:GID -v ...` gives it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.conftest import ROOT, Finished

ENTER = Path(__file__).with_name("enter.py")
NEEDED = ("buildah", "debootstrap", "unshare", "mount")
MB_PER = {"KB": 1e-3, "MB": 1.0, "GB": 1e3}
ANY_USER = (12345, 12345)
"""A user and group that no image knows."""


def missing() -> str | None:
    """Why images cannot be built and run here; None when they can."""
    if os.geteuid() != 0:
        return "building images wants root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@dataclass(frozen=True, slots=True)
class Engine:
    """Builds images into a folder of its own, which is all there is to clean up."""

    folder: Path

    def buildah(self, *arguments: str | Path) -> str:
        """What a buildah command prints; its log where it fails."""
        storage = ["--root", self.folder / "images", "--runroot", self.folder / "run"]
        done = subprocess.run(
            ["buildah", *map(str, storage), "--storage-driver", "vfs", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(map(str, arguments))}:\n{done.stderr[-4000:]}"
        return done.stdout.strip()

    def make_base(self, release: str = "bookworm") -> str:
        """Debian's own Python as an image, for the build argument PYTHON_IMAGE; gives its name."""
        name = f"localhost/python:{release}"
        rootfs = self.folder / "rootfs"
        packages = "python3,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={packages}", release, str(rootfs)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for place in ("var/cache/apt", "var/lib/apt/lists"):  # an official image has neither
            shutil.rmtree(rootfs / place)
        container = self.buildah("from", "scratch")
        self.buildah("add", container, rootfs, "/")
        self.buildah("commit", container, name)
        self.buildah("rm", container)
        shutil.rmtree(rootfs)
        return name

    def build(self, target: str, **build_args: str) -> "Image":
        """Build a target of the Dockerfile; nothing of the other stages stays."""
        name = f"localhost/batchclf:{target}"
        options = ["--isolation", "chroot", "--network", "host", "--target", target, "--tag", name]
        if certificates := os.environ.get("SSL_CERT_FILE"):  # this machine's own, for pip
            options += ["--volume", f"{certificates}:/etc/ssl/certs/ca-certificates.crt:ro"]
        for key, value in build_args.items():
            options += ["--build-arg", f"{key}={value}"]
        self.buildah("bud", *options, ROOT)
        self.buildah("rm", "--all")
        self.buildah("rmi", "--prune")
        (found,) = json.loads(self.buildah("images", "--json", name))
        number, unit = found["size"].split()
        config = json.loads(self.buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
        root = Path(self.buildah("mount", self.buildah("from", name)))
        kept = Path(tempfile.mkdtemp(prefix=f"{target}-", dir=self.folder)) / "root"
        root.rename(kept)
        self.buildah("rm", "--all")
        self.buildah("rmi", name)
        return Image(kept, config, float(number) * MB_PER[unit])


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its root file system, and how it wants to be run."""

    root: Path
    config: Mapping[str, Any]
    size_mb: float
    """Sum of its layers, uncompressed, those of the Python base included, in MB (10^6 bytes)."""

    def start(self, *arguments: str, **options: Any) -> "Container":
        """Start the image's entry point with these arguments; `options`: see `Container`."""
        return Container(self, *arguments, **options)

    def run(self, *arguments: str, timeout: float = 300, **options: Any) -> Finished:
        """Run the image's entry point to its end."""
        with self.start(*arguments, **options) as container:
            return container.wait(timeout)


class Container:
    """A process in namespaces of its own (mounts, PIDs, no network); use as a context manager."""

    def __init__(
        self,
        image: Image,
        *arguments: str,
        user: tuple[int, int] = ANY_USER,
        volumes: Mapping[Path, str] | None = None,
        entrypoint: str | None = None,
    ) -> None:
        config, volumes = image.config, volumes or {}
        own = [entrypoint] if entrypoint else config["Entrypoint"]
        container = {
            "root": str(image.root),
            "command": [*own, *(arguments or ([] if entrypoint else config["Cmd"]))],
            "env": dict(one.split("=", 1) for one in config["Env"]),
            "cwd": config["WorkingDir"],
            "user": user,
            "volumes": {str(source): target for source, target in volumes.items()},
            "anonymous_volumes": sorted(set(config["Volumes"]) - set(volumes.values())),
        }
        namespaces = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child"]
        self.process = subprocess.Popen(
            [*namespaces, sys.executable, str(ENTER), json.dumps(container)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Container":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def wait(self, timeout: float = 300) -> Finished:
        """Wait for the end; a process ended by a signal has 128 + its number as exit code."""
        stdout, stderr = self.process.communicate(timeout=timeout)
        return Finished(self.process.returncode, stdout, stderr)

    def wait_until(self, is_so: Callable[[], bool], timeout: float = 60) -> None:
        """Wait for something that the running process does."""
        deadline = time.monotonic() + timeout
        while not is_so():
            assert self.process.poll() is None, "the container ended before"
            assert time.monotonic() < deadline, f"waited for {timeout} s"
            time.sleep(0.005)

    def stop(self) -> None:
        """Send SIGTERM to PID 1, as `docker stop` does."""
        os.kill(self.pid_1, signal.SIGTERM)

    @property
    def pid_1(self) -> int:
        """The process that is PID 1 in the container, as it is called outside."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    @property
    def hears_sigterm(self) -> bool:
        """Whether the image's command runs as PID 1 and has a handler for SIGTERM.

        The kernel drops signals to PID 1 for which it has none.
        """
        try:
            process = Path(f"/proc/{self.pid_1}")
            started = b"enter.py" not in (process / "cmdline").read_bytes()
            status = (process / "status").read_text()
        except (ValueError, OSError):  # not there yet, or gone
            return False
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return started and bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
