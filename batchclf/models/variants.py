"""A bundle at another precision: int8 and fp16 models, each in a bundle of its own.

OpenVINO reads fp16 and bf16 as a setting and computes the fp32 model in them; what has to be
another model is made once, from the fp32 bundle, and kept: inside a bundle of the user's that was
exported at this precision, or in the cache.
"""

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from batchclf.errors import ModelError, UsageError
from batchclf.models.bundle import (
    GOLDEN_FILE,
    META_FILE,
    MODEL_FILE,
    Bundle,
    BundleMeta,
    cached_bundle,
    find_cached,
    model_files,
    open_bundle,
    versions_of,
)
from batchclf.models.checks import OpenReference
from batchclf.models.golden import write_golden
from batchclf.results.records import Pixels, Precision

RECIPE = 4
"""Counted up when another model or golden.npz comes to be written, so that cached ones go."""
_NUM_GOLDEN = 4

Log = Callable[[str], None]


def needed_variant(provider: str, precision: Precision) -> Precision | None:
    """The precision of the model file that a provider wants; None: the fp32 model will do."""
    if precision == "int8":
        return "int8"
    return "fp16" if (provider, precision) == ("cuda", "fp16") else None


def nested_variant(bundle: Bundle, precision: Precision) -> Bundle | None:
    """The bundle at this precision that was exported with `bundle`, if there is one.

    Raises:
        ModelError: it is damaged, or was made from another model.
    """
    folder = bundle.folder / precision
    if not (folder / META_FILE).exists():
        return None
    variant = open_bundle(folder)
    if variant.meta.source.get("base") != bundle.digest:
        raise ModelError(
            f"{folder}: was made from another model than {bundle.folder / MODEL_FILE}; "
            "write both again with `batchclf export`"
        )
    return variant


@dataclass(frozen=True, slots=True)
class Conversion:
    """What converting a model takes, besides the model."""

    sample: Callable[[], Pixels]
    """Images of the job to calibrate int8 with, uint8 NHWC; called if they are needed."""
    sample_digest: Callable[[], str]
    """Another one where these may be others."""
    open_reference: OpenReference
    threads: int
    """On the CPU, for calibrating."""
    made_by: Mapping[str, str]
    """The installed ONNX Runtime and its version: each writes other bytes."""
    log: Log
    used: str | None = None
    """Digest of the model that a job began with. It is taken while the cache has it, whatever the
    images of the job are by now."""


def resolve_variant(bundle: Bundle, precision: Precision, conversion: Conversion) -> Bundle:
    """`bundle` at `precision` (int8 or fp16): exported with it, from the cache, or made now.

    Raises:
        ModelError: the model cannot be converted.
        UsageError: it has to be, and what converts it is not installed.
        EnvironmentFailed: the cache cannot be written.
    """
    if (nested := nested_variant(bundle, precision)) is not None:
        return nested
    if bundle.meta.arithmetic != "fp32":
        raise ModelError(
            f"precision: found {precision}, but {bundle.meta.name} already computes in "
            f"{bundle.meta.arithmetic}; use precision fp32, which runs the model as it is"
        )
    used, log = conversion.used, conversion.log
    if used is not None and (begun_with := find_cached(used)) is not None:
        return begun_with
    calibration = conversion.sample_digest() if precision == "int8" else None

    def build(folder: Path) -> BundleMeta:
        _require_onnx(precision)
        # Half of the sample: the comparison with fp32 sees the other half as well.
        calibration_NHWC = None if calibration is None else conversion.sample()[::2]
        _convert(bundle, folder, calibration_NHWC, conversion.threads, log)
        source = {
            "base": bundle.digest,
            "calibration": calibration,
            "num_calibration_images": None if calibration_NHWC is None else len(calibration_NHWC),
        }
        return bundle.meta.model_copy(
            update={
                "source": {**bundle.meta.source, **source},
                "arithmetic": precision,
                "files": model_files(folder),
                "golden_sha256": _golden(
                    bundle, folder, calibration_NHWC, conversion.open_reference
                ),
            }
        )

    request = _request(bundle, precision, calibration, conversion.made_by)
    return cached_bundle(request, build, log)


def _request(
    bundle: Bundle, precision: Precision, calibration: str | None, made_by: Mapping[str, str]
) -> dict[str, object]:
    """All that a converted model depends on, as the cache finds it."""
    return {
        "format_version": BundleMeta.model_fields["format_version"].default,
        "base": bundle.digest,
        "precision": precision,
        "recipe": RECIPE,
        "calibration": calibration,
        "made_by": sorted(made_by.items()),
        "versions": versions_of("onnx"),
    }


def _require_onnx(precision: Precision) -> None:
    if importlib.util.find_spec("onnx") is None:
        raise UsageError(
            f"precision: {precision} needs a converted model, and converting needs onnx: "
            "pip install onnx, or run `batchclf export` with this precision "
            "where it is installed and name the folder in model.bundle"
        )


def _convert(
    bundle: Bundle, folder: Path, calibration_NHWC: Pixels | None, threads: int, log: Log
) -> None:
    """Write the int8 model, or without calibration images the fp16 one."""
    target = folder / MODEL_FILE
    if calibration_NHWC is None:
        from batchclf.models import half

        log(f"converting {bundle.meta.name} to fp16; this is done once")
        half.to_half(bundle.model_path, target)
        return
    from batchclf.models import quantize

    log(
        f"quantising {bundle.meta.name} to int8, calibrated on {len(calibration_NHWC)} of the "
        "job's images; this is done once"
    )
    quantize.quantize_int8(bundle.model_path, target, calibration_NHWC, threads=threads)


def _golden(
    bundle: Bundle, folder: Path, calibration_NHWC: Pixels | None, open_reference: OpenReference
) -> str:
    """Write golden.npz with answers at fp32; returns its SHA-256.

    Of an fp16 model it is that of `bundle`, which says how far rounding moves each answer.
    """
    if calibration_NHWC is None:
        shutil.copyfile(bundle.folder / GOLDEN_FILE, folder / GOLDEN_FILE)
        return bundle.meta.golden_sha256
    return write_golden(
        folder,
        open_reference(bundle.model_path),
        calibration_NHWC[:_NUM_GOLDEN],
        bundle.meta.fixed_batch,
    )


def facts(bundle: Bundle) -> Mapping[str, str | int | None]:
    """What run.json says of a converted model: where its calibration came from."""
    keys = ("calibration", "num_calibration_images")
    return {"digest": bundle.digest, **{key: bundle.meta.source.get(key) for key in keys}}
