"""The process that holds a job's output: its worker does the job, others take its place."""

import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import cast

from batchclf.engines.display import RunDisplay
from batchclf.engines.local.messages import Message, Setup
from batchclf.engines.local.process import Workers
from batchclf.engines.local.sender import Sender
from batchclf.engines.local.watcher import Result, Watcher
from batchclf.errors import EnvironmentFailed, Interrupted, ResumeRefused
from batchclf.results.bucket import Bucket
from batchclf.results.files import RunFiles
from batchclf.results.lock import Lease
from batchclf.results.mirror import Mirror
from batchclf.results.run_record import mark_ended
from batchclf.results.stats import Live
from batchclf.run.kept import keep_for_run
from batchclf.run.output import hold_output
from batchclf.run.recovery import Beginning, Death, Recovery
from batchclf.run.request import RunResult, files_of
from batchclf.spec.job import JobSpec
from batchclf.spec.options import RunOptions
from batchclf.system.interrupt import StopRequest
from batchclf.system.words import images

MARK_S = 10.0
MARK_STOPPED_S = 0.8
"""Seconds that run.json may take to be written at the end, and after a signal."""


class Supervisor(Watcher):
    """Runs one job in a worker, and in others after it."""

    def __init__(
        self, workers: Workers, display: RunDisplay, stop: StopRequest, started: float
    ) -> None:
        """`started`: time.perf_counter() from which start-up counts."""
        super().__init__(workers, display, stop)
        self._display: RunDisplay = display
        self._started = started
        self._num_images = 0
        """What this worker works on; 0: it has not begun."""
        self._num_started = 0
        self._has_told_of_stop = False
        self._sender: Sender | None = None
        self._lease: Lease
        self._job: JobSpec
        self._options: RunOptions

    def run(self, job: JobSpec, options: RunOptions) -> RunResult:
        """Run a job to its end, or resume it.

        Raises:
            BatchclfError: with the exit code and what to do; the output stays resumable.
        """
        files = files_of(job, options.shard)
        with (
            self._stop.drained_by_caller(),
            hold_output(job, options.shard, self._board.renewed) as self._lease,
            self._sending(files, options) as self._sender,
        ):
            self._board.renewed()
            try:
                self._job = keep_for_run(job, options, self._wait)
                self._options = options
                result = cast(RunResult, self._run(self._job))
                if self._sender is not None:
                    self._sender.finish()
                return result
            except BaseException as error:
                self._workers.kill()
                self._mark(files, error)
                if isinstance(error, Interrupted) and self._counts_records:
                    done = f"{self._board.num_images:,} of {images(self._num_images)}"
                    self._display.log(f"{done} have a record")
                raise
            finally:  # before the output is let go of
                self._workers.kill()

    def _sending(
        self, files: RunFiles, options: RunOptions
    ) -> AbstractContextManager[Sender | None]:
        """What sends the output to its bucket, where it is to be in one."""
        if files.address is None:
            return nullcontext()
        bucket = Bucket(files.address, "output")
        mirror = Mirror(bucket, files, overwrite=options.overwrite)
        return Sender(mirror, self._display, self._stop)

    @property
    def _counts_records(self) -> bool:
        """Whether the board counts what is in the output: no drafts of nodes, no second tries."""
        is_here = self._num_images > 0 and self._job.engine.name == "local"
        return is_here and not self._options.retry_failed

    def _wait(self) -> None:
        """What is to be looked at while the input is waited for."""
        self._lease.check()
        self._stop.raise_if_requested()

    def _mark(self, files: RunFiles, error: BaseException) -> None:
        """Say in run.json how a run ended, where its worker no longer could."""
        if self._beginning is None or isinstance(error, ResumeRefused):
            return  # it is another run's, or another process's by now
        seconds = MARK_S if self._stop.signal_number is None else MARK_STOPPED_S
        with suppress(EnvironmentFailed, OSError):  # what failed the job fails this as well
            self._lease.apart.do(seconds, mark_ended, files, error)

    # ---- the worker ------------------------------------------------------------------------------

    def _setup(self, recovery: Recovery) -> Setup:
        # What --overwrite asks for is done, once records are being written.
        is_to_discard = self._options.overwrite and self._beginning is None
        options = replace(self._options, overwrite=is_to_discard)
        started = self._started if self._num_started == 0 else time.perf_counter()
        self._num_started += 1
        self._num_images = 0
        return Setup(self._job, options, recovery, started)

    def _look(self) -> None:
        if self._beginning is not None:
            self._display.update(self._board.num_images, self._board.num_errors)
        is_stopping = self._stop.signal_number is not None and self._num_images > 0
        if is_stopping and not self._has_told_of_stop:
            self._has_told_of_stop = True
            self._display.log(
                "stopping: what is under way is finished first, within 8 s; the same signal "
                "again, a second later, ends it at once"
            )
        self._lease.check()
        if self._sender is not None:
            self._sender.check()

    @property
    def _is_classifying(self) -> bool:
        return self._board.num_images < self._num_images

    def _heard(self, message: Message) -> Result | Death | None:
        word, what = message
        if word == "live":
            self._display.live(cast(Live, what))
            return None
        if word != "begin":
            return super()._heard(message)
        num_images, num_done, num_errors = cast(tuple[int, int, int], what)
        self._num_images = num_images
        if self._beginning is None:
            now = time.perf_counter()
            self._beginning = Beginning(now, now - self._started, num_done)
        self._display.begin(num_images, num_done, num_errors)
        return None
