"""Weights files of public trainers: the tensors of their source exactly, or one clear error.

What a trainer writes is tried on the trees that its files hold; files themselves where reading is
what matters.
"""

import argparse
import datetime
import functools
import itertools
import json
import pathlib
import re
import sys
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from batchclf.errors import ModelError
from batchclf.spec.job import ModelSpec
from tests.conftest import DIGITS_MODEL, MOBILENET_WEIGHTS, ROOT, Batchclf, data, write_job
from tests.tiny import Log, run_here

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
zoo = pytest.importorskip("torchvision.models")

from torch import nn  # noqa: E402
from torchvision.transforms import _presets as transforms  # noqa: E402

from batchclf.models.checkpoints import read_checkpoint  # noqa: E402
from batchclf.models.matching import Network, network_of  # noqa: E402
from batchclf.models.states import Found, find_state  # noqa: E402
from batchclf.models.zoo import torchvision  # noqa: E402

SMALL = "shufflenet_v2_x0_5"
OWN = Path("own.pth")

SOME_DIGITS = ROOT / "samples" / "digits" / "7"
WITH_TRAINING_HEADS = ("googlenet", "inception_v3")

State = dict[str, Any]


@functools.cache
def network(name: str) -> Network:
    options = (
        {"aux_logits": False, "init_weights": False}
        if name in ("googlenet", "inception_v3")
        else {}
    )
    return network_of(
        name,
        lambda count: zoo.get_model(name, weights=None, num_classes=count, **options),
        ("aux1.", "aux2.", "AuxLogits."),
    )


@functools.cache
def _module(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module: nn.Module = zoo.get_model(name, weights=None, num_classes=5)
    return module


def state_of(name: str = SMALL, seed: int = 0) -> State:
    """A network of 5 classes as a trainer has it; another for another `seed`."""
    return dict(_module(name, seed).state_dict())


def find(loaded: object, name: str = SMALL) -> tuple[Found, str]:
    """What is found for a network, and what was told of it."""
    told: list[str] = []
    found = find_state(loaded, network(name), OWN, told.append)
    return found, "\n".join(told)


def assert_found(loaded: object, expected: State, name: str = SMALL) -> str:
    found, told = find(loaded, name)
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[key], expected[key]) for key in expected)
    assert found.num_classes == 5
    return told


def refused(loaded: object, name: str = SMALL) -> str:
    with pytest.raises(ModelError) as caught:
        find(loaded, name)
    message = str(caught.value)
    assert message.startswith("model.weights: own.pth: ")
    return message


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


# ---- wrappers and prefixes -----------------------------------------------------------------------

WRAPPERS = (
    *("weights", "net", "network", "model_state", "model_state_dict", "state_dict", "params"),
    *("module", "checkpoint", "best_model", "my own name"),
)
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "model._orig_mod."),
    *("_orig_mod.module.", "module.model.", "model.backbone.", "model.module.net.", "classifier."),
    *("_fsdp_wrapped_module.", "0.", "my_own_name."),
)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_may_have_any_name(wrapper: str) -> None:
    state = state_of()
    told = assert_found({"epoch": 3, wrapper: state, "optimizer": {"state": {0: {}}}}, state)
    assert told == f"own.pth: {len(state)} tensors taken from `{wrapper}`"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_may_have_any_name(prefix: str) -> None:
    state = state_of()
    told = assert_found(under(prefix, state), state)
    assert f"{len(state)} of them renamed ({prefix}conv1.0.weight is conv1.0.weight, " in told


@given(
    st.lists(st.sampled_from(WRAPPERS), max_size=4), st.lists(st.sampled_from(PREFIXES), max_size=4)
)
@settings(max_examples=25)
def test_wrappers_and_prefixes_may_be_nested(wrappers: list[str], prefixes: list[str]) -> None:
    state = state_of()
    loaded: object = under("".join(prefixes), state)
    for wrapper in wrappers:
        loaded = {"step": torch.tensor(3), wrapper: loaded, "lr": 0.1}
    assert_found(loaded, state)


def test_what_wraps_a_part_of_a_network_is_seen_through() -> None:
    """PyTorch's ImageNet example puts DataParallel around `features` of AlexNet and VGG."""
    state = state_of("squeezenet1_1")
    wrapped = {key.replace("features.", "features.module."): value for key, value in state.items()}
    assert wrapped.keys() != state.keys()
    assert_found(wrapped, state, "squeezenet1_1")
    compiled = {key.replace("stage2.", "stage2._orig_mod."): v for key, v in state_of().items()}
    assert_found(compiled, state_of())


def test_a_tuple_with_other_things_and_a_tree_that_holds_itself_are_searched() -> None:
    state = state_of()
    assert_found((3, state, [0.1, 0.2]), state)
    circular: dict[str, Any] = {"model": state}
    circular["self"] = circular
    assert_found(circular, state)


def test_modules_as_torch_wraps_them_are_found() -> None:
    module, state = _module(SMALL, 0), state_of()
    assert_found(nn.DataParallel(module).state_dict(), state)
    assert_found(torch.optim.swa_utils.AveragedModel(module).state_dict(), state)
    assert_found(torch.compile(module).state_dict(), state)


@pytest.mark.parametrize("name", ["densenet121", "vit_b_32"])
def test_names_that_torchvision_gave_before_are_known(name: str) -> None:
    meta = network(name).tensors
    old = {}
    for key, value in meta.items():
        key = re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key)
        key = re.sub(r"\.mlp\.0\.", ".mlp.linear_1.", key)
        old[re.sub(r"\.mlp\.3\.", ".mlp.linear_2.", key)] = value
    assert old.keys() != meta.keys()
    found, _ = find(old, name)
    assert {key: id(value) for key, value in found.state.items()} == {
        key: id(value) for key, value in meta.items()
    }


def test_counters_of_batch_normalisation_may_be_missing() -> None:
    state = {key: value for key, value in state_of().items() if "num_batches" not in key}
    assert_found(under("module.", state), state)


def test_no_model_of_torchvision_has_a_layer_named_like_a_wrapper() -> None:
    for name in (
        "resnet18",
        "maxvit_t",
        "swin_v2_t",
        "vit_b_32",
        "convnext_tiny",
        "regnet_y_400mf",
    ):
        assert not any("module" in key.split(".") for key in network(name).tensors)


# ---- beside the network --------------------------------------------------------------------------


def test_what_is_no_layer_is_left_aside_and_told() -> None:
    state = state_of()
    beside = {
        "criterion.weight": torch.ones(5),
        "loss_fn.pos_weight": torch.ones(5),
        "class_weights": torch.ones(5),
        "n_averaged": torch.tensor(3),
        "train_acc.total": torch.tensor(3),
        "total_ops": torch.zeros(1),
        "conv1.total_params": torch.zeros(1),
        "module.conv1.0.total_ops": torch.zeros(1),
    }
    told = assert_found(state | beside, state)
    assert "8 left aside (criterion.weight, loss_fn.pos_weight, class_weights, ...)" in told
    inner = {"epoch": torch.tensor(3), **under("model.", state), "criterion.weight": torch.ones(5)}
    assert "left aside (" in assert_found({"state_dict": inner | {"step": 1}} | inner, state)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("stage2.0.se.fc.weight", (8, 8)),
        ("conv1.1.extra_bias", (24,)),
        ("bn9.weight", (24,)),
        ("attention.qkv.weight", (24, 24)),
        ("temperature", (1,)),
        ("conv5.val_proj.weight", (8, 8)),
        ("conv5.val_proj.bias", (8,)),
        ("stage2.1.ema.conv.weight", (8, 8)),
        ("stage2.0.loss_gate", (1,)),
        ("stage2.0.test_adapter.down.weight", (8, 8)),
        ("stage2.0.criterion.weight", (8,)),
        ("stage2.teacher_proj.weight", (8, 8)),
        ("stage2.0.acc", (24,)),
        ("stage2.0.mean", (3,)),
        ("maxpool.shadow.weight", (3,)),
        ("stage4.queue", (8, 8)),
        ("val_adapter.weight", (8, 8)),
        ("loss_gate.weight", (8, 8)),
        ("ema.conv1x1.weight", (8, 8)),
        ("neck.criterion.weight", (8, 8)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.", "model.backbone."])
def test_what_may_be_a_layer_is_not_left_aside(key: str, shape: Any, prefix: str) -> None:
    message = refused(under(prefix, state_of() | {key: torch.zeros(shape)}))
    assert f"does not fit {SMALL}: tensors 1 unknown ({prefix}{key})" in message


@pytest.mark.parametrize("name", ["val_head", "loss_fc", "test_classifier"])
def test_a_layer_beside_the_network_is_not_left_for_its_name(name: str) -> None:
    layer = under(f"{name}.", nn.Linear(5, 5).state_dict())
    message = refused(under("backbone.", state_of()) | layer)
    assert f"{name}.weight (5, 5)" in message


def test_a_layer_of_a_head_with_a_name_of_its_own_is_not_left_for_its_name() -> None:
    state = under("model.backbone.", {k: v for k, v in state_of().items() if "fc." not in k})
    head = {"model.head.weight": state_of()["fc.weight"], "model.head.bias": state_of()["fc.bias"]}
    assert_found(state | head, state_of())
    message = refused(state | head | {"model.head.loss_gate": torch.zeros(5)})
    assert "model.head.loss_gate" in message


def test_a_layer_in_a_sequential_of_the_children_is_not_left_for_its_name() -> None:
    module = _module("resnet18", 0)
    numbered = nn.Sequential(*module.children()).state_dict()
    assert_found(numbered, state_of("resnet18"), "resnet18")
    for key in ("4.1.ema.conv.weight", "8.loss_gate"):
        assert key in refused(numbered | {key: torch.zeros(8)}, "resnet18")


def test_a_layer_of_the_average_that_is_taken_is_not_left_as_another_networks() -> None:
    both = under("model.", state_of()) | under("model.ema.", state_of(seed=1))
    assert_found(both, state_of(seed=1))
    message = refused(both | {"model.ema.stage2.0.gate.weight": torch.zeros(8, 8)})
    assert "1 unknown (model.ema.stage2.0.gate.weight)" in message


def test_an_average_without_buffers_and_with_names_without_dots_is_left_aside() -> None:
    means = {f"model_ema.{key.replace('.', '')}": v for key, v in state_of(seed=1).items()}
    means |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    del means["model_ema.conv10weight"]
    assert "left aside" in assert_found(under("model.", state_of()) | means, state_of())


def test_a_layer_of_complex_numbers_is_not_left_as_a_counter() -> None:
    filters = torch.zeros(8, 8, dtype=torch.complex64)
    assert "1 unknown (conv5.filter)" in refused(state_of() | {"conv5.filter": filters})


def test_a_second_head_or_a_layer_behind_the_head_is_refused() -> None:
    for extra in ("head.weight", "fc_gender.weight", "classifier.0.weight"):
        message = refused(under("backbone.", state_of()) | {extra: torch.zeros(3, 5)})
        assert f"has another head than {SMALL}" in message
        assert f"{extra} (3, 5)" in message


@pytest.mark.parametrize("key", ["stage3.2.branch2.5.weight", "conv5.0.weight", "fc.weight"])
def test_an_untouched_layer_is_refused_by_name(key: str) -> None:
    state = under("module.", state_of())
    del state[f"module.{key}"]
    assert f"tensors 1 missing ({key})" in refused(state)
    assert f"tensors 1 missing ({key})" in refused({"model": state, "epoch": 3})


def test_integers_in_place_of_weights_are_refused() -> None:
    state = state_of() | {"conv5.0.weight": torch.zeros(1024, 192, 1, 1, dtype=torch.int8)}
    message = refused(state)
    assert "conv5.0.weight is (1024, 192, 1, 1) int8, not (1024, 192, 1, 1)" in message


def test_tensors_that_are_stored_sparse_are_refused() -> None:
    sparse = state_of()["conv5.0.weight"].to_sparse()
    message = refused(state_of() | {"conv5.0.weight": sparse})
    assert "conv5.0.weight is (1024, 192, 1, 1) sparse_coo, not (1024, 192, 1, 1)" in message


@pytest.mark.parametrize(("name", "other"), [("resnet18", "resnet34"), ("swin_t", "swin_s")])
def test_a_deeper_network_that_holds_all_of_the_layers_is_another_network(
    name: str, other: str
) -> None:
    message = refused({"model": dict(network(other).tensors)}, name)
    assert re.search(rf"does not fit {name}: tensors \d+ unknown \(", message)


def test_the_teacher_of_a_distilled_network_is_left_aside() -> None:
    teacher = under("teacher.", dict(network("resnet18").tensors))
    told = assert_found({"state_dict": under("model.", state_of()) | teacher}, state_of())
    assert f"{len(teacher)} left aside (teacher.conv1.weight, " in told


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_are_refused_by_name() -> None:
    weight = torch.quantize_per_tensor(state_of()["conv5.0.weight"], 0.1, 0, torch.qint8)
    assert "holds quantised tensors (conv5.0.weight)" in refused(
        state_of() | {"conv5.0.weight": weight}
    )
    packed = {"model": {"fc._packed_params._packed_params": (weight, None)}}
    assert "quantised tensors (fc._packed_params._packed_params)" in refused(packed)


def test_a_network_that_normalises_its_pixels_itself_must_do_as_the_job_does(
    tmp_path: Path,
) -> None:
    imagenet = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    loaded = under("model.", state_of()) | {"normalize.mean": imagenet}
    torch.save(loaded, tmp_path / "own.pth")
    torchvision.build(ModelSpec(name=SMALL, weights=str(tmp_path / "own.pth")))
    torch.save(loaded | {"normalize.std": torch.full((3,), 0.5)}, tmp_path / "own.pth")
    with pytest.raises(ModelError, match=r"itself, with std \[0\.5, 0\.5, 0\.5\], and not"):
        torchvision.build(ModelSpec(name=SMALL, weights=str(tmp_path / "own.pth")))
    torchvision.build(
        ModelSpec.model_validate(
            {
                "name": SMALL,
                "weights": str(tmp_path / "own.pth"),
                "preprocess": {"std": [0.5, 0.5, 0.5]},
            }
        )
    )


# ---- heads ---------------------------------------------------------------------------------------

HEADS = {
    "Sequential(Dropout, Linear)": ("resnet18", "fc", "fc.1"),
    "Sequential(Linear, LogSoftmax)": (SMALL, "fc", "fc.0"),
    "Linear in place of a Sequential": ("mobilenet_v2", "classifier.1", "classifier"),
    "Sequential within a Sequential": ("mobilenet_v2", "classifier.1", "classifier.1.1"),
    "Linear in place of heads": ("vit_b_32", "heads.head", "heads"),
    "another name": (SMALL, "fc", "classifier"),
    "last_linear": (SMALL, "fc", "last_linear"),
    "number": ("squeezenet1_1", "classifier.1", "classifier.2"),
}


def with_head(name: str, own: str, other: str, prefix: str = "") -> State:
    """Tensors on meta, with the head under another name."""
    return {
        prefix + re.sub(rf"^{re.escape(own)}\.(\w+)$", rf"{other}.\1", key): value
        for key, value in network(name).tensors.items()
    }


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_head_of_one_layer_may_have_another_name(kind: str, prefix: str) -> None:
    name, own, other = HEADS[kind]
    found, told = find(with_head(name, own, other, prefix), name)
    assert all(found.state[key] is value for key, value in network(name).tensors.items())
    assert found.num_classes == 1000
    assert f"{prefix}{other}.weight is {own}.weight" in told or "renamed" in told


@pytest.mark.parametrize(
    ("name", "head", "bias"),
    [
        (SMALL, lambda own: {"fc.weight": own["fc.weight"]}, "fc.bias"),
        (SMALL, lambda own: {"fc.1.weight": own["fc.weight"]}, "fc.bias"),
        (
            "mobilenet_v2",
            lambda own: {"classifier.weight": own["classifier.1.weight"]},
            "classifier.1.bias",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_head_without_bias_gives_the_logits_of_the_model_without_it(
    name: str, head: Callable[[State], State], bias: str, prefix: str
) -> None:
    own = state_of(name)
    parent = bias.removesuffix(".bias")
    body = {key: value for key, value in own.items() if not key.startswith(f"{parent}.")}
    found, told = find(under(prefix, body | head(own)), name)
    assert f"{bias} set to 0, since the head has no bias" in told
    assert found.num_classes == 5
    module, theirs = (zoo.get_model(name, weights=None, num_classes=5).eval() for _ in range(2))
    found.fill(module)
    theirs.load_state_dict(own)
    theirs.get_submodule(parent).bias = None
    torch.manual_seed(1)
    pixels_NCHW = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(module(pixels_NCHW), theirs(pixels_NCHW))


@pytest.mark.parametrize(
    "beside", [{"fc.bias": torch.zeros(7, 5)}, {"fc.1.weight": torch.zeros(5, 5)}]
)
def test_a_head_whose_bias_is_another_or_behind_it_is_refused(beside: State) -> None:
    state = {key: value for key, value in state_of().items() if key != "fc.bias"}
    refused(state | beside)
    renamed = {key.replace("fc.", "arc_head."): value for key, value in state.items()}
    refused(renamed)


def test_backbone_and_head_may_have_prefixes_of_their_own() -> None:
    """As MMPretrain saves them, and what wraps a torchvision model without its head."""
    state = state_of("resnet18")
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    head = {key.removeprefix("fc."): state[key] for key in ("fc.weight", "fc.bias")}
    for backbone, own in itertools.product(
        ("backbone.", "model.encoder.", "features."), ("head.fc.", "model.classifier.", "fc.1.")
    ):
        told = assert_found(under(backbone, body) | under(own, head), state, "resnet18")
        assert f"{len(state)} of them renamed" in told


def test_children_in_a_sequential_are_known_by_their_numbers() -> None:
    """`nn.Sequential(*list(resnet.children())[:-1])` with a Linear behind it."""
    module, state = _module("resnet18", 0), state_of("resnet18")
    children = list(module.children())

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feature_extractor = nn.Sequential(*children[:-1])
            self.classifier = children[-1]

    assert_found(Classifier().state_dict(), state, "resnet18")
    behind = nn.Sequential(*children[:-1], nn.Flatten(), children[-1])
    assert_found(behind.state_dict(), state, "resnet18")
    assert_found({"net": behind.state_dict()}, state, "resnet18")


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise(sizes):
        layers += [nn.Linear(in_features, out_features), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    ("name", "own", "head"),
    [
        ("resnet18", "fc", mlp(512, 256, 5)),
        ("resnet18", "fc", mlp(512, 512, 5)),
        ("resnet18", "fc", nn.Sequential(nn.BatchNorm1d(512), nn.Linear(512, 5))),
        ("resnet18", "fc", nn.Sequential(nn.Linear(512, 64), nn.BatchNorm1d(64), nn.Linear(64, 5))),
        ("mobilenet_v2", "classifier.1", mlp(1280, 100, 5)),
        ("mobilenet_v3_small", "classifier.3", mlp(1024, 100, 5)),
    ],
)
@pytest.mark.parametrize("place", ["the layer", "its parent", "another name"])
def test_a_head_of_several_layers_is_refused_with_what_exports_it(
    name: str, own: str, head: nn.Module, place: str
) -> None:
    parent = own.partition(".")[0]
    where = {"the layer": own, "its parent": parent, "another name": "head"}[place]
    state = {key: v for key, v in network(name).tensors.items() if not key.startswith(f"{own}.")}
    message = refused(under("model.", state | under(f"{where}.", head.state_dict())), name)
    assert f"has another head than {name}: model." in message or "is it a checkpoint" in message
    if "another head" in message:
        assert message.count("\n") == 3
        assert "torch.onnx.export(model.eval(), (pixels,), 'model.onnx', dynamo=True" in message
    else:
        assert (name, place) == ("mobilenet_v3_small", "its parent")


def test_the_lines_that_export_another_head_give_a_model_that_runs(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = zoo.squeezenet1_1(num_classes=5)
    state = model.state_dict()
    model.classifier[1] = nn.Sequential(nn.Conv2d(512, 16, 1), nn.ReLU(), nn.Conv2d(16, 5, 1))
    assert state.keys() != model.state_dict().keys()
    lines = [line.strip() for line in refused(model.state_dict(), "squeezenet1_1").split("\n")[1:]]
    names: dict[str, Any] = {"model": model}
    exec("\n".join(lines).replace("'model.onnx'", repr(str(tmp_path / "model.onnx"))), names)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in (1, 3):
        pixels = np.zeros((size, 3, 224, 224), np.float32)
        (logits,) = session.run(None, {session.get_inputs()[0].name: pixels})
        assert logits.shape == (size, 5)


def without_head(name: str = "resnet18") -> State:
    return {key: v for key, v in network(name).tensors.items() if not key.startswith("fc.")}


SELF_SUPERVISED: dict[str, Callable[[], Any]] = {
    "backbone alone": without_head,
    "SimCLR": lambda: (
        under("encoder.", without_head()) | under("projector.", mlp(512, 512, 128).state_dict())
    ),
    "MoCo v2": lambda: (
        under("module.encoder_q.", without_head())
        | under("module.encoder_q.fc.", mlp(512, 512, 128).state_dict())
    ),
    "SwAV": lambda: (
        without_head()
        | under("projection_head.", mlp(512, 512, 128).state_dict())
        | {"prototypes.weight": torch.zeros(3000, 128)}
    ),
    "one projection": lambda: (
        under("backbone.", without_head()) | under("projection.", nn.Linear(512, 128).state_dict())
    ),
    "one projection that is called a head": lambda: (
        under("backbone.", without_head())
        | under("projection_head.", nn.Linear(512, 128).state_dict())
    ),
    "Barlow Twins": lambda: (
        under("backbone.", without_head())
        | {"projector.0.weight": torch.zeros(512, 512), "projector.3.weight": torch.zeros(512, 512)}
    ),
    "DINO": lambda: {
        "student": under("backbone.", without_head())
        | under("head.mlp.", mlp(512, 64, 8).state_dict())
    },
}


@pytest.mark.parametrize("kind", SELF_SUPERVISED)
def test_a_self_supervised_backbone_is_no_classifier(kind: str) -> None:
    message = refused(SELF_SUPERVISED[kind](), "resnet18")
    assert re.search(r"has (no head for|another head than) resnet18: ", message), message


def test_what_lies_beside_another_network_of_the_file_is_that_ones() -> None:
    other = under("other.", state_of(seed=1) | {"extra.weight": torch.zeros(9)})
    told = assert_found(under("model.", state_of()) | other, state_of())
    assert "taken: `model.`; not taken: `other.`" in told
    told = assert_found(state_of() | under("module.", state_of(seed=1)), state_of())
    assert "taken: the file's own tensors; not taken: `module.`" in told


def test_the_two_encoders_of_moco_are_not_guessed_between() -> None:
    both = under("module.encoder_q.", state_of()) | under("module.encoder_k.", state_of(seed=1))
    message = refused({"state_dict": both | {"queue": torch.zeros(128, 64)}})
    assert "several networks that fit" in message
    assert "`state_dict / encoder_q.`, `state_dict / encoder_k.`" in message


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_training_heads_are_dropped_whatever_their_classes(name: str, prefix: str) -> None:
    """`inception.fc = nn.Linear(2048, 5)` leaves `AuxLogits` at 1000 classes."""
    with torch.device("meta"):
        module = zoo.get_model(name, weights=None, num_classes=1000, init_weights=False)
        module.fc = nn.Linear(module.fc.in_features, 5)
    state = module.state_dict()
    assert any(key.lower().startswith("aux") for key in state)
    found, told = find(under(prefix, state), name)
    assert found.state.keys() == network(name).tensors.keys()
    assert all(found.state[key] is state[key] for key in found.state)
    assert found.num_classes == 5
    assert re.search(r"left aside \((module\.)?(aux1|AuxLogits)\.", told)


# ---- averages of the weights ---------------------------------------------------------------------

AVERAGES: dict[str, Callable[[State, State], Any]] = {
    "timm": lambda plain, mean: {"state_dict": plain, "state_dict_ema": mean, "arch": SMALL},
    "torchvision's training script": lambda plain, mean: {
        "model": plain,
        "model_ema": {"n_averaged": torch.tensor(9)} | under("module.", mean),
    },
    "ema_state_dict": lambda plain, mean: {"model_state_dict": plain, "ema_state_dict": mean},
    "ema": lambda plain, mean: {"net": plain, "ema": mean},
    "ema_model": lambda plain, mean: {
        "state_dict": under("model.", plain) | under("ema_model.", mean)
    },
    "module_ema": lambda plain, mean: under("module.", plain) | under("module_ema.", mean),
    "shadow": lambda plain, mean: {"model": plain, "ema": {"shadow": mean, "decay": 0.99}},
    "swa": lambda plain, mean: {
        "swa_model": {"n_averaged": torch.tensor(9)} | under("module.", mean),
        "model": plain,
    },
    "under any name": lambda plain, mean: {
        "state_dict": plain,
        "second": {"n_averaged": torch.tensor(9)} | under("module.", mean),
    },
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_the_weights_is_taken_and_told(kind: str) -> None:
    plain, mean = state_of(), state_of(seed=1)
    told = assert_found(AVERAGES[kind](plain, mean), mean).splitlines()
    assert ", an average of the weights; not taken: " in told[-1]
    assert_found(AVERAGES[kind](plain, dict(plain)), plain)  # the same: nothing to choose


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda state: {"model": state}, "['model']"),
        (lambda state: {"runs": [{}, {3: state}]}, "['runs'][1][3]"),
        (lambda state: {"it's": (state,)}, '["it\'s"][0]'),
    ],
)
def test_what_was_not_taken_can_be_saved_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[State], State], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = {"args": argparse.Namespace(lr=0.1), "model_ema": state_of(seed=1)}
    torch.save(wrap(state_of()) | beside, "own.pth")
    told = assert_found(read_checkpoint(OWN), state_of(seed=1)).splitlines()
    assert "taken: `model_ema`, an average of the weights; not taken: `" in told[-1]
    line = told[-1].rpartition("save the one to be used alone: ")[2]
    assert line == (
        "torch.save(torch.load('own.pth', map_location='cpu', weights_only=False)"
        f"{place}, 'one.pth')"
    )
    exec(line, {"torch": torch})
    assert_found(read_checkpoint(Path("one.pth")), state_of())


def test_an_average_that_never_began_is_not_taken() -> None:
    plain, initial = state_of(), state_of(seed=1)
    never = {"n_averaged": torch.tensor(0)} | under("module.", initial)
    told = assert_found({"model": plain, "swa_model": never}, plain)
    assert "taken: `model`; not taken: `swa_model`" in told


def test_an_average_without_names_or_without_buffers_is_told_of() -> None:
    plain = state_of()
    parameters = {key: value for key, value in state_of(seed=1).items() if "running" not in key}
    for mean in ({"shadow_params": list(parameters.values()), "decay": 0.9}, parameters):
        told = assert_found({"model": plain, "ema": mean}, plain)
        assert "not taken: `ema" in told
        assert "(which has not all tensors of the network by name)" in told
    assert "not taken" not in assert_found({"model": plain, "ema_losses": [0.1], "ema": {}}, plain)


def test_the_order_among_several_is_that_of_timms_loader() -> None:
    a, b, c, d = (state_of(seed=seed) for seed in range(4))
    assert_found({"model": a, "state_dict": b, "model_ema": c, "state_dict_ema": d}, d)
    assert_found({"model": a, "state_dict": b, "model_ema": c}, c)
    told = assert_found({"model": a, "state_dict": b}, b)
    assert "taken: `state_dict`; not taken: `model`" in told
    assert_found({"teacher": a, "model": b}, b)


@pytest.mark.parametrize(
    "names", [("student", "teacher"), ("ema_0.99", "ema_0.999"), ("model_a", "model_b")]
)
def test_several_networks_of_unknown_names_are_refused(names: tuple[str, str]) -> None:
    first, second = names
    message = refused({first: state_of(), second: state_of(seed=1)})
    assert (
        f"holds several networks that fit {SMALL}: `{first}`, `{second}`; save the one" in message
    )
    assert f"weights_only=False)['{first}'], 'one.pth')" in message
    assert_found({first: state_of(), second: dict(state_of())}, state_of())


# ---- what is beside the tensors in a file --------------------------------------------------------


@pytest.fixture
def other_packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Classes of packages that are not here where the file is read."""
    made = {}
    for module, name, base in (
        ("lightning.fabric.utilities.data", "AttributeDict", dict),
        ("omegaconf.dictconfig", "DictConfig", object),
    ):
        for parent in itertools.accumulate(module.split("."), "{}.{}".format):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        made[name] = type(name, (base,), {"__module__": module})
        setattr(sys.modules[module], name, made[name])
    return made


def settings_of_a_trainer(others: dict[str, Any]) -> dict[str, Any]:
    config = others["DictConfig"]()
    config.content = {"lr": 0.1}
    history = defaultdict(list)
    history["loss"].append(0.1)
    return {
        "args": argparse.Namespace(lr=0.1, output_dir=pathlib.Path("runs"), world_size=1),
        "best_acc1": np.float64(71.5),
        "acc": np.float32(0.7),
        "epoch": np.int64(3),
        "is_best": np.bool_(True),
        "confusion": np.zeros((2, 2)),
        "when": datetime.datetime(2026, 11, 28),
        "criterion": nn.CrossEntropyLoss(weight=torch.ones(5)),
        "hyper_parameters": others["AttributeDict"](
            optimizer=functools.partial(torch.optim.SGD, lr=0.1)
        ),
        "norm_layer": nn.BatchNorm2d,
        "config": config,
        "history": history,
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_settings_and_figures_beside_the_tensors_are_left_unread(
    tmp_path: Path, other_packages: dict[str, Any], legacy: bool
) -> None:
    state = state_of()
    known = set(torch.serialization.get_safe_globals())
    beside = settings_of_a_trainer(other_packages)
    if legacy:  # a module's class comes with its source code there
        del beside["criterion"], beside["norm_layer"]
    path = tmp_path / "checkpoint.pth"
    for extra in ({key: value} for key, value in beside.items()):
        torch.save({"model": {"x": 1}} | extra, path, _use_new_zipfile_serialization=not legacy)
        assert read_checkpoint(path)["model"] == {"x": 1}
    saved = OrderedDict(model=OrderedDict(under("module.", state)), **beside)
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    sys.modules.pop("omegaconf.dictconfig")  # not needed to read it
    assert_found(read_checkpoint(path), state)
    assert set(torch.serialization.get_safe_globals()) == known


def test_settings_do_not_let_code_in(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (f"open({str(mark)!r}, 'w')",)

    for value in (Evil(), {"args": argparse.Namespace(x=Evil())}):
        torch.save({"model": state_of(), "args": value}, tmp_path / "own.pth")
        with pytest.raises(ModelError, match=r"more than tensors \(builtins\.exec\), which"):
            read_checkpoint(tmp_path / "own.pth")
    assert not mark.exists()


# ---- files of other kinds ------------------------------------------------------------------------


def whole(path: Path, wrap: Callable[[Any], Any] = lambda model: model, **options: Any) -> None:
    torch.save(wrap(zoo.squeezenet1_1(num_classes=2)), path, **options)


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/model.pth", b"x" * 100)


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "model.pth")


SAVED = r"torch\.save\(model\.state_dict\(\), 'own_state\.pth'\)"
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "whole model": (
        whole,
        r"whole pickled model \(torchvision\.models\.squeezenet\.SqueezeNet\).*\n    import torch\n"
        rf"    model = torch\.load\('own\.pth', .*weights_only=False\).*\n    {SAVED}$",
    ),
    "whole model, legacy": (
        lambda path: whole(path, _use_new_zipfile_serialization=False),
        rf"whole pickled model \(torchvision[\s\S]*{SAVED}$",
    ),
    "whole model in a wrapper": (
        lambda path: whole(path, lambda model: {"epoch": 3, "model": nn.DataParallel(model)}),
        rf"whole pickled model \(torch\.nn\.parallel[\s\S]*{SAVED}$",
    ),
    "TorchScript": (
        torchscript,
        rf"TorchScript archive.*\n    import torch\n    model = torch\.jit\.load\([\s\S]*{SAVED}$",
    ),
    "torch.export": (exported, rf"program of torch\.export[\s\S]*{SAVED}$"),
    "Git LFS": (
        lambda path: path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 44\n"
        ),
        r"is a Git LFS pointer, not the weights themselves: `git lfs pull`",
    ),
    "HTML": (
        lambda path: path.write_text("\n<!DOCTYPE html>\n<html><head></head></html>"),
        r"is an HTML page, not weights: .*download the file itself",
    ),
    "zip": (zipped, r"a zip archive, but not of PyTorch \(it holds weights/model\.pth\)"),
    "npz": (arrays, r"not of PyTorch .*a\.npy"),
    "tar": (tarred, r"is a tar archive; unpack it"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" * 9), r"compressed with gzip: unpack"),
    "Keras": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" * 9), r"an HDF5 file, as Keras"),
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": (
        lambda path: path.write_text("0.1 0.2 0.3\n"),
        r"damaged or no|cannot be read as tensors alone",
    ),
    "numbers": (
        lambda path: path.write_bytes(bytes(range(256)) * 9),
        r"damaged or no|cannot be read as tensors alone",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_another_kind_is_named_with_what_to_do(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    write, message = KINDS[kind]
    write(tmp_path / "own.pth")
    path = tmp_path / "own.pth"
    path = path.rename(path.with_suffix(suffix))
    with pytest.raises(ModelError, match=message.replace("own\\.pth", f"own\\{suffix}")) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"model.weights: {path}: ")
    for torchs_own in (
        "\x1b",
        "Weights only load",
        "add_safe_globals",
        "re-running",
        "Please file an issue",
    ):
        assert torchs_own not in str(caught.value)


def test_a_file_of_arrays_is_told_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    arrays: State = {f"layer{index}": np.zeros((2, 2)) for index in range(3)}
    arrays["count"] = np.array(3)
    torch.save({"model": arrays, "args": argparse.Namespace(), "epoch": 3}, path)
    message = refused(read_checkpoint(path))
    assert "4 of ndarray (layer0, layer1, layer2, ...), 1 of Namespace (args), 1 of int" in message
    assert message.startswith("model.weights: own.pth: holds no tensors, but ")
    line = message.rpartition("save tensors: ")[2]
    exec(line.replace("'tensors.pth'", "path"), {"torch": torch, "arrays": arrays, "path": path})
    assert read_checkpoint(path).keys() == arrays.keys()
    torch.save(np.zeros(3), path)
    assert "holds a ndarray, not a state dict" in refused(read_checkpoint(path))


@pytest.mark.parametrize(
    "name", ["own.ckpt", "own.pth.tar", "own.pt", "own.bin", "own", "own.safetensors", "model_best"]
)
@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_a_file_is_told_by_its_content_whatever_its_name(
    tmp_path: Path, name: str, kind: str
) -> None:
    state = state_of()
    (torch.save if kind == "pickle" else safetensors.save_file)(state, tmp_path / name)
    assert_found(read_checkpoint(tmp_path / name), state)


# ---- transform_input -----------------------------------------------------------------------------


@pytest.fixture
def googlenet(tmp_path: Path) -> Path:
    with torch.device("meta"):
        meta = zoo.googlenet(weights=None, num_classes=5, aux_logits=False, init_weights=False)
    state = meta.to_empty(device="cpu").state_dict()
    for value in state.values():
        value.zero_()
    torch.save(state, tmp_path / "googlenet.pth")
    return tmp_path / "googlenet.pth"


def test_whether_googlenet_normalises_once_more_is_asked_where_it_cannot_be_known(
    googlenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given_, expected in ((None, True), (True, True), (False, False)):
        told: list[str] = []
        spec = ModelSpec(name="googlenet", weights=str(googlenet), transform_input=given_)
        model = torchvision.build(spec, told.append)
        assert getattr(model.module, "transform_input") is expected  # noqa: B009
        asked = [line for line in told if "write `transform_input: false` under model" in line]
        assert len(asked) == (given_ is None)
    (url,) = {member.url for member in zoo.GoogLeNet_Weights}
    monkeypatch.setattr(
        torchvision,
        "sha256_of",
        lambda path: url.rpartition("-")[2].removesuffix(".pth") + "0" * 56,
    )
    torchvision.check(ModelSpec(name="googlenet", weights=str(googlenet)))
    told = []
    torchvision.build(ModelSpec(name="googlenet", weights=str(googlenet)), told.append)
    assert told == []


@pytest.mark.parametrize("weights", ["DEFAULT", "none", "own.pth"])
@pytest.mark.parametrize("ask", [torchvision.build, torchvision.check])
def test_transform_input_is_refused_for_models_that_have_none(
    tmp_path: Path, weights: str, ask: Callable[[ModelSpec], object]
) -> None:
    torch.save(state_of(), tmp_path / "own.pth")
    weights = str(tmp_path / weights) if weights == "own.pth" else weights
    spec = ModelSpec(name=SMALL, weights=weights, transform_input=True)
    with pytest.raises(ModelError, match=f"transform_input: found True, but {SMALL} has no such"):
        ask(spec)


@pytest.mark.parametrize("name", WITH_TRAINING_HEADS)
@pytest.mark.parametrize("ask", [torchvision.build, torchvision.check])
def test_pretrained_weights_are_refused_with_another_transform_input(
    name: str, ask: Callable[[ModelSpec], object]
) -> None:
    spec = ModelSpec(name=name, transform_input=False)
    with pytest.raises(
        ModelError, match=r"transform_input: found False, but \w+\.IMAGENET1K_V1 was trained with"
    ):
        ask(spec)
    for given_ in (None, True):
        torchvision.check(spec.model_copy(update={"transform_input": given_}))


def test_what_a_run_refuses_of_classes_without_a_file_is_refused_before_it() -> None:
    spec = ModelSpec(name=SMALL, weights="none", num_classes=1)
    with pytest.raises(ModelError, match="gives one number per image"):
        torchvision.check(spec)
    torchvision.check(spec.model_copy(update={"activation": "sigmoid"}))
    with pytest.raises(ModelError, match=r"num_classes: found 5, but \S+ has 1000"):
        torchvision.check(ModelSpec(name=SMALL, num_classes=5))


# ---- whole runs ----------------------------------------------------------------------------------


@functools.cache
def digits() -> State:
    state: State = safetensors.load_file(DIGITS_MODEL["weights"])
    return state


def one_output(state: State) -> State:
    """What is left of ten digits if only the 3 and the 7 are told apart, by one number."""
    return state | {
        "fc.weight": (state["fc.weight"][7] - state["fc.weight"][3])[None],
        "fc.bias": (state["fc.bias"][7] - state["fc.bias"][3])[None],
    }


def logits_by_hand(state: State) -> dict[str, Any]:
    """Each sample's logits in PyTorch, with torchvision's own transforms."""
    module = zoo.get_model(SMALL, weights=None, num_classes=len(state["fc.bias"])).eval()
    module.load_state_dict(state)
    preset = transforms.ImageClassification(
        crop_size=64, resize_size=64, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    logits = {}
    for path in sorted(SOME_DIGITS.iterdir()):
        with Image.open(path) as image, torch.inference_mode():
            logits[path.name] = module(preset(image.convert("RGB"))[None])[0]
    return logits


def run(folder: Path, **model: Any) -> tuple[dict[str, Any], str]:
    """Each image's scores by label, and what was told."""
    keys = {key: value for key, value in DIGITS_MODEL.items() if key != "labels"}
    log = Log()
    job = write_job(folder, model={**keys, **model}, top_k=10, batch_size=3, input=str(SOME_DIGITS))
    run_here(job, log=log)
    records = map(json.loads, (folder / "out" / "predictions.jsonl").read_text().splitlines())
    return {
        record["path"]: {one["label"]: one["score"] for one in record["predictions"]}
        for record in records
    }, "\n".join(log.lines)


def test_one_output_with_a_sigmoid_is_two_classes(tmp_path: Path) -> None:
    """Trained with BCEWithLogitsLoss; in torchvision's training script's wrapping."""
    plain = {key: torch.zeros_like(value) for key, value in one_output(digits()).items()}
    average = {"n_averaged": torch.tensor(9)} | under("module.", one_output(digits()))
    args = argparse.Namespace(model=SMALL, output_dir=pathlib.Path("runs"))
    saved = {"model": plain, "model_ema": average, "args": args, "acc": np.float64(0.9)}
    torch.save(saved, tmp_path / "bce.ckpt")
    scores, told = run(tmp_path, weights="bce.ckpt", activation="sigmoid")
    assert "taken: `model_ema`, an average of the weights; not taken: `model`" in told
    for path, (logit,) in logits_by_hand(one_output(digits())).items():
        score = float(torch.sigmoid(logit))
        assert scores[path] == pytest.approx({"0": 1 - score, "1": score}, abs=1e-4)


def test_labels_that_do_not_exclude_each_other_have_a_sigmoid_each(tmp_path: Path) -> None:
    torch.save({"net": under("backbone.", digits())}, tmp_path / "labels.pth.tar")
    scores, _ = run(tmp_path, weights="labels.pth.tar", activation="sigmoid")
    for path, logits in logits_by_hand(digits()).items():
        expected = {str(index): score for index, score in enumerate(torch.sigmoid(logits).tolist())}
        assert scores[path] == pytest.approx(expected, abs=1e-4)


def test_a_regression_head_is_refused(batchclf: Batchclf, tmp_path: Path) -> None:
    torch.save(one_output(digits()), tmp_path / "regression.pt")
    model = {**DIGITS_MODEL, "weights": "regression.pt", "labels": None}
    done = batchclf("run", write_job(tmp_path, model=model))
    assert done.exit_code == 2, done.stderr
    assert "gives one number per image, whose softmax is always 1; say with" in done.stderr
    assert "Traceback" not in done.stderr
    spec = ModelSpec(name=SMALL, weights=str(tmp_path / "regression.pt"))
    with pytest.raises(ModelError, match="gives one number per image"):
        torchvision.check(spec)
    torchvision.check(spec.model_copy(update={"activation": "none"}))


def test_the_lines_that_save_a_whole_models_weights_give_a_file_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole(tmp_path / "own.pth")
    with pytest.raises(ModelError) as caught:
        read_checkpoint(tmp_path / "own.pth")
    exec("\n".join(map(str.strip, str(caught.value).splitlines()[1:])), {})
    found, _ = find(read_checkpoint(tmp_path / "own_state.pth"), "squeezenet1_1")
    assert found.num_classes == 2


def test_real_weights_are_the_same_in_every_wrapping(tmp_path: Path) -> None:
    state = read_checkpoint(data(MOBILENET_WEIGHTS))
    wrapped = {
        "state_dict": {
            f"model._orig_mod.{key.replace('classifier.1.', 'classifier.')}": value
            for key, value in state.items()
        },
        "hyper_parameters": argparse.Namespace(lr=0.1),
    }
    torch.save(wrapped, tmp_path / "last.ckpt")
    found, told = find(read_checkpoint(tmp_path / "last.ckpt"), "mobilenet_v2")
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[key], state[key]) for key in state)
    assert f"{len(state)} of them renamed" in told
