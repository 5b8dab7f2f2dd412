"""Does the jobs of an experiment: renders, times, trains, measures. A process with one thread does one at a time.

    python -m training.experiments.work DIR PHASE PARENT_PID

The experiment starts as many of these as it has workers. Each takes the next job that is ready and that nobody has, and
ends when all are done, or when whoever started it is gone.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from segzero_rt.errors import SegZeroError

from ..grpo import POLICY_FOLDER, GrpoRun
from ..grpo_callbacks import METRICS_NAME, read_metrics
from ..grpo_observer import BOX_GIOU
from ..picture_memory import TowerMemories
from ..rows import TrainingRow
from .design import Arm
from .experiment import end_with
from .jobs import (
    CURVE,
    MEASURED,
    QUESTION_S,
    RETENTION,
    ROW_S,
    STEP_S,
    TEST,
    TRAIN,
    VALIDATION,
    Job,
    JobKind,
    Phase,
    Workplace,
    all_jobs,
)
from .live_policy import LivePolicy
from .measures import mean, read_scores, score_rows, write_scores
from .reinforced import step_seconds, train_reinforced
from .retention import retention_questions, score_retention
from .settings import read_settings
from .shared_rows import OOD_SPLITS, split_rows, split_scenes
from .supervised import CHECKPOINT_NAME, SupervisedRun, SupervisedTraining

POLL_S = 1.0
RUN_FOLDER = "run"
TIMED_QUESTIONS = 16


class Worker:
    """Does the jobs of one workplace.

    Args:
        workplace: where.
        policy: folder or hub name of the base policy.
    """

    def __init__(self, workplace: Workplace, policy: str) -> None:
        self.workplace, self.preset, self.policy = workplace, workplace.preset, policy
        preset = workplace.preset
        pictures = preset.test_questions + len(OOD_SPLITS) * preset.ood_questions + preset.retention_pictures
        self._seen = TowerMemories(pictures)

    def work(self, jobs: Sequence[Job]) -> None:
        """Does those that nobody else does; returns when all are done."""
        while left := [job for job in jobs if self.workplace.result(job) is None]:
            if not any(self._take(job) for job in left):
                time.sleep(POLL_S)

    def _take(self, job: Job) -> bool:
        """Does the job if it is ready and free, whoever may have finished it meanwhile; whether it did."""
        if not self.workplace.is_ready(job):
            return False
        with self.workplace.claimed(job) as free:
            if not free or self.workplace.result(job) is not None:
                return False
            self.workplace.finish(job, self.do(job))
            self._clean(job)
        gc.collect()  # trainers hold themselves in cycles, with their weights
        return True

    def _clean(self, job: Job) -> None:
        """Removes what a training that is done needs no more: optimiser states, and the policies of the sweep."""
        run = self.workplace.job_folder(job) / RUN_FOLDER
        for path in run.glob("checkpoint-*"):
            shutil.rmtree(path)
        (run / CHECKPOINT_NAME).unlink(missing_ok=True)
        if job.kind is JobKind.SWEEP:
            shutil.rmtree(run / POLICY_FOLDER, ignore_errors=True)

    def do(self, job: Job) -> dict[str, Any]:
        """Does one job; returns its result."""
        does: dict[JobKind, Callable[[Job], dict[str, Any]]] = {
            JobKind.ROWS: self._render, JobKind.TIME: self._time, JobKind.SWEEP: self._train,
            JobKind.FINAL: self._train, JobKind.MEASURE: self._measure,
        }  # fmt: skip
        return does[job.kind](job)

    # -- questions -------------------------------------------------------------------------------------------------

    def training_rows(self, num_rows: int) -> list[TrainingRow]:
        """The first so many training questions, the same for every arm and seed."""
        preset = self.preset
        return split_rows(
            self.workplace.rows, TRAIN, seed=preset.data_seed, num_rows=num_rows, kinds=preset.grpo.row_kinds
        )

    def validation_rows(self) -> list[TrainingRow]:
        preset = self.preset
        return split_rows(
            self.workplace.rows, VALIDATION, seed=preset.data_seed, num_rows=preset.validation_questions,
            kinds=preset.grpo.row_kinds,
        )  # fmt: skip

    def measured_rows(self, split: str) -> list[TrainingRow]:
        """Questions of the test split, in the kinds that are trained on, or of an out-of-distribution split."""
        preset = self.preset
        return split_rows(
            self.workplace.rows, split, seed=preset.test_seed,
            num_rows=preset.test_questions if split == TEST else preset.ood_questions,
            kinds=preset.grpo.row_kinds if split == TEST else (),
        )  # fmt: skip

    def _render(self, job: Job) -> dict[str, Any]:
        begun = time.perf_counter()
        if job.split == RETENTION:
            count = self.preset.retention_pictures
            split_scenes(self.workplace.rows, TEST, seed=self.preset.test_seed, num_scenes=count)
        elif job.split in MEASURED:
            count = len(self.measured_rows(job.split))
        elif job.split == VALIDATION:
            count = len(self.validation_rows())
        else:
            count = self.num_timed_rows() if job.split == JobKind.TIME.value else self.preset.num_rows
            self.training_rows(count)
        return {ROW_S: (time.perf_counter() - begun) / count}

    def num_timed_rows(self) -> int:
        """Training questions that the timing needs."""
        return max(self.preset.timed_steps * self.preset.grpo.prompts_per_step, TIMED_QUESTIONS)

    # -- trainings -------------------------------------------------------------------------------------------------

    def _train(self, job: Job) -> dict[str, Any]:
        arm, preset = _arm(job), self.preset
        final = job.kind is JobKind.FINAL
        rate = self.workplace.best_rate(arm) if job.rate is None else job.rate
        evaluations = preset.evaluations if final else preset.sweep_evaluations
        steps = preset.arm_steps(arm, preset.steps if final else preset.sweep_steps)
        rows = self.training_rows(preset.num_rows if final else preset.sweep_steps * preset.grpo.prompts_per_step)
        folder = self.workplace.job_folder(job)
        if arm.reinforced:
            self._reinforce(folder / RUN_FOLDER, arm, rate, job.seed, steps, evaluations, rows)
            curve = validation_curve(folder / RUN_FOLDER, f"eval_rewards/{BOX_GIOU}/mean")
        else:
            steps = preset.once_steps() if job.once else steps
            self._supervise(folder / RUN_FOLDER, arm, rate, job.seed, steps, evaluations, rows)
            curve = validation_curve(folder / RUN_FOLDER, VALIDATION)
        best = max(value for step, value in curve if step > 0)
        each = preset.samples_per_step(arm)
        return {VALIDATION: best, "rate": rate, CURVE: [[step * each, value] for step, value in curve]}

    def _reinforce(
        self, out: Path, arm: Arm, rate: float, seed: int, steps: int, evaluations: int, rows: list[TrainingRow]
    ) -> Path:
        recipe = replace(
            self.preset.grpo, learning_rate=rate, seed=seed, max_steps=steps, eval_every=steps // evaluations,
            num_eval_rows=self.preset.validation_questions, warmup_steps=self._warmup(steps), keep_checkpoints=1,
        )  # fmt: skip
        run = GrpoRun(preset=recipe, out=out, policy=self.policy, rows=rows, eval_rows=self.validation_rows())
        return train_reinforced(run, arm.reply_start)

    def _supervise(
        self, out: Path, arm: Arm, rate: float, seed: int, steps: int, evaluations: int, rows: list[TrainingRow]
    ) -> Path:
        run = SupervisedRun(
            preset=self.preset.grpo, out=out, policy=self.policy, rows=rows, eval_rows=self.validation_rows(),
            reply_start=arm.reply_start, learning_rate=rate, num_steps=steps, batch=self.preset.sft_batch,
            evaluations=evaluations, warmup_steps=self._warmup(steps), seed=seed,
        )  # fmt: skip
        return SupervisedTraining(run).train()

    def _warmup(self, steps: int) -> int:
        """Steps that are as large a share of the run as the recipe's warm-up is of its own."""
        recipe = self.preset.grpo
        return round(steps * recipe.warmup_steps / max(1, recipe.max_steps))

    # -- timing ----------------------------------------------------------------------------------------------------

    def _time(self, job: Job) -> dict[str, Any]:
        """Seconds of a step, and of a question that is answered greedily."""
        arm = _arm(job)
        rows = self.training_rows(self.num_timed_rows())
        with tempfile.TemporaryDirectory() as scratch:
            step_s = (self._time_grpo if arm.reinforced else self._time_sft)(Path(scratch), arm, rows)
        asked = rows[:TIMED_QUESTIONS]
        live = LivePolicy.load(self.policy, self.preset.grpo)
        begun = time.perf_counter()
        score_rows(live, asked, reply_start=arm.reply_start)
        return {STEP_S: step_s, QUESTION_S: (time.perf_counter() - begun) / len(asked)}

    def _time_grpo(self, out: Path, arm: Arm, rows: list[TrainingRow]) -> float:
        """Median of the steps behind the first."""
        recipe = replace(self.preset.grpo, max_steps=self.preset.timed_steps, warmup_steps=0, num_eval_rows=1)
        run = GrpoRun(preset=recipe, out=out, policy=self.policy, rows=rows, eval_rows=rows[:1])
        return statistics.median(step_seconds(run, arm.reply_start)[1:])

    def _time_sft(self, out: Path, arm: Arm, rows: list[TrainingRow]) -> float:
        """Mean over the passes of a run: in the first every picture is new, later ones may remember it."""
        run = SupervisedRun(
            preset=self.preset.grpo, out=out, policy=self.policy, rows=rows[: self.preset.sft_batch],
            eval_rows=rows[:1], reply_start=arm.reply_start, learning_rate=1e-5, num_steps=self.preset.timed_steps,
            batch=self.preset.sft_batch, evaluations=1, warmup_steps=0, seed=0,
        )  # fmt: skip
        training = SupervisedTraining(run)
        seconds = []
        for _ in range(run.num_steps):
            begun = time.perf_counter()
            training.train_step()
            training.step += 1
            seconds.append(time.perf_counter() - begun)
        passes = self.preset.grpo.num_generations
        return (seconds[0] + (passes - 1) * statistics.median(seconds[1:])) / passes

    # -- measuring -------------------------------------------------------------------------------------------------

    def _measure(self, job: Job) -> dict[str, Any]:
        """Writes `<split>.jsonl` for each of `MEASURED`; splits that an earlier call has measured stay."""

        policy: str | Path = self.policy
        if job.trained:
            (trained,) = (one for one in all_jobs(self.preset) if one.name == job.trained)
            policy = self.workplace.job_folder(trained) / RUN_FOLDER / POLICY_FOLDER
        live = LivePolicy.load(policy, self.preset.grpo, memories=self._seen)
        means = {}
        for split in MEASURED:
            path = self.workplace.job_folder(job) / f"{split}.jsonl"
            if not path.is_file() and split == RETENTION:
                count = self.preset.retention_pictures
                cache = split_scenes(self.workplace.rows, TEST, seed=self.preset.test_seed, num_scenes=count)
                questions = retention_questions(cache, count, TEST)
                write_scores(path, score_retention(live, cache, questions, reply_start=job.reply_start, told=split))
            elif not path.is_file():
                rows = self.measured_rows(split)
                write_scores(path, score_rows(live, rows, reply_start=job.reply_start, told=split))
            means[split] = mean(read_scores(path))
        return means


def _arm(job: Job) -> Arm:
    if job.arm is None:
        raise ValueError(f"expected a job with an arm, got {job.name}")
    return job.arm


def validation_curve(run: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of every validation in a run's metrics."""
    return [(line["step"], line[key]) for line in read_metrics(run / METRICS_NAME) if key in line]


def main(argv: Sequence[str]) -> int:
    """Works on one phase of the experiment in a folder until all its jobs are done."""
    folder, phase, parent = Path(argv[0]), Phase(argv[1]), int(argv[2])
    end_with(parent)
    torch.set_num_threads(1)
    try:
        settings = read_settings(folder)
        Worker(Workplace(folder, settings.preset), settings.policy).work(phase.jobs(settings.preset))
    except SegZeroError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
