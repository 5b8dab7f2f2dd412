"""Runs an experiment: times, tells the cost, sweeps, trains, measures, reports; goes on where it was stopped."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from segzero_rt.errors import SegZeroError

from . import cost
from .jobs import VALIDATION, Job, JobKind, Phase, Workplace
from .settings import Settings, claim_folder

POLL_S = 0.5
LOGS_NAME, COST_NAME, LOCK_NAME = "logs", "cost.json", "lock"
_LOG_TAIL = 2000
_STOP_S = 10.0


def run_experiment(
    folder: Path, settings: Settings, *, num_workers: int, max_hours: float, only_estimate: bool = False
) -> dict[str, Any] | None:
    """Does what is not done yet; returns the report's document, or None where only the cost was asked for.

    Args:
        folder: of the experiment; gets everything.
        num_workers: processes of one thread each.
        max_hours: an estimate above this stops before anything long begins.

    Raises:
        SegZeroError: the folder holds another experiment or one that runs, the estimate is too long, or a job failed.
    """
    with _alone(folder):
        claim_folder(folder, settings)
        workplace = Workplace(folder, settings.preset)
        _do(workplace, Phase.TIMING, num_workers, weights={})
        timings = cost.read_timings(workplace)
        jobs = Phase.LONG.jobs(settings.preset)
        whole = cost.estimate(jobs, settings.preset, timings, num_workers)
        _write(folder / COST_NAME, json.dumps(whole, indent=1))
        print(cost.render(whole), file=sys.stderr)
        left = [job for job in jobs if workplace.result(job) is None]
        hours = cost.estimate(left, settings.preset, timings, num_workers)["hours"]
        if len(left) < len(jobs):
            print(f"  {'left to do':<20} {hours:6.2f} h", file=sys.stderr)
        if hours > max_hours:
            raise SegZeroError(
                f"expected an experiment of at most {max_hours:g} hours, {hours:.1f} are estimated; allow more with "
                f"--max-hours, or take fewer --steps or --seeds in another --out"
            )
        if only_estimate:
            return None
        _do(
            workplace, Phase.LONG, num_workers,
            weights={job.name: cost.job_seconds(job, settings.preset, timings) for job in jobs},
        )  # fmt: skip
        return _report(workplace, settings, whole)


def report_experiment(folder: Path, settings: Settings) -> dict[str, Any]:
    """The report's document of what is measured so far; others may be at work in the folder.

    Raises:
        SegZeroError: the folder holds another experiment, or too little is measured yet for the claims.
    """
    if not (folder / COST_NAME).is_file():
        raise SegZeroError(f"expected an experiment that has begun in {folder}; call it without --report first")
    claim_folder(folder, settings)
    told: dict[str, Any] = json.loads((folder / COST_NAME).read_text(encoding="utf-8"))
    return _report(Workplace(folder, settings.preset), settings, told)


def _report(workplace: Workplace, settings: Settings, told: dict[str, Any]) -> dict[str, Any]:
    from .report import write_report

    return write_report(workplace, settings, told)


def _do(workplace: Workplace, phase: Phase, num_workers: int, *, weights: dict[str, float]) -> None:
    """Starts workers for a phase and waits until its jobs are done.

    Args:
        weights: estimated seconds of each job, for the progress bar.
    """
    jobs = phase.jobs(workplace.preset)
    left = [job for job in jobs if workplace.result(job) is None]
    if not left:
        return
    total = sum(weights.get(job.name, 1.0) for job in jobs)
    done = total - sum(weights.get(job.name, 1.0) for job in left)
    bar = tqdm(total=round(total), initial=round(done), desc=phase.value, unit="s" if weights else "job", smoothing=0)
    logs = [workplace.folder / LOGS_NAME / f"{phase.value}-{number}.log" for number in range(num_workers)]
    with bar, _workers(workplace, phase, logs) as workers:
        while left:
            for job in [one for one in left if workplace.result(one) is not None]:
                left.remove(job)
                done += weights.get(job.name, 1.0)
                bar.update(round(done) - bar.n)
                tqdm.write(_told(workplace, job, len(jobs) - len(left), len(jobs)), file=sys.stderr)
            _check_alive(workers, logs)
            time.sleep(POLL_S)
        for worker in workers:
            worker.wait()


@contextmanager
def _workers(workplace: Workplace, phase: Phase, logs: Sequence[Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that work on a phase; they are stopped when the context is left, and stop by themselves with us."""
    workers = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    program = f"{__package__}.work"
    for log in logs:
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", program, str(workplace.folder), phase.value, str(os.getpid())]
        with log.open("ab") as file:
            workers.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
            )
    try:
        yield workers
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(_STOP_S)
            worker.kill()


def end_with(parent: int) -> None:
    """Ends this process when its parent does: a killed experiment leaves nobody behind who goes on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_alive(workers: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    """Raises `SegZeroError` with the end of its log where a worker failed."""
    for worker, log in zip(workers, logs, strict=True):
        if worker.poll():
            tail = log.read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace").strip().splitlines()
            last = tail[-1] if tail else "nothing was printed"
            raise SegZeroError(
                f"expected every job to succeed, a worker ended with status {worker.returncode}: {last}; see {log}, "
                f"mend it and call the experiment again: it goes on"
            )


def _told(workplace: Workplace, job: Job, number: int, count: int) -> str:
    result = workplace.result(job) or {}
    value = f": {VALIDATION} {result[VALIDATION]:.3f}" if VALIDATION in result else ""
    if job.kind is JobKind.MEASURE:
        value = ": " + ", ".join(f"{split} {mean:.3f}" for split, mean in result.items())
    return f"{number}/{count} {job.name}{value}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SegZeroError(f"expected {folder} to itself, another call is at work in it; wait for it") from error
        yield


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
