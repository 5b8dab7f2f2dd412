"""One graph: the backend is what was asked for, buffers are used in place, wrong files are named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segzero_rt import graph as graph_module
from segzero_rt.errors import BackendError, GraphError
from segzero_rt.graph import Graph, resolve_backend
from segzero_rt.graph_spec import GraphSpec, TensorSpec

onnx = pytest.importorskip("onnx", reason="the graphs of these tests are written with it")

SPEC = GraphSpec(
    name="affine",
    inputs=(TensorSpec("x", "float32", ("batch", 3)), TensorSpec("shift", "float32", (3,))),
    outputs=(TensorSpec("y", "float32", ("batch", 3)),),
)


@pytest.fixture
def affine(tmp_path: Path) -> Path:
    """`y = 2 x + shift`."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Mul", ["x", "two"], ["d"]), helper.make_node("Add", ["d", "shift"], ["y"])]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "affine",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]),
                helper.make_tensor_value_info("shift", TensorProto.FLOAT, [3]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
            [numpy_helper.from_array(np.float32(2), "two")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    model.ir_version = 8
    path = tmp_path / "affine.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def inputs(batch: int) -> dict[str, np.ndarray]:
    x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
    return {"x": x, "shift": np.array([1, 0, -1], dtype=np.float32)}


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_run_computes(affine: Path, batch: int) -> None:
    given = inputs(batch)
    result = Graph.load(affine, SPEC, backend="cpu", threads=1).run(given)
    assert set(result) == {"y"}
    np.testing.assert_array_equal(result["y"], 2 * given["x"] + given["shift"])


def test_bound_buffers_are_read_and_filled_in_place(affine: Path) -> None:
    graph = Graph.load(affine, SPEC, backend="cpu", threads=1)
    given, y = inputs(2), graph.empty((2, 3))
    bound = graph.bind(given, {"y": y})
    bound.run()
    np.testing.assert_array_equal(y, 2 * given["x"] + given["shift"])
    given["x"][:] = 5
    bound.run()
    np.testing.assert_array_equal(y, 10 + np.tile(given["shift"], (2, 1)))


def test_buffers_stay_alive_as_long_as_the_binding(affine: Path) -> None:
    graph = Graph.load(affine, SPEC, backend="cpu", threads=1)
    y = graph.empty((500, 3))
    bound = graph.bind({"x": np.ones((500, 3), np.float32), "shift": np.zeros(3, np.float32)}, {"y": y})
    rubbish = [np.full((500, 3), 9, np.float32) for _ in range(50)]
    bound.run()
    assert (y == 2).all()
    assert len(rubbish) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": np.zeros((2, 4), np.float32)}, r"\[2, 4\]", id="shape"),
        pytest.param({"x": np.zeros((2, 3), np.float64)}, "float64", id="dtype"),
        pytest.param({"z": np.zeros(1, np.float32)}, "expected inputs", id="unknown-name"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(affine: Path, change: dict[str, np.ndarray], message: str) -> None:
    graph = Graph.load(affine, SPEC, backend="cpu", threads=1)
    with pytest.raises(GraphError, match=message):
        graph.run({**inputs(2), **change})
    with pytest.raises(GraphError, match=message):
        graph.bind({**inputs(2), **change}, {"y": graph.empty((2, 3))})


def test_a_buffer_with_gaps_is_refused(affine: Path) -> None:
    graph = Graph.load(affine, SPEC, backend="cpu", threads=1)
    with pytest.raises(GraphError, match="contiguous"):
        graph.bind(inputs(2), {"y": np.zeros((2, 6), np.float32)[:, ::2]})
    with pytest.raises(GraphError, match="buffers for y"):
        graph.bind(inputs(2), {})


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: b"\x00" * 100, id="zeros"),
        pytest.param(lambda data: b"PK\x03\x04" + data, id="another-kind"),
    ],
)
def test_a_damaged_file_is_named(affine: Path, damage: object) -> None:
    affine.write_bytes(damage(affine.read_bytes()))  # type: ignore[operator]
    with pytest.raises(GraphError, match=r"affine\.onnx|affine"):
        Graph.load(affine, SPEC, backend="cpu", threads=1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"nothing\.onnx"):
        Graph.load(tmp_path / "nothing.onnx", SPEC, backend="cpu")


def test_a_graph_with_other_inputs_is_refused_when_loaded(affine: Path) -> None:
    other = GraphSpec(name="other", inputs=SPEC.inputs[:1], outputs=SPEC.outputs)
    with pytest.raises(GraphError, match="expected inputs x; the file has x, shift"):
        Graph.load(affine, other, backend="cpu", threads=1)


def test_the_backend_is_readable_and_forced_ones_never_fall_back(affine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph.load(affine, SPEC, backend="cpu", threads=1)
    assert str(graph.backend) == "cpu"
    assert graph.backend.device == "cpu"
    runtime = graph_module._onnxruntime()
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert str(resolve_backend("auto")) == "cpu"
    for name in ("cuda", "tensorrt-ep"):
        with pytest.raises(BackendError, match=rf"expected backend {name}.*install segzero-rt\[gpu\]"):
            Graph.load(affine, SPEC, backend=name)
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert str(resolve_backend("auto")) == "cuda"


def test_a_backend_that_is_offered_but_cannot_start_is_an_error(affine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with CUDA built in but no driver: ONNX Runtime would go on with the CPU."""
    runtime = graph_module._onnxruntime()
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("needs an ONNX Runtime without CUDA")
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(BackendError, match="could only start CPUExecutionProvider"), pytest.warns(UserWarning):
        Graph.load(affine, SPEC, backend="cuda", threads=1)


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cuda:0"])
def test_an_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(BackendError, match="auto, cpu, cuda"):
        resolve_backend(name)


SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
CONTEXTS = [
    ("short prompts, switch unset", True, None, "1"),
    ("short prompts, switch set to something", True, "0", "1"),
    ("any prompts, switch unset", False, None, None),
    ("any prompts, switch set to something", False, "0", "0"),
]


@pytest.mark.parametrize(("name", "short", "before", "inside"), CONTEXTS, ids=[name for name, *_ in CONTEXTS])
@pytest.mark.parametrize("readable", [True, False])
def test_the_switch_for_short_prompts_is_set_while_a_session_is_made_and_no_longer(
    affine: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    short: bool,
    before: str | None,
    inside: str | None,
    readable: bool,
) -> None:
    import onnxruntime

    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    seen: list[str | None] = []
    make_session = onnxruntime.InferenceSession

    def note(*arguments: Any, **options: Any) -> Any:
        seen.append(os.environ.get(SWITCH))
        return make_session(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", note)
    if readable:
        Graph.load(affine, SPEC, backend="cpu", threads=1, short_prompts=short)
    else:
        affine.write_bytes(affine.read_bytes()[:40])
        with pytest.raises(GraphError, match="readable graph"):
            Graph.load(affine, SPEC, backend="cpu", threads=1, short_prompts=short)
    assert seen == [inside]
    assert os.environ.get(SWITCH) == before


@pytest.mark.parametrize("threads", [-1, 0, 1025, 10**9])
def test_an_impossible_number_of_threads_is_refused(affine: Path, threads: int) -> None:
    with pytest.raises(BackendError, match="1 to 1024 threads"):
        Graph.load(affine, SPEC, backend="cpu", threads=threads)


def test_without_onnxruntime_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"segzero-rt\[cpu\]"):
        resolve_backend("auto")
