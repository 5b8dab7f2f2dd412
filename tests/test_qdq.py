"""Products in int8 by plain operators: their numbers, what stays out of it, and that TensorRT builds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

pytest.importorskip("torch", reason="exports checkpoints of PyTorch")

from policy_checkpoints import policy_bundle, random_picture

from export.gate import QUANTIZED
from export.graph_builder import GraphBuilder
from export.policy import PolicyExport, export_policy
from export.qdq import Reach, channel_peaks, quantize_model
from export.segmenter import export_segmenter
from segzero_rt.errors import ExportError
from segzero_rt.graph_spec import GraphSpec, TensorSpec
from segzero_rt.policy import Policy, policy_specs

REPOSITORY = Path(__file__).resolve().parent.parent
WIDTH = 96
OPTIONS: dict[str, Any] = {
    "input_size_hw": (84, 84),
    "max_length": 500,
    "max_new_tokens": 12,
    "gate_questions": ("the red cup",),
    "gate_limits": replace(QUANTIZED, max_vision_error=0.2, max_decoder_error=0.5, min_top1=0.2),  # random weights
}


def two_products(values: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """`x @ w` and `x @ w + b` of the same `x`, in float32."""
    spec = GraphSpec(
        name="products",
        inputs=(TensorSpec("x", "float32", ("rows", WIDTH)),),
        outputs=(TensorSpec("plain", "float32", ("rows", 40)), TensorSpec("biased", "float32", ("rows", 40))),
    )
    builder = GraphBuilder(spec, storage="float32", fused=False)
    builder.node("Identity", [builder.linear("x", "one", values)], output="plain")
    builder.node("Identity", [builder.linear("x", "other", values[::-1].copy(), bias, flat=True)], output="biased")
    return builder.model()


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


@pytest.fixture(scope="module")
def products() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    return two_products(rng.normal(size=(40, WIDTH)).astype(np.float32), rng.normal(size=40).astype(np.float32))


def outliers(rows: int = 50) -> np.ndarray:
    """Noise in which two channels are sixty times as large as the rest, as in a transformer's residual."""
    x = np.random.default_rng(1).normal(size=(rows, WIDTH)).astype(np.float32)
    x[:, [3, 70]] *= 60
    return x


def even(highest: float) -> Reach:
    """Codes of one step for all channels, as without evening out."""
    return Reach(np.ones(WIDTH, np.float32), highest)


def test_codes_are_those_of_onnx_runtimes_own_quantiser(products: onnx.ModelProto, tmp_path: Path) -> None:
    """Same weights in int8, same scales, same results, given the range that it measured."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = [{"x": outliers()}]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self._left.pop() if self._left else None

    onnx.save(products, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "theirs.onnx",
        Once(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        extra_options={"ActivationSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    theirs = onnx.load(tmp_path / "theirs.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in theirs.graph.initializer}
    step = next(array for name, array in arrays.items() if name.startswith("x_scale"))
    ours = quantize_model(products, {"one": even(float(step) * 127)})
    mine = {tensor.name: numpy_helper.to_array(tensor) for tensor in ours.graph.initializer}
    weights = next(array for array in arrays.values() if array.dtype == np.int8 and array.ndim == 2)
    np.testing.assert_array_equal(mine["one.weight:int8"], weights)
    np.testing.assert_allclose(
        mine["one.weight:scale"], next(a for n, a in arrays.items() if n.startswith("one.weight_scale")), rtol=1e-6
    )
    np.testing.assert_allclose(run(ours, outliers())[0], run(theirs, outliers())[0], rtol=1e-4, atol=1e-3)


def test_evened_channels_lose_less(products: onnx.ModelProto) -> None:
    x = outliers()
    exact = run(products, x)
    peaks = channel_peaks(products, {"x": x})
    np.testing.assert_array_equal(peaks["one"], np.abs(x).max(axis=0))

    def error(smoothing: float) -> float:
        quantized = quantize_model(products, {name: Reach.of(held, smoothing) for name, held in peaks.items()})
        pairs = zip(run(quantized, x), exact, strict=True)
        return max(float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in pairs)

    assert error(0.7) < 0.5 * error(0.0) < 0.1


def test_products_of_one_tensor_share_its_codes(products: onnx.ModelProto) -> None:
    peaks = channel_peaks(products, {"x": outliers()})
    together = quantize_model(products, {name: Reach.of(held) for name, held in peaks.items()})
    apart = quantize_model(products, {"one": even(1.0), "other": even(2.0)})
    counts = [[node.op_type for node in model.graph.node].count("QuantizeLinear") for model in (together, apart)]
    assert counts == [1, 2]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        pytest.param(np.array([1.0, np.inf], np.float32), "finite", id="overflow"),
        pytest.param(np.array([1.0, np.nan], np.float32), "finite", id="not-a-number"),
        pytest.param(np.zeros(2, np.float32), "got up to 0", id="nothing"),
    ],
)
def test_activations_without_a_range_are_refused(held: np.ndarray, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        Reach.of(held)


def test_a_product_that_is_not_there_is_named(products: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match="expected a product absent"):
        quantize_model(products, {"absent": even(1.0)})


# --- policies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "float16"])
def int8_policy(
    request: pytest.FixtureRequest, policy_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PolicyExport, Path, str]:
    """Of float16's all weights lie in files beside the graphs, as of a large policy."""
    folder = tmp_path_factory.mktemp("int8")
    external = request.param == "float16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.weight_store.INLINE_BYTES", 0 if external else 16 << 10)
        exported = export_policy(
            policy_folders("grouped-heads"),
            folder,
            storage="int8",
            flavour="portable",
            computed=request.param,
            external=external,
            **OPTIONS,
        )
    return exported, folder, request.param


def test_products_are_int8_and_all_else_is_not(int8_policy: tuple[PolicyExport, Path, str]) -> None:
    exported, _, computed = int8_policy
    wide = {"vision": {"merger/fc2"}, "decoder": set[str]()}
    for graph, last in wide.items():
        model = onnx.load(str(exported.files[f"policy/{graph}.onnx"]))
        onnx.checker.check_model(model)
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        made_by = {output: node for node in model.graph.node for output in node.output}
        products, floats = set(), set()
        for node in model.graph.node:
            sources = [made_by[name].op_type for name in node.input if name in made_by]
            if node.op_type in ("MatMul", "Gemm") and node.input[1].endswith(".weight"):
                product = node.input[1].removesuffix(".weight")
                (products if sources[:2] == ["DequantizeLinear"] * 2 else floats).add(product)
            elif node.op_type not in ("DequantizeLinear",):
                assert "DequantizeLinear" not in sources, f"{node.name} reads what was rounded to int8"
            if node.op_type == "QuantizeLinear":
                zero = numpy_helper.to_array(weights[node.input[2]])
                assert zero.dtype == np.int8 and zero == 0, "TensorRT takes no other"
        assert floats == last, graph
        assert len(products) == (3 * 7 + 1 if graph == "vision" else 2 * 5)
        kinds = {weights[f"{product}.weight:int8"].data_type for product in products}
        assert kinds == {TensorProto.INT8}
        if computed == "float16":
            inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
            types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
            softmax = {types[node.output[0]] for node in model.graph.node if node.op_type == "Softmax"}
            assert softmax == {TensorProto.FLOAT16}


def test_it_answers_and_a_token_does_not_depend_on_later_ones(int8_policy: tuple[PolicyExport, Path, str]) -> None:
    exported, folder, _ = int8_policy
    policy = Policy.load(policy_bundle(exported, folder), backend="cpu", threads=1)
    view = policy.look(random_picture(1))
    assert policy.ask(view, "the red cup", max_new_tokens=5).token_ids
    embeds = policy.embed(policy.question_tokens("the red cup"))
    logits = []
    for length in (embeds.shape[1], 7):
        view.cache.truncate(view.prefix_length)
        logits.append(view.cache.extend(embeds[:, :length], np.arange(length, dtype=np.int64)[None])[0])
    np.testing.assert_allclose(logits[0][:7], logits[1], atol=2e-2 * np.abs(logits[1]).max())


def test_weights_are_smaller_than_float16s(
    int8_policy: tuple[PolicyExport, Path, str], policy_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    exported = int8_policy[0]
    names = [name for name in exported.files if "decoder" in name]
    if int8_policy[2] == "float16":
        assert "policy/decoder.data" in names, "rounded up to pages there, which so small weights do not fill"
        return
    floats = export_policy(
        policy_folders("grouped-heads"), tmp_path, flavour="portable", **{**OPTIONS, "gate_limits": None}
    )
    ours = sum(exported.files[name].stat().st_size for name in names)
    assert ours < 0.9 * floats.files["policy/decoder.onnx"].stat().st_size, "nodes are most of so small a file"


def _engine_bytes(path: Path, spec: GraphSpec, lengths: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    from segzero_rt.engines.builder import BuildOptions, ParsedGraph, parse_graph
    from segzero_rt.engines.library import find_library
    from segzero_rt.engines.profiles import make_profiles

    graph = parse_graph(find_library("tensorrt-rtx"), path)
    assert isinstance(graph, ParsedGraph), [str(refusal) for refusal in graph]
    graph.check(spec)
    profiles = make_profiles(spec, graph.declared_inputs(), lengths)
    engine = graph.build(profiles, BuildOptions(), timing_cache=None, progress=lambda phase, share: None)
    return len(engine), graph.precisions()


def test_tensorrt_builds_the_policy(int8_policy: tuple[PolicyExport, Path, str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    from segzero_rt.engines.profiles import ProfileLimits, axis_lengths

    exported, folder, _ = int8_policy
    specs = policy_specs(exported.manifest)
    lengths = axis_lengths(policy_bundle(exported, folder).manifest, ProfileLimits())
    for name in ("vision", "decoder"):
        size, precisions = _engine_bytes(exported.files[f"policy/{name}.onnx"], specs[name], lengths[name])
        assert size > 10_000
        assert precisions["int8"] >= {"vision": 3 * 4 + 1, "decoder": 2 * 4}[name], "codes of each tensor that is read"


# --- segmenters ----------------------------------------------------------------------------------------------------


def test_a_segmenter_in_int8_passes_its_gate_and_is_built(tiny_checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    from export.segmenter_checkpoint import load_checkpoint
    from export.segmenter_specs import segmenter_specs

    pictures = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8) for seed in range(3)]
    options: dict[str, Any] = {"storage": "int8", "flavour": "portable"}
    with pytest.raises(ExportError, match="--calibration DATASET or --gate-images DIR"):
        export_segmenter(tiny_checkpoints[1], tmp_path, **options)
    exported = export_segmenter(tiny_checkpoints[1], tmp_path, **options, calibration=pictures)
    assert 1e-4 < exported.gate["max_feature_error"] < 0.1
    path = exported.files["segmenter/image_encoder.onnx"]
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("QuantizeLinear") > 10
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    spec = segmenter_specs(load_checkpoint(tiny_checkpoints[1])).encoder
    size, precisions = _engine_bytes(path, spec, {"picture": {"batch": (1, 1, 1)}})
    assert size > 10_000 and precisions["int8"] >= 10


@pytest.mark.slow
def test_the_shipped_segmenter_in_int8_keeps_masks_of_scenes_that_it_was_not_measured_on(tmp_path: Path) -> None:
    from segzero_rt.image import load_image
    from training.question_scenes import write_samples

    pictures = {}
    for split, seed, count in (("train", 21, 8), ("test", 22, 4)):
        write_samples(tmp_path / split, split, seed, count)
        pictures[split] = [load_image(path) for path in sorted((tmp_path / split / "images").iterdir())]
    exported = export_segmenter(
        REPOSITORY / "training/checkpoints/tabletop/segmenter",
        tmp_path / "out",
        storage="int8",
        flavour="portable",
        mask_prompts=False,
        calibration=pictures["train"],
        pictures=pictures["test"],
    )
    assert exported.gate["mean_mask_iou"] > 0.98, "the gate's own limit"
    assert exported.gate["max_feature_error"] < 0.05
