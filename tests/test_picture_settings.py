"""What a checkpoint says of its pictures is what the export takes, and what it cannot do is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="onnx is not installed; it comes with segzero-rt[export]")

from export.picture_settings import with_picture_settings
from export.policy_sizes import CLIP_MEAN, CLIP_STD, VisionSizes
from segzero_rt.errors import ExportError

VISION = VisionSizes(
    depth=1, hidden_size=16, intermediate_size=16, num_heads=2, channels=3, patch_size=14, temporal_patch_size=2,
    merge_size=2, window_size=112, full_attention_blocks=(0,), rope_theta=10000.0, gated=True,
)  # fmt: skip
PUBLISHED = {
    "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD), "image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 12845056,
}  # fmt: skip
OLD, NEW = "preprocessor_config.json", "processor_config.json"


def write(folder: Path, settings: Any, name: str = OLD) -> Path:
    (folder / name).write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return folder


def test_without_a_file_the_family_decides(tmp_path: Path) -> None:
    assert with_picture_settings(tmp_path, VISION) == VISION


@pytest.mark.parametrize("name", [OLD, NEW])
def test_published_settings_change_nothing(tmp_path: Path, name: str) -> None:
    settings = PUBLISHED if name == OLD else {"image_processor": PUBLISHED, "processor_class": "Qwen2_5_VLProcessor"}
    assert with_picture_settings(write(tmp_path, settings, name), VISION) == VISION


@pytest.mark.parametrize("name", [OLD, NEW])
def test_colours_are_the_checkpoints(tmp_path: Path, name: str) -> None:
    own = {"image_mean": [0.5, 0.25, 0], "image_std": [1, 0.5, 0.125], "rescale_factor": 0.00392156862745098}
    found = with_picture_settings(write(tmp_path, own if name == OLD else {"image_processor": own}, name), VISION)
    assert (found.image_mean, found.image_std) == ((0.5, 0.25, 0.0), (1.0, 0.5, 0.125))


def test_settings_of_other_things_change_nothing(tmp_path: Path) -> None:
    assert with_picture_settings(write(tmp_path, {"video_processor": {}}, NEW), VISION) == VISION


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param("{", "JSON object", id="no JSON"),
        pytest.param([], "JSON object", id="no object"),
        pytest.param({"patch_size": 16}, "patch_size 14 .*got 16", id="another patch"),
        pytest.param({"merge_size": 1}, "merge_size 2", id="another merge"),
        pytest.param({"temporal_patch_size": "2"}, "temporal_patch_size 2", id="a text"),
        pytest.param({"do_normalize": False}, "do_normalize True", id="not normalised"),
        pytest.param({"do_rescale": False}, "do_rescale True", id="not scaled"),
        pytest.param({"rescale_factor": 1.0}, "1/255", id="another scale"),
        pytest.param({"rescale_factor": None}, "1/255", id="no scale"),
        pytest.param({"image_mean": [0.5, 0.5]}, "image_mean of three", id="two colours"),
        pytest.param({"image_mean": [0.5, 0.5, 127.5]}, "image_mean of three", id="of bytes"),
        pytest.param({"image_mean": "0.5"}, "image_mean of three", id="a mean as text"),
        pytest.param({"image_mean": [True, 0, 0]}, "image_mean of three", id="a truth"),
        pytest.param({"image_std": [0.5, 0.5, 0]}, "image_std of three", id="a deviation of nothing"),
        pytest.param('{"image_std": [0.5, 0.5, NaN]}', "image_std of three", id="no number"),
    ],
)
def test_refuses(tmp_path: Path, settings: Any, expected: str) -> None:
    with pytest.raises(ExportError, match=expected):
        with_picture_settings(write(tmp_path, settings), VISION)


def test_an_export_takes_them(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; it comes with segzero-rt[export]")
    from policy_checkpoints import write_checkpoint

    from export.policy_checkpoint import PolicyCheckpoint

    write_checkpoint(tmp_path)
    write(tmp_path, {"image_mean": [0.5, 0.5, 0.5]})
    assert PolicyCheckpoint(tmp_path).vision.image_mean == (0.5, 0.5, 0.5)
