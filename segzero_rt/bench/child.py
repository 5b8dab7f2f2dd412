"""Measurements that want a process of their own: one that has loaded nothing yet, or whose memory must not count here.

A child is `python -m <module>`, gets its settings as JSON on standard input, and prints one JSON document. It inherits
the cores of its parent, and the interpreter's options stay the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from segzero_rt.errors import SegZeroError

_PROBLEM = "problem"


def run_child(module: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a module that ends in `serve` and returns its document; `{"problem": …}` where it failed."""
    child = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(settings), capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip() or "no message").splitlines()[-1]
        return {_PROBLEM: f"its process ended with status {child.returncode}: {last[:200]}"}
    document: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return document


def serve(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: settings in, document out. What the library refuses is a problem that is told."""
    settings = json.load(sys.stdin)
    try:
        document = measure(settings)
    except SegZeroError as error:
        document = {_PROBLEM: str(error)}
    print(json.dumps(document, allow_nan=False))
