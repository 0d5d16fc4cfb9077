"""Weights: from files in every usual wrapping, from torchvision's server, or refused with a reason.

Array shapes: N images of a batch, H rows, W columns, C = 3 (RGB), K classes.
"""

import gc
import hashlib
import os
import pickle
import socket
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchclf.errors import ModelError, WeightsUnavailable
from batchclf.models.resolve import resolve_model
from batchclf.runtime.classifier import open_reference
from batchclf.spec.job import ModelSpec
from tests.conftest import BY_HAND, DATA, DIGITS_MODEL, MOBILENET_WEIGHTS, Batchclf, data, write_job
from tests.engines.common import fault, finished, started
from tests.models.loopback import Answer, Request, serving

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
zoo = pytest.importorskip("torchvision.models")

from batchclf.models.export import BuiltModel  # noqa: E402
from batchclf.models.zoo import torchvision  # noqa: E402

SQUEEZENET_WEIGHTS = DATA / "weights" / "squeezenet1_1_from_winml_fp16.pth"
BROKEN = DATA / "weights" / "broken"
SMALL = "shufflenet_v2_x0_5"

State = dict[str, Any]


def build(name: str, path: Path, num_classes: int | None = None) -> BuiltModel:
    return named(name, str(path), num_classes)


def digits_state() -> State:
    state: State = safetensors.load_file(DIGITS_MODEL["weights"])
    return state


def assert_same_state(model: BuiltModel, state: State, *, atol: float = 0) -> None:
    own = model.module.state_dict()
    assert own.keys() == state.keys()
    for key, value in own.items():
        torch.testing.assert_close(value.float(), state[key].float(), rtol=0, atol=atol)
    assert all(value.dtype in (torch.float32, torch.int64) for value in own.values())
    assert not model.module.training


# ---- files that fit ------------------------------------------------------------------------------

WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 90, "state_dict": state, "arch": SMALL},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.1},
    "torchvision's reference script": lambda state: {"model": state, "epoch": 3, "args": None},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "Lightning": lambda state: {
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "hyper_parameters": {"lr": 0.1},
    },
    "DataParallel of torch.compile": lambda state: {
        "state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_state_dict_is_found_in_what_trainers_put_around_it(
    tmp_path: Path, wrapping: str, legacy: bool
) -> None:
    state = digits_state()
    path = tmp_path / "own.pth"
    torch.save(WRAPPINGS[wrapping](state), path, _use_new_zipfile_serialization=not legacy)
    model = build(SMALL, path)
    assert_same_state(model, state)
    assert len(model.labels) == 10


def test_safetensors_and_pth_give_the_same_model(tmp_path: Path) -> None:
    state = digits_state()
    assert_same_state(build(SMALL, Path(DIGITS_MODEL["weights"])), state)
    torch.save(state, tmp_path / "own.pth")
    assert_same_state(build(SMALL, tmp_path / "own.pth"), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_tensors_of_another_type_are_computed_with_as_float32(
    tmp_path: Path, suffix: str, kind: str
) -> None:
    cast = {
        key: value.to(getattr(torch, kind)) if value.is_floating_point() else value
        for key, value in digits_state().items()
    }
    path = tmp_path / f"own{suffix}"
    (safetensors.save_file if suffix == ".safetensors" else torch.save)(cast, path)
    assert_same_state(build(SMALL, path), cast, atol=1e-4 if kind == "float64" else 0)


def test_weights_that_were_saved_on_a_gpu_or_with_gradients_are_read(tmp_path: Path) -> None:
    state = {
        key: torch.nn.Parameter(value) if value.is_floating_point() else value
        for key, value in digits_state().items()
    }
    torch.save(state, tmp_path / "own.pth")
    assert_same_state(build(SMALL, tmp_path / "own.pth"), digits_state())


FAMILIES = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "wide_resnet50_2",
)
LARGE = (
    "alexnet",
    "convnext_tiny",
    "efficientnet_v2_s",
    "inception_v3",
    "maxvit_t",
    "resnext50_32x4d",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
    "wide_resnet50_2",
)
ONLY_IN_CI = pytest.mark.skipif(
    not os.environ.get("CI"), reason="a minute in all: set CI=1 to read a large file per family"
)
NEEDS_QUIET_START = {"googlenet", "inception_v3"}


def random_state(name: str, num_classes: int) -> State:
    """A state dict of random weights, as a fine-tuning script saves it."""
    options = {"init_weights": False} if name in NEEDS_QUIET_START else {}
    if name.startswith("regnet"):  # computes its widths with tensors, so not on `meta`
        module = zoo.get_model(name, weights=None, num_classes=num_classes)
    else:
        with torch.device("meta"):
            meta = zoo.get_model(name, weights=None, num_classes=num_classes, **options)
        module = meta.to_empty(device="cpu")
    state: State = module.state_dict()
    for value in state.values():
        value.copy_(torch.rand(value.shape) if value.is_floating_point() else value.zero_())
    return state


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("mnasnet0_5", ".safetensors"),
        ("swin_t", ".safetensors"),
        *(
            pytest.param(name, ".pth", marks=ONLY_IN_CI if name in LARGE else ())
            for name in FAMILIES
        ),
    ],
)
def test_a_fine_tuned_head_of_7_classes_is_told_from_the_file(
    tmp_path: Path, name: str, suffix: str
) -> None:
    path = tmp_path / f"own{suffix}"
    state = random_state(name, 7)
    (safetensors.save_file if suffix == ".safetensors" else torch.save)(state, path)
    model = build(name, path)
    path.unlink()
    assert model.labels == tuple("0123456")
    found = {
        key: value for key, value in model.module.state_dict().items() if "attn_mask" not in key
    }
    for key, value in found.items():
        assert torch.equal(value, state[key]), key


def test_densenet_weights_with_the_names_of_torchvisions_own_file_are_read(tmp_path: Path) -> None:
    """densenet121-a639ec97.pth says `denselayer1.norm.1.weight`; torchvision renames it."""
    state = random_state("densenet121", 7)
    old = {}
    for key, value in state.items():
        if "num_batches" in key:
            continue  # it is that old
        for part in ("norm", "conv"):
            for number in "12":
                if "denselayer" in key:
                    key = key.replace(f".{part}{number}.", f".{part}.{number}.")
        old[key] = value
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "densenet121.pth")
    assert_same_state(build("densenet121", tmp_path / "densenet121.pth"), state)


def test_batch_normalisation_saved_before_it_counted_batches_is_read(tmp_path: Path) -> None:
    state = {key: value for key, value in digits_state().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "own.pth")
    build(SMALL, tmp_path / "own.pth")


@pytest.mark.parametrize("has_aux", [True, False])
def test_googlenet_is_read_with_and_without_its_training_heads(
    tmp_path: Path, has_aux: bool
) -> None:
    state = random_state("googlenet", 7)
    if not has_aux:
        state = {key: value for key, value in state.items() if not key.startswith("aux")}
    torch.save(state, tmp_path / "own.pth")
    model = build("googlenet", tmp_path / "own.pth")
    assert len(model.labels) == 7
    assert getattr(model.module, "transform_input") is True  # noqa: B009


@pytest.mark.parametrize(
    ("name", "path"), [("mobilenet_v2", MOBILENET_WEIGHTS), ("squeezenet1_1", SQUEEZENET_WEIGHTS)]
)
def test_real_imagenet_weights_know_a_cat(name: str, path: Path) -> None:
    from PIL import Image

    from tests.conftest import ROOT

    model = build(name, data(path))
    assert len(model.labels) == 1000
    with Image.open(ROOT / "samples" / "photos" / "cat.jpg") as image:
        pixels_NCHW = zoo.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()(image)[None]
    with torch.inference_mode():
        index = int(model.module(pixels_NCHW).argmax())
    assert index in range(281, 286), "no domestic cat"


def test_the_random_weights_of_none_are_the_same_every_time() -> None:
    before = torch.random.get_rng_state()
    first, second = (named(SMALL, num_classes=3).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(before, torch.random.get_rng_state())


# ---- files that do not fit -----------------------------------------------------------------------


def test_another_number_of_classes_than_the_file_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"num_classes: found 12, but the head in .* has 10"):
        build(SMALL, Path(DIGITS_MODEL["weights"]), num_classes=12)
    assert len(build(SMALL, Path(DIGITS_MODEL["weights"]), num_classes=10).labels) == 10


@pytest.mark.parametrize(
    "name", ["resnet18", "shufflenet_v2_x1_0", "mobilenet_v3_small", "vit_b_32"]
)
def test_a_checkpoint_of_another_architecture_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"does not fit {name}: tensors .*another model\?"):
        build(name, Path(DIGITS_MODEL["weights"]))


def test_a_checkpoint_with_a_tensor_missing_or_too_many_is_refused_by_name(tmp_path: Path) -> None:
    state = digits_state()
    del state["conv5.0.weight"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "own.pth")
    with pytest.raises(
        ModelError, match=r"1 missing \(conv5\.0\.weight\); 1 unknown \(extra\.weight\)"
    ):
        build(SMALL, tmp_path / "own.pth")


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "inside"])
def test_code_in_a_weights_file_is_not_run(tmp_path: Path, how: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "own.pth"
    evil = Evil(mark)
    if how == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif how == "inside":
        torch.save(digits_state() | {"note": evil}, path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ModelError, match=r"could run code .*save `model\.state_dict\(\)`"):
        build(SMALL, path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
@pytest.mark.parametrize("version", ["2.5.1+cu121", "2.9.1"])
def test_a_torch_that_may_run_code_for_all_it_says_reads_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, suffix: str
) -> None:
    path = tmp_path / f"own.{suffix}"
    torch.save(digits_state(), path)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(
        ModelError, match=r"give a \.safetensors file, or pip install 'torch>=2.10'"
    ):
        build(SMALL, path)
    with pytest.raises(ModelError, match=r"weights ResNet18_Weights\.IMAGENET1K_V1: torch"):
        named("resnet18", "DEFAULT")
    assert build(SMALL, Path(DIGITS_MODEL["weights"])).labels


def test_a_whole_pickled_module_is_refused_with_what_to_save_instead(tmp_path: Path) -> None:
    torch.save(zoo.squeezenet1_1(num_classes=2), tmp_path / "own.pth")
    with pytest.raises(ModelError, match=r"torch\.save\(model\.state_dict\(\), 'own_state\.pth'\)"):
        build("squeezenet1_1", tmp_path / "own.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 7, 100, 5000, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"own{suffix}"
    (safetensors.save_file if suffix == ".safetensors" else torch.save)(digits_state(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    with pytest.raises(ModelError, match=rf"model\.weights: .*own\{suffix}: ") as caught:
        build(SMALL, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet18", "Peterwagiuh_resnet18-f37072fd.pth"),
        ("resnet50", "deepwilson_resnet50-19c8e357.pth"),
        ("resnet18", "hrli1997_resnet18-5c106cde.pth"),
    ],
)
def test_broken_downloads_that_people_published_are_refused(name: str, file: str) -> None:
    path = data(BROKEN / file)
    with pytest.raises(ModelError) as caught:
        build(name, path)
    assert str(caught.value).startswith(f"model.weights: {path}: ")


def test_a_run_with_a_broken_download_ends_with_2(batchclf: Batchclf, tmp_path: Path) -> None:
    path = data(BROKEN / "Peterwagiuh_resnet18-f37072fd.pth")
    job = write_job(tmp_path, model={"name": "resnet18", "weights": str(path)})
    done = batchclf("run", job, "--json")
    assert done.exit_code == 2, done.stderr
    assert done.json["error"].startswith(f"model.weights: {path}: ")
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html>\n<html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x89PNG\r\n"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"own{suffix}"
    path.write_bytes(content * 10)
    with pytest.raises(ModelError, match=r"model\.weights"):
        build(SMALL, path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds a dict, not a state dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        (torch.zeros(3), "holds a Tensor"),
    ],
    ids=["list", "empty", "no tensors", "empty state_dict", "tensor"],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, saved: Any, message: str) -> None:
    torch.save(saved, tmp_path / "own.pth")
    with pytest.raises(ModelError, match=message):
        build(SMALL, tmp_path / "own.pth")


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ModelError, match=r"model\.weights: .*"):
            build(SMALL, path)


# ---- names ---------------------------------------------------------------------------------------


def named(name: str, weights: str = "none", num_classes: int | None = None) -> BuiltModel:
    return torchvision.build(ModelSpec(name=name, weights=weights, num_classes=num_classes))


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet51", "resnet5"), ("mobilenetv2", "mobilenet_v2"), ("ResNet50", "resnet50")],
)
def test_an_unknown_model_is_refused_with_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(
        ModelError, match=rf"no classification model '{name}'; did you mean .*{near}"
    ):
        named(name)


@pytest.mark.parametrize("name", ["fcn_resnet50", "raft_small", "zzz", "quantized_resnet18"])
def test_a_model_that_is_no_classifier_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"model\.name: torchvision has no classification model"):
        named(name)


@pytest.mark.parametrize(
    ("weights", "near"),
    [
        ("IMAGENET1K_V3", "did you mean IMAGENET1K_V"),
        ("imagenet1k_v2", "did you mean IMAGENET1K_V2"),
        ("default", "did you mean DEFAULT"),
        ("MobileNet_V2_Weights.IMAGENET1K_V1", "Known are DEFAULT"),
    ],
)
def test_unknown_weights_are_refused_with_those_there_are(weights: str, near: str) -> None:
    with pytest.raises(ModelError, match=f"resnet50 has no weights '{weights}'.*{near}") as caught:
        named("resnet50", weights)
    assert "IMAGENET1K_V1, IMAGENET1K_V2" in str(caught.value)


def test_a_number_of_classes_goes_with_no_named_weights() -> None:
    with pytest.raises(ModelError, match=r"num_classes: found 10, but ResNet18_Weights.* has 1000"):
        named("resnet18", "DEFAULT", num_classes=10)


# ---- the download --------------------------------------------------------------------------------


def sending(
    body: bytes, kind: str = "application/octet-stream", length: int | None = None
) -> Answer:
    def answer(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        request.wfile.write(body)

    return answer


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty folders for downloads and bundles, and no proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("BATCHCLF_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield tmp_path / "torch"
    with warnings.catch_warnings():  # torch.hub leaves the connection of a failed download open
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def resolve_named(monkeypatch: pytest.MonkeyPatch, name: str, url: str) -> Any:
    """The model's DEFAULT weights, as if torchvision had them at `url`."""
    member = zoo.get_model_weights(name).DEFAULT
    changed = type(member.value)(url=url, transforms=member.transforms, meta=member.meta)
    monkeypatch.setattr(member, "_value_", changed)
    return resolve_model(
        ModelSpec.model_validate({"name": name}),
        batch_size=2,
        open_reference=open_reference,
        log=lambda text: None,
    )


def files_under(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def weights_file() -> tuple[bytes, str]:
    """MobileNetV2's weights, and the name under which their hash is checked."""
    body = data(MOBILENET_WEIGHTS).read_bytes()
    return body, f"mobilenet_v2-{hashlib.sha256(body).hexdigest()[:8]}.pth"


def test_weights_are_downloaded_once_and_checked(
    torch_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body, name = weights_file()
    with serving(sending(body)) as (url, asked):
        model = resolve_named(monkeypatch, "mobilenet_v2", f"{url}/{name}")
        again = resolve_named(monkeypatch, "mobilenet_v2", f"{url}/{name}")
    assert asked == [f"GET /{name}"]
    assert again == model
    assert files_under(torch_home) == [name]
    assert model.labels[281] == "tabby"
    assert capsys.readouterr().out == "", "stdout is for results"
    pixels_NHWC = np.zeros((2, 224, 224, 3), np.uint8)
    assert open_reference(model.bundle.model_path)(pixels_NHWC).shape == (2, 1000)


def close_at_once(request: Request) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)


def not_found(request: Request) -> None:
    request.send_error(404)


def no_http(request: Request) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def chunks_that_stop(request: Request) -> None:
    request.protocol_version = "HTTP/1.1"
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"1000\r\n" + b"x" * 100)


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # as torch_home says
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(sending(b"<html>Log in</html>", "text/html"), "wrong hash", id="web page"),
        pytest.param(sending(b"PK" * 5000, length=14_000_000), "", id="connection cut"),
        pytest.param(not_found, "Not Found", id="404"),
        pytest.param(close_at_once, "", id="closed at once"),
        pytest.param(no_http, "", id="no HTTP"),
        pytest.param(chunks_that_stop, "", id="chunks that stop"),
    ],
)
def test_a_failed_download_says_what_failed_and_leaves_nothing(
    torch_home: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, reason: str
) -> None:
    with (
        serving(answer) as (url, _),
        pytest.raises(WeightsUnavailable, match=reason or None) as caught,
    ):
        resolve_named(monkeypatch, "mobilenet_v2", f"{url}/mobilenet_v2-b0353104.pth")
    assert caught.value.exit_code == 5
    assert f"{url}/mobilenet_v2-b0353104.pth" in str(caught.value)
    assert str(torch_home) in str(caught.value)
    assert files_under(torch_home.parent) == []


def test_a_refused_connection_says_so_and_leaves_nothing(
    torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsUnavailable, match="Connection refused") as caught:
        resolve_named(monkeypatch, "resnet18", f"http://127.0.0.1:{closed_port()}/r-f37072fd.pth")
    assert "MobileNet" not in str(caught.value)
    assert files_under(torch_home.parent) == []


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_damaged_earlier_download_is_exit_5_and_the_file_is_named(
    torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.hub takes a file that is there as it is."""
    path = torch_home / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(data(BROKEN / "Peterwagiuh_resnet18-f37072fd.pth").read_bytes())
    with pytest.raises(WeightsUnavailable) as caught:
        resolve_named(monkeypatch, "resnet18", "http://127.0.0.1:1/resnet18-f37072fd.pth")
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:Falling back to the old format:FutureWarning")
@pytest.mark.parametrize("kind", ["file", "zip in torchvision's old way"])
@pytest.mark.parametrize("is_known", [True, False], ids=["right hash", "wrong hash"])
def test_code_in_an_earlier_download_is_not_run(
    tmp_path: Path,
    torch_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_known: bool,
    kind: str,
) -> None:
    """torchvision's own builders would: torch.hub neither hashes it nor asks for tensors only."""
    mark, made = tmp_path / "mark", tmp_path / "made.pth"
    torch.save({"weight": Evil(mark)}, made)
    if kind != "file":
        with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
            archive.write(made, "resnet18.pth")
        made = tmp_path / "made.zip"
    digest = hashlib.sha256(made.read_bytes()).hexdigest()[:8] if is_known else "f37072fd"
    path = torch_home / "hub" / "checkpoints" / f"resnet18-{digest}.pth"
    path.parent.mkdir(parents=True)
    made.rename(path)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    with pytest.raises(WeightsUnavailable) as caught:
        resolve_named(monkeypatch, "resnet18", f"http://127.0.0.1:1/{path.name}")
    assert str(path) in str(caught.value)
    assert ("wrong hash" in str(caught.value)) is not is_known
    assert not mark.exists()
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0"


def test_a_torch_home_that_cannot_be_written_is_exit_5(
    tmp_path: Path, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_home.write_text("a file")
    with pytest.raises(WeightsUnavailable, match="cannot be loaded"):
        resolve_named(monkeypatch, "resnet18", "http://127.0.0.1:1/resnet18-f37072fd.pth")


def test_without_a_network_a_run_ends_at_once_with_5(batchclf: Batchclf, tmp_path: Path) -> None:
    proxy = f"http://127.0.0.1:{closed_port()}"
    job = write_job(tmp_path, model={"name": "resnet18"})
    done = batchclf(
        "run",
        job,
        "--json",
        env={
            "https_proxy": proxy,
            "HTTPS_PROXY": proxy,
            "no_proxy": "",
            "TORCH_HOME": str(tmp_path / "torch"),
            "BATCHCLF_CACHE_DIR": str(tmp_path / "cache"),
        },
    )
    assert done.exit_code == 5
    assert "weights ResNet18_Weights.IMAGENET1K_V1 cannot be downloaded" in done.stderr
    assert "https://download.pytorch.org/models/resnet18" in done.stderr
    assert "Check the network and the proxy" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1, "stdout is for the one JSON object"
    assert done.json["exit_code"] == 5
    assert files_under(tmp_path / "torch") == files_under(tmp_path / "cache") == []


# ---- downloads that stall, or take long ----------------------------------------------------------

FROM_HERE = """
def change(module):
    import batchclf.models.download
    batchclf.models.download.TIMEOUT_S = 4.0
    member = module.zoo.MobileNet_V2_Weights.DEFAULT
    value = member.value
    member._value_ = type(value)(url={url!r}, transforms=value.transforms, meta=value.meta)
"""


def slow_job(folder: Path, url: str) -> tuple[Path, dict[str, str]]:
    """A job with less patience than its download from `url` needs, and its environment."""
    folder.mkdir(exist_ok=True)
    environment = {
        **fault(folder, FROM_HERE.format(url=url), "batchclf.models.zoo.torchvision"),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "*"),
        "TORCH_HOME": str(folder / "torch"),
        "BATCHCLF_CACHE_DIR": str(folder / "cache"),
    }
    return write_job(folder, model={"name": "mobilenet_v2"}, stall_timeout=2), environment


@pytest.mark.parametrize("begun", [False, True], ids=["never answers", "stops in the middle"])
def test_a_download_that_stalls_is_given_up_in_time(tmp_path: Path, begun: bool) -> None:
    is_over = threading.Event()

    def stall(request: Request) -> None:
        if begun:
            sending(bytes(1_000_000), length=14_000_000)(request)
        is_over.wait()

    with serving(stall) as (url, asked):
        try:
            job, environment = slow_job(tmp_path / "one", f"{url}/mobilenet_v2-b0353104.pth")
            exit_code, said = finished(job, env=environment)
        finally:
            is_over.set()
    assert exit_code == 5, said
    assert len(asked) == 1, "one process asked once"
    assert "cannot be downloaded: no byte came for 4 s" in said
    assert "Check the network and the proxy" in said
    assert "no progress" not in said
    assert files_under(tmp_path / "one" / "torch") == files_under(tmp_path / "one" / "cache") == []


@BY_HAND
def test_a_download_and_a_wait_for_it_may_take_longer_than_a_stall(tmp_path: Path) -> None:
    body, name = weights_file()

    def trickle(request: Request) -> None:
        sending(body[:100], length=len(body))(request)
        for first in range(100, 1000, 100):
            time.sleep(1)
            request.wfile.write(body[first : first + 100])
        request.wfile.write(body[1000:])

    with serving(trickle) as (url, asked):
        job, environment = slow_job(tmp_path / "one", f"{url}/{name}")
        with started(job, "--limit", "2", env=environment) as first:
            first.wait_to_say("downloading")
            other = ("--limit", "2", "-o", str(tmp_path / "other"))
            with started(job, *other, env=environment) as second:
                second.wait_to_say("another process is building this model")
                assert first.end(300) == 0, first.stderr
                assert second.end(300) == 0, second.stderr
    assert len(asked) == 1
    assert "no progress" not in first.stderr + second.stderr
