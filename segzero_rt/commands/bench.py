"""`segzero bench`: what a bundle does on this machine, in several ways of asking, beside what the machine could do."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from segzero_rt.bench.tasks import Task, draw_picture, make_tasks
from segzero_rt.commands import bench_report as report
from segzero_rt.commands.options import add_bundle_options, add_policy_options, load_pipeline, positive_integer
from segzero_rt.commands.output import print_document
from segzero_rt.errors import DatasetError, OutputError

if TYPE_CHECKING:  # `--help` must not import numpy
    from segzero_rt.bench.ceiling import Ceiling
    from segzero_rt.image import ImageRgb
    from segzero_rt.pipeline import SegZero
    from segzero_rt.segmentation import Segmentation

__all__ = ["Task", "draw_picture", "make_tasks"]

NAME = "bench"
HELP = "measure a bundle on this machine: latency per stage, throughput, memory, against the machine's ceiling"

_EPILOG = """examples:
  segzero bench --questions 50
  segzero bench --scenario single-stream --images scenes --threads 1 --json
  segzero bench --scenario fixed-rate --rates 5,15 --seconds 10 --plot plots

Each question is on another picture; the first is timed apart. Without --images the pictures are drawn on the spot, so
they are the same everywhere. The last line is one JSON document with all of it. Comparisons with other runtimes live in
benchmarks/ of the repository."""

_DRAWN = "single-stream"
"""The scenario whose figures `--plot` draws."""
SCENARIOS = (_DRAWN, "offline", "repeated-frame", "fixed-rate", "cold-start")
MAX_QUESTIONS = 100_000
"""Every latency is kept for the percentiles; hours are enough of a measurement."""
MAX_RATE_HZ = 1000.0
_APART_TASKS = 16
"""Stages are timed by themselves on no more pictures than these."""
_REPEATED_TASKS = 16
_KEPT_PICTURES = 64
"""Pictures in memory at once, for scenarios that may not wait for a file."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--images", metavar="DIR", help="pictures to use, or a dataset folder with its questions")
    parser.add_argument("--questions", type=positive_integer, default=32, metavar="N", help="how many (default: 32)")
    parser.add_argument(
        "--scenario",
        action="append",
        choices=SCENARIOS,
        help="how questions arrive; may be given several times (default: all)",
    )
    parser.add_argument(
        "--rates", type=rates, default=(10.0, 30.0, 60.0), metavar="HZ,HZ", help="of fixed-rate (default: 10,30,60)"
    )
    parser.add_argument(
        "--seconds", type=positive_integer, default=3, metavar="N", help="of each fixed rate (default: 3)"
    )
    parser.add_argument(
        "--skip-ceiling", action="store_true", help="do not measure what the machine could do: no second load"
    )
    parser.add_argument("--plot", metavar="DIR", help="write pictures of the figures there (needs [plot])")
    parser.add_argument("--json", action="store_true", help="print one JSON document alone")
    add_policy_options(parser)
    add_bundle_options(parser)


def rates(text: str) -> tuple[float, ...]:
    """An argparse type: frames a second, with commas between them."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= MAX_RATE_HZ for value in values):
        raise argparse.ArgumentTypeError(f"expected rates above 0, up to {MAX_RATE_HZ:g}, such as 10,30; got {text!r}")
    return values


def execute(arguments: argparse.Namespace) -> int:
    from segzero_rt.bench.plots import check_plotting, write_plots

    if arguments.questions > MAX_QUESTIONS:
        raise DatasetError(f"expected at most {MAX_QUESTIONS} questions, got {arguments.questions}; ask for fewer")
    if arguments.plot is not None and _DRAWN not in (arguments.scenario or SCENARIOS):
        given = ", ".join(dict.fromkeys(arguments.scenario))
        raise OutputError(f"expected --scenario {_DRAWN} with --plot, which draws its figures, got {given}; add it")
    check_plotting(arguments.plot)
    tasks = list(make_tasks(arguments.images, arguments.questions))
    tell: Callable[[str], None] = (lambda _: None) if arguments.json else (lambda text: print(text, flush=True))
    document = measure(arguments, tasks, tell)
    if arguments.plot is not None:
        names = write_plots(document, arguments.plot)
        tell(f"pictures in {arguments.plot}: {', '.join(names)}")
    print_document(document)
    return 0


def measure(arguments: argparse.Namespace, tasks: Sequence[Task], tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs the scenarios that were asked for and says what came of each as soon as it is known."""
    from segzero_rt.bench.meters import Meter
    from segzero_rt.environment import peak_memory_bytes

    start_s = time.perf_counter()
    pipeline = load_pipeline(arguments)
    document: dict[str, Any] = {"load_ms": (time.perf_counter() - start_s) * 1e3}
    settings = _settings(arguments, pipeline)
    chosen = arguments.scenario or SCENARIOS
    ceiling = _ceiling(settings, document, skip=arguments.skip_ceiling)
    environment = _environment(arguments, pipeline)
    tell(report.machine(environment))
    tell(report.ceiling(document))
    if "cold-start" in chosen:
        from segzero_rt.bench.cold_start import measure_cold_start

        document["cold_start"] = measure_cold_start(settings)
        tell(report.cold_start(document["cold_start"]))
    if _DRAWN in chosen:
        with Meter() as meter:
            document |= _single_stream(arguments, pipeline, tasks)
        document |= meter.reading.to_json(len(tasks))
        document |= _apart(arguments, pipeline, tasks, ceiling, document["decode_counts"])
        tell(report.single_stream(document))
    document |= _other_scenarios(arguments, pipeline, tasks, chosen, tell)
    document |= {"peak_memory_bytes": peak_memory_bytes(), "environment": environment}
    tell(f"peak memory {document['peak_memory_bytes'] / 1e6:.0f} MB, load {document['load_ms']:.0f} ms")
    return document


def _ask(arguments: argparse.Namespace, pipeline: SegZero) -> Callable[[ImageRgb, str], Segmentation]:
    def ask(image_rgb: ImageRgb, question: str) -> Segmentation:
        return pipeline(image_rgb, question, answer_format=arguments.format, max_new_tokens=arguments.max_new_tokens)

    return ask


def _single_stream(arguments: argparse.Namespace, pipeline: SegZero, tasks: Sequence[Task]) -> dict[str, Any]:
    from segzero_rt.bench.scenarios import single_stream

    return single_stream(_ask(arguments, pipeline), tasks)


def _apart(
    arguments: argparse.Namespace,
    pipeline: SegZero,
    tasks: Sequence[Task],
    ceiling: Ceiling | None,
    decoding: dict[str, float],
) -> dict[str, Any]:
    """Stages by themselves, and what part of the machine's ceiling each reaches."""
    from segzero_rt.answer_format import FORMATS
    from segzero_rt.bench.stages import stages_apart
    from segzero_rt.evaluation import percentiles

    form = FORMATS[arguments.format] if arguments.format else None
    took = stages_apart(pipeline, tasks[:_APART_TASKS], answer_format=form, max_new_tokens=arguments.max_new_tokens)
    apart = {stage: percentiles(values) for stage, values in took.items()}
    fractions = {}
    if ceiling is not None:
        fractions = ceiling.fractions({stage: row["p50"] for stage, row in apart.items()}, decoding)
    return {"stages_apart_ms": apart, "fraction_of_ceiling": fractions}


def _other_scenarios(
    arguments: argparse.Namespace,
    pipeline: SegZero,
    tasks: Sequence[Task],
    chosen: Sequence[str],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    from segzero_rt.bench.scenarios import fixed_rate, offline, repeated_frame

    options = {"answer_format": arguments.format, "max_new_tokens": arguments.max_new_tokens}
    document: dict[str, Any] = {}
    if "offline" in chosen:
        document["offline"] = offline(pipeline, tasks[:_KEPT_PICTURES], **options)
        tell(report.offline(document["offline"]))
    if "repeated-frame" in chosen:
        document["repeated_frame"] = repeated_frame(pipeline, tasks[:_REPEATED_TASKS], **options)
        tell(report.repeated_frame(document["repeated_frame"]))
    if "fixed-rate" in chosen:
        document["fixed_rate"] = []
        for rate_hz in arguments.rates:
            row = fixed_rate(
                _ask(arguments, pipeline), tasks[:_KEPT_PICTURES], rate_hz=rate_hz, seconds=arguments.seconds
            )
            document["fixed_rate"].append(row)
        tell(report.fixed_rate(document["fixed_rate"]))
    return document


def _settings(arguments: argparse.Namespace, pipeline: SegZero) -> dict[str, Any]:
    """What a child process needs to do the same."""
    from segzero_rt.graph import default_threads

    return {
        "bundle": str(pipeline.bundle.root),
        "images": arguments.images,
        "backend": str(pipeline.policy.backend),
        "threads": arguments.threads or default_threads(),
        "given_threads": arguments.threads,
        "allow_ungated": arguments.allow_ungated,
        "draft_tokens": arguments.draft_tokens,
        "max_new_tokens": arguments.max_new_tokens,
        "format": arguments.format,
    }


def _ceiling(settings: dict[str, Any], document: dict[str, Any], *, skip: bool) -> Ceiling | None:
    """Puts `ceiling` into the document, and `ceiling_problem` where there is none."""
    from segzero_rt.bench.ceiling import measure_ceiling

    document |= {"ceiling": None, "ceiling_problem": "skipped"}
    if skip:
        return None
    measured = measure_ceiling(settings)
    if isinstance(measured, str):
        document["ceiling_problem"] = measured
        return None
    document |= {"ceiling": measured.to_json(), "ceiling_problem": None}
    return measured


def _environment(arguments: argparse.Namespace, pipeline: SegZero) -> dict[str, Any]:
    from segzero_rt.environment import bundle_card, device_card, environment_card

    return {
        **environment_card(),
        **device_card(),
        "bundle": bundle_card(pipeline.bundle),
        "backend": str(pipeline.policy.backend),
        "threads": arguments.threads,
    }
