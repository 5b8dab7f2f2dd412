"""parse_prompts on the host's build: gives the module a format's rules, and its results their shapes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, Prompt
from segzero_rt.answer_format import FORMATS, AnswerFormat, Rounding
from segzero_rt.answer_objects import BOX_NAMES, POINT_NAMES, plain_name
from segzero_rt.answer_parser import MODES, ParseMode
from segzero_rt.kernels.parse_prompts import STATUSES, ParsedReplies

# The sizes of the fixed fields of `Rules` in answer_objects.cuh.
MAX_KEY_BYTES, MAX_POINT_KEYS = 32, 4
_MAX_EXAMPLES = _MAX_EXAMPLE_OBJECTS = _MAX_EXAMPLE_POINTS = 4


class _Example(ctypes.Structure):
    _fields_ = (
        ("num_objects", ctypes.c_uint32),
        ("num_points", ctypes.c_uint32 * _MAX_EXAMPLE_OBJECTS),
        ("boxes", ctypes.c_double * 4 * _MAX_EXAMPLE_OBJECTS),
        ("points", ctypes.c_double * 2 * _MAX_EXAMPLE_POINTS * _MAX_EXAMPLE_OBJECTS),
    )


class Rules(ctypes.Structure):
    """`Rules` of answer_objects.cuh."""

    _fields_ = (
        ("multiple", ctypes.c_int32),
        ("half_up", ctypes.c_int32),
        ("own_names", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("box_key_bytes", ctypes.c_uint32),
        ("num_point_keys", ctypes.c_uint32),
        ("point_key_bytes", ctypes.c_uint32 * MAX_POINT_KEYS),
        ("box_key", ctypes.c_char * MAX_KEY_BYTES),
        ("point_keys", ctypes.c_char * MAX_KEY_BYTES * MAX_POINT_KEYS),
        ("num_examples", ctypes.c_uint32),
        ("examples", _Example * _MAX_EXAMPLES),
    )


@functools.lru_cache(maxsize=16)
def rules_of(answer_format: AnswerFormat) -> Rules | None:
    """What the kernels know of a format; None for keys longer or more than their fixed fields hold, or not ASCII."""
    keys = [answer_format.box_key, *answer_format.point_keys]
    if len(keys) > 1 + MAX_POINT_KEYS or not all(key.isascii() and len(key) <= MAX_KEY_BYTES for key in keys):
        return None
    rules = Rules(
        multiple=answer_format.multiple,
        half_up=answer_format.rounding is Rounding.HALF_UP,
        own_names=_has_known_names(answer_format),
        box_key_bytes=len(answer_format.box_key),
        box_key=answer_format.box_key.encode(),
        num_point_keys=len(answer_format.point_keys),
        num_examples=len(FORMATS),
    )
    for index, key in enumerate(answer_format.point_keys):
        rules.point_key_bytes[index] = len(key)
        rules.point_keys[index].value = key.encode()
    for example, known in zip(rules.examples, FORMATS.values(), strict=False):
        example.num_objects = len(known.example)
        for index, (box, points) in enumerate(known.example):
            example.boxes[index][:] = box
            example.num_points[index] = len(points)
            for row, point in zip(example.points[index], points, strict=False):
                row[:] = point
    return rules


def required_rules(answer_format: AnswerFormat) -> Rules:
    """As `rules_of`.

    Raises:
        ValueError: keys beyond the kernels' limits.
    """
    rules = rules_of(answer_format)
    if rules is None:
        raise ValueError(
            f"expected a format with up to {MAX_POINT_KEYS} point keys and keys of up to {MAX_KEY_BYTES} ASCII "
            f"characters, got {answer_format.name} with {answer_format.box_key!r} and {answer_format.point_keys}"
        )
    return rules


def _has_known_names(answer_format: AnswerFormat) -> bool:
    """Whether the tolerant rules take the format's keys for a box and points, each for a key of its own."""
    keys = (answer_format.box_key, *answer_format.point_keys)
    names = [plain_name(key) for key in keys]
    known = names[0] in BOX_NAMES and all(name in POINT_NAMES for name in names[1:])
    return known and len(set(keys)) == len(keys)


def bound_reader(module: ModuleType) -> Callable[..., Any]:
    """The module's `parse_answer`, which gives `Answer` objects from now on."""
    module.bind(Answer, Prompt, STATUSES, MODES, rules_of)
    reader: Callable[..., Any] = module.parse_answer
    return reader


def parse_on_host(
    module: ModuleType,
    replies: Sequence[bytes],
    answer_format: AnswerFormat,
    sizes: NDArray[np.int32],
    finished: NDArray[np.bool_],
    mode: ParseMode,
) -> ParsedReplies:
    """See `parse_prompts.parse_prompts`, which has checked the arguments but for the format and the replies.

    `sizes` and `finished` have an entry for each reply, or one for all.
    """
    rules = required_rules(answer_format)
    status, thinking, num_objects, object_offsets, boxes, point_offsets, points = module.parse_prompts(
        replies, rules, sizes, finished, MODES.index(mode)
    )
    return ParsedReplies(
        status=np.frombuffer(status, np.int32),
        thinking_spans=np.frombuffer(thinking, np.int64).reshape(-1, 2),
        num_objects=np.frombuffer(num_objects, np.int32),
        object_offsets=np.frombuffer(object_offsets, np.int64),
        boxes_xyxy=np.frombuffer(boxes, np.int32).reshape(-1, 4),
        point_offsets=np.frombuffer(point_offsets, np.int64),
        points_xy=np.frombuffer(points, np.int32).reshape(-1, 2),
    )
