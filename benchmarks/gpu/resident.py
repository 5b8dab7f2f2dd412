"""Questions answered on the device from frame to masks: how often the host waits, and how long a question takes.

Two counts stand side by side: the pipeline's own, of every wait in its one file that calls CUDA, and what PyTorch's
profiler saw the process call, ONNX Runtime's and TensorRT's calls included.
"""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.bench.tasks import Task, make_tasks
from segzero_rt.bundle import EMBEDDED

from .build import carried_bundle, engine_bundle
from .errors import NotHereError
from .stages import Context, Figures

if TYPE_CHECKING:
    from segzero_rt.resident.pipeline import ResidentSegmentation, ResidentSegZero

_TASKS = {"full": 24, "tiny": 3}


def questions(context: Context, backend: str, replay: str = "") -> Figures:
    """Waits per question and while its tokens come, and milliseconds by stage.

    Args:
        backend: "cuda", "tensorrt" or "tensorrt-rtx".
        replay: not empty to have runs of fixed shapes recorded as CUDA graphs.

    Raises:
        NotHereError: the check runs on the processor, or there are no engines.
        SegZeroError: the device, a package or a graph is not there.
    """
    pipeline = open_pipeline(context, backend, bool(replay))
    tasks = list(make_tasks(None, _TASKS[context.size]))
    ask_one(pipeline, tasks[0])  # compiles, binds and records
    heard: list[list[int]] = [[] for _ in tasks]  # how often the host had waited when each piece of text came
    found = [
        ask_one(pipeline, task, on_token=lambda _, marks=marks: marks.append(pipeline.num_host_waits))
        for task, marks in zip(tasks, heard, strict=True)
    ]
    pieces = sum(map(len, heard))
    return {
        "bundle": pipeline_bundle(context, backend).name,
        "questions": len(found),
        "waits_per_question": [one.host_waits for one in found],
        "most_waits_per_question": max(one.host_waits for one in found),
        "waits_per_piece_of_text": sum(marks[-1] - marks[0] for marks in heard if marks) / max(1, pieces),
        "pieces_of_text": pieces,
        "tokens": [one.decode_counts["tokens"] for one in found],
        "statuses": dict(Counter(one.answer.status.value for one in found)),
        "milliseconds": {
            name: statistics.median(one.timings_ms[name] for one in found) for name in ("decode", "masks", "total")
        },
        "milliseconds_per_token": statistics.median(
            one.timings_ms["decode"] / max(1, one.decode_counts["tokens"]) for one in found
        ),
        "calls_that_wait": calls_that_wait(context, pipeline, tasks[0]),
    }


def open_pipeline(context: Context, backend: str, replay: bool) -> ResidentSegZero:
    """The pipeline on the device.

    Raises:
        NotHereError: as `questions`.
    """
    if context.device == "cpu":
        raise NotHereError("no device to answer questions on: the check runs on the processor")
    from segzero_rt.resident.load import load_resident

    bundle = pipeline_bundle(context, backend)
    if not bundle.is_dir():
        raise NotHereError(f"no engines in {bundle}: the step `engines` made none")
    return load_resident(bundle, backend=backend, replay=replay)


def pipeline_bundle(context: Context, backend: str) -> Path:
    """The bundle with a target's engines; else the one that was carried; else the one that ships."""
    return engine_bundle(context, backend) if backend != "cuda" else carried_bundle(context) or EMBEDDED


def ask_one(pipeline: ResidentSegZero, task: Task, **options: Any) -> ResidentSegmentation:
    """One question about its picture, which comes from the host's memory; masks stay on the device."""
    from segzero_rt.resident.frames import as_frame

    look = pipeline.look(as_frame(task.load_image(), pipeline.staging), ahead=False)
    return pipeline.ask(look, task.question, **options)


def calls_that_wait(context: Context, pipeline: ResidentSegZero, task: Task) -> dict[str, int]:
    """Calls of CUDA by name that make the host wait, in one question; empty on a processor."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if context.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        ask_one(pipeline, task)
    return {one.key: one.count for one in profile.key_averages() if "ynchronize" in one.key}
