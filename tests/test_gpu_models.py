"""The GPU check's models at tiny widths on a processor: every side runs, and all say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.errors import GpuCheckError
from benchmarks.gpu.stages import STAGES, Context

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")

from benchmarks.gpu import segmenter  # noqa: E402 - needs torch's absence to skip first


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(device="cpu", size="tiny", work=tmp_path_factory.mktemp("work"))


def test_a_step_says_which_one_it_follows(tmp_path: Path) -> None:
    with pytest.raises(GpuCheckError, match="run the step `graphs`"):
        segmenter.eager(Context(device="cpu", size="tiny", work=tmp_path))


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


def test_other_features_are_not_timed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenter, "MAX_ERROR", 1e-9)
    with pytest.raises(GpuCheckError, match="nothing was timed"):
        segmenter.onnxruntime(context)


def test_models_have_every_side() -> None:
    names = {stage.name: [step.name for step in stage.steps] for stage in STAGES}
    assert {"graphs", "pytorch eager", "pytorch compiled", "onnxruntime"} <= set(names["segmenter"])
