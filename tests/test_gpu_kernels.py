"""The GPU check's measurements of kernels: on the host's build, and as on a device whose memory is the host's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_builds import BUILDS, kernel_build

from benchmarks.gpu import kernels_parser, kernels_pictures, kernels_tokens
from benchmarks.gpu.errors import GpuCheckError
from benchmarks.gpu.replay import seconds_each_run
from benchmarks.gpu.stages import Context
from segzero_rt.kernels.backend import Kernels

pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")


@pytest.fixture(params=BUILDS[1:])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = kernel_build(request.param)
    for module in (kernels_parser, kernels_pictures, kernels_tokens):
        monkeypatch.setattr(module, "open_kernels", lambda context: found)
    return found


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(device="cpu", size="tiny", work=tmp_path)


def test_many_replies(build: Kernels, context: Context) -> None:
    figures = kernels_parser.many(context)
    assert figures["replies"] == 300 and figures["replies_per_second"] > 0 and figures["kernels"] == build.detail
    assert figures["of_bandwidth"]["counted_bytes"] > figures["text_bytes"] > 300 * 20
    assert 0 < figures["of_bandwidth"]["share_of_bandwidth"] < 1


def test_one_reply(build: Kernels, context: Context) -> None:
    figures = kernels_parser.one(context)
    assert 0 < figures["microseconds_median"] <= figures["microseconds_worst"]


def test_calls_from_python(build: Kernels, context: Context) -> None:
    figures = kernels_parser.batches(context)["microseconds_by_replies"]
    assert set(figures) == {"1", "10"} and min(figures["10"].values()) > 0 and str(build) in figures["1"]


def test_mutants(build: Kernels, context: Context) -> None:
    figures = kernels_parser.fuzz(context)
    assert (figures["mutants"], figures["disagreements"], figures["first"]) == (400, 0, [])


def test_a_wrong_reading_is_not_timed(build: Kernels, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels_parser.disagreements

    def spoilt(replies: list[bytes], arguments: dict[str, Any], builds: Any) -> Any:
        return [replies[0]], real(replies[:1], arguments, builds)[1]

    monkeypatch.setattr(kernels_parser, "disagreements", spoilt)
    with pytest.raises(GpuCheckError, match="reads 1 otherwise"):
        kernels_parser.many(context)
    assert kernels_parser.fuzz(context)["disagreements"] == 1


def test_tokens(build: Kernels, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = kernels_tokens.measure(context)
    assert figures["greedy, one reply"]["counted_bytes"] == 2000.0 and figures["top-p, 8 replies"]["milliseconds"] > 0
    real = kernels_tokens.sample_token

    def spoilt(logits: np.ndarray, **options: Any) -> Any:
        return real(-logits if options["kernels"] is build else logits, **options)

    monkeypatch.setattr(kernels_tokens, "sample_token", spoilt)
    with pytest.raises(GpuCheckError, match="the reference's tokens"):
        kernels_tokens.measure(context)


def test_masks(build: Kernels, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = kernels_pictures.masks(context)
    assert figures["2 masks, plain"]["counted_bytes"] == 2 * (4 * 256 * 256 + 45 * 61)
    assert all(one["milliseconds"] > 0 for name, one in figures.items() if name.startswith("2 masks"))
    assert len(figures) == 3 + 4
    spoil(monkeypatch, "postprocess_masks")
    with pytest.raises(GpuCheckError, match="makes others with"):
        kernels_pictures.masks(context)


def test_frames(build: Kernels, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = kernels_pictures.frames(context)
    assert figures["policy patches"]["counted_bytes"] == 3 * 45 * 61 + 4 * 3 * 56 * 28
    assert figures["segmenter planes"]["counted_bytes"] == 3 * 45 * 61 + 4 * 3 * 16 * 24
    spoil(monkeypatch, "preprocess")
    with pytest.raises(GpuCheckError, match="the host's numbers for policy patches"):
        kernels_pictures.frames(context)


def spoil(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Has the first call of an operation go wrong in its last number: that of the build that is measured."""
    real, calls = getattr(kernels_pictures, name), []

    def spoilt(*arguments: Any, **options: Any) -> Any:
        made = real(*arguments, **options)
        calls.append(name)
        if len(calls) == 1:
            (made if isinstance(made, np.ndarray) else made.areas).reshape(-1)[-1] += 1
        return made

    monkeypatch.setattr(kernels_pictures, name, spoilt)


def test_replies_are_real_where_they_were_carried(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_parser, "REAL", context.work / "nowhere")
    replies, source = kernels_parser.replies_of(context, 1000)
    assert source == kernels_parser.SOURCE and len(replies) == 1000 and all(type(one) is bytes for one in replies)
    import gzip

    (context.work / "data").mkdir()
    with gzip.open(context.work / "data" / kernels_parser.REAL_SOURCE, "wt") as lines:
        lines.write('{"output": "<answer>[]</answer>"}\n')
    assert kernels_parser.replies_of(context, 2) == ([b"<answer>[]</answer>"] * 2, kernels_parser.REAL_SOURCE)


def test_runs_take_turns(context: Context) -> None:
    device = kernel_build("cuda_on_host").device.device
    order: list[int] = []
    seconds = seconds_each_run(device, order.append, runs=3, rounds=2)
    assert len(seconds) == 2 and order == [0, 1, 2] * 6 and np.all(np.array(seconds) > 0)
