"""The segmenter's graphs and runtime against transformers' `Sam2Model`, with random weights at a tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported_segmenter import Exported
from PIL import Image

from segzero_rt.answer import Prompt
from segzero_rt.errors import ExportError, GraphError, ImageError
from segzero_rt.graph import Graph
from segzero_rt.graph_spec_segmenter import mask_decoder_spec
from segzero_rt.mask import masks_from_logits
from segzero_rt.operators import DOMAIN
from segzero_rt.segmenter import choose_masks

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; it comes with [export]")

from export import segmenter_encoder  # noqa: E402 - needs torch's absence to skip first
from export.gate_segmenter import EXACT, gate_pixels, gate_segmenter  # noqa: E402
from export.onnx_weights import store_weights_fp16  # noqa: E402
from export.segmenter import IR_VERSION, OPSET, export_mask_decoder, export_segmenter  # noqa: E402
from export.segmenter_encoder import build_image_encoder  # noqa: E402
from export.segmenter_specs import SegmenterFiles, segmenter_specs  # noqa: E402
from export.segmenter_windows import window_slots  # noqa: E402

NOTHING = -1


@pytest.fixture(scope="module")
def exported(exported_segmenter: Exported) -> Exported:
    return exported_segmenter


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


OPERATORS = [pytest.param(False, 1e-5, id="functions"), pytest.param(True, 1e-4, id="compiled where they can be")]
"""Whether compiled operators take the functions' place, and the largest error beside the features' deviation."""


@pytest.mark.parametrize(("operators", "tolerance"), OPERATORS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_encoder_is_that_of_sam2(exported: Exported, batch: int, operators: bool, tolerance: float) -> None:
    pixels = noise(batch, batch, 3, *exported.manifest.input_size_hw)
    spec = segmenter_specs(exported.model).encoder
    ours = Graph.load(exported.files.encoder, spec, backend="cpu", operators=operators).run({"pixel_values": pixels})
    maps = exported.model.get_image_embeddings(torch.from_numpy(pixels))
    for name, theirs in zip(("high_res_features_0", "high_res_features_1", "image_embeddings"), maps, strict=True):
        np.testing.assert_allclose(ours[name], theirs.numpy(), atol=tolerance * float(theirs.std()), err_msg=name)


SIZES = [
    ("windows fit", {"side": 64, "stage_windows": (4, 2, 4, 2), "global_blocks": (3,)}),
    ("windows reach beyond the map", {"side": 96, "stage_windows": (8, 4, 14, 7), "global_blocks": (3,)}),
    ("they do so more than once", {"side": 160, "stage_windows": (8, 4, 14, 7), "global_blocks": (3,)}),
    ("no window at all in the third stage", {"side": 64, "stage_windows": (8, 4, 4, 2), "global_blocks": (3, 4)}),
]


@pytest.mark.parametrize(("operators", "tolerance"), OPERATORS)
@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize(("name", "size"), SIZES, ids=[name for name, _ in SIZES])
def test_the_encoder_of_any_size_and_flavour_is_that_of_sam2(
    tmp_path: Path, name: str, size: dict[str, Any], flavour: str, operators: bool, tolerance: float
) -> None:
    from training.segmenter_model import SegmenterSize, build_segmenter

    torch.manual_seed(0)
    widths = {"stage_dims": (16, 32, 64, 96), "stage_blocks": (1, 1, 3, 2), "stage_heads": (1, 1, 2, 2)}
    model = build_segmenter(SegmenterSize(**widths, decoder_dim=32, **size)).eval()
    for parameter in model.parameters():  # biases and norms are 0 and 1 in a new model, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    spec = segmenter_specs(model).encoder
    build_image_encoder(model, spec, flavour=flavour, storage="float32").save(tmp_path / "encoder.onnx")
    domains = {entry.domain for entry in onnx.load(tmp_path / "encoder.onnx").opset_import}
    assert domains == ({"", "com.microsoft", DOMAIN} if flavour == "ort" else {""}), (
        "portable has plain operators alone"
    )
    pixels = noise(1, 2, 3, *spec.inputs[0].shape[2:])
    graph = Graph.load(tmp_path / "encoder.onnx", spec, backend="cpu", operators=operators)
    ours = graph.run({"pixel_values": pixels})
    fine, middle, coarse = model.get_image_embeddings(torch.from_numpy(pixels))
    for output, theirs in (
        ("image_embeddings", coarse),
        ("high_res_features_0", fine),
        ("high_res_features_1", middle),
    ):
        want = theirs.numpy()
        np.testing.assert_allclose(ours[output], want, atol=tolerance * want.std(), err_msg=output)


HEADWISE = [
    ("small windows of few heads, pooled and not", {}, 3),
    ("no window is small", {"SMALL_WINDOW": 0}, 7),
    ("one head alone is few", {"FEW_HEADS": 1}, 5),
]


@pytest.mark.parametrize(("name", "rule", "fused"), HEADWISE, ids=[name for name, *_ in HEADWISE])
def test_head_by_head_is_as_all_heads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rule: dict[str, int], fused: int
) -> None:
    from training.segmenter_model import SegmenterSize, build_segmenter

    torch.manual_seed(0)
    widths = {"stage_dims": (16, 32, 64, 96), "stage_blocks": (1, 1, 3, 2), "stage_heads": (1, 1, 2, 2)}
    windows = {"side": 160, "stage_windows": (8, 4, 10, 5), "global_blocks": (3,)}
    model = build_segmenter(SegmenterSize(**widths, decoder_dim=32, **windows)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for constant, value in rule.items():
        monkeypatch.setattr(segmenter_encoder, constant, value)
    spec = segmenter_specs(model).encoder
    build_image_encoder(model, spec, flavour="ort", storage="float32").save(tmp_path / "encoder.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "encoder.onnx").graph.node]
    assert kinds.count("MultiHeadAttention") == fused
    pixels = noise(1, 2, 3, *spec.inputs[0].shape[2:])
    graph = Graph.load(tmp_path / "encoder.onnx", spec, backend="cpu", operators=False)
    ours = graph.run({"pixel_values": pixels})
    want = model.get_image_embeddings(torch.from_numpy(pixels))[-1].numpy()
    np.testing.assert_allclose(ours["image_embeddings"], want, atol=1e-5 * want.std())


PARTS = [("as a whole", 1 << 40, 1), ("stages 1 and 2 in three", 60_000, 3), ("no part is small enough", 1 << 10, 1)]


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize(("name", "piece_bytes", "parts"), PARTS, ids=[name for name, *_ in PARTS])
def test_the_first_blocks_in_parts_are_as_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, piece_bytes: int, parts: int, storage: str
) -> None:
    from training.segmenter_model import SegmenterSize, build_segmenter

    torch.manual_seed(0)
    widths = {"stage_dims": (16, 64, 96, 128), "stage_blocks": (1, 2, 2, 1), "stage_heads": (1, 2, 2, 2)}
    windows = {"side": 96, "stage_windows": (8, 4, 6, 3), "global_blocks": (4,)}
    model = build_segmenter(SegmenterSize(**widths, decoder_dim=64, **windows)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(segmenter_encoder, "PIECE_BYTES", piece_bytes)
    spec = segmenter_specs(model).encoder
    build_image_encoder(model, spec, flavour="ort", storage=storage).save(tmp_path / "encoder.onnx")
    nodes = onnx.load(tmp_path / "encoder.onnx").graph
    norms = [node.input[1] for node in nodes.node if node.op_type == "LayerNormalization"]
    assert [norms.count(f"blocks.{block}/norm1.weight") for block in range(4)] == [parts, parts, parts, 1]
    names = [tensor.name for tensor in nodes.initializer]
    assert len(names) == len(set(names)), "parts share their weights"
    pixels = noise(1, 2, 3, *spec.inputs[0].shape[2:])
    graph = Graph.load(tmp_path / "encoder.onnx", spec, backend="cpu", operators=storage == "int8")
    ours = graph.run({"pixel_values": pixels})
    for output, theirs in zip(
        ("high_res_features_0", "high_res_features_1", "image_embeddings"),
        model.get_image_embeddings(torch.from_numpy(pixels)),
        strict=True,
    ):
        error = np.linalg.norm(ours[output] - theirs.numpy()) / np.linalg.norm(theirs.numpy())
        assert error < (1e-5 if storage == "float32" else 0.05), output


FOLDS = [
    ("one head as wide as the input", {"width": 48, "head_dim": 48, "out_width": 48, "queries": 64}, (True, True)),
    ("pooled, two heads", {"width": 48, "head_dim": 48, "out_width": 96, "queries": 16}, (True, True)),
    ("two heads, not pooled", {"width": 96, "head_dim": 48, "out_width": 96, "queries": 64}, (False, False)),
    ("a wide projection", {"width": 96, "head_dim": 48, "out_width": 1024, "queries": 16}, (True, False)),
]


@pytest.mark.parametrize(("name", "sizes", "folds"), FOLDS, ids=[name for name, *_ in FOLDS])
def test_keys_and_values_are_folded_where_that_takes_fewer_products(
    name: str, sizes: dict[str, int], folds: tuple[bool, bool]
) -> None:
    chosen = segmenter_encoder.Folds.of_fewest_products(slots=64, **sizes)
    assert (chosen.keys, chosen.values) == folds


def test_windows_cover_the_map_once_and_pool_on_an_axis() -> None:
    slots = window_slots((6, 4), (4, 4), 2)  # two windows, the lower one half beyond the map
    assert slots.shape == (2, 16)
    assert sorted(slots[slots >= 0].tolist()) == list(range(24))
    assert slots[0].reshape(4, 4)[:, 0].tolist() == [0, 1, 4, 5], "the members of the first 2 x 2 neighbourhood"
    assert np.count_nonzero(slots[1] < 0) == 8
    assert window_slots((2, 3), (2, 3), 1).tolist() == [[0, 1, 2, 3, 4, 5]], "what has no halves stands row by row"
    with pytest.raises(ExportError, match="pooling divides"):
        window_slots((6, 6), (3, 3), 2)


def test_an_int8_encoder_is_smaller_and_nearly_the_same(exported: Exported, tmp_path: Path) -> None:
    spec = segmenter_specs(exported.model).encoder
    build_image_encoder(exported.model, spec, flavour="ort", storage="int8").save(tmp_path / "encoder.onnx")
    assert (tmp_path / "encoder.onnx").stat().st_size < 0.6 * exported.files.encoder.stat().st_size
    kinds = {node.op_type for node in onnx.load(tmp_path / "encoder.onnx").graph.node}
    assert {"DynamicQuantizeLinear", "MatMulIntegerToFloat", "Gemm"} <= kinds, "narrow products stay in float"
    assert {"Mlp", "Int8Mlp", "HeadAttention"} <= kinds, "what compiled operators take"
    pixels = noise(4, 1, 3, *exported.manifest.input_size_hw)
    want = exported.graphs[0].run({"pixel_values": pixels})
    for operators in (False, True):
        graph = Graph.load(tmp_path / "encoder.onnx", spec, backend="cpu", operators=operators)
        ours = graph.run({"pixel_values": pixels})
        for name, values in want.items():
            error = np.linalg.norm(ours[name] - values) / np.linalg.norm(values)
            assert 0 < error < 0.05, (name, operators)


def test_the_shipped_segmenter_in_int8_passes_its_gate_without_pictures_given(tmp_path: Path) -> None:
    checkpoint = Path(__file__).resolve().parent.parent / "training/checkpoints/tabletop/segmenter"
    gate = export_segmenter(checkpoint, tmp_path, storage="int8", mask_prompts=False).gate
    assert gate["mean_mask_iou"] > 0.98 and gate["min_mask_iou"] > 0.9


LABELS = [
    ("a box", [2, 3]),
    ("a box and a point", [2, 3, 1]),
    ("a box, points in and out", [2, 3, 1, 0, 1]),
    ("a point", [1]),
    ("points in and out", [1, 0]),
    ("corners after the point", [1, 2, 3]),
]


@pytest.mark.parametrize(("batch", "objects"), [(1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize(("name", "labels"), LABELS, ids=[name for name, _ in LABELS])
def test_decoder_is_that_of_sam2(exported: Exported, batch: int, objects: int, name: str, labels: list[int]) -> None:
    side = exported.manifest.input_size_hw[0]
    pixels = noise(7, batch, 3, side, side)
    points_xy = np.random.default_rng(8).uniform(-3, side + 3, (batch, objects, len(labels), 2)).astype(np.float32)
    marks = np.tile(np.array(labels, np.int64), (batch, objects, 1))
    with torch.no_grad():
        inputs = {"input_points": torch.from_numpy(points_xy), "input_labels": torch.from_numpy(marks)}
        several = exported.model(pixel_values=torch.from_numpy(pixels), **inputs, multimask_output=True)
        single = exported.model(pixel_values=torch.from_numpy(pixels), **inputs, multimask_output=False)
    features = exported.graphs[0].run({"pixel_values": pixels})
    filled_xy = np.concatenate([points_xy, np.zeros((batch, objects, 1, 2), np.float32)], axis=2)
    filled = np.concatenate([marks, np.full((batch, objects, 1), NOTHING)], axis=2)
    ours = exported.graphs[1].run({**features, "points_xy": filled_xy, "labels": filled})
    tolerance = 1e-4 * float(several.pred_masks.std())
    np.testing.assert_allclose(ours["mask_logits"][:, :, 1:], several.pred_masks.numpy(), atol=tolerance)
    np.testing.assert_allclose(ours["iou_scores"][:, :, 1:], several.iou_scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours["object_logits"], several.object_score_logits.numpy(), atol=1e-5)
    for index in range(batch):  # the host's choice among the four is SAM 2's own when it wants a single mask
        chosen, scores = choose_masks(ours["mask_logits"][index], ours["iou_scores"][index], multimask=False)
        np.testing.assert_allclose(chosen, single.pred_masks[index, :, 0].numpy(), atol=tolerance)
        np.testing.assert_allclose(scores, single.iou_scores[index, :, 0].numpy(), atol=1e-5)


HEADS = [
    ("as large as the others", {}),
    ("wider scores", {"iou_head_hidden_dim": 48}),
    ("deeper scores", {"iou_head_depth": 4}),
    ("one layer, two heads", {"num_hidden_layers": 1, "num_attention_heads": 2}),
]


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize(("name", "sizes"), HEADS, ids=[name for name, _ in HEADS])
def test_the_decoder_of_any_sizes_and_flavour_is_that_of_sam2(
    tmp_path: Path, name: str, sizes: dict[str, int], flavour: str
) -> None:
    from training.segmenter_model import SegmenterSize

    torch.manual_seed(0)
    widths = {"stage_dims": (16, 32, 64, 96), "stage_blocks": (1, 1, 1, 1), "stage_heads": (1, 1, 2, 2)}
    config = SegmenterSize(**widths, side=64, stage_windows=(4, 2, 4, 2), global_blocks=(), decoder_dim=32).config()
    for key, value in sizes.items():
        setattr(config.mask_decoder_config, key, value)
    model = transformers.Sam2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    specs, files = segmenter_specs(model), SegmenterFiles(encoder=tmp_path / "e.onnx", decoder=tmp_path / "d.onnx")
    build_image_encoder(model, specs.encoder, flavour=flavour, storage="float32").save(files.encoder)
    export_mask_decoder(model, files.decoder, storage="float32", flavour=flavour)
    domains = {entry.domain for entry in onnx.load(files.decoder).opset_import}
    assert domains == ({"", "com.microsoft"} if flavour == "ort" else {""}), "portable has plain operators alone"
    record = gate_segmenter(model, files, pixels=gate_pixels(specs.encoder), limits=EXACT)
    assert record["max_logit_error"] < 3e-5 and record["max_score_error"] < 1e-5


def test_a_box_as_points_is_a_box(exported: Exported) -> None:
    """transformers takes boxes apart from points; both ways must be one."""
    side = exported.manifest.input_size_hw[0]
    pixels = torch.from_numpy(noise(3, 1, 3, side, side))
    box = torch.tensor([[[4.0, 6.0, 40.0, 50.0], [1.0, 2.0, 3.0, 60.0]]])
    with torch.no_grad():
        theirs = exported.model(pixel_values=pixels, input_boxes=box, multimask_output=True)
    features = exported.graphs[0].run({"pixel_values": pixels.numpy()})
    points_xy = np.concatenate([box.numpy().reshape(1, 2, 2, 2), np.zeros((1, 2, 1, 2), np.float32)], axis=2)
    labels = np.tile(np.array([2, 3, NOTHING], np.int64), (1, 2, 1))
    ours = exported.graphs[1].run({**features, "points_xy": points_xy, "labels": labels})
    np.testing.assert_allclose(ours["mask_logits"][:, :, 1:], theirs.pred_masks.numpy(), atol=1e-5)


PICTURES = [(64, 64), (1, 1), (3, 500), (333, 5), (47, 61), (480, 641)]


@pytest.mark.parametrize("size_hw", PICTURES, ids=str)
def test_runtime_masks_are_those_of_torch(exported: Exported, size_hw: tuple[int, int]) -> None:
    """Picture and prompts in source pixels in, masks in the source's size out: all of it against PyTorch."""
    height, width = size_hw
    image_rgb = picture(1, height, width)
    rng = np.random.default_rng(2)
    prompts = []
    for count in (0, 2, 1, 0):  # different numbers of points, so that the runtime has to group and put back in order
        left, top = rng.uniform(0, width * 0.6), rng.uniform(0, height * 0.6)
        box = (left, top, left + 0.4 * width, top + 0.4 * height)
        points = tuple((float(rng.uniform(0, width)), float(rng.uniform(0, height))) for _ in range(count))
        prompts.append(Prompt(box_xyxy=box, points_xy=points))
    ours = exported.decoder(exported.encoder(image_rgb), prompts)
    assert ours.masks.shape == (4, height, width)
    for index, prompt in enumerate(prompts):
        logits, score = torch_answer(exported, image_rgb, prompt)
        np.testing.assert_allclose(ours.logits[index], logits, atol=1e-4)
        assert ours.scores[index] == pytest.approx(score, abs=1e-5)
        np.testing.assert_array_equal(ours.masks[index], masks_from_logits(ours.logits[index][None], size_hw)[0])


def torch_answer(exported: Exported, image_rgb: np.ndarray, prompt: Prompt) -> tuple[np.ndarray, float]:
    """One prompt through `Sam2Model`: the best scored of the three masks."""
    side = exported.manifest.input_size_hw[0]
    scale_xy = np.array([side / image_rgb.shape[1], side / image_rgb.shape[0]])
    narrowed = Image.fromarray(image_rgb).resize((side, image_rgb.shape[0]), Image.Resampling.BILINEAR)  # rows first
    resized = np.asarray(narrowed.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    pixels = (resized / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    inputs: dict[str, Any] = {"pixel_values": torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()}
    inputs["input_boxes"] = torch.tensor(np.reshape(prompt.box_xyxy, (2, 2)) * scale_xy).float().reshape(1, 1, 4)
    if prompt.points_xy:
        inputs["input_points"] = torch.tensor(np.array(prompt.points_xy) * scale_xy).float()[None, None]
        inputs["input_labels"] = torch.ones(1, 1, len(prompt.points_xy), dtype=torch.int64)
    with torch.no_grad():
        output = exported.model(**inputs, multimask_output=True)
    best = int(output.iou_scores[0, 0].argmax())
    return output.pred_masks[0, 0, best].numpy(), float(output.iou_scores[0, 0, best])


def test_no_prompts_give_no_masks(exported: Exported) -> None:
    result = exported.decoder(exported.encoder(picture(1, 20, 30)), [])
    assert result.masks.shape == (0, 20, 30)
    assert result.scores.shape == result.object_logits.shape == (0,)


def test_one_embedding_serves_many_prompts(exported: Exported) -> None:
    """A prompt's mask does not depend on which prompts stand beside it."""
    embedding = exported.encoder(picture(5, 40, 40))
    prompts = [Prompt(box_xyxy=(i, i, i + 12, i + 9)) for i in range(6)]
    together = exported.decoder(embedding, prompts)
    for index, prompt in enumerate(prompts):
        np.testing.assert_allclose(exported.decoder(embedding, [prompt]).logits[0], together.logits[index], atol=1e-5)


NOT_PICTURES = [
    ("grey", np.zeros((4, 4), np.uint8)),
    ("RGBA", np.zeros((4, 4, 4), np.uint8)),
    ("float", np.zeros((4, 4, 3), np.float32)),
    ("no rows", np.zeros((0, 4, 3), np.uint8)),
]


@pytest.mark.parametrize(("name", "array"), NOT_PICTURES, ids=[name for name, _ in NOT_PICTURES])
def test_what_is_no_picture_is_refused(exported: Exported, name: str, array: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"expected (a picture|at least one pixel)"):
        exported.encoder(array)


def test_the_best_score_is_taken_and_the_single_mask_only_when_stable() -> None:
    logits = np.zeros((2, 4, 2, 2), np.float32)
    logits[:, :] = np.arange(1, 5, dtype=np.float32)[:, None, None]  # mask k is k + 1 everywhere
    logits[1, 0] = 0.01  # inside the band around 0: unstable
    scores = np.array([[0.9, 0.1, 0.3, 0.2], [0.9, 0.4, 0.3, 0.2]], np.float32)
    several, several_scores = choose_masks(logits, scores, multimask=True)
    assert several[:, 0, 0].tolist() == [3.0, 2.0]
    np.testing.assert_allclose(several_scores, [0.3, 0.4])
    single, single_scores = choose_masks(logits, scores, multimask=False)
    assert single[:, 0, 0].tolist() == [1.0, 2.0]
    np.testing.assert_allclose(single_scores, [0.9, 0.4])


def test_graphs_load_in_the_oldest_runtime_that_is_supported(exported: Exported) -> None:
    for path in (exported.files.encoder, exported.files.decoder, exported.files.mask_prompt):
        model = onnx.load(path)
        assert model.ir_version == IR_VERSION <= 10
        assert {entry.domain: entry.version for entry in model.opset_import}[""] <= OPSET


def test_a_graph_of_another_size_is_refused(exported: Exported) -> None:
    with pytest.raises(GraphError, match="mask_decoder"):
        Graph.load(exported.files.decoder, mask_decoder_spec(mask_size_hw=(32, 32)), backend="cpu")


def test_the_gate_notices_a_wrong_weight(exported: Exported, tmp_path: Path) -> None:
    damaged = onnx.load(exported.files.decoder)
    largest = max(damaged.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(largest).copy()
    values *= 1.05
    largest.raw_data = values.tobytes()
    onnx.save(damaged, tmp_path / "damaged.onnx")
    with pytest.raises(ExportError, match="no bundle was written"):
        files = SegmenterFiles(encoder=exported.files.encoder, decoder=tmp_path / "damaged.onnx")
        gate_segmenter(exported.model, files, pixels=gate_pixels(exported.graphs[0].spec), limits=EXACT)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json"):
        export_segmenter(tmp_path, tmp_path / "out")
    with pytest.raises(ExportError, match="float16, float32, int8"):
        export_segmenter(tmp_path, tmp_path / "out", storage="int4")
    assert not (tmp_path / "out").exists(), "nothing half-written"


def small_graph(weight: np.ndarray) -> onnx.ModelProto:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "small",
        [value("x", onnx.TensorProto.FLOAT, [1, weight.shape[0]])],
        [value("y", onnx.TensorProto.FLOAT, [1, weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def test_fp16_storage_rounds_weights_and_nothing_else() -> None:
    import onnxruntime

    weight, x = noise(1, 40, 40), noise(2, 1, 40)
    model = store_weights_fp16(small_graph(weight))
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT16
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = x @ weight.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)


def test_fp16_storage_leaves_small_and_named_weights_alone() -> None:
    for model in (
        store_weights_fp16(small_graph(noise(1, 32, 32))),
        store_weights_fp16(small_graph(noise(1, 40, 40)), keep=frozenset({"w"})),
    ):
        assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT
        assert len(model.graph.node) == 1


@pytest.mark.parametrize("value", [70_000.0, -70_000.0, float("inf"), float("nan")])
def test_fp16_storage_refuses_what_does_not_fit(value: float) -> None:
    weight = noise(1, 40, 40)
    weight[3, 3] = value
    with pytest.raises(ExportError, match="fp16's range"):
        store_weights_fp16(small_graph(weight))


def test_the_gate_sees_a_nan_behind_a_number(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = Graph.run, []

    def spoiled(self: Graph, inputs: Any) -> Any:
        outputs = run(self, inputs)
        if "mask_logits" in outputs:
            calls.append(1)
            outputs["iou_scores"] = outputs["iou_scores"] * (np.nan if len(calls) == 3 else 1)
        return outputs

    monkeypatch.setattr(Graph, "run", spoiled)
    with pytest.raises(ExportError, match="max_score_error nan"):
        gate_segmenter(exported.model, exported.files, pixels=gate_pixels(exported.graphs[0].spec), limits=EXACT)


@pytest.mark.slow
def test_the_published_tiny_size_exports_and_passes_its_gate(tmp_path: Path) -> None:
    """SAM 2.1 Hiera-tiny at its true size (38.9 M parameters, 1024 x 1024), with random weights."""
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(0)
    Sam2Model(Sam2Config()).save_pretrained(tmp_path / "hf")
    result = export_segmenter(tmp_path / "hf", tmp_path / "out", storage="float32")
    assert result.manifest.input_size_hw == (1024, 1024)
    assert result.manifest.mask_size_hw == (256, 256)
    assert result.gate["max_logit_error"] < 1e-3
