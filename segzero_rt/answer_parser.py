"""From a policy's text to an `Answer`: find the answer, read it, take its numbers to the source picture.

`parse_answer` is the contract; runtime, evaluation and rewards all read with it. It never raises for any text, and
its time is linear in the text. Where the text does not say clearly what was meant, it says `malformed`: no box is made
up. What it says is defined here, by `read_reply`; where a compiler is, `kernels.parse_prompts` says the same sooner.

Which text is the answer (`tolerant`, `rfc8259`)
    The last `<answer>` that stands outside the thinking and holds an answer that can be used; at most
    `MAX_ANSWERS_TRIED` of them are looked at, from the last backwards. With no `<answer>` outside the thinking, and if
    the reply ended by itself, what follows the last `</think>` (the whole reply, if nothing was thought). JSON in
    the thinking is never an answer. The prompt's own example is never an answer: neither the whole example, nor any of
    its objects right after "thinking process here".
What it may look like
    `rfc8259`: one JSON document with exactly the format's keys. `tolerant`: see `json_tolerant` for the notation and
    `answer_objects` for the keys; prose, fences and quotes around it are passed over; of several values with words
    between them the last counts, with only blanks and commas between them they are one list. A bracket with no
    `key:` in it is prose. Both formats' answers are read whatever `answer_format` is.
    `vision_reasoner`, `seg_zero`: the first answer the authors' scripts would take (reference: `answer_objects`).
Geometry
    The same in every mode, see `answer_geometry`. At most `MAX_OBJECTS` objects are kept.
Status
    `ok` with prompts; `none_found` for the format's empty answer; otherwise `truncated` if the reply was cut
    (`finished=False`) and `malformed` if it was not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.answer_format import ANSWER_CLOSE, ANSWER_OPEN, FORMATS, AnswerFormat
from segzero_rt.answer_geometry import to_prompt
from segzero_rt.answer_objects import (
    RawObject,
    canonical_objects,
    seg_zero_objects,
    tolerant_objects,
    vision_reasoner_objects,
)
from segzero_rt.answer_tags import (
    TAG,
    Tag,
    answer_openings,
    find_tags,
    seg_zero_span,
    thinking_span,
    vision_reasoner_span,
)
from segzero_rt.json_reader import Dialect, JsonFault, read_json
from segzero_rt.json_tolerant import read_tolerant
from segzero_rt.kernels.backend import answer_reader

ParseMode = Literal["rfc8259", "vision_reasoner", "seg_zero", "tolerant"]
MODES: tuple[ParseMode, ...] = ("rfc8259", "vision_reasoner", "seg_zero", "tolerant")

MAX_ANSWERS_TRIED = 8
"""Answer tags looked at, from the last backwards; bounds the work on a reply that repeats the tag."""
MAX_VALUES = 256
"""Brackets looked at in one answer, prose in brackets included; an answer with more is none."""
MAX_OBJECTS = 120
"""Objects kept of one answer; VisionReasoner's reward has the same bound."""

_VALUE_OR_TAG = re.compile(r"[\[{]|< ?/? ?(?:think|answer) ?>", re.IGNORECASE | re.ASCII)
_JOINT = re.compile(r"[\s,;\"'`]*")
_AROUND_BARE = re.compile(r"(?:[\s,]|```[A-Za-z0-9]{0,16})*")
_NULL = re.compile(r"(?:\s|```[A-Za-z0-9]{0,16}(?=\s))*(?:null|none)[\s`]*", re.IGNORECASE | re.ASCII)
_ECHO_MARK = re.compile(r"thinking process here\s{0,8}</think>\s{0,8}$")
_EXAMPLES = [
    [
        RawObject(box=(left, top, right, bottom), points=tuple((x, y) for x, y in points))
        for (left, top, right, bottom), points in known.example
    ]
    for known in FORMATS.values()
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a reply says and where it thinks, before it is an `Answer`."""

    status: AnswerStatus
    thinking_span: tuple[int, int]
    """Characters of the reply, white space off both ends; (0, 0) for none."""
    prompts: tuple[Prompt, ...]
    num_objects: int
    """Objects that the answer names, those outside the picture and beyond `MAX_OBJECTS` included."""


_Found = tuple[list[RawObject], int]
"""The objects of an answer (none: "no such object") and where in the text the answer begins."""


def parse_answer(
    text: str,
    *,
    answer_format: AnswerFormat,
    input_size_hw: tuple[int, int],
    source_size_hw: tuple[int, int],
    finished: bool = True,
    mode: ParseMode = "tolerant",
) -> Answer:
    """Reads a policy's reply as an `Answer`. Never raises for any text.

    Args:
        text: the reply as generated, without the prompt.
        answer_format: the family whose rounding, own keys and empty answer hold.
        input_size_hw: height and width that the text's coordinates count up to: those of the picture the policy saw, or
            what its family answers in instead (`PolicyManifest.answer_size_hw`).
        source_size_hw: height and width of the source picture; the prompts' coordinates are its pixels.
        finished: False if the token budget, not the policy, ended the reply.
        mode: which notation is accepted, see above.

    Raises:
        ValueError: a size that is not positive, or an unknown mode: the caller's mistake, not the text's.
    """
    reader = answer_reader()
    answer = reader and reader(text, answer_format, input_size_hw, source_size_hw, finished, mode)
    if isinstance(answer, Answer):
        return answer
    reading = read_reply(
        text,
        answer_format=answer_format,
        input_size_hw=input_size_hw,
        source_size_hw=source_size_hw,
        finished=finished,
        mode=mode,
    )
    thinking = text[slice(*reading.thinking_span)]
    return Answer(status=reading.status, thinking=thinking, prompts=reading.prompts, text=text)


def read_reply(
    text: str,
    *,
    answer_format: AnswerFormat,
    input_size_hw: tuple[int, int],
    source_size_hw: tuple[int, int],
    finished: bool = True,
    mode: ParseMode = "tolerant",
) -> Reading:
    """The same in Python, with the place of the thinking and the number of objects named: the definition."""
    check_request(input_size_hw, source_size_hw, mode)
    tags = find_tags(text)
    found = _find_answer(text, tags, answer_format, finished, mode)
    objects, start = found if found is not None else ([], _default_start(text, tags))
    kept = (to_prompt(raw, answer_format, input_size_hw, source_size_hw) for raw in objects[:MAX_OBJECTS])
    prompts = tuple(prompt for prompt in kept if prompt is not None)
    if prompts:
        status = AnswerStatus.OK
    elif found is not None and not objects:
        status = AnswerStatus.NONE_FOUND
    else:
        status = AnswerStatus.MALFORMED if finished else AnswerStatus.TRUNCATED
    return Reading(
        status=status,
        thinking_span=thinking_span(text, tags, start),
        prompts=prompts,
        num_objects=len(objects),
    )


def check_request(input_size_hw: tuple[int, int], source_size_hw: tuple[int, int], mode: str) -> None:
    """Raises ValueError for a size that is not positive, or an unknown mode."""
    if min(*input_size_hw, *source_size_hw) < 1:
        raise ValueError(f"expected positive sizes, got input {input_size_hw} and source {source_size_hw}")
    if mode not in MODES:
        raise ValueError(f"expected a mode of {', '.join(MODES)}, got {mode!r}")


def _default_start(text: str, tags: Sequence[Tag]) -> int:
    """Where thinking ends in a reply without a usable answer: at its last `<answer>`, or else at its end."""
    return next((tag.start for tag in reversed(tags) if not tag.is_think and not tag.is_close), len(text))


def _find_answer(
    text: str, tags: Sequence[Tag], answer_format: AnswerFormat, finished: bool, mode: ParseMode
) -> _Found | None:
    if mode == "vision_reasoner":
        return _vision_reasoner_answer(text)
    if mode == "seg_zero":
        return _seg_zero_answer(text)
    read = _canonical_answer if mode == "rfc8259" else _tolerant_answer
    openings = answer_openings(tags, finished=finished)
    for tag in openings[:MAX_ANSWERS_TRIED]:
        objects = read(text, tag.end, answer_format, finished, True)
        if objects is not None and not _is_echo(objects, text, tag.start):
            return objects, tag.start
    bare = _bare_start(tags) if finished and not openings else None
    if bare is None:
        return None
    objects = read(text, bare, answer_format, finished, False)
    return None if objects is None or _is_echo(objects, text, bare) else (objects, bare)


def _bare_start(tags: Sequence[Tag]) -> int | None:
    """Where an answer without tags begins: after the last think tag, if that one closes; None inside thinking."""
    last = next((tag for tag in reversed(tags) if tag.is_think), None)
    if last is None:
        return 0
    return last.end if last.is_close else None


def _is_echo(objects: list[RawObject], text: str, start: int) -> bool:
    """Whether the answer is the prompt's example come back rather than something seen in the picture."""
    if not objects:
        return False
    if objects in _EXAMPLES:
        return True
    repeats_prompt = _ECHO_MARK.search(text, max(0, start - 64), start) is not None
    return repeats_prompt and any(all(raw in example for raw in objects) for example in _EXAMPLES)


def _vision_reasoner_answer(text: str) -> _Found | None:
    """What stands where the script looks, read as Python reads JSON."""
    span = vision_reasoner_span(text)
    if span is None:
        return None
    reading = read_json(text[slice(*span)].strip(), dialect=Dialect.PYTHON)
    objects = None if reading.fault else vision_reasoner_objects(reading.value)
    start = span[0] - len(ANSWER_OPEN)
    return None if objects is None or _is_echo(objects, text, start) else (objects, start)


def _seg_zero_answer(text: str) -> _Found | None:
    """What stands where the script looks, read as Python reads JSON."""
    span = seg_zero_span(text)
    if span is None:
        return _seg_zero_none(text)
    reading = read_json(text, start=span[0], end=span[1], dialect=Dialect.PYTHON)
    objects = None if reading.fault else seg_zero_objects(reading.value)
    answer_start = text.rfind(ANSWER_OPEN, 0, span[0])
    begin = answer_start if answer_start >= 0 else span[0]
    return None if objects is None or _is_echo(objects, text, begin) else (objects, begin)


def _seg_zero_none(text: str) -> _Found | None:
    """The script knows no empty answer and stops with an error; here `{}`, `null` and `[]` in the tags are one."""
    start = text.rfind(ANSWER_OPEN)
    close = text.find(ANSWER_CLOSE, start) if start >= 0 else -1
    content = text[start + len(ANSWER_OPEN) : close].strip() if close >= 0 else ""
    return ([], start) if content in ("{}", "null", "[]") else None


def _canonical_answer(
    text: str, begin: int, answer_format: AnswerFormat, finished: bool, tagged: bool
) -> list[RawObject] | None:
    """One RFC 8259 document up to the next tag; without one, up to the end of a reply that was not cut."""
    stop = TAG.search(text, begin)
    if stop is None and tagged and not finished:
        return None
    reading = read_json(text, start=begin, end=len(text) if stop is None else stop.start())
    return None if reading.fault else canonical_objects(reading.value, answer_format)


def _tolerant_answer(
    text: str, begin: int, answer_format: AnswerFormat, finished: bool, tagged: bool
) -> list[RawObject] | None:
    """The last group of values between `begin` and the next tag; None if there is none or one is broken."""
    group: list[RawObject] | None = None
    group_end = begin
    for count, (start, end, objects) in enumerate(_values(text, begin, answer_format, may_end=finished)):
        if end < 0 or count >= MAX_VALUES:
            return None
        if objects is None or (group and not objects):
            continue
        if not objects and not tagged and (count or not _stands_alone(text, begin, start, end)):
            continue
        if group and _JOINT.fullmatch(text, group_end, start):
            group.extend(objects)
        else:
            group = objects
        group_end = end
    if group is None and _says_null(text, begin, finished):
        return []
    return group


def _says_null(text: str, begin: int, finished: bool) -> bool:
    """Whether `null` or `None` is all that stands before the next tag (or the end of a reply not cut)."""
    word = _NULL.match(text, begin)
    if word is None:
        return False
    return (word.end() == len(text) and finished) or TAG.match(text, word.end()) is not None


def _values(
    text: str, begin: int, answer_format: AnswerFormat, *, may_end: bool
) -> Iterator[tuple[int, int, list[RawObject] | None]]:
    """Yields start, end and objects of each value up to the next tag.

    The objects are None for a value that is no answer, and for prose in brackets; the end is -1 for a broken value.
    """
    at = begin
    while True:
        mark = _VALUE_OR_TAG.search(text, at)
        if mark is None or mark[0] not in "[{":
            return
        reading = read_tolerant(text, mark.start(), may_end=may_end)
        at = reading.end
        if reading.fault is None:
            yield mark.start(), at, tolerant_objects(reading.value, answer_format)
        elif reading.has_member or reading.fault is JsonFault.TOO_DEEP:
            yield mark.start(), -1, None
            return
        else:
            yield mark.start(), at, None


def _stands_alone(text: str, begin: int, start: int, end: int) -> bool:
    """Whether nothing but a code fence is around the value: then `[]` is an answer even without tags."""
    tail = TAG.search(text, end)
    stop = len(text) if tail is None else tail.start()
    return bool(_AROUND_BARE.fullmatch(text, begin, start) and _AROUND_BARE.fullmatch(text, end, stop))
