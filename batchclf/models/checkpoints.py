"""Weights files that trainers leave: told by their content, and read as tensors only."""

import contextlib
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from batchclf.errors import ModelError
from batchclf.system.paths import GIT_LFS_POINTER, nearest

LOADING = "torch.load({!r}, map_location='cpu', weights_only=False)"
"""What the user is told to load a file of their own with, whatever a trainer left in it."""
SAFE_TORCH = (2, 10)
"""Files could run code in spite of weights_only=True before (CVE-2025-32434, CVE-2026-24747)."""
_BEGINNINGS = {
    GIT_LFS_POINTER: "is a Git LFS pointer, not the weights themselves: `git lfs pull` "
    "fetches them",
    b"\x89HDF\r\n": "is an HDF5 file, as Keras writes it, not a PyTorch one: export the model to "
    "ONNX and name the file in model.onnx",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"Rar!": "is a RAR archive: unpack it first",
}
_HTML = re.compile(rb"\s*<(!doctype html|html|head|\?xml)", re.IGNORECASE)
_HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|datetime\.\w+|pathlib(\._local)?\.\w*Path"
    r"|typing\.Any|builtins\.(list|dict|tuple|int|float|str|bool)|functools\.partial"
    r"|numpy\.(dtype|ndarray|bool_?|[a-z]+\d+|dtypes\.\w+|_?core\.multiarray\.(scalar|_reconstruct))"
    r"|torch\.(optim|nn\.modules)\.[\w.]+|omegaconf\.[\w.]+|collections\.defaultdict"
    r"|(pytorch_lightning|lightning|lightning_fabric)\.[\w.]*\.AttributeDict"
)
"""What trainers keep beside the tensors: settings and figures (torchvision's own training script
writes its arguments, Lightning its hyperparameters). None is imported or called, see `_stand_in`.
"""
_READ_BY_TORCH = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
    r"|torch\.(_utils|_tensor|storage|serialization|nn\.parameter)\.\w+|torch\.\w+"
)
_NETWORK_LAYERS = re.compile(r"torch\.nn\.modules\.(?!loss\.)|torchvision\.models\.|timm\.models\.")
_OF_A_NETWORK = ({"_modules"}, {"in_features", "in_channels"})
"""Names in the state of pickled layers: a class that is only mentioned has none, a loss not all."""


class _Ignored:
    """Stands in a file's tree for what is no tensor; nothing of the class named there is run."""

    def __init__(self, *arguments: object) -> None:
        """Whatever it was made of is dropped."""

    def __setstate__(self, state: object) -> None:
        """So is its state."""


def read_checkpoint(path: Path) -> Any:
    """What a weights file holds, usually a state dict within wrappers; loading it runs no code.

    Raises:
        ModelError: no such file, another kind of file, damaged, or more than tensors in it; says
            which, and what to save instead.
    """
    what = f"model.weights: {path}"
    if not path.is_file():
        raise ModelError(f"{what}: no such file; name one that is there{nearest(path)}")
    try:
        with path.open("rb") as file:
            beginning = file.read(1024)
        _require_weights_kind(path, beginning, what)
        if _is_safetensors(beginning):
            return load_file(path)
        require_safe_torch(what)
        return _load_tensors(path, what)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{what}: cannot be read as tensors alone ({path.stat().st_size:,} bytes): "
            f"{_reason(error)}; download it again, or save `model.state_dict()`"
        ) from error
    except (
        *(RuntimeError, EOFError, SafetensorError, ValueError, KeyError, IndexError),
        *(TypeError, AttributeError, OSError, zipfile.BadZipFile),
    ) as error:
        raise ModelError(
            f"{what}: damaged or not a weights file ({path.stat().st_size:,} bytes): "
            f"{first_line(error)}; download or save it again"
        ) from error


def require_safe_torch(what: str) -> None:
    """Refuse to read `what` with a torch that may run code for all `weights_only` says.

    Raises:
        ModelError: with what to install, or to give instead.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE_TORCH:
        raise ModelError(
            f"{what}: torch {torch.__version__} may run code that is hidden in a file of tensors; "
            f"give a .safetensors file, or pip install 'torch>={SAFE_TORCH[0]}.{SAFE_TORCH[1]}'"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def examples_of(names: Iterable[str]) -> str:
    """The first three of some names, for messages."""
    names = list(names)
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _require_weights_kind(path: Path, beginning: bytes, what: str) -> None:
    """Tell other files by their content: names promise much."""
    if not beginning:
        raise ModelError(f"{what}: is empty (0 bytes); download or save it again")
    for start, kind in _BEGINNINGS.items():
        if beginning.startswith(start):
            raise ModelError(f"{what}: {kind}")
    if _HTML.match(beginning):
        raise ModelError(
            f"{what}: is an HTML page, not weights: the address was that of a page about the file, "
            "or of a login; download the file itself"
        )
    if zipfile.is_zipfile(path):
        _require_state_archive(path, what)
    elif not _is_safetensors(beginning) and tarfile.is_tarfile(path):
        raise ModelError(f"{what}: is a tar archive; unpack it and name the weights file in it")


def _require_state_archive(path: Path, what: str) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/code/" in name for name in names) and any(
        name.endswith("/constants.pkl") for name in names
    ):
        raise ModelError(
            f"{what}: is a TorchScript archive, a program with its weights; save the weights "
            "alone:" + _saving(path, "torch.jit.load({!r}, map_location='cpu')")
        )
    if any(name.endswith("serialized_exported_program.json") for name in names) or any(
        name.endswith("/archive_format") for name in names
    ):
        raise ModelError(
            f"{what}: is a program of torch.export with its weights; save the weights alone:"
            + _saving(path, "torch.export.load({!r}).module()")
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise ModelError(
            f"{what}: is a zip archive, but not of PyTorch (it holds {', '.join(names[:3])}); "
            "unpack it and name the weights file in it"
        )


def _saving(path: Path, loading: str) -> str:
    """The lines that save the state dict of what `loading` gives."""
    return (
        "\n    import torch"
        f"\n    model = {loading.format(path.name)}"
        f"\n    torch.save(model.state_dict(), {path.stem + '_state.pth'!r})"
    )


def _is_safetensors(beginning: bytes) -> bool:
    """Eight bytes of length, then JSON: no pickle or zip has `{` there."""
    return beginning[8:9] == b"{" and beginning[:2] != b"PK"


def _load_tensors(path: Path, what: str) -> Any:
    with contextlib.suppress(pickle.UnpicklingError):
        return _load_pickle(path)
    names, texts = _contents(path)
    unknown = [
        name
        for name in dict.fromkeys(names)
        if not (_HARMLESS.fullmatch(name) or _READ_BY_TORCH.fullmatch(name))
    ]
    has_layers = all(some & texts for some in _OF_A_NETWORK)
    if has_layers and any(_NETWORK_LAYERS.match(name) for name in names):
        raise ModelError(
            f"{what}: holds a whole pickled model ({(unknown or names)[0]}), which could run code "
            "when loaded; where it was trained, save the weights alone:"
            + _saving(
                path,
                LOADING + "  # of a dict: what it has under 'model'",
            )
        )
    if unknown:
        raise ModelError(
            f"{what}: holds more than tensors ({', '.join(unknown[:3])}), which could run code "
            "when loaded; save `model.state_dict()`, or safetensors"
        )
    harmless: list[Any] = [(_stand_in(name), name) for name in names if _HARMLESS.fullmatch(name)]
    with torch.serialization.safe_globals(harmless):
        return _load_pickle(path)


def _load_pickle(path: Path) -> Any:
    with path.open("rb") as file:  # of a path, torch would look at the suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def _reason(error: pickle.UnpicklingError) -> str:
    """Without torch's own advice, which is to run what the file holds."""
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return found[1].partition(" Please ")[0] if found else first_line(error)


def _stand_in(name: str) -> Callable[[], object]:
    """What is made in place of `name`; torch fills dictionaries of a few exact types only."""
    if name.endswith(".AttributeDict"):
        return OrderedDict
    if name == "collections.defaultdict":
        return _empty_dict
    kind = "ndarray" if name.endswith("multiarray._reconstruct") else name.rpartition(".")[2]
    return type(kind, (_Ignored,), {})  # of its name, so that it can be told


def _empty_dict(*_: object) -> dict[object, object]:
    return {}


def _contents(path: Path) -> tuple[list[str], set[str]]:
    """The classes and functions that a pickled file names, in its order, and its texts.

    Nothing is loaded.
    """
    names: list[str] = []
    texts: set[str] = set()
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            tree = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            file = stack.enter_context(archive.open(tree))
        else:
            file = stack.enter_context(path.open("rb"))
        # A magic number, a protocol and a description of the machine come before a legacy tree.
        for _ in range(4):
            _read_pickle(file, names, texts)
    return names, texts


def _read_pickle(file: IO[bytes], names: list[str], texts: set[str]) -> None:
    last = ["", ""]
    with contextlib.suppress(ValueError):  # no pickle, or its end is missing: torch says so
        for operation, argument, _ in pickletools.genops(file):
            if operation.name in ("GLOBAL", "INST"):
                # Protocol 2, torch.save's own, writes Python 2's name for this module.
                names.append(str(argument).replace(" ", ".").replace("__builtin__.", "builtins."))
            elif operation.name == "STACK_GLOBAL":
                names.append(".".join(last))
            elif isinstance(argument, str):
                texts.add(argument)
                last = [last[1], argument]
