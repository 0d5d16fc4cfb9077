"""The job's `model` to a bundle: a folder given, one from the cache, or one built now.

Only building imports torch (or onnx); a run from a bundle, cached or given, needs neither.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from batchclf.errors import ModelError, UsageError
from batchclf.models.bundle import (
    META_FILE,
    MODEL_FILE,
    Bundle,
    BundleMeta,
    cached_bundle,
    cached_folder,
    model_files,
    open_bundle,
    open_cached,
    remember_batch_size,
    sha256_of,
    versions_of,
)
from batchclf.models.checks import OpenReference, Run, assert_same_scores, sample_pixels, tiled
from batchclf.models.found_labels import labels_beside
from batchclf.models.golden import write_golden
from batchclf.models.labels import imagenet_labels, read_labels, require_label_count
from batchclf.models.onnx_guard import check_onnx
from batchclf.models.own_files import own_files
from batchclf.results.records import Pixels, Preprocess, Scores
from batchclf.spec.job import ModelSpec, PreprocessSpec
from batchclf.system import cache
from batchclf.system.paths import kind_of, require_readable, unread

TORCH_PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "safetensors")
ONNX_PACKAGES = ("onnx",)
_LIBRARY_PACKAGES = {"torchvision": (), "timm": ("timm",), "hf": ("transformers",)}
"""What each library of models needs beside these; its name is that of its extra, too."""
HF_CONFIG = "config.json"
_HF_FILES = (
    *(HF_CONFIG, "preprocessor_config.json", "processor_config.json"),
    *("*.safetensors", "*.bin", "*.index.json"),
)
"""Of a folder that transformers wrote: all that a model can depend on."""

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A bundle with the job's own labels and preprocessing in force."""

    bundle: Bundle
    labels: tuple[str, ...]
    preprocess: Preprocess


def resolve_model(
    spec: ModelSpec, *, batch_size: int, open_reference: OpenReference, log: Log
) -> ResolvedModel:
    """The bundle for the job's `model`, built if the cache does not hold it.

    `open_reference` opens what a newly built model is checked with.

    Raises:
        ModelError: the model, its weights, labels or preprocessing do not fit together.
        WeightsUnavailable: pretrained weights could not be downloaded.
        EnvironmentFailed: the cache cannot be written, or a file that the job names not be read.
    """
    _require_readable(spec)
    labels, origin = _own_labels(spec)
    if spec.bundle is not None:
        bundle = open_bundle(spec.bundle)
    else:
        request = _request(spec, labels)
        building = _Building(spec, request, labels, batch_size, open_reference, log)
        bundle = cached_bundle(request, building, log)
    require_label_count(labels or bundle.meta.labels, len(bundle.meta.labels), origin)
    _require_own_activation(spec, bundle)
    labels = labels or _found_labels(spec, bundle, log)
    if spec.labels is None and labels == tuple(map(str, range(len(labels)))):
        log(
            "no class names come with the model, so records hold the classes' numbers; "
            "model.labels names them: imagenet, or a text file with one name per line"
        )
    return ResolvedModel(bundle, labels, _own_preprocess(spec, bundle))


def check_model(spec: ModelSpec) -> str:
    """Check what can be checked of the job's `model` without building it; says what it is.

    Raises:
        ModelError: unknown name, missing file, or labels that cannot be read.
        EnvironmentFailed: the cached model may be anybody's, or a file cannot be read.
        UsageError: it has to be built, and what builds it is not installed.
    """
    _require_readable(spec)
    labels, origin = _own_labels(spec)
    folder = spec.bundle or cached_folder(_request(spec, labels))
    if spec.bundle is not None or kind_of(folder, cache.VARIABLE) != "nothing":
        bundle = open_bundle(folder) if spec.bundle is not None else open_cached(folder)
        require_label_count(labels or bundle.meta.labels, len(bundle.meta.labels), origin)
        _require_own_activation(spec, bundle)
        _own_preprocess(spec, bundle)
        return f"{bundle.meta.name}, {len(bundle.meta.labels):,} classes, exported in {folder}"
    if spec.onnx is not None:
        _require_packages(str(spec.onnx), *ONNX_PACKAGES, packages="onnx")
        from batchclf.models import onnx_file

        onnx_file.check_file(spec.onnx, spec, labels)
        return f"{spec.onnx}, to be prepared at the first run"
    _import_zoo(spec).check(spec)
    return f"{spec.display_name} ({spec.weights}), to be exported at the first run"


def open_eager(spec: ModelSpec, threads: int, log: Log) -> Run | str:
    """The job's model in PyTorch itself, uint8 pixels NHWC to logits NK, or why there is none.

    Raises:
        ModelError: the model cannot be built.
        WeightsUnavailable: pretrained weights could not be downloaded.
    """
    if spec.name is None:
        given = "an ONNX file" if spec.onnx is not None else "a bundle"
        return f"the job names {given}, not a PyTorch model"
    if missing := _missing(*_packages(spec)):
        return f"{', '.join(missing)} not installed: pip install 'batchclf[{_extras(spec)}]'"
    model = _import_zoo(spec).build(spec, log)
    from batchclf.models import export

    return export.eager(model, threads)


def confirm_batch_size(
    bundle: Bundle, batch_size: int, classify: Callable[[Pixels], Scores]
) -> None:
    """Refuse a model that gives other answers at this batch size than at one checked before.

    Costs one batch, once: a cached bundle remembers.

    Raises:
        ModelError: the answers differ.
    """
    verified = bundle.meta.verified_batches
    if batch_size in verified or not verified:
        return
    pixels_NHWC = sample_pixels(*bundle.meta.preprocess.crop)
    known = verified[0]
    expected_NK = np.concatenate([classify(tiled(row[None], known))[:1] for row in pixels_NHWC])
    found_NK = classify(tiled(pixels_NHWC, batch_size))
    assert_same_scores(
        found_NK, tiled(expected_NK, batch_size), f"{bundle.meta.name}, batch of {batch_size}"
    )
    remember_batch_size(bundle, batch_size)


def _require_readable(spec: ModelSpec) -> None:
    """Tell what cannot even be looked at from what is not there, or is no model.

    Raises:
        UsageError, EnvironmentFailed: naming the key, the path and the cause.
    """
    named = {
        "model.onnx": spec.onnx,
        "model.name": spec.folder and spec.folder / HF_CONFIG,
        "model.bundle": spec.bundle and spec.bundle / META_FILE,
        "model.weights": spec.weights_path,
        "model.labels": spec.labels_path,
    }
    for key, path in named.items():
        if path is not None:
            require_readable(path, key)


def _own_labels(spec: ModelSpec) -> tuple[tuple[str, ...], str]:
    if spec.labels_path is not None:
        return read_labels(spec.labels_path), str(spec.labels_path)
    if spec.labels == "imagenet":
        return imagenet_labels(), "imagenet"
    return (), "the model's own"


def _found_labels(spec: ModelSpec, bundle: Bundle, log: Log) -> tuple[str, ...]:
    """The bundle's own class names; of an ONNX file without any, those of a file beside it."""
    labels = bundle.meta.labels
    if spec.onnx is None:
        return labels
    if origin := bundle.meta.source.get("labels"):
        log(f"{spec.onnx}: class names from {origin}")
        return labels
    for found, path in labels_beside(spec.onnx):
        if len(found) == len(labels):
            log(f"{spec.onnx}: class names from {path}, beside it")
            return found
        log(
            f"{path}: has {len(found):,} class names, and {spec.onnx} has {len(labels):,} classes: "
            "not used"
        )
    return labels


def _request(spec: ModelSpec, labels: tuple[str, ...]) -> dict[str, object]:
    """All that decides what a built bundle is; its digest is the cache's key."""
    given = spec.preprocess or PreprocessSpec()
    request: dict[str, object] = {
        "format_version": BundleMeta.model_fields["format_version"].default,
        "preprocess": sorted(given.model_dump(exclude={"exif_transpose"}).items()),
        "activation": spec.activation,
        "num_labels": len(labels) or None,  # counted before a bundle is accepted
    }
    if spec.onnx is not None:
        external = check_onnx(spec.onnx, "model.onnx: ", may_link=True)
        return request | {
            "onnx": _digest("model.onnx", spec.onnx),
            "external": [_digest("model.onnx", weights.path) for weights in external],
            "layout": spec.layout,
            "output_name": spec.output_name,
            "versions": versions_of("onnx"),
        }
    path = spec.weights_path
    return request | {
        "name": _model_name(spec),
        "folder": _digests(spec.folder),
        "weights": spec.weights if path is None else _digest("model.weights", path),
        "num_classes": spec.num_classes,
        "transform_input": spec.transform_input,
        "versions": versions_of(
            *("torch", "torchvision", "onnx", "onnxscript"), *_LIBRARY_PACKAGES[spec.library]
        ),
    }


def _model_name(spec: ModelSpec) -> str:
    """As the job says, but of a folder only its own name: the same wherever it lies."""
    assert spec.name is not None
    return spec.name if spec.folder is None else f"{spec.library}/{spec.folder.name}"


def _digests(folder: Path | None) -> dict[str, str] | None:
    if folder is None:
        return None
    return {path.name: _digest("model.name", path) for path in own_files(folder, _HF_FILES)}


def _digest(key: str, path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ModelError(f"{key}: {path}: cannot be read: {unread(path, error)}") from None


def _require_packages(what: str, *modules: str, packages: str) -> None:
    if missing := _missing(*modules):
        raise UsageError(
            f"{what} has to be exported first, which needs {', '.join(missing)}: "
            f"pip install {packages}, or run `batchclf export` where that is installed "
            "and name the folder in model.bundle"
        )


def _packages(spec: ModelSpec) -> tuple[str, ...]:
    """What builds the model that `spec.name` names."""
    return (*TORCH_PACKAGES, *_LIBRARY_PACKAGES[spec.library])


def _extras(spec: ModelSpec) -> str:
    """The extras of this package that bring `_packages`."""
    return f"export,{spec.library}" if _LIBRARY_PACKAGES[spec.library] else "export"


def _missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _import_zoo(spec: ModelSpec) -> ModuleType:
    """What imports torch; kept out of every run that has its bundle."""
    assert spec.name is not None
    packages = f"'batchclf[{_extras(spec)}]'"
    _require_packages(spec.display_name, *_packages(spec), packages=packages)
    try:
        from batchclf.models import zoo

        zoo.library(spec)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise UsageError(
            f"{' and '.join(('torch', 'torchvision', *_LIBRARY_PACKAGES[spec.library]))} cannot be "
            f"imported together: {error}; torch and torchvision come in matching pairs from one "
            f"index: pip install --force-reinstall 'batchclf[{_extras(spec)}]'"
        ) from error
    return zoo


@dataclass(frozen=True, slots=True)
class _Building:
    """A bundle to be built, since the cache does not hold it."""

    spec: ModelSpec
    request: Mapping[str, object]
    labels: tuple[str, ...]
    """The job's own; empty: the model's."""
    batch_size: int
    open_reference: OpenReference
    log: Log

    def __call__(self, folder: Path) -> BundleMeta:
        """Write model.onnx and golden.npz into `folder`.

        Raises:
            ModelError: the model cannot be built, or its parts do not fit together.
        """
        return self._from_zoo(folder) if self.spec.onnx is None else self._from_onnx(folder)

    def _from_zoo(self, folder: Path) -> BundleMeta:
        spec = self.spec
        assert spec.name is not None
        name = _model_name(spec)
        zoo = _import_zoo(spec)
        self.log(f"exporting {name} ({spec.weights}) to ONNX; this is done once")
        model = zoo.build(spec, self.log)
        from batchclf.models import export

        if self.labels:
            require_label_count(self.labels, len(model.labels), spec.labels or "")
        checked = export.export_model(
            model, folder, batch_size=self.batch_size, open_reference=self.open_reference
        )
        return BundleMeta(
            name=name,
            source={
                "name": name,
                "weights": spec.weights_path.name if spec.weights_path else spec.weights,
                "weights_sha256": str(self.request["weights"]) if spec.weights_path else None,
                **versions_of("torch", "torchvision", *_LIBRARY_PACKAGES[spec.library]),
            },
            preprocess=model.preprocess,
            labels=self.labels or model.labels,
            activation=model.activation,
            verified_batches=checked,
            files=model_files(folder),
            golden_sha256=self._write_golden(folder, model.preprocess),
        )

    def _from_onnx(self, folder: Path) -> BundleMeta:
        spec = self.spec
        assert spec.onnx is not None
        _require_packages(str(spec.onnx), *ONNX_PACKAGES, packages="onnx")
        self.log(f"preparing {spec.onnx}; this is done once")
        from batchclf.models import onnx_file

        wrapped = onnx_file.wrap_onnx(
            spec.onnx,
            spec,
            folder,
            batch_size=self.batch_size,
            open_reference=self.open_reference,
            log=self.log,
        )
        if self.labels:
            require_label_count(self.labels, wrapped.num_classes, spec.labels or "")
        return BundleMeta(
            name=spec.onnx.stem,
            source={
                "onnx": spec.onnx.name,
                "onnx_sha256": str(self.request["onnx"]),
                **({"labels": wrapped.labels_origin} if wrapped.labels else {}),
            },
            preprocess=wrapped.preprocess,
            labels=wrapped.labels or tuple(str(index) for index in range(wrapped.num_classes)),
            activation=wrapped.activation,
            fixed_batch=wrapped.fixed_batch,
            verified_batches=wrapped.checked_batches,
            arithmetic=wrapped.arithmetic,
            files=model_files(folder),
            golden_sha256=self._write_golden(
                folder,
                wrapped.preprocess,
                wrapped.fixed_batch,
                is_fp32=wrapped.arithmetic == "fp32",
            ),
        )

    def _write_golden(
        self,
        folder: Path,
        preprocess: Preprocess,
        fixed_batch: int | None = None,
        *,
        is_fp32: bool = True,
    ) -> str:
        """Reference answers and, of an fp32 model that can be rounded, how sensitive they are."""
        from batchclf.models.sensitivity import open_rounded

        sample_NHWC = sample_pixels(*preprocess.crop)
        reference = self.open_reference(folder / MODEL_FILE)
        if is_fp32:
            try:
                rounded = open_rounded(folder, self.open_reference)
                return write_golden(folder, reference, sample_NHWC, fixed_batch, rounded)
            except ModelError as error:  # no reason to refuse the model as it is
                self.log(
                    f"how far rounding moves the model's answers cannot be measured ({error}); at "
                    "a reduced precision, the answers are held to what other models make of it"
                )
        return write_golden(folder, reference, sample_NHWC, fixed_batch)


def _require_own_activation(spec: ModelSpec, bundle: Bundle) -> None:
    """Refuse what contradicts the bundle that a job names: its graph was made for its activation.

    Raises:
        ModelError: naming both, and the case in which both mean the same.
    """
    own, given = bundle.meta.activation, spec.activation
    if spec.bundle is None or given in (None, own):
        return
    may_be_binary = (given, own, len(bundle.meta.labels)) == ("sigmoid", "softmax", 2)
    raise ModelError(
        f"model.activation: found {given}, but what the output of {bundle.folder} lacks to be "
        f"scores is {own}, as its model.json says; leave model.activation out"
        + (
            ": one output with a sigmoid has become two classes in the bundle, whose softmax is "
            "1 - sigmoid and sigmoid. If it was exported otherwise, "
            if may_be_binary
            else ", or, if it is wrong, "
        )
        + f"export the model again with activation: {given}"
    )


def _own_preprocess(spec: ModelSpec, bundle: Bundle) -> Preprocess:
    """The bundle's preprocessing; a job may change what happens before the graph, not inside it."""
    preprocess = bundle.meta.preprocess
    given = spec.preprocess
    if given is None or spec.bundle is None:
        return preprocess
    for key, value in (
        ("crop", given.crop_size),
        ("mean", given.mean),
        ("std", given.std),
        ("channels", given.channels),
    ):
        if value is not None and value != getattr(preprocess, key):
            raise ModelError(
                f"model.preprocess.{key}: found {value}, but it is built into {bundle.folder} as "
                f"{getattr(preprocess, key)}; export the model again to change it"
            )
    return replace(
        preprocess,
        resize=given.resize or preprocess.resize,
        interpolation=given.interpolation or preprocess.interpolation,
    )
