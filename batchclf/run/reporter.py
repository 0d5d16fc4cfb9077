"""What a running job tells whoever shows it to people, and whoever watches over it."""

from batchclf.results.records import Failure


class Reporter:
    """Where progress and log lines go, and what is told to whoever watches over this process.

    This one says nothing.
    """

    def log(self, text: str) -> None:
        """One line for people."""

    def begin(self, num_images: int, num_done: int, num_errors: int) -> None:
        """Classifying begins: how many images there are, have a record, and are errors by now."""

    def update(self, num_images: int, num_errors: int) -> None:
        """How many images have a record by now, and how many of those are errors."""

    def decoding(self, worker: int, index: int | None) -> None:
        """A worker thread begins an image, by index in the listing; None: it has none."""

    def beat(self) -> None:
        """All is well, though no image is finished: one takes long, but not too long."""

    def found_guilty(self, path: bytes, failure: Failure) -> None:
        """An image crashes or hangs whoever decodes it."""

    def before_write(self) -> None:
        """The output is about to be changed; returns when it is surely this process's."""
