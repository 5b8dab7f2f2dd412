"""One tabletop question, rendered: its picture as a file, itself as a line of `rows.jsonl`.

Without PyTorch, since every process that renders imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from segzero_rt.mask import encode_rle

from .question_scenes import QuestionScene, make_sample
from .rows import IMAGES_NAME, RowObject, TrainingRow, row_line
from .scene_cache import to_input_objects

_PNG_EFFORT = 1
"""zlib's level. The default takes as long as drawing the picture and makes it 6 % smaller, grain does not shrink."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRenderer:
    """Draws question after question of one split into one folder."""

    folder: Path
    """With `images/`."""
    split: str
    seed: int
    input_side: int
    """Side of the picture that the policy will see; boxes and points are its pixels."""

    def __call__(self, index: int) -> str:
        """Writes the picture of question `index` and returns the row's line, without its line feed."""
        row_id = row_id_of(self.split, self.seed, index)
        name = f"{IMAGES_NAME}/{row_id}.png"
        sample = make_sample(self.split, self.seed, index)
        Image.fromarray(sample.scene.image_rgb).save(self.folder / name, compress_level=_PNG_EFFORT)
        return row_line(self._row(sample, row_id, self.folder / name), name)

    def _row(self, sample: QuestionScene, row_id: str, image: Path) -> TrainingRow:
        question = sample.question
        things = to_input_objects(sample.scene, self.input_side)
        objects = tuple(
            RowObject(
                box_xyxy=things[target].box_xyxy,
                points_xy=things[target].points_xy,
                mask_rle=encode_rle(sample.scene.objects[target].mask),
            )
            for target in question.targets
        )
        extra = {"thinking": question.thinking, "detail": question.detail, "distractor": sample.distractor}
        return TrainingRow(
            row_id=row_id, question=question.text, image=image, input_size_hw=(self.input_side, self.input_side),
            objects=objects, kind=question.kind, extra=extra,
        )  # fmt: skip


def row_id_of(split: str, seed: int, index: int) -> str:
    return f"{split}-{seed}-{index:06d}"
