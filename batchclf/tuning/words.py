"""What settings are called, in lines for people and in the job file."""

from collections.abc import Sequence

from batchclf.spec.job import auto
from batchclf.tuning.records import Session, Settings


def shortest(own: int | str, automatic: int, chosen: int) -> int | str:
    """The job's own value or `auto` where it comes to the chosen number, else the number."""
    return next((value for value in (own, "auto") if auto(value, automatic) == chosen), chosen)


def listed(sizes: Sequence[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, sizes))


def session_name(session: Session) -> str:
    """A session's settings in words."""
    return (
        f"{session.precision}, batch {session.batch_size} in parts of {session.part}, streams "
        f"{session.streams} x threads {session.threads}"
    )


def settings_name(settings: Settings) -> str:
    """All settings in words."""
    return f"{session_name(settings.session)}, decode {settings.decode}, workers {settings.workers}"
