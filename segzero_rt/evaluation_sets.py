"""What `segzero eval` scores: dataset folders and published sets, as pictures with their samples, loaded one at a time.

Published sets hold thousands of pictures, some inside one file: only the picture at hand is in memory. How a set is
scored (which questions are asked, what ignored pixels mean) is written down in its `facts`, since published figures
differ in just that.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.dataset import LabeledObject, Sample, read_dataset
from segzero_rt.errors import DatasetError
from segzero_rt.mask import decode_rle
from segzero_rt.readers.layouts import CocoOptions, Layout, layout_of, refuse_options
from segzero_rt.readers.parquet import ParquetReader
from segzero_rt.readers.reasonseg import IGNORE_RLE, IS_SENTENCE, ReasonSegReader
from segzero_rt.readers.source import NONE_KIND, SEVERAL_KIND, Reader, SourcePicture, SourceQuestion, stored_size_hw

OBJECT_KIND = "object"
"""Kind of a question about one thing in a set that tells no kinds apart."""
SENTENCE_KIND, PHRASE_KIND = "sentence", "phrase"
"""Kinds of ReasonSeg's questions, long and short as its authors report them."""
_LAYOUT, _IGNORED_PIXELS, _NONE_IGNORED = "layout", "ignored_pixels", "none"

LoadSamples = Callable[[], list[Sample]]


class IgnoredPixels(str, Enum):
    """What becomes of the pixels that ReasonSeg marks as to be ignored."""

    LEFT_OUT = "left-out"
    """Taken out of prediction and truth, as LISA scores."""
    FOREGROUND = "foreground"
    """Counted as the object's, as in the parquet files that Seg-Zero's authors made and score on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSet:
    """Pictures with their samples, in an order that does not change."""

    num_pictures: int
    facts: Mapping[str, Any]
    """How it is scored, in plain JSON types."""
    pictures: Callable[[], Iterator[tuple[str, LoadSamples]]]
    """Key and loader of each picture. A loader is called before the next picture is asked for, and raises
    `DatasetError` for its own picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetOptions:
    """How a set is asked and scored."""

    coco: CocoOptions
    ignored: IgnoredPixels | None = None
    """None: left out, where the set tells them apart."""


def open_set(source: Path, options: SetOptions, *, limit: int | None = None) -> EvaluationSet:
    """The set at `source`; dataset folders are read in full, published sets picture by picture.

    Args:
        source: file or folder.
        options: how it is asked and scored.
        limit: samples that a dataset folder is read to; published sets are not cut here.

    Raises:
        DatasetError: no known layout, options that do not fit it, or something in it is wrong.
        MissingPackageError: its reader needs a package that is not installed.
    """
    layout = layout_of(source)
    coco = options.coco
    if layout is not Layout.COCO:
        given = {"images": coco.images, "refs": coco.refs, "split": coco.split}
        refuse_options(source, "a COCO-style FILE.json", {**given, **coco.of_categories()})
    if layout is not Layout.REASONSEG:
        refuse_options(source, "a folder of ReasonSeg's JSON files", {"ignored-pixels": options.ignored})
    if layout in (Layout.FOLDER, Layout.PARQUET):
        refuse_options(source, "ReasonSeg's JSON files and --refs", {"all-sentences": coco.all_sentences})
    if layout is Layout.FOLDER:
        return _folder_set(source, limit)
    if layout is Layout.COCO:
        return _published(coco.open(source), layout, *_coco_facts(coco))
    if layout is Layout.PARQUET:
        # which pixels ReasonSeg ignores is lost in these files: their masks hold them as the object's
        told = f"{IgnoredPixels.FOREGROUND.value}, as published"
        return _published(ParquetReader(source), layout, {"questions": "as published"}, told)
    ignored = options.ignored or IgnoredPixels.LEFT_OUT
    reader = ReasonSegReader(source, all_sentences=coco.all_sentences, without_target=True)
    questions = "every wording" if coco.all_sentences else "first wording of each picture"
    return _published(reader, layout, {"questions": questions}, ignored.value, ignored)


def _coco_facts(coco: CocoOptions) -> tuple[dict[str, Any], str]:
    if coco.refs is None:
        questions = f"every category of a picture without a crowd and with at most {coco.most_objects} instances"
        drawn = {"seed": coco.seed or 0} if coco.absent else {}
        return {"questions": questions, "absent": coco.absent, **drawn}, _NONE_IGNORED
    level = "every expression" if coco.all_sentences else "first expression of each instance"
    return {"questions": level, "split": coco.split}, _NONE_IGNORED


def _folder_set(folder: Path, limit: int | None) -> EvaluationSet:
    samples = read_dataset(folder, limit=limit)
    groups = [list(group) for _, group in itertools.groupby(samples, key=lambda one: one.picture)]

    def pictures() -> Iterator[tuple[str, LoadSamples]]:
        for number, group in enumerate(groups):
            yield f"{group[0].image_path.name}#{number}", functools.partial(list, group)

    facts = {_LAYOUT: Layout.FOLDER.value, "questions": "all", _IGNORED_PIXELS: _NONE_IGNORED}
    return EvaluationSet(num_pictures=len(groups), facts=facts, pictures=pictures)


def _published(
    reader: Reader,
    layout: Layout,
    facts: Mapping[str, Any],
    told: str,
    ignored: IgnoredPixels = IgnoredPixels.LEFT_OUT,
) -> EvaluationSet:
    def pictures() -> Iterator[tuple[str, LoadSamples]]:
        for key, load in reader.pictures():
            yield key, functools.partial(_load_samples, load, ignored)

    facts = {_LAYOUT: layout.value, **facts, _IGNORED_PIXELS: told}
    return EvaluationSet(num_pictures=len(reader), facts=facts, pictures=pictures)


def _load_samples(load: Callable[[], SourcePicture], ignored: IgnoredPixels) -> list[Sample]:
    return samples_of(load(), ignored)


def samples_of(picture: SourcePicture, ignored: IgnoredPixels = IgnoredPixels.LEFT_OUT) -> list[Sample]:
    """The samples of one picture of a published set, in the order of its questions.

    A mask without a pixel is no object: nothing could hit it. A question without any is one about nothing.

    Raises:
        DatasetError: the picture cannot be read, a mask has another size, or truth comes as boxes alone.
    """
    size_hw = stored_size_hw(picture.image, picture.source)
    embedded = isinstance(picture.image, bytes)
    file, _, row = picture.source.rpartition(": ")
    name = Path(file) / (picture.name or row) if embedded else Path(str(picture.image))
    return [
        _sample(question, ignored, size_hw, picture, name, f"{picture.source}: question {number}")
        for number, question in enumerate(picture.questions)
    ]


def _sample(
    question: SourceQuestion,
    ignored: IgnoredPixels,
    size_hw: tuple[int, int],
    picture: SourcePicture,
    image_path: Path,
    source: str,
) -> Sample:
    if question.objects:
        raise DatasetError(f"{source}: expected masks to score against, got boxes alone; this is a set for training")
    if wrong := [mask.shape for mask in question.masks if mask.shape != size_hw]:
        raise DatasetError(f"{source}: expected masks of the picture's size {size_hw}, got {wrong[0]}")
    masks = [mask for mask in question.masks if mask.any()]
    rle = question.extra.get(IGNORE_RLE)
    if rle is not None and ignored is IgnoredPixels.FOREGROUND:
        # the two become one object, as an array of levels does when it is taken for booleans
        masks, rle = [np.logical_or.reduce([*masks, decode_rle(rle)])], None
    return Sample(
        image_path=image_path,
        text=question.text,
        kind=_kind(question, len(masks)),
        size_hw=size_hw,
        objects=tuple(LabeledObject.from_mask("", mask) for mask in masks),
        extra=question.extra,
        source=source,
        sample_id=question.row_id,
        image_data=picture.image if isinstance(picture.image, bytes) else None,
        as_stored=True,
        ignore_rle=rle,
    )


def _kind(question: SourceQuestion, num_objects: int) -> str:
    if not num_objects:
        return NONE_KIND
    if IS_SENTENCE in question.extra:
        return SENTENCE_KIND if question.extra[IS_SENTENCE] else PHRASE_KIND
    return question.kind or (OBJECT_KIND if num_objects == 1 else SEVERAL_KIND)
