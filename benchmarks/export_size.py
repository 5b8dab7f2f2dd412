"""What the export of a policy of published size takes: time, peak memory and disk.

    python -m benchmarks.export_size POLICY --storage float16 int4 --scratch DIR [--keep]

POLICY is a checkpoint folder, such as `benchmarks.random_policy` writes. Each storage is exported by `segzero export`
in a process of its own, whose peak resident memory (VmHWM, mapped files included) is read while it runs; the segmenter
comes from the embedded bundle. Where an export was killed before, this one goes on from what is there (`found_bytes`),
and time and peak are those of the rest. What a kept bundle answers with: `python -m benchmarks.large_answer`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .measuring import RESULTS, resident_bytes, run_and_exit, write_result

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.2


def main() -> None:
    """Exports in every storage and writes one result file."""
    arguments = _parse()
    checkpoint_bytes = sum(path.stat().st_size for path in arguments.policy.glob("*.safetensors"))
    exports = {storage: export(arguments, storage, checkpoint_bytes) for storage in arguments.storage}
    document: dict[str, Any] = {
        "policy": arguments.policy.name,
        "checkpoint_bytes": checkpoint_bytes,
        "exports": exports,
    }
    path = write_result("export_size", document, arguments.out)
    print(json.dumps({"result": str(path), **document}))


def export(arguments: argparse.Namespace, storage: str, checkpoint_bytes: int) -> dict[str, Any]:
    """One export in a process of its own, and its figures."""
    bundle = arguments.scratch / f"{arguments.policy.name}-{storage}"
    command = [
        *(sys.executable, "-m", "segzero_rt.cli", "export", arguments.preset, "--policy", str(arguments.policy)),
        *("--base", str(ROOT / "segzero_rt" / "bundles" / "tabletop"), "--out", str(bundle), "--storage", storage),
        *("--no-trial", "--overwrite", "--json"),
    ]
    unfinished = bundle.with_name(f".{bundle.name}.export")
    found = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid).get("peak_bytes", 0))
            time.sleep(POLL_S)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        raise SystemExit(f"segzero export ended with {process.returncode}")
    report = json.loads(output.splitlines()[-1])
    figures = {
        "seconds": time.perf_counter() - started,
        "found_bytes": found,
        "peak_bytes": peak,
        "peak_share_of_checkpoint": peak / checkpoint_bytes,
        "bundle_bytes": report["num_bytes"],
        "bundle_share_of_checkpoint": report["num_bytes"] / checkpoint_bytes,
        "gate": report["gates"]["policy"],
    }
    if not arguments.keep:
        shutil.rmtree(bundle)
    return figures


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--preset", default="vision-reasoner")
    parser.add_argument("--storage", nargs="+", default=["float16", "int4"])
    parser.add_argument("--scratch", type=Path, required=True, help="where bundles are written")
    parser.add_argument("--keep", action="store_true", help="leave the bundles there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    run_and_exit(main, "export_size")
