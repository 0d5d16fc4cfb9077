"""WebDataset: what stands beside an image under the same key, such as its true label.

The key of a sample is a name up to the first dot behind its folder: `train/0001.jpg` and
`train/0001.cls` are parts of one.
"""

import orjson

MAX_SIDE_BYTES = 4096
"""Larger ones are no label, and are not read."""
MAX_TRUTH_BYTES = 200
_SUFFIXES = frozenset(
    b"cls cls2 index inx id json jsn txt text transcript caption cap tags url "
    b"npy npz pyd pickle pkl pth pt ten tb mp msg msgpack cbor bbox xml".split()
)
"""Of what is no sample of its own where an image has the same key."""
_JSON_KEYS = ("label", "cls", "class")


def side_kind(name: bytes) -> bytes | None:
    """The suffix of a name that may stand beside an image; None: it stands for itself."""
    suffix = name.rpartition(b"/")[2].rpartition(b".")[2].lower()
    return suffix if suffix in _SUFFIXES else None


def key_of(name: bytes) -> bytes:
    """What the parts of one sample have in common."""
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def may_hold_truth(kind: bytes, size: int) -> bool:
    """Whether it is worth being read."""
    return kind in (b"cls", b"json") and size <= MAX_SIDE_BYTES


def truth_in(kind: bytes, content: bytes) -> bytes:
    """The true label that a side file holds: a whole number or a name; empty: none."""
    truth = _label_in(content) if kind == b"json" else content.strip()
    is_label = len(truth) <= MAX_TRUTH_BYTES and not set(truth) & set(b"\0\n")
    return truth if is_label else b""


def _label_in(content: bytes) -> bytes:
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        return b""
    labels = [found.get(key) for key in _JSON_KEYS] if isinstance(found, dict) else [found]
    for label in labels:
        if isinstance(label, str) or type(label) is int:  # no bool
            return str(label).encode(errors="surrogatepass").strip()
    return b""
