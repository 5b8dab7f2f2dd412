"""EdgeTAM: its graphs against its own weights in PyTorch, both kinds of checkpoint, and transformers' own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from segzero_rt.errors import ExportError
from segzero_rt.graph import Graph

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")

from export.edgetam import WIDTHS, RepVit, edgetam_model  # noqa: E402 - needs torch's absence to skip first
from export.segmenter_checkpoint import load_checkpoint  # noqa: E402
from export.segmenter_encoder import build_image_encoder  # noqa: E402
from export.segmenter_official import read_official  # noqa: E402
from export.segmenter_precision import in_16_bits, rounding_twin  # noqa: E402
from export.segmenter_specs import segmenter_specs  # noqa: E402

TESTS = Path(__file__).resolve().parent
PACKAGES = Path(os.environ.get("SEGZERO_SAM2", str(TESTS.parent / ".venv-sam2")))
NAMES = ("high_res_features_0", "high_res_features_1", "image_embeddings")


def small_model(side: int = 96) -> Any:
    """RepViT with few channels and blocks, no weight left at 0 or 1."""
    from transformers import Sam2Config, Sam2MaskDecoderConfig, Sam2PromptEncoderConfig, Sam2VisionConfig

    torch.manual_seed(0)
    widths = (16, 32, 48, 64)
    sizes = [[side // stride] * 2 for stride in (4, 8, 16)]
    config = Sam2Config(
        vision_config=Sam2VisionConfig(
            backbone_channel_list=list(reversed(widths)), backbone_feature_sizes=sizes, fpn_hidden_size=32
        ),
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=side),
        mask_decoder_config=Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=64, iou_head_hidden_dim=32),
    )
    model = edgetam_model(config, RepVit(widths, (1, 2, 3, 1)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_the_graph_is_the_backbone_with_its_norms_folded_in(tmp_path: Path, flavour: str) -> None:
    model = small_model()
    spec = segmenter_specs(model).encoder
    build_image_encoder(model, spec, flavour=flavour, storage="float32").save(tmp_path / "encoder.onnx")
    ops = {node.op_type for node in onnx.load(tmp_path / "encoder.onnx").graph.node}
    assert "BatchNormalization" not in ops
    pixels = np.random.default_rng(0).normal(0, 1, (2, 3, 96, 96)).astype(np.float32)
    ours = Graph.load(tmp_path / "encoder.onnx", spec, backend="cpu").run({"pixel_values": pixels})
    for name, theirs in zip(NAMES, model.get_image_embeddings(torch.from_numpy(pixels)), strict=True):
        assert relative(ours[name], theirs.numpy()) < 1e-5, name


def test_it_computes_in_float16_too() -> None:
    model = small_model()
    exact = build_image_encoder(model, segmenter_specs(model).encoder, flavour="portable", storage="float32").model()
    onnx.shape_inference.infer_shapes(in_16_bits(exact, "float16"), check_type=True, strict_mode=True)
    assert {node.op_type for node in rounding_twin(exact, "float16").graph.node} >= {"Conv", "Cast"}


Shapes = dict[str, list[int]]


def official_shapes() -> Shapes:
    """EdgeTAM's own names: SAM 2's but for the backbone and the neck's widths."""
    loaded: Shapes = json.loads((TESTS / "sam2_tensors.json").read_text())
    shapes = {name: shape for name, shape in loaded.items() if ".trunk." not in name}
    shapes |= {f"image_encoder.neck.convs.{i}.conv.weight": [256, w, 1, 1] for i, w in enumerate(reversed(WIDTHS))}
    state = RepVit().state_dict()
    return shapes | {f"image_encoder.trunk.body.{name}": list(tensor.shape) for name, tensor in state.items()}


def write(path: Path, shapes: Shapes) -> Path:
    """A checkpoint of the given shapes; every tensor is one number, however large it says to be."""
    torch.save({"model": {name: torch.tensor(0.5).expand(shape) for name, shape in shapes.items()}}, path)
    return path


def test_its_own_checkpoint_is_recognised(tmp_path: Path) -> None:
    path = write(tmp_path / "edgetam.pt", official_shapes())
    for config in (None, "edgetam"):
        model, name = read_official(path, config)
        assert name == "edgetam"
        assert isinstance(model.vision_encoder.backbone, RepVit)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


BROKEN: list[tuple[str, Callable[[Shapes], Shapes], str | None, str]] = [
    ("another model asked for", lambda shapes: shapes, "sam2_hiera_t", "got EdgeTAM"),
    (
        "a norm is missing",
        lambda shapes: {n: s for n, s in shapes.items() if not n.endswith("stem.conv2.bn.running_var")},
        None,
        "lacks vision_encoder.backbone.stem.conv2.bn.running_var",
    ),
    (
        "a stage of other width",
        lambda shapes: shapes | {"image_encoder.trunk.body.stages_3.blocks.0.se.fc1.bias": [95]},
        None,
        r"se.fc1.bias has shape \[95\], not \[96\]",
    ),
]


@pytest.mark.parametrize(("case", "change", "config", "message"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_broken_checkpoint_is_one_clear_error(
    tmp_path: Path, case: str, change: Callable[[Shapes], Shapes], config: str | None, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        read_official(write(tmp_path / "edgetam.pt", change(official_shapes())), config)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "edgetam"}')
    with pytest.raises(ExportError, match="lacks "):
        load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ExportError, match="expected a whole safetensors file"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(ExportError, match=r"expected model_type sam2 or .* got 'sam'"):
        load_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    not (PACKAGES / "timm").is_dir(), reason="timm is not in .venv-sam2 or SEGZERO_SAM2; `make test` puts it there"
)
def test_it_answers_as_transformers_does(tmp_path: Path) -> None:
    """True size, random weights: `EdgeTamModel` on timm's RepViT saves a folder and answers; so does what is read."""
    import edgetam_reference

    command = [sys.executable, str(TESTS / "edgetam_reference.py"), str(PACKAGES), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = np.load(tmp_path / "answers.npz")
    model = load_checkpoint(tmp_path / "hf")
    spec = segmenter_specs(model).encoder
    build_image_encoder(model, spec, flavour="portable", storage="float32").save(tmp_path / "encoder.onnx")
    pixels = edgetam_reference.pixels()
    ours = Graph.load(tmp_path / "encoder.onnx", spec, backend="cpu").run({"pixel_values": pixels})
    for name in NAMES:
        assert relative(ours[name], theirs[name]) < 1e-5, name
    with torch.no_grad():
        answer = model(
            image_embeddings=[torch.from_numpy(ours[name]) for name in NAMES],
            input_boxes=torch.from_numpy(theirs["boxes"]),
            multimask_output=True,
        )
    assert relative(answer.pred_masks.numpy(), theirs["logits"]) < 1e-5
    np.testing.assert_allclose(answer.iou_scores.numpy(), theirs["scores"], atol=1e-5)
