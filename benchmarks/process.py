"""The whole process: `segzero run` against the same job as a transformers script, from start to exit.

    python -m benchmarks.process IMAGE "QUESTION" --policy HF --segmenter HF [--bundle B] [--runs 9]

Wall time, processor time and peak resident memory of each child, as the kernel counts them (`wait4`). The two take
turns; one run of each goes ahead untimed, so that both find their files in the page cache. Each side may use its own
Python, so that segzero-rt can be measured in an environment that holds nothing but `segzero-rt[cpu]`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measuring import RESULTS, check_files, paired, run_and_exit, write_result

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Run:
    """One child, from start to exit."""

    wall_ms: float
    cpu_ms: float
    peak_bytes: int
    document: dict[str, Any]
    """Last line of its standard output."""


def main() -> None:
    """Times both commands in turn and writes one result file."""
    arguments = _parse()
    check_files(arguments.image, arguments.policy / "config.json", arguments.segmenter / "config.json")
    commands = make_commands(arguments)
    warm = {name: run_once(command, cores=arguments.threads) for name, command in commands.items()}
    check_answers(warm["segzero"].document, warm["baseline"].document)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for index in range(arguments.runs):
        for name in sorted(commands, reverse=bool(index % 2)):
            runs[name].append(run_once(commands[name], cores=arguments.threads))
    ours, theirs = runs["segzero"], runs["baseline"]
    document = {
        "threads": arguments.threads,
        "wall_ms": paired([run.wall_ms for run in ours], [run.wall_ms for run in theirs]),
        "cpu_ms": paired([run.cpu_ms for run in ours], [run.cpu_ms for run in theirs]),
        "peak_bytes": paired([run.peak_bytes for run in ours], [run.peak_bytes for run in theirs]),
        "objects": len(warm["segzero"].document["objects"]),
    }
    document["memory_share"] = 1 / document["peak_bytes"]["ratio"]
    path = write_result("process", document, arguments.out)
    print(json.dumps({"result": str(path), **document}))


def make_commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Both command lines, for the same job."""
    bundle = arguments.bundle or str(ROOT / "segzero_rt" / "bundles" / "tabletop")
    job = [str(arguments.image), arguments.question, "--bundle", bundle, "--threads", str(arguments.threads)]
    checkpoints = ["--policy", str(arguments.policy), "--segmenter", str(arguments.segmenter), "--round-weights"]
    return {
        "segzero": [arguments.segzero_python, "-m", "segzero_rt.cli", "run", *job, "--json", "--backend", "cpu"],
        "baseline": [arguments.baseline_python, "-m", "benchmarks.transformers_run", *job, *checkpoints],
    }


def run_once(command: list[str], *, cores: int) -> Run:
    """Runs one child to its end, pinned to so many cores.

    Raises:
        SystemExit: the child failed; exit status 3 of `segzero run` (no usable answer) is a result like any other.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, encoding="utf-8") as account:
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(writer), str(cores), *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(writer,),
        )
        os.close(writer)
        output, errors = launcher.communicate()
        usage = json.loads(account.read())
    if usage["status"] not in (0, 3):
        raise SystemExit(f"{' '.join(command)} ended with {usage['status']}: {errors[-2000:]}")
    return Run(
        wall_ms=usage["wall_ms"],
        cpu_ms=usage["cpu_ms"],
        peak_bytes=usage["peak_bytes"],
        document=json.loads(output.splitlines()[-1]),
    )


# A child counts its parent's resident size as its own peak until it has replaced itself with its program, so a small
# process that has imported nothing starts it and waits for it.
_LAUNCHER = """
import os, sys, time
account, cores, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
os.set_inheritable(account, False)
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
start = time.perf_counter()
child = os.posix_spawnp(command[0], command, os.environ)
_, status, usage = os.wait4(child, 0)
wall_ms = (time.perf_counter() - start) * 1e3
cpu_ms = (usage.ru_utime + usage.ru_stime) * 1e3
text = '{"status": %d, "wall_ms": %f, "cpu_ms": %f, "peak_bytes": %d}'
os.write(account, (text % (os.waitstatus_to_exitcode(status), wall_ms, cpu_ms, usage.ru_maxrss * 1024)).encode())
"""


def check_answers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Both must have found the same boxes.

    Raises:
        SystemExit: they have not, so there is nothing to compare.
    """
    boxes = [[one["box_xyxy"] for one in document["objects"]] for document in (ours, theirs)]
    if boxes[0] != boxes[1]:
        raise SystemExit(f"expected the same answer from both, got boxes {boxes[0]} and {boxes[1]}; nothing was timed")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="whole process against a transformers script")
    parser.add_argument("image", type=lambda text: Path(text).resolve())
    parser.add_argument("question")
    parser.add_argument("--policy", type=lambda text: Path(text).resolve(), required=True, help="checkpoint folder")
    parser.add_argument("--segmenter", type=lambda text: Path(text).resolve(), required=True, help="checkpoint folder")
    parser.add_argument("--bundle", type=lambda text: str(Path(text).resolve()), help="default: the embedded one")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--segzero-python", default=sys.executable, help="with segzero-rt[cpu] installed")
    parser.add_argument("--baseline-python", default=sys.executable, help="with torch and transformers installed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    return parser.parse_args()


if __name__ == "__main__":
    run_and_exit(main, "process")
