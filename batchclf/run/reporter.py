"""What a running job tells whoever shows it to people, and whoever watches over it."""

from batchclf.images.archives.listing import Archive
from batchclf.images.watch import Watch
from batchclf.results.records import Failure, Stretch
from batchclf.results.stats import Live


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

    def live(self, live: Live) -> None:
        """What is to be seen of the run just now; told every second or so, and at its end."""

    @property
    def watch(self) -> Watch:
        """Who is told what image each thread is at."""
        return Watch(self.loading, self.beat)

    def loading(self, thread: int, index: int | None, step: int) -> None:
        """A thread is at an image, as `Note` of images/watch.py."""

    def beat(self) -> None:
        """All is well, though no image is finished: one takes long, but not too long."""

    def found_guilty(self, guilty: bytes | Stretch, failure: Failure) -> None:
        """An image, or a stretch of an archive, crashes or hangs whoever loads it."""

    def listing(self, archive: Archive | None) -> None:
        """An archive is being listed; None: none is, any more."""

    def found_unlistable(self, archive: Archive, failure: Failure) -> None:
        """An archive crashes or holds up whoever lists it."""

    def before_write(self) -> None:
        """The output is about to be changed; returns when it is surely this process's."""
