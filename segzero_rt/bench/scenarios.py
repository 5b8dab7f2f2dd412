"""Ways in which questions arrive: one after the other, all at once, or with a camera's frames.

* single stream (MLPerf's): the next question when the last is answered; latencies.
* offline (MLPerf's): all questions are there; what counts is how many a second. The picture of the next question is
  taken in before the present one is answered, so that the segmenter's encoder always has work.
* fixed rate (`ros2_benchmark`'s): a frame every 1/rate seconds whether or not anyone is ready. Only the newest frame
  waits, as in a queue of depth one; one that a newer frame replaces is dropped. Latency counts from its arrival.
* repeated frame: further questions on a picture that was looked at already.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from segzero_rt.bench.tasks import Task
from segzero_rt.commands.progress import Progress

if TYPE_CHECKING:
    from segzero_rt.answer_format import AnswerFormat
    from segzero_rt.image import ImageRgb
    from segzero_rt.pipeline import SegZero
    from segzero_rt.segmentation import Segmentation

Ask = Callable[["ImageRgb", str], "Segmentation"]

_ON_THE_WAY = ("preprocess", "vision", "prefill", "decode", "parse", "mask_wait", "mask_decode")
"""Stages that a question waits for; `mask_encode` runs beside them, and `mask_wait` is what of it is left."""
GLUE = "copies_and_glue"
"""What of a question's time no stage accounts for: copies between buffers, Python between graphs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """Where time comes from; tests have their own."""

    now_s: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


def single_stream(ask: Ask, tasks: Sequence[Task], clock: Clock | None = None) -> dict[str, Any]:
    """Times `ask` over the tasks; the first task runs twice, and its first run is reported apart.

    Returns:
        `first_question_ms`, `end_to_end_ms` and `stages_ms` (p50, p90, p99 each), `end_to_end_all_ms`, `decode_counts`
        (means per question, see `Segmentation`), `throughput_per_s`, `num_questions` and `statuses`.
    """
    from segzero_rt.evaluation import percentiles

    clock = clock or Clock()
    first_ms, _ = _timed(ask, tasks[0], clock)
    total_ms: list[float] = []
    stages_ms: dict[str, list[float]] = {}
    statuses: dict[str, int] = {}
    decoding: dict[str, list[int]] = {}
    with Progress(len(tasks), "bench") as progress:
        for task in tasks:
            elapsed_ms, result = _timed(ask, task, clock)
            total_ms.append(elapsed_ms)
            glue_ms = max(elapsed_ms - sum(result.timings_ms.get(stage, 0.0) for stage in _ON_THE_WAY), 0.0)
            for stage, value in {**result.timings_ms, GLUE: glue_ms}.items():
                stages_ms.setdefault(stage, []).append(value)
            for name, count in result.decode_counts.items():
                decoding.setdefault(name, []).append(count)
            status = result.answer.status.value
            statuses[status] = statuses.get(status, 0) + 1
            progress.step(f"{elapsed_ms:.0f} ms")
    return {
        "first_question_ms": first_ms,
        "end_to_end_ms": percentiles(total_ms),
        "end_to_end_all_ms": [round(value, 3) for value in total_ms],
        "stages_ms": {stage: percentiles(values) for stage, values in stages_ms.items()},
        "decode_counts": {name: sum(counts) / len(counts) for name, counts in decoding.items()},
        "throughput_per_s": len(tasks) / (sum(total_ms) / 1e3),
        "num_questions": len(tasks),
        "statuses": dict(sorted(statuses.items())),
    }


def _timed(ask: Ask, task: Task, clock: Clock) -> tuple[float, Segmentation]:
    image_rgb = task.load_image()
    start_s = clock.now_s()
    result = ask(image_rgb, task.question)
    return (clock.now_s() - start_s) * 1e3, result


def offline(
    pipeline: SegZero, tasks: Sequence[Task], *, answer_format: AnswerFormat | None, max_new_tokens: int | None
) -> dict[str, Any]:
    """All questions at once, pictures in memory.

    Returns:
        `throughput_per_s`, `seconds` and `num_questions`.
    """
    pictures = [task.load_image() for task in tasks]
    start = time.perf_counter()
    look = pipeline.look(pictures[0])
    for index, task in enumerate(tasks):
        following = pipeline.look(pictures[index + 1]) if index + 1 < len(tasks) else None
        result = pipeline.ask(look, task.question, answer_format=answer_format, max_new_tokens=max_new_tokens)
        if not result.answer.prompts:
            look.abandon()
        if following is not None:
            look = following
    seconds = time.perf_counter() - start
    return {"throughput_per_s": len(tasks) / seconds, "seconds": seconds, "num_questions": len(tasks)}


def repeated_frame(
    pipeline: SegZero, tasks: Sequence[Task], *, answer_format: AnswerFormat | None, max_new_tokens: int | None
) -> dict[str, Any]:
    """The tasks' questions on the first one's picture, after it was looked at and asked about once.

    Returns:
        `end_to_end_ms` (p50, p90, p99) and `num_questions`.
    """
    from segzero_rt.evaluation import percentiles

    look = pipeline.look(tasks[0].load_image())
    took: list[float] = []
    for task in (tasks[0], *tasks):
        start = time.perf_counter()
        pipeline.ask(look, task.question, answer_format=answer_format, max_new_tokens=max_new_tokens)
        took.append((time.perf_counter() - start) * 1e3)
    return {"end_to_end_ms": percentiles(took[1:]), "num_questions": len(tasks)}


def fixed_rate(
    ask: Ask, tasks: Sequence[Task], *, rate_hz: float, seconds: float, clock: Clock | None = None
) -> dict[str, Any]:
    """Frames at a fixed rate for some seconds, the tasks' pictures in turn; the last frame is always answered.

    Returns:
        `rate_hz`, `frames_sent`, `frames_answered`, `frames_dropped`, `answered_hz` (over the time from the first
        arrival to the last answer), `latency_ms` (p50, p90, p99), `first_latency_ms`, `last_latency_ms`, and
        `jitter_ms`: `mean` and `max` distance of the intervals between answers from their mean; None where there are
        fewer than two intervals.
    """
    from segzero_rt.evaluation import percentiles

    clock = clock or Clock()
    pictures = [task.load_image() for task in tasks]
    sent = max(1, round(rate_hz * seconds))
    start_s = clock.now_s()
    latencies_ms: list[float] = []
    answered_s: list[float] = []
    next_frame = 0
    while next_frame < sent:
        arrived = int((clock.now_s() - start_s) * rate_hz + 1e-9)  # newest frame that is there
        if arrived < next_frame:
            clock.sleep(max(start_s + next_frame / rate_hz - clock.now_s(), 0.0))
            continue
        frame = min(max(arrived, next_frame), sent - 1)
        ask(pictures[frame % len(tasks)], tasks[frame % len(tasks)].question)
        answered_s.append(clock.now_s())
        latencies_ms.append((answered_s[-1] - (start_s + frame / rate_hz)) * 1e3)
        next_frame = frame + 1
    return {
        "rate_hz": rate_hz,
        "frames_sent": sent,
        "frames_answered": len(latencies_ms),
        "frames_dropped": sent - len(latencies_ms),
        "answered_hz": len(latencies_ms) / (answered_s[-1] - start_s),
        "latency_ms": percentiles(latencies_ms),
        "first_latency_ms": latencies_ms[0],
        "last_latency_ms": latencies_ms[-1],
        "jitter_ms": _jitter_ms(answered_s),
    }


def _jitter_ms(times_s: Sequence[float]) -> dict[str, float] | None:
    intervals = [(after - before) * 1e3 for before, after in itertools.pairwise(times_s)]
    if len(intervals) < 2:
        return None
    mean = sum(intervals) / len(intervals)
    distances = [abs(interval - mean) for interval in intervals]
    return {"mean": sum(distances) / len(distances), "max": max(distances)}
