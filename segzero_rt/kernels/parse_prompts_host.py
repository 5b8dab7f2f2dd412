"""parse_prompts on the host's build: packs the batch, calls the library, cuts the results to length."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Prompt
from segzero_rt.answer_format import FORMATS, AnswerFormat, Rounding
from segzero_rt.answer_geometry import MAX_POINTS
from segzero_rt.answer_parser import MAX_OBJECTS, MODES, ParseMode
from segzero_rt.kernels.parse_prompts import ParsedReplies

# The sizes of the fixed fields of `Rules` in answer_objects.cuh.
MAX_KEY_BYTES, MAX_POINT_KEYS = 32, 4
_MAX_EXAMPLES = _MAX_EXAMPLE_OBJECTS = _MAX_EXAMPLE_POINTS = 4
_PARSED, _NO_ROOM, _NO_MEMORY = 0, 1, 2


class _Example(ctypes.Structure):
    _fields_ = (
        ("num_objects", ctypes.c_uint32),
        ("num_points", ctypes.c_uint32 * _MAX_EXAMPLE_OBJECTS),
        ("boxes", ctypes.c_double * 4 * _MAX_EXAMPLE_OBJECTS),
        ("points", ctypes.c_double * 2 * _MAX_EXAMPLE_POINTS * _MAX_EXAMPLE_OBJECTS),
    )


class _Rules(ctypes.Structure):
    _fields_ = (
        ("multiple", ctypes.c_int32),
        ("half_up", ctypes.c_int32),
        ("box_key_bytes", ctypes.c_uint32),
        ("num_point_keys", ctypes.c_uint32),
        ("point_key_bytes", ctypes.c_uint32 * MAX_POINT_KEYS),
        ("box_key", ctypes.c_char * MAX_KEY_BYTES),
        ("point_keys", ctypes.c_char * MAX_KEY_BYTES * MAX_POINT_KEYS),
        ("num_examples", ctypes.c_uint32),
        ("examples", _Example * _MAX_EXAMPLES),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("text", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("offsets", "finished", "sizes", "rules")),
        *((name, ctypes.c_int64) for name in ("count", "mode", "capacity")),
        *((name, ctypes.c_void_p) for name in ("status", "thinking", "num_objects", "object_ends")),
        *((name, ctypes.c_void_p) for name in ("boxes_xyxy", "point_ends", "points_xy")),
        *((name, ctypes.c_int64) for name in ("first", "objects_used", "points_used")),
    )


@functools.lru_cache(maxsize=16)
def rules_of(answer_format: AnswerFormat) -> _Rules | None:
    """What the kernels know of a format; None for keys longer or more than their fixed fields hold, or not ASCII."""
    keys = [answer_format.box_key, *answer_format.point_keys]
    if len(keys) > 1 + MAX_POINT_KEYS or not all(key.isascii() and len(key) <= MAX_KEY_BYTES for key in keys):
        return None
    rules = _Rules(
        multiple=answer_format.multiple,
        half_up=answer_format.rounding is Rounding.HALF_UP,
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


class _OneReply(threading.local):
    """Memory for one reply at a time in one thread, tied to its `_Batch` once: that costs more than parsing."""

    def __init__(self) -> None:
        self.offsets, self.finished = (ctypes.c_int64 * 2)(0, 0), (ctypes.c_uint8 * 1)()
        self.sizes, self.status, self.num_objects = (ctypes.c_int32 * 4)(), ctypes.c_int32(), ctypes.c_int32()
        self.thinking, self.object_ends = (ctypes.c_int64 * 2)(), ctypes.c_int64()
        self.boxes, self.point_ends = (ctypes.c_int32 * (4 * MAX_OBJECTS))(), (ctypes.c_int64 * MAX_OBJECTS)()
        self.points = (ctypes.c_int32 * (2 * MAX_POINTS * MAX_OBJECTS))()
        self.batch = _Batch(
            offsets=ctypes.addressof(self.offsets),
            finished=ctypes.addressof(self.finished),
            sizes=ctypes.addressof(self.sizes),
            count=1,
            capacity=MAX_OBJECTS,
            status=ctypes.addressof(self.status),
            thinking=ctypes.addressof(self.thinking),
            num_objects=ctypes.addressof(self.num_objects),
            object_ends=ctypes.addressof(self.object_ends),
            boxes_xyxy=ctypes.addressof(self.boxes),
            point_ends=ctypes.addressof(self.point_ends),
            points_xy=ctypes.addressof(self.points),
        )
        self.reference = ctypes.byref(self.batch)


_one_reply = _OneReply()


def read_on_host(
    library: ctypes.CDLL,
    reply: bytes,
    rules: _Rules,
    sizes: tuple[int, int, int, int],
    finished: bool,
    mode: ParseMode,
) -> tuple[int, tuple[int, int], int, tuple[Prompt, ...]]:
    """One reply: code of its status, its thinking's span in bytes, number of objects named, prompts."""
    own = _one_reply
    batch = own.batch
    batch.text, batch.rules, batch.mode = reply, ctypes.addressof(rules), MODES.index(mode)
    own.offsets[1], own.finished[0], own.sizes[:] = len(reply), finished, list(sizes)
    batch.first = batch.objects_used = batch.points_used = 0
    if library.segzero_parse_prompts(own.reference) == _NO_MEMORY:
        raise MemoryError(f"no memory to parse a reply of {len(reply)} bytes")
    count = batch.objects_used
    boxes = list(map(float, own.boxes[: 4 * count]))
    points = list(map(float, own.points[: 2 * batch.points_used]))
    begin, prompts = 0, []
    for index, end in enumerate(own.point_ends[:count]):
        left, top, right, bottom = boxes[4 * index : 4 * index + 4]
        points_xy = tuple(zip(points[2 * begin : 2 * end : 2], points[2 * begin + 1 : 2 * end : 2], strict=True))
        prompts.append(Prompt(box_xyxy=(left, top, right, bottom), points_xy=points_xy))
        begin = end
    return own.status.value, (own.thinking[0], own.thinking[1]), own.num_objects.value, tuple(prompts)


def parse_on_host(
    library: ctypes.CDLL,
    replies: Sequence[bytes],
    answer_format: AnswerFormat,
    sizes: NDArray[np.int32],
    finished: NDArray[np.bool_],
    mode: ParseMode,
) -> ParsedReplies:
    """See `parse_prompts.parse_prompts`, which has checked the arguments but for the format."""
    rules = rules_of(answer_format)
    if rules is None:
        raise ValueError(
            f"expected a format with up to {MAX_POINT_KEYS} point keys and keys of up to {MAX_KEY_BYTES} ASCII "
            f"characters, got {answer_format.name} with {answer_format.box_key!r} and {answer_format.point_keys}"
        )
    count = len(replies)
    text = replies[0] if count == 1 else b"".join(replies)
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum([len(reply) for reply in replies], out=offsets[1:])
    status, thinking = np.empty(count, np.int32), np.empty((count, 2), np.int64)
    num_objects = np.empty(count, np.int32)
    object_offsets = np.zeros(count + 1, np.int64)
    capacity = MAX_OBJECTS + 2 * count
    boxes, point_ends, points = _room(capacity)
    batch = _Batch(
        text=text,
        offsets=offsets.ctypes.data,
        finished=finished.ctypes.data,
        sizes=sizes.ctypes.data,
        rules=ctypes.addressof(rules),
        count=count,
        mode=MODES.index(mode),
        status=status.ctypes.data,
        thinking=thinking.ctypes.data,
        num_objects=num_objects.ctypes.data,
        object_ends=object_offsets.ctypes.data + object_offsets.itemsize,
    )
    while True:
        batch.capacity = capacity
        batch.boxes_xyxy, batch.points_xy = boxes.ctypes.data, points.ctypes.data
        batch.point_ends = point_ends.ctypes.data + point_ends.itemsize
        outcome = library.segzero_parse_prompts(ctypes.byref(batch))
        if outcome != _NO_ROOM:
            break
        capacity *= 2
        boxes, point_ends, points = _grown((boxes, point_ends, points), capacity)
    if outcome == _NO_MEMORY:
        raise MemoryError(f"no memory to parse a reply of {len(replies[batch.first])} bytes")
    return ParsedReplies(
        status=status,
        thinking_spans=thinking,
        num_objects=num_objects,
        object_offsets=object_offsets,
        boxes_xyxy=boxes[: batch.objects_used].copy(),
        point_offsets=point_ends[: batch.objects_used + 1].copy(),
        points_xy=points[: batch.points_used].copy(),
    )


_Room = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]


def _room(capacity: int) -> _Room:
    """Boxes [capacity, 4], point offsets [capacity + 1] beginning with 0, points for the most that can come."""
    points = np.empty((MAX_POINTS * capacity, 2), np.int32)  # untouched pages cost nothing
    return np.empty((capacity, 4), np.int32), np.zeros(capacity + 1, np.int64), points


def _grown(old: _Room, capacity: int) -> _Room:
    new = _room(capacity)
    new[0][: len(old[0])], new[1][: len(old[1])], new[2][: len(old[2])] = old
    return new
