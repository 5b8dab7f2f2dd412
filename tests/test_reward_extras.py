"""Rewards beyond the papers: abstention, empty thinking, brevity after accuracy, and the segmenter's masks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_corpus import CORPUS, text_of
from PIL import Image

from segzero_rt.answer_format import SEG_ZERO, VISION_REASONER
from segzero_rt.errors import DatasetError
from segzero_rt.mask import encode_rle
from training.reward_extras import (
    abstention_reward,
    brevity_reward,
    closeness_reward,
    count_marks,
    empty_thinking_penalty,
    is_right,
    mask_iou_reward,
)
from training.rewards import Case, Reward, score, seg_zero_rewards, vision_reasoner_rewards
from training.rows import RowObject

SIZE_HW = (100, 200)
LEFT = RowObject(box_xyxy=(10, 10, 60, 90), points_xy=((35, 50), (35, 70)))
RIGHT = RowObject(box_xyxy=(120, 20, 190, 80), points_xy=((150, 50), (170, 40)))
LEFT_ITEM = '{"bbox_2d": [10, 10, 60, 90], "point_2d": [35, 50]}'
RIGHT_ITEM = '{"bbox_2d": [120, 20, 190, 80], "point_2d": [150, 50]}'
FAR_ITEM = '{"bbox_2d": [70, 10, 90, 30], "point_2d": [80, 20]}'


def reply(answer: str, thinking: str = "There is a mug.") -> str:
    return f"<think>{thinking}</think>\n<answer>{answer}</answer>"


def give(reward: Reward, text: str, *objects: RowObject, **more: Any) -> float:
    case = Case(text=text, objects=objects, input_size_hw=SIZE_HW, row_id="row 7", **more)
    return score(case, [reward]).terms[reward.name]


@pytest.mark.parametrize(
    ("name", "answer", "objects", "expected"),
    [
        ("none, rightly", "[]", (), 5),
        ("none, wrongly", "[]", (LEFT,), 0),
        ("invented", f"[{LEFT_ITEM}]", (), 0),
        ("found", f"[{LEFT_ITEM}]", (LEFT,), 0),
        ("broken, nothing there", "[{", (), 0),
        ("prose, nothing there", "there is none", (), 0),
        ("null, nothing there", "null", (), 5),
    ],
)
def test_abstention(name: str, answer: str, objects: tuple[RowObject, ...], expected: float) -> None:
    assert give(abstention_reward(), reply(answer), *objects) == expected
    assert give(abstention_reward(value=2.5), reply(answer), *objects) == expected / 2


def test_abstaining_rightly_earns_as_much_as_finding() -> None:
    lists = (*vision_reasoner_rewards(mode="tolerant"), abstention_reward())
    singles = (*seg_zero_rewards(mode="tolerant"), abstention_reward(family=SEG_ZERO))
    for rewards, nothing, something in (
        (lists, "[]", f"[{LEFT_ITEM}]"),
        (singles, "{}", '{"bbox": [10, 10, 60, 90], "points_1": [35, 50], "points_2": [35, 70]}'),
    ):
        empty = Case(text=reply(nothing), objects=(), input_size_hw=SIZE_HW)
        full = Case(text=reply(something), objects=(LEFT,), input_size_hw=SIZE_HW)
        assert score(empty, rewards).total == score(full, rewards).total
        wrong = [
            Case(text=reply(something), objects=(), input_size_hw=SIZE_HW),
            Case(text=reply(nothing), objects=(LEFT,), input_size_hw=SIZE_HW),
        ]
        assert all(score(case, rewards).total < score(full, rewards).total - 2 for case in wrong)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("empty", reply("[]", ""), -1),
        ("blanks", reply("[]", " \n\t "), -1),
        ("marks alone", reply("[]", "… . . . !?"), -1),
        ("two words", reply("[]", "A mug."), -1),
        ("three words", reply("[]", "A mug, left."), 0),
        ("no think block", "<answer>[]</answer>", -1),
        ("thinking without tags", "There is no such mug. <answer>[]</answer>", 0),
        ("nothing at all", "", -1),
    ],
)
def test_empty_thinking(name: str, text: str, expected: float) -> None:
    assert give(empty_thinking_penalty(), text, LEFT) == expected
    assert give(empty_thinking_penalty(cost=0.25, min_words=0), text, LEFT) == 0


@pytest.mark.parametrize(
    ("name", "answer", "objects", "right"),
    [
        ("found", f"[{LEFT_ITEM}]", (LEFT,), True),
        ("both, in another order", f"[{RIGHT_ITEM}, {LEFT_ITEM}]", (LEFT, RIGHT), True),
        ("one of two", f"[{LEFT_ITEM}]", (LEFT, RIGHT), False),
        ("one twice", f"[{LEFT_ITEM}, {LEFT_ITEM}]", (LEFT, RIGHT), False),
        ("a stranger besides", f"[{LEFT_ITEM}, {FAR_ITEM}]", (LEFT,), False),
        ("elsewhere", f"[{FAR_ITEM}]", (LEFT,), False),
        ("none, rightly", "[]", (), True),
        ("none, wrongly", "[]", (LEFT,), False),
        ("broken", "[{", (), False),
    ],
)
def test_brevity_is_for_right_answers_only(name: str, answer: str, objects: tuple[RowObject, ...], right: bool) -> None:
    case = Case(text=reply(answer), objects=objects, input_size_hw=SIZE_HW)
    for mode in ("tolerant", "rfc8259", "vision_reasoner"):
        assert is_right(case, family=VISION_REASONER, mode=mode) == right  # type: ignore[arg-type]
    bonus = give(brevity_reward(budget=40, floor=5), case.text, *objects)
    assert bonus == (0.5 / max(1, len(objects)) if right else 0)


@pytest.mark.parametrize(
    ("words", "share"), [(0, 1), (4, 1), (5, 1), (10, 2 / 3), (20, 1 / 3), (39, 0.01218), (40, 0), (500, 0)]
)
def test_brevity_falls_from_floor_to_budget(words: int, share: float) -> None:
    text = reply(f"[{LEFT_ITEM}]", "mug " * words)
    assert give(brevity_reward(budget=40, floor=5), text, LEFT) == pytest.approx(0.5 * share, abs=1e-5)


def test_halving_a_thinking_is_worth_the_same_however_long_it_was() -> None:
    reward = brevity_reward(budget=80, floor=5)
    bonuses = [give(reward, reply(f"[{LEFT_ITEM}]", "mug " * words), LEFT) for words in (80, 40, 20, 10, 5)]
    assert bonuses == pytest.approx([0.0, 0.5 / 4, 0.5 / 2, 0.5 * 3 / 4, 0.5])


def test_brevity_counts_what_it_is_told_to() -> None:
    text = reply(f"[{LEFT_ITEM}]", "mugs mugs")  # nine characters, two words
    assert give(brevity_reward(budget=9, floor=3, count_tokens=len), text, LEFT) == 0.0
    assert give(brevity_reward(budget=27, floor=3, count_tokens=len), text, LEFT) == pytest.approx(0.5 / 2)


def test_accuracy_comes_before_brevity() -> None:
    rewards = (*vision_reasoner_rewards(), brevity_reward(budget=60, floor=1))
    close = LEFT_ITEM
    for objects, other in (((LEFT,), ""), ((LEFT, RIGHT), f", {RIGHT_ITEM}")):
        # 50 px wide: 3 px to the right stays within IoU 0.5 and misses "box difference < 1.68 px" alone
        shifted = close.replace("[10, 10, 60, 90]", "[14, 10, 64, 90]")
        long = Case(text=reply(f"[{close}{other}]", "word " * 59), objects=objects, input_size_hw=SIZE_HW)
        brief = Case(text=reply(f"[{shifted}{other}]", "word"), objects=objects, input_size_hw=SIZE_HW)
        assert score(brief, rewards).terms["brevity"] > score(long, rewards).terms["brevity"]
        assert score(brief, rewards).terms["accuracy"] < score(long, rewards).terms["accuracy"]
        assert score(brief, rewards).total < score(long, rewards).total
        short = Case(text=reply(f"[{close}{other}]", "word"), objects=objects, input_size_hw=SIZE_HW)
        assert score(short, rewards).total > score(long, rewards).total


@pytest.mark.parametrize(
    ("budget", "floor", "most"), [(4, 4, 0.5), (4, 5, 0.5), (9, 0, 0.5), (9, -1, 0.5), (9, 1, 1.0), (9, 1, 0)]
)
def test_brevity_refuses(budget: int, floor: int, most: float) -> None:
    with pytest.raises(ValueError, match="floor < budget"):
        brevity_reward(budget=budget, floor=floor, most=most)


# at 100 x 200 a point is worth something up to 3 * 30 * sqrt(100 * 200) / 840 = 15.15 px away
CLOSENESS = {
    "right": (f"[{LEFT_ITEM}]", (LEFT,), 3.0),
    "half the box": ('[{"bbox_2d": [10, 10, 60, 49], "point_2d": [35, 30]}]', (LEFT,), 2 * 40 / 81),
    "point 8 px off": ('[{"bbox_2d": [10, 10, 60, 90], "point_2d": [35, 58]}]', (LEFT,), 2 + 1 - 8 / 15.152),
    "point outside its box": ('[{"bbox_2d": [10, 10, 60, 90], "point_2d": [35, 91]}]', (LEFT,), 2.0),
    "elsewhere": (f"[{FAR_ITEM}]", (LEFT,), 0.0),
    "one of two": (f"[{LEFT_ITEM}]", (LEFT, RIGHT), 1.5),
    "a stranger costs": (f"[{LEFT_ITEM}, {FAR_ITEM}]", (LEFT,), 1.5),
    "in either order": (f"[{RIGHT_ITEM}, {LEFT_ITEM}]", (LEFT, RIGHT), 3.0),
    "none there": (f"[{LEFT_ITEM}]", (), 0.0),
    "none said": ("[]", (LEFT,), 0.0),
    "corners swapped, as the runtime reads it": ('[{"bbox_2d": [60, 90, 10, 10], "point_2d": [35, 50]}]', (LEFT,), 3.0),
}


@pytest.mark.parametrize(("answer", "objects", "expected"), CLOSENESS.values(), ids=CLOSENESS.keys())
def test_closeness(answer: str, objects: tuple[RowObject, ...], expected: float) -> None:
    assert give(closeness_reward(), reply(answer), *objects) == pytest.approx(expected, abs=1e-3)


def test_closeness_has_no_threshold() -> None:
    """Moving the box pixel by pixel, it falls by a little each time."""
    steps = [
        give(
            closeness_reward(), reply(json.dumps([{"bbox_2d": [10 + dx, 10, 60 + dx, 90], "point_2d": [35, 50]}])), LEFT
        )
        for dx in range(25)
    ]
    falls = [before - after for before, after in itertools.pairwise(steps)]
    assert min(falls) > 0.02 and max(falls) < 0.09


def test_count_marks() -> None:
    assert count_marks("There's a mug, left.") == 8
    assert count_marks("") == 0


def test_any_text_is_scored() -> None:
    rewards = [
        abstention_reward(), empty_thinking_penalty(), brevity_reward(budget=20), closeness_reward(),
        abstention_reward(family=SEG_ZERO, mode="seg_zero"), brevity_reward(budget=20, mode="vision_reasoner"),
    ]  # fmt: skip
    for case in CORPUS:
        whole = text_of(case)
        for objects in ((), (LEFT,)):
            for reward in rewards:
                assert -1 <= give(reward, whole, *objects) <= reward.maximum


def test_extras_can_be_pickled(bundle_path: Path) -> None:
    rewards = [abstention_reward(), empty_thinking_penalty(), brevity_reward(budget=20), mask_iou_reward(bundle_path)]
    again = pickle.loads(pickle.dumps(rewards))
    assert [reward.name for reward in again] == ["abstention", "empty_thinking", "brevity", "mask_iou"]
    assert give(again[2], reply("[]", "None of these.")) == 0.5


# --- the segmenter's masks


@pytest.fixture(scope="module")
def disc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RowObject]:
    """A red disc on grey, 240 x 320, asked for in a policy's picture of 100 x 200."""
    rows, columns = np.mgrid[:240, :320]
    mask = (columns - 100) ** 2 + (rows - 120) ** 2 < 60**2
    picture = np.full((240, 320, 3), 190, np.uint8)
    picture[mask] = (200, 30, 30)
    path = tmp_path_factory.mktemp("pictures") / "disc.png"
    Image.fromarray(picture).save(path)
    box = (40 / 320 * 200, 60 / 240 * 100, 160 / 320 * 200, 180 / 240 * 100)
    return path, RowObject(box_xyxy=box, points_xy=((62.5, 50.0),), mask_rle=encode_rle(mask))


DISC_TEXT = reply('[{"bbox_2d": [25, 25, 100, 75], "point_2d": [62, 50]}]')


@pytest.fixture(scope="module")
def iou_reward(bundle_path: Path) -> Reward:
    return mask_iou_reward(bundle_path)


def test_masks_are_compared_in_the_pictures_size(iou_reward: Reward, disc: tuple[Path, RowObject]) -> None:
    path, truth = disc
    found = give(iou_reward, DISC_TEXT, truth, image=str(path))
    elsewhere = give(
        iou_reward, reply('[{"bbox_2d": [150, 5, 190, 30], "point_2d": [170, 15]}]'), truth, image=str(path)
    )
    assert 0 <= elsewhere < found <= 1
    with Image.open(path) as picture:
        for image in (path, picture.copy(), np.asarray(picture), {"bytes": path.read_bytes(), "path": None}):
            assert give(iou_reward, DISC_TEXT, truth, image=image) == pytest.approx(found)
    assert give(pickle.loads(pickle.dumps(iou_reward)), DISC_TEXT, truth, image=path) == pytest.approx(found)


def test_the_stored_picture_goes_before_the_resized_one(iou_reward: Reward, disc: tuple[Path, RowObject]) -> None:
    columns = {
        "objects": [[disc[1].to_json()]], "input_size_hw": [list(SIZE_HW)], "row_id": ["a"],
        "image": [Image.new("RGB", (SIZE_HW[1], SIZE_HW[0]))],
    }  # fmt: skip
    with pytest.raises(DatasetError, match="not the resized one"):
        iou_reward(["p"], [DISC_TEXT], **columns)
    (found,) = iou_reward(["p"], [DISC_TEXT], image_path=[str(disc[0])], **columns)
    assert found == pytest.approx(give(iou_reward, DISC_TEXT, disc[1], image=disc[0]))


def test_the_shipped_segmenter_finds_the_disc(disc: tuple[Path, RowObject]) -> None:
    assert give(mask_iou_reward(), DISC_TEXT, disc[1], image=disc[0]) > 0.8


@pytest.mark.parametrize(
    ("name", "text", "has_objects", "expected"),
    [
        ("none, rightly", reply("[]"), False, 1),
        ("none, wrongly", reply("[]"), True, 0),
        ("broken, nothing there", reply("[{"), False, 0),
        ("broken", reply("[{"), True, 0),
        ("invented", DISC_TEXT, False, 0),
    ],
)
def test_mask_iou_without_masks_to_compare(
    iou_reward: Reward, disc: tuple[Path, RowObject], name: str, text: str, has_objects: bool, expected: float
) -> None:
    assert give(iou_reward, text, *([disc[1]] if has_objects else []), image=disc[0]) == expected


@pytest.mark.parametrize(
    ("name", "changes", "image", "error", "message"),
    [
        ("no picture column", {}, None, ValueError, "column `image`"),
        ("picture missing", {}, "nowhere.png", DatasetError, "row 7"),
        ("no picture", {}, 7, DatasetError, "row 7.*int"),
        ("resized picture", {}, np.zeros((100, 200, 3), np.uint8), DatasetError, r"row 7.*\(240, 320\)"),
        ("no mask", {"mask_rle": None}, "disc", DatasetError, r"row 7.*objects\[0\].*mask"),
        ("broken mask", {"mask_rle": {"size": [2, 2], "counts": "x"}}, "disc", DatasetError, "row 7"),
        ("empty mask", {"mask_rle": encode_rle(np.zeros((240, 320), bool))}, "disc", DatasetError, "with pixels"),
    ],
)
def test_mask_iou_raises_on_bad_rows(
    iou_reward: Reward,
    disc: tuple[Path, RowObject],
    name: str,
    changes: dict[str, Any],
    image: Any,
    error: type[Exception],
    message: str,
) -> None:
    truth = dataclasses.replace(disc[1], **changes)
    given = disc[0] if isinstance(image, str) and image == "disc" else image
    with pytest.raises(error, match=message):
        give(iou_reward, DISC_TEXT, truth, image=given)
