"""Qwen3-VL, the second family: what it has that Qwen2.5-VL has not, and that no caller has to know which he asks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

import torch
from policy_checkpoints import policy_bundle, random_picture, write_checkpoint
from test_policy_streaming import changed

from export.command import assemble, qwen3_vl
from export.gate import EXACT, FOUR_BITS
from export.gate_layers import gate_policy_layers
from export.policy import PolicyExport, export_policy
from export.policy_checkpoint import PolicyCheckpoint
from export.policy_graphs import PolicyGraphWriter, Precision
from segzero_rt.answer import AnswerStatus
from segzero_rt.bundle import Bundle, write_bundle
from segzero_rt.errors import ExportError
from segzero_rt.pipeline import SegZero
from segzero_rt.policy import Generation, Policy

SIZE = (160, 224)
"""Five by seven tokens of 32 pixels."""
OPTIONS: dict[str, Any] = {"input_size_hw": SIZE, "max_length": 600, "max_new_tokens": 24}
HIDDEN = 64


@pytest.fixture(scope="module")
def hf(policy_folders: Callable[[str], Path]) -> Path:
    return policy_folders("qwen3-vl")


@pytest.fixture(scope="module", params=["ort", "portable"])
def exported(request: pytest.FixtureRequest, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was exported, gated layer by layer, and its folder."""
    folder = tmp_path_factory.mktemp("qwen3")
    return export_policy(hf, folder, flavour=request.param, external=True, gate_layers=True, **OPTIONS), folder


def test_every_layer_equals_pytorch(exported: tuple[PolicyExport, Path]) -> None:
    gate = exported[0].gate
    assert gate["layers"] == 3 + 1 + 3 + 1 + 2, "blocks, merger, layers, norm, and both ends"
    assert gate["vision_error"] < 1e-5
    assert gate["decoder_error"] < 1e-5
    assert gate["top1"] == 1.0


def test_the_manifest_tells_what_the_family_does_otherwise(exported: tuple[PolicyExport, Path]) -> None:
    manifest = exported[0].manifest
    assert (manifest.deepstack, manifest.position_side, manifest.mrope_interleaved) == (2, 7, True)
    assert manifest.answer_size_hw == (1000, 1000)
    assert manifest.image_mean == manifest.image_std == (0.5, 0.5, 0.5)
    assert manifest.head_dim * manifest.num_heads != manifest.hidden_size, "or nothing here tells them apart"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_depth_of_the_tower_reaches_the_decoder(exported: tuple[PolicyExport, Path], depth: int) -> None:
    policy = Policy.load(policy_bundle(*exported), backend="cpu", threads=1)
    assert not policy.embed([5, 6])[..., HIDDEN:].any(), "nothing is added behind text"

    def logits(weight: float) -> np.ndarray:
        view = policy.look(random_picture(0), ahead=False)
        assert view.pending is not None
        view.pending[..., depth * HIDDEN : (depth + 1) * HIDDEN] *= weight
        return view.cache.extend(view.pending, np.array([[view.pending.shape[1] - 1]]))

    assert np.abs(logits(1.0) - logits(0.5)).max() > 1e-3


@pytest.mark.parametrize(
    ("ending", "named"),
    [
        ("pos_embed.weight", "vision/blocks.0"),
        ("patch_embed.proj.bias", "vision/blocks.0"),
        ("blocks.1.mlp.linear_fc2.weight", "vision/blocks.2"),
        ("deepstack_merger_list.1.linear_fc2.weight", "vision/end"),
        ("merger.norm.weight", "vision/end"),
        ("layers.0.self_attn.q_norm.weight", "decoder/layers.1"),
        ("layers.1.self_attn.k_norm.weight", "decoder/layers.2"),
    ],
)
def test_the_layer_behind_a_changed_weight_is_named(
    exported: tuple[PolicyExport, Path], hf: Path, tmp_path: Path, ending: str, named: str
) -> None:
    """The graphs against a checkpoint in which one tensor has another sign."""
    export, _ = exported
    graphs = PolicyGraphWriter(
        PolicyCheckpoint(hf), tmp_path, Precision(), flavour=export.manifest.flavour, input_size_hw=SIZE
    )
    graphs.plan()
    graphs.write()
    shutil.copyfile(hf / "tokenizer.json", tmp_path / "tokenizer.json")

    def negate(weights: dict[str, torch.Tensor]) -> None:
        weights[next(key for key in sorted(weights) if key.endswith(ending))].neg_()

    other = PolicyCheckpoint(changed(hf, tmp_path / "hf", negate))
    with pytest.raises(ExportError, match=f"what enters {named} by"):
        gate_policy_layers(other, export.manifest, graphs, limits=EXACT)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_fewer_bits_answer_and_are_smaller(hf: Path, tmp_path: Path, storage: str) -> None:
    """Random weights, so that what it says means nothing."""
    loose = replace(FOUR_BITS, max_vision_error=0.2, max_decoder_error=1.3, max_kl=99.0, max_kl_mean=3.0, min_top1=0.0)
    few = export_policy(hf, tmp_path / "few", storage=storage, gate_limits=loose, **OPTIONS)
    half = export_policy(hf, tmp_path / "half", **OPTIONS)
    sizes = [one.files["policy/decoder.onnx"].stat().st_size for one in (few, half)]
    assert sizes[0] < 0.75 * sizes[1]
    policy = Policy.load(policy_bundle(few, tmp_path / "few"), backend="cpu", threads=1)
    assert policy.answer(random_picture(1), "the red cup", max_new_tokens=5).token_ids


def test_a_graph_computed_in_float16_stays_near(hf: Path, tmp_path: Path) -> None:
    gate = export_policy(hf, tmp_path, flavour="portable", computed="float16", gate_layers=True, **OPTIONS).gate
    assert gate["vision_error"] < 1e-2
    assert gate["kl_mean"] < 1e-4


def test_an_activation_of_a_deeper_merger_beyond_float16_is_named(hf: Path, tmp_path: Path) -> None:
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights["model.visual.deepstack_merger_list.0.linear_fc2.weight"].mul_(6e4)

    source = changed(hf, tmp_path / "hf", enlarge)
    options = {"flavour": "portable", "computed": "float16", "gate_layers": True, **OPTIONS}
    product = "vision/deepstack.0/fc2"
    with pytest.raises(ExportError, match=f"{product} reaches .* --float32-product {product}"):
        export_policy(source, tmp_path / "out", **options)
    precision = Precision(computed="float16", float32_products=(product,))
    (tmp_path / "kept").mkdir()
    PolicyGraphWriter(
        PolicyCheckpoint(source), tmp_path / "kept", precision, flavour="portable", input_size_hw=SIZE
    ).plan()


# --- the whole pipeline --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(
    exported: tuple[PolicyExport, Path], tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> SegZero:
    """With the segmenter of another bundle, as `--base` takes it."""
    work = tmp_path_factory.mktemp("whole")
    base = Bundle.open(tiny_bundle_path)
    manifest, files = assemble(replace(qwen3_vl(), input_size_hw=SIZE), "q3", exported[0], None, base)
    return SegZero.load(write_bundle(work / "bundle", manifest, files).root, backend="cpu", threads=1)


def test_a_bundle_of_this_family_is_asked_as_any_other(pipeline: SegZero) -> None:
    picture = random_picture(2)
    result = pipeline(picture, "the red cup")
    assert result.masks.shape[1:] == picture.shape[:2]
    assert result.answer.text
    again = pipeline(picture, "the red cup")
    assert again.answer == result.answer


def test_answers_in_thousandths_become_pixels(pipeline: SegZero, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '<answer>[{"bbox_2d": [250, 500, 750, 1000], "point_2d": [500, 600]}]</answer>'
    said = Generation(text=text, token_ids=(), finished=True, timings_ms={"question": 1.0, "decode": 1.0})
    monkeypatch.setattr(pipeline.policy, "ask", lambda *_, **__: said)
    result = pipeline(np.zeros((80, 200, 3), np.uint8), "the red cup")
    assert result.status is AnswerStatus.OK
    assert result.boxes_xyxy.tolist() == [[50, 40, 150, 80]]
    assert result.answer.prompts[0].points_xy == ((100.0, 48.0),)


def test_tensorrt_reads_every_graph(exported: tuple[PolicyExport, Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'segzero-rt[tensorrt-rtx]'")
    from segzero_rt.engines.builder import ParsedGraph, parse_graph
    from segzero_rt.engines.library import find_library
    from segzero_rt.policy import policy_specs

    export, folder = exported
    if export.manifest.flavour != "portable":
        pytest.skip("TensorRT knows no operators of ONNX Runtime's own")
    library = find_library("tensorrt-rtx")
    for name, spec in policy_specs(export.manifest).items():
        parsed = parse_graph(library, folder / "policy" / f"{name}.onnx")
        assert isinstance(parsed, ParsedGraph), parsed
        parsed.check(spec)


# --- checkpoints that are not what they say ------------------------------------------------------------------------


def configured(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda c: c["vision_config"].update(hidden_act="silu"), "hidden_act silu", id="activation"),
        pytest.param(lambda c: c["vision_config"].update(num_position_embeddings=50), "50, no square", id="no-square"),
        pytest.param(lambda c: c["vision_config"].pop("deepstack_visual_indexes"), "deepstack", id="no-deepstack"),
        pytest.param(
            lambda c: c["vision_config"].update(deepstack_visual_indexes=[1, 0]), "in order", id="out-of-order"
        ),
        pytest.param(lambda c: c["vision_config"].update(deepstack_visual_indexes=[3]), "below 3", id="too-deep"),
        pytest.param(
            lambda c: c["vision_config"].update(deepstack_visual_indexes=[0, 1, 2]), "more decoder layers", id="many"
        ),
        pytest.param(
            lambda c: c["text_config"]["rope_parameters"].update(mrope_interleaved=False), "interleaved", id="in-runs"
        ),
        pytest.param(lambda c: c["text_config"].update(head_dim=16), "half the head's width", id="narrow-heads"),
        pytest.param(lambda c: c.update(model_type="qwen3_vl_moe"), "qwen3_vl_moe", id="experts"),
        pytest.param(lambda c: c["text_config"].update(attention_bias=True), "q_proj.bias", id="bias"),
    ],
)
def test_settings_that_the_graphs_cannot_express_are_refused(
    hf: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    source = configured(hf, tmp_path / "hf", change)
    with pytest.raises(ExportError, match=message):
        export_policy(source, tmp_path / "out", **OPTIONS)
    assert not list((tmp_path / "out").rglob("*.onnx"))


def test_settings_as_published_are_read(hf: Path, tmp_path: Path) -> None:
    """Qwen/Qwen3-VL-*-Instruct: `rope_theta` beside `rope_scaling`, the tower's own rotary base left out."""

    def publish(config: dict[str, Any]) -> None:
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"]["rope_theta"] = rope["rope_theta"]
        config["text_config"]["rope_scaling"] = {
            "mrope_interleaved": True,
            "mrope_section": rope["mrope_section"],
            "rope_type": "default",
        }
        config["vision_config"].pop("rope_parameters", None)

    published = PolicyCheckpoint(configured(hf, tmp_path / "hf", publish))
    assert published.text == PolicyCheckpoint(hf).text
    assert published.vision == PolicyCheckpoint(hf).vision


def test_pictures_that_are_no_multiple_of_a_token_are_refused(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"multiples of 32 pixels for qwen3_vl, got \(840, 840\)"):
        export_policy(hf, tmp_path, input_size_hw=(840, 840))


def test_heads_that_the_fused_operator_cannot_rotate_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", family="qwen3_vl", layers=3, head_dim=24)
    with pytest.raises(ExportError, match=r"multiples of 16 .* width of 24; take flavour portable"):
        export_policy(tmp_path / "hf", tmp_path / "out", **OPTIONS)
    assert export_policy(tmp_path / "hf", tmp_path / "out", flavour="portable", **OPTIONS).gate["same_tokens"] == 1.0
