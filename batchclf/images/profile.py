"""ICC profiles: pixels are taken for sRGB, whatever a profile says; where that is not so, it shows.

Layout and tags: ICC.1:2022, sections 7.2 (header), 7.3 (tag table), 10.31 (XYZType).
"""

_MARK = b"ICC_PROFILE\0"
_CHUNK_HEAD = len(_MARK) + 2
"""Of a profile's part in a JPEG: the mark, its number, how many there are (ICC.1, annex B.4)."""
_JPEG_HEAD = 1 << 17
"""How far into a JPEG a profile is looked for: behind at most one full EXIF segment."""
_HEADER_BYTES = 128
_TAG_BYTES = 12
_SRGB_XYZ = {
    b"rXYZ": (0.4361, 0.2225, 0.0139),
    b"gXYZ": (0.3851, 0.7169, 0.0971),
    b"bXYZ": (0.1431, 0.0606, 0.7141),
}
"""sRGB's primaries as D50 (IEC 61966-2-1, adapted as in its usual profiles)."""
_TOLERANCE = 0.02
"""Profiles that call themselves sRGB differ by less; Display P3 and Adobe RGB by more than 0.07."""


def profile_in_jpeg(data: bytes) -> bytes | None:
    """The first part of the profile in a JPEG, which holds its header and its colours."""
    at = data.find(_MARK, 0, _JPEG_HEAD)
    if at < 2:
        return None
    length = int.from_bytes(data[at - 2 : at], "big")
    return data[at + _CHUNK_HEAD : at - 2 + length]


def is_srgb(profile: bytes) -> bool:
    """Whether a profile says what is assumed anyway: colours of sRGB, or greys."""
    if profile[36:40] != b"acsp":
        return False
    if profile[16:20] == b"GRAY":
        return True
    count = int.from_bytes(profile[_HEADER_BYTES : _HEADER_BYTES + 4], "big")
    table = profile[_HEADER_BYTES + 4 : _HEADER_BYTES + 4 + count * _TAG_BYTES]
    offsets = {
        table[at : at + 4]: int.from_bytes(table[at + 4 : at + 8], "big")
        for at in range(0, len(table), _TAG_BYTES)
    }
    return all(
        tag in offsets
        and all(
            abs(found - expected) < _TOLERANCE
            for found, expected in zip(_xyz(profile, offsets[tag]), colour, strict=True)
        )
        for tag, colour in _SRGB_XYZ.items()
    )


def _xyz(profile: bytes, offset: int) -> tuple[float, ...]:
    """Three numbers of 16 bits before and 16 after the point, behind eight bytes of type."""
    return tuple(
        int.from_bytes(profile[at : at + 4], "big", signed=True) / 65536
        for at in range(offset + 8, offset + 20, 4)
    )
