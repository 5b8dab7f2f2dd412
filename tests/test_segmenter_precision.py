"""Image encoders in 16 bits: what stays in float32, planted overflows, and what the trained segmenter loses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported_segmenter import Exported

from segzero_rt.answer import Prompt
from segzero_rt.errors import ExportError
from segzero_rt.graph import Graph
from segzero_rt.mask import mask_iou, tight_boxes
from segzero_rt.segmenter import ImageEncoder, MaskDecoder

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")

from export.gate_segmenter import AsWritten, gate_pixels  # noqa: E402 - needs torch's absence to skip first
from export.segmenter import export_segmenter  # noqa: E402
from export.segmenter_encoder import build_image_encoder  # noqa: E402
from export.segmenter_precision import (  # noqa: E402
    check_range,
    in_16_bits,
    largest_activations,
    rounding_twin,
)
from export.segmenter_specs import segmenter_specs  # noqa: E402

TABLETOP = Path(__file__).resolve().parent.parent / "training/checkpoints/tabletop/segmenter"
ELEMENTS = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}


def encoder_of(model: Any, flavour: str = "portable") -> onnx.ModelProto:
    return build_image_encoder(model, segmenter_specs(model).encoder, flavour=flavour, storage="float32").model()


def run(model: onnx.ModelProto, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """As written: no optimisation that could drop a rounding."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": pixels}), strict=True))


def relative(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    return max(float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name])) for name in theirs)


@pytest.fixture(scope="module")
def exact(exported_segmenter: Exported) -> onnx.ModelProto:
    return encoder_of(exported_segmenter.model)


@pytest.fixture(scope="module")
def pixels(exported_segmenter: Exported) -> np.ndarray:
    return gate_pixels(exported_segmenter.graphs[0].spec)[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_are_in_16_bits_and_all_else_is_not(exact: onnx.ModelProto, dtype: str) -> None:
    lowered = in_16_bits(exact, dtype)
    inferred = onnx.shape_inference.infer_shapes(lowered, check_type=True, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in (*lowered.graph.input, *lowered.graph.output)}
    seen: dict[str, set[int]] = {}
    for node in lowered.graph.node:
        seen.setdefault(node.op_type, set()).add(types[node.output[0]])
    for op in ("MatMul", "Gemm", *(["Conv"] if dtype == "float16" else [])):
        assert seen[op] == {ELEMENTS[dtype]}, op
    for op in ("LayerNormalization", "Softmax", "Add", "Mul", "Erf"):
        assert seen[op] == {onnx.TensorProto.FLOAT}, op
    assert {types[value.name] for value in (*lowered.graph.input, *lowered.graph.output)} == {onnx.TensorProto.FLOAT}
    assert lowered.ByteSize() < 0.65 * exact.ByteSize()


@pytest.mark.parametrize(("dtype", "least", "most"), [("float16", 1e-5, 5e-3), ("bfloat16", 1e-3, 5e-2)])
@pytest.mark.parametrize("flavour", ["portable", "ort"])
def test_the_twin_rounds_as_much_as_the_precision_does(
    exported_segmenter: Exported, pixels: np.ndarray, flavour: str, dtype: str, least: float, most: float
) -> None:
    exact = encoder_of(exported_segmenter.model, flavour)
    assert least < relative(run(rounding_twin(exact, dtype), pixels), run(exact, pixels)) < most


def test_a_float16_file_loads_where_there_are_no_such_products(exact: onnx.ModelProto, pixels: np.ndarray) -> None:
    assert relative(run(in_16_bits(exact, "float16"), pixels), run(exact, pixels)) < 5e-3


@pytest.fixture(scope="module")
def overflowing(exported_segmenter: Exported) -> Any:
    """The tiny segmenter with an MLP whose hidden numbers pass 65504, and are scaled down again behind it."""
    model = copy.deepcopy(exported_segmenter.model)
    mlp = model.vision_encoder.backbone.blocks[2].mlp
    with torch.no_grad():
        mlp.proj_in.weight.mul_(3e5)
        mlp.proj_out.weight.div_(3e5)
    return model


def test_a_planted_overflow_is_caught_and_named(overflowing: Any, pixels: np.ndarray) -> None:
    exact = encoder_of(overflowing)
    peaks = largest_activations(exact, {"pixel_values": pixels})
    with pytest.raises(ExportError, match=r"blocks\.2/fc[12] of the image encoder reaches .*--segmenter-float32"):
        check_range(peaks)
    planted = ("blocks.2/fc1", "blocks.2/fc2")
    check_range(peaks, planted)
    assert {name for name, peak in peaks.items() if peak > 65504} == set(planted)
    want = run(exact, pixels)
    spoiled = run(rounding_twin(exact, "float16"), pixels)
    assert not all(np.isfinite(values).all() for values in spoiled.values()), "as it would be on a GPU"
    assert relative(run(rounding_twin(exact, "float16", float32_products=planted), pixels), want) < 5e-3
    assert relative(run(rounding_twin(exact, "bfloat16"), pixels), want) < 5e-2, "bfloat16 has float32's range"


def test_an_overflow_ends_the_export_before_anything_stands(overflowing: Any, tmp_path: Path) -> None:
    overflowing.save_pretrained(tmp_path / "hf")
    with pytest.raises(ExportError, match=r"blocks\.2/fc[12]"):
        export_segmenter(tmp_path / "hf", tmp_path / "out", computed="float16", flavour="portable")


REFUSED = [
    ("another precision", {"computed": "float8"}, "float32, float16, bfloat16"),
    ("int8 in 16 bits", {"computed": "float16", "storage": "int8"}, "stored as floats"),
    ("what float32 computes anyway", {"float32_products": ["blocks.0/fc1"]}, "computed in 16 bits"),
    ("no such product", {"computed": "bfloat16", "float32_products": ["blocks.0/fc9"]}, "expected a product .*fc9"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_precisions_that_cannot_be_are_refused(
    tiny_checkpoints: tuple[Path, Path], tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_segmenter(tiny_checkpoints[1], tmp_path, **options)


def test_weights_beyond_float16_are_refused(exact: onnx.ModelProto) -> None:
    damaged = onnx.ModelProto()
    damaged.CopyFrom(exact)
    tensor = next(one for one in damaged.graph.initializer if one.name == "blocks.0/fc1.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0, 0] = 1e5
    tensor.raw_data = values.tobytes()
    with pytest.raises(ExportError, match=r"blocks\.0/fc1\.weight has 1e\+05"):
        in_16_bits(damaged, "float16")


@pytest.mark.slow
@pytest.mark.skipif(not TABLETOP.is_dir(), reason="this checkout has no trained segmenter")
def test_the_trained_segmenter_keeps_its_masks(tmp_path: Path) -> None:
    """Design choice 4: mask IoU of at least 0.98 on each picture and 0.99 in the mean, given the same prompts."""
    from export.reference import TorchImageEncoder, TorchMaskDecoder
    from export.segmenter import segmenter_manifest
    from export.segmenter_checkpoint import load_checkpoint
    from training.scenes import random_scene

    model = load_checkpoint(TABLETOP)
    spec, manifest = segmenter_specs(model).encoder, segmenter_manifest(model, mask_prompts=False)
    exact = encoder_of(model)
    build_image_encoder(model, spec, flavour="ort", storage="int8").save(tmp_path / "int8.onnx")
    for dtype in ("float16", "bfloat16"):
        onnx.save(rounding_twin(exact, dtype), tmp_path / f"{dtype}.onnx")
    decoder = MaskDecoder(TorchMaskDecoder(model), manifest)  # one decoder for all: it stays in float32
    reference = ImageEncoder(TorchImageEncoder(model), manifest)
    graphs: dict[str, Any] = {name: AsWritten(tmp_path / f"{name}.onnx") for name in ("float16", "bfloat16")}
    graphs["int8"] = Graph.load(tmp_path / "int8.onnx", spec, backend="cpu")
    encoders = {name: ImageEncoder(_Embeddings(graph), manifest) for name, graph in graphs.items()}
    ious: dict[str, list[float]] = {name: [] for name in encoders}
    for index in range(12):
        scene = random_scene("test", 0, index)
        boxes = tight_boxes(np.stack([thing.mask for thing in scene.objects]))
        prompts = [Prompt(box_xyxy=tuple(map(float, box))) for box in boxes]
        want = decoder(reference(scene.image_rgb), prompts).masks
        for name, encoder in encoders.items():
            got = decoder(encoder(scene.image_rgb), prompts).masks
            ious[name].append(float(np.mean([mask_iou(one, other) for one, other in zip(got, want, strict=True)])))
    print({name: (round(min(values), 4), round(float(np.mean(values)), 4)) for name, values in ious.items()})
    for name, values in ious.items():
        assert min(values) >= 0.98, name
        assert np.mean(values) >= 0.99, name


class _Embeddings:
    """An encoder's graph whose outputs stand as PyTorch's decoder takes them."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def run(self, inputs: dict[str, Any], **_: Any) -> dict[str, Any]:
        features = self._graph.run(inputs)
        names = ("high_res_features_0", "high_res_features_1", "image_embeddings")
        return {"embeddings": [torch.from_numpy(features[name]) for name in names]}
