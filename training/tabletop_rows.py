"""Tabletop scenes as training rows: a folder that grows question by question, and goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, cycle, islice
from pathlib import Path

from tqdm import tqdm

from segzero_rt.errors import DatasetError

from .policy_model import INPUT_SIDE
from .question_scenes import SPLIT_QUERY_KINDS, schedule
from .questions import QUERY_KINDS
from .row_rendering import RowRenderer, row_id_of
from .rows import IMAGES_NAME, ROW_ID, ROWS_NAME
from .worker_processes import in_order


def build_tabletop_rows(
    folder: Path, *, split: str, seed: int, num_rows: int, kinds: tuple[str, ...] = (), processes: int = 1
) -> None:
    """Write at least `num_rows` rows of a split; those that an earlier run wrote stay.

    Args:
        folder: gets `images/` with pictures in source size, and `rows.jsonl`.
        kinds: questions of these kinds in turn, each the split's next of its kind; none takes the split's own order.
        processes: that render side by side (`worker_processes.in_order`); they change nothing in what is written.

    Raises:
        DatasetError: the folder holds rows of another split, seed or choice of kinds, or a line that is no row, or the
            split has no such kind.
        SegZeroError: a process was killed.
    """
    (folder / IMAGES_NAME).mkdir(parents=True, exist_ok=True)
    wanted = list(islice(_indices(split, kinds), num_rows))
    done = _complete_rows(folder / ROWS_NAME)
    for number, (row_id, index) in enumerate(zip(done, wanted, strict=False), start=1):
        if row_id != (belongs := row_id_of(split, seed, index)):
            raise DatasetError(
                f"expected {folder} to hold questions of split {split} and seed {seed}{_in_turn(kinds)}, its row "
                f"{number} is {row_id!r:.60} instead of {belongs!r}: an earlier run rendered other ones there; ask for "
                "the same seed and preset as that run, or choose another folder"
            )
    left = wanted[len(done) :]
    render = RowRenderer(folder=folder, split=split, seed=seed, input_side=INPUT_SIDE)
    with (folder / ROWS_NAME).open("a", encoding="utf-8") as file:
        lines = in_order(render, left, processes=processes)
        for line in tqdm(lines, total=len(left), desc=f"rows ({split})", unit="row", mininterval=5):
            file.write(line + "\n")  # behind its picture: a line stands for a row that is whole
            file.flush()


def _indices(split: str, kinds: tuple[str, ...] | None) -> Iterator[int]:
    if not kinds:
        return count()
    if missing := set(kinds) - set(SPLIT_QUERY_KINDS.get(split, QUERY_KINDS)):
        raise DatasetError(f"expected kinds of question that the split {split} has, got {', '.join(sorted(missing))}")

    def of_kind(kind: str) -> Iterator[int]:
        return (index for index in count() if schedule(split, index)[0] == kind)

    turns = {kind: of_kind(kind) for kind in kinds}
    return (next(turns[kind]) for kind in cycle(kinds))


def _in_turn(kinds: tuple[str, ...]) -> str:
    return f" by kind ({', '.join(kinds)})" if kinds else ""


def _complete_rows(path: Path) -> list[str]:
    """Ids of the rows that are whole; a line that was being written when the run was stopped is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("rb+") as file:
            file.truncate(whole)
    return [_row_id(line, f"{path}:{number}") for number, line in enumerate(text[:whole].splitlines(), start=1)]


def _row_id(line: bytes, source: str) -> str:
    try:
        return str(json.loads(line)[ROW_ID])
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{source}: expected a rendered row, got {error!r:.80}; remove that folder") from error
