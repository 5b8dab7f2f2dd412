"""`segzero eval` as a whole, with a stand-in for the models: documents, records, reports, shared looks, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.cli import make_parser
from segzero_rt.commands import eval as eval_command
from segzero_rt.commands.output_files import write_text
from segzero_rt.dataset import DatasetWriter, LabeledObject, Sample
from segzero_rt.errors import DatasetError, OutputError, QuestionError
from segzero_rt.evaluation import score_sample, summarize
from segzero_rt.evaluation_sets import EvaluationSet
from segzero_rt.report import render_html, render_markdown
from segzero_rt.report_gallery import draw_worst
from segzero_rt.segmentation import Segmentation

SIZE_HW = (20, 30)
HOSTILE = "<script>alert('x')</script> | a\nb"


def mask(left: int, right: int) -> np.ndarray:
    area = np.zeros(SIZE_HW, dtype=bool)
    area[5:15, left:right] = True
    return area


def found(*masks: np.ndarray, thinking: str = "") -> Segmentation:
    boxes = [LabeledObject.from_mask("", one).box_xyxy for one in masks]
    prompts = tuple(Prompt(box_xyxy=box) for box in boxes)
    return Segmentation(
        masks=np.stack(masks),
        scores=np.ones(len(masks), np.float32),
        boxes_xyxy=np.array(boxes, np.float32),
        answer=Answer(status=AnswerStatus.OK, prompts=prompts, thinking=thinking),
    )


class Pipeline:
    """Finds columns 5 to 15 whatever is asked; "nothing" finds nothing, "too long" is refused."""

    def __init__(self, folder: Path) -> None:
        (folder / "manifest.json").write_text("{}")
        self.bundle = SimpleNamespace(root=folder, manifest=SimpleNamespace(name="stand-in"))
        self.policy = SimpleNamespace(chat=SimpleNamespace(reply_start=lambda text: text.split()))
        self.looks = 0
        self.asked: list[str] = []

    def look(self, image_rgb: np.ndarray) -> str:
        self.looks += 1
        return "look"

    def ask(self, look: str, question: str, **options: Any) -> Segmentation:
        self.asked.append(question)
        if question == "too long":
            raise QuestionError("too long")
        if question == "nothing":
            return Segmentation.empty(Answer(status=AnswerStatus.NONE_FOUND), SIZE_HW)
        return found(mask(5, 15), thinking=HOSTILE)

    def __call__(self, image_rgb: np.ndarray, question: str, **options: Any) -> Segmentation:
        return self.ask(self.look(image_rgb), question, **options)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    with DatasetWriter(tmp_path / "set") as writer:
        for _ in range(2):
            name = writer.add_image(np.zeros((*SIZE_HW, 3), np.uint8))
            objects = [LabeledObject.from_mask("mug", mask(5, 15))]
            writer.add_question(name, "good", kind="name", objects=objects)
            writer.add_question(name, HOSTILE, kind="<b>", objects=[LabeledObject.from_mask("mug", mask(15, 25))])
            writer.add_question(name, "nothing", kind="none")
            writer.add_question(name, "too long", kind="name", objects=objects)
    return tmp_path / "set"


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    stand_in = Pipeline(tmp_path)
    monkeypatch.setattr(eval_command, "load_pipeline", lambda _: stand_in)
    return stand_in


def run(dataset: Path, *options: object) -> int:
    arguments = make_parser(eval_command).parse_args([str(dataset), *map(str, options)])
    return eval_command.execute(arguments)


def test_document(dataset: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dataset, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["giou"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert document["num_samples"] == 8 and document["num_failed"] == 2
    assert document["none_accuracy"] == 1.0 and document["parse_rate"] == 0.75
    assert document["by_kind"]["none"]["num_samples"] == 2
    assert set(document["latency_ms"]) == {"p50", "p90", "p99"}
    assert document["bundle"]["name"] == "stand-in"
    # Every question pays for its own look, and the first is asked once more before the timing starts.
    assert pipeline.looks == 9 and pipeline.asked[:2] == ["good", "good"]


def test_reused_view_looks_once_per_picture(
    dataset: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dataset, "--json", "--reuse-view") == 0
    assert json.loads(capsys.readouterr().out)["giou"] == pytest.approx(0.5)
    assert pipeline.looks == 2 and len(pipeline.asked) == 9


def test_limit_and_text(dataset: Path, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dataset, "--limit", 3) == 0
    text = capsys.readouterr().out
    assert "gIoU" in text and "0.6667" in text and len(pipeline.asked) == 4


def test_records_are_one_line_per_sample(dataset: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    assert run(dataset, "--records", tmp_path / "records.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [row["iou"] for row in rows] == [1.0, 0.0, 1.0, 0.0] * 2
    assert rows[3]["error"] == "QuestionError: too long" and rows[3]["source"].endswith("annotations.jsonl:4")
    assert rows[1]["boxes_xyxy"] == [[5.0, 5.0, 15.0, 15.0]]


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_report_is_written_and_escaped(dataset: Path, pipeline: Pipeline, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report{suffix}"
    assert run(dataset, "--report", path) == 0
    text = path.read_text()
    assert "0.5000" in text and "&lt;script&gt;" in text and "<script" not in text and "<b>" not in text
    assert "http" not in text  # nothing is loaded from anywhere
    assert not list(tmp_path.glob(".report*"))


def test_html_shows_the_worst_first_and_reads_no_other_picture(tmp_path: Path) -> None:
    truth = LabeledObject.from_mask("mug", mask(5, 15))
    by_picture, samples, loaded = [], [], []
    for index, right in enumerate((15, 10, 6, 8, 12)):
        path = tmp_path / f"{index}.png"
        Image.fromarray(np.zeros((*SIZE_HW, 3), np.uint8)).save(path)
        asked = Sample(image_path=path, text=f"q{index}", kind="name", size_hw=SIZE_HW, objects=(truth,))
        samples.append(asked)
        record = score_sample(asked, found(mask(5, right)), latency_ms=1, keep_masks=True)
        by_picture.append((str(index), [record]))

    def load(index: int) -> list[Sample]:
        loaded.append(index)
        return [samples[index]]

    stand_in = EvaluationSet(
        num_pictures=5, facts={}, pictures=lambda: ((str(index), partial(load, index)) for index in range(5))
    )
    worst = draw_worst(stand_in, by_picture, size=3)
    assert [drawing.record.text for drawing in worst] == ["q2", "q3", "q1"] and loaded == [1, 2, 3]
    assert worst[0].answer_jpeg != worst[0].truth_jpeg
    records = [record for _, of_one in by_picture for record in of_one]
    page = render_html(summarize(records), records, worst)
    assert page.index(">q2<") < page.index(">q3<") < page.index(">q1<") and page.count("data:image/jpeg") == 6


def test_markdown_lists_the_worst_first() -> None:
    asked = Sample(image_path=Path("images/0.png"), text="a", kind="name", size_hw=SIZE_HW)
    good = score_sample(asked, Segmentation.empty(Answer(status=AnswerStatus.NONE_FOUND), SIZE_HW), latency_ms=1)
    bad = replace(good, iou=0.25, text="x | y")
    text = render_markdown(summarize([good, bad]), [good, bad])
    assert text.index("| 0.250 |") < text.index("| 1.000 |") and "x \\| y" in text


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("records", "records.txt", "ends in .jsonl"),
        ("report", "report.pdf", "ends in .html, .md"),
        ("report", "missing/report.html", "folder that exists"),
        ("records", "folder.jsonl", "expected a file"),
    ],
)
def test_refuses_outputs_before_any_work(
    dataset: Path, pipeline: Pipeline, tmp_path: Path, option: str, value: str, message: str
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(OutputError, match=message):
        run(dataset, f"--{option}", tmp_path / value)
    assert pipeline.asked == []


def test_refuses_a_bad_dataset_before_any_work(tmp_path: Path, pipeline: Pipeline) -> None:
    with pytest.raises(DatasetError):
        run(tmp_path)
    assert pipeline.asked == []


def test_half_a_surrogate_in_a_report_does_not_fail_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.md", "\ud800 x")
    assert (tmp_path / "a.md").read_text() == "\\ud800 x"
