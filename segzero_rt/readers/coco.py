"""COCO-style instance annotations (COCO, LVIS, Objects365 …): one JSON file with `images`, `annotations`, `categories`.

Masks are run lengths or polygons, which pycocotools draws. A category on a picture becomes one question, "cat", whose
answer is every instance of it. Where a crowd is annotated, the category is not asked: its instances are not told apart.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.errors import DatasetError
from segzero_rt.mask import MAX_RLE_PIXELS, decode_rle
from segzero_rt.readers.source import (
    NAME_KIND,
    NONE_KIND,
    SEVERAL_KIND,
    Load,
    Mask,
    SourcePicture,
    SourceQuestion,
    optional_package,
    picture_path,
    read_json_file,
    required,
)

_MAX_OUTSIDE_PX = 1.0
"""Annotation tools let a polygon's point go this far beyond the picture."""


class CocoInstances:
    """The tables of one instances file, checked, with masks on demand.

    Raises:
        DatasetError: a field is missing or of another type, an id stands twice, or an annotation names a picture or
            category that is not there.
    """

    def __init__(self, path: Path, images_dir: Path) -> None:
        self.path, self.images_dir = path, images_dir
        tables = read_json_file(path)
        self.images: dict[int, dict[str, Any]] = {}
        for index, entry in enumerate(required(tables, "images", str(path), list)):
            source = f"{path}: images[{index}]"
            for name in ("id", "height", "width"):
                required(entry, name, source, int)
            if min(entry["height"], entry["width"]) < 1 or entry["height"] * entry["width"] > MAX_RLE_PIXELS:
                raise DatasetError(
                    f"{source}: expected a picture of 1 to {MAX_RLE_PIXELS} pixels, got `height` {entry['height']} and "
                    f"`width` {entry['width']}"
                )
            _refuse_again(entry["id"], self.images, source)
            self.images[entry["id"]] = {**entry, "file_name": _file_name(entry, source)}
        self.categories: dict[int, str] = {}
        for index, entry in enumerate(required(tables, "categories", str(path), list)):
            source = f"{path}: categories[{index}]"
            _refuse_again(required(entry, "id", source, int), self.categories, source)
            self.categories[entry["id"]] = required(entry, "name", source, str)
        self.annotations: dict[int, dict[str, Any]] = {}
        self.of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for index, entry in enumerate(required(tables, "annotations", str(path), list)):
            self._add(entry, f"{path}: annotations[{index}]")

    def _add(self, entry: Any, source: str) -> None:
        for name, table in (("image_id", self.images), ("category_id", self.categories)):
            if required(entry, name, source, int) not in table:
                raise DatasetError(f"{source}: `{name}` {entry[name]} is not in the file")
        _refuse_again(required(entry, "id", source, int), self.annotations, source)
        self.annotations[entry["id"]] = entry
        self.of_image[entry["image_id"]].append(entry)

    def picture(self, image_id: int) -> Path:
        entry = self.images[image_id]
        return picture_path(self.images_dir, entry["file_name"], f"{self.path}: image {image_id}")

    def mask(self, annotation: dict[str, Any]) -> Mask:
        """bool [H, W] of one annotation.

        Raises:
            DatasetError: no segmentation, or one that lies outside the picture or does not decode.
        """
        source = f"{self.path}: annotation {annotation['id']}"
        image = self.images[annotation["image_id"]]
        size_hw = (int(image["height"]), int(image["width"]))
        _check_box(annotation.get("bbox"), size_hw, source)
        segmentation = required(annotation, "segmentation", source, list, dict)
        if isinstance(segmentation, list):
            _check_polygons(segmentation, size_hw, source)
            coco_masks = optional_package("pycocotools.mask", "COCO's polygons")
            return decode_rle(coco_masks.merge(coco_masks.frPyObjects(segmentation, *size_hw)))
        return _run_length_mask(segmentation, size_hw, source)


class CocoReader:
    """One question per category and picture.

    Args:
        instances: the annotations.
        max_objects: categories with more instances on a picture are left out there, and counted.
        num_absent: questions per picture for a category that is not on it; LVIS' `neg_category_ids` where they are.
        seed: of the draw of absent categories.
    """

    def __init__(self, instances: CocoInstances, *, max_objects: int, num_absent: int = 0, seed: int = 0) -> None:
        self.instances, self.max_objects = instances, max_objects
        self.num_absent, self.seed = num_absent, seed
        asked = instances.images if num_absent else instances.of_image
        self._image_ids = [image_id for image_id in instances.images if image_id in asked]

    def __len__(self) -> int:
        return len(self._image_ids)

    def pictures(self) -> Iterator[tuple[str, Load]]:
        for image_id in self._image_ids:
            yield str(image_id), functools.partial(self._picture, image_id)

    def _picture(self, image_id: int) -> SourcePicture:
        by_category: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in self.instances.of_image.get(image_id, []):
            by_category[annotation["category_id"]].append(annotation)
        questions: list[SourceQuestion] = []
        left_out: dict[str, int] = defaultdict(int)
        for category_id, members in sorted(by_category.items()):
            if any(annotation.get("iscrowd") for annotation in members):
                left_out["a crowd"] += 1
            elif len(members) > self.max_objects:
                left_out[f"more than {self.max_objects} objects"] += 1
            else:
                questions.append(self._question(image_id, category_id, members))
        questions += self._absent(image_id, set(by_category))
        return SourcePicture(
            source=f"{self.instances.path}: image {image_id}",
            image=self.instances.picture(image_id),
            questions=tuple(questions),
            left_out=left_out,
        )

    def _question(self, image_id: int, category_id: int, members: Sequence[dict[str, Any]]) -> SourceQuestion:
        return SourceQuestion(
            row_id=f"{image_id}-{category_id}",
            text=self.instances.categories[category_id],
            masks=tuple(self.instances.mask(annotation) for annotation in members),
            kind=NAME_KIND if len(members) == 1 else SEVERAL_KIND,
        )

    def _absent(self, image_id: int, present: set[int]) -> Iterator[SourceQuestion]:
        known = self.instances.images[image_id].get("neg_category_ids", self.instances.categories)
        candidates = sorted(set(known) - present)
        rng = np.random.default_rng([self.seed, image_id])
        for category_id in rng.permutation(candidates)[: self.num_absent].tolist():
            if category_id not in self.instances.categories:
                raise DatasetError(f"{self.instances.path}: image {image_id}: no category {category_id} in the file")
            text = self.instances.categories[category_id]
            yield SourceQuestion(row_id=f"{image_id}-{category_id}", text=text, kind=NONE_KIND)


def _refuse_again(number: int, table: Mapping[int, Any], source: str) -> None:
    if number in table:
        raise DatasetError(f"{source}: expected ids that stand once, `id` {number} stood earlier in the file")


def _file_name(entry: dict[str, Any], source: str) -> str:
    """`file_name`; LVIS has `coco_url` instead, whose last two parts are COCO's folder and file."""
    if "file_name" not in entry and "coco_url" in entry:
        return "/".join(str(required(entry, "coco_url", source, str)).split("/")[-2:])
    return str(required(entry, "file_name", source, str))


def _run_length_mask(segmentation: dict[str, Any], size_hw: tuple[int, int], source: str) -> Mask:
    """Run lengths, compressed or as a list of numbers."""
    size = required(segmentation, "size", source, list)
    if tuple(size) != size_hw:  # before anything of that size is made
        raise DatasetError(f"{source}: expected a mask of {size_hw} pixels, got {size!r:.60}")
    counts = segmentation.get("counts")
    num_pixels = size_hw[0] * size_hw[1]
    try:
        if not isinstance(counts, list):
            return decode_rle({**segmentation, "size": size_hw})
        runs = np.array(counts)
        if runs.dtype.kind != "i" or (runs < 0).any() or (runs > num_pixels).any() or int(runs.sum()) != num_pixels:
            raise ValueError(f"the runs do not add up to {size_hw[0]} x {size_hw[1]} pixels")
        pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return np.ascontiguousarray(pixels.reshape(size_hw, order="F"))
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{source}: `segmentation` does not decode: {error}") from error


def _check_box(box: object, size_hw: tuple[int, int], source: str) -> None:
    """`bbox` is optional and not used, but one that lies elsewhere says that picture and annotation do not belong."""
    if box is None:
        return
    if not isinstance(box, list) or len(box) != 4 or any(type(value) not in (int, float) for value in box):
        raise DatasetError(f"{source}: expected `bbox` as [x, y, width, height], got {box!r:.80}")
    left, top, width, height = box
    _check_inside([left, left + width], [top, top + height], size_hw, f"{source}: `bbox`")


def _check_polygons(polygons: list[Any], size_hw: tuple[int, int], source: str) -> None:
    if not polygons:
        raise DatasetError(f"{source}: expected at least one polygon, got none")
    for polygon in polygons:
        whole = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not whole or any(type(value) not in (int, float) for value in polygon):
            raise DatasetError(f"{source}: expected polygons as [x1, y1, x2, y2, x3, y3, …], got {polygon!r:.80}")
        _check_inside(polygon[0::2], polygon[1::2], size_hw, f"{source}: `segmentation`")


def _check_inside(xs: list[float], ys: list[float], size_hw: tuple[int, int], source: str) -> None:
    height, width = size_hw
    low, far = -_MAX_OUTSIDE_PX, _MAX_OUTSIDE_PX
    if not (all(low <= x <= width + far for x in xs) and all(low <= y <= height + far for y in ys)):
        raise DatasetError(
            f"{source}: expected it inside the picture of {width} x {height} pixels, got x from {min(xs):.1f} to "
            f"{max(xs):.1f} and y from {min(ys):.1f} to {max(ys):.1f}"
        )
