"""`segzero bench` counts and times what it says, on any folder of pictures; the models are stood in for."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segzero_rt.answer import Answer, AnswerStatus
from segzero_rt.commands import bench
from segzero_rt.dataset import DatasetWriter
from segzero_rt.environment import environment_card, peak_memory_bytes
from segzero_rt.errors import DatasetError, ImageError
from segzero_rt.graph import default_threads
from segzero_rt.segmentation import Segmentation

RENDERED = {"cores": 2, "cpu": "some", "bundle": {"name": "stand-in"}, "backend": "cpu"}


class SlowPipeline:
    """Takes as long as it is told, call by call, by a clock of its own, and reports one stage."""

    def __init__(self, seconds: list[float], folder: Path = Path("missing")) -> None:
        self.seconds = list(seconds)
        self.now_s = 100.0
        self.questions: list[str] = []
        self.pictures: list[np.ndarray] = []
        self.bundle = SimpleNamespace(root=folder, manifest=SimpleNamespace(name="stand-in"))
        self.policy = SimpleNamespace(backend="cpu")

    def __call__(self, image_rgb: np.ndarray, question: str, **options: Any) -> Segmentation:
        self.questions.append(question)
        self.pictures.append(image_rgb)
        seconds = self.seconds.pop(0) if self.seconds else 0.0
        self.now_s += seconds
        answer = Answer(status=AnswerStatus.NONE_FOUND)
        counts = {"tokens": 12, "runs": 5, "drafted": 25, "accepted": 7}
        return replace(Segmentation.empty(answer, image_rgb.shape[:2], {"decode": seconds * 1e3}), decode_counts=counts)


def arguments(**changes: Any) -> argparse.Namespace:
    defaults: dict[str, Any] = {"images": None, "questions": 4, "json": True, "format": None, "max_new_tokens": None}
    return argparse.Namespace(**{**defaults, "threads": 1, **changes})


def test_times_each_question_and_the_first_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = SlowPipeline([0.2, 0.02, 0.02, 0.08])
    # Not the machine's clock: what else runs on it must not fail a test.
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: pipeline.now_s))
    document = bench.measure(pipeline, list(bench.make_tasks(None, 3)))
    assert document["num_questions"] == 3 and document["statuses"] == {"none_found": 3}
    assert document["first_question_ms"] == pytest.approx(200)
    expected = {"p50": pytest.approx(20), "p90": pytest.approx(68), "p99": pytest.approx(78.8)}
    assert document["end_to_end_ms"] == expected
    assert document["stages_ms"] == {"decode": expected}
    assert document["decode_counts"] == {"tokens": 12.0, "runs": 5.0, "drafted": 25.0, "accepted": 7.0}
    assert "12.0 tokens a reply in 5.0 runs of the decoder, 7.0 of 25.0 guesses right" in bench.render(
        {**document, "peak_memory_bytes": 0, "load_ms": 0, "environment": RENDERED}
    )
    assert document["throughput_per_s"] == pytest.approx(3 / 0.12)


def test_document_has_the_promised_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_bytes(b"{}")
    monkeypatch.setattr(bench, "load_pipeline", lambda _: SlowPipeline([], tmp_path))
    assert bench.execute(arguments()) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"stages_ms", "end_to_end_ms", "peak_memory_bytes", "environment"} <= document.keys()
    assert set(document["end_to_end_ms"]) == {"p50", "p90", "p99"}
    assert document["peak_memory_bytes"] > 10_000_000
    environment = document["environment"]
    assert environment["bundle"] == {"name": "stand-in", "sha256": hashlib.sha256(b"{}").hexdigest()}
    assert environment["threads"] == 1 and environment["packages"]["numpy"]
    assert bench.execute(arguments(json=False)) == 0
    text = capsys.readouterr().out
    assert "end to end" in text and "stand-in on cpu" in text


def test_drawn_pictures_differ_and_repeat() -> None:
    first, second = bench.draw_picture(0), bench.draw_picture(1)
    assert first.dtype == np.uint8 and first.shape == (480, 640, 3)
    assert (first != second).mean() > 0.5
    np.testing.assert_array_equal(first, bench.draw_picture(0))


def test_takes_pictures_from_a_folder_in_turn(tmp_path: Path) -> None:
    for index in range(2):
        Image.fromarray(np.full((3, 5 + index, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    tasks = list(bench.make_tasks(str(tmp_path), 5))
    assert [task.load_image().shape[1] for task in tasks] == [5, 6, 5, 6, 5]


def test_takes_questions_from_a_dataset(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set") as writer:
        name = writer.add_image(np.zeros((3, 5, 3), np.uint8))
        writer.add_question(name, "first", kind="none")
        writer.add_question(name, "second", kind="none")
    tasks = list(bench.make_tasks(str(tmp_path / "set"), 3))
    assert [task.question for task in tasks] == ["first", "second", "first"]
    assert tasks[0].load_image().shape == (3, 5, 3)


@pytest.mark.parametrize("case", ["missing", "empty"])
def test_refuses_a_folder_without_pictures(tmp_path: Path, case: str) -> None:
    folder = tmp_path if case == "empty" else tmp_path / "missing"
    with pytest.raises(DatasetError, match="expected a folder with pictures"):
        list(bench.make_tasks(str(folder), 1))


def test_a_broken_picture_is_an_error_not_a_timing(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"\x89PNG")
    with pytest.raises(ImageError):
        bench.measure(SlowPipeline([]), list(bench.make_tasks(str(tmp_path), 1)))


def test_environment_card_is_plain_json() -> None:
    card = environment_card()
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert card["cores"] == default_threads() >= 1
    before = peak_memory_bytes()
    block = np.ones(64_000_000, np.uint8)
    assert peak_memory_bytes() >= before and block[-1] == 1
