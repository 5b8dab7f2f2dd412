"""The papers' rewards: the behaviour measured on the authors' code, every threshold from both sides, and any text."""

from __future__ import annotations

import json
import math
import pickle
import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from reward_cases import (
    FENCED_LIST,
    FENCED_SINGLE,
    MUG,
    MUG_ITEM,
    MUG_JSON,
    PLATE,
    PLATE_ITEM,
    SIZE_HW,
    columns_of,
    reply,
    terms,
    total,
)

from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.answer_parser import ParseMode
from segzero_rt.errors import DatasetError
from training.reward_geometry import pixel_scale
from training.reward_readings import completion_text
from training.rewards import (
    REQUIRED_COLUMNS,
    cases_of,
    check_columns,
    check_seg_zero_row,
    check_vision_reasoner_row,
    seg_zero_rewards,
    vision_reasoner_rewards,
)
from training.rows import RowObject, TrainingRow

# --- the reference's table "Behaviour measured by running the code", row by row

SEG_ZERO_MEASURED = [
    ("correct", reply(MUG_JSON), 5, 5),
    ("single-quoted JSON", reply(MUG_JSON.replace('"', "'")), 1, 1),
    ("fenced JSON", reply(f"```json\n{MUG_JSON}\n```"), 5, 5),
    ("keys point_1/point_2", reply(MUG_JSON.replace("points_", "point_")), 3, 4),
    ("trailing newline", reply(MUG_JSON) + "\n", 4, 4),
    ("EMPTY <think></think>", reply(MUG_JSON, thinking=""), 5, 5),
]


@pytest.mark.parametrize(
    ("text", "strict", "soft"), [row[1:] for row in SEG_ZERO_MEASURED], ids=[row[0] for row in SEG_ZERO_MEASURED]
)
def test_seg_zero_behaves_as_measured(text: str, strict: float, soft: float) -> None:
    assert total(seg_zero_rewards(strict=True), text, MUG) == strict
    assert total(seg_zero_rewards(strict=False), text, MUG) == soft


VISION_REASONER_MEASURED = [
    ("perfect", reply(f"[{MUG_ITEM}, {PLATE_ITEM}]"), (MUG, PLATE), 7),
    ("[] vs 2 GT", reply("[]"), (MUG, PLATE), 2),
    ("[] vs []", reply("[]"), (), 2),
    ("1 of 2 found", reply(f"[{PLATE_ITEM}]"), (MUG, PLATE), 5.5),
    ("duplicated predictions", reply(f"[{MUG_ITEM}, {MUG_ITEM}]"), (MUG,), 5.5),
    ("dict instead of list", reply(MUG_ITEM), (MUG,), 2),
    ("fenced JSON", reply(f"```json\n[{MUG_ITEM}]\n```"), (MUG,), 2),
]


@pytest.mark.parametrize(
    ("text", "objects", "expected"),
    [row[1:] for row in VISION_REASONER_MEASURED],
    ids=[row[0] for row in VISION_REASONER_MEASURED],
)
def test_vision_reasoner_behaves_as_measured(text: str, objects: tuple[RowObject, ...], expected: float) -> None:
    assert total(vision_reasoner_rewards(), text, *objects) == expected


def test_breakdown_names_the_terms() -> None:
    assert terms(seg_zero_rewards(), reply(MUG_JSON), MUG) == {
        "think_format": 1, "answer_format": 1, "box_iou": 1, "box_l1": 1, "points": 1,
    }  # fmt: skip
    found = terms(vision_reasoner_rewards(), reply(f"[{MUG_ITEM}]"), MUG)
    assert found == {"think_format": 1, "answer_format": 2, "accuracy": 3, "non_repeat": 1}
    for rewards, most in ((seg_zero_rewards(), 5), (vision_reasoner_rewards(), 7)):
        assert sum(reward.maximum for reward in rewards) == most


# --- every threshold from both sides


def single(box: Any, first: Any = (180, 200), second: Any = (240, 260)) -> str:
    return reply(json.dumps({"bbox": box, "points_1": first, "points_2": second}))


# The truth's box is 201 px wide with its last pixel: 101 of 201 rows shared is just above half, 100 just below.
SEG_ZERO_TERMS = [
    ("iou just above half", single([100, 100, 300, 200]), "box_iou", 1),
    ("iou just below half", single([100, 100, 300, 199]), "box_iou", 0),
    ("l1 just below 10", single([100, 100, 300, 339.96]), "box_l1", 1),
    ("l1 of 10", single([100, 100, 300, 340]), "box_l1", 0),
    ("l1 counts both ways", single([90, 110, 290, 309.9]), "box_l1", 1),
    ("points swapped", single([100, 100, 300, 300], (240, 260), (180, 200)), "points", 1),
    ("points on the edge", single([180, 200, 240, 260]), "points", 1),
    ("points just outside", single([181, 200, 240, 260]), "points", 0),
    ("points 100 px off", single([0, 0, 800, 800], (180, 300), (240, 360)), "points", 0),
    ("points 99 px off", single([0, 0, 800, 800], (180, 299), (240, 359)), "points", 1),
    ("fractions of points are cut", single([0, 0, 800, 800], (180, 299.9), (240, 359.9)), "points", 1),
    ("points as text", single([100, 100, 300, 300], ("180", " 200 "), ("240", "+260")), "points", 1),
    ("points of three, first two count", single([100, 100, 300, 300], (180, 200, 9), (240, 260)), "points", 1),
    ("points of three are no format", single([100, 100, 300, 300], (180, 200, 9), (240, 260)), "answer_format", 0),
    ("box as text is no box", single(["100", "100", "300", "300"]), "box_iou", 0),
    ("box as text is a format", single(["100", "100", "300", "300"]), "answer_format", 1),
    ("booleans are no numbers", single([100, 100, 300, True]), "box_l1", 0),
    ("endless box", single([100, 100, 300, math.inf]), "box_iou", 0),
    ("box of NaN", single([100, 100, 300, math.nan]), "box_l1", 0),
    ("touching boxes share nothing", single([300, 300, 500, 500]), "box_iou", 0),
    ("a further key may stand", reply(MUG_JSON[:-1] + ', "label": "mug"}'), "answer_format", 1),
    ("the first braces count, thinking included", reply(MUG_JSON, thinking="in {braces}"), "box_iou", 0),
    ("empty braces are passed over", reply(MUG_JSON, thinking="in {} braces"), "box_iou", 1),
    ("no braces", reply("the mug"), "answer_format", 0),
    ("no text", "", "think_format", 0),
]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "soft"])
@pytest.mark.parametrize(
    ("text", "term", "expected"), [row[1:] for row in SEG_ZERO_TERMS], ids=[row[0] for row in SEG_ZERO_TERMS]
)
def test_seg_zero_term(text: str, term: str, expected: float, strict: bool) -> None:
    assert terms(seg_zero_rewards(strict=strict), text, MUG)[term] == expected


def test_strict_keys_count_for_boxes_and_points_too() -> None:
    text = reply('{"BBOX_2d": [100, 100, 300, 300], "Points_a": [180, 200], "points_b": [240, 260]}')
    assert list(terms(seg_zero_rewards(strict=True), text, MUG).values()) == [1, 0, 0, 0, 0]
    assert list(terms(seg_zero_rewards(strict=False), text, MUG).values()) == [1, 1, 1, 1, 1]


def listed(*items: Any) -> str:
    return reply(json.dumps(items))


def item(box: Any = (100, 100, 300, 300), point: Any = (180, 200)) -> dict[str, Any]:
    return {"bbox_2d": box, "point_2d": point}


VISION_REASONER_TERMS = [
    ("iou just above half", listed(item([100, 100, 300, 200])), "accuracy", 2),
    ("iou just below half", listed(item([100, 100, 300, 199], [180, 199])), "accuracy", 1),
    ("l1 just below 10", listed(item([100, 100, 300, 339.96])), "accuracy", 3),
    ("l1 of 10", listed(item([100, 100, 300, 340])), "accuracy", 2),
    ("point 29 px off", listed(item(point=[180, 229])), "accuracy", 3),
    ("point 30 px off", listed(item(point=[180, 230])), "accuracy", 2),
    ("distance is Euclidean", listed(item(point=[201, 221])), "accuracy", 3),
    ("point on its box's edge", listed(item([180, 100, 300, 300])), "accuracy", 2),
    ("point just outside its box", listed(item([180.5, 100, 300, 300])), "accuracy", 1),
    ("a stranger costs", listed(item(), item([500, 500, 600, 600], [550, 550])), "accuracy", 1.5),
    ("box of three spoils all", listed(item(), item([1, 2, 3])), "accuracy", 0),
    ("missing point spoils all", listed(item(), {"bbox_2d": [1, 2, 3, 4]}), "accuracy", 0),
    ("text as number", listed(item(["100", 100, 300, 300])), "accuracy", 0),
    ("NaN in a box", listed(item([100, 100, 300, math.nan])), "accuracy", 0),
    ("endless point", listed(item(point=[180, math.inf])), "accuracy", 2),
    ("half a format", listed({"bbox_2d": [1, 2, 3, 4]}), "answer_format", 1),
    ("mean of formats", listed(item(), {"bbox_2d": [1, 2, 3]}), "answer_format", 1),
    ("format does not look at numbers", listed(item(["a", "b", "c", "d"], [None, None])), "answer_format", 2),
    ("a number stops the count", listed(item(), 5, item()), "answer_format", 2 / 3),
    ("text is passed over", listed("mug", item()), "answer_format", 1),
    ("first answer counts", reply(f"[{PLATE_ITEM}]") + reply(f"[{MUG_ITEM}]"), "accuracy", 0),
    ("answer in the thinking counts", reply("[]", thinking=f"<answer>[{MUG_ITEM}]</answer>"), "accuracy", 3),
    ("no tags", f"[{MUG_ITEM}]", "accuracy", 0),
    ("one repetition is fine", reply("[]", thinking="A. A. B"), "non_repeat", 1),
    ("two repetitions are not", reply("[]", thinking="x. A. A. B. A. "), "non_repeat", 0),
    ("blanks do not count", reply("[]", thinking="x. A .A.  A. . . ."), "non_repeat", 0),
]


@pytest.mark.parametrize(
    ("text", "term", "expected"),
    [row[1:] for row in VISION_REASONER_TERMS],
    ids=[row[0] for row in VISION_REASONER_TERMS],
)
def test_vision_reasoner_term(text: str, term: str, expected: float) -> None:
    assert terms(vision_reasoner_rewards(), text, MUG)[term] == pytest.approx(expected)


def test_matching_is_the_best_of_all() -> None:
    rng = random.Random(1)

    def box() -> tuple[int, int, int, int]:
        left, top = rng.randrange(0, 60), rng.randrange(0, 60)
        return left, top, left + rng.randrange(60, 200), top + rng.randrange(60, 200)

    def centre(of: tuple[int, int, int, int]) -> tuple[float, float]:
        return (of[0] + of[2]) / 2, (of[1] + of[3]) / 2

    def pair(one: Any, other: Any) -> float:
        text = listed(item(one, centre(one)))
        truth = RowObject(box_xyxy=other, points_xy=(centre(other),))
        return float(terms(vision_reasoner_rewards(), text, truth)["accuracy"])

    partial = 0
    for _ in range(40):
        predicted, true = [box() for _ in range(3)], [box() for _ in range(4)]
        best = max(
            sum(pair(one, other) for one, other in zip(predicted, order, strict=False))
            for order in permutations(true, 3)
        )
        text = listed(*(item(one, centre(one)) for one in predicted))
        truth = [RowObject(box_xyxy=one, points_xy=(centre(one),)) for one in true]
        assert terms(vision_reasoner_rewards(), text, *truth)["accuracy"] == pytest.approx(best / 4)
        partial += 0 < best < 9
    assert partial > 20


@pytest.mark.parametrize(
    ("side", "l1_px", "point_px", "two_points_px"), [(840, 10, 30, 100), (168, 2, 6, 20), (420, 5, 15, 50)]
)
def test_pixel_thresholds_scale_with_the_input(side: int, l1_px: float, point_px: float, two_points_px: float) -> None:
    size_hw = (side, side)
    box = [0.1 * side, 0.1 * side, 0.9 * side, 0.8 * side]
    first, second = (side // 2, side // 4), (side // 2, side // 3)
    truth = RowObject(box_xyxy=(box[0], box[1], box[2], box[3]), points_xy=(first, second))
    for factor, met in ((0.9, 1), (1.1, 0)):
        moved = [box[0], box[1], box[2], box[3] + 4 * l1_px * factor]
        single_text = single(moved, first, second)
        assert terms(seg_zero_rewards(), single_text, truth, size_hw=size_hw)["box_l1"] == met
        listed_text = listed(item(moved, (first[0], first[1] + 1e-3)))
        assert terms(vision_reasoner_rewards(), listed_text, truth, size_hw=size_hw)["accuracy"] == 2 + met
        pointed = listed(item(box, (first[0] + point_px * factor, first[1])))
        assert terms(vision_reasoner_rewards(), pointed, truth, size_hw=size_hw)["accuracy"] == 2 + met
        far = round(two_points_px * factor)
        both = single(box, (first[0] + far, first[1]), (second[0] + far, second[1]))
        assert terms(seg_zero_rewards(), both, truth, size_hw=size_hw)["points"] == met


def test_scale_of_an_oblong_input_is_the_geometric_mean() -> None:
    assert pixel_scale((420, 1680)) == pytest.approx(1)
    assert pixel_scale((168, 168)) == pytest.approx(0.2)


# --- parse modes

EXAMPLE = VISION_REASONER.prompt_tail.partition("<answer>")[2].removesuffix("</answer>")
MODE_CASES: list[tuple[str, ParseMode, str, float]] = [
    ("fence, own scripts", "vision_reasoner", FENCED_LIST, 2),
    ("fence, tolerant", "tolerant", FENCED_LIST, 7),
    ("fence, rfc8259", "rfc8259", FENCED_LIST, 2),
    ("single quotes, tolerant", "tolerant", reply(f"[{MUG_ITEM}]".replace('"', "'")), 7),
    ("single quotes, rfc8259", "rfc8259", reply(f"[{MUG_ITEM}]".replace('"', "'")), 2),
    ("canonical, rfc8259", "rfc8259", reply(f"[{MUG_ITEM}]"), 7),
    ("box without a point, tolerant", "tolerant", listed({"bbox_2d": [100, 100, 300, 300]}), 5),
    ("point outside its box, tolerant", "tolerant", listed(item(point=[500, 500])), 5),
    ("the prompt's example, tolerant", "tolerant", reply(EXAMPLE), 2),
    ("corners swapped, own scripts", "vision_reasoner", listed(item([300, 300, 100, 100])), 4),
    ("corners swapped, tolerant", "tolerant", listed(item([300, 300, 100, 100])), 7),
]


@pytest.mark.parametrize(
    ("mode", "text", "expected"), [row[1:] for row in MODE_CASES], ids=[row[0] for row in MODE_CASES]
)
def test_list_modes(mode: ParseMode, text: str, expected: float) -> None:
    assert total(vision_reasoner_rewards(mode=mode), text, MUG) == expected


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        ("seg_zero", FENCED_SINGLE, 5),
        ("tolerant", FENCED_SINGLE, 5),
        ("rfc8259", FENCED_SINGLE, 1),
        ("tolerant", reply(MUG_JSON.replace('"', "'")), 5),
        ("tolerant", reply(MUG_JSON.replace("240, 260", "999, 260")), 3),
        ("rfc8259", reply(MUG_JSON), 5),
        ("tolerant", reply("{}"), 1),
    ],
)
def test_single_modes(mode: ParseMode, text: str, expected: float) -> None:
    assert total(seg_zero_rewards(mode=mode), text, MUG) == expected


def test_modes_of_the_other_family_are_refused() -> None:
    with pytest.raises(ValueError, match="parse mode"):
        total(seg_zero_rewards(mode="vision_reasoner"), reply(MUG_JSON), MUG)
    with pytest.raises(ValueError, match="parse mode"):
        total(vision_reasoner_rewards(mode="seg_zero"), reply("[]"), MUG)
    with pytest.raises(ValueError, match="parse mode"):
        total(vision_reasoner_rewards(mode="loose"), reply("[]"), MUG)  # type: ignore[arg-type]


# --- TRL's signature


def test_scores_a_batch_as_trl_hands_it_over() -> None:
    texts = [reply(f"[{MUG_ITEM}]"), reply("[]"), reply(f"[{MUG_ITEM}]")]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    for completions in (texts, chats, parts):
        found = {
            reward.__name__: reward(prompts=["p"] * 3, completions=completions, **columns_of((MUG,), (MUG,), (PLATE,)))
            for reward in vision_reasoner_rewards()
        }
        assert found == {
            "think_format": [1, 1, 1], "answer_format": [2, 0, 2], "accuracy": [3, 0, 0], "non_repeat": [1, 1, 1],
        }  # fmt: skip
        assert all(type(value) is float for column in found.values() for value in column)


def test_rows_survive_the_data_set_that_trl_reads() -> None:
    masked = RowObject(box_xyxy=(10, 20.5, 30, 40), mask_rle={"size": [4, 6], "counts": "0h0"}, points_xy=((20, 30),))
    truths: list[tuple[RowObject, ...]] = [(), (MUG,), (masked, PLATE)]
    rows = [
        TrainingRow(row_id=f"r{n}", question="q", image=Path("x.png"), input_size_hw=SIZE_HW, objects=truth)
        for n, truth in enumerate(truths)
    ]
    data = Dataset.from_list([row.to_columns() for row in rows])
    texts = [reply(f"[{MUG_ITEM}]")] * 3
    columns = {name: data[:][name] for name in data.column_names}
    assert [one.objects for one in cases_of(texts, columns)] == truths
    assert vision_reasoner_rewards()[2](["p"] * 3, texts, **columns) == [0, 3, 0]


def test_rewards_can_be_pickled_for_workers() -> None:
    for rewards, text in ((seg_zero_rewards(), reply(MUG_JSON)), (vision_reasoner_rewards(), reply("[]"))):
        again = pickle.loads(pickle.dumps(rewards))
        assert terms(again, text, MUG) == terms(rewards, text, MUG)


def test_absent_columns_raise_by_name() -> None:
    columns = columns_of((MUG,))
    for name in REQUIRED_COLUMNS:
        rest = {key: value for key, value in columns.items() if key != name}
        with pytest.raises(ValueError, match=f"`?{name}"):
            vision_reasoner_rewards()[0](["p"], [reply("[]")], **rest)
        with pytest.raises(ValueError, match=name):
            check_columns(rest)
    check_columns(columns)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("column too short", {"row_id": []}, ValueError, "`row_id` with 1 entries"),
        ("column no list", {"objects": None}, ValueError, "`objects`"),
        ("objects no list", {"objects": [None]}, DatasetError, "row 0"),
        ("object without a box", {"objects": [[{"points_xy": []}]]}, DatasetError, "box_xyxy"),
        ("object without a point", {"objects": [[{**MUG.to_json(), "points_xy": []}]]}, DatasetError, "row 0.*point"),
    ],
)
def test_bad_rows_raise_instead_of_scoring_nothing(
    name: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vision_reasoner_rewards()[2](["p"], [reply("[]")], **{**columns_of((MUG,)), **changes})


@pytest.mark.parametrize("completion", [None, 5, [], [{"role": "assistant"}], [{"content": [{"type": "image"}]}], b"x"])
def test_what_is_no_completion_raises(completion: Any) -> None:
    with pytest.raises(TypeError, match="expected"):
        completion_text(completion)


def test_rows_are_checked_for_their_family() -> None:
    def row(*objects: RowObject) -> TrainingRow:
        return TrainingRow(row_id="r7", question="q", image=Path("x"), input_size_hw=SIZE_HW, objects=objects)

    check_seg_zero_row(row(MUG))
    check_seg_zero_row(row())
    check_vision_reasoner_row(row(MUG, PLATE))
    one_point = RowObject(box_xyxy=(1, 2, 3, 4), points_xy=((1, 2),))
    for wrong in (row(MUG, PLATE), row(one_point)):
        with pytest.raises(DatasetError, match="'r7'"):
            check_seg_zero_row(wrong)
    check_vision_reasoner_row(row(one_point))
    with pytest.raises(DatasetError, match="'r7'"):
        check_vision_reasoner_row(row(MUG, RowObject(box_xyxy=(1, 2, 3, 4))))
