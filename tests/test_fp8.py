"""Floats of 8 bits: their numbers, graphs that round to them, and that TensorRT builds those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

pytest.importorskip("torch", reason="exports checkpoints of PyTorch")

from policy_checkpoints import policy_bundle, random_picture

from export.gate import QUANTIZED
from export.graph_builder import GraphBuilder
from export.lazy_weight import Weight
from export.policy import PolicyExport, export_policy
from export.qdq import FP8, Reach, quantize_model
from export.weight_encoding import FLOAT8, HIGHEST_FLOAT8, Float8Encoding, as_float8, float8_scale
from segzero_rt.errors import ExportError
from segzero_rt.graph import Graph
from segzero_rt.graph_spec import GraphSpec, TensorSpec
from segzero_rt.policy import Policy, policy_specs

CODES = np.arange(256, dtype=np.uint8).view(FLOAT8)
"""All of them, two of which are no numbers."""
NUMBERS = np.sort(np.unique(CODES.astype(np.float32)[np.isfinite(CODES.astype(np.float32))]))
SUBNORMAL = 2.0**-9
"""The smallest number above 0."""
OPTIONS: dict[str, Any] = {
    "input_size_hw": (84, 84),
    "max_length": 500,
    "max_new_tokens": 8,
    "gate_questions": ("the red cup",),
    "gate_limits": replace(QUANTIZED, max_vision_error=0.3, max_decoder_error=0.6, min_top1=0.1),  # random weights
}

# --- numbers -------------------------------------------------------------------------------------------------------


def test_every_code_stays_itself() -> None:
    finite = CODES[np.isfinite(CODES.astype(np.float32))]
    assert len(finite) == 254
    np.testing.assert_array_equal(as_float8(finite.astype(np.float32)).view(np.uint8), finite.view(np.uint8))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(448.0, 448.0, id="largest"),
        pytest.param(464.0, 448.0, id="half-a-step-beyond"),
        pytest.param(465.0, 448.0, id="more-than-that"),
        pytest.param(-1e30, -448.0, id="far-below"),
        pytest.param(np.inf, 448.0, id="infinity"),
        pytest.param(17.0, 16.0, id="tie-to-even-below"),
        pytest.param(19.0, 20.0, id="tie-to-even-above"),
        pytest.param(SUBNORMAL / 2, 0.0, id="tie-to-zero"),
        pytest.param(SUBNORMAL * 0.51, SUBNORMAL, id="smallest"),
        pytest.param(SUBNORMAL * 1.5, SUBNORMAL * 2, id="tie-among-subnormals"),
        pytest.param(2.0**-6 - 2.0**-11, 2.0**-6, id="from-subnormal-to-normal"),
        pytest.param(-0.0, -0.0, id="negative-zero"),
    ],
)
def test_values_go_to_the_nearest_number(value: float, expected: float) -> None:
    found = as_float8(np.array([value], np.float32)).astype(np.float32)[0]
    assert found == expected and np.signbit(found) == np.signbit(expected)


def test_what_is_no_number_stays_none() -> None:
    assert np.isnan(as_float8(np.array([np.nan], np.float32)).astype(np.float32)).all()


def test_rounding_is_that_of_other_implementations() -> None:
    """Every number, the middle between each two, and their neighbours in float32."""
    middles = (NUMBERS[1:] + NUMBERS[:-1]) / 2
    both = np.concatenate([NUMBERS, middles]).astype(np.float32)
    values = np.concatenate([both, np.nextafter(both, np.float32(np.inf)), np.nextafter(both, np.float32(-np.inf))])
    values = values[np.abs(values) <= HIGHEST_FLOAT8]
    np.testing.assert_array_equal(as_float8(values).view(np.uint8), values.astype(FLOAT8).view(np.uint8))
    (node,) = [onnx.helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["y"])]
    graph = onnx.helper.make_graph(
        [node],
        "round",
        [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, [None])],
        [
            numpy_helper.from_array(np.float32(1.0), "step"),
            numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), "zero"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
    theirs = ReferenceEvaluator(model).run(None, {"x": values})[0]  # type: ignore[index]
    np.testing.assert_array_equal(as_float8(values).view(np.uint8), np.asarray(theirs).view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("largest", [0.0, 1e-30, 1e-5, 0.03, 448.0, 6e4])
def test_scales_are_normal_numbers_and_reach_the_largest_value(largest: float, dtype: type) -> None:
    scale = float8_scale(np.float32([largest]), np.dtype(dtype))
    assert scale.dtype == dtype and scale[0] >= np.finfo(dtype).smallest_normal
    reached = as_float8(np.float32([largest]) / scale.astype(np.float32)).astype(np.float32) * scale.astype(np.float32)
    assert reached[0] == pytest.approx(largest, rel=2.0**-4, abs=float(np.finfo(dtype).smallest_normal) * SUBNORMAL)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (31, 33), (129, 17)], ids=str)
def test_weights_are_rounded_row_by_row(shape: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, each with its own scale; a row of zeros stays one."""
    monkeypatch.setattr("export.lazy_weight.CHUNK_BYTES", 4 * shape[1] * 2)
    rng = np.random.default_rng(0)
    values = (rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 2, (shape[0], 1))).astype(np.float32)
    values[shape[0] // 2] = 0
    encoding = Float8Encoding("w", Weight.of(values), name="w:fp8", scale_name="w:scale", scale_dtype=dtype)
    parts = dict(encoding.pieces())
    assert [part.dtype for part in parts.values()] == [tensor.dtype for tensor in encoding.tensors]
    assert [part.shape for part in parts.values()] == [tensor.shape for tensor in encoding.tensors]
    scales = parts[1].astype(np.float32)
    np.testing.assert_array_equal(parts[0].view(np.uint8).T, (values / scales[:, None]).astype(FLOAT8).view(np.uint8))
    np.testing.assert_allclose(parts[0].astype(np.float32).T * scales[:, None], values, rtol=2**-4, atol=2e-7)
    assert not encoding.lossless


def test_a_damaged_weight_is_named() -> None:
    weight = Weight.of(np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(ExportError, match=r"finite weights, got .* in the/weight"):
        list(Float8Encoding("the/weight", weight, name="w:fp8", scale_name="w:scale").pieces())


# --- graphs --------------------------------------------------------------------------------------------------------


def two_products() -> tuple[onnx.ModelProto, GraphSpec]:
    """`x @ w` and `x @ w + b` of the same `x` behind a Transpose, in float32."""
    rng = np.random.default_rng(0)
    spec = GraphSpec(
        name="products",
        inputs=(TensorSpec("x", "float32", (1, "rows", 48)),),
        outputs=(TensorSpec("y", "float32", (1, "rows", 40)),),
    )
    builder = GraphBuilder(spec, storage="float32", fused=False, opset=FP8.opset)
    turned = builder.node("Transpose", [builder.reshape("x", [48, -1, 1])], perm=[2, 1, 0])
    products = [builder.linear(turned, name, rng.normal(size=(40, 48))) for name in ("one", "other")]
    builder.node("Add", products, output="y")
    return builder.model(), spec


def test_onnx_runtime_runs_it_as_the_reference_does(tmp_path: Path) -> None:
    """Left to itself, it would make operators of int8 of these, and refuse them."""
    model, spec = two_products()
    reach = {name: Reach.of(np.full(48, 4.0, np.float32), FP8.smoothing) for name in ("one", "other")}
    rounded = quantize_model(model, reach, FP8)
    onnx.checker.check_model(rounded, full_check=True)
    path = tmp_path / "rounded.onnx"
    onnx.save(rounded, str(path))
    x = np.random.default_rng(1).normal(size=(1, 5, 48)).astype(np.float32)
    x[0, 0, 0] = 1e6
    found = Graph.load(path, spec, backend="cpu").run({"x": x})["y"]
    exact = ReferenceEvaluator(model).run(None, {"x": x})[0]  # type: ignore[index]
    expected = ReferenceEvaluator(rounded).run(None, {"x": x})[0]  # type: ignore[index]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    error = np.linalg.norm(found[0, 1:] - exact[0, 1:]) / np.linalg.norm(exact[0, 1:])
    assert 1e-3 < error < 0.1
    assert np.abs(found[0, 0]).max() < 1e3, "what is beyond the range is held at its end"


def test_no_factor_stands_before_products_that_need_none() -> None:
    model, _ = two_products()
    peaks = np.geomspace(1e-3, 1e3, 48).astype(np.float32)
    operators = [node.op_type for node in quantize_model(model, {"one": Reach.of(peaks, 0.0)}, FP8).graph.node]
    assert "Mul" not in operators and operators.count("QuantizeLinear") == 1


# --- policies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["portable", "trt11"])
def fp8_policy(
    request: pytest.FixtureRequest, policy_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PolicyExport, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    exported = export_policy(
        policy_folders("grouped-heads"), folder, storage="fp8", flavour=request.param, computed="float16", **OPTIONS
    )
    return exported, folder


def test_products_are_float8_and_all_else_is_not(fp8_policy: tuple[PolicyExport, Path]) -> None:
    exported, _ = fp8_policy
    assert "float8" in exported.gate["emulated"]
    counts = {"vision": 3 * 7 + 1, "decoder": 2 * 5}
    for graph, last in {"vision": {"merger/fc2"}, "decoder": set[str]()}.items():
        model = onnx.load(str(exported.files[f"policy/{graph}.onnx"]))
        onnx.checker.check_model(model)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        made_by = {output: node for node in model.graph.node for output in node.output}
        rounded, floats = set(), set()
        for node in model.graph.node:
            sources = [made_by[name].op_type for name in node.input if name in made_by]
            if node.op_type in ("MatMul", "Gemm") and node.input[1].endswith(".weight"):
                product = node.input[1].removesuffix(".weight")
                (rounded if sources[:2] == ["DequantizeLinear"] * 2 else floats).add(product)
            elif node.op_type != "DequantizeLinear":
                assert "DequantizeLinear" not in sources, f"{node.name} reads what was rounded"
            if node.op_type == "QuantizeLinear":
                step, zero = (numpy_helper.to_array(weights[name]) for name in node.input[1:])
                assert zero.dtype == FLOAT8 and zero == 0 and step.dtype == np.float16
        assert floats == last and len(rounded) == counts[graph]
        assert {weights[f"{product}.weight:fp8"].data_type for product in rounded} == {TensorProto.FLOAT8E4M3FN}
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=graph == "vision")
        types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
        read = {name for node in model.graph.node if node.op_type == "QuantizeLinear" for name in node.input[:1]}
        assert {types[name] for name in read if name in types} == {TensorProto.FLOAT16}, "no casts around them"


def test_it_answers(fp8_policy: tuple[PolicyExport, Path]) -> None:
    exported, folder = fp8_policy
    policy = Policy.load(policy_bundle(exported, folder), backend="cpu", threads=1)
    assert policy.ask(policy.look(random_picture(1)), "the red cup", max_new_tokens=3).token_ids


def test_tensorrt_builds_it_for_devices_that_have_float8(fp8_policy: tuple[PolicyExport, Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
    from segzero_rt.engines.library import find_library
    from segzero_rt.engines.profiles import ProfileLimits, axis_lengths, make_profiles
    from segzero_rt.errors import EngineError

    exported, folder = fp8_policy
    lengths = axis_lengths(policy_bundle(exported, folder).manifest, ProfileLimits())
    written = exported.manifest.flavour == "trt11"  # its tower is the same
    for name, rounded in ({"decoder": 2 * 4} | ({} if written else {"vision": 3 * 4 + 1})).items():
        spec = policy_specs(exported.manifest)[name]

        def build(capability: str, name: str = name, spec: GraphSpec = spec, rounded: int = rounded) -> int:
            graph = parse_graph(find_library("tensorrt-rtx"), exported.files[f"policy/{name}.onnx"])
            assert isinstance(graph, ParsedGraph), [str(refusal) for refusal in graph]
            graph.check(spec)
            assert graph.precisions()["float8"] >= rounded, "codes of each tensor that is read"
            profiles = make_profiles(spec, graph.declared_inputs(), lengths[name])
            options = BuildOptions(compute_capabilities=(capability,))
            return len(graph.build(profiles, options, timing_cache=None, progress=lambda phase, share: None))

        assert build("8.9") > 10_000
        if name == "vision":  # the library's own word that the engine has products of float8, not floats in their place
            with pytest.raises(EngineError, match=r"sm86, because the model contains .* fp8_e4m3"):
                build("8.6")


def test_a_wrong_scale_is_caught(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Ranges of a sixteenth of what is there: most activations end at the highest code."""
    folder = policy_folders("grouped-heads")
    limits = {**OPTIONS, "gate_limits": replace(OPTIONS["gate_limits"], max_kl_mean=1e9)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.qdq.HEADROOM", 1 / 16)
        with pytest.raises(ExportError, match="vision_error"):
            export_policy(folder, tmp_path, storage="fp8", flavour="portable", computed="float16", **limits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"flavour": "ort"}, "flavour portable or trt11 for fp8 weights, got ort", id="flavour"),
        pytest.param({"int4_method": "awq"}, "storage int4 for 4 bits by awq, got fp8", id="awq"),
        pytest.param({"computed": "bfloat16"}, "computed in float32, float16, got 'bfloat16'", id="computed"),
    ],
)
def test_what_cannot_hold_it_is_said(
    options: dict[str, str], message: str, policy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    given = {"storage": "fp8", "flavour": "portable", **options, **OPTIONS}
    with pytest.raises(ExportError, match=message):
        export_policy(policy_folders("grouped-heads"), tmp_path, **given)
