"""Runs stages step by step within the time of one call; what was finished before is not run again.

Every step is a process of its own, so that a crash, a full memory or a hanging compiler costs that step and no other.
Its outcome is written as soon as it is known, into the state folder and into the stage's result file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segzero_rt.commands.output_files import write_text

from .machine import library_folders
from .stages import Context, Stage, Step

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, SKIPPED, TIMEOUT = "done", "failed", "skipped", "out of time"
LEFT = "left for another call"
SKIP_STATUS = 3
"""Exit status of a step that this machine cannot have."""
_SPARE_S = 15.0
"""What a call keeps for writing results."""
_SAID_CHARACTERS = 600

Write = Callable[[Stage, dict[str, Any]], None]
Tell = Callable[[str], None]


@dataclass(kw_only=True)
class Budget:
    """The time of one call, from now on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left_s(self) -> float:
        """What is left for steps."""
        return self.seconds - (self.clock() - self.start) - _SPARE_S

    def has_room(self, step: Step, context: Context) -> bool:
        """Whether a step may begin; a tiny one always may while there is time."""
        return self.left_s > (0 if context.tiny else 60 * step.minutes)


def run_stages(
    stages: Sequence[Stage],
    context: Context,
    budget: Budget,
    *,
    write: Write,
    tell: Tell,
    again: bool = False,
) -> dict[str, dict[str, Any]]:
    """Runs what is not finished; returns the outcome of every step by stage and step.

    Args:
        write: called with a stage and its outcomes after each of its steps.
        again: run finished steps, too.
    """
    outcomes: dict[str, dict[str, Any]] = {}
    for stage in stages:
        found = {} if again else read_state(context, stage)
        steps = outcomes[stage.name] = {name: one for name, one in found.items() if one["status"] == DONE}
        for step in stage.steps:
            if step.name in steps:
                tell(f"{stage.name}: {step.name}: {steps[step.name]['status']} before")
                continue
            if not budget.has_room(step, context):
                steps[step.name] = {"status": LEFT}
                tell(f"{stage.name}: {step.name}: {LEFT}, {budget.left_s / 60:.1f} minutes are too few")
                continue
            tell(f"{stage.name}: {step.name} (about {step.minutes} minutes) ...")
            steps[step.name] = run_step(stage, step, context, limit_s=budget.left_s)
            tell(f"{stage.name}: {step.name}: {steps[step.name]['status']} {steps[step.name].get('said', '')}".rstrip())
            _write_state(context, stage, steps)
            write(stage, steps)
    return outcomes


def run_step(stage: Stage, step: Step, context: Context, *, limit_s: float) -> dict[str, Any]:
    """One step in a process of its own: status, seconds, figures or what it said."""
    command = [
        *(sys.executable, "-m", "benchmarks.gpu.step", stage.name, step.name),
        *("--device", context.device, "--size", context.size, "--work", str(context.work)),
    ]
    log = context.work / "logs" / f"{stage.name}-{step.name.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=step_environment(context),
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_s)
        except BaseException as error:
            end_with_children(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"status": TIMEOUT, "seconds": round(time.monotonic() - start, 1), "said": _last_words(log)}
    outcome: dict[str, Any] = {"status": DONE, "seconds": round(time.monotonic() - start, 1)}
    if process.returncode == 0:
        return {**outcome, "figures": json.loads(output.decode("utf-8").splitlines()[-1])}
    status = SKIPPED if process.returncode == SKIP_STATUS else FAILED
    return {**outcome, "status": status, "exit_status": process.returncode, "said": _last_words(log)}


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and all that it started: compilers and tests go on by themselves otherwise."""
    import signal

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def step_environment(context: Context) -> dict[str, str]:
    """Carried packages before those of the machine, and the libraries of CUDA that came with Python packages."""
    environment = dict(os.environ)
    for name, folders in (("PYTHONPATH", [context.site, ROOT]), ("LD_LIBRARY_PATH", library_folders())):
        found = [str(folder) for folder in folders if folder.is_dir()]
        environment[name] = os.pathsep.join([*found, *filter(None, [os.environ.get(name)])])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["SEGZERO_CACHE"] = str(context.work / "cache")
    return environment


def read_state(context: Context, stage: Stage) -> dict[str, Any]:
    """Outcomes of earlier calls with the same device and size; none where the file is of another kind."""
    path = _state_path(context, stage)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    names = {step.name for step in stage.steps}
    return {name: one for name, one in found.items() if name in names and isinstance(one, dict) and "status" in one}


def _write_state(context: Context, stage: Stage, outcomes: dict[str, Any]) -> None:
    path = _state_path(context, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(outcomes))


def _state_path(context: Context, stage: Stage) -> Path:
    return context.work / "state" / f"{stage.name}_{context.device}_{context.size}.json"


def _last_words(log: Path) -> str:
    """The end of what a step said, on one line."""
    return " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-_SAID_CHARACTERS:]
