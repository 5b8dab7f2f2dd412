"""The program that measures out-of-distribution splits: what it compares, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import ood_splits
from segzero_rt.answer import Answer, AnswerStatus
from segzero_rt.bundle import Bundle
from segzero_rt.evaluation import Record
from segzero_rt.segmentation import Segmentation
from training.question_scenes import SPLIT_QUERY_KINDS


def record(kind: str, iou: float, image: str = "a.png") -> Record:
    return Record(
        source="a.jsonl:1",
        image=image,
        text="x",
        kind=kind,
        iou=iou,
        intersection=1,
        union=2,
        box_iou=iou,
        num_objects=1,
        num_predicted=1,
        status="ok",
        latency_ms=1.0,
    )


@pytest.mark.parametrize(
    ("split", "test", "expected"),
    [
        ([("name", 0.5)], [("name", 0.8), ("none", 0.0)], 0.8),
        ([("name", 0.5)] * 3 + [("relation", 0.1)], [("name", 0.8), ("relation", 0.4), ("relation", 0.2)], 0.675),
        ([("function", 0.5)], [("name", 0.8)], None),
    ],
    ids=["other kinds are left out", "weighted as the split asks", "kind not in test"],
)
def test_a_split_stands_beside_the_same_kinds(
    split: list[tuple[str, float]], test: list[tuple[str, float]], expected: float | None
) -> None:
    row = ood_splits.compare([record(*one) for one in split], [record(*one) for one in test])
    beside = row["same_kinds_on_test"]
    assert (beside and beside["giou"]) == (expected and pytest.approx(expected))
    assert "latency_ms" not in row and row["num_samples"] == len(split)
    assert "| x | " in ood_splits.render({"x": row})


class SaysNone:
    """Finds nothing, whatever is asked."""

    bundle = Bundle.open(verify="size")

    def __call__(self, image_rgb: NDArray[np.uint8], question: str) -> Segmentation:
        return Segmentation.empty(Answer(status=AnswerStatus.NONE_FOUND), (image_rgb.shape[0], image_rgb.shape[1]))


def test_every_split_is_written_once_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ood_splits.SegZero, "load", lambda *_, **__: SaysNone())
    options = ["--scenes", str(tmp_path / "scenes"), "--count", "2", "--test-count", "10", "--out", str(tmp_path)]
    assert ood_splits.main(options) == 0
    printed = capsys.readouterr()
    document: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    assert list(document["splits"]) == ["test", *SPLIT_QUERY_KINDS]
    assert document["splits"]["test"]["giou"] == pytest.approx(0.1)  # one in ten asks for what is not there
    assert all(document["splits"][split]["giou"] == 0.0 for split in SPLIT_QUERY_KINDS)
    assert printed.err.count("\n| ") >= 5
    (path,) = tmp_path.glob("ood_splits_*.json")
    assert json.loads(path.read_text())["splits"] == document["splits"]
    monkeypatch.setattr(ood_splits, "write_samples", lambda *_: pytest.fail("wrote scenes that are there"))
    assert ood_splits.main(options) == 0


def test_what_is_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ood_splits.main(["--scenes", str(tmp_path / "s"), "--bundle", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
