"""`segzero eval` on published layouts, with an oracle for the models: which questions, which pixels, what is broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from published_sets import (
    MASK_SCHEMA,
    TRAIN_SCHEMA,
    coco_tables,
    encoded,
    mask_row,
    picture,
    ref,
    shape,
    train_row,
    write_coco,
    write_parquet,
    write_reasonseg,
    write_refs,
)

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.cli import main, make_parser
from segzero_rt.commands import eval as eval_command
from segzero_rt.dataset import LabeledObject
from segzero_rt.errors import DatasetError, OutputError, QuestionError
from segzero_rt.evaluation import Record
from segzero_rt.segmentation import Segmentation

Mask = NDArray[np.bool_]
SIZE_HW = (40, 60)
TARGET = shape("target", (10, 10), (40, 10), (40, 30), (10, 30))
IGNORED = shape("ignore", (45, 10), (54, 10), (54, 19), (45, 19))
TARGET_AREA, IGNORED_AREA = 31 * 21, 10 * 10


def box_mask(left: int, top: int, right: int, bottom: int) -> Mask:
    mask = np.zeros(SIZE_HW, bool)
    mask[top:bottom, left:right] = True
    return mask


TARGET_MASK, IGNORED_MASK = box_mask(10, 10, 41, 31), box_mask(45, 10, 55, 20)


class Oracle:
    """Answers each question with given masks, `none` where there are no masks, and refuses an empty one as the pipeline
    does. Stops like Ctrl-C at its `stop_at`-th question."""

    def __init__(self, folder: Path, answers: Mapping[str, list[Mask]]) -> None:
        (folder / "manifest.json").write_text("{}")
        self.bundle = SimpleNamespace(root=folder, manifest=SimpleNamespace(name="oracle"))
        self.policy = SimpleNamespace(chat=SimpleNamespace(reply_start=str.split))
        self.answers = answers
        self.asked: list[str] = []
        self.pictures: list[NDArray[np.uint8]] = []
        self.stop_at = -1

    def __call__(self, image_rgb: NDArray[np.uint8], question: str, **options: Any) -> Segmentation:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(question)
        self.pictures.append(image_rgb)
        if not question.strip():
            raise QuestionError("expected a question in words, got ''; say what to look for")
        masks = self.answers.get(question, [])
        if not masks:
            return Segmentation.empty(Answer(status=AnswerStatus.NONE_FOUND), image_rgb.shape[:2])
        boxes = [LabeledObject.from_mask("", mask).box_xyxy for mask in masks]
        points = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes]
        prompts = tuple(Prompt(box_xyxy=box, points_xy=(point,)) for box, point in zip(boxes, points, strict=True))
        return Segmentation(
            masks=np.stack(masks),
            scores=np.ones(len(masks), np.float32),
            boxes_xyxy=np.array(boxes, np.float32),
            answer=Answer(status=AnswerStatus.OK, prompts=prompts, thinking="one two three"),
            decode_counts={"tokens": 30},
        )


Evaluate = Callable[..., tuple[dict[str, Any], list[Record], Oracle]]


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs the command; gives its document, its records and the oracle."""
    (tmp_path / "bundle").mkdir()

    def run(
        source: Path, answers: Mapping[str, list[Mask]], *options: object, stop_at: int = -1
    ) -> tuple[dict[str, Any], list[Record], Oracle]:
        oracle = Oracle(tmp_path / "bundle", answers)
        oracle.stop_at = stop_at
        monkeypatch.setattr(eval_command, "load_pipeline", lambda _: oracle)
        path = tmp_path / "records.jsonl"
        command = [str(source), "--json", "--records", str(path), *map(str, options)]
        assert eval_command.execute(make_parser(eval_command).parse_args(command)) == 0
        lines = path.read_text().splitlines()
        return json.loads(capsys.readouterr().out), [Record.from_json(json.loads(line)) for line in lines], oracle

    return run


# --- ReasonSeg


@pytest.mark.parametrize(
    ("predicted", "options", "iou"),
    [
        ([TARGET_MASK], [], 1.0),
        ([TARGET_MASK | IGNORED_MASK], [], 1.0),
        ([IGNORED_MASK], [], 0.0),
        ([TARGET_MASK], ["--ignored-pixels", "foreground"], TARGET_AREA / (TARGET_AREA + IGNORED_AREA)),
        ([TARGET_MASK | IGNORED_MASK], ["--ignored-pixels", "foreground"], 1.0),
        ([IGNORED_MASK], ["--ignored-pixels", "foreground"], IGNORED_AREA / (TARGET_AREA + IGNORED_AREA)),
        ([], [], 0.0),
    ],
    ids=["target", "both", "ignored", "target, all true", "both, all true", "ignored, all true", "nothing"],
)
def test_ignored_pixels(
    tmp_path: Path, evaluated: Evaluate, predicted: list[Mask], options: list[str], iou: float
) -> None:
    write_reasonseg(tmp_path / "val", "a", [TARGET, IGNORED], text=("what", "other"), is_sentence=True)
    document, (record,), _ = evaluated(tmp_path / "val", {"what": predicted}, *options)
    assert document["giou"] == record.iou == pytest.approx(iou)
    assert document["scoring"]["ignored_pixels"] == (options[1] if options else "left-out")
    assert (record.kind, record.num_objects) == ("sentence", 1)
    assert document["point_accuracy"] == (1.0 if predicted and (record.iou == 1 or "foreground" in options) else 0.0)


def test_the_authors_parquet_is_the_foreground_rule(tmp_path: Path, evaluated: Evaluate) -> None:
    """Their conversion takes levels (1 target, 255 ignored) for booleans; both layouts then score alike."""
    levels = np.where(IGNORED_MASK, 255, TARGET_MASK.astype(np.uint8))
    write_reasonseg(tmp_path / "val", "a", [TARGET, IGNORED], text=("what",))
    write_parquet(tmp_path / "val.parquet", [mask_row("what", levels.astype(bool))], MASK_SCHEMA)
    answers = {"what": [box_mask(8, 12, 50, 29)]}
    from_json = evaluated(tmp_path / "val", answers, "--ignored-pixels", "foreground")[1][0]
    document, (from_parquet,), _ = evaluated(tmp_path / "val.parquet", answers)
    left_out = evaluated(tmp_path / "val", answers)[1][0]
    assert (from_parquet.intersection, from_parquet.union) == (from_json.intersection, from_json.union)
    assert left_out.union < from_json.union
    assert document["scoring"] == {
        "layout": "authors' parquet", "questions": "as published", "ignored_pixels": "foreground, as published",
    }  # fmt: skip


def test_wordings_and_pictures_without_a_target(tmp_path: Path, evaluated: Evaluate) -> None:
    write_reasonseg(tmp_path / "test", "a", [TARGET], text=("first", "second"))
    write_reasonseg(tmp_path / "test", "b", [IGNORED], text=("nothing there",))
    document, records, oracle = evaluated(tmp_path / "test", {"first": [TARGET_MASK]})
    assert [(one.text, one.kind, one.iou) for one in records] == [
        ("first", "phrase", 1.0), ("nothing there", "none", 1.0),
    ]  # fmt: skip
    assert oracle.asked == ["first", "first", "nothing there"]  # once untimed
    assert document["scoring"]["questions"] == "first wording of each picture"
    document, records, _ = evaluated(tmp_path / "test", {"first": [TARGET_MASK]}, "--all-sentences")
    assert [one.text for one in records] == ["first", "second", "nothing there"]
    assert document["num_pictures"] == 2 and document["giou"] == pytest.approx(2 / 3)


def test_tokens_boxes_and_points(tmp_path: Path, evaluated: Evaluate) -> None:
    write_reasonseg(tmp_path / "val", "a", [TARGET], text=("what",))
    document, (record,), _ = evaluated(tmp_path / "val", {"what": [TARGET_MASK, IGNORED_MASK]})
    assert (record.thinking_tokens, record.reply_tokens) == (3, 30)
    assert document["thinking_tokens"]["mean"] == 3 and document["reply_tokens"]["p90"] == 30
    assert document["box_accuracy"] == document["point_accuracy"] == 0.5  # one of the two
    assert document["box_accuracy_interval_95"] == [0.5, 0.5]


# --- referring expressions, several objects, none


def referring(folder: Path) -> list[object]:
    refs = [
        ref(1, 139, 11, "grey cat", "animal on the left", split="testA"),
        ref(2, 139, [12, 13], "both remotes", split="testA"),
        ref(3, 285, [-1], "the dog", "a hound", split="testA"),
        ref(4, 139, 12, "", "upper remote", split="testA"),
    ]
    path, images = write_coco(folder, coco_tables())
    return [path, "--images", images, "--refs", write_refs(folder / "refs(unc).p", refs), "--split", "testA"]


CAT = box_mask(5, 10, 25, 30)
UPPER = box_mask(30, 2, 50, 8)
LOWER = box_mask(30, 20, 34, 36) | box_mask(36, 20, 40, 36)


def test_instances_and_expressions(tmp_path: Path, evaluated: Evaluate) -> None:
    source, *options = referring(tmp_path / "set")
    answers = {"grey cat": [CAT], "both remotes": [LOWER, UPPER], "animal on the left": [UPPER]}
    document, records, _ = evaluated(Path(str(source)), answers, *options)
    assert [(one.text, one.num_objects, one.iou) for one in records] == [
        ("grey cat", 1, 1.0), ("both remotes", 2, 1.0), ("", 1, 0.0), ("the dog", 0, 1.0),
    ]  # fmt: skip
    assert document["none_accuracy"] == 1.0 and document["false_none_rate"] == 0.0
    assert document["num_failed"] == 1 and "question in words" in document["failures"][0]["error"]
    assert document["box_accuracy"] == pytest.approx(2 / 3), "the failed one counts"
    assert document["scoring"]["questions"] == "first expression of each instance"
    document, records, _ = evaluated(Path(str(source)), answers, *options, "--all-sentences")
    assert [one.text for one in records] == [
        "grey cat", "animal on the left", "both remotes", "", "upper remote", "the dog", "a hound",
    ]  # fmt: skip
    assert document["giou"] == pytest.approx((1 + 0 + 1 + 0 + 0 + 1 + 1) / 7)
    assert document["scoring"]["split"] == "testA" and document["by_kind"]["none"]["num_samples"] == 2


def test_categories_and_what_is_not_there(tmp_path: Path, evaluated: Evaluate) -> None:
    path, images = write_coco(tmp_path / "set", coco_tables())
    answers = {"cat": [CAT], "remote": [UPPER]}
    document, records, _ = evaluated(path, answers, "--images", images, "--absent", 3)
    by_text = {one.text: one for one in records if one.num_objects}
    assert by_text["cat"].iou == 1.0 and 0 < by_text["remote"].iou < 1
    assert by_text["remote"].box_accuracy == 0.5, "one of two instances"
    absent = {(one.image, one.text): one.iou for one in records if not one.num_objects}
    assert len(absent) == 1 + 3, "one category is not on the first picture and not in a crowd"
    assert all(iou == (text not in answers) for (_, text), iou in absent.items())
    assert document["none_accuracy"] == sum(absent.values()) / 4
    assert document["scoring"]["absent"] == 3 and document["scoring"]["seed"] == 1


def test_rows_on_one_picture_are_one_picture(tmp_path: Path, evaluated: Evaluate) -> None:
    """RefCOCO's test files hold a row per instance, the picture in each; intervals are over pictures."""
    rows = [
        mask_row("one", TARGET_MASK, image_id="7", ann_id="1"),
        mask_row("two", IGNORED_MASK, image_id="7", ann_id="2"),
        mask_row("three", IGNORED_MASK, image_id="8", ann_id="1"),
        mask_row("three", IGNORED_MASK, image_id="8", ann_id="1"),  # given twice: asked twice
        mask_row("", IGNORED_MASK, image_id="9", ann_id="1"),
        mask_row("nothing", np.zeros(SIZE_HW, bool), image_id="10", ann_id="1"),
    ]
    path = write_parquet(tmp_path / "testA.parquet", rows, MASK_SCHEMA)
    document, records, _ = evaluated(path, {"one": [TARGET_MASK], "three": [IGNORED_MASK]})
    assert [one.iou for one in records] == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert document["num_samples"] == 6 and document["num_pictures"] == 4
    assert [one.sample_id for one in records[2:4]] == ["8-1", "8-1"] and records[2].source != records[3].source
    assert records[4].status == "failed" and records[5].kind == "none"


# --- what is broken


def test_pixels_are_taken_as_they_are_stored(tmp_path: Path, evaluated: Evaluate) -> None:
    """Annotations mean the stored pixels; an EXIF tag would turn them."""
    write_reasonseg(tmp_path / "val", "a", [TARGET], text=("what",))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "val/a.jpg").write_bytes(encoded(picture(40, 60), "JPEG", exif=exif))
    document, _, oracle = evaluated(tmp_path / "val", {"what": [TARGET_MASK]})
    assert document["giou"] == 1.0 and oracle.pictures[0].shape == (40, 60, 3)


def missing(folder: Path) -> None:
    (folder / "b.jpg").unlink()


def cut_short(folder: Path) -> None:
    data = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(data[: len(data) // 2])


def outside(folder: Path) -> None:
    write_reasonseg(folder, "b", [shape("target", (10, 10), (90, 10), (40, 30))])


def no_json(folder: Path) -> None:
    (folder / "b.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message", "known_area"),
    [
        (missing, r"b.jpg does not exist", False),
        (cut_short, r"b.json: question 0: cannot decode", True),
        (outside, r"b.json: shapes\[0\]: expected points inside", False),
        (no_json, r"b.json: expected JSON", False),
    ],
)
def test_a_broken_picture_stops_or_counts_as_zero(
    tmp_path: Path, evaluated: Evaluate, damage: Callable[[Path], None], message: str, known_area: bool
) -> None:
    folder = tmp_path / "val"
    for name in "abc":
        write_reasonseg(folder, name, [TARGET], text=("what",))
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        evaluated(folder, {"what": [TARGET_MASK]})
    report = tmp_path / "report.html"
    document, records, oracle = evaluated(folder, {"what": [TARGET_MASK]}, "--broken", "zero", "--report", report)
    assert [one.iou for one in records] == [1.0, 0.0, 1.0] and document["num_failed"] == 1
    assert document["giou"] == pytest.approx(2 / 3) and document["parse_rate"] == pytest.approx(2 / 3)
    assert document["ciou"] == pytest.approx(2 / 3 if known_area else 1.0)
    assert len(oracle.asked) == 2, "the first picture is known from the stopped run; the last is asked once untimed"
    page = report.read_text()
    assert "counted as IoU 0" in page and page.count("data:image/jpeg") == 4


def test_sets_that_cannot_be_scored(tmp_path: Path, evaluated: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
    box = "<box>(10,20),(50,60)</box><points>(30,40),(20,50)</points>"
    path = write_parquet(tmp_path / "train.parquet", [train_row("a", box)], TRAIN_SCHEMA)
    with pytest.raises(DatasetError, match=r"train.parquet: row 0.*boxes alone"):
        evaluated(path, {})
    wrong = {**mask_row("x", TARGET_MASK), "mask": np.ones((4, 6), bool).tolist()}
    path = write_parquet(tmp_path / "size.parquet", [wrong], MASK_SCHEMA)
    with pytest.raises(DatasetError, match=r"row 0.*size \(40, 60\), got \(4, 6\)"):
        evaluated(path, {})
    path.write_bytes(path.read_bytes()[:-20])
    assert main(["eval", str(path), "--json"]) == 2
    assert "cannot be opened" in capsys.readouterr().err


REFERRED = ("--images", "IMAGES", "--refs", "REFS", "--split", "testA")


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("reasonseg", ["--split", "val"], "--split belongs to a COCO-style"),
        ("reasonseg", ["--absent", 1], "--absent belongs to"),
        ("reasonseg", ["--seed", 1], "--seed belongs to a COCO-style"),
        ("parquet", ["--max-objects", 10], "--max-objects belongs to a COCO-style"),
        ("parquet", ["--ignored-pixels", "left-out"], "--ignored-pixels belongs to"),
        ("parquet", ["--all-sentences"], "--all-sentences belongs to"),
        ("coco", [], "expected --images"),
        ("coco", ["--images", "IMAGES", "--split", "val"], "--split belongs to --refs"),
        ("coco", ["--images", "IMAGES", "--refs", "REFS"], "expected --split"),
        ("coco", ["--images", "IMAGES", "--refs", "REFS", "--split", "val"], "expected refs of split 'val', it has"),
        ("coco", ["--images", "IMAGES", "--refs", "REFS", "--split", "testA", "--absent", 2], "--absent belongs to"),
        ("coco", ["--images", "IMAGES", "--seed", 1], "--seed belongs to --absent"),
        ("coco", [*REFERRED, "--seed", 7], "--seed belongs to instances without --refs"),
        ("coco", [*REFERRED, "--max-objects", 3], "--max-objects belongs to instances without --refs"),
        ("folder", ["--seed", 1], "--seed belongs to a COCO-style"),
        ("folder", ["--max-objects", 3], "--max-objects belongs to a COCO-style"),
        ("nothing", [], "found nothing there"),
        ("empty folder", [], "expected a folder with annotations.jsonl"),
        ("text file", [], "expected a folder with annotations.jsonl"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, evaluated: Evaluate, layout: str, options: list[object], message: str
) -> None:
    source = tmp_path / layout
    if layout == "reasonseg":
        write_reasonseg(source, "a", [TARGET])
    elif layout == "parquet":
        source = write_parquet(source / "a.parquet", [mask_row("x", TARGET_MASK)], MASK_SCHEMA)
    elif layout == "coco":
        path, *given = referring(source)
        known = {"IMAGES": given[1], "REFS": given[3]}
        source, options = Path(str(path)), [known.get(str(option), option) for option in options]
    elif layout in ("empty folder", "folder"):
        source.mkdir()
        if layout == "folder":
            (source / "annotations.jsonl").write_text("")
    elif layout == "text file":
        source.write_text("x")
    with pytest.raises(DatasetError, match=message):
        evaluated(source, {}, *options)


# --- evaluations that are stopped


def stopped_set(folder: Path) -> Path:
    for number in range(5):
        write_reasonseg(folder, f"p{number}", [TARGET], text=(f"q{number}a", f"q{number}b"))
    return folder


ANSWERS = {f"q{n}{s}": [box_mask(10, 10, 20 + 5 * n, 31)] for n in range(5) for s in "ab"}


def comparable(records: list[Record]) -> list[dict[str, Any]]:
    return [{**one.to_json(), "latency_ms": 0} for one in records]


@pytest.mark.parametrize("cut_line", [False, True], ids=["between lines", "within a line"])
def test_a_stopped_evaluation_goes_on(tmp_path: Path, evaluated: Evaluate, cut_line: bool) -> None:
    source = stopped_set(tmp_path / "val")
    _, whole, _ = evaluated(source, ANSWERS, "--all-sentences")
    (tmp_path / "records.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        evaluated(source, ANSWERS, "--all-sentences", stop_at=6)  # one untimed, two pictures, one question
    journal = tmp_path / "records.jsonl.partial"
    assert len(journal.read_text().splitlines()) == 3 and not (tmp_path / "records.jsonl").exists()
    if cut_line:
        journal.write_text(journal.read_text() + '{"picture": "p2", "rec')
    report = tmp_path / "report.html"
    document, records, oracle = evaluated(source, ANSWERS, "--all-sentences", "--report", report)
    assert oracle.asked == ["q2a", "q2a", "q2b", "q3a", "q3b", "q4a", "q4b"]
    assert comparable(records) == comparable(whole) and document["num_samples"] == 10
    assert not journal.exists()
    # answers of the stopped run are drawn from their records
    assert report.read_text().index(">q0a<") < report.read_text().index(">q4a<")
    assert report.read_text().count("data:image/jpeg") == 20


def test_another_evaluation_is_not_gone_on_with(tmp_path: Path, evaluated: Evaluate) -> None:
    source = stopped_set(tmp_path / "val")
    with pytest.raises(KeyboardInterrupt):
        evaluated(source, ANSWERS, stop_at=3)
    with pytest.raises(OutputError, match=r"stopped evaluation with questions 'first wording.*'every wording"):
        evaluated(source, ANSWERS, "--all-sentences")
    with pytest.raises(OutputError, match="ignored_pixels 'left-out'"):
        evaluated(source, ANSWERS, "--ignored-pixels", "foreground")
    with pytest.raises(OutputError, match="with constrained False, this one has True"):
        evaluated(source, ANSWERS, "--constrained")
    with pytest.raises(OutputError, match="with threads None, this one has 1"):  # its latencies would be mixed
        evaluated(source, ANSWERS, "--threads", 1)
    (source / "p0.json").rename(source / "p9.json")
    with pytest.raises(DatasetError, match=r"picture 'p0' of the stopped evaluation, got 'p1'"):
        evaluated(source, ANSWERS)
    journal = tmp_path / "records.jsonl.partial"
    for damage in ("[]\n", "{}\n", journal.read_text().splitlines()[0] + '\n{"picture": "p0", "records": [{}]}\n'):
        journal.write_text(damage)
        with pytest.raises(OutputError, match="expected the records of a stopped evaluation"):
            evaluated(source, ANSWERS)


def test_a_limit_may_end_within_a_picture(tmp_path: Path, evaluated: Evaluate) -> None:
    source = stopped_set(tmp_path / "val")
    _, records, oracle = evaluated(source, ANSWERS, "--all-sentences", "--limit", 3)
    assert [one.text for one in records] == ["q0a", "q0b", "q1a"] and len(oracle.asked) == 4


def test_the_readers_polygons_are_drawn_as_opencv_draws_them() -> None:
    """The expectation of this file: an outline belongs to its polygon."""
    levels = np.zeros(SIZE_HW, np.uint8)
    for one in (TARGET, IGNORED):
        cv2.fillPoly(levels, [np.array(one["points"], np.int32)], 1)
    np.testing.assert_array_equal(levels.astype(bool), TARGET_MASK | IGNORED_MASK)
    assert (TARGET_MASK.sum(), IGNORED_MASK.sum()) == (TARGET_AREA, IGNORED_AREA)
