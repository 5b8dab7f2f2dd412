"""One question to a bundle of published size, as a process: time per stage and peak memory.

    python -m benchmarks.large_answer BUNDLE [--picture P] [--question Q] [--max-new-tokens 32]

A bundle of random weights (`benchmarks.random_policy`) says nothing and never ends by itself: its reply is cut at the
budget, which is part of the result, and what a stage takes does not depend on what is said.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from segzero_rt.bundle import Bundle

from .measuring import RESULTS, run_and_exit, write_result
from .process import ROOT, run_once


def main() -> None:
    """Runs the command once and writes one result file."""
    arguments = _parse()
    command = [
        *(sys.executable, "-m", "segzero_rt.cli", "run", str(arguments.picture), arguments.question),
        *("--bundle", str(arguments.bundle), "--max-new-tokens", str(arguments.max_new_tokens), "--json"),
    ]
    run = run_once(command, cores=arguments.cores)
    policy = Bundle.open(arguments.bundle, verify="size").manifest.policy
    document = {
        "bundle": arguments.bundle.name,
        "input_size_hw": list(policy.input_size_hw),
        "max_new_tokens": arguments.max_new_tokens,
        "cores": arguments.cores,
        "status": run.document["status"],
        "wall_ms": run.wall_ms,
        "cpu_ms": run.cpu_ms,
        "peak_bytes": run.peak_bytes,
        "timings_ms": run.document["timings_ms"],
    }
    path = write_result("large_answer", document, arguments.out)
    print(json.dumps({"result": str(path), **document}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "tabletop.png")
    parser.add_argument("--question", default="the green scissors")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    run_and_exit(main, "large_answer")
