"""What survives a power loss, and when that is said: the syncs of real runs.

After a power loss, of a file there is what it held when it was last synced, and a name is what its
folder was last synced with. So whatever run.json says must have been synced before run.json is.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from batchclf.spec.options import RunOptions
from tests.engines.common import run_json
from tests.run.test_wiring import set_everywhere
from tests.tiny import link_digits, run_here, write_tiny_job


@dataclass
class Disk:
    """What of a job's output is safe on disk, and what happened to it."""

    output: Path
    synced: dict[int, int] = field(default_factory=dict)
    """Bytes of each inode that survive a power loss."""
    noted: list[tuple[str, int]] = field(default_factory=list)
    """Status and durable images of each run.json put in place."""
    replaced: list[str] = field(default_factory=list)
    """Names of the files put in place, in order; what was put there was synced whole."""
    num_syncs: int = 0
    """Of the records, while the job was running."""
    unsynced_names: set[str] = field(default_factory=set)
    """Files put in place since their folder was last synced."""

    def is_safe(self, path: Path) -> bool:
        """Whether all that a file holds survives."""
        found = path.stat()
        return self.synced.get(found.st_ino, -1) >= found.st_size

    def sync(self, descriptor: int) -> None:
        found, path = os.fstat(descriptor), Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.synced[found.st_ino] = found.st_size
        if path == self.output:
            self.unsynced_names.clear()
        elif path.name == "predictions.jsonl":
            self.num_syncs += 1

    def put(self, source: Path, target: Path) -> None:
        """A file is about to get another's place."""
        if target.parent != self.output or target.name.startswith("."):
            return  # what need not last
        assert self.is_safe(source), f"{target.name} is put in place before it is synced"
        self.replaced.append(target.name)
        self.unsynced_names.add(target.name)
        if target.name == "run.json":
            self._note(json.loads(source.read_bytes()))

    def _note(self, run: dict[str, object]) -> None:
        durable, status = run["durable"], str(run["status"])
        assert isinstance(durable, dict)
        predictions = self.output / "predictions.jsonl"
        if durable["num_bytes"]:
            safe = self.synced.get(predictions.stat().st_ino, 0)
            assert durable["num_bytes"] <= safe, "records are called durable before they are"
            assert "predictions.jsonl" not in self.unsynced_names, "nor is their name"
        if status == "complete":
            assert self.is_safe(predictions)
            assert self.is_safe(self.output / "stats.jsonl"), "the summary may be lost"
        self.noted.append((status, durable["num_images"]))


@contextmanager
def watched_disk(output: Path) -> Iterator[Disk]:
    """Follow every sync and rename of this process."""
    disk = Disk(output)

    def after(call: Callable[[int], None]) -> Callable[[int], None]:
        def synced(descriptor: int) -> None:
            call(descriptor)
            disk.sync(descriptor)

        return synced

    def before(call: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def put(source: Path, target: Path) -> None:
            disk.put(Path(source), Path(target))
            call(source, target)

        return put

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, after(getattr(os, name)))
        for name in ("replace", "rename"):
            patch.setattr(os, name, before(getattr(os, name)))
        yield disk
    assert disk.unsynced_names == set()


def test_records_are_synced_all_along_and_called_durable_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = link_digits(tmp_path / "images", 80)
    job = write_tiny_job(tmp_path, input=str(images), batch_size=2)
    set_everywhere(monkeypatch, "SYNC_S", 0.001)
    with watched_disk(tmp_path / "out") as disk:
        run_here(job)
    durable = [num_images for status, num_images in disk.noted if status == "running"]
    assert durable == sorted(durable)
    assert len({one for one in durable if 0 < one < 80}) >= 3, "noted while it runs"
    assert disk.num_syncs >= len(set(durable))
    assert disk.noted[-1] == ("complete", 80)


def test_a_short_run_is_synced_at_its_end(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 8)
    with watched_disk(tmp_path / "out") as disk:
        run_here(write_tiny_job(tmp_path, input=str(images)))
    assert disk.noted[-1] == ("complete", 8)


def test_records_tried_again_are_synced_before_they_take_their_places(tmp_path: Path) -> None:
    images = link_digits(tmp_path / "images", 8)
    bad = sorted(images.iterdir())[3]
    good = bad.read_bytes()
    bad.unlink()
    bad.write_bytes(b"\xff\xd8")
    job = write_tiny_job(tmp_path, input=str(images))
    run_here(job)
    bad.write_bytes(good)
    with watched_disk(tmp_path / "out") as disk:
        run_here(job, RunOptions(retry_failed=True))
    assert "predictions.jsonl" in disk.replaced
    assert disk.noted[-1] == ("complete", 8)
    assert run_json(tmp_path / "out")["durable"]["num_bytes"] > 0


def test_what_a_killed_run_had_not_synced_is_not_called_durable_before_it_is(
    tmp_path: Path,
) -> None:
    job = write_tiny_job(tmp_path, input=str(link_digits(tmp_path / "images", 8)))
    run_here(job)
    output = tmp_path / "out"
    lines = (output / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    run = run_json(output)
    durable = run["durable"] | {"num_images": 3, "num_bytes": len(b"".join(lines[:3]))}
    changes = {"status": "running", "durable": durable}
    (output / "run.json").write_text(json.dumps(run | changes))
    with watched_disk(output) as disk:
        with (output / "predictions.jsonl").open("wb") as file:
            file.writelines(lines[:3])
            file.flush()
            os.fsync(file.fileno())
            file.writelines(lines[3:6])
        run_here(job)
    assert disk.noted[0] == ("running", 3)
    assert disk.noted[1] == ("running", 6), "first of all, what was there is made durable"
    assert disk.noted[-1] == ("complete", 8)
