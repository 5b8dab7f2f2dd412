"""`segzero bench` on one and two cores, as a dated result: stages beside the machine's ceiling, every scenario.

    python -m benchmarks.stages [--bundle B] [--images scenes] [--questions 32] [--threads 1 2]

Each number of cores is a process of its own that is pinned to so many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .measuring import RESULTS, pin_to_cores, run_and_exit, write_result


def main() -> None:
    """Runs every number of cores and writes one result file."""
    parser = argparse.ArgumentParser(description="segzero bench, pinned, as a result file")
    parser.add_argument("--bundle", help="default: the embedded one")
    parser.add_argument("--images", help="pictures, or a dataset folder with its questions (default: drawn)")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variant", default="", help="put behind the file's name, so that several can be kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    arguments = parser.parse_args()
    options = ["--questions", str(arguments.questions), "--json"]
    options += ["--bundle", arguments.bundle] if arguments.bundle else []
    options += ["--images", arguments.images] if arguments.images else []
    by_threads = {str(threads): bench(options, threads) for threads in arguments.threads}
    path = write_result("stages", {"by_threads": by_threads}, arguments.out, variant=arguments.variant)
    print(json.dumps({"result": str(path), "by_threads": by_threads}))


def bench(options: list[str], threads: int) -> dict[str, Any]:
    """The document of `segzero bench`, pinned to so many cores."""
    child = subprocess.run(
        [sys.executable, "-m", "segzero_rt.cli", "bench", *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: pin_to_cores(threads),
    )
    document: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    document["environment"].pop("packages")  # once in the result is enough
    return document


if __name__ == "__main__":
    run_and_exit(main, "stages")
