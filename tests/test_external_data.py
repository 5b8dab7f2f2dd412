"""Weights beside a graph: they may come from plain files in its own folder, and from nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="writes graphs")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - needs onnx's absence to skip first

from segzero_rt.errors import GraphError  # noqa: E402
from segzero_rt.external_data import check_external_data, external_entries, graph_bytes  # noqa: E402
from segzero_rt.graph import Graph  # noqa: E402
from segzero_rt.graph_spec import GraphSpec, TensorSpec  # noqa: E402

SPEC = GraphSpec(name="sum", inputs=(TensorSpec("x", "float32", (4,)),), outputs=(TensorSpec("y", "float32", (4,)),))


def outside(location: str, *, offset: str = "0", length: str = "16", name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return tensor


def write_graph(folder: Path, weights: list[TensorProto], nodes: list[onnx.NodeProto] | None = None) -> Path:
    """`y = x + w`, its weights as given; and `w.data` beside it."""
    graph = helper.make_graph(
        nodes or [helper.make_node("Add", ["x", "w"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    (folder / "w.data").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    return folder / "graph.onnx"


def test_weights_beside_a_graph_are_used(tmp_path: Path) -> None:
    path = write_graph(tmp_path, [outside("w.data", offset="16")])
    graph = Graph.load(path, SPEC, backend="cpu", threads=1)
    assert graph.run({"x": np.ones(4, np.float32)})["y"].tolist() == [5, 6, 7, 8]
    assert [*external_entries(path)] == [{"location": "w.data", "offset": "16", "length": "16"}]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        pytest.param("../secret.data", "beside it", id="above"),
        pytest.param("a/../../secret.data", "beside it", id="above-by-a-detour"),
        pytest.param("/etc/hostname", "beside it", id="absolute"),
        pytest.param("C:\\secret.data", "beside it", id="a-drive"),
        pytest.param("", "beside it", id="empty"),
        pytest.param(".", "beside it", id="the-folder"),
        pytest.param("w.data\0x", "beside it", id="nul"),
        pytest.param("manifest.json", "beside it", id="the-manifest"),
        pytest.param("gone.data", "plain file", id="not-there"),
        pytest.param("link.data", "plain file", id="a-link"),
        pytest.param("folder/secret.data", "plain file", id="through-a-linked-folder"),
    ],
)
def test_no_place_outside_the_folder_is_read(tmp_path: Path, location: str, message: str) -> None:
    path = write_graph(tmp_path / "bundle", [outside(location)])
    (tmp_path / "secret.data").write_bytes(bytes(64))
    (tmp_path / "bundle" / "link.data").symlink_to(tmp_path / "secret.data")
    (tmp_path / "bundle" / "folder").symlink_to(tmp_path)
    with pytest.raises(GraphError, match=message):
        Graph.load(path, SPEC, backend="cpu", threads=1)


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        pytest.param("0", "33", "33 bytes", id="longer-than-the-file"),
        pytest.param("32", "1", "33 bytes", id="behind-its-end"),
        pytest.param("-16", "16", "a number as offset", id="before-its-start"),
        pytest.param("0", "sixteen", "a number as length", id="in-words"),
        pytest.param("²", "16", "a number as offset", id="a-superscript"),
    ],
)
def test_more_than_a_file_holds_is_refused(tmp_path: Path, offset: str, length: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        check_external_data(write_graph(tmp_path, [outside("w.data", offset=offset, length=length)]))


def in_a_constant(tensor: TensorProto) -> list[onnx.NodeProto]:
    return [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])]


def in_a_branch(tensor: TensorProto) -> list[onnx.NodeProto]:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["w"])],
        "branch",
        [],
        [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])],
        [tensor],
    )
    yes = numpy_helper.from_array(np.array(True), "yes")
    return [
        helper.make_node("Constant", [], ["yes"], value=yes),
        helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]


@pytest.mark.parametrize("hide", [in_a_constant, in_a_branch], ids=["attribute", "graph-in-an-attribute"])
def test_a_place_hidden_inside_a_node_is_found(tmp_path: Path, hide: object) -> None:
    path = write_graph(tmp_path, [], hide(outside("../secret.data", name="inner")))  # type: ignore[operator]
    with pytest.raises(GraphError, match="beside it"):
        check_external_data(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x3b location",
        b"\x3a\xff\xff\xff\x7f location",
        b"\x3a" + b"\xff" * 11 + b"location",
        b"\x09location"[:6],
    ],
    ids=["empty", "a-group", "longer-than-the-file", "endless-number", "cut-in-a-number"],
)
def test_bytes_that_are_no_graph_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(data)
    with pytest.raises(GraphError, match=r"graph\.onnx"):
        Graph.load(tmp_path / "graph.onnx", SPEC, backend="cpu", threads=1)


def test_the_size_of_a_graph_is_that_of_all_its_files(tmp_path: Path) -> None:
    inside = write_graph(tmp_path, [])
    alone = graph_bytes(inside)
    assert alone == inside.stat().st_size
    path = write_graph(tmp_path, [outside("w.data", offset="0"), outside("w.data", offset="16", name="v")])
    assert graph_bytes(path) == path.stat().st_size + 32, "a file that two tensors share counts once"
