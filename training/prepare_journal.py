"""The journal of a preparation that may be stopped at any time: what is done, and with which settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segzero_rt.errors import DatasetError

from .rows import OBJECTS, ROW_ID


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What came of it."""

    num_pictures: int
    num_rows: int
    num_without_object: int
    left_out: Mapping[str, int]
    """How many questions were left out, by reason."""

    def to_json(self) -> dict[str, Any]:
        return {
            "num_pictures": self.num_pictures,
            "num_rows": self.num_rows,
            "num_without_object": self.num_without_object,
            "left_out": dict(self.left_out),
        }


class Journal:
    """One line a picture that is done, with its rows. A line that was being written when a run was stopped goes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_bytes() if path.exists() else b""
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with path.open("rb+") as file:
                file.truncate(whole)
        entries = [json.loads(line) for line in text[:whole].split(b"\n") if line]
        self._entries: dict[str, dict[str, Any]] = {entry["key"]: entry for entry in entries}

    def add(self, key: str, rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, int]) -> None:
        entry = {"key": key, "rows": list(rows), "left_out": dict(left_out)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        self._entries[key] = entry

    @property
    def done(self) -> Set[str]:
        """Keys of the pictures that are done."""
        return self._entries.keys()

    def result(self, keys: Sequence[str]) -> tuple[Prepared, list[str]]:
        """The sums over these pictures, and their rows as lines. An id that a data set gives twice gets a number."""
        lines, seen = [], Counter[str]()
        left_out = Counter[str]()
        num_pictures = num_without_object = 0
        for entry in (self._entries[key] for key in keys):
            left_out.update(entry["left_out"])
            num_pictures += bool(entry["rows"])
            for row in entry["rows"]:
                given = row[ROW_ID]
                seen[given] += 1
                row_id = given if seen[given] == 1 else f"{given}#{seen[given]}"
                lines.append(json.dumps({**row, ROW_ID: row_id}, ensure_ascii=False, allow_nan=False))
                num_without_object += not row[OBJECTS]
        prepared = Prepared(
            num_pictures=num_pictures,
            num_rows=len(lines),
            num_without_object=num_without_object,
            left_out=dict(left_out),
        )
        return prepared, lines


def check_settings(path: Path, settings: Mapping[str, Any], partial: Path) -> None:
    """Keeps what this run is, or compares it with the stopped one's.

    Raises:
        DatasetError: the folder `partial` is of another run.
    """
    if not path.exists():
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(settings, indent=1))
        temporary.replace(path)
        return
    earlier = json.loads(path.read_text())
    if changed := [name for name in settings if earlier.get(name) != settings[name]]:
        name = changed[0]
        raise DatasetError(
            f"{partial} is of a stopped run with {name} {earlier.get(name)!r:.80}, this one has "
            f"{settings[name]!r:.80}; ask for the same again to go on, or remove that folder"
        )
