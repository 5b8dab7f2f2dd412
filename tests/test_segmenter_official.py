"""Checkpoints of SAM 2's own package: names, sizes, hostile files; and the package itself beside our graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segzero_rt.errors import ExportError
from segzero_rt.graph import Graph
from segzero_rt.segmenter import ImageEncoder, MaskDecoder
from segzero_rt.segmenter_prompt import SegmenterPrompt

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")

from export.segmenter_checkpoint import load_checkpoint  # noqa: E402 - needs torch's absence to skip first
from export.segmenter_official import read_official  # noqa: E402
from export.segmenter_sizes import CONFIG_NAMES, HIERA_SIZES, size_of_config  # noqa: E402

TESTS = Path(__file__).resolve().parent
SAM2 = Path(os.environ.get("SEGZERO_SAM2", str(TESTS.parent / ".venv-sam2")))
TENSORS = TESTS / "sam2_tensors.json"
"""Names and shapes of sam2.1_hiera_t as `sam2` 1.1.0 from PyPI builds it."""
ONLY_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")

Shapes = dict[str, list[int]]
Write = Callable[..., Path]


@pytest.fixture
def shapes() -> Shapes:
    loaded: Shapes = json.loads(TENSORS.read_text())
    return loaded


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint of the given shapes; every tensor is one number, however large it says to be."""

    def call(shapes: Shapes, name: str = "sam2.1_hiera_tiny.pt") -> Path:
        tensors = {key: torch.full((1,), 0.5).expand(shape) for key, shape in shapes.items()}
        torch.save({"model": tensors}, tmp_path / name)
        return tmp_path / name

    return call


def test_a_published_size_is_recognised_and_whole(shapes: Shapes, write: Write) -> None:
    model, name = read_official(write(shapes))
    assert name == "sam2.1_hiera_t"
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    windows = [block.window_size for block in model.vision_encoder.backbone.blocks[-3:]]
    assert windows == [0, 14, 7], "a stage begins in the windows of the one before"


def test_what_only_tracking_reads_may_be_missing_and_tells_the_release(shapes: Shapes, write: Write) -> None:
    older = {key: shape for key, shape in shapes.items() if key not in ONLY_IN_2_1}
    assert read_official(write(older))[1] == "sam2_hiera_t"
    images_alone = {key: shape for key, shape in older.items() if not key.startswith("memory_")}
    assert read_official(write(images_alone), "sam2_hiera_t")[1] == "sam2_hiera_t"
    assert load_checkpoint(write(shapes), "sam2.1_hiera_t.yaml").config.vision_config.backbone_config.hidden_size == 96


def without(shapes: Shapes, key: str) -> Shapes:
    assert key in shapes
    return {name: shape for name, shape in shapes.items() if name != key}


PATCHES = "image_encoder.trunk.patch_embed.proj.weight"
BROKEN = [
    ("a tensor is missing", lambda s: without(s, "sam_mask_decoder.iou_token.weight"), None, "iou_token"),
    ("a point is missing", lambda s: without(s, "sam_prompt_encoder.point_embeddings.3.weight"), None, "point_embed"),
    ("another shape", lambda s: s | {"sam_mask_decoder.conv_s0.bias": [31]}, None, r"conv_s0.bias has shape \[31\]"),
    ("a block more", lambda s: s | {"image_encoder.trunk.blocks.12.norm1.bias": [768]}, None, "96 channels and 13"),
    ("another width", lambda s: s | {PATCHES: [128, 3, 7, 7]}, None, "hiera_l"),
    ("no image encoder", lambda s: without(s, PATCHES), None, "patch_embed.proj.weight"),
    ("an unknown tensor", lambda s: s | {"ema.decay": [1]}, None, "ema.decay"),
    ("an unknown part", lambda s: s | {"sam_mask_decoder.extra.weight": [1]}, None, "mask_decoder.extra"),
    ("another size asked for", lambda s: s, "sam2.1_hiera_l", "which is sam2.1_hiera_t"),
    ("another release asked for", lambda s: s, "sam2_hiera_t", "which is sam2.1_hiera_t"),
    ("no such size", lambda s: s, "hiera_xl", "--segmenter-config: expected one of"),
    ("nothing in it", lambda s: {}, None, "0 tensors"),
]


@pytest.mark.parametrize(("case", "change", "config", "message"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_broken_checkpoint_is_one_clear_error(
    shapes: Shapes, write: Write, case: str, change: Callable[[Shapes], Shapes], config: str | None, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        read_official(write(change(shapes)), config)


class Opens:
    """Unpickled, it would make a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("was_run",)


NO_CHECKPOINTS = [
    ("code", lambda path: torch.save({"model": Opens()}, path)),
    ("an object", lambda path: torch.save({"model": {"a": Path("x")}}, path)),
    ("numbers", lambda path: torch.save({"model": {"a": 1.0}}, path)),
    ("a list", lambda path: torch.save([torch.zeros(1)], path)),
    ("names that are none", lambda path: torch.save({"model": {1: torch.zeros(1)}}, path)),
    ("text", lambda path: path.write_text("not a checkpoint")),
    ("nothing", lambda path: path.write_bytes(b"")),
    ("half a file", lambda path: (torch.save({"a": torch.zeros(9)}, path), path.write_bytes(path.read_bytes()[:300]))),
    ("no file", lambda path: None),
]


@pytest.mark.parametrize(("case", "write_it"), NO_CHECKPOINTS, ids=[row[0] for row in NO_CHECKPOINTS])
def test_what_is_no_checkpoint_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, write_it: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_it(tmp_path / "sam2.pt")
    with pytest.raises(ExportError, match=r"sam2\.pt"):
        load_checkpoint(tmp_path / "sam2.pt")
    assert not (tmp_path / "was_run").exists()


def test_a_name_of_a_size_is_for_files_alone(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected a \.pt file"):
        load_checkpoint(tmp_path, "sam2_hiera_t")


ASSETS = TESTS.parent / "../shared/assets/sam2_configs"


@pytest.mark.skipif(not ASSETS.is_dir(), reason="../shared/assets is not there")
@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_sizes_are_those_of_the_published_configurations(name: str) -> None:
    import re

    size = size_of_config(name)
    text = (ASSETS / name.partition("_")[0] / f"{name}.yaml").read_text()
    trunk = text[text.index("trunk:") : text.index("neck:")]
    written = {key: json.loads(value) for key, value in re.findall(r"^ +(\w+): ([\d\[\], ]+)$", trunk, re.M)}
    # What base+ leaves out are the defaults of SAM 2's `Hiera`.
    defaults = {"stages": [2, 3, 16, 3], "global_att_blocks": [12, 16, 20], "window_spec": [8, 4, 14, 7]}
    defaults["window_pos_embed_bkg_spatial_size"] = [14, 14]
    assert defaults | written == {
        "embed_dim": size.width,
        "num_heads": size.heads,
        "stages": list(size.blocks),
        "global_att_blocks": list(size.global_blocks),
        "window_spec": list(size.windows),
        "window_pos_embed_bkg_spatial_size": list(size.background_hw),
    }
    (channels,) = re.findall(r"backbone_channel_list: (\[[\d, ]+\])", text)
    assert json.loads(channels) == list(reversed(size.stage_widths))
    assert re.findall(r"image_size: (\d+)", text) == ["1024"]


def test_sizes_differ_in_what_recognises_them() -> None:
    assert len({(size.width, sum(size.blocks)) for size in HIERA_SIZES}) == len(HIERA_SIZES)


@pytest.mark.slow
@pytest.mark.skipif(
    not (SAM2 / "sam2").is_dir(), reason="PyPI's sam2 is not in .venv-sam2 or SEGZERO_SAM2; `make test` puts it there"
)
def test_the_graphs_answer_as_sam2_itself(tmp_path: Path, shapes: Shapes) -> None:
    """True size, random weights: the package writes a checkpoint and answers; the runtime answers from its export."""
    import sam2_reference

    from export.segmenter import export_mask_decoder, export_mask_prompt, segmenter_manifest
    from export.segmenter_encoder import build_image_encoder
    from export.segmenter_specs import segmenter_specs

    command = [sys.executable, str(TESTS / "sam2_reference.py"), str(SAM2), "configs/sam2.1/sam2.1_hiera_t.yaml"]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((tmp_path / "names.json").read_text()) == shapes, "the record is of this package"
    theirs = np.load(tmp_path / "answers.npz")
    model = load_checkpoint(tmp_path / "checkpoint.pt")
    specs, manifest = segmenter_specs(model), segmenter_manifest(model)
    build_image_encoder(model, specs.encoder, flavour="portable", storage="float32").save(tmp_path / "encoder.onnx")
    export_mask_decoder(model, tmp_path / "decoder.onnx", storage="float32")
    export_mask_prompt(model, tmp_path / "mask_prompt.onnx", storage="float32")
    encoder, decoder, masks = (
        Graph.load(tmp_path / f"{name}.onnx", getattr(specs, name), backend="cpu") for name in specs._fields
    )
    embedding = ImageEncoder(encoder, manifest)(sam2_reference.picture())
    for name, ours in embedding.features.items():
        assert relative(ours, theirs[name]) < 1e-5, name
    for name, arguments in sam2_reference.cases().items():
        multimask = arguments.get("multimask_output", True)
        ours = MaskDecoder(decoder, manifest, lambda: masks)(embedding, prompts(arguments), multimask=multimask)
        scores = theirs[f"{name}: scores"].reshape(len(ours.scores), -1)
        best = scores.argmax(axis=1)  # where SAM 2 gives three readings the runtime gives the best scored
        rows = np.arange(len(best))
        logits = theirs[f"{name}: logits"].reshape(*scores.shape, *manifest.mask_size_hw)[rows, best]
        assert relative(np.clip(ours.logits, -32, 32), logits) < 1e-5, name
        np.testing.assert_allclose(ours.scores, scores[rows, best], atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(
    not (SAM2 / "sam2").is_dir(), reason="PyPI's sam2 is not in .venv-sam2 or SEGZERO_SAM2; `make test` puts it there"
)
@pytest.mark.parametrize("name", [name for name in CONFIG_NAMES if name != "sam2.1_hiera_t"])
def test_every_published_size_is_read_as_sam2_reads_it(tmp_path: Path, name: str) -> None:
    """All weights of the true size, over a small picture: each lands where the package itself has it."""
    import sam2_reference

    side = 256
    config = f"configs/{name.partition('_')[0]}/{name}.yaml"
    command = [sys.executable, str(TESTS / "sam2_reference.py"), str(SAM2), config, str(tmp_path), str(side)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    model, told = read_official(tmp_path / "checkpoint.pt")
    assert told == name
    with torch.no_grad():
        ours = model.get_image_features(sam2_reference.pixels(side), return_dict=True).fpn_hidden_states
    theirs = np.load(tmp_path / "features.npz")
    for level, mine in enumerate(ours):  # [H * W, 1, C]
        reference = theirs[f"arr_{level}"]
        assert relative(mine.permute(1, 2, 0).reshape(reference.shape).numpy(), reference) < 1e-5, level


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def prompts(arguments: dict[str, Any]) -> list[SegmenterPrompt]:
    """Arguments of SAM 2's predictor as the runtime's prompts."""
    boxes = [tuple(map(float, box)) for box in arguments.get("box", [])] or [None]
    points = [tuple(map(float, point)) for point in arguments.get("point_coords", [])]
    labelled = list(zip(points, arguments.get("point_labels", []), strict=True))
    mask = arguments.get("mask_input")
    return [
        SegmenterPrompt(
            box_xyxy=box,
            points_xy=tuple(point for point, label in labelled if label == 1),
            outside_xy=tuple(point for point, label in labelled if label == 0),
            mask_logits=None if mask is None else mask[0],
        )
        for box in boxes
    ]
