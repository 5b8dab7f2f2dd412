"""What a question would cost without each saving: both sides asked in turns and scored, costs that change no answer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import avoided_costs
from benchmarks.avoided_costs import ALL_COSTS, COSTS, as_it_is, compare, reference
from benchmarks.measuring import run_and_exit
from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.bundle import EMBEDDED, Bundle
from segzero_rt.dataset import DatasetWriter, LabeledObject, Sample, read_dataset
from segzero_rt.image import load_image
from segzero_rt.kernels.backend import KERNELS_VARIABLE, resolve_kernels
from segzero_rt.mask import mask_iou
from segzero_rt.segmentation import Segmentation

PICTURE = Path(__file__).resolve().parents[1] / "docs/tabletop.png"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "test"
    image_rgb = load_image(PICTURE)
    mask = np.zeros(image_rgb.shape[:2], bool)
    mask[50:180, 210:320] = True
    with DatasetWriter(folder) as writer:
        name = writer.add_image(image_rgb)
        for text in ("the green scissors", "the spoon", "the mug"):
            writer.add_question(name, text, kind="name", objects=[LabeledObject.from_mask("x", mask)])
    return folder


@pytest.fixture(scope="module")
def samples(questions: Path) -> list[Sample]:
    return read_dataset(questions)


def nothing(size_hw: tuple[int, int]) -> Segmentation:
    return Segmentation.empty(Answer(status=AnswerStatus.NONE_FOUND), size_hw)


def test_both_are_asked_in_turns_and_scored(samples: list[Sample]) -> None:
    asked: list[str] = []

    def truth(image_rgb: np.ndarray, question: str) -> Segmentation:
        asked.append("now")
        sample = next(one for one in samples if one.text == question)
        prompts = tuple(Prompt(box_xyxy=one.box_xyxy, points_xy=()) for one in sample.objects)
        return Segmentation(
            masks=sample.masks, scores=np.ones(1, np.float32), boxes_xyxy=sample.boxes_xyxy,
            answer=Answer(status=AnswerStatus.OK, prompts=prompts), timings_ms={},
        )  # fmt: skip

    def empty(image_rgb: np.ndarray, question: str) -> Segmentation:
        asked.append("before")
        return nothing((image_rgb.shape[0], image_rgb.shape[1]))

    row = compare(truth, empty, samples)
    warm_up = ["now", "before"] * 2
    assert asked == [*warm_up, "now", "before", "before", "now", "now", "before"]
    assert row["giou"] == {"now": 1.0, "before": 0.0} and row["giou_lost"] == -1.0
    assert row["equal_answers"] == 0 and row["equal_masks"] == 0
    assert row["saved_ms"] == row["end_to_end_ms"]["before"] - row["end_to_end_ms"]["now"]


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.name)
def test_a_cost_changes_no_answer(cost: avoided_costs.Cost, samples: list[Sample]) -> None:
    bundle = Bundle.open(EMBEDDED, verify="size")
    image_rgb, question = samples[0].image_rgb, samples[0].text
    now, before = as_it_is(bundle)(image_rgb, question), cost.make(bundle)(image_rgb, question)
    assert before.status is now.status is AnswerStatus.OK and before.answer.thinking == now.answer.thinking
    assert before.answer == now.answer or not cost.same_numbers
    assert mask_iou(before.masks[0], now.masks[0]) > (0.97 if cost.same_numbers else 0.9)


@pytest.mark.parametrize("before", [None, "host"], ids=["unset", "set"])
def test_kernels_are_forced_meanwhile_alone(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    if before:
        monkeypatch.setenv(KERNELS_VARIABLE, before)
    with pytest.raises(ZeroDivisionError), reference(KERNELS_VARIABLE):
        assert resolve_kernels().name == "reference"
        _ = 1 / 0
    assert os.environ.get(KERNELS_VARIABLE) == before


def test_writes_a_result_of_every_cost(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["x", str(questions), "--questions", "1", "--threads", "1", "--out", str(tmp_path)]
    )
    avoided_costs.main()
    (result,) = tmp_path.glob("avoided_costs_*cores_*.json")
    one: dict[str, Any] = json.loads(result.read_text())["by_threads"]["1"]
    assert list(one["costs"]) == [cost.name for cost in COSTS if cost.least_cores == 1]
    assert list(one["costs"])[-1] == ALL_COSTS and one["num_questions"] == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["result"] == result.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["nothing here"], "annotations.jsonl", id="no dataset"),
        pytest.param(["SET", "--bundle", "nothing"], "expected a bundle", id="no bundle"),
        pytest.param(["SET", "--portable", "nothing"], "expected a bundle", id="no portable bundle"),
    ],
)
def test_bad_input_is_one_line(
    questions: Path, tmp_path: Path, options: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [str(questions) if one == "SET" else one for one in options]
    monkeypatch.setattr(sys, "argv", ["x", *given, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run_and_exit(avoided_costs.main, "avoided_costs")
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and message in told.err and not told.out and not list(tmp_path.iterdir())
