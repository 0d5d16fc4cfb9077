"""Finds a network's tensors in a weights file, and says what was taken and what was left.

A file may hold several networks (an average of the weights, a teacher) and other things beside the
tensors. What is taken has every tensor of the network; whatever is left has to be known for
something that inference does without.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchclf.errors import ModelError
from batchclf.models.checkpoints import LOADING, examples_of
from batchclf.models.matching import (
    AVERAGE,
    Candidate,
    Group,
    Network,
    candidates_of,
    groups_of,
    is_head_part,
    walk,
)

_WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights"),
    *("params", "module", "backbone", "encoder"),
)
"""Names that mean the model itself, the first before the next; timm's loader has the first two."""
_AVERAGES = ("state_dict_ema", "model_ema")
"""Averages of the weights, in the order of timm's loader."""
_COUNTERS = re.compile(r"(^|\.)(total_ops|total_params|num_batches_tracked)$")
"""Of thop and of batch normalisation, in every layer."""
_NO_LAYER = re.compile(
    r"(n_averaged|queue|queue_ptr)$"
    r"|((\w+_)?(criteri\w+|loss|losses|loss_fn|lossfn|metrics?|accuracy|acc|confmat)"
    r"|teacher(_\w+)?|(class|cls|loss|pos)_weights?|log_vars?)(\.|$)"
)
"""Names beside a network: averages' counters, losses, metrics, the teacher of a distilled network.
Nothing of them is computed at inference."""
_FIGURES = re.compile(r"(loss|train|val|valid|test)_\w+(\.|$)")
"""Figures of training, where they are numbers and not matrices."""
_AVERAGE_OF = re.compile(r"(\w+_)?(ema|shadow)\.(?P<name>.+)$")
_NORMALISATION = re.compile(r"(^|[._])(mean|std)$")


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of a network in a file."""

    state: dict[str, Tensor]
    num_classes: int
    normalisation: dict[str, list[float]]
    """`mean` and `std` of three values, where the file's network normalises its pixels itself."""

    def fill(self, module: nn.Module) -> None:
        """Put them into the network, built with as many classes.

        Only counters of batch normalisation, which old files lack, stay as they are.
        """
        state = module.state_dict()  # with the versions of its layers, which MNASNet asks for
        state.update(self.state)
        module.load_state_dict(state, strict=True)

    def require_num_classes(self, asked: int | None, path: Path) -> None:
        """Refuse another number of classes than the job's, if it gives one.

        Raises:
            ModelError: naming both.
        """
        if asked not in (None, self.num_classes):
            raise ModelError(
                f"model.num_classes: found {asked}, but the head in {path} has "
                f"{self.num_classes} classes"
            )


def find_state(loaded: object, network: Network, path: Path, log: Callable[[str], None]) -> Found:
    """The tensors of `network` in `loaded`, which was read from `path`, under the network's names.

    Tells `log` what was taken, under which other names, and what was left.

    Raises:
        ModelError: a tensor is missing, something is left that may be a layer, or several networks
            fit and nothing says which is meant.
    """
    what = f"model.weights: {path}"
    groups = groups_of(loaded, what)
    candidates = [one for group in groups for one in candidates_of(group, network)]
    complete = [one for one in candidates if not one.missing]
    if not complete:
        raise ModelError(f"{what}: {_refusal(groups, candidates, network)}")
    distinct = _distinct(complete)
    chosen = _chosen(distinct, network, path)
    left = _left(chosen, complete)
    unknown = [key for key in left if not _may_be_left(key, chosen, network)]
    if unknown:
        raise ModelError(f"{what}: {_of_unknown(chosen, unknown, network)}")
    state = {name: chosen.group.tensors[key] for name, key in chosen.taken.items()}
    heads = [name for name in sorted(network.head) if name in state]
    rows = {chosen.taken[name]: int(state[name].shape[0]) for name in heads}
    if len(set(rows.values())) > 1:
        raise ModelError(f"{what}: the head has several numbers of classes: {rows}")
    num_classes = next(iter(rows.values()))
    state |= {name: torch.zeros(num_classes) for name in chosen.zeros}
    _report_taken(chosen, left, path, log)
    _report_others(chosen, distinct, loaded, path, log)
    normalisation = {
        key.rpartition(".")[2].rpartition("_")[2]: chosen.group.tensors[key].flatten().tolist()
        for key in left
        if _is_normalisation(key, chosen, network)
    }
    return Found(state, num_classes, normalisation)


# ---- which of several ---------------------------------------------------------------------------


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Without those whose tensors are equal to those of one before."""
    distinct: list[Candidate] = []
    for one in candidates:
        if not any(_is_same(one, other) for other in distinct):
            distinct.append(one)
    return distinct


def _is_same(one: Candidate, other: Candidate) -> bool:
    return one.taken.keys() == other.taken.keys() and all(
        torch.equal(one.group.tensors[key], other.group.tensors[other.taken[name]])
        for name, key in one.taken.items()
    )


def _chosen(complete: list[Candidate], network: Network, path: Path) -> Candidate:
    """An average before the model itself, and that before networks of other names.

    So does timm's loader. torchvision's training script keeps `model_ema` in order to evaluate and
    publish it.
    """
    averages = [one for one in complete if one.is_average]
    known = [one for one in complete if all(word in _WRAPPERS for word in one.words)]
    best = averages or known or complete
    order = _AVERAGES if averages else _WRAPPERS

    def rank(one: Candidate) -> tuple[int, ...]:
        return tuple(order.index(word) if word in order else len(order) for word in one.words)

    best = sorted(best, key=rank)
    is_told = all(word in order for word in best[0].words)
    if len(best) > 1 and not (is_told and rank(best[0]) < rank(best[1])):
        raise ModelError(
            f"model.weights: {path}: holds several networks that fit {network.name}: "
            f"{', '.join(one.label for one in best)}; {_keeping(best, path)}"
        )
    return best[0]


def _keeping(candidates: Iterable[Candidate], path: Path) -> str:
    """How to save one of several networks."""
    for one in candidates:
        keys = one.group.path
        if keys and not one.prefix and all(isinstance(key, str | int) for key in keys):
            loading = LOADING.format(str(path)) + "".join(f"[{key!r}]" for key in keys)
            return f"save the one to be used alone: torch.save({loading}, 'one.pth')"
    return "save the one to be used in a file of its own"


# ---- what is left --------------------------------------------------------------------------------


def _left(chosen: Candidate, complete: list[Candidate]) -> list[str]:
    """The tensors beside those taken that belong to no other network of the file."""
    of_group = [one for one in complete if one.group is chosen.group]
    taken = {key for one in of_group for key in one.taken.values()} | set(chosen.taken.values())
    prefixes = {one.prefix for one in of_group} | {chosen.prefix}

    def belongs_to_another(key: str) -> bool:
        nearest = max(filter(key.startswith, prefixes), key=len, default="")
        return nearest not in ("", chosen.prefix)

    return [key for key in chosen.group.tensors if key not in taken and not belongs_to_another(key)]


def _may_be_left(key: str, chosen: Candidate, network: Network) -> bool:
    tensor = chosen.group.tensors[key]
    rest = key.removeprefix(chosen.prefix)
    if (
        rest.startswith(network.dispensable or ("\0",))
        or not (tensor.is_floating_point() or tensor.is_complex())  # counts something
        or _COUNTERS.search(key)
    ):
        return True
    if _is_inside(key, chosen, network):
        return False
    name = _beside(key, chosen)
    return bool(
        _NO_LAYER.match(name)
        or (_FIGURES.match(name) and tensor.ndim <= 1)
        or _is_of_average(name, tensor, network)
        or _is_normalisation(key, chosen, network)
    )


def _beside(key: str, chosen: Candidate) -> str:
    """What is left of a name without the beginning that it shares with the network's prefix."""
    parts, prefix = key.split("."), chosen.prefix.split(".")[:-1]
    shared = 0
    while shared < min(len(parts) - 1, len(prefix)) and parts[shared] == prefix[shared]:
        shared += 1
    return ".".join(parts[shared:])


def _is_inside(key: str, chosen: Candidate, network: Network) -> bool:
    """Whether a tensor is in a child of the network, or of its head, whatever it is called there.

    A layer may be called `loss_gate` or `val_proj`.
    """
    first = _beside(key, chosen).partition(".")[0]
    if key.startswith(chosen.prefix) and (first in network.children or first.isdecimal()):
        return True
    return any(first == _beside(other, chosen).partition(".")[0] for other in chosen.taken.values())


def _is_of_average(name: str, tensor: Tensor, network: Network) -> bool:
    """Whether a name means an average of one of the network's tensors, or its decay.

    Some averages keep the names without their dots.
    """
    found = _AVERAGE_OF.match(name)
    if found is None:
        return False
    bare = found["name"].replace(".", "")
    return tensor.ndim == 0 or any(bare.endswith(own.replace(".", "")) for own in network.tensors)


def _is_normalisation(key: str, chosen: Candidate, network: Network) -> bool:
    return (
        bool(_NORMALISATION.search(key))
        and "running" not in key
        and chosen.group.tensors[key].numel() == 3
        and not _is_inside(key, chosen, network)
    )


def _of_unknown(chosen: Candidate, unknown: list[str], network: Network) -> str:
    if any(is_head_part(key, chosen.prefix, network) for key in unknown):
        head = [chosen.taken[name] for name in sorted(network.head - {*chosen.zeros})]
        return _other_head([*head, *unknown], chosen.group, network)
    return _misfit(chosen, unknown, network)


def _refusal(groups: list[Group], candidates: list[Candidate], network: Network) -> str:
    """Why nothing fits, told of what fits best."""
    largest = max(groups, key=lambda group: len(group.tensors))
    nothing = Candidate(largest, "", {}, tuple(network.tensors))
    best = max((nothing, *candidates), key=lambda one: len(one.taken))
    unknown = [
        key
        for key in _left(best, [])
        if not _may_be_left(key, best, network)
        and key.removeprefix(best.prefix) not in network.tensors
    ]
    if best.taken and set(best.missing) <= network.head:
        resized = [best.prefix + name for name in best.missing]
        parts = [key for key in unknown if is_head_part(key, best.prefix, network)]
        parts += [key for key in resized if key in best.group.tensors]
        if parts:
            return _other_head(parts, best.group, network)
    if best.taken and set(best.missing) == network.head:
        return (
            f"has no head for {network.name}: {examples_of(best.missing)} missing"
            f"{f', and {examples_of(unknown)} beside the rest' if unknown else ''}; a backbone "
            "alone, as self-supervised training leaves it, gives no classes: train a head, and "
            "save the weights of both"
        )
    return _misfit(best, unknown, network)


def _other_head(parts: list[str], group: Group, network: Network) -> str:
    shapes = [f"{group.originals[key]} {tuple(group.tensors[key].shape)}" for key in parts]
    return (
        f"has another head than {network.name}: {examples_of(shapes)}. What lies between such "
        "layers is not in the file, so it cannot be built from it; where the model was made, "
        "export it, and name the file in model.onnx:"
        "\n    import torch"
        "\n    pixels, batch = torch.zeros(2, 3, 224, 224), torch.export.Dim.DYNAMIC"
        "\n    torch.onnx.export(model.eval(), (pixels,), 'model.onnx', dynamo=True, "
        "dynamic_shapes=({0: batch},))"
    )


def _misfit(candidate: Candidate, unknown: Iterable[str], network: Network) -> str:
    tensors, originals = candidate.group.tensors, candidate.group.originals
    there = {name: candidate.prefix + name for name in candidate.missing}
    resized = [
        f"{originals[key]} is {_form(tensors[key])}, not {_form(network.tensors[name])}"
        for name, key in there.items()
        if key in tensors
    ]
    missing = [name for name, key in there.items() if key not in tensors]
    parts = [
        f"{len(keys)} {kind} ({examples_of(keys)})"
        for kind, keys in (
            ("missing", missing),
            ("unknown", [originals[key] for key in unknown]),
            ("of another shape", resized),
        )
        if keys
    ]
    return (
        f"does not fit {network.name}: tensors {'; '.join(parts)}; is it a checkpoint of another "
        "model?"
    )


def _form(tensor: Tensor) -> str:
    kind = [] if tensor.is_floating_point() else [tensor.dtype]
    layout = [] if tensor.layout is torch.strided else [tensor.layout]
    return " ".join(
        str(part).removeprefix("torch.") for part in (tuple(tensor.shape), *kind, *layout)
    )


# ---- what is told --------------------------------------------------------------------------------


def _report_taken(
    chosen: Candidate, left: list[str], path: Path, log: Callable[[str], None]
) -> None:
    originals = chosen.group.originals
    renamed = [
        f"{originals[key]} is {name}"
        for name, key in chosen.taken.items()
        if originals[key] != name
    ]
    if not (chosen.words or renamed or left or chosen.zeros):
        return
    parts = [f"{len(chosen.taken)} tensors taken{f' from {chosen.label}' if chosen.words else ''}"]
    if renamed:
        parts.append(f"{len(renamed)} of them renamed ({examples_of(renamed)})")
    if chosen.zeros:
        parts.append(f"{examples_of(chosen.zeros)} set to 0, since the head has no bias")
    if left:
        parts.append(f"{len(left)} left aside ({examples_of(originals[key] for key in left)})")
    log(f"{path}: {', '.join(parts)}")


def _report_others(
    chosen: Candidate,
    distinct: list[Candidate],
    loaded: object,
    path: Path,
    log: Callable[[str], None],
) -> None:
    others = [one for one in distinct if one is not chosen]
    labels = [one.label for one in others] + _other_averages(loaded, distinct)
    if labels:
        kind = ", an average of the weights" if chosen.is_average else ""
        log(
            f"{path}: taken: {chosen.label}{kind}; not taken: {', '.join(labels)}; for another, "
            f"{_keeping(others, path)}"
        )


def _other_averages(loaded: object, complete: list[Candidate]) -> list[str]:
    """Averages that cannot be taken: a list without names, or parameters without the rest."""
    taken = {word for one in complete for word in one.words}
    return [
        f"`{' / '.join(map(str, (*path, key)))}` (which has not all tensors of the network by name)"
        for path, mapping in walk(loaded)
        for key, value in mapping.items()
        if isinstance(value, Mapping | list | tuple) and _has_tensors(value)
        if AVERAGE.search(str(key)) and not taken & {*map(str, path), str(key)}
    ]


def _has_tensors(value: Mapping[Any, Any] | list[Any] | tuple[Any, ...]) -> bool:
    inner = list(value.values()) if isinstance(value, Mapping) else value
    return any(
        isinstance(one, Tensor) or (isinstance(one, Mapping | list | tuple) and _has_tensors(one))
        for one in inner
    )
