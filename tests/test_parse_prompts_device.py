"""parse_prompts where replies lie on a device: read, and spelled from tokens, without a wait."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_builds import DEVICE_BUILDS, kernel_build

from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.kernels.parse_prompts_device import NO_ROOM, PROMPT, DeviceParser
from segzero_rt.kernels.reply_text_device import DeviceSpeller

OBJECT = '{"bbox_2d": [120, 130, 260, 340], "point_2d": [190, 235]}'


@pytest.mark.parametrize("build", DEVICE_BUILDS)
def test_what_lies_on_the_device_is_read_there_without_a_wait(build: str) -> None:
    kernels = kernel_build(build).device
    assert kernels is not None
    device = kernels.device
    replies = [f"<think>a</think><answer>[{OBJECT}]</answer>".encode(), b"<answer>[]</answer>", b"x"]
    replies += [f"<answer>[{', '.join([OBJECT] * 3)}]</answer>".encode()]
    text = device.to_device(np.frombuffer(b"".join(replies), np.uint8))
    bounds = np.cumsum([0, *map(len, replies)], dtype=np.int64)
    begins, ends = device.to_device(bounds[:-1]), device.to_device(bounds[1:])
    sizes, finished = (
        device.to_device(np.array([[840, 840, 84, 420]], np.int32)),
        device.to_device(np.ones(1, np.uint8)),
    )
    parser = DeviceParser(kernels, VISION_REASONER, max_replies=4, slots=2)
    offsets, packed = device.empty((5,), np.int64), device.empty((8,), PROMPT)
    parser.enqueue(text, begins, ends, sizes, finished)  # compiles and loads
    waits, allocations = device.num_host_waits, device.num_allocations
    parser.enqueue(text, begins, ends, sizes, finished)
    parser.pack(4, offsets, packed)
    assert (device.num_host_waits, device.num_allocations) == (waits, allocations), "nothing was waited for"
    heads, rows, places, prompts = device.to_host(parser.replies, parser.prompts, offsets, packed)
    assert heads["status"].tolist() == [0, 1, 3, NO_ROOM], "two slots are too few for three prompts"
    assert heads["thinking"][0].tolist() == [7, 8] and heads["num_prompts"].tolist() == [1, 0, 0, 0]
    assert places.tolist() == [0, 1, 1, 1, 1]
    assert rows[0, 0] == prompts[0] and prompts[0]["box_xyxy"].tolist() == [60, 13, 130, 34]
    assert prompts[0]["points_xy"][0].tolist() == [95, 24] and prompts[0]["num_points"] == 1
    alone = DeviceParser(kernels, VISION_REASONER)
    alone.enqueue(text, begins.view((1,)), ends.view((1,)), sizes, finished)
    (head,) = device.to_host(alone.replies)
    assert head[0] == heads[0], "one reply by itself"
    for wrong in (
        lambda: parser.enqueue(text, device.empty((5,), np.int64), ends, sizes, finished),
        lambda: parser.enqueue(text, begins, ends.view((3,)), sizes, finished),
        lambda: parser.enqueue(text, begins, ends, device.empty((2, 4), np.int32), finished),
        lambda: parser.pack(4, offsets.view((4,)), packed),
        lambda: DeviceParser(kernels, VISION_REASONER, slots=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()


@pytest.mark.parametrize("build", DEVICE_BUILDS)
def test_tokens_on_the_device_are_spelled_and_read_there(build: str) -> None:
    kernels = kernel_build(build).device
    assert kernels is not None
    device = kernels.device
    tokens = [
        None,
        b"<answer>",
        OBJECT.encode(),
        b"[",
        b"]",
        b"</answer>",
        b"",
        b"\xc3",
        b"\xa9",
        b"<think>",
        b"</think>",
    ]
    replies = [
        ("an answer", [9, 7, 8, 10, 1, 3, 2, 4, 5]),
        ("nothing", []),
        ("only what says nothing", [0, 6, 0]),
        ("ids that are none", [-1, 1, 3, 11, 4, 1 << 30, 5]),
        ("three hundred tokens", [7, 8] * 145 + [1, 3, 4, 5]),
        ("as many as there are", [8] * 300),
    ]
    ids = np.full((len(replies), 300), 2, np.int32)  # behind a reply stands what was never said
    for row, (_, said) in zip(ids, replies, strict=True):
        row[: len(said)] = said
    counts = np.array([len(said) for _, said in replies[:-1]] + [1000], np.int32)
    speller = DeviceSpeller(kernels, tokens, max_replies=8, max_tokens=300)
    parser = DeviceParser(kernels, VISION_REASONER, max_replies=8)
    resident, numbers = device.to_device(ids), device.to_device(counts)
    sizes = device.to_device(np.array([[840, 840, 840, 840]], np.int32))
    finished = device.to_device(np.ones(1, np.uint8))
    for first in (True, False):
        waits = device.num_host_waits
        speller.enqueue(resident, numbers)
        begins, ends = (array.view((len(replies),)) for array in (speller.begins, speller.ends))
        parser.enqueue(speller.text, begins, ends, sizes, finished)
        assert first or device.num_host_waits == waits, "nothing was waited for"
    text, start, stop, heads = device.to_host(speller.text, begins, ends, parser.replies.view((len(replies),)))
    for index, (name, said) in enumerate(replies):
        want = b"".join(tokens[number] or b"" for number in said if 0 <= number < len(tokens))
        assert text[start[index] : stop[index]].tobytes() == want, name
    assert heads["status"].tolist() == [0, 3, 3, 1, 1, 3]
    assert heads["thinking"][0].tolist() == [7, 9]
    for wrong in (
        lambda: speller.enqueue(resident, numbers.view((5,))),
        lambda: speller.enqueue(resident.view((6, 299)), numbers),
        lambda: speller.enqueue(device.empty((9, 300), np.int32), device.empty((9,), np.int32)),
        lambda: DeviceSpeller(kernels, [], max_replies=1, max_tokens=1),
        lambda: DeviceSpeller(kernels, tokens, max_replies=0, max_tokens=1),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()
