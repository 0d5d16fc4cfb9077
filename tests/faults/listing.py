"""Shards of one job that start within a second: one listing, one job, or a refusal.

Which of them come first is left to chance. Where one shard of another job is among them, the folder
is that of whoever was first, and all others must be refused with exit code 2.
"""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from batchclf.results.records import Shard
from tests.faults.jobs import Job, Start, differences, lines_of, make_job, path_of, same_line
from tests.faults.machines import LOCKS, Locks, Machines, make_machines
from tests.faults.report import Options, Report, emptied
from tests.tiny import link_digits, write_classifier

MAX_SHARDS = 8
WITHIN_S = 1.0
SLOW_S = 2.0
"""So long a listing takes at most."""
CHANGES = ("input", "model", "top_k", "limit")


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to give the job, and the lines of an undisturbed run of it."""

    name: str
    arguments: tuple[str, ...]
    lines: Sequence[bytes]

    def part(self, shard: Shard) -> Sequence[bytes]:
        first, last = shard.bounds(len(self.lines))
        return self.lines[first:last]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all rounds share."""

    job: Job
    inputs: Sequence[Path]
    """A folder, and a list of the same images."""
    broken: Path
    kinds: dict[tuple[str, str], Kind]
    """By the name of the input, and by what is changed; empty: nothing."""
    machines: Machines


@dataclass(frozen=True, slots=True)
class Round:
    """Some shards, what each is given, and when it starts."""

    output: Path
    given: Path
    kinds: Sequence[Kind]
    """Of each shard."""
    starts_s: Sequence[float]
    locks: Locks
    slow_us: int
    is_preceded: bool
    """By a run that ended before it began."""

    def __str__(self) -> str:
        odd = [f"shard {i}: {kind.name}" for i, kind in enumerate(self.kinds) if kind.name]
        preceded = ["after one that never began"] if self.is_preceded else []
        parts = [f"{len(self.kinds)} shards", self.given.name, self.locks, *preceded, *odd]
        return ", ".join(parts)

    def environment(self, bench: Bench, number: int, *, is_slow: bool) -> dict[str, str]:
        slow = bench.machines.slow_names(self.given, self.slow_us) if is_slow else {}
        return bench.machines.environment(self.locks, number) | slow


@dataclass(frozen=True, slots=True)
class Ended:
    """How a shard ended."""

    shard: Shard
    kind: Kind
    exit_code: int | None
    stderr: str

    def __str__(self) -> str:
        return f"{self.shard.index}/{self.shard.count}"


def listing(options: Options, num_images: int = 1_000, max_shards: int = MAX_SHARDS) -> Report:
    """`count` rounds of 2 to `max_shards` shards: none loses a record, or has a foreign one."""
    report = options.report(
        "listing", num_rounds=0, num_shards=0, num_refused=0, num_lost=0, num_foreign=0
    )
    bench = _bench(options, num_images)

    def lane(number: int, count: int) -> None:
        rng = options.rng(number)
        for _ in range(count):
            if options.is_over:
                return
            num_shards = rng.randint(2, max_shards)
            one = _round(bench, emptied(options.folder / f"out-{number}"), rng, num_shards)
            _check_round(bench, one, report)

    options.lanes(lane)
    return report


# ---- what is prepared ----------------------------------------------------------------------------


def _bench(options: Options, num_images: int) -> Bench:
    folder = options.folder
    images = link_digits(folder / "images", num_images)
    listed = folder / "images.txt"
    listed.write_text("".join(f"images/{path.name}\n" for path in sorted(images.iterdir())))
    wrong = folder / "wrong"
    wrong.mkdir()
    link_digits(wrong / "elsewhere", num_images // 2)
    broken = folder / "broken"
    broken.mkdir()
    for number in range(MAX_SHARDS):
        (broken / f"{number}.jpg").write_bytes(b"\xff\xd8")
    job = make_job(folder / "job", images, options.environment)
    model = write_classifier(folder / "other.onnx", seed=1)
    changes = {
        "": (),
        "input": ("-i", str(wrong)),
        "model": ("--set", f"model.onnx={model}"),
        "top_k": ("--top-k", "2"),
        "limit": ("--limit", str(num_images // 3)),
    }
    kinds = {
        (given.name, name): _kind(job, name, ("-i", str(given), *arguments))
        for given in (images, listed)
        for name, arguments in changes.items()
    }
    return Bench(job, (images, listed), broken, kinds, make_machines(folder))


def _kind(job: Job, name: str, arguments: tuple[str, ...]) -> Kind:
    """Raises: RuntimeError where an undisturbed run of it fails."""
    output = emptied(job.folder / "undisturbed")
    exit_code, stderr = job.run(output, *arguments)
    if exit_code != 0:
        raise RuntimeError(f"the undisturbed run ended with {exit_code}: {stderr}")
    return Kind(name, arguments, lines_of(output))


def _round(bench: Bench, output: Path, rng: random.Random, count: int) -> Round:
    given = rng.choice(bench.inputs)
    plain = bench.kinds[given.name, ""]
    kinds = [plain] * count
    if rng.random() < 0.5:
        kinds[rng.randrange(count)] = bench.kinds[given.name, rng.choice(CHANGES)]
    return Round(
        output=output,
        given=given,
        kinds=kinds,
        starts_s=[rng.uniform(0, WITHIN_S) for _ in range(count)],
        locks=rng.choice(LOCKS),
        slow_us=round(rng.uniform(0, SLOW_S) / len(plain.lines) * 1e6),
        is_preceded=rng.random() < 0.3,
    )


# ---- a round -------------------------------------------------------------------------------------


def _check_round(bench: Bench, one: Round, report: Report) -> None:
    report.add("num_rounds")
    if one.is_preceded:
        options = ("--shard", f"0/{len(one.kinds)}", "-i", str(bench.broken), "--precision", "int8")
        environment = one.environment(bench, MAX_SHARDS, is_slow=False)
        exit_code, stderr = bench.job.run(one.output, *options, environment=environment)
        report.check(exit_code == 2, f"{one}: the first ended with {exit_code}: {stderr[-400:]}")
    ended = _together(bench, one, is_slow=True)
    winner = _winner(one, ended)
    for shard in ended:
        _check_shard(one, shard, winner, report)
    again = _together(bench, replace(one, kinds=[winner] * len(ended)), is_slow=False)
    for shard in again:
        said = f"{one}: again, {shard}: ended with {shard.exit_code}: {shard.stderr[-400:]}"
        report.check(shard.exit_code == 0, said)
    found = [line for shard in again for line in _lines(one.output, shard.shard)]
    report.check_none(differences(found, winner.lines), f"{one}: again, {winner.name or 'plain'}")


def _together(bench: Bench, one: Round, *, is_slow: bool) -> list[Ended]:
    """Start all shards, each at its time, and wait for their ends."""
    count = len(one.kinds)
    starts: dict[int, Start] = {}
    began = time.monotonic()
    with ExitStack() as stack:
        for number in sorted(range(count), key=one.starts_s.__getitem__):
            time.sleep(max(0.0, began + one.starts_s[number] - time.monotonic()))
            arguments = ("--shard", f"{number}/{count}", *one.kinds[number].arguments)
            environment = one.environment(bench, number, is_slow=is_slow)
            starts[number] = stack.enter_context(
                bench.job.started(one.output, *arguments, environment=environment)
            )
        return [
            Ended(Shard(number, count), one.kinds[number], start.wait(), start.stderr)
            for number, start in sorted(starts.items())
        ]


def _winner(one: Round, ended: Sequence[Ended]) -> Kind:
    """Whose folder it is: that of those who completed their part; of nobody, the plain one's."""
    plain = next(kind for kind in one.kinds if not kind.name)
    completed = [shard.kind for shard in ended if shard.exit_code == 0]
    return completed[0] if completed and plain not in completed else plain


def _check_shard(one: Round, ended: Ended, winner: Kind, report: Report) -> None:
    """A shard of the winner's completed its part, any other was refused and wrote nothing."""
    said = f"{one}: {ended}"
    report.add("num_shards")
    report.add("num_refused", ended.exit_code == 2)
    told = f"{said}: ended with {ended.exit_code}: {ended.stderr[-400:]}"
    report.check(ended.exit_code in (0, 2), told)
    report.check("Traceback" not in ended.stderr, told)
    is_right = ended.exit_code != 0 or ended.kind is winner
    report.check(is_right, f"{said}: complete, but the folder is of {winner.name or 'the job'}")
    found = _lines(one.output, ended.shard)
    expected = {path_of(line): line for line in winner.part(ended.shard)}
    foreign = [line for line in found if not same_line(line, expected.get(path_of(line), b""))]
    missing = expected.keys() - {path_of(line) for line in found}
    num_lost = len(missing) if ended.exit_code == 0 else 0
    report.add("num_lost", num_lost)
    report.add("num_foreign", len(foreign))
    report.check(not num_lost, f"{said}: {num_lost} lost of {len(expected)}")
    report.check(not foreign, f"{said}: {len(foreign)} foreign, the first: {foreign[:1]}")


def _lines(output: Path, shard: Shard) -> list[bytes]:
    return lines_of(output, f"predictions{shard.suffix}.jsonl")
