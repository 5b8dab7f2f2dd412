"""Where a reply thinks and where it answers: the think and answer tags of a policy's text.

Tags are taken in any case and with a blank beside the slash or the name (`<Answer>`, `</ answer>`); nothing else is a
tag. Everything here is linear in the text and never raises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from segzero_rt.answer_format import ANSWER_CLOSE, ANSWER_OPEN

TAG = re.compile(r"< ?(/?) ?(think|answer) ?>", re.IGNORECASE | re.ASCII)
"""Any think or answer tag: where one follows, an answer ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """One tag. Positions count characters of the reply."""

    is_think: bool
    """A think tag; otherwise an answer tag."""
    is_close: bool
    start: int
    end: int


def find_tags(text: str) -> list[Tag]:
    """Returns every think and answer tag, in order."""
    return [
        Tag(is_think=found[2][0] in "tT", is_close=bool(found[1]), start=found.start(), end=found.end())
        for found in TAG.finditer(text)
    ]


def answer_openings(tags: Sequence[Tag], *, finished: bool) -> list[Tag]:
    """Returns the tags that may open the answer, the last one first.

    An `<answer>` inside a think block is something the policy thinks about, and no answer. In a reply that ended by
    itself, a block that was never closed does not count as one; in a reply that was cut it does: the answer may have
    been to come. A block whose opening tag is missing begins with the reply.
    """
    openings: list[Tag] = []
    in_think: bool | None = None  # None: no think tag yet
    next_closes = _think_tags_that_follow(tags)
    for tag, closes in zip(tags, next_closes, strict=True):
        if tag.is_think:
            in_think = not tag.is_close
        elif not tag.is_close:
            cut_thinking = in_think is True and closes is None and not finished
            if not cut_thinking and not (in_think is not False and closes is True):
                openings.append(tag)
    return openings[::-1]


def thinking_span(text: str, tags: Sequence[Tag], answer_start: int) -> tuple[int, int]:
    """Returns where the thinking stands that belongs to the answer at `answer_start`, white space off both ends.

    It stands between the first `<think>` after the previous answer and the last `</think>` before this one; where the
    opening tag is missing it begins after the previous answer, where the closing one is, it ends at `answer_start`. If
    there is nothing before the answer, a think block behind it is taken. (0, 0) if nothing was thought.
    """
    begin = 0
    for tag in tags:
        if tag.start >= answer_start:
            break
        if tag.is_close and not tag.is_think:
            begin = tag.end
    inside = [tag for tag in tags if tag.is_think and begin <= tag.start < answer_start]
    opening = next((tag.end for tag in inside if not tag.is_close), begin)
    closing = next((tag.start for tag in reversed(inside) if tag.is_close and tag.start >= opening), answer_start)
    return _stripped(text, opening, closing) or _thinking_behind(text, tags, answer_start) or (0, 0)


def vision_reasoner_span(text: str) -> tuple[int, int] | None:
    """Returns where VisionReasoner's scripts look: between the first `<answer>` and the first `</answer>` after it.

    In small letters only; None if either is missing.
    """
    opening = text.find(ANSWER_OPEN)
    begin = opening + len(ANSWER_OPEN)
    close = text.find(ANSWER_CLOSE, begin) if opening >= 0 else -1
    return None if close < 0 else (begin, close)


def seg_zero_span(text: str) -> tuple[int, int] | None:
    """Returns where Seg-Zero's scripts look: from the first `{` that holds something to the first `}` after it.

    Wherever that stands, thinking included; both braces belong to the span. None if there is none.
    """
    start = text.find("{")
    while start >= 0 and text.startswith("}", start + 1):
        start = text.find("{", start + 1)
    close = text.find("}", start) if start >= 0 else -1
    return None if close < 0 else (start, close + 1)


def _stripped(text: str, begin: int, end: int) -> tuple[int, int] | None:
    """The span without the white space at its ends; None if nothing is left."""
    inside = text[begin:end]
    begin += len(inside) - len(inside.lstrip())
    length = len(inside.strip())
    return (begin, begin + length) if length else None


def _thinking_behind(text: str, tags: Sequence[Tag], answer_start: int) -> tuple[int, int] | None:
    opening = next((tag for tag in tags if tag.is_think and not tag.is_close and tag.start > answer_start), None)
    if opening is None:
        return None
    closing = next((tag.start for tag in tags if tag.start >= opening.end), len(text))
    return _stripped(text, opening.end, closing)


def _think_tags_that_follow(tags: Sequence[Tag]) -> list[bool | None]:
    """Returns, for each tag, whether the next think tag after it is a closing one; None if there is none."""
    follows: list[bool | None] = []
    closes: bool | None = None
    for tag in reversed(tags):
        follows.append(closes)
        if tag.is_think:
            closes = tag.is_close
    return follows[::-1]
