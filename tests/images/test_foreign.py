"""HEIC, JPEG XL and camera raw: decoded where a package for them is installed, else named."""

import io
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchclf.images.extras import EXTRAS
from batchclf.images.formats import content_format, jxl_size
from batchclf.results.records import Failure, Loaded, Pixels, Preprocess
from tests.conftest import ROOT, data, read_records
from tests.images.common import CASES, decode, dng, encode, picture, tiff
from tests.tiny import run_here, write_tiny_job

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

SMALL = Preprocess(48, (40, 44), "bilinear", None, None)


def heic(image: Image.Image | None = None) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image or picture(96, 64)).save(buffer, quality=90)
    return buffer.getvalue()


def jxl(image: Image.Image | None = None, **options: object) -> bytes:
    pytest.importorskip("pillow_jxl")
    return encode(image or picture(96, 64), "JXL", **options)


def camera_raw() -> bytes:
    pytest.importorskip("rawpy")
    ramp_HW = np.linspace(3000, 50000, 96 * 64).astype(np.uint16).reshape(64, 96)
    return dng(ramp_HW)


FILES: dict[str, Callable[[], bytes]] = {
    "HEIC": heic,
    "JPEG XL": jxl,
    "camera raw": camera_raw,
}
NAMES = {"HEIC": b"a.heic", "JPEG XL": b"a.jxl", "camera raw": b"a.dng"}


def as_its_package_reads(found: str, file: bytes) -> Image.Image:
    """In RGB, as somebody who uses the package has it."""
    if found == "camera raw":
        import rawpy

        with rawpy.imread(io.BytesIO(file)) as raw:
            return Image.fromarray(raw.postprocess(use_camera_wb=True))
    if found == "HEIC":
        import pillow_heif

        return pillow_heif.open_heif(io.BytesIO(file)).to_pillow().convert("RGB")
    return Image.open(io.BytesIO(file)).convert("RGB")


@pytest.mark.parametrize("found", FILES)
def test_a_format_of_an_installed_extra_has_the_pixels_of_its_package(found: str) -> None:
    file = FILES[found]()
    pixels_HWC, loaded = decode(file, NAMES[found], SMALL)
    assert loaded == Loaded()
    expected = encode(as_its_package_reads(found, file), "PNG")
    np.testing.assert_array_equal(pixels_HWC, decode(expected, preprocess=SMALL)[0])
    assert pixels_HWC.std() > 20


@pytest.mark.parametrize("found", FILES)
def test_such_a_file_under_another_formats_name_is_flagged(found: str) -> None:
    assert decode(FILES[found](), b"a.jpg", SMALL)[1] == Loaded(warnings=("extension_mismatch",))


@pytest.mark.parametrize("found", FILES)
def test_the_pixel_limit_holds_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    file = FILES[found]()
    assert decode(file, preprocess=SMALL, max_pixels=96 * 64)[1] == Loaded()
    if found == "JPEG XL":
        from pillow_jxl import JpegXLImagePlugin

        monkeypatch.setattr(JpegXLImagePlugin, "Decoder", None)
    elif found == "HEIC":
        import pillow_heif

        monkeypatch.setattr(pillow_heif.HeifImageFile, "load", None)
    failure = decode(file, preprocess=SMALL, max_pixels=96 * 64 - 1)[1].failure
    assert failure == Failure("too_large", "6,144 pixels; loader.max_pixels allows 6,143")


@pytest.mark.parametrize("found", FILES)
def test_a_file_of_an_extra_that_is_cut_is_no_image_of_less(found: str) -> None:
    file = FILES[found]()
    for share in (0.3, 0.6, 0.9):
        failure = decode(file[: int(len(file) * share)], preprocess=SMALL)[1].failure
        assert failure is not None
        assert failure.code in ("truncated", "corrupt", "not_an_image"), share


def test_a_heic_that_is_cut_is_truncated() -> None:
    file = heic()
    for share in (0.3, 0.6, 0.9):
        failure = decode(file[: int(len(file) * share)], preprocess=SMALL)[1].failure
        assert failure is not None
        assert failure.code == "truncated", share


def test_raw_that_ends_before_its_pixels_do_is_truncated() -> None:
    file = camera_raw()
    failure = decode(file[: -len(file) // 2], b"a.dng", SMALL)[1].failure
    assert failure is not None
    assert failure.code == "truncated"


@pytest.mark.parametrize("name", ["CanonRaw.cr3", "Panasonic.rw2"])
def test_a_makers_raw_file_without_its_pixels_is_truncated(name: str) -> None:
    pytest.importorskip("rawpy")
    failure = decode(data(CASES / name).read_bytes(), name.encode(), SMALL)[1].failure
    assert failure is not None
    assert failure.code == "truncated"


@pytest.mark.parametrize("found", FILES)
def test_random_damage_to_it_gives_pixels_or_a_failure_but_no_exception(
    caplog: pytest.LogCaptureFixture, found: str
) -> None:
    file = FILES[found]()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(file)
        for at in rng.integers(0, min(len(file), 400), rng.integers(1, 6)):
            damaged[at] = rng.integers(256)
        decode(bytes(damaged), NAMES[found], SMALL, max_pixels=1_000_000)
    assert not caplog.records


# ---- JPEG XL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize(
    "size", [(1, 1), (8, 8), (33, 17), (256, 256), (600, 400), (1600, 900), (3000, 7), (40, 30)]
)
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(
    size: tuple[int, int], container: bool
) -> None:
    file = jxl(Image.new("RGB", size), use_container=container)
    assert jxl_size(file) == size


def test_a_jpeg_inside_a_jpeg_xl_comes_out_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    jpeg = tmp_path / "a.jpg"
    jpeg.write_bytes(encode(picture(96, 64), "JPEG"))
    buffer = io.BytesIO()
    with Image.open(jpeg) as image:
        image.save(buffer, "JXL", lossless_jpeg=True)
    pixels_HWC, loaded = decode(buffer.getvalue(), preprocess=SMALL)
    assert loaded == Loaded()
    np.testing.assert_array_equal(pixels_HWC, decode(jpeg.read_bytes(), preprocess=SMALL)[0])


def test_a_jpeg_xl_in_16_bits_is_scaled_as_others_are() -> None:
    ramp = Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64))
    pixels_HWC, loaded = decode(jxl(ramp, lossless=True), preprocess=SMALL)
    assert loaded == Loaded(warnings=("16bit_scaled",))
    np.testing.assert_array_equal(pixels_HWC, decode(encode(ramp, "PNG"), preprocess=SMALL)[0])


# ---- camera raw ----------------------------------------------------------------------------------


def preview(**tags: int) -> bytes:
    """A TIFF that shows a small picture in its first directory, and has another one inside."""
    inner = 400
    file = bytearray(
        tiff({254: 1, 271: b"Maker\0", 330: inner}, bytes(range(16))).ljust(inner, b"\0")
    )
    entries = {256: 4, 257: 4, 259: 1, 262: 2} | {int(name[1:]): tags[name] for name in tags}
    file += struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        file += struct.pack("<HHII", tag, 4, 1, value)
    return bytes(file + bytes(4))


def ordinary(**tags: int) -> bytes:
    return tiff({int(name[1:]): tags[name] for name in tags}, bytes(range(16)))


RAW_IN_TIFF: dict[str, tuple[bytes, Callable[[], bytes]]] = {
    "DNG": (b"a.tif", lambda: ordinary(t50706=0x0401)),
    "CR2": (b"a.tif", lambda: b"II*\0\x10\0\0\0CR\2\0" + bytes(60)),
    "a sensor's values": (b"a.tif", lambda: ordinary(t262=32803)),
    "a preview, and a sensor's values": (b"a.tif", lambda: preview(t262=32803)),
    "a preview of a camera's": (b"a.tif", lambda: preview()),
    "a camera's name": (
        b"a.NEF",
        lambda: tiff({271: b"NIKON CORPORATION\0"}, bytes(range(16))),
    ),
}


@pytest.mark.parametrize("kind", RAW_IN_TIFF)
def test_of_a_raw_file_in_a_tiff_no_preview_is_predicted(kind: str) -> None:
    name, make = RAW_IN_TIFF[kind]
    failure = decode(make(), name, SMALL)[1].failure
    assert failure is not None
    assert failure.code in ("unsupported_format", "truncated", "corrupt")


def test_a_tiff_of_a_scanner_or_with_smaller_copies_is_no_raw_file() -> None:
    scan = tiff({271: b"Maker\0", 254: 0}, bytes(range(16)))
    pyramid = tiff({330: 8}, bytes(range(16)))  # inside, once more
    named_wrongly = tiff({}, bytes(range(16)))
    assert decode(scan, b"a.tif")[1] == Loaded()
    assert decode(pyramid, b"a.tif")[1] == Loaded()
    assert decode(named_wrongly, b"a.nef")[1] == Loaded(warnings=("extension_mismatch",))


# ---- without the packages ------------------------------------------------------------------------

WITHOUT = """
import json, sys
for name in ("pillow_heif", "pillow_jxl", "rawpy"):
    sys.modules[name] = None
import numpy as np
from batchclf.images.decode import Decoder
from batchclf.results.records import Preprocess
decode = Decoder(Preprocess(8, (8, 8), "bilinear", None, None))
found = []
for path in sys.argv[1:]:
    failure = decode(open(path, "rb").read(), path.encode(), np.zeros((8, 8, 3), np.uint8)).failure
    found.append((failure.code, failure.message))
print(json.dumps(found))
"""

HEADS = {
    "heif": b"\0\0\0\x18ftypheic" + bytes(60),
    "jxl": b"\xff\x0a" + bytes(60),
    "raw": b"FUJIFILMCCD-RAW 0201" + bytes(60),
}
RAW_HEADS = {
    "a.cr3": b"\0\0\0\x18ftypcrx " + bytes(60),
    "a.rw2": b"IIU\0\x18" + bytes(60),
    "a.crw": b"II\x1a\0\0\0HEAPCCDR" + bytes(60),
    "a.orf": b"IIRO\x08" + bytes(60),
    "a.mrw": b"\0MRM" + bytes(60),
    "a.x3f": b"FOVb" + bytes(60),
    "a.dng": dng(np.full((8, 8), 9000, np.uint16)),
    "a.nef": preview(t262=32803),
}


def test_without_its_package_a_format_is_unsupported_and_the_extra_is_named(
    tmp_path: Path,
) -> None:
    files = {f"a.{extra}": head for extra, head in HEADS.items()} | RAW_HEADS
    for name, head in files.items():
        (tmp_path / name).write_bytes(head)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *(tmp_path / name for name in files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    told = dict(zip(files, json.loads(done.stdout), strict=True))
    assert {code for code, _ in told.values()} == {"unsupported_format"}
    for name, (_, message) in told.items():
        extra = "raw" if name in RAW_HEADS else name.removeprefix("a.")
        assert f"pip install 'batchclf[{extra}]'" in message
        assert "convert it" in message


def test_every_extra_is_one_of_the_packages_own() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    for extra in EXTRAS.values():
        assert f"\n{extra.name} =\n    {extra.package}>=" in setup


def test_run_json_names_the_packages_that_read_such_files(tmp_path: Path) -> None:
    from importlib.metadata import version

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.heic").write_bytes(heic())
    run_here(write_tiny_job(tmp_path, input=str(folder)))
    (record,) = read_records(tmp_path / "out")
    assert "predictions" in record
    versions = json.loads((tmp_path / "out" / "run.json").read_text())["versions"]
    assert versions["pillow-heif"] == version("pillow-heif")


def test_a_turned_heic_is_upright_whatever_the_job_says() -> None:
    """As its package has it: how it is turned is said outside of EXIF."""
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.from_pillow(picture(96, 64)).save(buffer, quality=90, exif=exif.tobytes())
    shown: list[Pixels] = []
    for exif_transpose in (False, True):
        pixels_HWC, loaded = decode(
            buffer.getvalue(), preprocess=SMALL, exif_transpose=exif_transpose
        )
        assert loaded == Loaded()
        shown.append(pixels_HWC)
    np.testing.assert_array_equal(shown[0], shown[1])


def test_an_avif_file_that_calls_itself_a_plain_image_file_first_is_decoded() -> None:
    data = bytearray(encode(picture(40, 30), "AVIF"))
    assert data[8:12] == b"avif"
    data[8:12] = b"mif1"
    found_HWC, loaded = decode(bytes(data))
    assert loaded == Loaded()
    assert found_HWC.tobytes() == decode(encode(picture(40, 30), "AVIF"))[0].tobytes()


@pytest.mark.parametrize("magic", [b"PF\n", b"Pf\n"])
def test_portable_float_maps_are_named(magic: bytes) -> None:
    assert content_format(magic + b"2 2\n-1.0\n" + bytes(16)) == "Netpbm"
