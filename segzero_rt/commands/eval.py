"""`segzero eval DATASET`: scores a bundle on a dataset folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.commands.options import add_bundle_options, add_policy_options, load_pipeline, positive_integer
from segzero_rt.commands.output import print_document
from segzero_rt.commands.output_files import check_output_file, write_text
from segzero_rt.commands.progress import Progress

if TYPE_CHECKING:  # `--help` must not import numpy
    from segzero_rt.dataset import Sample
    from segzero_rt.evaluation import Predict, Record
    from segzero_rt.image import ImageRgb
    from segzero_rt.pipeline import Look, SegZero
    from segzero_rt.report import Gallery
    from segzero_rt.segmentation import Segmentation

NAME = "eval"
HELP = "score a bundle on a dataset folder: gIoU, cIoU, format validity, latency"

_EPILOG = """examples:
  segzero scenes --split test --count 50 --seed 1 --out scenes && segzero eval scenes
  segzero eval scenes --json --records records.jsonl --report report.html

No sample is skipped: what fails counts as IoU 0. Latency is that of one question at a time, the picture decoded, and
each question paying for its own look at the picture unless --reuse-view is given."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("dataset", metavar="DATASET", help="folder with annotations.jsonl and images/")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="the first N samples only")
    parser.add_argument("--records", metavar="FILE", help="write one JSON line per sample (.jsonl)")
    parser.add_argument("--report", metavar="FILE", help="write a report: .html with the worst answers drawn, or .md")
    parser.add_argument(
        "--reuse-view",
        action="store_true",
        help="questions on one picture that follow each other share one pass over it; only the first pays for it",
    )
    add_policy_options(parser)
    add_bundle_options(parser)


def execute(arguments: argparse.Namespace) -> int:
    from segzero_rt.dataset import read_dataset
    from segzero_rt.environment import bundle_card
    from segzero_rt.evaluation import summarize
    from segzero_rt.report import Gallery, write_report

    check_output_file(arguments.records, (".jsonl",))
    check_output_file(arguments.report, (".html", ".md"))
    samples = read_dataset(arguments.dataset, limit=arguments.limit)
    pipeline = load_pipeline(arguments)
    gallery = Gallery(size=24 if str(arguments.report).endswith(".html") else 0)
    records = _run(samples, make_predict(pipeline, arguments), gallery)
    summary = {
        **summarize(records),
        "bundle": bundle_card(pipeline.bundle),
        "dataset": str(arguments.dataset),
        "reuse_view": arguments.reuse_view,
    }
    if arguments.records:
        write_text(arguments.records, "".join(json.dumps(record.to_json()) + "\n" for record in records))
    if arguments.report:
        write_text(arguments.report, write_report(Path(arguments.report), summary, records, gallery))
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
    last: tuple[Path, Look] | None = None

    def predict(sample: Sample, image_rgb: ImageRgb) -> Segmentation:
        nonlocal last
        if last is None or last[0] != sample.image_path:
            last = (sample.image_path, pipeline.look(image_rgb))
        return pipeline.ask(last[1], sample.text, **options)

    return predict


def _run(samples: Sequence[Sample], predict: Predict, gallery: Gallery) -> list[Record]:
    from segzero_rt.evaluation import evaluate

    for _ in evaluate(samples[:1], predict):
        pass  # once untimed: first touches of weights and allocations are no question's latency
    records: list[Record] = []
    total = 0.0
    with Progress(len(samples), "eval") as progress:
        for sample, (record, result) in zip(samples, evaluate(samples, predict), strict=True):
            records.append(record)
            if gallery.size:
                gallery.add(sample, record, result)
            total += record.iou
            progress.step(f"gIoU {total / len(records):.3f}, {record.latency_ms:.0f} ms")
    return records


def _print_summary(summary: dict[str, Any]) -> None:
    from segzero_rt.report import render_text

    print(render_text(summary))
