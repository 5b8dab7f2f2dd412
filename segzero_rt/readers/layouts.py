"""Which layout a data set has, and the options that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from segzero_rt.dataset import ANNOTATIONS_NAME
from segzero_rt.errors import DatasetError
from segzero_rt.readers.source import Reader

MAX_OBJECTS = 10
"""Of a category on one picture, where nothing else is asked for."""


class Layout(str, Enum):
    """The layouts that data sets come in."""

    FOLDER = "dataset folder"
    """`annotations.jsonl` and `images/`: what `segzero scenes` writes."""
    COCO = "COCO-style instances"
    PARQUET = "authors' parquet"
    REASONSEG = "ReasonSeg polygons"


def layout_of(source: Path) -> Layout:
    """Tells the layout from names alone.

    Raises:
        DatasetError: nothing is there, or it is of no known layout.
    """
    try:
        if not source.exists():
            raise DatasetError(f"{source}: expected a data set, found nothing there; check the path")
        if source.is_dir():
            if (source / ANNOTATIONS_NAME).is_file():
                return Layout.FOLDER
            if any(source.glob("*.parquet")):
                return Layout.PARQUET
            if any(source.glob("*.json")):
                return Layout.REASONSEG
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        raise DatasetError(f"{str(source)[:200]!r}: cannot be read: {error}") from error
    if source.suffix == ".json":
        return Layout.COCO
    if source.suffix == ".parquet":
        return Layout.PARQUET
    raise DatasetError(
        f"{source}: expected a folder with {ANNOTATIONS_NAME}, with .parquet files, or with NAME.jpg and NAME.json, "
        "or a .json or .parquet file"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoOptions:
    """What a COCO-style file is read with."""

    images: Path | None = None
    """Folder of the pictures."""
    refs: Path | None = None
    """Referring expressions over the instances."""
    split: str | None = None
    all_sentences: bool = False
    join_refs: bool = False
    absent: int = 0
    max_objects: int | None = None
    """None: `MAX_OBJECTS`."""
    seed: int | None = None
    """None: 0."""

    @property
    def most_objects(self) -> int:
        """Categories with more instances on a picture are left out."""
        return MAX_OBJECTS if self.max_objects is None else self.max_objects

    def of_categories(self) -> dict[str, object]:
        """Options of questions that ask for a category, by their names; false or none where they were not given."""
        return {"absent": self.absent, "max-objects": self.max_objects, "seed": self.seed is not None}

    def open(self, source: Path) -> Reader:
        """The reader of the instances, or of the expressions about them.

        Raises:
            DatasetError: options do not fit each other, or the files are not what their layout says.
        """
        from segzero_rt.readers.coco import CocoInstances, CocoReader
        from segzero_rt.readers.refcoco import RefCocoReader

        if self.images is None or not self.images.is_dir():
            raise DatasetError(f"expected --images with the folder of the pictures of {source}")
        if self.refs is None:
            ours = {"split": self.split, "all-sentences": self.all_sentences, "join-refs": self.join_refs}
            refuse_options(source, "--refs", ours)
            if not self.absent:
                refuse_options(source, "--absent", {"seed": self.seed is not None})
            return CocoReader(
                CocoInstances(source, self.images),
                max_objects=self.most_objects,
                num_absent=self.absent,
                seed=self.seed or 0,
            )
        refuse_options(source, "instances without --refs", self.of_categories())
        if self.split is None:
            raise DatasetError(f"expected --split for {self.refs}, such as val or testA")
        return RefCocoReader(
            CocoInstances(source, self.images),
            self.refs,
            split=self.split,
            all_sentences=self.all_sentences,
            join_refs=self.join_refs,
        )


def refuse_options(source: Path, owner: str, given: Mapping[str, object]) -> None:
    """An option that would do nothing is a mistake.

    Raises:
        DatasetError: one of the options, which belong to `owner`, was given.
    """
    for name, value in given.items():
        if value:
            raise DatasetError(f"--{name} belongs to {owner}; leave it out for {source}")
