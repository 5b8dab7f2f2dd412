"""The prompt strings and answers of both families, letter by letter, and their way through the parser."""

from __future__ import annotations

import pytest

from segzero_rt.answer_format import FORMATS, SEG_ZERO, VISION_REASONER, AnswerFormat
from segzero_rt.answer_parser import MODES, parse_answer
from segzero_rt.json_tolerant import read_tolerant

VISION_REASONER_PROMPT = (
    'Please find "the red mug" with bboxs and points.Compare the difference between object(s) and find the most '
    "closely matched object(s).Output the thinking process in <think> </think> and final answer in <answer> </answer> "
    "tags.Output the bbox(es) and point(s) inside the interested object(s) in JSON format.i.e., <think> thinking "
    'process here </think><answer>[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, {"bbox_2d": '
    '[225,296,706,786], "point_2d": [302,410]}]</answer>'
)
SEG_ZERO_PROMPT = (
    "Please find 'the red mug' with bbox and points.Compare the difference between objects and find the most closely "
    "matched one.Output the thinking process in <think> </think> and final answer in <answer> </answer> tags.Output "
    "the one bbox and points of two largest inscribed circles inside the interested object in JSON format.i.e., "
    "<think> thinking process here </think><answer>{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': "
    "[35,180]}</answer>"
)


@pytest.mark.parametrize(
    ("answer_format", "prompt"),
    [(VISION_REASONER, VISION_REASONER_PROMPT), (SEG_ZERO, SEG_ZERO_PROMPT)],
    ids=["vision_reasoner", "seg_zero"],
)
def test_prompt_is_the_released_one(answer_format: AnswerFormat, prompt: str) -> None:
    assert answer_format.user_prompt("The red MUG.") == prompt


@pytest.mark.parametrize(
    ("answer_format", "question", "normalised"),
    [
        (VISION_REASONER, 'The "Mug"?!.', 'the "mug'),
        (VISION_REASONER, "...", ""),
        (VISION_REASONER, " The mug. ", " the mug. "),
        (SEG_ZERO, "The mug?", "the mug?"),
        (SEG_ZERO, "..The mug..", "the mug"),
        (SEG_ZERO, "ÄPFEL.", "äpfel"),
        (VISION_REASONER, "{Question} {0} %s", "{question} {0} %s"),
    ],
)
def test_question_is_normalised_as_the_family_does(answer_format: AnswerFormat, question: str, normalised: str) -> None:
    assert answer_format.normalise_question(question) == normalised
    assert normalised in answer_format.user_prompt(question)


def test_answer_text_is_one_line_of_json() -> None:
    one = ((10, 100, 200, 210), [(30, 110)])
    assert VISION_REASONER.answer_text([one]) == '[{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}]'
    assert VISION_REASONER.answer_text([]) == "[]"
    two = ((10, 100, 200, 210), [(30, 110), (35, 180)])
    expected = '{"bbox": [10, 100, 200, 210], "points_1": [30, 110], "points_2": [35, 180]}'
    assert SEG_ZERO.answer_text([two]) == expected
    assert SEG_ZERO.answer_text([]) == "{}"
    assert SEG_ZERO.assistant_text("A mug.", [two]) == f"<think> A mug. </think>\n<answer>{expected}</answer>"


@pytest.mark.parametrize(
    ("answer_format", "objects"),
    [
        (SEG_ZERO, [((1, 2, 30, 40), [(5, 6), (7, 8)])] * 2),
        (SEG_ZERO, [((1, 2, 30, 40), [(5, 6)])]),
        (VISION_REASONER, [((1, 2, 30, 40), [(5, 6), (7, 8)])]),
        (VISION_REASONER, [((1, 2, 30), [(5, 6)])]),
        (VISION_REASONER, [((1, 2, 30, 40), [(5, 6, 7)])]),
    ],
    ids=["two objects in one", "point missing", "point too many", "box of three", "point of three"],
)
def test_answer_text_refuses_what_the_format_cannot_say(answer_format: AnswerFormat, objects: list) -> None:
    with pytest.raises(ValueError, match=answer_format.name):
        answer_format.answer_text(objects)


READ_BACK = [  # a family's script reads its own answers only; a single-object format writes one at most
    pytest.param(known, count, mode, id=f"{known.name}-{count}-{mode}")
    for known in FORMATS.values()
    for count in ([0, 1, 2, 7] if known.multiple else [0, 1])
    for mode in MODES
    if mode not in FORMATS or mode == known.name
]


@pytest.mark.parametrize(("answer_format", "count", "mode"), READ_BACK)
def test_what_is_written_is_read_back(answer_format: AnswerFormat, count: int, mode: str) -> None:
    points = [(20, 30), (25, 35)][: answer_format.max_points]
    objects = [((10 + 3 * index, 20, 60, 90 + index), points) for index in range(count)]
    answer = parse_answer(
        answer_format.assistant_text("Some thinking.", objects),
        answer_format=answer_format,
        input_size_hw=(280, 280),
        source_size_hw=(280, 280),
        mode=mode,  # type: ignore[arg-type]
    )
    assert answer.status.value == ("ok" if count else "none_found")
    assert answer.thinking == "Some thinking."
    inside = [
        tuple(point for point in points if box[0] <= point[0] <= box[2]) for box, points in objects
    ]  # later boxes move away from the points, which are then dropped
    assert [(prompt.box_xyxy, prompt.points_xy) for prompt in answer.prompts] == [
        (box, kept) for (box, _), kept in zip(objects, inside, strict=True)
    ]


@pytest.mark.parametrize("answer_format", FORMATS.values(), ids=lambda known: known.name)
def test_example_is_the_one_in_the_prompt(answer_format: AnswerFormat) -> None:
    tail = answer_format.prompt_tail
    start = tail.rindex("<answer>") + len("<answer>")
    value = read_tolerant(tail, start, may_end=False).value
    entries = value if isinstance(value, list) else [value]
    written = tuple(
        (tuple(entry[answer_format.box_key]), tuple(tuple(entry[key]) for key in answer_format.point_keys))
        for entry in entries
    )
    assert written == answer_format.example


@pytest.mark.parametrize(
    ("answer_format", "value", "factor", "pixel"),
    [
        (VISION_REASONER, 121, 0.5, 61),
        (VISION_REASONER, 123, 0.5, 62),
        (VISION_REASONER, 10.9, 1.0, 11),
        (VISION_REASONER, 0, 3.7, 0),
        (VISION_REASONER, 840, 1920 / 840, 1920),
        (SEG_ZERO, 121, 0.5, 60),
        (SEG_ZERO, 123, 0.5, 62),
        (SEG_ZERO, 10.9, 1.0, 10),
        (SEG_ZERO, 840, 1081 / 840, 1081),
    ],
)
def test_rounding_is_the_familys(answer_format: AnswerFormat, value: float, factor: float, pixel: int) -> None:
    assert answer_format.to_source(value, factor) == pixel
