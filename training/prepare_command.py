"""`segzero train prepare`: published data sets to training rows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.commands.options import positive_integer
from segzero_rt.errors import DatasetError

if TYPE_CHECKING:  # readers need pyarrow and pycocotools: only when the command runs
    from segzero_rt.readers.source import Reader

NAME = "prepare"
HELP = "training rows from published data sets"

DESCRIPTION = """Turn a published data set into training rows for `segzero train grpo`: DIR/images/ and DIR/rows.jsonl.

SOURCE is one of
  FILE.json with --images DIR            COCO-style instances (COCO, LVIS, Objects365): a question per category
  the same with --refs 'refs(unc).p'     RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO: a question per referring expression
  a folder of NAME.jpg and NAME.json     ReasonSeg as LISA publishes it: polygons, several wordings each
  FILE.parquet, or a folder of them      the sets that the authors of Seg-Zero and VisionReasoner publish

Masks become boxes (their extent) and two points (maxima of the distance transform), scaled to the picture that the
policy will see. --min-iou 0.6 keeps only what the segmenter of a bundle can draw from them, as the authors did.

Anything wrong stops with its file and row; a picture that is to be passed over is named with --leave-out. A run that
was stopped goes on where it was when it is called again. The folder appears when it is whole."""
EPILOG = """examples:
  segzero train prepare annotations/instances_train2017.json --images train2017 --absent 1 --out rows/coco
  segzero train prepare refcocog/instances.json --images train2014 --refs 'refcocog/refs(umd).p' --out rows/refcocog
  segzero train prepare ReasonSeg/train --out rows/reasonseg
  segzero train prepare VisionReasoner_multi_object_7k_840/data --out rows/multi_7k"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="see above")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the rows; must be empty or not exist")
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures that a COCO-style file names")
    parser.add_argument("--refs", type=Path, metavar="FILE", help="referring expressions over the instances")
    parser.add_argument("--split", metavar="S", help="only refs of this split (default: train)")
    parser.add_argument(
        "--all-sentences", action="store_true", help="every sentence of a ref instead of the first one alone"
    )
    parser.add_argument(
        "--join-refs", action="store_true", help="""questions "'a' and 'b'" for two refs of a picture besides"""
    )
    parser.add_argument(
        "--absent", type=_whole, default=0, metavar="N",
        help="questions per picture for a category that is not on it (COCO-style instances; default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--max-objects", type=positive_integer, metavar="N",
        help="leave out categories with more instances on a picture (instances without --refs; default: 10)",
    )  # fmt: skip
    parser.add_argument("--seed", type=_whole, metavar="K", help="of the categories of --absent (default: 0)")
    parser.add_argument(
        "--input-side", type=positive_integer, default=840, metavar="PX",
        help="side of the square picture that the policy will see (default: 840; the tabletop policy: 280)",
    )  # fmt: skip
    parser.add_argument(
        "--min-side", type=_not_negative, default=2.0, metavar="PX",
        help="leave out questions with an object narrower than this in that picture (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--min-iou", type=_not_negative, default=0.0, metavar="IOU",
        help="leave out questions with an object that the segmenter draws with less (the authors: 0.6; default: 0)",
    )  # fmt: skip
    parser.add_argument("--bundle", metavar="DIR", help="whose segmenter --min-iou asks (default: the embedded one)")
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="of the segmenter (default: the cores)")
    parser.add_argument(
        "--leave-out", action="append", default=[], metavar="PICTURE",
        help="pass over this picture (its image id, file stem, or FILE.parquet#ROW); may be repeated",
    )  # fmt: skip
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="only the first N pictures")
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON document")


def execute(arguments: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    from segzero_rt.bundle import Bundle

    from .prepare import Preparation, Segmenter, prepare
    from .rows import check_new_folder

    check_new_folder(arguments.out)
    preparation = Preparation(
        input_size_hw=(arguments.input_side, arguments.input_side),
        min_side_px=arguments.min_side,
        min_iou=arguments.min_iou,
        leave_out=frozenset(arguments.leave_out),
        limit=arguments.limit,
    )
    reader = open_reader(arguments)
    segmenter = Segmenter(Bundle.open(arguments.bundle), threads=arguments.threads) if arguments.min_iou else None
    prepared = prepare(reader, arguments.out, preparation, source=_source_settings(arguments), segmenter=segmenter)
    if arguments.json:
        print(json.dumps(prepared.to_json()))
        return 0
    print(
        f"{prepared.num_rows} rows on {prepared.num_pictures} pictures in {arguments.out}, "
        f"{prepared.num_without_object} of them without an object"
    )
    for reason, count in sorted(prepared.left_out.items()):
        print(f"left out: {count} questions for {reason}")
    return 0


def open_reader(arguments: argparse.Namespace) -> Reader:
    """The reader for SOURCE.

    Raises:
        DatasetError: SOURCE is of no known layout, or options do not fit it.
    """
    from segzero_rt.readers.layouts import CocoOptions, Layout, layout_of, refuse_options
    from segzero_rt.readers.parquet import ParquetReader
    from segzero_rt.readers.reasonseg import ReasonSegReader

    source: Path = arguments.source
    layout = layout_of(source)
    names = ("images", "refs", "all_sentences", "join_refs", "absent", "max_objects", "seed")
    coco = CocoOptions(
        split=arguments.split or ("train" if arguments.refs else None),
        **{name: getattr(arguments, name) for name in names},
    )
    if layout is Layout.COCO:
        return coco.open(source)
    given = {name.replace("_", "-"): getattr(arguments, name) for name in ("split", *names[:4])}
    refuse_options(source, "a COCO-style FILE.json", {**given, **coco.of_categories()})
    if layout is Layout.FOLDER:
        raise DatasetError(f"{source}: expected a published data set, got a dataset folder of `segzero scenes`")
    return ParquetReader(source) if layout is Layout.PARQUET else ReasonSegReader(source)


def _source_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from segzero_rt.readers.layouts import MAX_OBJECTS

    names = ("images", "refs", "split", "all_sentences", "join_refs", "absent", "max_objects", "seed", "bundle")
    settings = {name: getattr(arguments, name) for name in names}
    paths = {name: str(value.resolve()) for name, value in settings.items() if isinstance(value, Path)}
    used = {"max_objects": arguments.max_objects or MAX_OBJECTS, "seed": arguments.seed or 0}
    return {"source": str(arguments.source.resolve()), **settings, **used, **paths}


def _whole(text: str) -> int:
    """An argparse type."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text[:40]!r}")
    return int(text)


def _not_negative(text: str) -> float:
    """An argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10_000:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text[:40]!r}")
    return value
