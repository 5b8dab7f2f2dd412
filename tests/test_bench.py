"""`segzero bench` counts and times what it says, on any folder of pictures, in every way of asking."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segzero_rt import environment
from segzero_rt.answer import Answer, AnswerStatus
from segzero_rt.bench.scenarios import GLUE, Clock, fixed_rate, single_stream
from segzero_rt.bench.tasks import Task, draw_picture, make_tasks
from segzero_rt.cli import main
from segzero_rt.dataset import DatasetWriter
from segzero_rt.environment import device_card, environment_card, peak_memory_bytes
from segzero_rt.errors import DatasetError, ImageError
from segzero_rt.graph import default_threads
from segzero_rt.segmentation import Segmentation


class SlowPipeline:
    """Takes as long as it is told, call by call, by a clock of its own, and reports its stages."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = list(seconds)
        self.now_s = 100.0
        self.asked: list[tuple[float, int]] = []
        self.clock = Clock(now_s=lambda: self.now_s, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def __call__(self, image_rgb: np.ndarray, question: str, **options: Any) -> Segmentation:
        self.asked.append((self.now_s, int(image_rgb[0, 0, 0])))
        seconds = self.seconds.pop(0) if self.seconds else 0.0
        self.now_s += seconds
        answer = Answer(status=AnswerStatus.NONE_FOUND)
        counts = {"tokens": 12, "runs": 5, "drafted": 25, "accepted": 7}
        timings_ms = {"decode": seconds * 750, "mask_encode": seconds * 900}
        return replace(Segmentation.empty(answer, image_rgb.shape[:2], timings_ms), decode_counts=counts)


def shaded_tasks(count: int) -> list[Task]:
    """Pictures that can be told apart by their first pixel."""

    def picture(shade: int) -> np.ndarray:
        return np.full((3, 5, 3), shade, np.uint8)

    return [Task(question="what", load_image=partial(picture, shade)) for shade in range(count)]


def test_times_each_question_and_the_first_apart() -> None:
    # Not the machine's clock: what else runs on it must not fail a test.
    pipeline = SlowPipeline([0.2, 0.02, 0.02, 0.08])
    document = single_stream(pipeline, shaded_tasks(3), pipeline.clock)
    assert document["num_questions"] == 3 and document["statuses"] == {"none_found": 3}
    assert [shade for _, shade in pipeline.asked] == [0, 0, 1, 2]
    assert document["first_question_ms"] == pytest.approx(200)
    assert document["end_to_end_all_ms"] == pytest.approx([20, 20, 80])
    assert document["end_to_end_ms"] == {"p50": pytest.approx(20), "p90": pytest.approx(68), "p99": pytest.approx(78.8)}
    assert document["stages_ms"]["decode"]["p50"] == pytest.approx(15)
    assert document["stages_ms"][GLUE]["p50"] == pytest.approx(5), "the encoder runs beside the others"
    assert document["decode_counts"] == {"tokens": 12.0, "runs": 5.0, "drafted": 25.0, "accepted": 7.0}
    assert document["throughput_per_s"] == pytest.approx(3 / 0.12)


@pytest.mark.parametrize(
    ("rate_hz", "seconds", "took_s", "answered", "expected"),
    [
        pytest.param(10, 0.5, [0.03] * 5, [0, 1, 2, 3, 0], {"first": 30, "last": 30, "jitter": 0}, id="keeps up"),
        # Frames come at 0, 100, 200, 300, 400 ms. The first is done at 250: 100 was replaced by 200, which is done at
        # 350, 150 after it came; 300 at 360, 400 at 410.
        pytest.param(10, 0.5, [0.25, 0.1, 0.01, 0.01], [0, 2, 3, 0], {"first": 250, "last": 10}, id="drops one"),
        pytest.param(10, 0.3, [5.0, 0.01], [0, 2], {"first": 5000, "last": 4810}, id="the last is answered, late"),
        pytest.param(1, 0.1, [0.5], [0], {"first": 500, "last": 500}, id="one frame at least"),
    ],
)
def test_a_fixed_rate_drops_what_a_newer_frame_replaces(
    rate_hz: float, seconds: float, took_s: list[float], answered: list[int], expected: dict[str, float]
) -> None:
    pipeline = SlowPipeline(took_s)
    row = fixed_rate(pipeline, shaded_tasks(4), rate_hz=rate_hz, seconds=seconds, clock=pipeline.clock)
    assert [shade for _, shade in pipeline.asked] == answered
    assert row["frames_sent"] == max(1, round(rate_hz * seconds))
    assert row["frames_answered"] == len(answered) and row["frames_dropped"] == row["frames_sent"] - len(answered)
    assert row["first_latency_ms"] == pytest.approx(expected["first"])
    assert row["last_latency_ms"] == pytest.approx(expected["last"])
    assert (row["jitter_ms"] is None) == (len(answered) < 3)
    if "jitter" in expected:
        assert row["jitter_ms"]["max"] == pytest.approx(expected["jitter"], abs=1e-6)
    assert row["answered_hz"] == pytest.approx(len(answered) / (pipeline.now_s - 100))


def test_jitter_is_the_distance_of_intervals_from_their_mean() -> None:
    pipeline = SlowPipeline([0.25, 0.1, 0.01, 0.01])
    row = fixed_rate(pipeline, shaded_tasks(4), rate_hz=10, seconds=0.5, clock=pipeline.clock)
    # Answers at 250, 350, 360 and 410 ms: intervals of 100, 10 and 50, whose mean is 53.3.
    assert row["jitter_ms"] == {
        "mean": pytest.approx((46.667 + 43.333 + 3.333) / 3, abs=1e-2),
        "max": pytest.approx(46.667, abs=1e-2),
    }


def run_bench(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[str], dict[str, Any]]:
    """Lines of standard output, the last of which is the document."""
    assert main(["bench", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


def test_measures_every_scenario_and_says_the_ceiling_first(
    tiny_bundle_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--bundle", str(tiny_bundle_path), "--questions", "3", "--max-new-tokens", "6", "--threads", "1"]
    lines, document = run_bench(capsys, *options, "--rates", "20,40", "--seconds", "1")
    order = [
        "tiny on cpu",
        "measured here",
        "cold start, files evicted",
        "in a question",
        "alone, ms",
        "single stream",
        "offline",
        "repeated frame",
        "fixed rate",
        "peak memory",
        "{",
    ]
    starts = [next(index for index, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert starts == sorted(starts)
    assert {"stages_ms", "end_to_end_ms", "peak_memory_bytes", "environment"} <= document.keys()
    assert document["peak_memory_bytes"] > 10_000_000 and document["ceiling_problem"] is None
    environment = document["environment"]
    manifest = (tiny_bundle_path / "manifest.json").read_bytes()
    assert environment["bundle"] == {"name": "tiny", "sha256": hashlib.sha256(manifest).hexdigest()}
    assert environment["threads"] == 1 and environment["packages"]["numpy"]
    assert {"gpus", "power_mode", "cpu_governor", "commit"} <= environment.keys()
    assert document["offline"]["num_questions"] == document["repeated_frame"]["num_questions"] == 3
    assert [row["rate_hz"] for row in document["fixed_rate"]] == [20, 40]
    assert [row["frames_sent"] for row in document["fixed_rate"]] == [20, 40]
    cold = document["cold_start"]["cached"]
    assert cold["process_ms"] > cold["load_ms"] + cold["first_question_ms"] > 0
    apart = document["stages_apart_ms"]
    assert {"preprocess", "vision", "prefill", "decode", "token", "mask_preprocess", "mask_encode"} <= apart.keys()
    fractions = document["fraction_of_ceiling"]
    assert {"vision", "prefill", "decode", "token", "mask_encode"} <= fractions.keys() and min(fractions.values()) > 0


def test_json_alone_is_one_line(tiny_bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bundle", str(tiny_bundle_path), "--questions", "1", "--max-new-tokens", "2", "--skip-ceiling"]
    lines, document = run_bench(capsys, *options, "--scenario", "single-stream", "--json")
    assert len(lines) == 1 and document["ceiling"] is None and document["ceiling_problem"] == "skipped"
    assert "fixed_rate" not in document and "cold_start" not in document


def test_drawn_pictures_differ_and_repeat() -> None:
    first, second = draw_picture(0), draw_picture(1)
    assert first.dtype == np.uint8 and first.shape == (480, 640, 3)
    assert (first != second).mean() > 0.5
    np.testing.assert_array_equal(first, draw_picture(0))


def test_takes_pictures_from_a_folder_in_turn(tmp_path: Path) -> None:
    for index in range(2):
        Image.fromarray(np.full((3, 5 + index, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    tasks = list(make_tasks(str(tmp_path), 5))
    assert [task.load_image().shape[1] for task in tasks] == [5, 6, 5, 6, 5]


def test_takes_questions_from_a_dataset(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set") as writer:
        name = writer.add_image(np.zeros((3, 5, 3), np.uint8))
        writer.add_question(name, "first", kind="none")
        writer.add_question(name, "second", kind="none")
    tasks = list(make_tasks(str(tmp_path / "set"), 3))
    assert [task.question for task in tasks] == ["first", "second", "first"]
    assert tasks[0].load_image().shape == (3, 5, 3)


@pytest.mark.parametrize("case", ["missing", "empty"])
def test_refuses_a_folder_without_pictures(tmp_path: Path, case: str) -> None:
    folder = tmp_path if case == "empty" else tmp_path / "missing"
    with pytest.raises(DatasetError, match="expected a folder with pictures"):
        list(make_tasks(str(folder), 1))


def test_a_broken_picture_is_an_error_not_a_timing(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageError):
        single_stream(SlowPipeline([]), list(make_tasks(str(tmp_path), 1)))


@pytest.mark.parametrize(
    ("text", "nice"),
    [
        pytest.param("/autogroup-311 nice 0\n", 0, id="everyday"),
        pytest.param("/autogroup-7 nice -19\n", -19, id="first"),
        pytest.param("", None, id="kernel without groups"),
        pytest.param(None, None, id="no Linux"),
    ],
)
def test_a_card_tells_the_scheduling_group(monkeypatch: pytest.MonkeyPatch, text: str | None, nice: int | None) -> None:
    monkeypatch.setattr(environment, "_read", lambda path: text and text.strip())
    assert environment_card()["scheduling_group_nice"] == nice


def test_a_card_names_no_commit_of_a_checkout_that_the_package_only_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    installed = tmp_path / "env" / "environment.py"
    installed.parent.mkdir()
    installed.write_text("")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert device_card()["commit"] is None
    subprocess.run([*git, "add", "env"], check=True)
    assert device_card()["commit"].endswith("-dirty")


def test_environment_card_is_plain_json() -> None:
    card = {**environment_card(), **device_card()}
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert card["cores"] == default_threads() >= 1
    before = peak_memory_bytes()
    block = np.ones(64_000_000, np.uint8)
    assert peak_memory_bytes() >= before and block[-1] == 1
