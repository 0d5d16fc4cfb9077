"""What OpenVINO's provider is told: our settings, with the user's in their place."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from batchclf.errors import ProviderError, UsageError
from batchclf.results.records import Precision
from batchclf.runtime.openvino import device_names, provider_options, require_cpu_precision


def options(
    device_type: str = "CPU",
    precision: Precision = "fp32",
    user: Mapping[str, str] = MappingProxyType({}),
    *,
    cache: Path | None = Path("compiled"),
) -> tuple[dict[str, str], dict[str, Any]]:
    """The options for two streams on four threads: those in sight, and those in load_config."""
    found = provider_options(device_type, precision, user, streams=2, threads=4, cache=cache)
    return found, json.loads(found.pop("load_config"))


@pytest.mark.parametrize(
    ("device_type", "names"),
    [
        ("CPU", ["CPU"]),
        ("GPU.1", ["GPU.1"]),
        ("AUTO:GPU,CPU", ["GPU", "CPU"]),
        ("HETERO:GPU.1, CPU", ["GPU.1", "CPU"]),
    ],
)
def test_a_device_type_names_one_device_or_lists_several(
    device_type: str, names: list[str]
) -> None:
    assert device_names(device_type) == names


def test_a_cpu_gets_its_streams_threads_and_precision_and_keeps_no_compiled_model() -> None:
    in_sight, config = options()
    assert in_sight == {"device_type": "CPU"}
    expected = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "2", "INFERENCE_NUM_THREADS": "4"}
    assert config == {"CPU": expected}


def test_a_gpu_gets_a_place_for_compiled_models_and_no_threads() -> None:
    _, config = options("GPU.1")
    expected = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "2", "CACHE_DIR": "compiled"}
    assert config == {"GPU.1": expected}
    _, config = options("GPU", cache=None)
    assert "CACHE_DIR" not in config["GPU"]


def test_devices_in_a_list_choose_their_streams_by_themselves() -> None:
    in_sight, config = options("AUTO:GPU,CPU")
    assert in_sight == {"device_type": "AUTO:GPU,CPU"}
    assert list(config) == ["GPU", "CPU"]
    assert not any("NUM_STREAMS" in properties for properties in config.values())
    assert "INFERENCE_NUM_THREADS" not in config["GPU"]
    assert config["CPU"]["INFERENCE_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("precision", "hint"), [("fp32", "f32"), ("bf16", "bf16"), ("fp16", "f16"), ("int8", "f32")]
)
def test_the_precision_is_always_given_since_devices_would_choose_a_lower_one(
    precision: Precision, hint: str
) -> None:
    assert options(precision=precision)[1]["CPU"]["INFERENCE_PRECISION_HINT"] == hint


@pytest.mark.parametrize(
    ("option", "its_property"),
    [("num_streams", "NUM_STREAMS"), ("num_of_threads", "INFERENCE_NUM_THREADS")],
)
def test_an_option_of_the_users_leaves_out_the_property_that_would_override_it(
    option: str, its_property: str
) -> None:
    in_sight, config = options(user={option: "7"})
    assert in_sight == {"device_type": "CPU", option: "7"}
    assert its_property not in config["CPU"]
    assert len(config["CPU"]) == 2


def test_the_users_load_config_goes_before_ours_property_by_property() -> None:
    user = {"CPU": {"NUM_STREAMS": "3", "PERF_COUNT": "YES"}}
    _, config = options(user={"load_config": json.dumps(user)})
    assert config["CPU"] == {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "3",
        "INFERENCE_NUM_THREADS": "4",
        "PERF_COUNT": "YES",
    }


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"device_type": "GPU"}, "provider.options.device_type: found GPU; use provider.device_"),
        ({"precision": "FP16"}, "provider.options.precision: found FP16; use precision"),
        ({"load_config": "{"}, "load_config: not JSON"),
        ({"load_config": "3"}, "load_config: found 3; allowed: JSON such as"),
        ({"load_config": '{"CPU": 3}'}, "load_config: found .*; allowed: JSON such as"),
        ({"load_config": '{"GPU": {}}'}, "found settings for GPU; the job's device_type is CPU"),
        (
            {"load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f16"}}'},
            "found INFERENCE_PRECISION_HINT; use precision for it",
        ),
    ],
)
def test_an_option_that_cannot_stand_is_refused_with_what_can(
    user: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        options(user=user)


@pytest.mark.parametrize(
    ("precision", "flag"),
    [
        ("bf16", "avx512bw"),
        ("bf16", "amx_bf16"),
        ("bf16", "avx_ne_convert"),
        ("fp16", "avx512_fp16"),
        ("fp16", "amx_fp16"),
        ("fp16", "avx_ne_convert"),
    ],
)
def test_a_precision_needs_one_of_its_instructions_on_a_cpu_alone(
    precision: Precision, flag: str
) -> None:
    others = frozenset({"avx2", "avx512f", "avx512_vnni"})
    require_cpu_precision("CPU", precision, others | {flag})
    require_cpu_precision("GPU", precision, others)
    with pytest.raises(ProviderError, match=f"precision {precision} needs a CPU with"):
        require_cpu_precision("CPU", precision, others)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_fp32_and_int8_run_on_any_cpu(precision: Precision) -> None:
    require_cpu_precision("CPU", precision, frozenset())
