"""Weights of 4 bits with two levels of scales: their numbers, the graphs, and what TensorRT makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

pytest.importorskip("torch", reason="exports checkpoints of PyTorch")

from policy_checkpoints import policy_bundle

from export.gate import FOUR_BITS
from export.graph_builder import FLOAT4_OPSET, GraphBuilder
from export.lazy_weight import Weight
from export.nvfp4 import (
    EMULATED,
    FLOAT4_BLOCK,
    Float4Encoding,
    Float4Store,
    as_float4,
    decoded,
    dequantize_file,
    packed,
    tensor_scale,
)
from export.policy import PolicyExport, export_policy
from export.weight_encoding import FLOAT4
from export.weight_store import InlineStore
from segzero_rt.engines.gate import gate_engine
from segzero_rt.errors import ExportError, GraphError
from segzero_rt.graph import Graph
from segzero_rt.graph_spec import GraphSpec, TensorSpec
from segzero_rt.policy import policy_specs

NUMBERS = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Those of float4 e2m1 from 0 up, in the order of their codes."""
WHOLE_BLOCKS = ("qkv", "o", "gate", "up")
"""Products of the small policy whose rows are multiples of a block."""
ONE = np.asarray(1, np.float32)
OPTIONS: dict[str, Any] = {
    "storage": "nvfp4",
    "input_size_hw": (84, 84),
    "max_length": 500,
    "max_new_tokens": 8,
    "gate_questions": ("the red cup",),
    "gate_limits": replace(FOUR_BITS, min_top1=0.1),  # random weights
}

# --- numbers -------------------------------------------------------------------------------------------------------


def block_of(*values: float) -> np.ndarray:
    """A row of one block that begins with these, and holds a 6, so that its scale is 1."""
    return np.float32([[*values, *[0.0] * (FLOAT4_BLOCK - 1 - len(values)), 6.0]])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[pytest.param(float(number), float(number), id=f"exact-{number}") for number in NUMBERS],
        pytest.param(0.25, 0.0, id="tie-to-zero"),
        pytest.param(0.26, 0.5, id="subnormal"),
        pytest.param(0.75, 1.0, id="tie-from-subnormal"),
        pytest.param(1.75, 2.0, id="tie-up"),
        pytest.param(2.5, 2.0, id="tie-down"),
        pytest.param(3.5, 4.0, id="tie-to-4"),
        pytest.param(5.0, 4.0, id="tie-below-6"),
        pytest.param(5.01, 6.0, id="above-it"),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_values_go_to_the_nearest_number(value: float, expected: float, sign: int) -> None:
    codes, scales = as_float4(block_of(sign * value), ONE, np.dtype(np.float32))
    assert scales.astype(np.float32) == 1
    assert codes.astype(np.float32)[0, 0] == sign * expected


def test_a_step_is_the_product_of_both_scales_as_it_is_multiplied_back() -> None:
    """A block scale of 1.06 is rounded to 1, so that what was 6 lies beyond the largest number and is held there."""
    codes, scales = as_float4(block_of(1.0) * np.float32(1.06), ONE, np.dtype(np.float32))
    assert scales.astype(np.float32) == 1
    assert codes.astype(np.float32)[0, [0, -1]].tolist() == [1.0, 6.0]


def test_codes_are_packed_as_onnx_packs_them() -> None:
    for size in (1, 2, 15, 16, 17):
        values = np.resize(np.concatenate([NUMBERS, -NUMBERS[1:]]), size).astype(FLOAT4)
        theirs = numpy_helper.from_array(values, "w").raw_data
        assert packed(values.view(np.uint8)).tobytes() == theirs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(1, 16), (5, 32), (33, 48), (7, 256)], ids=str)
def test_weights_are_within_half_a_step(shape: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, with one scale for all of them."""
    monkeypatch.setattr("export.lazy_weight.CHUNK_BYTES", 4 * shape[1] * 2)
    rng = np.random.default_rng(0)
    values = (rng.normal(size=shape) * 0.02).astype(np.float32)
    values[0, :16] = 0
    encoding = Float4Encoding("w", Weight.of(values), dtype=dtype)
    parts = dict(encoding.pieces())
    for part, tensor in zip(parts.values(), encoding.tensors, strict=True):
        assert part.nbytes == tensor.num_bytes
    assert np.isfinite(parts[1].astype(np.float32)).all()
    found = _decoded(encoding, parts, dtype)
    largest = np.abs(values.reshape(shape[0], -1, 16)).max(axis=2).repeat(16, axis=1)
    assert (np.abs(found.T - values) <= largest / 6 * 1.13 + 1e-9).all()
    assert (found.T[0, :16] == 0).all() and not encoding.lossless


def _decoded(encoding: Float4Encoding, parts: dict[int, np.ndarray], dtype: str) -> np.ndarray:
    """By hand, from the bytes: a table of numbers, a scale for each block, one for all."""
    numbers, scales, scale = parts.values()
    flat = np.stack([numbers & 15, numbers >> 4], axis=1).reshape(-1)[: int(np.prod(encoding.tensors[0].shape))]
    table = np.concatenate([NUMBERS, -NUMBERS])
    steps = (scales.astype(np.float32) * scale).astype(dtype).astype(np.float32).repeat(16, axis=0)
    return table[flat].reshape(encoding.tensors[0].shape) * steps


@pytest.mark.parametrize("width", [1, 15, 17, 31, 33])
def test_rows_of_broken_blocks_are_refused(width: int) -> None:
    with pytest.raises(ExportError, match=rf"multiples of 16 for nvfp4, got {width} in the/weight"):
        Float4Encoding("the/weight", Weight.of(np.zeros((3, width))))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_weight_is_named(value: float) -> None:
    with pytest.raises(ExportError, match=r"finite weights, got .* in the/weight"):
        list(Float4Encoding("the/weight", Weight.of(np.full((2, 16), value))).pieces())


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1e-3, 6.0, 3e38])
def test_the_scale_of_a_tensor_is_a_normal_number(largest: float) -> None:
    assert np.finfo(np.float32).smallest_normal <= tensor_scale(largest) < np.inf


# --- graphs --------------------------------------------------------------------------------------------------------


def product(tmp_path: Path, width: int = 64, computed: str = "float32") -> tuple[Path, GraphSpec, np.ndarray]:
    """A file with `x @ w` as a decoder's layer has it."""
    values = np.random.default_rng(0).normal(size=(40, width)).astype(np.float32)
    spec = GraphSpec(
        name="product",
        inputs=(TensorSpec("x", computed, ("rows", width)),),
        outputs=(TensorSpec("y", computed, ("rows", 40)),),
    )
    store = Float4Store(InlineStore(), (), computed)
    builder = GraphBuilder(spec, storage="float16", computed=computed, fused=False, store=store, opset=FLOAT4_OPSET)
    with builder.scope("layers.0"):
        builder.node("Identity", [builder.linear("x", "o", values)], output="y")
    path = tmp_path / "product.onnx"
    builder.save(path)
    dequantize_file(path, computed)
    return path, spec, values


@pytest.mark.parametrize("computed", ["float32", "float16"])
def test_the_twin_computes_what_the_graph_says(computed: str, tmp_path: Path) -> None:
    path, spec, values = product(tmp_path, computed=computed)
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(computed)
    onnx.save(decoded(model, tmp_path), str(tmp_path / "twin.onnx"))
    twin = onnx.load(str(tmp_path / "twin.onnx"))
    assert not any(tensor.data_type == TensorProto.FLOAT4E2M1 for tensor in twin.graph.initializer)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0].astype(np.float32)  # type: ignore[index]
    found = Graph.load(tmp_path / "twin.onnx", spec, backend="cpu").run({"x": x})["y"].astype(np.float32)
    rounding = 1e-5 if computed == "float32" else 1e-2
    np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding * 10)
    exact = x.astype(np.float32) @ values.T
    assert 0.03 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.15
    with pytest.raises(GraphError, match="DequantizeLinear"):
        Graph.load(path, spec, backend="cpu")


@pytest.mark.parametrize("width", [63, 65])
def test_rows_of_broken_blocks_stay_floats(width: int, tmp_path: Path) -> None:
    path, _, _ = product(tmp_path, width)
    operators = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert "DequantizeLinear" not in operators and "Cast" in operators


# --- policies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["portable", "trt11"])
def nvfp4_policy(
    request: pytest.FixtureRequest, policy_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PolicyExport, Path]:
    """Weights in files beside the graph in one flavour, inside in the other."""
    folder = tmp_path_factory.mktemp("nvfp4")
    external = request.param == "trt11"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.weight_store.INLINE_BYTES", 0 if external else 16 << 10)
        exported = export_policy(
            policy_folders("grouped-heads"),
            folder,
            flavour=request.param,
            computed="float16",
            external=external,
            **OPTIONS,
        )
    return exported, folder


def test_the_decoders_layers_are_float4_and_all_else_is_not(nvfp4_policy: tuple[PolicyExport, Path]) -> None:
    exported, folder = nvfp4_policy
    assert exported.gate["emulated"] == EMULATED and exported.gate["kl_mean"] > 1e-6
    assert not list(folder.rglob("*twin*"))
    model = onnx.load(str(exported.files["policy/decoder.onnx"]))
    onnx.checker.check_model(model)
    numbers = {one.name for one in model.graph.initializer if one.data_type == TensorProto.FLOAT4E2M1}
    assert numbers == {f"layers.{layer}/{part}.weight:nvfp4" for layer in range(2) for part in WHOLE_BLOCKS}
    kept = {one.name: one.dims[0] for one in model.graph.initializer if one.name.endswith("down.weight")}
    assert len(kept) == 2 and all(width % FLOAT4_BLOCK for width in kept.values()), "broken blocks stay floats"
    vision = onnx.load(str(exported.files["policy/vision.onnx"]))
    assert vision.opset_import[0].version == 17
    assert not any(node.op_type == "DequantizeLinear" for node in vision.graph.node)


def test_large_policies_are_gated_layer_by_layer(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    exported = export_policy(
        policy_folders("grouped-heads"),
        tmp_path,
        flavour="portable",
        computed="float16",
        external=True,
        gate_layers=True,
        **OPTIONS,
    )
    assert exported.gate["method"] == "layer by layer" and exported.gate["emulated"] == EMULATED
    assert 1e-3 < exported.gate["decoder_error"] < 0.9


def test_a_planted_fault_is_caught(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Numbers packed the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.nvfp4.packed", lambda codes: packed(codes)[..., None].view(np.uint8)[..., 0] << 4)
        with pytest.raises(ExportError, match="differ from PyTorch"):
            export_policy(
                policy_folders("grouped-heads"),
                tmp_path,
                flavour="portable",
                computed="float16",
                **{**OPTIONS, "gate_limits": FOUR_BITS},
            )


def test_tensorrt_builds_it_for_blackwell(nvfp4_policy: tuple[PolicyExport, Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
    from segzero_rt.engines.library import find_library
    from segzero_rt.engines.profiles import ProfileLimits, axis_lengths, make_profiles
    from segzero_rt.errors import EngineError

    exported, folder = nvfp4_policy
    spec = policy_specs(exported.manifest)["decoder"]
    lengths = axis_lengths(policy_bundle(exported, folder).manifest, ProfileLimits())["decoder"]

    def build(capability: str) -> int:
        graph = parse_graph(find_library("tensorrt-rtx"), exported.files["policy/decoder.onnx"])
        assert isinstance(graph, ParsedGraph), [str(refusal) for refusal in graph]
        graph.check(spec)
        profiles = make_profiles(spec, graph.declared_inputs(), lengths)
        options = BuildOptions(compute_capabilities=(capability,))
        return len(graph.build(profiles, options, timing_cache=None, progress=lambda phase, share: None))

    assert build("12.0") > 10_000
    if exported.manifest.flavour == "portable":
        with pytest.raises(EngineError, match=r"sm89, because the model contains HW-specific datatypes: fp4_e2m1"):
            build("8.9")


def test_an_engine_of_it_has_no_gate_on_a_cpu(nvfp4_policy: tuple[PolicyExport, Path]) -> None:
    """Its record says so, and the runtime asks for consent then."""
    exported, folder = nvfp4_policy
    bundle, nothing = policy_bundle(exported, folder), cast("Any", None)
    gate = gate_engine(bundle, "decoder", nothing, nothing)
    assert gate["status"] == "not_run" and "DequantizeLinear" in gate["reason"]


def test_tensorrt_wants_whole_blocks(tmp_path: Path) -> None:
    """Why rows of broken blocks stay floats: ONNX would allow them."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    from segzero_rt.engines.builder import ParsedGraph, parse_graph
    from segzero_rt.engines.library import find_library

    path, _, _ = product(tmp_path)
    assert isinstance(parse_graph(find_library("tensorrt-rtx"), path), ParsedGraph)
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        if tensor.name.endswith(":nvfp4"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:63], tensor.name))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 63
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    refused = parse_graph(find_library("tensorrt-rtx"), path)
    assert not isinstance(refused, ParsedGraph)
    assert "must divide into whole blocks" in str(refused[0])


def test_flavour_ort_cannot_hold_it(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="flavour portable or trt11 for nvfp4 weights, got ort"):
        export_policy(policy_folders("grouped-heads"), tmp_path, flavour="ort", **OPTIONS)
