"""The answer parser on the device: many replies that lie there, one reply, and whether all builds read the same."""

from __future__ import annotations

import gzip
import json
import random
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.answer_mutants import mutants
from benchmarks.kernel_fuzz import HOSTILE, disagreements, draw_arguments
from benchmarks.kernels import INPUT_HW, REAL, SOURCE_HW
from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.parse_prompts import encode_reply, parse_prompts

from .errors import GpuCheckError
from .replay import median_run, seconds_each_run
from .roofline import read_peaks
from .stages import Context, Figures

if TYPE_CHECKING:
    from segzero_rt.kernels.device_kernels import DeviceKernels
    from segzero_rt.kernels.parse_prompts_device import DeviceParser

_MANY = {"full": 100_000, "tiny": 300}
_MUTANTS = {"full": 300_000, "tiny": 400}
_CHUNK = 1000
_COPIES = 4
"""Of the replies, read in turns: 100,000 of them would nearly fit into the cache of a large device."""
_ROUNDS = {"full": 20, "tiny": 2}
_SINGLES = 16
_BATCHES = {"full": (1, 10, 100, 1000, 10_000, 100_000), "tiny": (1, 10)}
SOURCE, REAL_SOURCE = "hostile_answers.jsonl", "model_outputs.jsonl.gz"

ARGUMENTS: dict[str, Any] = {
    "answer_format": VISION_REASONER,
    "input_size_hw": INPUT_HW,
    "source_size_hw": SOURCE_HW,
}


def open_kernels(context: Context) -> Kernels:
    """The device's build; on a processor the host's, which the same replies go through."""
    return resolve_kernels("cuda" if context.device == "cuda" else "host")


def replies_of(context: Context, count: int) -> tuple[list[bytes], str]:
    """So many replies, and which they are: real ones where they were carried here, else those of the tests."""
    carried = context.work / "data" / REAL_SOURCE
    found = next((path for path in (carried, REAL) if path.is_file()), None)
    if found is not None:
        with gzip.open(found, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["output"] for line in lines]
    else:
        texts = [json.loads(line)["text"] for line in HOSTILE.read_text("ascii").splitlines()]
    data = [encode_reply(text) for text in texts if isinstance(text, str)]
    random.Random(0).shuffle(data)
    return [data[index % len(data)] for index in range(count)], REAL_SOURCE if found else SOURCE


def many(context: Context) -> Figures:
    """100,000 replies that lie on the device: share of the memory's bandwidth, of bytes read and written once.

    Raises:
        GpuCheckError: the device reads a reply otherwise than the host.
    """
    kernels = open_kernels(context)
    replies, source = replies_of(context, _MANY[context.size])
    wrong = _differing(replies, kernels)
    if wrong:
        raise GpuCheckError(f"expected the host's readings, {kernels} reads {len(wrong)} otherwise: {wrong[0][:200]!r}")
    figures: Figures = {
        "replies": len(replies),
        "source": source,
        "text_bytes": sum(map(len, replies)),
        "kernels": kernels.detail,
    }
    if kernels.device is None:
        seconds, num_bytes = _many_on_host(replies, kernels, _ROUNDS[context.size])
    else:
        seconds, num_bytes = _many_on_device(replies, kernels.device, _ROUNDS[context.size])
    reached = read_peaks(context).reached(seconds, num_bytes)
    return {**figures, "replies_per_second": len(replies) / seconds, "of_bandwidth": reached}


def one(context: Context) -> Figures:
    """One reply that lies on the device: microseconds of its kernels, for several real replies."""
    kernels = open_kernels(context)
    replies, source = replies_of(context, _SINGLES)
    if kernels.device is None:
        seconds = [_host_s([reply], kernels, _ROUNDS[context.size]) for reply in replies]
    else:
        runs = 5 if context.tiny else 100
        seconds = [_one_on_device(reply, kernels.device, runs, _ROUNDS[context.size]) for reply in replies]
    return {
        "source": source,
        "mean_bytes": sum(map(len, replies)) / len(replies),
        "microseconds_median": statistics.median(seconds) * 1e6,
        "microseconds_worst": max(seconds) * 1e6,
        "kernels": kernels.detail,
    }


def batches(context: Context) -> Figures:
    """Calls from Python with replies in the host's memory, copies included: from how many on a device pays."""
    sides = {str(build): build for build in (resolve_kernels("host"), open_kernels(context))}
    figures: Figures = {}
    for count in _BATCHES[context.size]:
        replies, _ = replies_of(context, count)
        rounds = 3 if count > 1000 else 20
        figures[str(count)] = {name: 1e6 * _host_s(replies, build, rounds) for name, build in sides.items()}
    return {"microseconds_by_replies": figures}


def fuzz(context: Context) -> Figures:
    """Mutants of hostile and real replies, in every mode: how many the device reads otherwise than the host."""
    kernels, host = open_kernels(context), resolve_kernels("host")
    seeds, source = replies_of(context, 800)
    stream, rng = mutants(seeds, 7), random.Random(8)
    wrong: list[str] = []
    left = _MUTANTS[context.size]
    while left > 0:
        arguments = draw_arguments(rng)
        chunk = list(islice(stream, min(_CHUNK, left)))
        found, _ = disagreements(chunk, arguments, (kernels, host))
        wrong += [f"{reply[:300]!r} in mode {arguments['mode']}" for reply in found]
        left -= len(chunk)
    return {"mutants": _MUTANTS[context.size], "seeds": source, "disagreements": len(wrong), "first": wrong[:5]}


def _differing(replies: list[bytes], kernels: Kernels) -> list[bytes]:
    found, _ = disagreements(replies, ARGUMENTS, (kernels, resolve_kernels("host")))
    return found


def _host_s(replies: list[bytes], kernels: Kernels, rounds: int) -> float:
    """Median seconds of a Python call."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        parse_prompts(replies, kernels=kernels, **ARGUMENTS)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _many_on_host(replies: list[bytes], kernels: Kernels, rounds: int) -> tuple[float, int]:
    read = parse_prompts(replies, kernels=kernels, **ARGUMENTS)
    written = sum(
        getattr(read, name).nbytes
        for name in ("status", "thinking_spans", "num_objects", "object_offsets", "boxes_xyxy", "points_xy")
    )
    return _host_s(replies, kernels, rounds), sum(map(len, replies)) + written


def _many_on_device(replies: list[bytes], kernels: DeviceKernels, rounds: int) -> tuple[float, int]:
    """Seconds of reading all, and the bytes that must move: text, bounds, heads, and the prompts that there are."""
    from segzero_rt.kernels.parse_prompts_device import PROMPT, REPLY, DeviceParser

    device, count = kernels.device, len(replies)
    parser = DeviceParser(kernels, VISION_REASONER, max_replies=count)
    enqueues = [_enqueue(kernels, parser, replies) for _ in range(_COPIES)]
    seconds = median_run(device, lambda index: enqueues[index](), runs=_COPIES, rounds=rounds)
    (heads,) = device.to_host(parser.replies)
    written = int(heads["num_prompts"].sum()) * PROMPT.itemsize + count * REPLY.itemsize
    return seconds, sum(map(len, replies)) + 16 * count + written


def _one_on_device(reply: bytes, kernels: DeviceKernels, runs: int, rounds: int) -> float:
    from segzero_rt.kernels.parse_prompts_device import DeviceParser

    parser = DeviceParser(kernels, VISION_REASONER)
    enqueue = _enqueue(kernels, parser, [reply])
    return statistics.median(seconds_each_run(kernels.device, lambda _: enqueue(), runs=runs, rounds=rounds))


def _enqueue(kernels: DeviceKernels, parser: DeviceParser, replies: list[bytes]) -> Callable[[], None]:
    """Reads replies that lie on the device in memory of their own."""
    device = kernels.device
    bounds: NDArray[np.int64] = np.cumsum([0, *map(len, replies)], dtype=np.int64)
    places, count = device.to_device(bounds), len(replies)
    arguments = (
        device.to_device(np.frombuffer(b"".join(replies), np.uint8)),
        places.view((count,)),
        places.view((count,), offset_bytes=8),
        device.to_device(np.array([[*INPUT_HW, *SOURCE_HW]], np.int32)),
        device.to_device(np.ones(1, np.uint8)),
    )
    return lambda: parser.enqueue(*arguments)
