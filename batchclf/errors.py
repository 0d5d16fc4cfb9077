"""Every error a user can meet, each with the exit code of the command that ends with it.

BatchclfError                 1  unexpected; also the root of the tree
├── UsageError                2  the command, the job file or a file it names is wrong
│   ├── JobFileError             the job file does not parse or validate
│   ├── NoImagesError            the input holds no image
│   ├── ModelError               the model cannot be built, exported or fed
│   └── ResumeRefused            the output folder belongs to another job or another process
├── ErrorLimitPassed          3  more bad images than `errors.max` allows
├── ProviderError             4  the provider asked for is not the one that would run
├── EnvironmentFailed         5  the machine failed: disk, permissions, network
│   ├── OutOfMemory              memory does not suffice for a batch
│   ├── WeightsUnavailable       pretrained weights could not be downloaded
│   └── PrecisionRefused         a reduced precision agrees too seldom with fp32
├── WorkerFailed              1  the job's process met a bug, or died or hung again and again
├── DeviceLost                1  the device does not answer any more
│   └── ProcessLost              a process of one of several devices ended without a word
└── Interrupted   129, 130, 143  SIGHUP, SIGINT or SIGTERM: drained, committed, resumable

A bad image is none of these: it is a `Failure` record (results/records.py).
"""

import signal
from functools import partial


class BatchclfError(Exception):
    """Something the user has to know: what happened, what was found, what to do."""

    exit_code = 1


class UsageError(BatchclfError):
    """The command, the job file or a file it names is wrong; running it again will not help."""

    exit_code = 2


class JobFileError(UsageError):
    """The job file (or an override of one of its keys) does not parse or validate."""


class NoImagesError(UsageError):
    """The input holds no image."""


class ModelError(UsageError):
    """The model named cannot be built, exported, or fed with RGB images."""


class ResumeRefused(UsageError):
    """The output folder holds another job's results, or another process is writing to it."""


class ErrorLimitPassed(BatchclfError):
    """More images failed than `errors.max` allows; what is written stays and can be resumed."""

    exit_code = 3


class ProviderError(BatchclfError):
    """The execution provider or device asked for is not the one that would run."""

    exit_code = 4


class EnvironmentFailed(BatchclfError):
    """The machine failed the job: disk full, output not writable, cache not writable."""

    exit_code = 5


class OutOfMemory(EnvironmentFailed):
    """Memory, of the device or of the machine, does not suffice for a batch of `batch_size`."""

    def __init__(self, batch_size: int, cause: str, *, can_be_smaller: bool) -> None:
        super().__init__(
            f"batch_size: memory does not suffice for {batch_size} at once: {cause}; "
            "choose a smaller one, or fewer runtime.streams, and run again to resume"
        )
        self.batch_size = batch_size
        self.cause = cause
        self.can_be_smaller = can_be_smaller

    def __reduce__(self) -> tuple[object, ...]:
        rebuild = partial(OutOfMemory, can_be_smaller=self.can_be_smaller)
        return rebuild, (self.batch_size, self.cause), self.__dict__


class WeightsUnavailable(EnvironmentFailed):
    """Pretrained weights could not be downloaded."""


class PrecisionRefused(EnvironmentFailed):
    """On a sample of the job's images, a reduced precision agrees too seldom with fp32."""


class WorkerFailed(BatchclfError):
    """The process that does the job's work met a bug, or starting it again did not help."""


class DeviceLost(BatchclfError):
    """This process cannot use its device any more; another one may."""


class ProcessLost(DeviceLost):
    """A process that uses one of several devices ended, be it over an image or with its device."""

    def __init__(self, cause: str, threads: range, *, is_killed: bool) -> None:
        """`threads`: what its threads are known by; `is_killed`: as where memory runs out."""
        super().__init__(cause)
        self.threads = threads
        self.is_killed = is_killed

    def __reduce__(self) -> tuple[object, ...]:
        rebuild = partial(ProcessLost, is_killed=self.is_killed)
        return rebuild, (str(self), self.threads), self.__dict__


class Interrupted(BatchclfError):
    """A signal asked the job to stop; what is committed stays and can be resumed."""

    def __init__(self, signal_number: int, advice: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {advice}")
        self.exit_code = 128 + signal_number
        self.signal_number = signal_number
        self.advice = advice

    def __reduce__(self) -> tuple[object, ...]:
        return Interrupted, (self.signal_number, self.advice), self.__dict__
