"""`segzero bench`: latency, throughput and memory of one bundle on this machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.commands.options import add_bundle_options, add_policy_options, load_pipeline, positive_integer
from segzero_rt.commands.output import print_document
from segzero_rt.commands.progress import Progress
from segzero_rt.errors import DatasetError

if TYPE_CHECKING:  # `--help` must not import numpy
    from segzero_rt.image import ImageRgb
    from segzero_rt.segmentation import Segmentation

NAME = "bench"
HELP = "measure a bundle on this machine: latency per stage, throughput, memory"

_EPILOG = """examples:
  segzero bench --questions 50
  segzero bench --images scenes --threads 1 --json

One question at a time, each on another picture; the first is timed apart. Without --images the pictures are drawn on
the spot, so they are the same everywhere. Comparisons with other runtimes live in benchmarks/ of the repository."""

_QUESTIONS = (
    "the red mug",
    "the largest object",
    "something to cut paper with",
    "the object left of the bottle",
    "everything that can be eaten",
    "the blue thing nearest to the plate",
    "something to drink from",
    "the elephant",
)
MAX_QUESTIONS = 100_000
"""Every latency is kept for the percentiles; hours are enough of a measurement."""
_PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_DRAWN_SIZE_HW = (480, 640)

Ask = Callable[["ImageRgb", str], "Segmentation"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--images", metavar="DIR", help="pictures to use, or a dataset folder with its questions")
    parser.add_argument("--questions", type=positive_integer, default=32, metavar="N", help="how many (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_policy_options(parser)
    add_bundle_options(parser)


def execute(arguments: argparse.Namespace) -> int:
    from segzero_rt.environment import bundle_card, environment_card, peak_memory_bytes

    if arguments.questions > MAX_QUESTIONS:
        raise DatasetError(f"expected at most {MAX_QUESTIONS} questions, got {arguments.questions}; ask for fewer")
    tasks = list(make_tasks(arguments.images, arguments.questions))
    start_s = time.perf_counter()
    pipeline = load_pipeline(arguments)
    load_ms = (time.perf_counter() - start_s) * 1e3

    def ask(image_rgb: ImageRgb, question: str) -> Segmentation:
        return pipeline(image_rgb, question, answer_format=arguments.format, max_new_tokens=arguments.max_new_tokens)

    document = {
        "load_ms": load_ms,
        **measure(ask, tasks),
        "peak_memory_bytes": peak_memory_bytes(),
        "environment": {
            **environment_card(),
            "bundle": bundle_card(pipeline.bundle),
            "backend": str(pipeline.policy.backend),
            "threads": arguments.threads,
        },
    }
    if arguments.json:
        print_document(document)
    else:
        print(render(document))
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question on one picture; the picture is read when it is its turn, outside the timing."""

    question: str
    load_image: Callable[[], ImageRgb]


def measure(ask: Ask, tasks: Sequence[Task]) -> dict[str, Any]:
    """Times `ask` over the tasks; the first task runs twice, and its first run is reported apart.

    Returns:
        `first_question_ms`, `end_to_end_ms` and `stages_ms` (p50, p90, p99 each), `decode_counts` (means per question,
        see `Segmentation`), `throughput_per_s`, `num_questions` and `statuses`.
    """
    from segzero_rt.evaluation import percentiles

    first_ms, _ = _timed(ask, tasks[0])
    total_ms: list[float] = []
    stages_ms: dict[str, list[float]] = {}
    statuses: dict[str, int] = {}
    decoding: dict[str, list[int]] = {}
    with Progress(len(tasks), "bench") as progress:
        for task in tasks:
            elapsed_ms, result = _timed(ask, task)
            total_ms.append(elapsed_ms)
            for stage, value in result.timings_ms.items():
                stages_ms.setdefault(stage, []).append(value)
            for name, count in result.decode_counts.items():
                decoding.setdefault(name, []).append(count)
            status = result.answer.status.value
            statuses[status] = statuses.get(status, 0) + 1
            progress.step(f"{elapsed_ms:.0f} ms")
    return {
        "first_question_ms": first_ms,
        "end_to_end_ms": percentiles(total_ms),
        "stages_ms": {stage: percentiles(values) for stage, values in stages_ms.items()},
        "decode_counts": {name: sum(counts) / len(counts) for name, counts in decoding.items()},
        "throughput_per_s": len(tasks) / (sum(total_ms) / 1e3),
        "num_questions": len(tasks),
        "statuses": dict(sorted(statuses.items())),
    }


def _timed(ask: Ask, task: Task) -> tuple[float, Segmentation]:
    image_rgb = task.load_image()
    start_s = time.perf_counter()
    result = ask(image_rgb, task.question)
    return (time.perf_counter() - start_s) * 1e3, result


def make_tasks(images: str | None, count: int) -> Iterator[Task]:
    """`count` tasks; where there are fewer pictures or questions than that, they come round again.

    Args:
        images: a folder of pictures, a dataset folder, or None for drawn pictures.

    Raises:
        DatasetError: the folder holds neither.
    """
    from segzero_rt.dataset import ANNOTATIONS_NAME, read_dataset
    from segzero_rt.image import load_image

    if images is None:
        for index in range(count):
            yield Task(question=_QUESTIONS[index % len(_QUESTIONS)], load_image=partial(draw_picture, index))
        return
    folder = Path(images)
    if (folder / ANNOTATIONS_NAME).is_file():
        samples = read_dataset(folder, limit=count)
        for index in range(count):
            sample = samples[index % len(samples)]
            yield Task(question=sample.text, load_image=partial(load_image, sample.image_path))
        return
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _PICTURE_SUFFIXES and path.is_file())
    if not paths:
        raise DatasetError(f"expected a folder with pictures or {ANNOTATIONS_NAME}, found none in {folder}")
    for index in range(count):
        path = paths[index % len(paths)]
        yield Task(question=_QUESTIONS[index % len(_QUESTIONS)], load_image=partial(load_image, path))


def draw_picture(seed: int) -> ImageRgb:
    """A table with a few coloured things on it: the same on every machine, another for each seed."""
    import cv2
    import numpy as np

    height, width = _DRAWN_SIZE_HW
    rng = np.random.default_rng(seed)
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = rng.integers(120, 220, 3)
    for _ in range(int(rng.integers(4, 9))):
        center = (int(rng.integers(60, width - 60)), int(rng.integers(60, height - 60)))
        axes = (int(rng.integers(20, 60)), int(rng.integers(20, 60)))
        color = rng.integers(0, 256, 3).tolist()
        angle = float(rng.uniform(0, 180))
        cv2.ellipse(picture, (center[0] + 6, center[1] + 8), axes, angle, 0, 360, (60, 60, 60), cv2.FILLED, cv2.LINE_AA)
        cv2.ellipse(picture, center, axes, angle, 0, 360, color, cv2.FILLED, cv2.LINE_AA)
    noise = rng.integers(-8, 9, picture.shape)
    return np.asarray(np.clip(picture + noise, 0, 255), np.uint8)


def render(document: dict[str, Any]) -> str:
    """The document for a terminal."""
    environment = document["environment"]
    rows = [("stage, ms", "p50", "p90", "p99")]
    for name, row in {**document["stages_ms"], "end to end": document["end_to_end_ms"]}.items():
        rows.append((name, *(f"{row[key]:.2f}" for key in ("p50", "p90", "p99"))))
    table = [f"{name:<14}{p50:>10}{p90:>10}{p99:>10}" for name, p50, p90, p99 in rows]
    counts = f"{document['num_questions']} questions, {document['throughput_per_s']:.2f} per second"
    start = f"first {document['first_question_ms']:.0f} ms, load {document['load_ms']:.0f} ms"
    machine = f"{environment['cores']} cores, {environment['cpu'] or 'unknown CPU'}"
    if decode := document["decode_counts"]:
        taken = f"{decode['tokens']:.1f} tokens a reply in {decode['runs']:.1f} runs of the decoder"
        table.append(f"{taken}, {decode['accepted']:.1f} of {decode['drafted']:.1f} guesses right")
    table.append(f"{counts}, {start}, peak {document['peak_memory_bytes'] / 1e6:.0f} MB")
    table.append(f"{environment['bundle']['name']} on {environment['backend']}, {machine}")
    return "\n".join(table)
