"""What decoding costs, and how far `fast` and other decoders are from the exact pixels.

    python -m tests.benchmarks.decode --images PHOTOS [--resize 232] [--crop 224] [--rounds 3]

Three sets of JPEGs: the photos, some of them enlarged to 12 megapixels, and one of 16 x 16 pixels,
which shows what an image costs whatever its size. The decoders take turns, on one thread, with all
files in memory. Peers that are not installed are left out, with a word on stderr.

`mean` and `worst` are of the images' mean absolute differences from `exact`, `pixel` is the largest
difference of any pixel, all in steps of 1/255. `speed` is relative to `exact`. Prints a table
(least CPU milliseconds per image of the rounds) and, as the last line, the same as JSON.
"""

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from batchclf.images import jpeg, resampler
from batchclf.images.decode import Decoder
from batchclf.images.jpeg import decoder_name
from batchclf.images.resample import crop_window, resized_size
from batchclf.images.resampler import NATIVE, resampler_name
from batchclf.results.records import DecodeMode, Pixels, Preprocess
from tests.images.common import encode

Decode = Callable[[bytes, Preprocess], Pixels]
TINY = Preprocess(16, (16, 16), "bilinear", None, None)
NUM_TINY = 2000
LARGE_PIXELS = 12e6
COLUMNS = ("files", "decoder", "cpu_ms", "speed", "mean", "worst", "pixel")


def own(
    mode: DecodeMode, usable: bool, native: tuple[str, ...], data: bytes, preprocess: Preprocess
) -> Pixels:
    """What a job does where simplejpeg is usable, or is not, and with such native code."""
    slot_HWC = np.zeros((*preprocess.crop, 3), np.uint8)
    installed, jpeg.USABLE = jpeg.USABLE, usable
    resampler.NATIVE = native
    loaded = Decoder(preprocess, mode)(data, b"x.jpg", slot_HWC)
    jpeg.USABLE, resampler.NATIVE = installed, NATIVE
    assert loaded.failure is None, loaded
    return slot_HWC


# ---- peers ---------------------------------------------------------------------------------------


def header(data: bytes, preprocess: Preprocess) -> tuple[int, int, int]:
    """Width, height and the factor by which `fast` reduces."""
    import simplejpeg

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return width, height, Decoder(preprocess, "fast")._reduction(width, height)


def box_of(
    size: tuple[int, int], scale: float, preprocess: Preprocess
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """The crop's edges in an image of `size` decoded at `scale`, and the size to resize it to."""
    target = resized_size(*size, preprocess.resize)
    window = crop_window(target, (preprocess.crop[1], preprocess.crop[0]))
    left, top, right, bottom = window.box
    scale_w, scale_h = (scale * full / small for full, small in zip(size, target, strict=True))
    box = left * scale_w, top * scale_h, right * scale_w, bottom * scale_h
    return box, (window.width, window.height)


def by_pillow(
    pixels_HWC: Pixels, size: tuple[int, int], scale: float, preprocess: Preprocess
) -> Pixels:
    """Crop and resize as `fast` does."""
    (left, top, right, bottom), small = box_of(size, scale, preprocess)
    image = Image.fromarray(pixels_HWC)
    box = left, top, min(right, image.width), min(bottom, image.height)
    return np.asarray(image.resize(small, Image.Resampling.BILINEAR, box))


def simplejpeg_in_eighths(simplejpeg: Any, data: bytes, preprocess: Preprocess) -> Pixels:
    """The least scale of n/8 that leaves twice the target."""
    width, height, _ = header(data, preprocess)
    target = resized_size(width, height, preprocess.resize)
    least = 2 * max(target[0] / width, target[1] / height)
    eighths = min(8, math.ceil(8 * least))
    least_w, least_h = (-(-edge * eighths // 8) for edge in (width, height))
    pixels_HWC = simplejpeg.decode_jpeg(data, min_width=least_w, min_height=least_h)
    return by_pillow(pixels_HWC, (width, height), eighths / 8, preprocess)


def opencv(cv2: Any, data: bytes, preprocess: Preprocess) -> Pixels:
    """IMREAD_REDUCED_COLOR_n, then INTER_AREA, which knows whole pixels only."""
    width, height, factor = header(data, preprocess)
    flag = cv2.IMREAD_COLOR if factor == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}")
    encoded = np.frombuffer(data, np.uint8)
    bgr_HWC = cv2.imdecode(encoded, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    box, small = box_of((width, height), 1 / factor, preprocess)
    left, top, right, bottom = (round(edge) for edge in box)
    small_HWC = cv2.resize(bgr_HWC[top:bottom, left:right], small, interpolation=cv2.INTER_AREA)
    pixels_HWC: Pixels = cv2.cvtColor(small_HWC, cv2.COLOR_BGR2RGB)
    return pixels_HWC


def pyturbojpeg(turbojpeg: Any, data: bytes, preprocess: Preprocess) -> Pixels:
    """The same scales as `fast`, through the system's libturbojpeg."""
    width, height, factor = header(data, preprocess)
    decoder = turbojpeg.TurboJPEG()
    pixels_HWC = decoder.decode(data, turbojpeg.TJPF_RGB, scaling_factor=(1, factor))
    return by_pillow(pixels_HWC, (width, height), 1 / factor, preprocess)


def torchvision_io(io: Any, data: bytes, preprocess: Preprocess) -> Pixels:
    """At full size: it knows no other."""
    import torch

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels_CHW = io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB)
    pixels_HWC = np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())
    height, width, _ = pixels_HWC.shape
    return by_pillow(pixels_HWC, (width, height), 1.0, preprocess)


PEERS: dict[str, tuple[str, Callable[[Any, bytes, Preprocess], Pixels]]] = {
    "simplejpeg in eighths": ("simplejpeg", simplejpeg_in_eighths),
    "OpenCV": ("cv2", opencv),
    "PyTurboJPEG": ("turbojpeg", pyturbojpeg),
    "torchvision.io": ("torchvision.io", torchvision_io),
}
"""Each peer: the module it needs, and a decoder that is given it."""


def decoders() -> dict[str, Decode]:
    """Those that run here, `exact` first."""
    found: dict[str, Decode] = {}
    modes: tuple[DecodeMode, ...] = ("exact", "fast")
    for mode in modes:
        found[mode] = partial(own, mode, jpeg.USABLE, NATIVE)
        for instructions in NATIVE[1:]:
            found[f"{mode}, {instructions}"] = partial(own, mode, jpeg.USABLE, (instructions,))
        if NATIVE:
            found[f"{mode}, Pillow resizes"] = partial(own, mode, jpeg.USABLE, ())
        if jpeg.USABLE:
            found[f"{mode}, Pillow alone"] = partial(own, mode, False, ())
    sample = encode(Image.new("RGB", (40, 30)), "JPEG")
    for name, (module, peer) in PEERS.items():
        try:
            decode = partial(peer, importlib.import_module(module))
            decode(sample, TINY)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        found[name] = decode
    return found


# ---- measuring -----------------------------------------------------------------------------------


def measure(
    made: Mapping[str, Decode],
    label: str,
    files: Sequence[bytes],
    preprocess: Preprocess,
    rounds: int,
) -> list[dict[str, Any]]:
    """One row per decoder, the first of which is what the others are compared with."""
    cpu_s: dict[str, list[float]] = {name: [] for name in made}
    pixels_NHWC: dict[str, list[Pixels]] = {}
    for _ in range(rounds):
        for name, decode in made.items():
            started = time.process_time()
            pixels_NHWC[name] = [decode(file, preprocess) for file in files]
            cpu_s[name].append(time.process_time() - started)
    rows = []
    for name in made:
        differences = [
            np.abs(one.astype(int) - exact)
            for one, exact in zip(pixels_NHWC[name], pixels_NHWC["exact"], strict=True)
        ]
        means = [difference.mean() for difference in differences]
        rows.append(
            {
                "files": label,
                "decoder": name,
                "cpu_ms": round(1000 * min(cpu_s[name]) / len(files), 4),
                "speed": round(min(cpu_s["exact"]) / min(cpu_s[name]), 2),
                "mean": round(float(np.mean(means)), 3),
                "worst": round(float(max(means)), 3),
                "pixel": int(max(difference.max() for difference in differences)),
            }
        )
    return rows


def enlarged(file: Path) -> bytes:
    """The photo with 12 million pixels."""
    with Image.open(file) as image:
        factor = (LARGE_PIXELS / (image.width * image.height)) ** 0.5
        size = round(image.width * factor), round(image.height * factor)
        large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return encode(large, "JPEG", quality=90)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG photos")
    parser.add_argument("--num-images", type=int, default=125)
    parser.add_argument("--num-large", type=int, default=4)
    parser.add_argument("--resize", type=int, default=232)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    preprocess = Preprocess(
        arguments.resize, (arguments.crop, arguments.crop), "bilinear", None, None
    )
    paths = sorted(arguments.images.iterdir())
    some = [
        paths[number * len(paths) // arguments.num_large] for number in range(arguments.num_large)
    ]
    photos = [path.read_bytes() for path in paths[: arguments.num_images]]
    tiny = [encode(Image.new("RGB", (16, 16), (200, 90, 9)), "JPEG")] * NUM_TINY
    sets = {
        "photos": (photos, preprocess),
        "12 megapixels": ([enlarged(path) for path in some], preprocess),
        "16 pixels": (tiny, TINY),
    }
    made = decoders()
    rows = [
        row
        for label, (files, wanted) in sets.items()
        for row in measure(made, label, files, wanted, arguments.rounds)
    ]
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print(
            f"{row['files']:<15}{row['decoder']:<22}", *(f"{row[key]!s:>8}" for key in COLUMNS[2:])
        )
    made_by = {"decoder": decoder_name(), "resampler": resampler_name()}
    print(json.dumps({**made_by, "resize": arguments.resize, "rows": rows}))


if __name__ == "__main__":
    main()
