"""Reward sets by name: the papers' as they are, terms beyond them where they are named, clear refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs segzero-rt[train]")

from reward_cases import MUG, MUG_ITEM, MUG_JSON, PLATE, reply

from segzero_rt.cli import main
from segzero_rt.errors import DatasetError, SegZeroError
from segzero_rt.mask import encode_rle
from training.grpo_rewards import BREVITY_BUDGET, REWARD_EXTRAS, REWARD_SETS, reward_set, with_extras
from training.rewards import Case, score
from training.rows import TrainingRow

ORIGINAL = {"think_format", "answer_format"}
SHORT, LONG = "A mug at the left.", "A mug stands there, " * 12
SHORTER = "A mug."


def names(of: str) -> list[str]:
    return [reward.name for reward in reward_set(of).rewards]


def given(of: str, text: str) -> dict[str, float]:
    case = Case(text=text, objects=(MUG,), input_size_hw=(840, 840), row_id="row")
    return dict(score(case, reward_set(of).rewards).terms)


@pytest.mark.parametrize("name", REWARD_SETS)
def test_nothing_beyond_a_set_is_on_unless_it_is_named(name: str) -> None:
    found = names(name)
    assert set(found) >= ORIGINAL and len(set(found)) == len(found)
    assert not {"brevity", "mask_iou"} & set(found)
    if name != "tabletop":
        assert not set(REWARD_EXTRAS) & set(found)
    assert ("accuracy" in found) + ("closeness" in found) == (not name.startswith("seg_zero"))


@pytest.mark.parametrize(
    ("name", "added"),
    [
        pytest.param("tabletop+brevity", ["brevity"], id="one"),
        pytest.param("tabletop+brevity:24+mask_iou", ["brevity", "mask_iou"], id="two, one with a setting"),
        pytest.param("vision_reasoner+abstention+empty_thinking", ["abstention", "empty_thinking"], id="to a paper's"),
        pytest.param("seg_zero_strict+brevity:60", ["brevity"], id="to Seg-Zero's"),
    ],
)
def test_terms_are_added_behind_the_set_s_own(name: str, added: list[str]) -> None:
    base = name.partition("+")[0]
    assert names(name) == [*names(base), *added]
    assert with_extras(base, name.split("+")[1:]) == name


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        pytest.param(f"[{MUG_ITEM}]", 2.0, id="list"),
        pytest.param(f"{MUG_ITEM}]", 0.0, id="list without its bracket"),
        pytest.param(f"[{MUG_ITEM},]", 0.0, id="trailing comma"),
        pytest.param(MUG_ITEM, 0.0, id="object alone"),
    ],
)
def test_the_tabletop_format_is_the_standard_s_and_its_accuracy_tolerant(answer: str, score: float) -> None:
    found = given("tabletop", reply(answer))
    assert found["answer_format"] == score and found["closeness"] > 2.9


@pytest.mark.parametrize(
    ("of", "answer"),
    [
        pytest.param("tabletop+brevity", f"[{MUG_ITEM}]", id="list"),
        pytest.param("seg_zero_strict+brevity", MUG_JSON, id="single object"),
        pytest.param("vision_reasoner+brevity", f"[{MUG_ITEM}]", id="the paper's parser"),
    ],
)
def test_brevity_reads_the_family_of_its_set(of: str, answer: str) -> None:
    terms = {thinking: given(of, reply(answer, thinking))["brevity"] for thinking in (SHORTER, SHORT, LONG)}
    assert terms[SHORTER] == 0.5, "whole, at four words and marks or fewer"
    assert 0.0 < terms[SHORT] < 0.5
    assert terms[LONG] == 0.0
    wrong = answer.replace("100, 100, 300, 300", "600, 600, 700, 700")
    assert given(of, reply(wrong, SHORTER))["brevity"] == 0.0, "accuracy comes first"


def test_the_setting_of_brevity_is_its_budget() -> None:
    text = reply(f"[{MUG_ITEM}]", "word " * 20)
    assert given("tabletop+brevity:20", text)["brevity"] == 0.0
    assert given("tabletop+brevity:100", text)["brevity"] == pytest.approx(0.5 / 2), "20 lies midway from 4 to 100"
    assert given("tabletop+brevity:100:0.9", text)["brevity"] == pytest.approx(0.9 / 2)
    assert given("tabletop+brevity", text)["brevity"] == given(f"tabletop+brevity:{BREVITY_BUDGET}", text)["brevity"]


BAD_NAMES = {
    "no such set": ("table", "rewards of seg_zero_strict"),
    "no name": ("", "rewards of seg_zero_strict"),
    "no such term": ("tabletop+mask", "terms of abstention"),
    "empty term": ("tabletop+", "terms of abstention"),
    "term of the set": ("tabletop+abstention", "abstention is in tabletop"),
    "named twice": ("tabletop+brevity+brevity:9", "brevity is in tabletop or named twice"),
    "budget of no number": ("tabletop+brevity:few", "brevity:TOKENS"),
    "budget below the floor": ("tabletop+brevity:4", "more than 4"),
    "bonus of a whole criterion": ("tabletop+brevity:24:1.0", "between 0 and 1"),
    "bonus of nothing": ("tabletop+brevity:24:.0", "between 0 and 1"),
    "bonus of no number": ("tabletop+brevity:24:nan", "between 0 and 1"),
    "bonus without a budget's end": ("tabletop+brevity:24:0.5:1", "between 0 and 1"),
    "closeness for one object": ("seg_zero_strict+closeness", "closeness with rewards for vision_reasoner"),
    "a setting that is none": ("vision_reasoner+abstention:3", "without a setting"),
    "no such bundle": ("tabletop+mask_iou:nowhere", "nowhere"),
}


@pytest.mark.parametrize(("name", "message"), BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_names_that_are_none_are_refused(name: str, message: str) -> None:
    with pytest.raises(SegZeroError, match=message):
        reward_set(name)


def row(**changes: Any) -> TrainingRow:
    mask = np.zeros((10, 10), bool)
    mask[2:5, 3:6] = True
    masked = dataclasses.replace(MUG, mask_rle=encode_rle(mask))
    whole = TrainingRow(
        row_id="row 3", question="the mug", image=Path("mug.png"), input_size_hw=(840, 840), objects=(masked,)
    )
    return dataclasses.replace(whole, **changes)


def test_mask_iou_wants_masks_before_training() -> None:
    masked, bare = row(), row(objects=(*row().objects, PLATE))
    reward_set("tabletop").check_rows([masked, bare])
    reward_set("tabletop+mask_iou").check_rows([masked, row(objects=())])
    with pytest.raises(DatasetError, match=r"row 3.*objects\[1\].*mask for mask_iou"):
        reward_set("tabletop+mask_iou").check_rows([masked, bare])
    with pytest.raises(DatasetError, match="expected a point"):
        without = dataclasses.replace(MUG, points_xy=())
        reward_set("tabletop+mask_iou").check_rows([row(objects=(without,))])


def test_options_change_the_preset() -> None:
    from argparse import ArgumentParser

    from training.grpo_command import chosen_preset, configure_grpo

    parser = ArgumentParser()
    parser.add_argument("--preset", default="tabletop")
    configure_grpo(parser)
    chosen = chosen_preset(parser.parse_args(["--reward-extras", "brevity:24,mask_iou"]))
    assert chosen.rewards == "tabletop+brevity:24+mask_iou"
    assert chosen_preset(parser.parse_args([])).rewards == "tabletop+brevity:32:0.9"
    assert chosen_preset(parser.parse_args(["--reward-extras", "none"])).rewards == "tabletop"
    precisions = (
        chosen_preset(parser.parse_args(["--precision", name])).precision for name in ("float32", "bf16_mixed")
    )
    assert [precision.value for precision in precisions] == ["float32", "bf16_mixed"]
    with pytest.raises(SegZeroError, match="LoRA with bfloat16 weights"):
        chosen_preset(parser.parse_args(["--precision", "bf16"]))


def test_a_wrong_option_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["train", "grpo", "--reward-extras", "brief", "--out", str(tmp_path / "run")])
    told = capfd.readouterr()
    assert status == 2 and told.err.count("\n") == 1 and "brevity" in told.err
    assert not (tmp_path / "run").exists()
