"""What is said to a policy and what it says back, once per family: prompt, tags, JSON keys, coordinate rounding.

Training writes with `assistant_text`, the runtime asks with `user_prompt`, `answer_parser.parse_answer` reads. The
prompt strings are part of the released checkpoints and stand here verbatim, missing spaces between sentences and the
single quotes of Seg-Zero's example included.

Sources: `dvlab-research/Seg-Zero` 77f9ea5 (Seg-Zero) and 42a3345, `JIA-Lab-research/VisionReasoner` c013132.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

Box = Sequence[int]
"""Left, top, right, bottom in pixels of the picture the policy sees."""
Point = Sequence[int]
"""x, y in pixels of the picture the policy sees."""
AnswerObject = tuple[Box, Sequence[Point]]
"""One object of an answer: its box and its points (`AnswerFormat.max_points` of them when written)."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
SYSTEM_PROMPT = "You are a helpful assistant."


class Rounding(str, Enum):
    """How a family takes a coordinate of the policy's picture to a pixel of the source picture."""

    HALF_UP = "half_up"
    """`int(value * factor + 0.5)`: VisionReasoner."""
    TRUNCATE_THEN_HALF_EVEN = "truncate_then_half_even"
    """`round(int(value) * factor)`: Seg-Zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerFormat:
    """The text conventions of one policy family. Coordinates are pixels of the resized picture the policy sees, unless
    the policy's manifest names other units."""

    name: str
    """The value of `--format` and of the manifest's `answer_format`."""
    prompt_head: str
    """User prompt up to the question."""
    prompt_tail: str
    """User prompt after the question, its example answer included."""
    question_strip: str
    """Characters taken off both ends of the lower-cased question."""
    box_key: str
    point_keys: tuple[str, ...]
    """One key per point of an object, in order."""
    multiple: bool
    """True: the answer is a list of objects. False: it is one object."""
    none_text: str
    """The answer that says "there is no such object"."""
    rounding: Rounding
    example: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]
    """The objects of the prompt's example: an echo of the prompt must not be taken for an answer."""
    system_prompt: str = SYSTEM_PROMPT

    def __post_init__(self) -> None:
        if not self.name or not self.box_key or not self.point_keys:
            raise ValueError(f"expected a name, a box key and at least one point key, got {self}")

    @property
    def max_points(self) -> int:
        """Points per object that this family was trained with."""
        return len(self.point_keys)

    def normalise_question(self, question: str) -> str:
        """Returns the question as the family's own scripts write it into the prompt."""
        return question.lower().strip(self.question_strip)

    def user_prompt(self, question: str) -> str:
        """Returns the user turn's text (the picture's tokens stand before it). Any text is taken as it is."""
        return f"{self.prompt_head}{self.normalise_question(question)}{self.prompt_tail}"

    def answer_text(self, objects: Sequence[AnswerObject]) -> str:
        """Writes the canonical answer: what stands between the answer tags, as one line of JSON.

        Args:
            objects: (box_xyxy, points_xy) each, integers, in pixels of the policy's picture; none = "no such object".

        Raises:
            ValueError: several objects in a single-object format, or a wrong number of coordinates or points.
        """
        if not objects:
            return self.none_text
        if not self.multiple and len(objects) > 1:
            raise ValueError(f"{self.name} answers with one object, got {len(objects)}; write them in a list format")
        written = [self._object_dict(box, points) for box, points in objects]
        return json.dumps(written if self.multiple else written[0])

    def assistant_text(self, thinking: str, objects: Sequence[AnswerObject]) -> str:
        """Writes the whole assistant turn as `<think> … </think>`, a line feed and `<answer>…</answer>`."""
        return f"{THINK_OPEN} {thinking} {THINK_CLOSE}\n{ANSWER_OPEN}{self.answer_text(objects)}{ANSWER_CLOSE}"

    def to_source(self, value: float, factor: float) -> int:
        """Takes one non-negative coordinate to source pixels as the family does; `factor` is source / policy size."""
        if self.rounding is Rounding.HALF_UP:
            return int(value * factor + 0.5)
        return round(int(value) * factor)

    def _object_dict(self, box: Box, points: Sequence[Point]) -> dict[str, list[int]]:
        if len(box) != 4 or len(points) != self.max_points or any(len(point) != 2 for point in points):
            raise ValueError(
                f"expected a box of 4 numbers and {self.max_points} point(s) of 2 for {self.name}, "
                f"got {box} and {points}"
            )
        entry = {self.box_key: [int(value) for value in box]}
        for key, point in zip(self.point_keys, points, strict=True):
            entry[key] = [int(value) for value in point]
        return entry


VISION_REASONER = AnswerFormat(
    name="vision_reasoner",
    prompt_head='Please find "',
    prompt_tail=(
        '" with bboxs and points.'
        "Compare the difference between object(s) and find the most closely matched object(s)."
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
        "Output the bbox(es) and point(s) inside the interested object(s) in JSON format."
        "i.e., <think> thinking process here </think>"
        '<answer>[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, '
        '{"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]</answer>'
    ),
    question_strip='."?!',
    box_key="bbox_2d",
    point_keys=("point_2d",),
    multiple=True,
    none_text="[]",
    rounding=Rounding.HALF_UP,
    example=(((10, 100, 200, 210), ((30, 110),)), ((225, 296, 706, 786), ((302, 410),))),
)

SEG_ZERO = AnswerFormat(
    name="seg_zero",
    prompt_head="Please find '",
    prompt_tail=(
        "' with bbox and points."
        "Compare the difference between objects and find the most closely matched one."
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
        "Output the one bbox and points of two largest inscribed circles inside the interested object in JSON format."
        "i.e., <think> thinking process here </think>"
        "<answer>{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': [35,180]}</answer>"
    ),
    question_strip=".",
    box_key="bbox",
    point_keys=("points_1", "points_2"),
    multiple=False,
    none_text="{}",
    rounding=Rounding.TRUNCATE_THEN_HALF_EVEN,
    example=(((10, 100, 200, 210), ((30, 110), (35, 180))),),
)

FORMATS: dict[str, AnswerFormat] = {known.name: known for known in (VISION_REASONER, SEG_ZERO)}
"""Every shipped format by name."""
