"""Paths that a user named: what is there, or why that cannot even be looked at."""

import errno
import os

from batchclf.errors import EnvironmentFailed, UsageError

_MISTAKES = {
    errno.ENAMETOOLONG: "no path can be so long; give a shorter one",
    errno.ELOOP: "its links lead back to themselves; give what they should lead to",
}
_FORBIDDEN = (errno.EACCES, errno.EPERM)


def refusal(
    key: str, path: str | os.PathLike[str], error: OSError, deed: str = "read"
) -> UsageError | EnvironmentFailed:
    """The error for what the job names under `key` and the system does not give; `deed`: what for.

    A path that no machine could open is the user's mistake; the rest, this machine's failure.
    """
    advice = _MISTAKES.get(error.errno or 0)
    text = f"{key}: {os.fspath(path)}: cannot be {deed}: {reason(error)}; "
    if advice is not None:
        return UsageError(text + advice)
    if error.errno in _FORBIDDEN:
        return EnvironmentFailed(f"{text}let this user read it, and enter the folders above it")
    return EnvironmentFailed(f"{text}mend what it lies on, and run again")


def reason(error: OSError) -> str:
    """The system's words for an error, and its name."""
    code = errno.errorcode.get(error.errno, "") if error.errno else ""
    return f"{error.strerror} ({code})" if code else str(error)
