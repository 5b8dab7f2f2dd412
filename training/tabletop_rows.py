"""Tabletop scenes as training rows: a folder that grows question by question, and goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, cycle, islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from segzero_rt.errors import DatasetError
from segzero_rt.mask import encode_rle

from .policy_model import INPUT_SIDE
from .question_scenes import SPLIT_QUERY_KINDS, QuestionScene, make_sample, schedule
from .questions import QUERY_KINDS
from .rows import IMAGES_NAME, ROWS_NAME, RowObject, TrainingRow, row_line
from .scene_cache import to_input_objects


def build_tabletop_rows(folder: Path, *, split: str, seed: int, num_rows: int, kinds: tuple[str, ...] = ()) -> None:
    """Write at least `num_rows` rows of a split; those that an earlier run wrote stay.

    Args:
        folder: gets `images/` with pictures in source size, and `rows.jsonl`.
        kinds: questions of these kinds in turn, each the split's next of its kind; none takes the split's own order.

    Raises:
        DatasetError: the folder holds rows of another split, seed or choice of kinds, or the split has no such kind.
    """
    (folder / IMAGES_NAME).mkdir(parents=True, exist_ok=True)
    wanted = list(islice(_indices(split, kinds), num_rows))
    done = _complete_rows(folder / ROWS_NAME)
    for row_id, index in zip(done, wanted, strict=False):
        if row_id != _row_id(split, seed, index):
            raise DatasetError(
                f"expected {folder} to hold {_row_id(split, seed, index)}, found {row_id!r:.60}; choose another folder"
            )
    with (folder / ROWS_NAME).open("a", encoding="utf-8") as file:
        for index in tqdm(wanted[len(done) :], desc=f"rows ({split})", unit="row", mininterval=5):
            name = f"{IMAGES_NAME}/{_row_id(split, seed, index)}.png"
            sample = make_sample(split, seed, index)
            Image.fromarray(sample.scene.image_rgb).save(folder / name)
            row = _row(sample, _row_id(split, seed, index), folder / name)
            file.write(row_line(row, name) + "\n")  # behind its picture: a line stands for a row that is whole
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


def _row_id(split: str, seed: int, index: int) -> str:
    return f"{split}-{seed}-{index:06d}"


def _row(sample: QuestionScene, row_id: str, image: Path) -> TrainingRow:
    things = to_input_objects(sample.scene, INPUT_SIDE)
    objects = tuple(
        RowObject(
            box_xyxy=things[target].box_xyxy,
            points_xy=things[target].points_xy,
            mask_rle=encode_rle(sample.scene.objects[target].mask),
        )
        for target in sample.question.targets
    )
    extra = {"thinking": sample.question.thinking, "detail": sample.question.detail, "distractor": sample.distractor}
    return TrainingRow(
        row_id=row_id, question=sample.question.text, image=image, input_size_hw=(INPUT_SIDE, INPUT_SIDE),
        objects=objects, kind=sample.question.kind, extra=extra,
    )  # fmt: skip


def _complete_rows(path: Path) -> list[str]:
    """Ids of the rows that are whole; a line that was being written when the run was stopped is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("rb+") as file:
            file.truncate(whole)
    return [json.loads(line)["row_id"] for line in text[:whole].splitlines()]
