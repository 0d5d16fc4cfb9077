"""The options of `run` for those who watch it from elsewhere: logs, metrics, a word at its end."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import click

from batchclf.cli.streams import LogFormat, log_as
from batchclf.errors import BatchclfError, Interrupted, UsageError

if TYPE_CHECKING:
    from batchclf.cli.notify import Webhook
    from batchclf.engines.display import RunDisplay
    from batchclf.spec.job import JobSpec

Command = TypeVar("Command", bound=Callable[..., Any])


def watching_options(command: Command) -> Command:
    """Add the options; `Watching` takes what they gave."""
    for option in (
        click.option(
            "--metrics-port",
            metavar="[HOST:]PORT",
            help="Serve figures for Prometheus; without HOST, to this machine only.",
        ),
        click.option(
            "--notify",
            metavar="URL",
            help="POST the summary, or why it failed, to this address when the run ends.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="json: each line of the log is an object, with the facts of its message; a "
            "mistake in the options, and what libraries print by themselves, stays plain text.",
        ),
    ):
        command = option(command)
    return command


@dataclass(slots=True)
class Watching:
    """Who watches a run."""

    webhook: "Webhook | None"
    metrics: tuple[str, int] | None
    """Where to serve them: host and port."""
    output: str | None = None
    """Of the job, once it is known."""

    @classmethod
    def asked(cls, log_format: LogFormat, notify: str | None, metrics: str | None) -> "Watching":
        """What the options ask for; the log is written so from now on.

        Raises:
            UsageError: an option cannot be understood, or needs what is not installed.
        """
        log_as(log_format)
        webhook = address = None
        if notify is not None:
            from batchclf.cli.notify import Webhook

            webhook = Webhook(notify)
        if metrics is not None:
            missing = [one for one in ("prometheus_client", "pynvml") if find_spec(one) is None]
            if missing:
                raise UsageError(
                    f"--metrics-port needs {' and '.join(missing)}: pip install 'batchclf[metrics]'"
                )
            from batchclf.cli.metrics import split_address

            address = split_address(metrics)
        return cls(webhook, address)

    def display(self, job: "JobSpec", stack: ExitStack) -> "RunDisplay":
        """Who is shown the run of this job, until the stack is left.

        Raises:
            EnvironmentFailed: the host or port for metrics is not to be had.
        """
        from batchclf.cli.progress import Progress

        self.output = os.fspath(job.output)
        progress = stack.enter_context(Progress())
        if self.metrics is None:
            return progress
        from batchclf.cli.metrics import Metrics
        from batchclf.spec.job import gpus_of

        return stack.enter_context(Metrics(progress, self.metrics, gpus_of(job.provider)))

    @contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """Within, what ends the run is told before it is raised."""
        try:
            yield
        except BatchclfError as error:
            is_stopped = isinstance(error, Interrupted)
            status = "interrupted" if is_stopped else "failed"
            answer = {"status": status, "exit_code": error.exit_code, "error": str(error)}
            self.tell(answer, f"{status}: {error}", is_stopped=is_stopped)
            raise

    def tell(self, answer: dict[str, Any], text: str, *, is_stopped: bool = False) -> None:
        """Tell how the run ended to whoever asked; `text` is for people, as in a chat."""
        if self.webhook is not None:
            told = {
                "text": f"batchclf {self.output or 'run'}: {text}",
                "output": self.output,
                **answer,
            }
            self.webhook.tell(told, is_stopped=is_stopped)
