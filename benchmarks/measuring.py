"""What every measurement here shares: equal cores, paired statistics, dated result files with an environment card."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from segzero_rt.commands.output_files import write_text
from segzero_rt.environment import environment_card
from segzero_rt.errors import SegZeroError
from segzero_rt.graph import default_threads

RESULTS = Path(__file__).parent / "results"
RESIDENT = {"peak_bytes": "VmHWM", "own_bytes": "RssAnon"}
"""The most so far, mapped files included; and what is there now without them. By the kernel's names."""
PACKAGES = (
    *("segzero-rt", "numpy", "onnxruntime", "opencv-python-headless", "pillow", "tokenizers"),
    *("torch", "transformers", "safetensors", "trl", "accelerate"),
)


def run_and_exit(main: Callable[[], int | None], name: str) -> NoReturn:
    """Ends the process with the status that `main` gives, or with 2 and one line where its input is refused.

    Args:
        name: what the line begins with.
    """
    try:
        sys.exit(main())
    except (SegZeroError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
    except subprocess.CalledProcessError:
        pass  # a child has said it already
    sys.exit(2)


def check_files(*paths: Path) -> None:
    """Refuses what would fail in a child, minutes later.

    Raises:
        FileNotFoundError: one of the files is not there.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a file, found none; check the path")


def resident_bytes(pid: int) -> dict[str, int]:
    """Memory of a process, by the names of `RESIDENT`; nothing once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE))
    return {name: int(kib[field]) * 1024 for name, field in RESIDENT.items() if field in kib}


def pin_to_cores(count: int) -> None:
    """Restricts this process and its children to `count` cores, so that no side gains by a helper thread.

    Raises:
        ValueError: the machine has fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise ValueError(f"expected at least {count} cores, this process has {len(cores)}")
    os.sched_setaffinity(0, cores[:count])


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Medians of two paired series, the ratio of medians theirs / ours, and its 95 % bootstrap interval over pairs.

    Raises:
        ValueError: the series differ in length or are empty.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"expected two series of one length, got {len(ours)} and {len(theirs)}")
    rng = random.Random(0)
    pairs = list(zip(ours, theirs, strict=True))
    ratios = []
    for _ in range(2000):
        drawn = rng.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(b for _, b in drawn) / statistics.median(a for a, _ in drawn))
    ratios.sort()
    return {
        "segzero_median": statistics.median(ours),
        "baseline_median": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "ratio_interval_95": [ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios))]],
        "num_pairs": len(pairs),
    }


def write_result(what: str, document: dict[str, Any], folder: Path = RESULTS, *, variant: str = "") -> Path:
    """Writes `<what>_<cores>cores_<date>.json` with an environment card; a second run on one day replaces the first.

    With a `variant` that stands behind `what`, so that several can be kept.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    command = shlex.join(["python", "-m", f"benchmarks.{what}", *(shown_argument(part) for part in sys.argv[1:])])
    whole = {
        "what": what,
        "date": now.isoformat(timespec="seconds"),
        "command": command,
        "commit": checkout_commit(),
        "environment": environment_card(PACKAGES),
        **document,
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{what}_{variant}" if variant else what
    path = folder / f"{name}_{default_threads()}cores_{now:%Y%m%d}.json"
    write_text(path, json.dumps(whole, indent=2, allow_nan=False) + "\n")
    return path


def shown_argument(part: str) -> str:
    """Paths outside the repository by their last name: where somebody keeps a checkpoint says nothing to a reader."""
    name, equals, value = part.rpartition("=")  # as in --bundle int8=/somewhere/int8
    return f"{name}{equals}{Path(value).name}" if value.startswith("/") else part


def checkout_commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
