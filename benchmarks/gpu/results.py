"""Result files of the GPU check: `<what>_<gpu>_<date>.json`, with an environment card."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import checkout_commit, shown_argument
from segzero_rt.commands.output_files import write_text

from .machine import file_word
from .stages import Stage


def result_path(stage: Stage, device: str, folder: Path, now: datetime.datetime) -> Path:
    """Where a stage's result goes."""
    return folder / f"gpu_{stage.name.replace('-', '_')}_{file_word(device)}_{now:%Y%m%d}.json"


def write_result(
    stage: Stage, outcomes: dict[str, Any], card: dict[str, Any], folder: Path, size: str, commit: str | None = None
) -> Path:
    """Writes what is known of a stage; later steps of the same day replace it with more.

    Args:
        commit: of the files here, where they came without their history.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    document = {
        "what": f"gpu_{stage.name}",
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "benchmarks.gpu_check", *(shown_argument(part) for part in sys.argv[1:])]),
        "commit": checkout_commit() or commit,
        "size": size,
        "environment": card,
        "steps": outcomes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(stage, card["device"], folder, now)
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
    return path
