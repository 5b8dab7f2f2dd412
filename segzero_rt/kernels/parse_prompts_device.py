"""parse_prompts on a device: replies that lie there are read there, and what they say stays there."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer
from segzero_rt.answer_format import AnswerFormat
from segzero_rt.answer_parser import MODES, ParseMode
from segzero_rt.device import DeviceArray
from segzero_rt.kernels.backend import resolve_kernels
from segzero_rt.kernels.device_kernels import DeviceKernels, blocks
from segzero_rt.kernels.parse_prompts import MAX_SIDE, STATUSES, ParsedReplies, encode_reply, parse_prompts
from segzero_rt.kernels.parse_prompts_host import required_rules, rules_of

MAX_POINTS = 8
PROMPT = np.dtype([("box_xyxy", "<i4", 4), ("num_points", "<i4"), ("points_xy", "<i4", (MAX_POINTS, 2))])
"""A prompt on a device, in source pixels; only the first `num_points` points are set."""
REPLY = np.dtype([("status", "<i4"), ("thinking", "<u4", 2), ("num_objects", "<u4"), ("num_prompts", "<u4")])
"""What is said of a reply: a code of `STATUSES` or `NO_ROOM`, begin and end of the thinking in its bytes, how many
objects it names, and how many prompts its row has."""
NO_ROOM = len(STATUSES)
"""Nothing is said about the reply: it needs a longer tape or more prompts than it was given."""
_FOUND_TAGS_BYTES = 4 + 12 * 12
_NODE_BYTES = 16
_TAPE_NODES = 128
"""Of one reply in any notation but the usual one, which needs no tape: ten objects and more."""
_SLOTS = 8
_PARSE_THREADS, _WARP_THREADS, _COUNT_THREADS = 64, 256, 256
_BLOCKS_AT_ONCE = 7
"""Of a multiprocessor; more would not run at the same time, and each thread has a tape of its own."""


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("text", "begins", "ends", "finished", "sizes", "rules")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("mode", "each_finished", "each_size")),
    )


class DeviceParser:
    """Reads replies on a device by `parse_prompts`' contract, one as well as 100,000. One call at a time."""

    def __init__(
        self,
        kernels: DeviceKernels,
        answer_format: AnswerFormat,
        *,
        mode: ParseMode = "tolerant",
        max_replies: int = 1,
        slots: int = _SLOTS,
    ) -> None:
        """Args:
            kernels: of the device that the replies are on.
            answer_format: the family whose rounding, own keys and empty answer hold.
            mode: which notation is accepted.
            max_replies: of one call.
            slots: prompts that a reply's row has room for; a reply with more gets the status `NO_ROOM`.

        Raises:
            ValueError: a format beyond the kernels' limits, or numbers below 1.
        """
        if max_replies < 1 or slots < 1:
            raise ValueError(f"expected replies and slots from 1 on, got {max_replies} and {slots}")
        device = kernels.device
        self._kernels, self._mode, self.slots, self.max_replies = kernels, MODES.index(mode), slots, max_replies
        rules = np.frombuffer(bytes(required_rules(answer_format)), np.uint8)
        self._rules = device.to_device(rules)
        most_blocks = device.num_multiprocessors * _BLOCKS_AT_ONCE
        self._num_blocks = min(blocks(max_replies, _PARSE_THREADS), most_blocks)
        threads = self._num_blocks * _PARSE_THREADS
        self._tapes = device.allocate(threads * _TAPE_NODES * _NODE_BYTES)
        self._scratch = device.empty((threads, slots), PROMPT)
        self._tags = device.allocate(max_replies * _FOUND_TAGS_BYTES)
        self.replies = device.empty((max_replies,), REPLY)
        """`REPLY` [max_replies]: the first N are of the last call."""
        self.prompts = device.empty((max_replies, slots), PROMPT)
        """`PROMPT` [max_replies, slots]: of each reply the first `num_prompts` are set."""

    def enqueue(
        self, text: DeviceArray, begins: DeviceArray, ends: DeviceArray, sizes: DeviceArray, finished: DeviceArray
    ) -> None:
        """Enqueues reading N replies; `replies` and `prompts` have what they say.

        Args:
            text: uint8, all replies, UTF-8.
            begins: int64 [N], where each begins in it.
            ends: int64 [N], where it ends.
            sizes: int32 [N, 4] or [1, 4]: height and width that the policy saw, height and width of the source picture,
                from 1 to `MAX_SIDE`.
            finished: uint8 [N] or [1]: 1 where the policy, not the token budget, ended the reply.

        Raises:
            ValueError: arrays that do not fit each other.
        """
        count = len(begins)
        if not 0 <= count <= self.max_replies:
            raise ValueError(f"expected up to {self.max_replies} replies, got {count}")
        if not count:
            return
        batch = _Batch(
            text=text.expect("text", text.shape[:1], np.uint8).address,
            begins=begins.expect("begins", (count,), np.int64).address,
            ends=ends.expect("ends", (count,), np.int64).address,
            finished=finished.expect("finished", (1 if len(finished) == 1 else count,), np.uint8).address,
            sizes=sizes.expect("sizes", (1 if len(sizes) == 1 else count, 4), np.int32).address,
            rules=self._rules.address,
            count=count,
            mode=self._mode,
            each_finished=len(finished) > 1,
            each_size=len(sizes) > 1,
        )
        launch = self._kernels.launch
        most_blocks = self._kernels.device.num_multiprocessors * 16
        warp_blocks = min(blocks(count, _WARP_THREADS // 32), most_blocks)
        launch("find_tags_kernel", (warp_blocks,), (_WARP_THREADS if count > 1 else 32,), batch, self._tags)
        launch(
            "parse_prompts_kernel",
            (min(blocks(count, _PARSE_THREADS), self._num_blocks),),
            (_PARSE_THREADS if count > 1 else 1,),
            *(batch, self._tags, ctypes.c_uint32(self.slots), ctypes.c_uint32(_TAPE_NODES)),
            *(self._tapes, self._scratch, self.replies, self.prompts),
        )

    def pack(self, count: int, offsets: DeviceArray, packed: DeviceArray) -> None:
        """Enqueues putting the prompts of the last call one after another.

        Args:
            count: N of the last call.
            offsets: int64 [N + 1], becomes where each reply's prompts begin.
            packed: `PROMPT` with room for N * `slots`.

        Raises:
            ValueError: arrays that do not fit.
        """
        offsets.expect("offsets", (count + 1,), np.int64)
        packed.expect("packed", (count * self.slots,), PROMPT)
        number, slots = ctypes.c_int64(count), ctypes.c_uint32(self.slots)
        self._kernels.launch("count_prompts_kernel", (1,), (_COUNT_THREADS,), self.replies, number, offsets)
        grid = (blocks(count * self.slots, _WARP_THREADS),)
        self._kernels.launch(
            *("pack_prompts_kernel", grid, (_WARP_THREADS,)),
            *(self.replies, number, slots, offsets, self.prompts, packed),
        )


def parse_with_device(
    kernels: DeviceKernels,
    replies: Sequence[bytes],
    answer_format: AnswerFormat,
    sizes: NDArray[np.int32],
    finished: NDArray[np.bool_],
    mode: ParseMode,
    parser: DeviceParser | None = None,
) -> ParsedReplies:
    """See `parse_prompts.parse_prompts`, which has checked the arguments but for the format: copies there and back.

    Replies that find no room on the device are parsed by the host. `parser` is one for this format and mode.
    """
    count, device = len(replies), kernels.device
    parser = parser or DeviceParser(kernels, answer_format, mode=mode, max_replies=max(1, count))
    if not count:
        return _unpacked(np.empty(0, REPLY), np.empty(0, PROMPT))
    bounds = np.cumsum([0, *map(len, replies)], dtype=np.int64)
    with device.current():
        places = device.to_device(bounds)
        text = device.to_device(np.frombuffer(b"".join(replies), np.uint8))
        begins, ends = places.view((count,)), places.view((count,), offset_bytes=8)
        parser.enqueue(text, begins, ends, device.to_device(sizes), device.to_device(finished.astype(np.uint8)))
        offsets, packed = device.empty((count + 1,), np.int64), device.empty((count * parser.slots,), PROMPT)
        parser.pack(count, offsets, packed)
        heads, (*_, total) = device.to_host(parser.replies.view((count,)), offsets)
        (prompts,) = device.to_host(packed.view((int(total),)))
    if (heads["status"] == NO_ROOM).any():
        heads, prompts = _with_the_rest(heads, prompts, replies, answer_format, sizes, finished, mode)
    return _unpacked(heads, prompts)


def _with_the_rest(
    heads: NDArray[Any],
    prompts: NDArray[Any],
    replies: Sequence[bytes],
    answer_format: AnswerFormat,
    sizes: NDArray[np.int32],
    finished: NDArray[np.bool_],
    mode: ParseMode,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same with the replies that found no room, as the host reads them."""
    left = np.flatnonzero(heads["status"] == NO_ROOM)
    each_size = np.broadcast_to(sizes, (len(replies), 4))[left]
    read = parse_prompts(
        [replies[index] for index in left.tolist()],
        answer_format=answer_format,
        input_size_hw=each_size[:, :2],
        source_size_hw=each_size[:, 2:],
        finished=np.broadcast_to(finished, (len(replies),))[left],
        mode=mode,
        kernels=resolve_kernels("auto"),
    )
    owners = np.repeat(np.arange(len(heads)), heads["num_prompts"])
    heads["status"][left], heads["thinking"][left] = read.status, read.thinking_spans
    heads["num_objects"][left], heads["num_prompts"][left] = read.num_objects, np.diff(read.object_offsets)
    more = np.zeros(len(read.boxes_xyxy), PROMPT)
    more["box_xyxy"], more["num_points"] = read.boxes_xyxy, np.diff(read.point_offsets)
    more["points_xy"][_used(more)] = read.points_xy
    owners = np.concatenate([owners, np.repeat(left, np.diff(read.object_offsets))])
    return heads, np.concatenate([prompts, more])[owners.argsort(kind="stable")]


def _used(prompts: NDArray[Any]) -> NDArray[np.bool_]:
    """bool [K, MAX_POINTS]: the points that are set."""
    return np.asarray(np.arange(MAX_POINTS) < prompts["num_points"][:, None])


def _unpacked(heads: NDArray[Any], prompts: NDArray[Any]) -> ParsedReplies:
    return ParsedReplies(
        status=heads["status"].astype(np.int32),
        thinking_spans=heads["thinking"].astype(np.int64).reshape(-1, 2),
        num_objects=heads["num_objects"].astype(np.int32),
        object_offsets=np.cumsum([0, *heads["num_prompts"]], dtype=np.int64),
        boxes_xyxy=prompts["box_xyxy"].astype(np.int32).reshape(-1, 4),
        point_offsets=np.cumsum([0, *prompts["num_points"]], dtype=np.int64),
        points_xy=prompts["points_xy"][_used(prompts)].astype(np.int32).reshape(-1, 2),
    )


def device_reader(kernels: DeviceKernels) -> Callable[..., Answer | None]:
    """`backend.answer_reader` on a device: one reply, as a batch of one. Room is made once for a format and mode."""
    parsers: dict[tuple[AnswerFormat, ParseMode], DeviceParser] = {}
    lock = threading.Lock()

    def read(
        text: str,
        answer_format: AnswerFormat,
        input_size_hw: tuple[int, int],
        source_size_hw: tuple[int, int],
        finished: bool,
        mode: ParseMode,
    ) -> Answer | None:
        sides = (*input_size_hw, *source_size_hw)
        known = mode in MODES and len(sides) == 4 and rules_of(answer_format) is not None
        if not known or not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides):
            return None
        sizes, ended = np.array([sides], np.int32), np.array([finished], np.bool_)
        with lock:
            key = (answer_format, mode)
            if key not in parsers:
                parsers[key] = DeviceParser(kernels, answer_format, mode=mode)
            parsed = parse_with_device(
                kernels, [encode_reply(text)], answer_format, sizes, ended, mode, parser=parsers[key]
            )
        return parsed.answer(0, text)

    return read
