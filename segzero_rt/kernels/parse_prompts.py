"""parse_prompts: a batch of replies as bytes to thinking, status, boxes and points in source pixels.

**Contract.** For each reply, what `answer_parser.read_reply` says about the text that the bytes are: same status, same
thinking, same number of objects, same prompts in the same order, in every mode. The bytes are UTF-8; a byte that is
none is a character of its own that is neither white space nor a mark, and a surrogate that was encoded by itself is
read back. Nothing raises for any reply. Any number of replies takes the same way, one as well as 100,000.

Limits, errors for the caller: replies up to `MAX_REPLY_BYTES`, sizes from 1 to `MAX_SIDE`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, AnswerStatus, Prompt
from segzero_rt.answer_format import AnswerFormat
from segzero_rt.answer_parser import MODES, ParseMode, Reading, read_reply
from segzero_rt.kernels.backend import Kernels, kernels_for

MAX_REPLY_BYTES = (1 << 31) - 1
MAX_SIDE = 1 << 30
"""Pixels of a picture's side; its coordinates are kept in 32 bits."""
STATUSES = (AnswerStatus.OK, AnswerStatus.NONE_FOUND, AnswerStatus.TRUNCATED, AnswerStatus.MALFORMED)
"""A status by its code in `ParsedReplies.status`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ParsedReplies:
    """N replies with K prompts and P points in all, in order."""

    status: NDArray[np.int32]
    """int32 [N]: codes of `STATUSES`."""
    thinking_spans: NDArray[np.int64]
    """int64 [N, 2]: begin and end in bytes of the reply, white space off both ends; zeros for none."""
    num_objects: NDArray[np.int32]
    """int32 [N]: objects named, those outside the picture and beyond `MAX_OBJECTS` included."""
    object_offsets: NDArray[np.int64]
    """int64 [N + 1]: the prompts of reply i are those from entry i to entry i + 1."""
    boxes_xyxy: NDArray[np.int32]
    """int32 [K, 4]: left, top, right, bottom in source pixels."""
    point_offsets: NDArray[np.int64]
    """int64 [K + 1]: the points of prompt k are those from entry k to entry k + 1."""
    points_xy: NDArray[np.int32]
    """int32 [P, 2] in source pixels."""

    def __len__(self) -> int:
        return len(self.status)

    def prompts(self, index: int) -> tuple[Prompt, ...]:
        """The prompts of one reply."""
        first, last = self.object_offsets[index : index + 2].tolist()
        bounds = self.point_offsets[first : last + 1].tolist()
        boxes = self.boxes_xyxy[first:last].astype(np.float64).tolist()
        points = self.points_xy[bounds[0] : bounds[-1]].astype(np.float64).tolist() if bounds else []
        offset = bounds[0] if bounds else 0
        return tuple(
            Prompt(box_xyxy=tuple(box), points_xy=tuple(map(tuple, points[begin - offset : end - offset])))
            for box, begin, end in zip(boxes, bounds, bounds[1:], strict=False)
        )

    def answer(self, index: int, text: str) -> Answer:
        """One reply as `parse_answer` gives it; `text` is what the reply was encoded from."""
        begin, end = self.thinking_spans[index].tolist()
        thinking = text[begin:end] if text.isascii() else decode_reply(encode_reply(text)[begin:end])
        return Answer(status=STATUSES[self.status[index]], thinking=thinking, prompts=self.prompts(index), text=text)


def encode_reply(text: str) -> bytes:
    """A reply as the kernels take it; any `str`, lone surrogates too."""
    return text.encode("utf-8", "surrogatepass")


def decode_reply(data: bytes) -> str:
    """The text of a reply's bytes, or of a span of them. Never raises."""
    return _characters(data)[0]


def parse_prompts(
    replies: Sequence[bytes],
    *,
    answer_format: AnswerFormat,
    input_size_hw: tuple[int, int] | NDArray[np.integer],
    source_size_hw: tuple[int, int] | NDArray[np.integer],
    finished: bool | Sequence[bool] | NDArray[np.bool_] = True,
    mode: ParseMode = "tolerant",
    kernels: Kernels | None = None,
) -> ParsedReplies:
    """Parses replies.

    Args:
        replies: N replies as generated, UTF-8.
        answer_format: the family whose rounding, own keys and empty answer hold.
        input_size_hw: height and width of the picture the policy saw; one pair, or an array [N, 2].
        source_size_hw: height and width of the source picture; likewise.
        finished: whether the policy, not the token budget, ended the reply; one for all or N.
        mode: which notation is accepted, see `answer_parser`.
        kernels: the build to use; by default what `kernels_for` gives.

    Raises:
        ValueError: a size or a reply beyond the limits, arrays that do not fit, or an unknown mode; with compiled
            kernels also a format with keys beyond theirs (four point keys, 32 ASCII characters).
        TypeError: a reply that is not bytes.
    """
    if mode not in MODES:
        raise ValueError(f"expected a mode of {', '.join(MODES)}, got {mode!r}")
    sizes, ended = _sizes(input_size_hw, source_size_hw), np.atleast_1d(np.asarray(finished, np.bool_))
    count = len(replies)
    if ended.ndim != 1 or not {len(sizes), len(ended)} <= {1, count}:
        raise ValueError(
            f"expected sizes and ends for {count} replies or one for all, got {len(sizes)} sizes and ends of shape "
            f"{list(ended.shape)}"
        )
    chosen = kernels or kernels_for(count)
    if chosen.device is not None:
        from segzero_rt.kernels.parse_prompts_device import parse_with_device

        _check_replies(replies)
        return parse_with_device(chosen.device, replies, answer_format, sizes, ended, mode)
    if chosen.module is not None:
        from segzero_rt.kernels.parse_prompts_host import parse_on_host

        return parse_on_host(chosen.module, replies, answer_format, sizes, np.ascontiguousarray(ended), mode)
    return _reference(replies, answer_format, sizes, ended, mode)


def _reference(
    replies: Sequence[bytes],
    answer_format: AnswerFormat,
    sizes: NDArray[np.int32],
    finished: NDArray[np.bool_],
    mode: ParseMode,
) -> ParsedReplies:
    _check_replies(replies)
    each_size = np.broadcast_to(sizes, (len(replies), 4)).tolist()
    each_end = np.broadcast_to(finished, (len(replies),)).tolist()
    readings = [
        _read_bytes(reply, answer_format, size, end, mode)
        for reply, size, end in zip(replies, each_size, each_end, strict=True)
    ]
    return _packed(readings)


def _check_replies(replies: Sequence[bytes]) -> None:
    for reply in replies:
        if not isinstance(reply, bytes):
            raise TypeError(f"expected replies as bytes, got {type(reply).__name__}")
        if len(reply) > MAX_REPLY_BYTES:
            raise ValueError(f"expected replies of up to {MAX_REPLY_BYTES} bytes, got {len(reply)}; cut it")


def _sizes(
    input_size_hw: tuple[int, int] | NDArray[np.integer], source_size_hw: tuple[int, int] | NDArray[np.integer]
) -> NDArray[np.int32]:
    """Input height and width, source height and width of each reply: int32 [N, 4]; [1, 4] if all have the same."""
    if isinstance(input_size_hw, tuple) and isinstance(source_size_hw, tuple) and len(input_size_hw) == 2:
        sides = (*input_size_hw, *source_size_hw)
        if len(sides) == 4 and all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides):
            return np.array([sides], np.int32)
    pairs = [np.atleast_2d(np.asarray(pair, np.int64)) for pair in (input_size_hw, source_size_hw)]
    if any(pair.ndim != 2 or pair.shape[1] != 2 for pair in pairs):
        raise ValueError(f"expected sizes as a pair or [N, 2], got {input_size_hw} and {source_size_hw}")
    sizes = np.concatenate(np.broadcast_arrays(*pairs), axis=1)
    if sizes.size and (sizes.min() < 1 or sizes.max() > MAX_SIDE):
        raise ValueError(f"expected positive sizes up to {MAX_SIDE}, got {sizes.min()} to {sizes.max()}")
    return np.ascontiguousarray(sizes.astype(np.int32))


def _read_bytes(
    reply: bytes, answer_format: AnswerFormat, sizes: list[int], finished: bool, mode: ParseMode
) -> Reading:
    """The reference, one reply: `read_reply` with the thinking's place in bytes."""
    text, byte_at = _characters(reply)
    reading = read_reply(
        text,
        answer_format=answer_format,
        input_size_hw=(sizes[0], sizes[1]),
        source_size_hw=(sizes[2], sizes[3]),
        finished=finished,
        mode=mode,
    )
    begin, end = reading.thinking_span
    return Reading(
        status=reading.status,
        thinking_span=(byte_at(begin), byte_at(end)),
        prompts=reading.prompts,
        num_objects=reading.num_objects,
    )


def _characters(data: bytes) -> tuple[str, Callable[[int], int]]:
    """The text of the bytes, and where in the bytes its characters begin."""
    try:
        text = data.decode("utf-8", "surrogatepass")
        return text, lambda at: len(text[:at].encode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        pass
    characters, begins, at = [], [], 0
    while at < len(data):
        character, length = _next_character(data, at)
        characters.append(character)
        begins.append(at)
        at += length
    begins.append(at)
    return "".join(characters), begins.__getitem__


def _next_character(data: bytes, at: int) -> tuple[str, int]:
    for length in (1, 2, 3, 4):
        try:
            return data[at : at + length].decode("utf-8", "surrogatepass"), length
        except UnicodeDecodeError:
            continue
    return chr(0xDC00 + data[at]), 1


def _packed(readings: Sequence[Reading]) -> ParsedReplies:
    prompts = [prompt for reading in readings for prompt in reading.prompts]
    points = [point for prompt in prompts for point in prompt.points_xy]
    counts = [len(reading.prompts) for reading in readings]
    return ParsedReplies(
        status=np.array([STATUSES.index(reading.status) for reading in readings], np.int32),
        thinking_spans=np.array([reading.thinking_span for reading in readings], np.int64).reshape(-1, 2),
        num_objects=np.array([reading.num_objects for reading in readings], np.int32),
        object_offsets=np.cumsum([0, *counts], dtype=np.int64),
        boxes_xyxy=np.array([prompt.box_xyxy for prompt in prompts], np.int32).reshape(-1, 4),
        point_offsets=np.cumsum([0, *(len(prompt.points_xy) for prompt in prompts)], dtype=np.int64),
        points_xy=np.array(points, np.int32).reshape(-1, 2),
    )
