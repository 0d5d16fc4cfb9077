"""Warnings beside a prediction: what its reader should know of the file."""

from PIL import Image

from batchclf.images.formats import suffix_format
from batchclf.images.profile import is_srgb

_SAME_FORMAT = {"DIB": "BMP", "MPO": "JPEG"}


def name_notes(found: str, name: bytes) -> tuple[str, ...]:
    """Whether the name promises another format than the one that was `found`."""
    promised = suffix_format(name)
    if promised is None or _SAME_FORMAT.get(promised, promised) == _SAME_FORMAT.get(found, found):
        return ()
    return ("extension_mismatch",)


def colour_notes(profile: object) -> tuple[str, ...]:
    """Pillow and torchvision take all pixels for sRGB, as the model was trained."""
    return ("icc_ignored",) if isinstance(profile, bytes) and not is_srgb(profile) else ()


def content_notes(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """What Pillow tells of a loaded image; it may leave it at another frame."""
    found = str(image.format)
    notes = list(colour_notes(image.info.get("icc_profile")))
    if image.has_transparency_data:
        notes.append("has_alpha")
    if found == "PNG" and b"IEND" not in data[-64:] and b"IEND" not in data:
        notes.append("missing_end")
    if found != "MPO" and (num_frames := _num_frames(image)) > 1:
        notes.append(f"pages:{num_frames}" if found == "TIFF" else f"animated:{num_frames}")
    return tuple(notes)


def _num_frames(image: Image.Image) -> int:
    """Frames of the file; the first one is already loaded, so a damaged later one costs nothing."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001 - whatever a decoder raises there
        return 1
