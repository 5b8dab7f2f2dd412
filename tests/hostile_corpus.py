"""The labelled hostile replies of `hostile_answers.jsonl`: one case a line, with its name, format, status and boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CORPUS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "hostile_answers.jsonl").read_text("ascii").splitlines()
]


def text_of(case: dict[str, Any]) -> str:
    """A case's text; long ones are stored as parts, some of them `[part, times]`."""
    text = case["text"]
    return text if isinstance(text, str) else "".join(p if isinstance(p, str) else p[0] * p[1] for p in text)
