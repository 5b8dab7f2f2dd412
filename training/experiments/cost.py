"""What an experiment will take, told before anything long begins: from steps that were timed on this machine.

Steps are timed as they will run, one thread each and as many at a time as there are workers, on the first training
questions. What is not in the estimate: replies that grow or shrink while GRPO goes on, and what else the machine does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .design import SFT_ARMS, Arm, ExperimentPreset
from .jobs import (
    BASE,
    ONCE,
    QUESTION_S,
    RETENTION,
    ROW_S,
    STEP_S,
    TEST,
    TRAIN,
    VALIDATION,
    Job,
    JobKind,
    Workplace,
    label,
    timing_jobs,
)
from .shared_rows import OOD_SPLITS

RETENTION_QUESTIONS = 8
"""Of each retention picture, at most."""
_HOUR_S = 3600.0
ROWS = "rendering"


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds, measured."""

    step_s: Mapping[Arm, float]
    """One optimiser step."""
    question_s: Mapping[Arm, float]
    """One question, answered greedily in a batch."""
    row_s: float
    """One question, drawn."""


def read_timings(workplace: Workplace) -> Timings:
    """What the timing jobs have left, all of which are done."""
    results: dict[str, Any] = {job.name: workplace.result(job) for job in timing_jobs()}
    timed = {job.arm: results[job.name] for job in timing_jobs() if job.arm is not None}
    (rows,) = (results[job.name] for job in timing_jobs() if job.kind is JobKind.ROWS)
    return Timings(
        step_s={arm: result[STEP_S] for arm, result in timed.items()},
        question_s={arm: result[QUESTION_S] for arm, result in timed.items()},
        row_s=rows[ROW_S],
    )


def job_seconds(job: Job, preset: ExperimentPreset, timings: Timings) -> float:
    """Seconds of one job on one thread."""
    if job.kind is JobKind.ROWS:
        return timings.row_s * _num_rows(job, preset)
    asked_as = Arm.SFT_ANSWERS if job.reply_start else Arm.SFT_REASONING
    if job.kind is JobKind.MEASURE:
        questions = preset.test_questions + len(OOD_SPLITS) * preset.ood_questions
        return timings.question_s[job.arm or asked_as] * (questions + RETENTION_QUESTIONS * preset.retention_pictures)
    arm = job.arm
    if arm is None or job.kind is JobKind.TIME:
        return 0.0
    final = job.kind is JobKind.FINAL
    steps = preset.arm_steps(arm, preset.steps if final else preset.sweep_steps)
    steps = preset.once_steps() if job.once else steps
    validations = 1 + (preset.evaluations if final else preset.sweep_evaluations)
    return steps * timings.step_s[arm] + validations * preset.validation_questions * timings.question_s[arm]


def estimate(jobs: list[Job], preset: ExperimentPreset, timings: Timings, num_workers: int) -> dict[str, Any]:
    """Hours of one thread by arm, and of all jobs on `num_workers` threads side by side, as plain JSON types."""
    names = (ROWS, BASE, *(arm.value for arm in Arm), *(f"{arm.value}_{ONCE}" for arm in SFT_ARMS))
    threads = dict.fromkeys(names, 0.0)
    for job in jobs:
        threads[_part(job)] += job_seconds(job, preset, timings) / _HOUR_S
    return {
        "thread_hours": threads,
        "workers": num_workers,
        "hours": sum(threads.values()) / num_workers,
        "measured": {
            "step_s": {arm.value: seconds for arm, seconds in timings.step_s.items()},
            "question_s": {arm.value: seconds for arm, seconds in timings.question_s.items()},
            "row_s": timings.row_s,
        },
    }


def render(cost: Mapping[str, Any]) -> str:
    """The estimate in a few lines."""
    steps, questions = cost["measured"]["step_s"], cost["measured"]["question_s"]
    lines = ["estimated hours of one thread (seconds of a step, of a question answered, as timed here):"]
    for name, hours in cost["thread_hours"].items():
        timed = f"  ({steps[name]:.2f} s, {questions[name]:.3f} s)" if name in steps else ""
        lines.append(f"  {name:<20} {hours:6.2f} h{timed}")
    lines.append(f"  {'in all':<20} {cost['hours']:6.2f} h, {cost['workers']} at a time")
    return "\n".join(lines)


def _num_rows(job: Job, preset: ExperimentPreset) -> int:
    counts = {
        TRAIN: preset.num_rows, VALIDATION: preset.validation_questions, TEST: preset.test_questions,
        RETENTION: preset.retention_pictures, JobKind.TIME.value: 0,
    }  # fmt: skip
    return counts.get(job.split, preset.ood_questions)


def _part(job: Job) -> str:
    if job.kind is JobKind.ROWS:
        return ROWS
    return BASE if job.arm is None else label(job)
