"""The codes that a record may hold, each with what it means and what may be done about it."""

from collections.abc import Mapping
from typing import Final

ERROR_CODES: Final[Mapping[str, str]] = {
    "changed": "The file, archive or object was written to while the job ran; run it anew.",
    "corrupt": "The image is damaged and cannot be decoded.",
    "damaged_archive": "The archive or Parquet file is damaged from here on; what can be read is.",
    "decoder_crash": "The process that decoded it died, also at a second try, alone.",
    "empty_file": "The file has no bytes.",
    "io_error": "It cannot be read, after several tries: a failing disk, mount or server.",
    "non_finite_output": "The model gives NaN or infinity for it, so no class can be named.",
    "not_an_image": "Its content is none of an image, whatever its name says.",
    "not_found": "A list names it, and nothing is there.",
    "not_regular_file": "A folder, socket, device or pipe with the name of an image.",
    "oom": "Memory does not suffice to decode it, also at a second try, alone.",
    "outside_root": "A link that leads out of the input folder.",
    "path_too_long": "The path is longer than the system opens.",
    "permission_denied": "The user who runs the job may not read it.",
    "symlink_loop": "A link that leads back to itself.",
    "timeout": "It was not read and decoded within `loader.max_seconds`.",
    "too_large": "It has more pixels than `loader.max_pixels` allows.",
    "too_large_bytes": "The file is larger than `loader.max_bytes` allows; it was not read.",
    "truncated": "It ends before the image does: copied or downloaded in part.",
    "unsafe_member": "A name in an archive that leads out of it.",
    "unsupported_format": "An image of a format that is not read here; the message says what does.",
    "unsupported_mode": "Its samples are of a kind that is not read here; the message says which.",
    "vanished": "It was there when the input was listed, and is no longer.",
}
"""Of records without a prediction; they stand in `error.code`, for programs to rely on."""

WARNING_CODES: Final[Mapping[str, str]] = {
    "16bit_clipped": "Samples of 16 bits, cut off at 255, as `loader.sixteen_bit: clip` asks.",
    "16bit_range:LOW-HIGH": "Grey of 16 bits that uses so little of them that it comes out nearly "
    "black; see `loader.sixteen_bit`.",
    "16bit_scaled": "Samples of 16 bits, made 8 by what the file says they span.",
    "16bit_stretched": "Samples of 16 bits, the lowest made black and the highest white, as "
    "`loader.sixteen_bit: stretch` asks.",
    "animated:FRAMES": "The first of several frames was classified.",
    "exif_corrupt": "Its EXIF block is damaged, so it is shown as it stands.",
    "extension_mismatch": "The name promises another format than the content has.",
    "has_alpha": "Transparency is left out: the colours below it are what was classified.",
    "icc_ignored": "It has a colour profile other than sRGB, which is not applied.",
    "jpeg_corrupt": "Its compressed pixels are damaged; `loader.strict: true` makes it `corrupt`.",
    "missing_end": "The PNG lacks its last chunk; `loader.strict: true` makes it `corrupt`.",
    "pages:PAGES": "The first of several pages was classified.",
}
"""Of records with a prediction, in `warnings`; words in capitals stand for numbers."""
