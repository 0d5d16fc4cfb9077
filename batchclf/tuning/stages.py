"""The stages of a tuning: each limit alone, then the whole, then the best of it again.

Every session and trial is estimated before it begins, and begins only where the budget has room.
"""

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from batchclf.errors import BatchclfError, PrecisionRefused, UsageError
from batchclf.results.records import DecodeMode, Pixels, Precision
from batchclf.run.plan import fitting_batch_size
from batchclf.runtime.faults import fault_of
from batchclf.runtime.sessions import ORT_ERRORS
from batchclf.spec.job import RuntimeSpec, auto, gpus_of
from batchclf.system.machine import usable_cores
from batchclf.tuning.advice import disk_note, judge
from batchclf.tuning.budget import Clock, TuneOptions
from batchclf.tuning.measure import (
    Bench,
    estimated_s,
    first_pass,
    measure_decoding,
    measure_inference,
    run_trial,
)
from batchclf.tuning.records import (
    DecodeLimit,
    InferLimit,
    Prediction,
    Session,
    Settings,
    Trial,
    Tuned,
)
from batchclf.tuning.search import (
    CLEAR,
    PARTS,
    USUAL_SIZES,
    Limits,
    can_win,
    choose,
    finalists,
    in_measuring_order,
    possible_gains,
    ranked,
    stream_counts,
    summarise,
    worker_counts,
)
from batchclf.tuning.sessions import Sessions
from batchclf.tuning.words import listed, session_name, settings_name, shortest

FIRST_PASS_SHARE, LIMITS_SHARE, EXPLORING_SHARE = 0.25, 0.4, 0.6
"""Shares of the budget by whose end a stage is over; repeating the best has the rest."""
NUM_FINALISTS, NUM_ROUNDS = 4, 5
"""How many of the best are measured how often in the end, where there is time."""
_MAY_LACK_MEMORY: tuple[type[Exception], ...] = (MemoryError, BatchclfError, *ORT_ERRORS)


class Tuning:
    """One tuning: what it has measured so far, and what it concludes."""

    def __init__(
        self,
        bench: Bench,
        sessions: Sessions,
        options: TuneOptions,
        clock: Clock,
        record: Callable[[DecodeLimit | InferLimit | Trial], None],
    ) -> None:
        self._bench = bench
        self._num_listed = bench.num_listed
        self._sessions = sessions
        self._options = options
        self._clock = clock
        self._record = record
        self._log = bench.log
        self._num_cores = usable_cores()
        self._pixels_NHWC: Pixels | None = None
        self._decode: dict[tuple[DecodeMode, int], DecodeLimit] = {}
        self._infer: dict[Session, InferLimit] = {}
        self._trials: list[Trial] = []
        self._untried: set[Settings] = set()
        self._lacking: list[Session] = []
        self._notes: list[str] = []
        self._current = self._current_settings()

    def run(self) -> Tuned:
        """Measure all that there is time for, and choose.

        Raises:
            UsageError: there was no time for a single trial.
        """
        sizes = self._batch_sizes()
        if self._has_parts:
            own = self._current.session
            own = replace(own, part=self._sessions.own_part(own))
            self._current = replace(self._current, session=own)
        at_once = self._at_once(sizes)
        precisions = self._proven_precisions(at_once[0])
        self._clock.prepared()
        self._measure_decoding()
        self._measure_inference(at_once, precisions)
        limits = Limits(self._num_cores, self._sessions.on_cpu, self._decode, self._infer)
        self._explore(limits, sizes)
        self._repeat()
        results = summarise(self._trials)
        best = choose(results, self._current)
        first = self._sessions.first
        return Tuned(
            model=self._bench.model.bundle.meta.name,
            provider=first.provider.requested,
            device=first.provider.device,
            num_cores=self._num_cores,
            on_cpu=limits.on_cpu,
            num_listed=self._num_listed,
            num_sampled=len(self._bench.refs),
            current=self._current,
            results=results,
            too_large=self._too_large(),
            best=best,
            verdict=judge(best, limits),
            keys=self._keys(best.settings),
            notes=self._notes,
            wall_s=round(self._clock.elapsed_s, 1),
        )

    # ---- what there is to try --------------------------------------------------------------------

    def _current_settings(self) -> Settings:
        job = self._bench.job
        target = self._sessions.target(job.runtime)
        batch_size = fitting_batch_size(job, self._bench.model, self._num_listed)
        session = Session(job.precision, batch_size, target.streams, target.threads, batch_size)
        return Settings(session, job.loader.decode, auto(job.loader.workers, self._num_cores))

    def _decode_modes(self) -> list[DecodeMode]:
        return list(dict.fromkeys((self._current.decode, *self._options.decodes)))

    def _precisions(self) -> list[Precision]:
        return list(dict.fromkeys((self._current.session.precision, *self._options.precisions)))

    def _batch_sizes(self) -> list[int]:
        """Those that the model and the number of images allow, in the order to measure them in."""
        current = self._current.session.batch_size
        fixed = self._bench.model.bundle.meta.fixed_batch
        if fixed is not None:
            self._note(f"batch size: the model takes only batches of {fixed}")
            return [fixed]
        asked = self._options.batch_sizes or USUAL_SIZES
        sizes = [size for size in asked if size <= self._num_listed]
        if left_out := sorted(set(asked) - set(sizes)):
            self._note(
                f"batch size {listed(left_out)}: left out, since the job has only "
                f"{self._num_listed:,} images"
            )
        return in_measuring_order(sizes, current)

    @property
    def _has_parts(self) -> bool:
        """Whether a batch may be inferred in parts."""
        return self._sessions.on_cpu and self._bench.model.bundle.meta.fixed_batch is None

    def _at_once(self, sizes: Sequence[int]) -> list[int]:
        """Numbers of images to infer at once: parts, or batches of these sizes."""
        if not self._has_parts:
            return list(sizes)
        parts = (part for part in PARTS if part <= max(sizes))
        return in_measuring_order(parts, self._current.session.part)

    def _layouts(self) -> list[tuple[int, int]]:
        """Streams and threads of each, the job's own first."""
        own = self._current.session
        automatic = self._sessions.target(RuntimeSpec()).streams
        counts = stream_counts(
            automatic, own.streams, self._num_cores, on_cpu=self._sessions.on_cpu
        )
        others = (self._sessions.target(RuntimeSpec(streams=count)) for count in counts)
        return list(
            dict.fromkeys(
                [(own.streams, own.threads), *((one.streams, one.threads) for one in others)]
            )
        )

    # ---- each alone ------------------------------------------------------------------------------

    def _measure_decoding(self) -> None:
        workers, clock = self._current.workers, self._clock
        first, pixels_NHWC = first_pass(
            self._bench, workers, max(self._options.limit_s, clock.left_s(FIRST_PASS_SHARE))
        )
        self._pixels_NHWC = pixels_NHWC
        self._record(first)
        self._bench = replace(self._bench, refs=self._bench.refs[: first.num_images])
        for decode in self._decode_modes():
            for count in worker_counts(workers, self._num_cores):
                found = measure_decoding(self._bench, decode, count, self._options.limit_s)
                self._record(found)
                self._decode[decode, count] = found
        self._log_decoding()
        if note := disk_note(first, self._decode[self._current.decode, workers], self._num_cores):
            self._note(note)

    def _log_decoding(self) -> None:
        for found in self._decode.values():
            self._log(
                f"decoding alone, {found.decode}, workers {found.workers}: "
                f"{found.images_per_s:,.1f} images/s, {found.cpu_ms_per_image:.2f} ms of CPU an "
                "image"
            )

    def _proven_precisions(self, batch_size: int) -> list[Precision]:
        """The precisions that agree with fp32; to convert and compare them may take minutes."""
        proven = []
        for precision in self._precisions():
            try:
                self._sessions.open(
                    replace(
                        self._current.session,
                        precision=precision,
                        batch_size=batch_size,
                        part=batch_size,
                    )
                )
            except PrecisionRefused as error:
                if precision == self._current.session.precision:
                    raise
                self._note(f"left out: {error}")
            else:
                proven.append(precision)
        return proven

    def _measure_inference(self, sizes: Sequence[int], precisions: Sequence[Precision]) -> None:
        """Inference alone, first at the job's own streams and threads."""
        skipped: list[str] = []
        for streams, threads in self._layouts():
            for precision in precisions:
                rate = 0.0
                for size in sizes:
                    session = Session(precision, size, streams, threads, part=size)
                    if self._is_too_large(session):
                        continue
                    if not self._has_room(session, rate, sizes[0]):
                        skipped.append(session_name(session))
                        continue
                    rate = self._infer_alone(session) or rate
        if skipped:
            self._note(f"not measured, for lack of time: {'; '.join(skipped)}")

    def _has_room(self, session: Session, images_per_s: float, smallest: int) -> bool:
        """Whether there is time to open and measure a session, at the rate of a smaller one."""
        own = session == self._current.session.alone
        if own and session.batch_size == smallest:
            return True
        open_s = max((one.open_s or 0.0 for one in self._infer.values()), default=0.0)
        calls_s = 3 * session.streams * session.batch_size / images_per_s if images_per_s else 0.0
        needed_s = open_s + max(self._options.limit_s, calls_s)
        return needed_s <= self._clock.left_s(1.0 if own else LIMITS_SHARE)

    def _infer_alone(self, session: Session) -> float | None:
        """Measure one session; returns images per second, or None where it does not fit."""
        assert self._pixels_NHWC is not None
        started = time.perf_counter()
        found = InferLimit(session, too_large=True)
        try:
            opened = self._sessions.open(session)
            open_s = time.perf_counter() - started
            alone = measure_inference(
                opened, self._pixels_NHWC, session.batch_size, self._options.limit_s
            )
            found = InferLimit(
                session,
                too_large=False,
                images_per_s=alone.images_per_s,
                cpu_ms_per_image=alone.cpu_ms_per_image,
                open_s=open_s,
            )
        except _MAY_LACK_MEMORY as error:
            self._require_lack_of_memory(error, session)
        self._infer[session] = found
        self._record(found)
        if found.images_per_s is not None:
            self._log(
                f"inference alone, {session_name(session)}: {found.images_per_s:,.1f} images/s"
            )
        return found.images_per_s

    def _require_lack_of_memory(self, error: Exception, session: Session) -> None:
        """Note that a batch size is too large; any other error ends the tuning.

        Raises:
            Exception: the error, where it speaks of something else.
        """
        if fault_of(error, gpus_of(self._bench.job.provider)).kind != "memory":
            raise error
        self._sessions.close()  # a session that lacked memory may not recover
        gc.collect()  # what the error's traceback refers to
        self._lacking.append(session)
        self._note(f"{session_name(session)}, and larger batches: too large for the memory")

    def _too_large(self) -> dict[Precision, int]:
        """The smallest batch size of each precision that lacked memory."""
        found: dict[Precision, int] = {}
        for one in self._lacking:
            size = found.get(one.precision, one.batch_size)
            found[one.precision] = min(size, one.batch_size)
        return found

    def _is_too_large(self, session: Session) -> bool:
        """Whether one that needs no more memory lacked it; each stream of a device has its own."""
        return any(
            one.precision == session.precision
            and (self._sessions.on_cpu or one.streams <= session.streams)
            and one.batch_size <= session.batch_size
            and one.part <= session.part
            for one in self._lacking
        )

    # ---- the whole -------------------------------------------------------------------------------

    def _explore(self, limits: Limits, sizes: Sequence[int]) -> None:
        """The job's own settings, then others, one thing after the other at its best.

        Raises:
            UsageError: there was no time for a single trial.
        """
        own = limits.predict(self._current)
        if own is not None:
            self._try(own, self._clock.left_s())
        counts = worker_counts(self._current.workers, self._num_cores)
        modes = self._decode_modes()
        feeds = [limits.best_workers(mode, counts) for mode in modes]
        sessions = [self._in_usual_batches(session) for session in self._infer]
        self._try_all((Settings(session, *feed) for session in sessions for feed in feeds), limits)
        if not summarise(self._trials):
            raise UsageError(self._too_little(own))
        best = self._best_so_far()
        self._try_all((Settings(best.session, best.decode, count) for count in counts), limits)
        if self._has_parts:
            best = self._best_so_far()
            self._try_all(self._in_batches(best, sizes), limits)
        best = self._best_so_far()
        self._try_all((replace(best, session=session) for session in sessions), limits)
        if not self._options.batch_sizes and self._bench.model.bundle.meta.fixed_batch is None:
            self._try_beside_the_best(limits)
        if untried := self._untried - {one.settings for one in self._trials}:
            self._note(f"not tried, for lack of time: {len(untried)} combinations")

    def _in_usual_batches(self, alone: Session) -> Session:
        """A session that was measured alone, its parts in batches of the job's own size."""
        if not self._has_parts:
            return alone
        return replace(alone, batch_size=max(alone.part, self._current.session.batch_size))

    def _in_batches(self, settings: Settings, sizes: Iterable[int]) -> list[Settings]:
        """The same with batches of other sizes, as far as these can be."""
        session, found = settings.session, []
        for size in sizes:
            if (session.part if self._has_parts else 1) <= size <= self._num_listed:
                part = session.part if self._has_parts else size
                other = replace(session, batch_size=size, part=part)
                found.append(replace(settings, session=other))
        return found

    def _try_beside_the_best(self, limits: Limits) -> None:
        """Half and double the best batch size, as long as that brings it further."""
        seen: set[int] = set()
        while (size := (best := self._best_so_far()).session.batch_size) not in seen:
            seen.add(size)
            beside = self._in_batches(best, (size // 2, 2 * size))
            for alone in {one.session.alone for one in beside} - set(self._infer):
                if self._has_room(alone, self._infer[best.session.alone].images_per_s or 0.0, 0):
                    self._infer_alone(alone)
            self._try_all(beside, limits)

    def _best_so_far(self) -> Settings:
        return summarise(self._trials)[0].settings

    def _try_all(self, candidates: Iterable[Settings], limits: Limits) -> None:
        """Try what could still win, the highest bound first, as long as there is time."""
        tried = {one.settings for one in self._trials}
        for predicted in ranked(set(candidates) - tried, limits, self._current):
            if not can_win(predicted, summarise(self._trials)):
                continue
            if not self._try(predicted, self._clock.left_s(EXPLORING_SHARE)):
                self._untried.add(predicted.settings)

    def _try(self, predicted: Prediction, left_s: float) -> bool:
        """One trial, if there is time for it."""
        session = predicted.settings.session
        if self._is_too_large(session):
            return True
        open_s = 0.0 if self._sessions.holds(session) else self._infer[session.alone].open_s or 0.0
        expected_s = estimated_s(predicted, self._options.trial_s)
        if open_s + expected_s > left_s:
            return False
        try:
            opened = self._sessions.open(session)
            trial = run_trial(self._bench, opened, predicted, self._options.trial_s, 2 * expected_s)
        except _MAY_LACK_MEMORY as error:
            self._require_lack_of_memory(error, session)
            trial = Trial(predicted, too_large=True)
        self._trials.append(trial)
        self._record(trial)
        if not trial.too_large:
            self._log(
                f"{settings_name(trial.settings)}: {trial.images_per_s:,.1f} images/s "
                f"({trial.efficiency:.0%} of its limit)"
            )
        return True

    def _repeat(self) -> None:
        """The better half again, then its better half, and so on; then the best few in turns.

        So what else the machine does for a while cannot decide. The turns end when the choice is
        clear, or the budget is spent.
        """
        num_left = len(summarise(self._trials))
        while num_left > NUM_FINALISTS:
            num_left = max(NUM_FINALISTS, num_left // 2)
            self._try_again(num_left)
        for number in itertools.count(1):
            if not self._try_again(num_left):
                break
            if number >= NUM_ROUNDS and max(self._gains().values(), default=0.0) <= CLEAR:
                return
        gains = self._gains()
        if (gain := max(gains.values(), default=0.0)) > CLEAR:
            rival = max(gains, key=lambda one: gains[one])
            how = "was measured once" if gain == math.inf else f"may be faster by {gain:.0%}"
            self._note(
                f"the choice is not clear, so much do trials differ here: {settings_name(rival)} "
                f"{how}; a larger --budget, or less other work on the machine, would tell"
            )

    def _gains(self) -> dict[Settings, float]:
        chosen = choose(summarise(self._trials), self._current).settings
        return possible_gains(self._trials, chosen)

    def _try_again(self, num_left: int) -> bool:
        """One more trial of the best so many; whether there was time for all."""
        again = finalists(summarise(self._trials), self._current, num_left)
        return all(self._try(one.predicted, self._clock.left_s()) for one in again)

    def _too_little(self, own: Prediction | None) -> str:
        """Why there was not a single trial, and what to do."""
        budget_s = self._clock.budget_s
        if self._lacking:
            return "tune: no batch size fits into the memory; give smaller ones: --batch-sizes 1,2"
        if own is None:
            return (
                f"tune: --budget {budget_s:g} was spent before inference at the job's own settings "
                f"was measured; give --budget {4 * max(budget_s, self._clock.elapsed_s):.0f}"
            )
        needed_s = self._clock.elapsed_s + 2 * estimated_s(own, self._options.trial_s)
        return (
            f"tune: --budget {budget_s:g} leaves no time to run the pipeline at the job's own "
            f"settings ({settings_name(own.settings)}); give at least --budget {2 * needed_s:.0f}"
        )

    def _keys(self, best: Settings) -> dict[str, int | str]:
        """Settings as keys of the job file: as they stand there, or `auto`, where that will do."""
        job, session = self._bench.job, best.session
        automatic = self._sessions.target(RuntimeSpec())
        threads = self._sessions.target(RuntimeSpec(streams=session.streams)).threads
        is_own_size = session.batch_size == self._current.session.batch_size
        keys: dict[str, int | str] = {
            "batch_size": job.batch_size if is_own_size else session.batch_size,
            "loader.workers": shortest(job.loader.workers, self._num_cores, best.workers),
            "runtime.streams": shortest(job.runtime.streams, automatic.streams, session.streams),
            "runtime.threads": shortest(job.runtime.threads, threads, session.threads),
        }
        if self._has_parts:
            own = self._current.session
            is_own_part = replace(session, batch_size=own.batch_size) == own
            keys["runtime.part"] = job.runtime.part if is_own_part else session.part
        if len(self._precisions()) > 1:
            keys["precision"] = session.precision
        if len(self._decode_modes()) > 1:
            keys["loader.decode"] = best.decode
        return keys

    def _note(self, text: str) -> None:
        """Say something that belongs to the result as well."""
        self._notes.append(text)
        self._log(text)
