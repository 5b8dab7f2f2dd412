"""The GPU check's models at tiny widths on a processor: every side runs, and all say the same."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.errors import GpuCheckError
from benchmarks.gpu.roofline import Peaks
from benchmarks.gpu.stages import STAGES, Context
from benchmarks.random_policy import SIZES, configuration, tensors
from export.policy_sizes import read_sizes

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")

from benchmarks.gpu import policy, policy_onnx, policy_pytorch, segmenter  # noqa: E402 - needs torch's absence to skip first


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(device="cpu", size="tiny", work=tmp_path_factory.mktemp("work"))


def test_a_step_says_which_one_it_follows(tmp_path: Path) -> None:
    with pytest.raises(GpuCheckError, match="run the step `graphs`"):
        segmenter.eager(Context(device="cpu", size="tiny", work=tmp_path))


@pytest.mark.slow
def test_the_segmenter_on_every_side(context: Context) -> None:
    written = segmenter.graphs(context)
    assert written["operations"] > 1e6 and min(written["bytes"].values()) > 1000
    errors = {}
    for name, side in (("pytorch", segmenter.eager), ("onnxruntime", segmenter.onnxruntime)):
        figures = side(context)
        assert figures["encoder"]["floor_ms"] > 0 and figures["encoder"]["milliseconds"] > 0 < figures["decoder_ms"]
        errors[name] = max(*figures["relative_error"].values(), figures["mask_error"])
    assert errors["pytorch"] < 1e-5
    assert 1e-6 < errors["onnxruntime"] < segmenter.MAX_ERROR, "in 16 bits, so not the same, and not far off"
    assert segmenter.onnxruntime(context, "replay")["encoder"]["milliseconds"] > 0


@pytest.mark.slow
def test_other_features_are_not_timed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenter, "MAX_ERROR", 1e-9)
    with pytest.raises(GpuCheckError, match="nothing was timed"):
        segmenter.onnxruntime(context)


LIKE = "qwen2.5-vl-3b"


@pytest.mark.slow
def test_the_policy_on_every_side(context: Context) -> None:
    with pytest.raises(GpuCheckError, match="run the step `graphs`"):
        policy_pytorch.eager(context, LIKE)
    assert policy.graphs(context, LIKE)["task"]["picture_tokens"] == 6
    sides = [policy_pytorch.eager(context, LIKE), policy_onnx.onnxruntime(context, LIKE)]
    sides.append(policy_onnx.onnxruntime(context, LIKE, "replay"))
    sides.append(policy_pytorch.compiled(context, LIKE))
    for figures in sides:
        assert set(figures["stages"]) == {"vision", "prefill", "token"} and figures["tokens"] == 6
        assert all(min(stage["floor_ms"], stage["milliseconds"]) > 0 for stage in figures["stages"].values())
    assert sides[0]["first_tokens_that_agree"] == {}
    assert sides[1]["first_tokens_that_agree"] == {"pytorch eager": 6}, "float16 against float32"
    assert sides[2]["first_tokens_that_agree"] == {"pytorch eager": 6, "onnxruntime": 6}


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen2.5-vl-7b", "tiny"])
def test_weights_that_are_counted(name: str) -> None:
    """Matrices of the published shapes, one by one, against what the ceilings count."""
    config = configuration(SIZES.get(name, policy.TINY))
    vision, text = read_sizes("qwen2_5_vl", config)
    sizes: Any = SimpleNamespace(vision=vision, text=text)
    counted = dict.fromkeys(("model.layers.", "visual.blocks.", "visual.merger."), 0)
    for key, shape in tensors(config):
        for prefix in counted:
            counted[prefix] += math.prod(shape) if key.startswith(prefix) and len(shape) == 2 else 0
    assert policy.decoder_parameters(sizes) == counted["model.layers."]
    assert policy.tower_parameters(sizes) == (counted["visual.blocks."], counted["visual.merger."])


def test_ceilings_of_a_policy_by_hand() -> None:
    """A token reads the weights and the cache before it; of Qwen2.5-VL-3B 6.2 GB, so 2 ms at 3 TB/s."""
    vision, text = read_sizes("qwen2_5_vl", configuration(SIZES[LIKE]))
    sizes: Any = SimpleNamespace(vision=vision, text=text)
    peaks = Peaks(bytes_per_second=3e12, flops={"bfloat16": 8e14})
    stages = policy.reached(
        peaks, sizes, policy.FULL_TASK, {"vision": 0.02, "prefill": 0.02, "token": 0.01}, "bfloat16"
    )
    assert stages["token"]["floor_ms"] == pytest.approx(2.07, abs=0.03) and stages["token"]["bound_by"] == "bandwidth"
    assert stages["prefill"]["floor_ms"] == pytest.approx(2 * 2.77e9 * 1000 / 8e14 * 1e3, rel=0.05)
    assert stages["vision"]["floor_ms"] == pytest.approx(2 * 0.63e9 * 3600 / 8e14 * 1e3, rel=0.05)
    assert {stages[name]["bound_by"] for name in ("prefill", "vision")} == {"arithmetic"}


def test_models_have_every_side() -> None:
    names = {stage.name: [step.name for step in stage.steps] for stage in STAGES}
    assert {"graphs", "pytorch eager", "pytorch compiled", "onnxruntime"} <= set(names["segmenter"])
