"""Where a conversion goes: put there whole at its end, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from batchclf.errors import EnvironmentFailed, UsageError
from batchclf.images.source import would_list
from batchclf.images.streams import is_stream
from batchclf.results.files import sync_folder
from batchclf.results.output import Output
from batchclf.spec.input import places_of
from batchclf.spec.job import recorded_job
from batchclf.system.paths import kind_of, reason
from batchclf.system.rename import UNSUPPORTED, exchange, rename_noreplace

MARK = ".made-by-batchclf"
"""In each folder that a conversion wrote: no other folder is replaced."""


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A path for a file or a folder, which takes the place of `target` at the end of the block.

    Raises:
        EnvironmentFailed: disk full, I/O error, permission denied.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name[:100]}-", dir=target.parent) as temporary:
            draft = Path(temporary) / "draft"
            yield draft
            _put(draft, target, Path(temporary))
            sync_folder(target.parent)
    except OSError as error:
        raise EnvironmentFailed(
            f"{target}: cannot be written: {reason(error)}; nothing is there, or what was there "
            "before; mend it and run the same command again"
        ) from error


def _put(draft: Path, target: Path, temporary: Path) -> None:
    """What was there before is left in the temporary folder."""
    if draft.is_file():
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, target)
        return
    try:
        if target.exists():
            exchange(draft, target)
        else:
            rename_noreplace(draft, target)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if target.exists():
            os.rename(target, temporary / "replaced")
        os.rename(draft, target)


def require_target(target: Path, output: Output, *, is_folder: bool, overwrite: bool) -> None:
    """Refuse a place that holds anything that is not to be replaced, or that is in the input.

    Raises:
        UsageError: naming what is there.
        EnvironmentFailed: it cannot be looked at.
    """
    kind = kind_of(target, "-o")
    if kind != "nothing":
        _require_replaceable(target, kind, output, is_folder)
        if not overwrite:
            raise UsageError(f"-o: {target} is there; give another path, or --overwrite")
    elif target.is_symlink():
        raise UsageError(f"-o: {target} is a link that leads nowhere; give another path")
    held = target / "1.jpg" if is_folder else target
    for place in places_of(recorded_job(output.record.job).input):
        if not isinstance(place, Path) or is_stream(place):
            continue
        if would_list(Path(os.path.realpath(place)), held):
            raise UsageError(
                f"-o: {target} lies inside the input {place}, of which it would become a part; "
                "give another path"
            )


def _require_replaceable(target: Path, kind: str, output: Output, is_folder: bool) -> None:
    if kind != ("folder" if is_folder else "file"):
        wanted = "a folder" if is_folder else "a file"
        raise UsageError(f"-o: {target} is there, and is not {wanted}; give another path")
    if is_folder and not (target / MARK).exists():
        raise UsageError(
            f"-o: {target} is a folder that `convert` did not write: it holds no {MARK}, and so is "
            "never replaced; give another path"
        )
    own = {output.listing.path} | {
        path
        for part in output.parts
        for path in (part.files.predictions, part.files.stats, part.files.run)
    }
    if target in {Path(os.path.realpath(path)) for path in own}:
        raise UsageError(f"-o: {target} is a file of the job itself; give another path")


def mark(folder: Path) -> None:
    """Note in a folder that it was written by a conversion."""
    (folder / MARK).write_text("`batchclf convert --overwrite` may replace this folder.\n")
