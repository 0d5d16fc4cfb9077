"""Pretrained weights from their servers: from a plain URL, or from the Hugging Face hub.

Each goes where its library looks for it, so that what others downloaded is used, and is given up
soon after its last byte.
"""

import contextlib
import http.client
import os
import pickle
import re
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import torch

from batchclf.errors import ModelError, WeightsUnavailable
from batchclf.models.bundle import sha256_of
from batchclf.models.checkpoints import first_line
from batchclf.models.download import BEAT_S, TIMEOUT_S, downloaded
from batchclf.system.alive import alive

_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")
"""As torchvision and timm name their files: the beginning of their SHA-256."""
LOADING_ERRORS = (
    OSError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    http.client.HTTPException,
)
"""What downloading a file, and loading it into a model, may raise."""
PARTS_OF_TIMM = (
    "its weights file in model.weights, its label_names in model.labels, and its pretrained_cfg in "
    "model.preprocess: crop (input_size), resize (input_size / crop_pct), mean, std, interpolation"
)
"""Where a job has what timm writes into one folder (`architecture` goes into model.name)."""


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """The libraries leave torch its default, which may be to run the code in a file."""
    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE_WEIGHTS_ONLY]
        if before is not None:
            os.environ[_FORCE_WEIGHTS_ONLY] = before


# ---- from a URL ----------------------------------------------------------------------------------


def path_of(url: str) -> Path:
    """Where torch.hub, and whoever uses it, looks for what is at a URL."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(url).name)


def from_url(url: str, log: Callable[[str], None]) -> Path:
    """The file that torch.hub would download, whose own download may wait for ever.

    Raises:
        OSError, http.client.HTTPException: it cannot be downloaded, or written.
        RuntimeError: its hash is not that in its name.
    """
    path = path_of(url)
    if path.exists():
        _require_hash(path, path.name)
        return path
    log(f"downloading {url}")
    with downloaded(url, path.parent) as partial:
        _require_hash(partial, path.name)
        os.replace(partial, path)
    return path


def unavailable(error: BaseException, what: str, url: str, path: Path) -> WeightsUnavailable:
    """The error for weights that `LOADING_ERRORS` kept from being used."""
    if isinstance(error, urllib.error.HTTPError | urllib.error.URLError | TimeoutError):
        why = f"cannot be downloaded: {error.reason if hasattr(error, 'reason') else error}"
    elif "invalid hash value" in str(error):
        why = "were damaged in the download (wrong hash); a proxy may have answered instead"
    elif isinstance(error, http.client.HTTPException):
        why = f"cannot be downloaded: {type(error).__name__}: {first_line(error)}"
    else:
        why = f"cannot be loaded: {first_line(error)}"
    return WeightsUnavailable(
        f"weights {what} {why}\n"
        f"  from: {url}\n"
        f"  to:   {path}\n"
        "  Check the network and the proxy, or put the file there by hand (delete a damaged "
        "one first), or name a file of your own in model.weights."
    )


def _require_hash(path: Path, name: str) -> None:
    """torch.hub takes a file that is there as it is."""
    expected = hash_in(name)
    if expected is not None and not sha256_of(path).startswith(expected):
        raise RuntimeError(f"invalid hash value of {path}")


def hash_in(name: str) -> str | None:
    """The beginning of a published file's SHA-256, where its name or URL says it."""
    found = _HASH_IN_NAME.search(name)
    return None if found is None else found[1]


# ---- from the Hugging Face hub -------------------------------------------------------------------


def file_from_hub(name: str, files: Sequence[str], log: Callable[[str], None]) -> Path:
    """The first of `files` that the repository `name` has, `owner/model` or `owner/model@revision`.

    Raises:
        ModelError: the hub has no such repository, revision or file.
        WeightsUnavailable: the hub does not answer, and the file is not in its cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, wanted = name.partition("@")

    def fetch(bar: Any) -> Path:
        absent: EntryNotFoundError | None = None
        for file in files:
            try:
                revision = wanted or None
                return Path(hf_hub_download(repository, file, revision=revision, tqdm_class=bar))
            except LocalEntryNotFoundError:  # the hub does not answer
                raise
            except EntryNotFoundError as error:
                absent = error
        assert absent is not None
        raise absent

    log(f"looking for {files[0]} of {name} on the Hugging Face hub and in its cache")
    return _from_hub(name, " and ".join(files), fetch)


def snapshot_from_hub(name: str, patterns: Sequence[str], log: Callable[[str], None]) -> Path:
    """A folder with the files of a repository whose names fit `patterns`.

    Raises:
        ModelError, WeightsUnavailable: as `file_from_hub`.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    log(
        f"no folder {name} is beside the job file; looking for it on the Hugging Face hub and in "
        "its cache"
    )
    return _from_hub(
        name,
        " and ".join(patterns),
        lambda bar: Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(patterns),
                tqdm_class=bar,
            )
        ),
    )


def _from_hub(name: str, wanted: str, fetch: Callable[[Any], Path]) -> Path:
    from huggingface_hub import constants, errors

    constants.HF_HUB_DISABLE_XET = True  # its other protocol has no timeouts
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        return _patiently(fetch)
    except errors.HFValidationError as error:
        raise ModelError(
            f"model.name: {name!r}: no folder, and no name of the Hugging Face hub: "
            f"{first_line(error)}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"model.name: {name}: {constants.ENDPOINT} has no such revision of it"
        ) from error
    except errors.GatedRepoError as error:
        raise WeightsUnavailable(
            f"{name}: its owner lets in only whom he knows; ask for access at "
            f"{constants.ENDPOINT}/{name}, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name: {constants.ENDPOINT} has no {name}, or it is private; a folder is looked "
            "for beside the job file; for a private one, log in with `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _no_answer(name, error.__cause__ or error) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(
            f"model.name: {name}: {constants.ENDPOINT} has no {wanted} of it"
        ) from error
    except (OSError, errors.HTTPError) as error:
        raise _no_answer(name, error) from error


def _no_answer(name: str, error: BaseException) -> WeightsUnavailable:
    from huggingface_hub import constants

    return WeightsUnavailable(
        f"{name} cannot be downloaded: {type(error).__name__}: {first_line(error)}\n"
        f"  from: {constants.ENDPOINT} (HF_ENDPOINT)\n"
        f"  to:   {constants.HF_HUB_CACHE} (HF_HUB_CACHE)\n"
        "  Check the network and the proxy, or copy the cache from a machine that has the model, "
        "or name a folder or file of your own."
    )


def _patiently(fetch: Callable[[Any], Path]) -> Path:
    """Wait in a thread of its own for what the hub's library downloads, as long as bytes come."""
    from huggingface_hub.utils import tqdm

    last_sign = [time.monotonic()]

    class Sign(tqdm):  # type: ignore[misc]
        """A progress bar that shows nothing."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            last_sign[0] = time.monotonic()
            return None

    results: Queue[Path | Exception] = Queue()

    def work() -> None:
        try:
            results.put(fetch(Sign))
        except Exception as error:  # noqa: BLE001 - raised by who waits
            results.put(error)

    Thread(target=work, name="download", daemon=True).start()
    while time.monotonic() < last_sign[0] + TIMEOUT_S:
        alive()
        with contextlib.suppress(Empty):
            result = results.get(timeout=BEAT_S)
            if isinstance(result, Exception):
                raise result
            return result
    raise TimeoutError(f"no byte came for {TIMEOUT_S:g} s")
