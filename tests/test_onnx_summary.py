"""Reading an ONNX file without the onnx package: the same weights and operators, and damaged files are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segzero_rt.errors import GraphError
from segzero_rt.onnx_summary import Weight, read_summary

onnx = pytest.importorskip("onnx", reason="the graphs of these tests are written with it")


def write(path: Path, weights: dict[str, Any], *, external: str = "") -> Path:
    """A graph of one Add and one foreign operator, with these initializers."""
    from onnx import TensorProto, helper, numpy_helper

    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
        for name, value in weights.items()
    ]
    for tensor in tensors if external else ():
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "0")):
            tensor.external_data.add(key=key, value=value)
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    nodes = [
        helper.make_node("Add", ["x", "x"], ["y"]),
        helper.make_node("Add", ["y", "y"], ["z"]),
        helper.make_node("Gelu", ["z"], ["w"], domain="com.microsoft"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [shape], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [3])], tensors)
    )
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        pytest.param(np.zeros((3, 5), np.float32), Weight("float32", (3, 5)), id="float32"),
        pytest.param(np.zeros((1, 7), np.float16), Weight("float16", (1, 7)), id="float16"),
        pytest.param(np.zeros((0, 7), np.int8), Weight("int8", (0, 7)), id="no-elements"),
        pytest.param(np.array(3, np.int64), Weight("int64", ()), id="scalar"),
        pytest.param(np.zeros(300, np.uint8), Weight("uint8", (300,)), id="length-of-two-bytes"),
    ],
)
def test_weights_are_read_by_type_and_shape(array: np.ndarray, expected: Weight, tmp_path: Path) -> None:
    summary = read_summary(write(tmp_path / "g.onnx", {"w": array}))
    assert summary.weights == (expected,)
    assert summary.weight_bytes == array.nbytes
    assert summary.operators == {"Add": 2, "com.microsoft:Gelu": 1}
    assert summary.external_files == frozenset()


def test_four_bits_are_half_a_byte_and_an_odd_one_is_rounded_up() -> None:
    assert [Weight("int4", shape).num_bytes for shape in ((4,), (5,), (3, 3))] == [2, 3, 5]


def test_files_beside_the_graph_are_named_and_their_weights_counted(tmp_path: Path) -> None:
    weights = {"a": np.zeros((10, 4), np.float16), "b": np.zeros(6, np.float32)}
    summary = read_summary(write(tmp_path / "g.onnx", weights, external="weights.bin"))
    assert summary.external_files == {"weights.bin"}
    assert summary.weight_bytes == 80 + 24
    assert summary.elements("float16") == 40 and summary.elements("float16", "float32") == 46


def test_the_shipped_graphs_are_read_as_onnx_reads_them(bundle_path: Path) -> None:
    for path in sorted(bundle_path.rglob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        expected = [tuple(tensor.dims) for tensor in model.graph.initializer]
        summary = read_summary(path)
        assert [weight.shape for weight in summary.weights] == expected
        assert summary.operators.total() == len(model.graph.node)
        by_hand = sum(len(tensor.raw_data) for tensor in model.graph.initializer if tensor.raw_data)
        inside = sum(w.num_bytes for w, t in zip(summary.weights, model.graph.initializer, strict=True) if t.raw_data)
        assert inside == by_hand


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: b"\x00" * 64, id="zeros"),
        pytest.param(lambda data: b"\xff" * 64, id="endless-number"),
        pytest.param(lambda data: b"\x3a\xff\xff\xff\x7f" + data, id="length-beyond-the-end"),
        pytest.param(lambda data: b"\x08\x0a", id="no-graph"),
    ],
)
def test_damaged_files_are_named(damage: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "broken.onnx", {"w": np.zeros((3, 5), np.float32)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(GraphError, match=r"expected an ONNX graph at .*broken\.onnx"):
        read_summary(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"nothing\.onnx"):
        read_summary(tmp_path / "nothing.onnx")
