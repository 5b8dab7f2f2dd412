"""Replies and true objects that the tests of rewards share."""

from __future__ import annotations

from typing import Any

from training.rewards import Case, Reward, score
from training.rows import RowObject

SIZE_HW = (840, 840)
MUG = RowObject(box_xyxy=(100, 100, 300, 300), points_xy=((180, 200), (240, 260)))
PLATE = RowObject(box_xyxy=(400, 120, 700, 320), points_xy=((550, 220), (600, 250)))
MUG_JSON = '{"bbox": [100, 100, 300, 300], "points_1": [180, 200], "points_2": [240, 260]}'
MUG_ITEM = '{"bbox_2d": [100, 100, 300, 300], "point_2d": [180, 200]}'
PLATE_ITEM = '{"bbox_2d": [400, 120, 700, 320], "point_2d": [550, 220]}'


def reply(answer: str, thinking: str = "The mug stands left of the plate.") -> str:
    return f"<think>{thinking}</think>\n<answer>{answer}</answer>"


def terms(rewards: tuple[Reward, ...], text: str, *objects: RowObject, size_hw: tuple[int, int] = SIZE_HW) -> Any:
    return score(Case(text=text, objects=objects, input_size_hw=size_hw, row_id="row"), rewards).terms


def total(rewards: tuple[Reward, ...], text: str, *objects: RowObject, size_hw: tuple[int, int] = SIZE_HW) -> float:
    return sum(terms(rewards, text, *objects, size_hw=size_hw).values())


def columns_of(*truths: tuple[RowObject, ...], size_hw: tuple[int, int] = SIZE_HW) -> dict[str, Any]:
    return {
        "objects": [[one.to_json() for one in truth] for truth in truths],
        "input_size_hw": [list(size_hw) for _ in truths],
        "row_id": [f"row {number}" for number in range(len(truths))],
        "kind": ["" for _ in truths],
        "image": [object() for _ in truths],
        "completion_ids": [[1, 2] for _ in truths],
    }


FENCED_LIST, FENCED_SINGLE = reply(f"```json\n[{MUG_ITEM}]\n```"), reply(f"```json\n{MUG_JSON}\n```")
