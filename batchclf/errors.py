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
│   ├── WeightsUnavailable       pretrained weights could not be downloaded
│   └── PrecisionRefused         a reduced precision agrees too seldom with fp32
└── Interrupted        130, 143  SIGINT or SIGTERM: drained, committed, resumable

A bad image is none of these: it is a `Failure` record (results/records.py).
"""

import signal


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


class WeightsUnavailable(EnvironmentFailed):
    """Pretrained weights could not be downloaded."""


class PrecisionRefused(EnvironmentFailed):
    """On a sample of the job's images, a reduced precision agrees too seldom with fp32."""


class Interrupted(BatchclfError):
    """A signal asked the job to stop; what is committed stays and can be resumed."""

    def __init__(self, signal_number: int, advice: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {advice}")
        self.exit_code = 128 + signal_number
