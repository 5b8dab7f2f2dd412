"""The options of `segzero train experiment`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from segzero_rt.commands.options import positive_integer
from segzero_rt.errors import SegZeroError

NAME = "experiment"
HELP = "GRPO against supervised fine-tuning, with and without reasoning"
DESCRIPTION = """Compare four ways to train one base policy, with the same questions and the same number of samples:
supervised on boxes, supervised with a templated reasoning, GRPO with reasoning, GRPO without. Each gets as many
learning rates on validation, then several seeds; all are measured on the test split, on every split that holds
something out, and on what the base policy could answer.

A few steps of each are timed first and the cost is told; an experiment above --max-hours does not begin. Killed at
any time and called again with the same --out, it goes on.

writes: DIR/experiment.json  the settings
        DIR/cost.json        the estimate
        DIR/rows/            questions, rendered once for all
        DIR/jobs/            trainings, policies and every question's score
        DIR/logs/            what the workers say
        DIR/report.md, report.json, curves.svg, rates.svg

presets: tabletop  the shipped pair's base policy and GRPO's preset of the same name
         debug     a minute: every code path, nothing learnt"""
EPILOG = """examples:
  segzero train experiment --out runs/experiment --estimate
  segzero train experiment --out runs/experiment
  segzero train experiment --out runs/experiment --report
  segzero train experiment --preset debug --out /tmp/debug"""
DEFAULT_HOURS = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--preset", default="tabletop", metavar="P", help="see above (default: tabletop)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / NAME, metavar="DIR", help=f"the experiment (default: runs/{NAME})"
    )
    parser.add_argument("--policy", default="", metavar="DIR", help="base policy, a folder or hub name")
    parser.add_argument(
        "--workers", type=positive_integer, metavar="N", help="processes of one thread (default: cores)"
    )
    parser.add_argument(
        "--max-hours", type=_hours, default=DEFAULT_HOURS, metavar="H", help="longest estimate (default: 10)"
    )
    parser.add_argument("--estimate", action="store_true", help="tell the cost and stop")
    parser.add_argument("--report", action="store_true", help="write the report of what is measured so far and stop")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    changes = parser.add_argument_group("changes to the preset")
    changes.add_argument("--steps", type=positive_integer, metavar="N", help="GRPO's optimiser steps of a final run")
    changes.add_argument("--sweep-steps", type=positive_integer, metavar="N", help="of each run of the sweep")
    changes.add_argument("--seeds", type=positive_integer, metavar="N", help="trainings of each arm at its best rate")


def execute(arguments: argparse.Namespace) -> int:
    """Runs the experiment.

    Raises:
        SegZeroError: settings that do not fit, too long an estimate, or a job that failed.
    """
    from .experiment import report_experiment, run_experiment
    from .settings import Settings

    if arguments.out.exists() and not arguments.out.is_dir():
        raise SegZeroError(f"expected --out to be a folder, {arguments.out} is a file; choose another")
    changes: dict[str, Any] = {"steps": arguments.steps, "sweep_steps": arguments.sweep_steps}
    changes["seeds"] = None if arguments.seeds is None else list(range(1, arguments.seeds + 1))
    settings = Settings(
        name=arguments.preset,
        changes={name: value for name, value in changes.items() if value is not None},
        policy=arguments.policy,
    )
    document = (
        report_experiment(arguments.out, settings)
        if arguments.report
        else run_experiment(
            arguments.out, settings, num_workers=arguments.workers or len(os.sched_getaffinity(0)),
            max_hours=arguments.max_hours, only_estimate=arguments.estimate,
        )
    )  # fmt: skip
    if document is None:
        told: dict[str, Any] = json.loads((arguments.out / "cost.json").read_text(encoding="utf-8"))
        if arguments.json:
            print(json.dumps(told))
        return 0
    for claim in document["claims"]:
        print(f"{claim['verdict']}: {claim['text']} ({claim['mean']:+.3f})", file=sys.stderr)
    print(json.dumps(document) if arguments.json else f"report: {arguments.out / 'report.md'}")
    return 0


def _hours(text: str) -> float:
    """An argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected hours above 0, got {text[:40]!r}")
    return value
