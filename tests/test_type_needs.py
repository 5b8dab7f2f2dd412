"""Number types that not every CUDA device has: found in a bundle, held to TensorRT's own word, told beforehand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare_machine import MACHINE, gpu

from segzero_rt.bundle import Bundle, write_bundle
from segzero_rt.commands.doctor import examine
from segzero_rt.errors import EngineError, GraphError
from segzero_rt.preflight import machine as machine_module
from segzero_rt.preflight.report import plan_report, plan_rows
from segzero_rt.preflight.type_needs import LEAST_CAPABILITY, TypeNeed, type_needs

onnx = pytest.importorskip("onnx", reason="graphs of these types are written with it")

SIDE, BLOCK = 64, 16
DECODER, VISION = "policy/decoder.onnx", "policy/vision.onnx"


def zeros(name: str, dtype: str, *shape: int) -> Any:
    """An initializer of a type that NumPy has not."""
    kind, bits = {
        "bfloat16": (onnx.TensorProto.BFLOAT16, 16),
        "float8": (onnx.TensorProto.FLOAT8E4M3FN, 8),
        "float4": (onnx.TensorProto.FLOAT4E2M1, 4),
    }[dtype]
    return onnx.helper.make_tensor(name, kind, shape, bytes(int(np.prod(shape)) * bits // 8), raw=True)


def product(path: Path, dtype: str) -> Path:
    """`x @ w` in float32 with `w` stored in that type, as the exporters store it."""
    helper, node = onnx.helper, onnx.helper.make_node
    weights = [zeros("w", dtype, SIDE, SIDE), onnx.numpy_helper.from_array(np.ones((), np.float32), "one")]
    if dtype == "bfloat16":
        widen = [node("Cast", ["w"], ["wide"], to=onnx.TensorProto.FLOAT)]
    elif dtype == "float8":
        widen = [node("DequantizeLinear", ["w", "one"], ["wide"])]
    else:
        weights.append(zeros("small", "float8", SIDE // BLOCK, SIDE))
        widen = [
            node("DequantizeLinear", ["small", "one"], ["scales"]),
            node("DequantizeLinear", ["w", "scales"], ["wide"], axis=0, block_size=BLOCK),
        ]
    shape = [4, SIDE]
    graph = helper.make_graph(
        [*widen, node("MatMul", ["x", "wide"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    model.ir_version = 11
    onnx.save(model, str(path))
    return path


def with_types(source: Path, target: Path, types: dict[str, str]) -> Bundle:
    """A copy of a bundle whose graphs at these paths hold a weight of such a type besides."""
    bundle = Bundle.open(source)
    files: dict[str, Path | bytes] = {name: bundle.file(name) for name in bundle.manifest.files}
    for path, dtype in types.items():
        model = onnx.load(str(bundle.file(path)), load_external_data=False)
        model.graph.initializer.append(zeros("narrow", dtype, 2, 2))
        files[path] = model.SerializeToString()
    return write_bundle(target, bundle.manifest, files)


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        ("bfloat16", "7.5"),
        ("bfloat16", "8.0"),
        ("float8", "8.6"),
        ("float8", "8.9"),
        ("float4", "8.9"),
        ("float4", "12.0"),
    ],
)
def test_devices_are_those_that_tensorrt_builds_for(dtype: str, capability: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
    from segzero_rt.engines.library import find_library

    graph = parse_graph(find_library("tensorrt-rtx"), product(tmp_path / "product.onnx", dtype))
    assert isinstance(graph, ParsedGraph), [str(refusal) for refusal in graph]

    def build() -> int:
        options = BuildOptions(compute_capabilities=(capability,))
        return len(graph.build([], options, timing_cache=None, progress=lambda phase, share: None))

    if TypeNeed(dtype=dtype, graphs=("product.onnx",)).met_by(capability):
        assert build() > 1000
    else:
        with pytest.raises(EngineError, match="HW-specific datatypes"):
            build()


@pytest.mark.parametrize(
    ("capability", "has"),
    [
        pytest.param("7.5", (), id="turing"),
        pytest.param("8.7", ("bfloat16",), id="orin"),
        pytest.param("9.0", ("bfloat16", "float8"), id="hopper"),
        pytest.param("10.0", ("bfloat16", "float8", "float4"), id="blackwell"),
        pytest.param("11.0", ("bfloat16", "float8", "float4"), id="thor: not less than 8.9 as text is"),
    ],
)
def test_capabilities_are_compared_as_numbers(capability: str, has: tuple[str, ...]) -> None:
    needs = [TypeNeed(dtype=dtype, graphs=("a.onnx",)) for dtype in LEAST_CAPABILITY]
    assert tuple(need.dtype for need in needs if need.met_by(capability)) == has


def test_the_shipped_bundle_needs_no_such_type(bundle_path: Path) -> None:
    assert type_needs(Bundle.open(bundle_path)) == ()


def test_each_type_is_told_with_its_graphs(tiny_bundle_path: Path, tmp_path: Path) -> None:
    bundle = with_types(tiny_bundle_path, tmp_path / "typed", {DECODER: "float4", VISION: "bfloat16"})
    assert {need.dtype: need.graphs for need in type_needs(bundle)} == {"bfloat16": (VISION,), "float4": (DECODER,)}
    assert type_needs(bundle, [VISION]) == (TypeNeed(dtype="bfloat16", graphs=(VISION,)),)
    bundle.file(DECODER).write_bytes(b"")
    with pytest.raises(GraphError, match="expected an ONNX graph"):
        type_needs(bundle)


@pytest.mark.parametrize(
    ("dtype", "gpus", "backend", "problem", "forbids"),
    [
        pytest.param("float8", (), "auto", None, False, id="a CPU computes float8 in floats"),
        pytest.param("float8", ("8.9",), "tensorrt", None, False, id="ada has it"),
        pytest.param("float8", ("8.6",), "auto", "8.9 or newer, this device has 8.6", False, id="ampere: CPU answers"),
        pytest.param("float8", ("8.6",), "tensorrt-rtx", "this device has 8.6", True, id="ampere: engines wanted"),
        pytest.param("float4", (), "auto", "there is no CUDA device here, and no CPU", True, id="no CPU runs float4"),
        pytest.param("float4", ("8.9",), "auto", "10.0 or newer, this device has 8.9", True, id="ada has no float4"),
        pytest.param("float4", ("12.0",), "auto", None, False, id="blackwell has it"),
        pytest.param("bfloat16", ("7.5",), "tensorrt", "8.0 or newer, this device has 7.5", True, id="turing"),
    ],
)
def test_what_a_device_lacks_is_said(
    dtype: str,
    gpus: tuple[str, ...],
    backend: str,
    problem: str | None,
    forbids: bool,
    tiny_bundle_path: Path,
    tmp_path: Path,
) -> None:
    bundle = with_types(tiny_bundle_path, tmp_path / "typed", {DECODER: dtype})
    problems: list[str] = []
    here = dataclasses.replace(MACHINE, gpus=tuple(map(gpu, gpus)))
    report = plan_report(bundle, here, problems, with_predictions=True, backend=backend)
    assert report is not None
    (row,) = report["number_types"]
    assert (row["dtype"], row["graphs"]) == (dtype, [DECODER])
    assert row["problem"] is None if problem is None else problem in row["problem"]
    assert bool(problems) is forbids and all("--storage float16" in text for text in problems)
    rows = dict(plan_rows(report))
    needed = f"engines of {DECODER} need compute capability {row['least_capability']} or newer"
    assert rows[f"  {dtype}"] == (row["problem"] or needed)
    modules = {module["module"]: module for module in report["predictions"]}
    orin_lacks = [] if dtype == "bfloat16" else [dtype]
    assert modules["AGX Orin 64GB"]["missing_types"] == orin_lacks
    assert modules["AGX Orin 64GB"]["fits"] is not bool(orin_lacks) and modules["Thor T5000"]["missing_types"] == []
    assert modules["Thor T5000"]["fits"] and ("takes no engine" in rows["  AGX Orin 64GB"]) is bool(orin_lacks)


def test_the_doctor_says_so_before_anything_is_loaded(
    tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segzero_rt.graph import Graph

    bundle = with_types(tiny_bundle_path, tmp_path / "typed", {DECODER: "float4"})
    monkeypatch.setattr(machine_module, "read_gpus", lambda load: (gpu("8.9"),))
    monkeypatch.setattr(Graph, "load", lambda *_, **__: pytest.fail("a graph was loaded"))
    for preflight_only in (True, False):
        report = examine(str(bundle.root), preflight_only=preflight_only)
        assert report["runs"] is False and report["trial"] is None
        assert [DECODER in text and "this device has 8.9" in text for text in report["problems"]] == [True]
        json.dumps(report)


def test_a_build_for_a_device_without_the_type_ends_at_once(
    portable_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recorded_tensorrt import recorded_module

    from segzero_rt.engines import make
    from segzero_rt.engines.builder import BuildOptions
    from segzero_rt.engines.library import Library
    from segzero_rt.engines.profiles import ProfileLimits

    bundle = with_types(portable_bundle_path, tmp_path / "typed", {DECODER: "float8"})
    monkeypatch.setattr(make, "parse_graph", lambda *_: pytest.fail("a graph was read"))
    library = Library(target="tensorrt-rtx", module=recorded_module("rtx-1.7.1.116"))
    options = BuildOptions(compute_capabilities=("8.6", "8.9"))
    build = {"options": options, "limits": ProfileLimits(), "gpu": None}
    with pytest.raises(EngineError, match=rf"float8 of {DECODER}: compute capability 8\.9 or newer, got 8\.6;"):
        make.build_engines(bundle, library, **build)
    jetson = Library(target="tensorrt", module=recorded_module("10.3.0"))
    with pytest.raises(EngineError, match=r"got 8\.7;"):
        make.build_engines(bundle, jetson, **{**build, "options": BuildOptions(), "gpu": gpu("8.7")})
    with pytest.raises(pytest.fail.Exception, match="a graph was read"):  # the graphs that are asked for alone count
        make.build_engines(bundle, library, **build, graphs=["image_encoder"])
