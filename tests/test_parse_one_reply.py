"""One reply as a Python call: the answer that is made in C, and requests that are left to the reference."""

from __future__ import annotations

import pickle
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from kernel_builds import NEEDS_COMPILER, forced_kernels

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.answer_format import VISION_REASONER, AnswerFormat
from segzero_rt.answer_parser import MAX_OBJECTS, parse_answer
from segzero_rt.kernels.parse_prompts import encode_reply, parse_prompts

SQUARE: dict[str, Any] = {"answer_format": VISION_REASONER, "input_size_hw": (840, 840), "source_size_hw": (840, 840)}
OBJECT = '{"bbox_2d": [120, 130, 260, 340], "point_2d": [190, 235]}'


TYPED = [
    ("two objects", f"<think> two </think><answer>[{OBJECT}, {OBJECT}]</answer>"),
    ("none", "<think>no</think><answer>[]</answer>"),
    ("nothing", ""),
    ("letters beyond ASCII", f"<think> é \U0001f600 ü </think> ä <answer>[{OBJECT}]</answer>"),
    ("lone surrogates", f"<think> \ud83d \udc80 \ud83d\udc80 </think><answer>[{OBJECT}]</answer>"),
    ("the most objects", f"<answer>[{', '.join([OBJECT] * MAX_OBJECTS)}]</answer>"),
]


@NEEDS_COMPILER
@pytest.mark.parametrize(("name", "text"), TYPED, ids=[name for name, _ in TYPED])
def test_an_answer_made_in_c_is_what_its_constructor_makes(name: str, text: str) -> None:
    with forced_kernels("host"):
        made = parse_answer(text, **SQUARE)
    with forced_kernels("reference"):
        assert made == parse_answer(text, **SQUARE)
    prompts = tuple(Prompt(box_xyxy=one.box_xyxy, points_xy=one.points_xy) for one in made.prompts)
    again = Answer(status=made.status, thinking=made.thinking, prompts=prompts, text=made.text)
    assert made == again and hash(made) == hash(again) and pickle.loads(pickle.dumps(made)) == again
    assert made.text is text and type(made.status) is AnswerStatus
    for prompt in made.prompts:
        assert all(
            type(side) is float for side in (*prompt.box_xyxy, *(side for xy in prompt.points_xy for side in xy))
        )


@NEEDS_COMPILER
def test_requests_that_the_module_does_not_take_are_the_references() -> None:
    text = f"<answer>[{OBJECT}]</answer>"

    class Text(str):
        pass

    many = AnswerFormat(
        **{f.name: getattr(VISION_REASONER, f.name) for f in fields(VISION_REASONER)} | {"point_keys": tuple("abcdef")}
    )
    with forced_kernels("host"):
        expected = parse_answer(text, **SQUARE).prompts
        assert parse_answer(Text(text), **SQUARE).prompts == expected
        assert parse_answer(text, **{**SQUARE, "input_size_hw": [840, np.int64(840)]}).prompts == expected
        assert parse_answer(text, **{**SQUARE, "answer_format": many}).prompts == expected
        assert len(parse_answer(text, **{**SQUARE, "source_size_hw": (1 << 40, 1 << 40)}).prompts) == 1
        for change in ({"mode": "loose"}, {"mode": None}, {"input_size_hw": (0, 1)}, {"source_size_hw": (-1, 5)}):
            with pytest.raises(ValueError, match="expected"):
                parse_answer(text, **{**SQUARE, **change})


@NEEDS_COMPILER
def test_calls_leave_nothing_behind() -> None:
    texts = [text for _, text in TYPED]
    with forced_kernels("host"):

        def ask() -> int:
            for text in texts:
                parse_answer(text, **SQUARE)
                parse_prompts([encode_reply(text)] * 3, **SQUARE)
            return sys.getallocatedblocks()

        for _ in range(50):
            before = ask()
        for _ in range(500):
            after = ask()
    assert after - before < 100, "objects per call would be thousands"
