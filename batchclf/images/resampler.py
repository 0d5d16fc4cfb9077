"""What resizes here: our own C (_resize.c), or Pillow where that could not be compiled."""

from importlib.metadata import PackageNotFoundError, version

try:
    # `from batchclf.images import` would not tell what is absent from what does not load.
    import batchclf.images._resize as _resize
except ImportError as error:
    NATIVE: tuple[str, ...] = ()
    """The instruction sets that the native code has here, the fastest first; empty: no such code.
    """
    WHY_NOT = (
        "it was not compiled: install batchclf again where there is a C compiler"
        if isinstance(error, ModuleNotFoundError)
        else f"it does not load ({error}): install batchclf again, compiled on a machine like this"
    )
else:
    NATIVE = _resize.INSTRUCTIONS
    WHY_NOT = ""
    """Why there is no native code."""


def resampler_name() -> str:
    """What resizes, as run.json says it."""
    return f"native ({NATIVE[0]})" if NATIVE else f"pillow {pillow_version()}"


def pillow_version() -> str:
    """The version of the installed Pillow; of another package in its place, that it is one."""
    try:
        return version("pillow")
    except PackageNotFoundError:
        return "(another package in its place)"
