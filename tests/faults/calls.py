"""Single calls on the output folder, each disturbed in turn: killed at, torn, failed, cut short.

A preloaded library (shim.c, compiled here with gcc) counts those calls of all processes and threads
of a job together, and disturbs the n-th one, for each n that an undisturbed run reaches. strace can
disturb calls as well, but counts those of each thread by itself, and so never reaches some. That
the library sees what strace sees is checked first.
"""

import errno
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.jobs import differences, lines_of, make_job, run_json, whole_prefix
from tests.faults.report import Options, Report, emptied
from tests.tiny import link_digits

SOURCE = Path(__file__).with_name("shim.c")
NUM_IMAGES = 100
KEYS = {"batch_size": 16}
SLOW_WRITE_MS = 1700
"""So long takes each of the 7 writes of records: what happens every 10 s then happens too."""
NUM_LANES = 8
"""Such jobs mostly sleep."""
NAMES = ("fresh", "resumed", "retried")
"""Of the phases: see Bench."""
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT)
NEED_NO_SPACE = ("unlink", "unlinkat", "fchmod")


# ---- the library ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One line of the library's log."""

    name: str
    num_bytes: int
    """Of a write; of the file at an fsync."""
    path: str

    @property
    def is_on_records(self) -> bool:
        return self.path.endswith("/predictions.jsonl")


@dataclass(frozen=True, slots=True)
class Shim:
    """The library, with a count and a log for one run at a time."""

    library: Path
    state: Path
    log: Path

    def environment(self, output: Path, how: str | int, at: int = 0, **more: int) -> dict[str, str]:
        """What disturbs the `at`-th call on `output` from now on."""
        self.state.write_bytes(bytes(8))
        self.log.write_bytes(b"")
        return {
            "LD_PRELOAD": str(self.library),
            "FAULTS_UNDER": str(output),
            "FAULTS_STATE": str(self.state),
            "FAULTS_LOG": str(self.log),
            "FAULTS_HOW": str(how),
            "FAULTS_AT": str(at),
            **{f"FAULTS_{key.upper()}": str(value) for key, value in more.items()},
        }

    def calls(self) -> list[Call]:
        """The calls so far, in order."""
        fields = (line.split(" ", 3) for line in self.log.read_text().splitlines())
        return [Call(name, int(num_bytes), path) for _, name, num_bytes, path in fields]


def make_shim(folder: Path, name: str = "shim") -> Shim:
    """The library, compiled once per folder, with files of its own for each name.

    Raises:
        FileNotFoundError: there is no gcc.
    """
    library = compiled(SOURCE, folder)
    return Shim(library, folder / f"{name}.state", folder / f"{name}.log")


def compiled(source: Path, folder: Path) -> Path:
    """A library to preload, compiled once per folder.

    Raises:
        FileNotFoundError: there is no gcc.
    """
    library = folder / f"{source.stem}.so"
    if not library.exists():
        compiler = ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*compiler, "-o", library, source, "-ldl"], check=True)
    return library


# ---- where a job is disturbed --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phase:
    """A command, and the output folder that it starts from."""

    name: str
    arguments: tuple[str, ...]
    origin: Path | None
    """Copied; None: there is none yet."""
    calls: Sequence[Call]
    """On the output, undisturbed."""


@dataclass(frozen=True, slots=True)
class Point:
    """One disturbance: how, at which call of a phase (0: each), and whether from there on."""

    phase: Phase
    how: str | int
    at: int
    forever: bool = False

    def __str__(self) -> str:
        how = errno.errorcode[self.how] if isinstance(self.how, int) else self.how
        call = self.phase.calls[self.at - 1]
        where = f"{self.at} ({call.name} {Path(call.path).name})" if self.at else "each"
        return f"{self.phase.name}: {how}{' for ever' if self.forever else ''} at {where}"


class Bench:
    """A small job in three phases: from the start, from half-way, and trying failed ones again."""

    def __init__(self, options: Options, slow_write_ms: int, names: Collection[str]) -> None:
        self.options = options
        self._slow_write_ms = slow_write_ms
        images = link_digits(options.folder / "images", NUM_IMAGES)
        self.job = make_job(options.folder / "job", images, options.environment, **KEYS)
        self.shim = make_shim(options.folder)
        self.phases = [self._phase("fresh", (), None)]
        if "resumed" in names:
            self.phases.append(self._phase("resumed", (), self._half_done(self.phases[0])))
        if "retried" in names:
            origin = self._with_failures()
            self.phases.append(self._phase("retried", ("--retry-failed",), origin))

    def run(
        self, phase: Phase, output: Path, shim: Shim, how: str | int, at: int, **more: int
    ) -> tuple[int | None, str]:
        """Run a phase with one disturbance: its exit code and stderr."""
        emptied(output)
        if phase.origin is not None:
            shutil.copytree(phase.origin, output)
        disturbed = shim.environment(output, how, at, delay_ms=self._slow_write_ms, **more)
        return self.job.run(output, *phase.arguments, environment=disturbed)

    def points(self, how: str | int, phases: Iterable[Phase], *, forever: bool) -> list[Point]:
        """Each call of the phases that can be disturbed so."""
        return [
            Point(phase, how, at, forever)
            for phase in phases
            for at, call in enumerate(phase.calls, 1)
            if call.name == "write" or how not in ("torn", "short")
            if not (how in FULL and call.name in NEED_NO_SPACE)
        ]

    def chosen(self, points: list[Point]) -> list[Point]:
        """All points, or as many as are asked for."""
        count = min(self.options.count, len(points))
        return self.options.rng().sample(points, count)

    def _phase(self, name: str, arguments: tuple[str, ...], origin: Path | None) -> Phase:
        phase = Phase(name, arguments, origin, ())
        exit_code, stderr = self.run(phase, self.options.folder / name, self.shim, "count", 0)
        if exit_code != 0:
            raise RuntimeError(f"{name}: the undisturbed run ended with {exit_code}: {stderr}")
        return Phase(name, arguments, origin, self.shim.calls())

    def _half_done(self, fresh: Phase) -> Path:
        """An output whose job was killed at its fifth write of records."""
        output = self.options.folder / "half"
        writes = [
            at
            for at, call in enumerate(fresh.calls, 1)
            if call.name == "write" and call.is_on_records
        ]
        self.run(fresh, output, self.shim, "kill", writes[4])
        return output

    def _with_failures(self) -> Path:
        """A finished output with error records, whose images have been mended since."""
        output = self.options.folder / "failures"
        mended = {path: path.read_bytes() for path in sorted(self.job.images.iterdir())[::7]}
        for path in mended:
            path.unlink()  # it may be a link to a sample
            path.touch()
        self.job.run(output)
        for path, content in mended.items():
            path.write_bytes(content)
        return output


# ---- the scenarios -------------------------------------------------------------------------------


def kill_at_calls(
    options: Options, slow_write_ms: int = SLOW_WRITE_MS, names: Collection[str] = NAMES
) -> Report:
    """SIGKILL to the group at every call, and in the middle of every write."""
    report = options.report("syscalls-kill")
    bench = Bench(options, slow_write_ms, names)
    _compare_with_strace(bench, report)
    hows = ("kill", "torn")
    points = [point for how in hows for point in bench.points(how, bench.phases, forever=False)]
    report.figures |= {f"num_calls_{phase.name}": len(phase.calls) for phase in bench.phases}
    report.figures["num_kills"] = 0
    options.each(bench.chosen(points), lambda point: _kill_at(bench, point, report))
    return report


def fail_calls(
    options: Options, slow_write_ms: int = SLOW_WRITE_MS, names: Collection[str] = NAMES
) -> Report:
    """Every call fails, once or from there on; every write is cut short."""
    report = options.report("syscalls-fail")
    bench = Bench(options, slow_write_ms, names)
    points = [
        point
        for how in (*ERRNOS, "short")
        for forever in (False, True)
        for point in bench.points(how, bench.phases, forever=forever)
    ]
    report.figures |= {f"num_calls_{phase.name}": len(phase.calls) for phase in bench.phases}
    report.figures["num_failures"] = 0
    options.each(bench.chosen(points), lambda point: _fail_at(bench, point, report))
    return report


def _kill_at(bench: Bench, point: Point, report: Report) -> None:
    number = report.number()
    output = bench.options.folder / f"out-{number}"
    shim = make_shim(bench.options.folder, f"shim-{number}")
    exit_code, stderr = bench.run(point.phase, output, shim, point.how, point.at)
    if report.check(exit_code == 137, f"{point}: ended with {exit_code}: {stderr[-300:]}"):
        report.add("num_kills")
    report.check(_is_prefix_or_finished(bench, point, output), f"{point}: left other records")
    report.check_none(bench.job.resumed(output, *point.phase.arguments), str(point))
    emptied(output)


def _is_prefix_or_finished(bench: Bench, point: Point, output: Path) -> bool:
    """Whether records are the first ones; of a retry: all the old ones, or all the new ones."""
    found = lines_of(output)
    if point.phase.name != "retried":
        return whole_prefix(found, bench.job.lines) is not None
    old = lines_of(point.phase.origin) if point.phase.origin else []
    return not differences(found, old) or not differences(found, bench.job.lines)


def _fail_at(bench: Bench, point: Point, report: Report) -> None:
    number = report.number()
    output = bench.options.folder / f"out-{number}"
    shim = make_shim(bench.options.folder, f"shim-{number}")
    durable_before = _num_durable(point.phase.origin)
    exit_code, stderr = bench.run(
        *(point.phase, output, shim, point.how, point.at), forever=int(point.forever)
    )
    calls = shim.calls()
    report.add("num_failures")
    report.check(len(calls) >= point.at, f"{point}: not reached, after {len(calls)} calls")
    if exit_code == 0:
        report.add("num_survived")
        report.check_none(bench.job.complaints(output), f"{point}, and exit code 0")
    else:
        _check_refusal(point, output, exit_code, stderr, report)
    failed = calls[point.at - 1] if len(calls) >= point.at else None
    if failed and failed.name == "fsync" and failed.is_on_records and isinstance(point.how, int):
        report.check(exit_code == 5, f"{point}: an fsync failed, and the exit code is {exit_code}")
        _check_unsynced(bench, point, output, calls, durable_before, report)
    report.check_none(bench.job.resumed(output, *point.phase.arguments), f"after {point}")
    emptied(output)


def _check_refusal(
    point: Point, output: Path, exit_code: int | None, stderr: str, report: Report
) -> None:
    """Exit code 5, one line that names a path and the cause, and nothing that looks complete."""
    said = stderr[-400:]
    if not report.check(exit_code == 5, f"{point}: ended with {exit_code}: {said}"):
        return
    cause = os.strerror(point.how) if isinstance(point.how, int) else "?"
    lines = [line for line in stderr.splitlines() if cause in line]
    report.check(len(lines) == 1, f"{point}: {len(lines)} lines name the cause: {said}")
    report.check(all(str(output) in line for line in lines), f"{point}: no path: {said}")
    report.check("Traceback" not in stderr, f"{point}: a traceback: {said}")
    if point.phase.name != "retried":
        status = run_json(output).get("status")
        report.check(status != "complete", f"{point}: exit code 5, and the status is complete")


def _num_durable(output: Path | None) -> int:
    """Bytes of predictions.jsonl that run.json says are durable."""
    return int((run_json(output) if output else {}).get("durable", {}).get("num_bytes", 0))


def _check_unsynced(
    bench: Bench,
    point: Point,
    output: Path,
    calls: Sequence[Call],
    num_durable: int,
    report: Report,
) -> None:
    """What an fsync that failed covered may be gone: it is written again, or gone indeed.

    The kernel takes the pages for written, so they last until they are evicted. Where the fsync
    failed once, the next start must write them again; where for ever, they are made zeros here.
    """
    before = calls[: point.at - 1]
    synced = [one.num_bytes for one in before if one.name == "fsync" and one.is_on_records]
    num_synced = max([num_durable, *synced])
    predictions = output / "predictions.jsonl"
    if point.forever:
        with predictions.open("r+b") as file:
            num_lost = max(0, predictions.stat().st_size - num_synced)
            file.seek(num_synced)
            file.write(bytes(num_lost))
        return
    shim = make_shim(bench.options.folder, f"again-{report.number()}")
    bench.job.run(output, *point.phase.arguments, environment=shim.environment(output, "count"))
    writes = [one for one in shim.calls() if one.name == "write" and one.is_on_records]
    num_written = sum(one.num_bytes for one in writes)
    num_missing = predictions.stat().st_size - num_synced - num_written
    report.check(
        point.phase.name == "retried" or num_missing <= 0,
        f"{point}: {num_missing} bytes that an fsync has failed for were not written again",
    )


# ---- strace sees the same ------------------------------------------------------------------------

CALLS = (
    *(
        "write",
        "pwrite64",
        "writev",
        "pwritev",
        "pwritev2",
        "copy_file_range",
        "sendfile",
        "splice",
    ),
    *("fsync", "fdatasync", "sync_file_range", "msync", "ftruncate", "truncate", "fallocate"),
    *("open", "openat", "creat", "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "fchmod", "chmod"),
)
SAME = {"openat": "open", "creat": "open"}
TRACED = re.compile(r"^\d+ +(\w+)\((.*)$")


def _compare_with_strace(bench: Bench, report: Report) -> None:
    """The library counts every call that strace sees changing the output folder."""
    output = emptied(bench.options.folder / "traced")
    trace = bench.options.folder / "trace"
    through = ["strace", "-f", "-y", "-s", "0", "-o", str(trace), "-e", f"trace={','.join(CALLS)}"]
    delayed = bench.shim.environment(output, "count")
    exit_code, stderr = bench.job.run(output, through=through, environment=delayed)
    report.check(exit_code == 0, f"strace: ended with {exit_code}: {stderr[-300:]}")
    seen = Counter(
        SAME.get(found[1], found[1])
        for line in trace.read_text().splitlines()
        if (found := TRACED.match(line)) and str(output) in line and "O_RDONLY" not in line
    )
    counted = Counter(call.name.removesuffix("64") for call in bench.shim.calls())
    report.check(seen == counted, f"strace saw {dict(seen)}, the library {dict(counted)}")
    report.figures["num_calls_strace"] = seen.total()
