"""What fits a network in what a trainer left: by name and shape, as a person would see it.

Trainers put state dicts into wrappers, and prefixes before the names of their tensors.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from batchclf.errors import ModelError

_INSERTED = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What DataParallel, torch.compile and the like put before the names of what they wrap."""
_RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
"""Names in torchvision's older DenseNet and ViT files, and those of today."""
AVERAGE = re.compile(r"(^|_)(ema|shadow|swa|averaged?)(_|$)")
_HEADLIKE = re.compile(r"fc|cls|class|head|lin|logit|out|final|top|dense|last")
_NO_HEAD = re.compile(r"proj|predict|proto|contrast|queue|embed|aux|domain|rotat|jigsaw")
_COUNTER = ".num_batches_tracked"
"""Of batch normalisation; absent in old files, and unused at inference."""
_MAX_PREFIXES = 12


@dataclass(frozen=True, slots=True)
class Network:
    """What a network expects of a file: names and shapes, no values."""

    name: str
    tensors: Mapping[str, Tensor]
    head: frozenset[str]
    """Names of the tensors whose first dimension is the number of classes."""
    children: frozenset[str]
    """The first parts of all names that are inside it, also of children without tensors."""
    by_index: Mapping[str, str]
    """Names with the number of each child in place of its name, as `nn.Sequential(*children)`."""
    dispensable: tuple[str, ...] = ()
    """Beginnings of the names of layers that only training uses."""

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor can be the one of that name, whatever the number of classes."""
        own = self.tensors[name]
        skipped = int(name in self.head)
        return (
            own.ndim == tensor.ndim
            and own.shape[skipped:] == tensor.shape[skipped:]
            and own.is_floating_point() == tensor.is_floating_point()
            and tensor.layout is torch.strided
        )


def network_of(
    name: str, build: Callable[[int], nn.Module], dispensable: tuple[str, ...] = ()
) -> Network:
    """The network that `build` makes of a number of classes: the head is what changes with it."""

    def shapes(num_classes: int) -> tuple[list[str], dict[str, Tensor]]:
        module = build(num_classes)
        own = module.state_dict()
        return [child for child, _ in module.named_children()], {
            key: value.to("meta") for key, value in own.items()
        }

    try:
        with torch.device("meta"):
            (children, tensors), (_, others) = shapes(1000), shapes(1001)
    except RuntimeError:  # without values: RegNet computes its widths with tensors
        (children, tensors), (_, others) = shapes(1000), shapes(1001)
    number = {child: str(index) for index, child in enumerate(children)}
    return Network(
        name=name,
        tensors=tensors,
        head=frozenset(key for key in tensors if tensors[key].shape != others[key].shape),
        children=frozenset({*children, *(key.partition(".")[0] for key in tensors)}),
        by_index={
            f"{number[child]}.{rest}": f"{child}.{rest}"
            for child, _, rest in (key.partition(".") for key in tensors)
            if child in number
        },
        dispensable=dispensable,
    )


def tensors_named(loaded: object, name: str) -> list[Tensor]:
    """The tensors in a file whose name ends with `name`."""
    return [
        tensor
        for _, mapping in walk(loaded)
        for key, tensor in mapping.items()
        if isinstance(tensor, Tensor) and str(key).endswith(name)
    ]


# ---- what a file holds ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one mapping."""

    path: tuple[object, ...]
    """The keys and indices that lead to it."""
    tensors: dict[str, Tensor]
    """By name, without what wrappers inserted."""
    originals: dict[str, str]
    """The names in the file."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """The tensors of a group that fit the network, if their names begin with `prefix`."""

    group: Group
    prefix: str
    taken: dict[str, str]
    """The network's name to the group's."""
    missing: tuple[str, ...]
    zeros: tuple[str, ...] = ()
    """Biases of a head without any."""

    @property
    def words(self) -> tuple[str, ...]:
        return (*map(str, self.group.path), *filter(None, self.prefix.split(".")))

    @property
    def label(self) -> str:
        parts = (*map(str, self.group.path), *filter(None, (self.prefix,)))
        return f"`{' / '.join(parts)}`" if parts else "the file's own tensors"

    @property
    def is_average(self) -> bool:
        """An average of the weights that has averaged something, unlike one that never began."""
        count = self.group.tensors.get(f"{self.prefix}n_averaged")
        if count is not None:
            return int(count) > 0
        return any(map(AVERAGE.search, self.words))


def walk(loaded: object) -> Iterator[tuple[tuple[object, ...], Mapping[Any, Any]]]:
    """Every mapping in `loaded`, once, with the keys that lead to it; the outer ones come first."""
    waiting: deque[tuple[tuple[object, ...], Any]] = deque()
    if isinstance(loaded, Mapping | list | tuple):
        waiting.append(((), loaded))
    seen: set[int] = set()
    while waiting:
        path, value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            yield path, value
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        waiting.extend(
            ((*path, key), inner)
            for key, inner in items
            if isinstance(inner, Mapping | list | tuple)
        )


def groups_of(loaded: object, what: str) -> list[Group]:
    """The mappings in `loaded` that hold tensors.

    Raises:
        ModelError: there are none, or the tensors are quantised.
    """
    mappings = list(walk(loaded))
    if not mappings or not any(mapping for _, mapping in mappings):
        raise ModelError(
            f"{what}: holds a {type(loaded).__name__}, not a state dict; save `model.state_dict()`"
        )
    for _, mapping in mappings:
        for key, value in mapping.items():
            parts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(part, Tensor) and part.is_quantized for part in parts):
                raise ModelError(
                    f"{what}: holds quantised tensors ({key}); give the float weights from before "
                    "the conversion (`precision: int8` quantises them here)"
                )
    groups = [_group(path, mapping) for path, mapping in mappings]
    if not any(group.tensors for group in groups):
        raise ModelError(f"{what}: holds no tensors{_instead(mappings)}")
    return [group for group in groups if group.tensors]


def _instead(mappings: list[tuple[tuple[object, ...], Mapping[Any, Any]]]) -> str:
    """What values a file holds in the place of tensors, and what to do about arrays."""
    names: dict[str, list[str]] = {}
    for _, mapping in mappings:
        for key, value in mapping.items():
            if not isinstance(value, Mapping):
                names.setdefault(type(value).__name__, []).append(str(key))
    kinds = [
        f"{len(keys)} of {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in sorted(names.items(), key=lambda item: -len(item[1]))
    ]
    advice = (
        "; where it was made, save tensors: torch.save({key: torch.as_tensor(array) for key, "
        "array in arrays.items()}, 'tensors.pth')"
    )
    return f", but {', '.join(kinds)}{advice if 'ndarray' in names else ''}"


def _group(path: tuple[object, ...], mapping: Mapping[Any, Any]) -> Group:
    tensors: dict[str, Tensor] = {}
    originals: dict[str, str] = {}
    for key, tensor in mapping.items():
        if isinstance(tensor, Tensor):
            name = _INSERTED.sub("", str(key))
            for old, new in _RENAMED:
                name = old.sub(new, name)
            if name in tensors:  # two networks: one within a wrapper, one without
                name = str(key)
            tensors[name], originals[name] = tensor, str(key)
    return Group(path, tensors, originals)


# ---- what fits -----------------------------------------------------------------------------------


def candidates_of(group: Group, network: Network) -> Iterator[Candidate]:
    """What fits the network, by the prefixes under which any of its tensors are found."""
    if 2 * len(group.tensors) < len(network.tensors):  # an optimiser has a mapping per parameter
        return
    for names in ({name: name for name in network.tensors}, network.by_index):
        found = Counter(
            prefix
            for key, tensor in group.tensors.items()
            for prefix, rest in _splits(key)
            if rest in names and network.fits(names[rest], tensor)
        )
        for prefix, _ in found.most_common(_MAX_PREFIXES):
            keys = {name: prefix + rest for rest, name in names.items()}
            taken = {
                name: key
                for name, key in keys.items()
                if key in group.tensors and network.fits(name, group.tensors[key])
            }
            missing = (
                name
                for name in network.tensors
                if name not in taken and not name.endswith(_COUNTER)
            )
            found_here = Candidate(group, prefix, taken, tuple(missing))
            yield _without_bias(_with_own_head(found_here, network), network)


def _splits(key: str) -> Iterator[tuple[str, str]]:
    yield "", key
    for dot in re.finditer(r"\.", key):
        yield key[: dot.end()], key[dot.end() :]


def _with_own_head(candidate: Candidate, network: Network) -> Candidate:
    """With a last layer of another name, if that is all that is missing and one layer can be it.

    A Linear in place of a Sequential, or the other way about, with or without Dropout: layers
    without tensors leave no trace in a file.
    """
    if not candidate.missing or not set(candidate.missing) <= network.head:
        return candidate
    tensors = candidate.group.tensors
    used = set(candidate.taken.values())
    ends = {name.rpartition(".")[2]: name for name in candidate.missing}
    if "weight" not in ends:
        return candidate
    parents = [
        parent
        for parent, _, end in (key.rpartition(".") for key in tensors if key not in used)
        if end == "weight"
        and is_head_part(parent, candidate.prefix, network)
        and all(
            network.fits(name, tensors[f"{parent}.{end}"])
            if f"{parent}.{end}" in tensors
            else end == "bias" and _is_in_own_head(parent, candidate.prefix, network)
            for end, name in ends.items()
        )
    ]
    outer = candidate.prefix
    while outer and not any(parent.startswith(outer) for parent in parents):
        outer = outer[: outer[:-1].rfind(".") + 1]
    near = [parent for parent in parents if parent.startswith(outer)]
    if len(near) != 1:
        return candidate
    head = {name: f"{near[0]}.{end}" for end, name in ends.items() if f"{near[0]}.{end}" in tensors}
    return replace(
        candidate,
        taken=candidate.taken | head,
        missing=tuple(name for name in candidate.missing if name not in head),
    )


def _without_bias(candidate: Candidate, network: Network) -> Candidate:
    """With zeros for the bias of a head that has a weight only, if that is all that is missing."""
    for name in candidate.missing:
        parent, _, end = name.rpartition(".")
        weight = candidate.taken.get(f"{parent}.weight")
        if (
            end != "bias"
            or name not in network.head
            or weight is None
            or weight.removesuffix("weight") + "bias" in candidate.group.tensors
        ):
            return candidate
    return replace(candidate, missing=(), zeros=candidate.missing)


def _is_in_own_head(key: str, prefix: str, network: Network) -> bool:
    first = key.removeprefix(prefix).partition(".")[0]
    return first in {name.partition(".")[0] for name in network.head}


def is_head_part(key: str, prefix: str, network: Network) -> bool:
    """Whether a name that the network does not have means a head, by where it is and its words."""
    if _is_in_own_head(key, prefix, network):
        return True
    rest = key.removeprefix(prefix).lower()
    first = rest.partition(".")[0]
    if first in {name.partition(".")[0] for name in network.tensors}:
        return False
    is_numbered = not re.search("[a-z]", rest)  # behind the children of a Sequential
    return is_numbered or bool(_HEADLIKE.search(rest) and not _NO_HEAD.search(rest))
