"""What an ONNX file could reach for: seen wherever it hides, and by no other parser seen more."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from batchclf.errors import ModelError
from batchclf.models import onnx_guard
from batchclf.models.onnx_guard import check_onnx
from batchclf.models.resolve import check_model
from batchclf.spec.job import ModelSpec
from tests.conftest import ROOT, Batchclf, write_job
from tests.models.onnx_models import PREPROCESS, Classifier, build, save
from tests.models.test_bundle import resolve

WEIGHTS = "weights.bin"


def tensor(location: str = WEIGHTS, **entries: str) -> TensorProto:
    """A tensor of 4 floats whose weights are said to be in a file."""
    found = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[4])
    found.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "length": "16", **entries}.items():
        found.external_data.add(key=key, value=value)
    return found


def constant(found: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["hidden"], value=found)


def graph_of(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "inner", [], [], list(initializers))


def with_attribute(attribute: AttributeProto) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["hidden"])
    node.attribute.append(attribute)
    return node


def inside_a_branch(found: TensorProto) -> onnx.NodeProto:
    inner = helper.make_node("If", ["c"], ["x"], then_branch=graph_of(constant(found)))
    return helper.make_node("If", ["c"], ["x"], else_branch=graph_of(inner))


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(values, indices, [9])


PLAIN_TENSOR = numpy_helper.from_array(np.arange(4), "plain")


def _function(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> Any:
    model.functions.append(
        helper.make_function("own", "Inner", [], ["x"], nodes, [helper.make_opsetid("", 17)])
    )
    return model.functions[-1]


def _training(model: onnx.ModelProto, where: str, found: TensorProto) -> None:
    getattr(model.training_info.add(), where).initializer.append(found)


HIDING_PLACES: dict[str, Callable[[onnx.ModelProto, TensorProto], Any]] = {
    "initializer": lambda model, t: model.graph.initializer.append(t),
    "sparse initializer's values": lambda model, t: model.graph.sparse_initializer.append(
        sparse(t, PLAIN_TENSOR)
    ),
    "sparse initializer's indices": lambda model, t: model.graph.sparse_initializer.append(
        sparse(PLAIN_TENSOR, t)
    ),
    "Constant": lambda model, t: model.graph.node.append(constant(t)),
    "list of tensors": lambda model, t: model.graph.node.append(
        with_attribute(AttributeProto(name="a", tensors=[t], type=AttributeProto.TENSORS))
    ),
    "sparse attribute": lambda model, t: model.graph.node.append(
        with_attribute(AttributeProto(name="a", sparse_tensor=sparse(t, PLAIN_TENSOR)))
    ),
    "list of sparse tensors": lambda model, t: model.graph.node.append(
        with_attribute(AttributeProto(name="a", sparse_tensors=[sparse(t, PLAIN_TENSOR)]))
    ),
    "branch of a branch": lambda model, t: model.graph.node.append(inside_a_branch(t)),
    "initializer of a branch": lambda model, t: model.graph.node.append(
        helper.make_node("If", ["c"], ["x"], then_branch=graph_of(initializers=(t,)))
    ),
    "list of graphs": lambda model, t: model.graph.node.append(
        with_attribute(AttributeProto(name="a", graphs=[graph_of(constant(t))]))
    ),
    "function": lambda model, t: _function(model, constant(t)),
    "default of a function's attribute": lambda model, t: _function(model).attribute_proto.append(
        helper.make_attribute("a", t)
    ),
    "training's first values": lambda model, t: _training(model, "initialization", t),
    "training's algorithm": lambda model, t: _training(model, "algorithm", t),
}


def write(folder: Path, *hidden: tuple[str, TensorProto]) -> Path:
    """A whole classifier with tensors in hiding places, and a file of 64 bytes beside it."""
    model = build(Classifier())
    for place, found in hidden:
        HIDING_PLACES[place](model, found)
    folder.mkdir(exist_ok=True)
    path = folder / "own.onnx"
    path.write_bytes(model.SerializeToString())
    (folder / WEIGHTS).write_bytes(bytes(64))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_onnx(path, "model.onnx: ")
    message = str(caught.value)
    assert message.startswith(f"model.onnx: {path}: ")
    assert len(message) < 600
    return message


# ---- weights in other files ----------------------------------------------------------------------


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_file_is_found_wherever_a_tensor_that_names_it_hides(tmp_path: Path, place: str) -> None:
    path = write(tmp_path / "model", (place, tensor()))
    assert [file.path for file in check_onnx(path)] == [tmp_path / "model" / WEIGHTS]
    (tmp_path / "secret").write_bytes(bytes(64))
    write(tmp_path / "model", (place, tensor("../secret")))
    assert "'../secret', which is no file in the model's own folder" in refusal(path)


def test_a_tensor_that_says_nothing_of_being_external_is_looked_at_as_well(tmp_path: Path) -> None:
    found = tensor("/etc/hostname")
    found.data_location = TensorProto.DEFAULT
    assert "'/etc/hostname'" in refusal(write(tmp_path, ("initializer", found)))


@pytest.mark.parametrize(
    "location",
    [
        *("", ".", "..", "../weights.bin", "/etc/hostname", "/dev/zero", "a/../weights.bin"),
        *("./weights.bin", "a//weights.bin", "a\\..\\weights.bin", "weights.bin\0", "weights.bin/"),
        *("*/_ORT_MEM_ADDR_/*", "\x1b[2J", "x" * 5000, "x" * 300, "missing.bin"),
    ],
)
def test_a_location_that_is_no_file_of_the_models_own_is_refused(
    tmp_path: Path, location: str
) -> None:
    message = refusal(write(tmp_path / "model", ("initializer", tensor(location))))
    assert "weights are said to be in" in message or "a name of" in message
    assert "\x1b" not in message


def link_file(folder: Path) -> str:
    (folder / "link.bin").symlink_to("weights.bin")
    return "link.bin"


def link_out(folder: Path) -> str:
    (folder.parent / "secret").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to("../secret")
    return "link.bin"


def link_folder(folder: Path) -> str:
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "secret").write_bytes(bytes(64))
    (folder / "sub").symlink_to("../other")
    return "sub/secret"


def dangling(folder: Path) -> str:
    (folder / "link.bin").symlink_to("nowhere")
    return "link.bin"


def circle(folder: Path) -> str:
    (folder / "link.bin").symlink_to("link.bin")
    return "link.bin"


def hard_link(folder: Path) -> str:
    (folder.parent / "secret").write_bytes(bytes(64))
    os.link(folder.parent / "secret", folder / "hard.bin")
    return "hard.bin"


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "fifo")
    return "fifo"


def directory(folder: Path) -> str:
    (folder / "sub").mkdir()
    return "sub"


@pytest.mark.parametrize(
    "make", [link_file, link_out, link_folder, dangling, circle, hard_link, fifo, directory]
)
def test_links_and_special_files_are_refused(tmp_path: Path, make: Callable[[Path], str]) -> None:
    folder = tmp_path / "model"
    write(folder)
    location = make(folder)
    message = refusal(write(folder, ("initializer", tensor(location))))
    assert repr(location) in message


@pytest.mark.parametrize("make", [link_file, link_out, link_folder, hard_link])
def test_links_that_whoever_made_the_folder_put_there_are_followed_where_they_may_be(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    folder = tmp_path / "model"
    write(folder)
    location = make(folder)
    path = write(folder, ("initializer", tensor(f"./{location}")))
    (found,) = check_onnx(path, may_link=True)
    assert found.path.samefile(folder / location)
    assert not found.path.is_symlink()
    with found.open() as file:
        assert len(file.read(16)) == 16


@pytest.mark.parametrize("location", ["../secret", "sub/../../secret", "/etc/hostname", ".", "./"])
def test_what_the_models_own_text_names_stays_in_its_folder_where_links_may_be(
    tmp_path: Path, location: str
) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(64))
    path = write(tmp_path / "model", ("initializer", tensor(location)))
    with pytest.raises(ModelError, match="no file in the model's own folder"):
        check_onnx(path, may_link=True)


@pytest.mark.parametrize("make", [dangling, circle, fifo, directory])
def test_links_to_what_is_no_file_are_refused_all_the_same(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    folder = tmp_path / "model"
    write(folder)
    path = write(folder, ("initializer", tensor(make(folder))))
    with pytest.raises(ModelError, match="its weights are said to be in"):
        check_onnx(path, may_link=True)


def test_a_file_that_takes_the_place_of_the_one_looked_at_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model", ("initializer", tensor()))
    (found,) = check_onnx(path)
    (tmp_path / "secret").write_bytes(bytes(64))
    os.replace(tmp_path / "secret", found.path)
    with pytest.raises(ModelError, match="was replaced while it was read"):
        found.open()


def test_weights_below_the_models_folder_and_a_link_to_the_model_are_taken(tmp_path: Path) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "w.bin").write_bytes(bytes(64))
    path = write(tmp_path / "model", ("Constant", tensor("sub/w.bin")))
    assert [file.path for file in check_onnx(path)] == [tmp_path / "model" / "sub" / "w.bin"]
    (tmp_path / "linked").symlink_to("model")
    assert check_onnx(tmp_path / "linked" / "own.onnx")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": "49"}, "from byte 49 to 65, but it ends at 64"),
        ({"length": "65"}, "from byte 0 to 65"),
        ({"offset": "-1"}, "offset '-1', which is no number"),
        ({"length": "-1"}, "length '-1'"),
        ({"offset": "1e3"}, "offset '1e3'"),
        ({"offset": "\u0663"}, "offset"),
        ({"length": "9" * 4000}, "length"),
        ({"offset": str(2**63), "length": str(2**63)}, "but it ends at 64"),
        ({"offset": ""}, "offset ''"),
    ],
)
def test_a_part_that_is_not_in_the_file_is_refused(
    tmp_path: Path, entries: dict[str, str], said: str
) -> None:
    assert said in refusal(write(tmp_path, ("initializer", tensor(**entries))))


# ---- operators -----------------------------------------------------------------------------------


def riddle(domain: str, operator: str = "Riddle") -> onnx.NodeProto:
    return helper.make_node(operator, ["images"], ["x"], domain=domain)


def test_a_custom_operator_is_refused_by_domain_and_name(
    batchclf: Batchclf, tmp_path: Path
) -> None:
    model = build(Classifier())
    model.graph.node.append(riddle("com.example"))
    path = tmp_path / "own.onnx"
    onnx.save(model, path)
    job = write_job(tmp_path, model={"onnx": str(path), "preprocess": PREPROCESS})
    for command in ("run", "validate"):
        done = batchclf(command, job)
        assert done.exit_code == 2
        assert "has a custom operator com.example:Riddle" in done.stderr


def test_a_custom_operator_in_a_branch_or_a_function_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.onnx"
    branch = helper.make_node("If", ["c"], ["x"], then_branch=graph_of(riddle("evil", "In")))
    for where in ("branch", "function"):
        model = build(Classifier())
        if where == "branch":
            model.graph.node.append(branch)
        else:
            _function(model, riddle("evil", "In"))
        onnx.save(model, path)
        assert "custom operator evil:In" in refusal(path)


def test_operators_of_onnx_runtime_and_functions_that_the_file_defines_are_taken(
    tmp_path: Path,
) -> None:
    model = build(Classifier())
    _function(model, riddle("com.microsoft", "Gelu"), riddle("ai.onnx.ml", "Scaler"))
    model.graph.node.extend([riddle("own", "Inner"), riddle("ai.onnx", "Relu")])
    onnx.save(model, tmp_path / "own.onnx")
    assert check_onnx(tmp_path / "own.onnx") == []
    model.graph.node.append(riddle("own", "Other"))
    onnx.save(model, tmp_path / "own.onnx")
    assert "own:Other" in refusal(tmp_path / "own.onnx")


def test_an_operator_that_loads_a_compiled_file_is_refused(tmp_path: Path) -> None:
    model = build(Classifier())
    node = riddle("com.microsoft", "EPContext")
    node.attribute.append(helper.make_attribute("ep_cache_context", "/opt/engine.bin"))
    model.graph.node.append(node)
    onnx.save(model, tmp_path / "own.onnx")
    assert "com.microsoft:EPContext, which loads a model" in refusal(tmp_path / "own.onnx")


# ---- files that are made to be read differently --------------------------------------------------


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def test_a_file_in_onnx_runtimes_own_format_is_refused_though_it_parses(tmp_path: Path) -> None:
    path = tmp_path / "own.onnx"
    path.write_bytes(field(2, b"..ORTM and so on") + build(Classifier()).SerializeToString())
    assert onnx.load(path).graph.node
    assert "ONNX Runtime's own format" in refusal(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (varint(7 << 3 | 3) + varint(7 << 3 | 4), "wire type 3"),
        (varint((7 << 3 | 2) + 2**32) + b"\0", "field number"),
        (b"\0\0", "field number 0"),
        (b"\x3a" + b"\xff" * 10, "more than 64 bits"),
        (b"\x3a\x05abc", "cut short"),
        (b"\x3a\x80", "cut short"),
        (field(7, field(1, b"\x22\x7f")), "cut short"),
        (field(7, field(1, field(4, b"x" * 5000))), "a name of 5,000 bytes"),
        (field(7, field(5, field(8, b"caf\xe9"))), "a name that is not UTF-8"),
    ],
)
def test_what_parsers_may_read_differently_is_refused(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "own.onnx"
    path.write_bytes(content)
    assert why in refusal(path)


def test_a_git_lfs_pointer_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "own.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`" in refusal(
        path
    )


def test_messages_nested_without_end_are_refused(tmp_path: Path) -> None:
    inner = b""
    for _ in range(2000):  # a graph of a node with an attribute that is a graph
        inner = field(1, field(5, field(6, inner)))
    path = tmp_path / "own.onnx"
    path.write_bytes(field(7, inner))
    assert "nested deeper than 100" in refusal(path)


def test_too_many_nodes_or_fields_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.onnx"
    path.write_bytes(field(7, field(1, b"") * 1001))
    monkeypatch.setattr(onnx_guard, "MAX_NODES", 1000)
    assert "more than 1,000 nodes" in refusal(path)
    monkeypatch.setattr(onnx_guard, "MAX_FIELDS", 500)
    assert "more than 500 parts" in refusal(path)


def test_a_file_beyond_the_limit_of_protocol_buffers_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "own.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    assert "has 2,147,483,648 bytes" in refusal(path)


@pytest.mark.parametrize("make", [fifo, directory])
def test_what_is_no_file_is_refused_and_never_blocks(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    assert "cannot be read" in refusal(tmp_path / make(tmp_path))


def test_validate_looks_at_the_file_as_well(tmp_path: Path) -> None:
    path = write(tmp_path, ("function", tensor("/dev/zero")))
    with pytest.raises(ModelError, match="/dev/zero"):
        check_model(ModelSpec.model_validate({"onnx": path, "preprocess": PREPROCESS}))


# ---- any damage ----------------------------------------------------------------------------------


def parts_of(message: Any) -> Iterator[Any]:
    """A message of protocol buffers and all in it, as Google's own parser sees them."""
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for one in value if hasattr(value, "append") or hasattr(value, "add") else [value]:
                yield from parts_of(one)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes replaced, which mostly stays readable; or taken out, put in and moved too."""
    found = bytearray(data)
    if rng.random() < 0.6:
        for at in rng.sample(range(len(found)), rng.randint(1, 2)):
            found[at] = rng.choice((found[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        return bytes(found)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(found)), rng.randint(1, 40)
        match rng.randrange(4):
            case 0:
                found[at] = rng.randrange(256)
            case 1 if len(found) > 100:
                del found[at : at + length]
            case 2:
                found[at:at] = rng.randbytes(rng.randint(1, 4))
            case _:
                source = rng.randrange(len(found))
                found[at : at + length] = found[source : source + length]
    return bytes(found)


def everything(folder: Path) -> bytes:
    """A file with tensors in all hiding places, and all kinds of operators."""
    hidden = [(place, tensor(f"{number}.bin")) for number, place in enumerate(HIDING_PLACES)]
    return write(folder, *hidden).read_bytes()


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_no_parser_sees_a_file_or_an_operator_that_the_guard_does_not(
    tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "own.onnx"
    path.write_bytes(mutated(everything(tmp_path), random.Random(seed)))
    try:
        walk = onnx_guard._walk(path, "own.onnx")
        model = onnx.load_model_from_string(path.read_bytes())
    except (ModelError, DecodeError):
        return
    parts = list(parts_of(model))
    named = {
        entry.value
        for part in parts
        if isinstance(part, TensorProto)
        for entry in part.external_data
        if entry.key == "location"
    }
    operators = {(one.domain, one.op_type) for one in parts if isinstance(one, onnx.NodeProto)}
    assert named <= {dict(entries).get("location") for entries in walk.external}
    assert operators <= walk.operators


FUZZ = """
import os, random, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
folder, start, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
os.environ["BATCHCLF_CACHE_DIR"] = str(folder / "cache")
from batchclf.errors import ModelError
from tests.models.test_bundle import resolve
from tests.models.test_onnx_guard import mutated
path = folder / "own.onnx"
whole, refused = path.read_bytes(), 0
for seed in range(start, start + count):
    print(seed, end=" ", flush=True)
    path.write_bytes(mutated(whole, random.Random(seed)))
    try:
        resolve(path)
    except ModelError:
        refused += 1
print("refused", refused)
"""


def test_any_damage_to_a_small_model_is_refused_or_the_model_is_taken(tmp_path: Path) -> None:
    """In a process of its own, since native code reads what is let through."""
    save(Classifier(size=(8, 8)), tmp_path / "own.onnx")
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, tmp_path, "0", "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-2000:])
    assert 10 < int(done.stdout.split()[-1]) < 60


def test_an_input_of_a_type_that_onnx_does_not_know_is_refused(tmp_path: Path) -> None:
    model = build(Classifier())
    model.graph.input[0].type.tensor_type.elem_type = 99
    onnx.save(model, tmp_path / "own.onnx")
    with pytest.raises(ModelError, match=r"takes values of an unknown type \(99\)"):
        resolve(tmp_path / "own.onnx")


def test_a_usual_model_is_taken(tmp_path: Path) -> None:
    assert check_onnx(save(Classifier(), tmp_path / "own.onnx")) == []
