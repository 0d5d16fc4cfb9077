"""The model bundle: a folder with all that a run needs of a model.

model.onnx takes `pixels`, uint8 of shape NHWC, and gives float32 scores of shape NK; scaling,
normalisation and change of layout are inside the graph. model.json describes it, golden.npz holds
a few images with their scores. A folder `int8` or `fp16` in it is the bundle of the same model at
that precision. A bundle is written beside its final place and renamed there whole, so a folder
with the final name is complete.
"""

import hashlib
import importlib.metadata
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from batchclf.errors import EnvironmentFailed, ModelError
from batchclf.models.onnx_guard import check_onnx
from batchclf.results.records import Activation, Preprocess
from batchclf.system import cache
from batchclf.system.alive import alive
from batchclf.system.paths import kind_of, nearest, unread

if TYPE_CHECKING:
    from filelock import BaseFileLock

MODEL_FILE = "model.onnx"
META_FILE = "model.json"
GOLDEN_FILE = "golden.npz"
MAX_PROTOBUF_BYTES = 1_900_000_000
"""Protocol buffers end at 2 GiB; larger models keep their weights in a second file."""
MAX_META_BYTES = 64_000_000
"""A million labels, twice over."""
BEAT_S = 0.5
"""How often who waits for another process tells that it is alive."""
_AGAIN = "write it again with `batchclf export`"

MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}$")]
"""A file in the bundle's own folder, and nowhere else."""


class BundleMeta(BaseModel):
    """What model.json says of the model beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[3] = 3
    name: str
    source: Mapping[str, str | int | None]
    """Where the model came from: model name, weights, digests, exporter versions."""
    preprocess: Preprocess
    labels: tuple[str, ...]
    activation: Activation
    """What the model's own output lacks to be scores."""
    fixed_batch: int | None = None
    """The only batch size that the model takes, if it takes only one."""
    verified_batches: tuple[int, ...] = ()
    """Batch sizes at which the model gave its source's answers."""
    arithmetic: Literal["fp32", "fp16", "int8"] = "fp32"
    """The least precise that the graph itself computes in."""
    files: Mapping[MemberName, str]
    """SHA-256 of each file of the model."""
    golden_sha256: str
    """Of golden.npz, which is not among `files`: another CPU gives other last digits, and the
    model is the same."""

    @field_validator("files")
    @classmethod
    def _has_model(cls, files: Mapping[str, str]) -> Mapping[str, str]:
        if MODEL_FILE not in files:
            raise ValueError(f"{MODEL_FILE} is missing")
        return files


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle; the files' digests were compared."""

    folder: Path
    meta: BundleMeta

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL_FILE

    @property
    def digest(self) -> str:
        """SHA-256 over the model's files: the same model has the same digest wherever it lies."""
        return digest_of(sorted(self.meta.files.items()))


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle and compare its files with the digests it was written with.

    Raises:
        ModelError: no bundle, one of another version, damaged, with a link for a file, or with a
            model that `check_onnx` refuses.
    """
    meta = _read_meta(folder)
    for name, expected in {**meta.files, GOLDEN_FILE: meta.golden_sha256}.items():
        _require_regular(folder / name)
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise ModelError(f"{folder / name}: {error.strerror}; {_AGAIN}") from None
        if found != expected:
            raise ModelError(
                f"{folder / name}: damaged: its SHA-256 starts {found[:12]}, "
                f"{META_FILE} says {expected[:12]}; {_AGAIN}"
            )
    for weights in check_onnx(folder / MODEL_FILE):
        if weights.location not in meta.files:
            raise ModelError(
                f"{folder / MODEL_FILE}: its weights are said to be in {weights.location}, of "
                f"which {META_FILE} has no SHA-256; {_AGAIN}"
            )
    return Bundle(folder, meta)


def _read_meta(folder: Path) -> BundleMeta:
    path = folder / META_FILE
    try:
        _require_regular(path)
        with path.open("rb") as file:
            text = file.read(MAX_META_BYTES + 1)
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: no model bundle there ({META_FILE} is missing); "
            f"`batchclf export JOB.yaml FOLDER` writes one{nearest(folder)}"
        ) from None
    except NotADirectoryError:
        raise ModelError(
            f"model.bundle: {folder}: is a file; a bundle is a folder that `batchclf export` "
            "wrote, and an ONNX file of your own goes under model.onnx"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {unread(path, error)}") from None
    if len(text) > MAX_META_BYTES:
        raise ModelError(f"{path}: larger than {MAX_META_BYTES:,} bytes; {_AGAIN}")
    try:
        return BundleMeta.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise ModelError(
            f"{path}: not a bundle of this version: {where} {first['msg']}; {_AGAIN}"
        ) from None


def _require_regular(path: Path) -> None:
    """Refuse a link: it may lead to any file of this machine, which a copy would then hold."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # opening it tells why
    if not stat.S_ISREG(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
        raise ModelError(f"{path}: is {what}; a bundle holds its files themselves: {_AGAIN}")


def write_bundle(
    target: Path, build: Callable[[Path], BundleMeta], *, advice: str = "give another folder"
) -> Bundle:
    """Let `build` write the model into an empty folder, then put it whole in the place of `target`.

    Raises:
        EnvironmentFailed: the disk is full or `target` cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            folder = Path(temporary) / "bundle"
            folder.mkdir()
            meta = build(folder)
            _write_durably(folder / META_FILE, meta.model_dump_json(indent=1).encode())
            for path in folder.rglob("*"):
                _sync(path)
            _sync(folder)
            if target.exists():
                os.rename(target, Path(temporary) / "replaced")
            os.rename(folder, target)
            _sync(target.parent)
    except OSError as error:
        raise EnvironmentFailed(
            f"{target}: the model bundle cannot be written: {error.strerror or error}; {advice}"
        ) from error
    return Bundle(target, meta)


def cached_bundle(
    request: Mapping[str, object], build: Callable[[Path], BundleMeta], log: Callable[[str], None]
) -> Bundle:
    """The bundle that `request` describes: from the cache, or built now and put there.

    Two processes that want the same bundle at once build it once: the second waits.
    """
    try:
        folder = cached_folder(request)
        if folder.exists():
            try:
                return open_cached(folder)
            except ModelError as error:
                log(f"{error}; building it anew")
        private_folder(folder.parent)
        lock = _locked(folder, log)
    except OSError as error:
        raise EnvironmentFailed(
            f"{cache_folder()}: the model cache cannot be written: {error.strerror}; "
            f"set {cache.VARIABLE} to a folder that can"
        ) from error
    try:
        if folder.exists():  # the process that held the lock before has built it
            try:
                return open_cached(folder)
            except ModelError:
                shutil.rmtree(folder)
        for abandoned in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(abandoned, ignore_errors=True)  # of a build that was killed
        advice = f"make room there, or set {cache.VARIABLE} to another folder"
        return write_bundle(folder, build, advice=advice)
    finally:
        lock.release()


def _locked(folder: Path, log: Callable[[str], None]) -> "BaseFileLock":
    """The lock of a bundle's place, held by this process once no other one builds there."""
    from filelock import FileLock, Timeout  # late: a start from a cached bundle needs none

    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log("another process is building this model; waiting for it")
        while not lock.is_locked:
            alive()  # so is the other process, or the kernel would free the lock
            with suppress(Timeout):
                lock.acquire(timeout=BEAT_S)
    return lock


def open_cached(folder: Path) -> Bundle:
    """Open a bundle in the cache.

    Raises:
        ModelError: as `open_bundle`.
        EnvironmentFailed: another user could have put it there.
    """
    for one in (folder.parent, folder):
        _require_private(one)
    return open_bundle(folder)


def find_cached(digest: str) -> Bundle | None:
    """The bundle in the cache whose model has this digest; None: none has, or it is damaged.

    Raises:
        EnvironmentFailed: another user could have put it there.
    """
    for meta_file in sorted(cache_folder().glob(f"*/{META_FILE}")):
        with suppress(ModelError):
            if Bundle(meta_file.parent, _read_meta(meta_file.parent)).digest == digest:
                return open_cached(meta_file.parent)
    return None


def private_folder(folder: Path) -> Path:
    """A folder of the cache, made for this user alone where there is none.

    Raises:
        EnvironmentFailed: it is there, and others may write to it.
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)
    return folder


def _require_private(folder: Path) -> None:
    """A model is as good as a program: one that anybody could have put there is not run.

    What root or a group is given to write, as on a volume of Kubernetes, is trusted.
    """
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()):
        why = f"belongs to the user with id {found.st_uid}"
    elif found.st_mode & stat.S_IWOTH:
        why = "may be written by everybody"
    else:
        return
    raise EnvironmentFailed(
        f"{folder}: this folder of the model cache {why}, so a model in it may be anybody's; "
        f"set {cache.VARIABLE} to a folder of your own, or make this one yours, without what is in "
        "it"
    )


def remember_batch_size(bundle: Bundle, batch_size: int) -> None:
    """Note in a cached bundle that `batch_size` was checked, so that the next run need not."""
    if bundle.folder.parent != cache_folder():
        return  # a user's own bundle is not ours to write to
    verified = tuple(sorted({*bundle.meta.verified_batches, batch_size}))
    meta = bundle.meta.model_copy(update={"verified_batches": verified})
    temporary = bundle.folder / f"{META_FILE}.{os.getpid()}"
    try:
        _write_durably(temporary, meta.model_dump_json(indent=1).encode())
        os.replace(temporary, bundle.folder / META_FILE)
    except OSError:  # a cache that can only be read: the next run checks again
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where bundles are cached."""
    return cache.cache_root() / "bundles"


def list_cache() -> tuple[int, int, bool]:
    """Number of cached bundles, their bytes, and whether the cache can be written."""
    folder = cache_folder()
    try:
        files = [path for path in folder.glob("*/*") if path.is_file()]
        num_bytes = sum(path.stat().st_size for path in files)
        around = next(path for path in (folder, *folder.parents) if path.exists())
    except PermissionError:  # of another user's home folder, say
        return 0, 0, False
    return sum(path.name == META_FILE for path in files), num_bytes, os.access(around, os.W_OK)


def cached_folder(request: Mapping[str, object]) -> Path:
    """Where the bundle that `request` describes is, or would be, in the cache.

    `request["versions"]` maps the packages that build it to their versions. Where one of them is
    not installed (None), nothing can be built, and the newest bundle of any version will do.
    """
    versions = request.get("versions") or {}
    model = {key: value for key, value in request.items() if key != "versions"}
    stem = digest_of(model)[:24]
    if isinstance(versions, Mapping) and None in versions.values():
        made = sorted(cache_folder().glob(f"{stem}-*/{META_FILE}"), key=os.path.getmtime)
        if made:
            return made[-1].parent
    return cache_folder() / f"{stem}-{digest_of(versions)[:8]}"


def require_place(target: Path) -> None:
    """Refuse a folder for a bundle in which something else is.

    Raises:
        ModelError: something else is at `target`.
        UsageError, EnvironmentFailed: what is there cannot be looked at.
    """
    kinds = [kind_of(path, "FOLDER") for path in (target, target / META_FILE)]
    if kinds[0] != "nothing" and kinds[1] == "nothing":
        raise ModelError(f"{target}: exists and is no model bundle; give another folder")


def copy_bundle(
    bundle: Bundle,
    target: Path,
    *,
    labels: tuple[str, ...],
    preprocess: Preprocess,
    variant: tuple[str, Bundle] | None = None,
) -> Bundle:
    """Copy a bundle to a folder of the user's, with a job's own labels and preprocessing in it.

    `variant` is the same model at another precision, and its folder's name in the copy.

    Raises:
        ModelError: something else is at `target`.
        EnvironmentFailed: `target` cannot be written.
    """
    require_place(target)

    def build(folder: Path) -> BundleMeta:
        _copy_members(bundle, folder)
        if variant is not None:
            (folder / variant[0]).mkdir()
            _copy_members(variant[1], folder / variant[0])
            shutil.copyfile(variant[1].folder / META_FILE, folder / variant[0] / META_FILE)
        return bundle.meta.model_copy(update={"labels": labels, "preprocess": preprocess})

    return write_bundle(target, build)


def _copy_members(bundle: Bundle, folder: Path) -> None:
    for name in (*bundle.meta.files, GOLDEN_FILE):
        shutil.copyfile(bundle.folder / name, folder / name)


def digest_of(value: object) -> str:
    """SHA-256 of the `repr` of plain data (sort it first where order means nothing)."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_files(folder: Path) -> dict[str, str]:
    """The model's files in a bundle's folder and their SHA-256: what `BundleMeta.files` holds."""
    return {
        path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != GOLDEN_FILE
    }


def versions_of(*distributions: str) -> dict[str, str | None]:
    """Installed versions of packages; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _write_durably(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
