"""`segzero eval DATASET`: scores a bundle on a dataset folder or a published set."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.commands.options import add_bundle_options, add_policy_options, load_pipeline, positive_integer
from segzero_rt.commands.output import print_document, printable
from segzero_rt.commands.output_files import check_output_file, write_text
from segzero_rt.commands.progress import Progress

if TYPE_CHECKING:  # `--help` must not import numpy
    from segzero_rt.dataset import Sample
    from segzero_rt.evaluation import Predict, Record
    from segzero_rt.evaluation_run import PictureRecords, RecordJournal
    from segzero_rt.evaluation_sets import EvaluationSet
    from segzero_rt.image import ImageRgb
    from segzero_rt.pipeline import Look, SegZero
    from segzero_rt.segmentation import Segmentation

_MAX_SHOWN_FAILURES = 20
_SEED = 1

NAME = "eval"
HELP = "score a bundle on a data set: gIoU, cIoU, boxes, points, format validity, tokens, latency"

DESCRIPTION = """Score a bundle on a data set.

DATASET is one of
  a folder with annotations.jsonl        what `segzero scenes` writes
  a folder of NAME.jpg and NAME.json     ReasonSeg as LISA publishes it; ignored pixels are left out, as LISA scores
  FILE.parquet, or a folder of them      the test sets that Seg-Zero's authors publish; ReasonSeg's ignored pixels count
                                         as the object's there, and cannot be told apart any more
  FILE.json with --images and --refs     RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO: the first expression of each instance,
                                         or every one with --all-sentences
  FILE.json with --images                COCO-style instances: a question per category, several objects or, with
                                         --absent, none"""

_EPILOG = """examples:
  segzero scenes --split test --count 50 --seed 1 --out scenes && segzero eval scenes
  segzero eval scenes --json --records records.jsonl --report report.html
  segzero eval ReasonSeg/val --bundle bundles/vr-7b --records val.jsonl --report val.html
  segzero eval ReasonSeg/val --bundle bundles/vr-7b --ignored-pixels foreground
  segzero eval refcoco/instances.json --images train2014 --refs 'refcoco/refs(unc).p' --split testA --all-sentences

No sample is skipped: what fails counts as IoU 0 and is listed. Something wrong in the data set stops with its file and
row; --broken zero counts it as 0 instead. With --records, an evaluation that was stopped goes on when the same is asked
again. Latency is that of one question at a time, the picture decoded, and each question paying for its own look at the
picture unless --reuse-view is given."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("dataset", metavar="DATASET", help="see above")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="the first N samples only")
    parser.add_argument(
        "--records", metavar="FILE", help="write one JSON line per sample (.jsonl), and go on from there when stopped"
    )
    parser.add_argument("--report", metavar="FILE", help="write a report: .html with the worst answers drawn, or .md")
    parser.add_argument(
        "--reuse-view",
        action="store_true",
        help="questions on one picture that follow each other share one pass over it; only the first pays for it",
    )
    parser.add_argument(
        "--broken", choices=("stop", "zero"), default="stop",
        help="a picture that the data set does not give: stop (default), or count it as IoU 0 and list it",
    )  # fmt: skip
    _add_set_options(parser)
    add_policy_options(parser)
    add_bundle_options(parser)


def _add_set_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("published sets")
    group.add_argument(
        "--ignored-pixels", choices=("left-out", "foreground"),
        help="ReasonSeg's JSON files: left out as LISA scores (default), or the object's as in the authors' parquet",
    )  # fmt: skip
    group.add_argument(
        "--all-sentences", action="store_true", help="every wording of a question instead of the first one alone"
    )
    group.add_argument("--images", type=Path, metavar="DIR", help="pictures that a COCO-style file names")
    group.add_argument("--refs", type=Path, metavar="FILE", help="referring expressions over the instances")
    group.add_argument("--split", metavar="S", help="of the expressions: val, testA, testB, test")
    group.add_argument(
        "--absent", type=positive_integer, metavar="N", help="questions per picture for a category that is not on it"
    )
    group.add_argument(
        "--max-objects", type=positive_integer, metavar="N",
        help="leave out categories with more instances on a picture (instances without --refs; default: 10)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=positive_integer, metavar="K", help=f"of the categories of --absent (default: {_SEED})"
    )


def execute(arguments: argparse.Namespace) -> int:
    from segzero_rt.environment import bundle_card, device_card, environment_card
    from segzero_rt.evaluation import FAILED, summarize
    from segzero_rt.evaluation_run import JOURNAL_SUFFIX

    check_output_file(arguments.records, (".jsonl",))
    check_output_file(arguments.report, (".html", ".md"))
    dataset = _open_set(arguments)
    pipeline = load_pipeline(arguments)
    card = bundle_card(pipeline.bundle)
    journal = None
    if arguments.records:
        journal = _open_journal(Path(arguments.records + JOURNAL_SUFFIX), _settings(arguments, dataset, card))
    by_picture = _run(dataset, pipeline, arguments, journal)
    records = [record for _, of_one in by_picture for record in of_one]
    summary = {
        **summarize(records),
        "bundle": card,
        "environment": {**environment_card(), **device_card()},
        "dataset": str(arguments.dataset),
        "scoring": dict(dataset.facts),
        "reuse_view": arguments.reuse_view,
        "constrained": arguments.constrained,
        "failures": [{"source": one.source, "error": one.error} for one in records if one.status == FAILED],
    }
    if arguments.records:
        write_text(arguments.records, "".join(json.dumps(record.to_json()) + "\n" for record in records))
    if arguments.report:
        write_text(arguments.report, _report(Path(arguments.report), summary, dataset, by_picture))
    if journal:
        journal.remove()  # only now: nothing that can fail is left
    if arguments.json:
        print_document(summary)
    else:
        _print_summary(summary)
    return 0


def make_predict(pipeline: SegZero, arguments: argparse.Namespace) -> Predict:
    """The bundle as `evaluate` asks for it."""
    options = {"answer_format": arguments.format, "max_new_tokens": arguments.max_new_tokens}
    if not arguments.reuse_view:
        return lambda sample, image_rgb: pipeline(image_rgb, sample.text, **options)
    last: tuple[tuple[Path, bytes | None], Look] | None = None

    def predict(sample: Sample, image_rgb: ImageRgb) -> Segmentation:
        nonlocal last
        if last is None or last[0] != sample.picture:
            last = (sample.picture, pipeline.look(image_rgb))
        return pipeline.ask(last[1], sample.text, **options)

    return predict


def _open_set(arguments: argparse.Namespace) -> EvaluationSet:
    from segzero_rt.evaluation_sets import IgnoredPixels, SetOptions, open_set
    from segzero_rt.readers.layouts import CocoOptions

    coco = CocoOptions(
        images=arguments.images,
        refs=arguments.refs,
        split=arguments.split,
        all_sentences=arguments.all_sentences,
        absent=arguments.absent or 0,
        max_objects=arguments.max_objects,
        seed=_SEED if arguments.absent and arguments.seed is None else arguments.seed,
    )
    ignored = IgnoredPixels(arguments.ignored_pixels) if arguments.ignored_pixels else None
    return open_set(Path(arguments.dataset), SetOptions(coco=coco, ignored=ignored), limit=arguments.limit)


def _settings(arguments: argparse.Namespace, dataset: EvaluationSet, card: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a stopped evaluation to go on. `--broken zero` may be added to one that stopped."""
    names = ("limit", "reuse_view", "format", "max_new_tokens", "backend", "constrained", "draft_tokens", "threads")
    paths = {
        name: str(Path(value).resolve())
        for name in ("dataset", "images", "refs")
        if (value := getattr(arguments, name)) is not None
    }
    return {
        "bundle": card["sha256"],
        **paths,
        "num_pictures": dataset.num_pictures,
        **dataset.facts,
        **{name: getattr(arguments, name) for name in names},
    }


def _open_journal(path: Path, settings: Mapping[str, Any]) -> RecordJournal:
    from segzero_rt.evaluation_run import RecordJournal

    journal = RecordJournal(path, settings)
    if journal.done:
        count = sum(len(records) for _, records in journal.done)
        print(f"going on after {count} samples of a stopped evaluation ({path})", file=sys.stderr)
    return journal


def _run(
    dataset: EvaluationSet, pipeline: SegZero, arguments: argparse.Namespace, journal: RecordJournal | None
) -> list[PictureRecords]:
    from segzero_rt.evaluation_run import Asking, run_evaluation

    count, total = 0, 0.0
    with Progress(min(dataset.num_pictures, arguments.limit or dataset.num_pictures), "eval") as progress:

        def on_picture(records: Sequence[Record]) -> None:
            nonlocal count, total
            count += len(records)
            total += sum(record.iou for record in records)
            progress.step(f"gIoU {total / max(1, count):.3f} over {count} samples")

        asking = Asking(
            predict=make_predict(pipeline, arguments),
            count_tokens=lambda text: len(pipeline.policy.chat.reply_start(text)),
            limit=arguments.limit,
            broken_counts=arguments.broken == "zero",
            on_picture=on_picture,
        )
        return run_evaluation(dataset, asking, journal)


def _report(
    path: Path, summary: Mapping[str, Any], dataset: EvaluationSet, by_picture: Sequence[PictureRecords]
) -> str:
    from segzero_rt.report import render_html, render_markdown
    from segzero_rt.report_gallery import draw_worst

    records = [record for _, of_one in by_picture for record in of_one]
    if path.suffix.lower() == ".html":
        return render_html(summary, records, draw_worst(dataset, by_picture))
    return render_markdown(summary, records)


def _print_summary(summary: Mapping[str, Any]) -> None:
    from segzero_rt.report import render_text

    print(render_text(summary))
    failures = summary["failures"]
    for failure in failures[:_MAX_SHOWN_FAILURES]:
        print(printable(f"failed  {failure['source']}  {failure['error']}"))
    if len(failures) > _MAX_SHOWN_FAILURES:
        print(f"failed  {len(failures) - _MAX_SHOWN_FAILURES} more; --json lists them all")
