"""Every stage by itself, one after the other with nothing beside it, on as many pictures as were asked for.

In a question the segmenter's encoder runs beside the policy, so that each slows the other down; what a stage takes
alone is what a ceiling can be compared with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from segzero_rt.bench.tasks import Task

if TYPE_CHECKING:
    from segzero_rt.answer_format import AnswerFormat
    from segzero_rt.pipeline import SegZero


def stages_apart(
    pipeline: SegZero, tasks: Sequence[Task], *, answer_format: AnswerFormat | None, max_new_tokens: int | None
) -> dict[str, list[float]]:
    """Milliseconds of each stage on each task, in the order in which they come in a question.

    Returns:
        "preprocess", "vision", "prefill", "decode" (a whole reply), "token" (decode over the reply's tokens, where it
        has any), "parse", "mask_preprocess", "mask_encode" (the graph), and for pictures on which something was found
        "mask_decode" (the graph, all objects) and "postprocess" (coarse logits to masks of the picture's size).
    """
    took: dict[str, list[float]] = {}
    for task in tasks:
        for stage, value in _one(pipeline, task, answer_format, max_new_tokens).items():
            took.setdefault(stage, []).append(value)
    return took


def _one(
    pipeline: SegZero, task: Task, answer_format: AnswerFormat | None, max_new_tokens: int | None
) -> dict[str, float]:
    from segzero_rt.answer_parser import parse_answer
    from segzero_rt.mask import masks_from_logits

    image_rgb = task.load_image()
    policy = pipeline.policy
    reply = policy.answer(image_rgb, task.question, answer_format=answer_format, max_new_tokens=max_new_tokens)
    timings = reply.timings_ms
    stages = {
        "preprocess": timings["preprocess"],
        "vision": timings["vision"],
        "prefill": timings.get("prefix", 0.0) + timings["question"],
        "decode": timings["decode"],
    }
    if reply.counts.runs:
        stages["token"] = timings["decode"] / len(reply.token_ids)
    clock = _Clock()
    answer = parse_answer(
        reply.text,
        answer_format=answer_format or policy.default_format,
        input_size_hw=policy.manifest.answer_size_hw,
        source_size_hw=(image_rgb.shape[0], image_rgb.shape[1]),
        finished=reply.finished,
    )
    stages["parse"] = clock.lap()
    pipeline.encoder.pixel_values(image_rgb)
    stages["mask_preprocess"] = clock.lap()
    embedding = pipeline.encoder(image_rgb)
    stages["mask_encode"] = max(clock.lap() - stages["mask_preprocess"], 0.0)
    if answer.prompts:
        predicted = pipeline.decoder(embedding, answer.prompts)
        decoded = clock.lap()
        masks_from_logits(predicted.logits, embedding.size_hw)
        stages["postprocess"] = clock.lap()
        stages["mask_decode"] = max(decoded - stages["postprocess"], 0.0)
    return stages


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        now = time.perf_counter()
        elapsed, self._last = (now - self._last) * 1e3, now
        return elapsed
