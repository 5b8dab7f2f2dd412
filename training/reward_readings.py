"""What a completion says, as the families' reward code reads it: before clipping, rounding, or any mercy.

Every reward has a parse mode. In `seg_zero` and `vision_reasoner` the text is read as those authors' reward code reads
it, partial credit and crashes included: what makes their code stop gives no reading, and no reading scores nothing. In
`tolerant` and `rfc8259` the runtime's parser decides: what deployment accepts is what is rewarded.

Departures from the original code, all of them on texts that no policy is known to write:
1. true and false are no numbers;
2. JSON deeper than 64 levels, or numbers longer than 1,024 characters, are not read (`json_reader`'s limits);
3. in `vision_reasoner`, boxes of other than 4 and points of other than 2 numbers never pass, where NumPy's broadcasting
   lets some through.

Sources: `dvlab-research/Seg-Zero` 77f9ea5 (Seg-Zero) and 42a3345 (VisionReasoner).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segzero_rt.answer import Answer
from segzero_rt.answer_format import ANSWER_CLOSE, SEG_ZERO, THINK_OPEN, VISION_REASONER, AnswerFormat
from segzero_rt.answer_objects import RawBox, RawPoint
from segzero_rt.answer_parser import MAX_OBJECTS, MODES, ParseMode, parse_answer
from segzero_rt.answer_tags import seg_zero_span, vision_reasoner_span
from segzero_rt.json_reader import Dialect, JsonValue, read_json

from .reward_geometry import Floats

SCRIPT_MODES = frozenset({SEG_ZERO.name, VISION_REASONER.name})
"""Modes that read as a family's own scripts do; the others are the runtime's."""

_CACHED_READINGS = 1 << 12  # several terms read each completion of a batch, one after the other
_TURN = re.compile(r"</think>\s*<answer>")
_BOX_NUMBERS, _POINT_NUMBERS = 4, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SegZeroReading:
    """A single-object answer. Coordinates are pixels of the policy's picture."""

    well_formed: bool
    """Has a box of 4 entries and two points of 2, under the right keys."""
    box: RawBox | None
    """None: no box of 4 numbers."""
    points: tuple[RawPoint, RawPoint] | None
    """None: not two points, or no box beside them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VisionReasonerReading:
    """A list answer. Coordinates are pixels of the policy's picture."""

    format_score: float
    """0 … 2: one for a box of 4 and one for a point of 2 entries, mean over the items."""
    boxes: Floats
    """float64 [M, 4]; M is 0 where there is no list of whole objects."""
    points: Floats
    """float64 [M, 2]; NaN for an object without a point (never in script modes)."""


NOTHING = SegZeroReading(well_formed=False, box=None, points=None)
_NO_BOXES, _NO_POINTS = np.zeros((0, _BOX_NUMBERS)), np.zeros((0, _POINT_NUMBERS))


def completion_text(completion: object) -> str:
    """The text of a completion as TRL hands it over: a string, or the messages of one chat turn.

    Raises:
        TypeError: neither. That is a bug of the caller's, not a bad completion.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion:
        return "".join(_message_text(message) for message in completion)
    raise TypeError(f"expected a completion as text or as chat messages, got {type(completion).__name__}")


def has_think_format(text: str) -> bool:
    r"""Whether the whole text is `<think>…</think>`, white space, `<answer>…</answer>`, and nothing after it.

    The same texts as `<think>.*?</think>\s*<answer>.*?</answer>` matches in full with DOTALL, in linear time.
    """
    if not (text.startswith(THINK_OPEN) and text.endswith(ANSWER_CLOSE)):
        return False
    return _TURN.search(text, len(THINK_OPEN), len(text) - len(ANSWER_CLOSE)) is not None


@functools.lru_cache(maxsize=_CACHED_READINGS)
def parsed_answer(text: str, family: AnswerFormat, mode: ParseMode, input_size_hw: tuple[int, int]) -> Answer:
    """The runtime's own reading, in pixels of the policy's picture."""
    return parse_answer(
        text, answer_format=family, input_size_hw=input_size_hw, source_size_hw=input_size_hw, mode=mode
    )


@functools.lru_cache(maxsize=_CACHED_READINGS)
def read_seg_zero(text: str, *, strict: bool, mode: ParseMode, input_size_hw: tuple[int, int]) -> SegZeroReading:
    """Reads a single-object answer.

    Args:
        text: the completion.
        strict: of script modes: keys named exactly `bbox`, `points_1`, `points_2` (others besides are allowed).
            Otherwise the first key with `bbox` in it and, for the format, two with `point`, for the points, `points`.
        mode: see the module.
        input_size_hw: of the policy's picture.

    Raises:
        ValueError: a mode that is none, or VisionReasoner's, which knows no such answer.
    """
    _check_mode(mode, VISION_REASONER)
    if mode != SEG_ZERO.name:
        return _seg_zero_of_prompts(parsed_answer(text, SEG_ZERO, mode, input_size_hw))
    span = seg_zero_span(text)
    value = None if span is None else read_json(text, start=span[0], end=span[1], dialect=Dialect.PYTHON).value
    if not isinstance(value, dict):
        return NOTHING
    return _seg_zero_strict(value) if strict else _seg_zero_soft(value)


@functools.lru_cache(maxsize=_CACHED_READINGS)
def read_vision_reasoner(text: str, *, mode: ParseMode, input_size_hw: tuple[int, int]) -> VisionReasonerReading:
    """Reads a list answer; at most `MAX_OBJECTS` of its objects.

    Raises:
        ValueError: a mode that is none, or Seg-Zero's, which knows no lists.
    """
    _check_mode(mode, SEG_ZERO)
    if mode != VISION_REASONER.name:
        return _list_of_prompts(parsed_answer(text, VISION_REASONER, mode, input_size_hw))
    span = vision_reasoner_span(text)
    value = None if span is None else read_json(text[slice(*span)].strip(), dialect=Dialect.PYTHON).value
    if not isinstance(value, list):
        return VisionReasonerReading(format_score=0.0, boxes=_NO_BOXES, points=_NO_POINTS)
    boxes, points = _whole_objects(value[:MAX_OBJECTS])
    return VisionReasonerReading(format_score=_format_score(value), boxes=boxes, points=points)


def _message_text(message: object) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part["text"]) for part in content)
    raise TypeError(f"expected chat messages with text as content, got {message!r:.120}")


def _check_mode(mode: str, other_family: AnswerFormat) -> None:
    if mode not in MODES or mode == other_family.name:
        allowed = [known for known in MODES if known != other_family.name]
        raise ValueError(f"expected a parse mode of {', '.join(allowed)} for this reward, got {mode!r}")


def _seg_zero_strict(value: dict[str, JsonValue]) -> SegZeroReading:
    box, first, second = (value.get(key) for key in (SEG_ZERO.box_key, *SEG_ZERO.point_keys))
    well_formed = _is_list_of(box, _BOX_NUMBERS) and all(_is_list_of(one, _POINT_NUMBERS) for one in (first, second))
    return _seg_zero_reading(well_formed, box, [first, second])


def _seg_zero_soft(value: dict[str, JsonValue]) -> SegZeroReading:
    box_key = next((key for key in value if "bbox" in key.lower()), None)
    pointed = [key for key in value if "point" in key.lower() and key != box_key][:2]
    box = None if box_key is None else value[box_key]
    # Text and objects have lengths, too, and the soft rule asks for nothing else.
    well_formed = len(pointed) == 2 and _has_length(box, _BOX_NUMBERS)
    well_formed = well_formed and all(_has_length(value[key], _POINT_NUMBERS) for key in pointed)
    point_keys = [key for key in value if "points" in key.lower()][:2]
    return _seg_zero_reading(well_formed, box, [value[key] for key in point_keys])


def _seg_zero_reading(well_formed: bool, box: JsonValue, points: list[JsonValue]) -> SegZeroReading:
    numbers = _numbers(box, _BOX_NUMBERS)
    whole = [_whole_point(point) for point in points]
    if numbers is None or len(whole) != 2 or whole[0] is None or whole[1] is None:
        return SegZeroReading(well_formed=well_formed, box=_as_box(numbers), points=None)
    return SegZeroReading(well_formed=well_formed, box=_as_box(numbers), points=(whole[0], whole[1]))


def _seg_zero_of_prompts(answer: Answer) -> SegZeroReading:
    if len(answer.prompts) != 1:
        return NOTHING
    prompt = answer.prompts[0]
    pair = (prompt.points_xy[0], prompt.points_xy[1]) if len(prompt.points_xy) >= 2 else None
    return SegZeroReading(well_formed=pair is not None, box=prompt.box_xyxy, points=pair)


def _format_score(items: list[JsonValue]) -> float:
    """Mean over items of what has the right shape; the count ends where the script would stop with an error."""
    score = 0.0
    for item in items:
        if isinstance(item, dict):
            score += _is_list_of(item.get(VISION_REASONER.box_key), _BOX_NUMBERS)
            score += _is_list_of(item.get(VISION_REASONER.point_keys[0]), _POINT_NUMBERS)
        elif not isinstance(item, (str, list)) or VISION_REASONER.box_key in item:
            break
    return score / len(items) if items else 0.0


def _whole_objects(items: list[JsonValue]) -> tuple[Floats, Floats]:
    """Boxes and points of all items, or none at all if one item lacks either."""
    boxes, points = [], []
    for item in items:
        if not isinstance(item, dict):
            return _NO_BOXES, _NO_POINTS
        box = _numbers(item.get(VISION_REASONER.box_key), _BOX_NUMBERS)
        point = _numbers(item.get(VISION_REASONER.point_keys[0]), _POINT_NUMBERS)
        if box is None or point is None:
            return _NO_BOXES, _NO_POINTS
        boxes.append(box)
        points.append(point)
    return np.array(boxes, np.float64).reshape(-1, _BOX_NUMBERS), np.array(points, np.float64).reshape(-1, 2)


def _list_of_prompts(answer: Answer) -> VisionReasonerReading:
    prompts = answer.prompts
    pointed = sum(bool(prompt.points_xy) for prompt in prompts)
    score = 1 + pointed / len(prompts) if prompts else 0.0
    points = [prompt.points_xy[0] if prompt.points_xy else (math.nan, math.nan) for prompt in prompts]
    return VisionReasonerReading(
        format_score=score,
        boxes=np.array([prompt.box_xyxy for prompt in prompts], np.float64).reshape(-1, _BOX_NUMBERS),
        points=np.array(points, np.float64).reshape(-1, _POINT_NUMBERS),
    )


def _is_list_of(value: JsonValue, count: int) -> bool:
    return isinstance(value, list) and len(value) == count


def _has_length(value: JsonValue, count: int) -> bool:
    return isinstance(value, (list, str, dict)) and len(value) == count


def _numbers(value: JsonValue, count: int) -> list[float] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    if any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in value):
        return None
    return [float(one) for one in value if isinstance(one, (int, float))]


def _as_box(numbers: list[float] | None) -> RawBox | None:
    return None if numbers is None else (numbers[0], numbers[1], numbers[2], numbers[3])


def _whole_point(value: JsonValue) -> RawPoint | None:
    """The first two entries as whole numbers, as Seg-Zero's `int()` makes them of numbers and of text like `"12"`."""
    if not isinstance(value, list) or len(value) < _POINT_NUMBERS:
        return None
    x, y = (_whole(one) for one in value[:_POINT_NUMBERS])
    return None if x is None or y is None else (x, y)


def _whole(value: JsonValue) -> float | None:
    if isinstance(value, str) and _WHOLE_TEXT.fullmatch(value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(math.trunc(value))


_WHOLE_TEXT = re.compile(r"\s*[+-]?[0-9]{1,15}\s*", re.ASCII)
