"""Small data sets in the exact layouts of published ones, written for tests."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from segzero_rt.readers.source import Reader, SourcePicture

IMAGE_TYPE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TRAIN_SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()), ("problem", pyarrow.string()), ("solution", pyarrow.string()), ("image", IMAGE_TYPE),
        ("img_height", pyarrow.int64()), ("img_width", pyarrow.int64()),
    ]
)  # fmt: skip
MASK_SCHEMA = pyarrow.schema(
    [
        ("image", IMAGE_TYPE), ("text", pyarrow.string()), ("mask", pyarrow.list_(pyarrow.list_(pyarrow.bool_()))),
        ("image_id", pyarrow.string()), ("ann_id", pyarrow.string()), ("img_height", pyarrow.int64()),
        ("img_width", pyarrow.int64()),
    ]
)  # fmt: skip
"""The features that the published cards name."""


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image_rgb: NDArray[np.uint8], file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_rgb).save(buffer, file_format, **options)
    return buffer.getvalue()


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], schema: pyarrow.Schema) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema=schema), path)
    return path


def train_row(row_id: str, solution: str, *, problem: str = "the mug", size: int = 84, seed: int = 0) -> dict[str, Any]:
    image = {"bytes": encoded(picture(size, size, seed)), "path": None}
    return {
        "id": row_id, "problem": problem, "solution": solution, "image": image, "img_height": 480, "img_width": 640,
    }  # fmt: skip


def mask_row(text: str, mask: NDArray[np.bool_], *, image_id: str = "7", ann_id: str = "0") -> dict[str, Any]:
    height, width = mask.shape
    return {
        "image": {"bytes": encoded(picture(height, width), "JPEG"), "path": "7.jpg"}, "text": text,
        "mask": mask.tolist(), "image_id": image_id, "ann_id": ann_id, "img_height": height, "img_width": width,
    }  # fmt: skip


def write_reasonseg(
    folder: Path,
    name: str,
    shapes: Sequence[Mapping[str, Any]],
    *,
    text: Any = ("something to drink from",),
    **more: Any,
) -> Path:
    """One picture of 40 x 60 with its JSON; `more` replaces or adds fields."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(40, 60)).save(folder / f"{name}.jpg")
    entry = {
        "text": list(text) if isinstance(text, tuple) else text,
        "is_sentence": False,
        "shapes": shapes,
        **more,
    }
    (folder / f"{name}.json").write_text(json.dumps(entry))
    return folder / f"{name}.json"


def shape(label: str, *points: tuple[float, float]) -> dict[str, Any]:
    return {"label": label, "labels": [label], "shape_type": "polygon", "points": [list(point) for point in points]}


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    """A COCO polygon."""
    return [left, top, right, top, right, bottom, left, bottom]


def coco_tables(**changes: Any) -> dict[str, Any]:
    """Two pictures of 40 x 60: a cat, two remotes, a crowd of people; and one with nothing. Ids as in COCO."""
    tables: dict[str, Any] = {
        "images": [
            {"id": 139, "file_name": "000000000139.png", "height": 40, "width": 60},
            {"id": 285, "file_name": "000000000285.png", "height": 40, "width": 60},
        ],
        "categories": [
            {"id": 1, "name": "person"}, {"id": 17, "name": "cat"}, {"id": 75, "name": "remote"},
            {"id": 90, "name": "toothbrush"},
        ],
        "annotations": [
            annotation(11, 139, 17, [rectangle(5, 10, 25, 30)], bbox=[5, 10, 20, 20]),
            annotation(12, 139, 75, [rectangle(30, 2, 50, 8)]),
            annotation(13, 139, 75, [rectangle(30, 20, 34, 36), rectangle(36, 20, 40, 36)]),
            annotation(14, 139, 1, {"counts": [1200, 100, 1100], "size": [40, 60]}, iscrowd=1),
        ],
    }  # fmt: skip
    return {**tables, **changes}


def annotation(number: int, image_id: int, category_id: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation, "iscrowd": 0,
        **more,
    }  # fmt: skip


def write_coco(folder: Path, tables: Mapping[str, Any]) -> tuple[Path, Path]:
    """Annotations file and picture folder."""
    images = folder / "pictures"
    images.mkdir(parents=True)
    for number, entry in enumerate(tables["images"] or []):
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
            Image.fromarray(picture(40, 60, number)).save(images / Path(entry["file_name"]).name)
    path = folder / "instances.json"
    path.write_text(json.dumps(tables))
    return path, images


def ref(number: int, image_id: int, ann_id: Any, *sentences: str, split: str = "train", **more: Any) -> dict[str, Any]:
    said = [
        {"sent_id": number * 10 + i, "sent": text, "raw": text.title(), "tokens": text.split()}
        for i, text in enumerate(sentences)
    ]
    return {
        "ref_id": number, "ann_id": ann_id, "image_id": image_id, "split": split, "sentences": said, "category_id": 17,
        "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg", "sent_ids": [one["sent_id"] for one in said],
        **more,
    }  # fmt: skip


def write_refs(path: Path, refs: Sequence[Mapping[str, Any]]) -> Path:
    """As the refer tools' files: a pickle of protocol 2."""
    path.write_bytes(pickle.dumps([dict(one) for one in refs], protocol=2))
    return path


def load_all(reader: Reader) -> dict[str, SourcePicture]:
    loaded = {key: load() for key, load in reader.pictures()}
    assert len(loaded) == len(reader)
    return loaded
