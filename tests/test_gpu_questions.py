"""The GPU check's count of waits, on the resident pipeline whose device is the host's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from host_stream import host_stream
from kernel_builds import ONLY_COMPILER, kernels_on

from benchmarks.gpu import resident
from benchmarks.gpu.errors import NotHereError
from benchmarks.gpu.stages import Context
from segzero_rt import SegZero
from segzero_rt.bundle import EMBEDDED
from segzero_rt.resident.pipeline import ResidentSegZero

pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(device="cpu", size="tiny", work=tmp_path)


def open_on_host(bundle: Path) -> ResidentSegZero:
    host = SegZero.load(bundle, backend="cpu", threads=1, draft_tokens=0)
    device, _ = host_stream()
    graphs = (host.policy, host.encoder, host.decoder)
    return ResidentSegZero(*graphs, kernels=kernels_on(device), encoder_kernels=kernels_on(device.fork()))


@ONLY_COMPILER
def test_waits_are_counted_by_question_and_by_token(
    bundle_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "open_pipeline", lambda *_: open_on_host(bundle_path))
    figures = resident.questions(context, "cuda")
    assert figures["questions"] == len(figures["tokens"]) == sum(figures["statuses"].values()) == 3
    assert 1 <= figures["most_waits_per_question"] <= 3 and figures["calls_that_wait"] == {}
    assert figures["pieces_of_text"] >= 15 and figures["waits_per_piece_of_text"] == 0
    assert 0 < figures["milliseconds"]["decode"] < figures["milliseconds"]["total"]


@ONLY_COMPILER
def test_waits_between_tokens_are_seen(bundle_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that waits once for each token is told from one that does not."""
    pipeline = open_on_host(bundle_path)
    device, chosen = pipeline._device, pipeline._resident.reply._choose

    def waiting(*arguments: Any) -> Any:
        device.synchronize()
        return chosen(*arguments)

    monkeypatch.setattr(pipeline._resident.reply, "_choose", waiting)
    monkeypatch.setattr(resident, "open_pipeline", lambda *_: pipeline)
    assert resident.questions(context, "cuda")["waits_per_piece_of_text"] > 0.5


def test_without_a_device_it_is_left_out(context: Context) -> None:
    with pytest.raises(NotHereError, match="no device"):
        resident.questions(context, "cuda")
    with pytest.raises(NotHereError, match=r"bundle-tensorrt: the step `engines`"):
        resident.open_pipeline(Context(device="cuda", size="tiny", work=context.work), "tensorrt", False)


def test_which_bundle_is_asked(context: Context) -> None:
    assert resident.pipeline_bundle(context, "cuda") == EMBEDDED
    (context.work / "data" / "bundle").mkdir(parents=True)
    assert resident.pipeline_bundle(context, "cuda") == context.work / "data" / "bundle"
    assert resident.pipeline_bundle(context, "tensorrt-rtx") == context.work / "bundle-tensorrt-rtx"
