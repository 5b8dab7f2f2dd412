"""The commands of export/README.md for each device, run as they stand there but for the paths: time and peak memory.

    python -m benchmarks.device_bundles rtx --policy Seg-Zero-7B --segmenter sam2.1_hiera_large.pt --scratch DIR --build

Checkpoints may have random weights (`benchmarks.random_policy`; SAM 2's own package writes the other): what an export
and a build cost does not depend on them. Peaks are of resident memory: `peak_bytes` with mapped files (VmHWM),
`own_bytes` without (RssAnon). Engines are built by TensorRT-RTX for one compute capability, which needs no device.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segzero_rt.bundle import Bundle

from .measuring import RESIDENT, RESULTS, resident_bytes, run_and_exit, write_result

PAGE = Path(__file__).resolve().parent.parent / "export/README.md"
POLL_S = 0.1
_ROW = re.compile(r"^\| [^|]+ \| `(segzero export [^`]+ --out bundles/(\w+))` \|$", re.MULTILINE)


def documented_commands(page: str) -> dict[str, list[str]]:
    """The page's export command for each device, by the name of the bundle that it writes."""
    return {name: shlex.split(command) for command, name in _ROW.findall(page)}


def with_paths(command: Sequence[str], **paths: Path) -> list[str]:
    """The command with other values behind the options of these names.

    Raises:
        ValueError: it has no such option.
    """
    changed = list(command)
    for option, path in paths.items():
        changed[changed.index(f"--{option}") + 1] = str(path)
    return changed


def run(command: Sequence[str]) -> dict[str, Any]:
    """Runs a `segzero` command in this environment, its progress passed on.

    Raises:
        CalledProcessError: it fails.
    """
    started = time.perf_counter()
    peaks = dict.fromkeys(RESIDENT, 0)
    with subprocess.Popen([sys.executable, "-m", "segzero_rt.cli", *command[1:]], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for name, num_bytes in resident_bytes(process.pid).items():
                peaks[name] = max(peaks[name], num_bytes)
            time.sleep(POLL_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return {"command": shlex.join(command), "seconds": round(time.perf_counter() - started, 1), **peaks}


def measure(device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Exports, and builds where that is asked for."""
    command = documented_commands(PAGE.read_text(encoding="utf-8"))[device]
    bundle = arguments.scratch / device
    paths = {"policy": arguments.policy, "segmenter": arguments.segmenter, "out": bundle}
    export = run([*with_paths(command, **paths), *(["--overwrite"] if bundle.exists() else [])])
    manifest = Bundle.open(bundle, verify="size").manifest
    export |= {"bundle_bytes": _size(bundle), "gates": manifest.gates}
    document: dict[str, Any] = {"device": device, "checkpoint_bytes": _size(arguments.policy), "export": export}
    document["segmenter_bytes"] = _size(arguments.segmenter)
    if arguments.build:
        options = ["--compute-capability", arguments.compute_capability, "--one-profile"]
        build = run(["segzero", "build", str(bundle), "--target", "tensorrt-rtx", *options])
        engines = Bundle.open(bundle, verify="size").manifest.engines
        seconds = {engine.graph: round(engine.build_seconds, 1) for engine in engines}
        document["build"] = build | {"engine_bytes": _size(bundle / "engines"), "seconds_by_graph": seconds}
    if not arguments.keep:
        shutil.rmtree(bundle)
    return document


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def main(given: Sequence[str] | None = None) -> None:
    """Measures one device's commands and writes one result file."""
    devices = documented_commands(PAGE.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=devices)
    parser.add_argument("--policy", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--segmenter", type=Path, required=True, help="checkpoint of SAM 2, .pt or folder")
    parser.add_argument("--scratch", type=Path, required=True, help="where the bundle is written")
    parser.add_argument("--build", action="store_true", help="TensorRT-RTX engines, too, with --one-profile")
    parser.add_argument("--compute-capability", default="8.9", metavar="CC")
    parser.add_argument("--keep", action="store_true", help="leave the bundle there")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args(given)
    document = measure(arguments.device, arguments)
    path = write_result("device_bundles", document, arguments.out, variant=arguments.device)
    print(path, file=sys.stderr)
    print(json.dumps(document))


if __name__ == "__main__":
    run_and_exit(main, "device_bundles")
