"""An experiment as a list of jobs in a folder: what there is to do, what is done, what may begin.

    DIR/experiment.json        the settings; a run goes on only with the same ones
    DIR/rows/                  questions, rendered once for all
    DIR/jobs/<name>/           what one job writes; `done.json`, its result, last
    DIR/cost.json, report.md, report.json, *.svg

A job is done when its `done.json` is there. Whoever runs one holds its lock, which a killed process lets go of, so that
calling the experiment again goes on with what is not done; trainings go on from their last validation.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from segzero_rt.errors import SegZeroError

from .design import SFT_ARMS, Arm, ExperimentPreset
from .shared_rows import OOD_SPLITS

TEST, RETENTION, TRAIN, VALIDATION = "test", "retention", "train", "validation"
MEASURED = (TEST, *OOD_SPLITS, RETENTION)
"""What every policy is asked in the end."""
BASE, ONCE = "base", "once"
DONE_NAME, JOBS_NAME = "done.json", "jobs"
STEP_S, QUESTION_S, ROW_S = "step_s", "question_s", "row_s"
"""What was timed, in results."""
CURVE = "curve"
"""(samples learnt from, validation) pairs, in the result of a training."""


class JobKind(str, Enum):
    """What a job does, in the order in which jobs are begun."""

    ROWS = "rows"
    TIME = "time"
    SWEEP = "sweep"
    FINAL = "final"
    MEASURE = "measure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One piece of work."""

    kind: JobKind
    name: str
    """Its folder's name, unique."""
    arm: Arm | None = None
    rate: float | None = None
    """Learning rate of a sweep; a final run takes the arm's best."""
    seed: int = 0
    once: bool = False
    """Supervised: every question once, instead of as many samples as GRPO."""
    split: str = ""
    """Of rows; `time` renders what the timing needs."""
    reply_start: str = ""
    """Of a measurement."""
    trained: str = ""
    """Name of the final job whose policy is measured; empty: the base policy's."""


def all_jobs(preset: ExperimentPreset) -> list[Job]:
    """Everything there is to do, in order."""
    return [*timing_jobs(), *long_jobs(preset)]


def timing_jobs() -> list[Job]:
    """What has to be done before the cost can be told: a few questions, a few steps of each arm."""
    timed = [Job(kind=JobKind.TIME, name=f"time-{arm.value}", arm=arm) for arm in Arm]
    return [Job(kind=JobKind.ROWS, name="rows-for-timing", split=JobKind.TIME.value), *timed]


def long_jobs(preset: ExperimentPreset) -> list[Job]:
    """What follows once the cost is known."""
    rows = [Job(kind=JobKind.ROWS, name=f"rows-{split}", split=split) for split in (TRAIN, VALIDATION, *MEASURED)]
    sweeps = [
        Job(kind=JobKind.SWEEP, name=f"sweep-{arm.value}-{rate:.1e}", arm=arm, rate=rate, seed=preset.seeds[0])
        for arm in Arm
        for rate in preset.rates(arm)
    ]
    finals = [
        Job(kind=JobKind.FINAL, name=f"final-{arm.value}-{seed}", arm=arm, seed=seed)
        for arm in Arm
        for seed in preset.seeds
    ]
    bases = [
        Job(kind=JobKind.MEASURE, name="measure-base"),
        Job(kind=JobKind.MEASURE, name="measure-base_answers", reply_start=Arm.SFT_ANSWERS.reply_start),
    ]
    once = [
        Job(kind=JobKind.FINAL, name=f"final-{arm.value}_{ONCE}-{seed}", arm=arm, seed=seed, once=True)
        for arm in SFT_ARMS
        for seed in preset.seeds
    ]
    # No claim is about these, so that they come last.
    return [*rows, *sweeps, *finals, *bases, *map(_measurement, finals), *once, *map(_measurement, once)]


def _measurement(job: Job) -> Job:
    """Of the policy that a final job leaves."""
    return Job(
        kind=JobKind.MEASURE, name=f"measure-{job.name.removeprefix('final-')}", arm=job.arm, seed=job.seed,
        once=job.once, trained=job.name, reply_start=_arm(job).reply_start,
    )  # fmt: skip


class Phase(str, Enum):
    """Jobs that are begun together; the cost is told between the two."""

    TIMING = "timing"
    LONG = "long"

    def jobs(self, preset: ExperimentPreset) -> list[Job]:
        """The phase's jobs, in order."""
        return timing_jobs() if self is Phase.TIMING else long_jobs(preset)


def label(job: Job) -> str:
    """What a measured policy is called in reports: its arm, `base`, or `base_answers` behind an empty thinking."""
    if job.arm is None:
        return f"{BASE}_answers" if job.reply_start else BASE
    return f"{job.arm.value}_{ONCE}" if job.once else job.arm.value


class Workplace:
    """The jobs of one experiment in its folder."""

    def __init__(self, folder: Path, preset: ExperimentPreset) -> None:
        self.folder, self.preset = folder, preset

    @property
    def rows(self) -> Path:
        return self.folder / "rows"

    def job_folder(self, job: Job) -> Path:
        return self.folder / JOBS_NAME / job.name

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a job that is done has left, else None."""
        path = self.job_folder(job) / DONE_NAME
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def finish(self, job: Job, result: dict[str, Any]) -> None:
        """Marks a job as done."""
        path = self.job_folder(job) / DONE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
        temporary.replace(path)

    def is_ready(self, job: Job) -> bool:
        """Whether all is done that a job builds on."""
        return all(self.result(other) is not None for other in self._before(job))

    def best_rate(self, arm: Arm) -> float:
        """The rate whose sweep validated best; the lower one of equals.

        Raises:
            SegZeroError: a sweep of the arm is not done.
        """
        found = [(self.result(job), job) for job in self._jobs(JobKind.SWEEP) if job.arm is arm]
        values = {}
        for result, job in found:
            if result is None or job.rate is None:
                raise SegZeroError(f"expected every sweep of {arm.value} to be done, {job.name} is not")
            values[job.rate] = result[VALIDATION]
        return max(sorted(values), key=lambda rate: values[rate])

    @contextmanager
    def claimed(self, job: Job) -> Iterator[bool]:
        """Whether this process has the job to itself, for as long as the context lasts."""
        path = self.job_folder(job) / "lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _jobs(self, kind: JobKind) -> list[Job]:
        return [job for job in all_jobs(self.preset) if job.kind is kind]

    def _before(self, job: Job) -> Sequence[Job]:
        rows = {one.split: one for one in self._jobs(JobKind.ROWS)}
        if job.kind is JobKind.TIME:
            return [rows[JobKind.TIME.value]]
        if job.kind is JobKind.SWEEP:
            return [rows[TRAIN], rows[VALIDATION]]
        if job.kind is JobKind.FINAL:
            return [rows[TRAIN], *(one for one in self._jobs(JobKind.SWEEP) if one.arm is job.arm)]
        if job.kind is JobKind.MEASURE:  # nothing that is chosen may have seen these questions
            finals = [one for one in self._jobs(JobKind.FINAL) if not one.once or one.name == job.trained]
            return [*(rows[split] for split in MEASURED), *finals]
        return []


def _arm(job: Job) -> Arm:
    if job.arm is None:
        raise ValueError(f"expected a job with an arm, got {job.name}")
    return job.arm
