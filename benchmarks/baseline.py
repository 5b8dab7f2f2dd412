"""One question at a time: segzero-rt against transformers + Sam2Model; same weights, questions, cores and answers.

    python -m benchmarks.baseline --policy HF --segmenter HF [--bundle B] [--images scenes] [--questions 40]

Each thread count runs in a process of its own that is pinned to so many cores, so that neither side gains by threads
beside its pool. The two take turns question by question, and who goes first alternates. All answers are compared before
anything is timed: token by token, and mask by mask. A question with another answer is listed and not timed.

A quantised bundle says some things in other words or with a box a pixel apart. `--time-different` times every question
that both answered, and gives beside it how many replies were equal and how alike the masks of all of them are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segzero_rt.answer import AnswerStatus
from segzero_rt.commands.bench import Task, make_tasks
from segzero_rt.environment import bundle_card
from segzero_rt.evaluation import mask_overlap, percentiles

from .measuring import RESULTS, check_files, paired, pin_to_cores, run_and_exit, write_result

if TYPE_CHECKING:  # both runtimes are imported in the pinned child only
    from segzero_rt.pipeline import SegZero

    from .transformers_pipeline import TransformersPipeline

ANSWERED = (AnswerStatus.OK, AnswerStatus.NONE_FOUND)
Timed = Callable[[np.ndarray, str], dict[str, float]]
"""Answers once and gives the milliseconds of its stages."""


def main() -> None:
    """Runs every thread count in a child process and writes one result file."""
    arguments = _parse()
    if arguments.only_threads:
        print(json.dumps(_measure_here(arguments)))
        return
    check_files(arguments.policy / "config.json", arguments.segmenter / "config.json")
    by_threads = {}
    for threads in arguments.threads:
        command = [sys.executable, "-m", "benchmarks.baseline", *sys.argv[1:], "--only-threads", str(threads)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        by_threads[str(threads)] = json.loads(child.stdout.splitlines()[-1])
        print(f"{threads} threads: {_line(by_threads[str(threads)])}", file=sys.stderr)
    document = {"unit": "ms", "round_weights": arguments.round_weights, "by_threads": by_threads}
    path = write_result("baseline", document, arguments.out, variant=arguments.variant)
    print(json.dumps({"result": str(path), "by_threads": by_threads}))


def compare_answers(
    ours: SegZero, theirs: TransformersPipeline, tasks: Sequence[Task], *, time_different: bool = False
) -> dict[str, Any]:
    """Asks both everything once, untimed, which also warms both up.

    Args:
        time_different: count a task as fit to be timed also where the replies differ, if both are answers.

    Returns:
        `timed` (indices of tasks), `num_equal` (of them, with the same tokens), `different` (what was said), `mask_iou`
        (mean over the timed ones that have objects, None without any), `mask_iou_different` (over those whose replies
        differ) and `new_tokens` (mean length of the timed replies, of each side).
    """
    timed: list[int] = []
    different: list[dict[str, str]] = []
    ious: dict[bool, list[float]] = {True: [], False: []}
    lengths: dict[str, list[int]] = {"segzero": [], "baseline": []}
    for index, task in enumerate(tasks):
        image_rgb = task.load_image()
        generation = ours.policy.answer(image_rgb, task.question)
        reply = theirs(image_rgb, task.question)
        result = ours(image_rgb, task.question)
        equal = list(generation.token_ids) == reply.token_ids
        if not equal:
            different.append({"question": task.question, "segzero": generation.text, "baseline": reply.text})
            if not time_different or result.status not in ANSWERED or not generation.finished:
                continue
        timed.append(index)
        lengths["segzero"].append(len(generation.token_ids))
        lengths["baseline"].append(len(reply.token_ids))
        intersection, area = mask_overlap(result.union, np.asarray(reply.masks.any(axis=0), np.bool_))
        if area:
            ious[equal].append(intersection / area)
    return {
        "timed": timed,
        "num_equal": len(tasks) - len(different),
        "different": different,
        "mask_iou": _mean([*ious[True], *ious[False]]),
        "mask_iou_different": _mean(ious[False]),
        "new_tokens": {side: _mean(counts) for side, counts in lengths.items()},
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def interleave(ours: Timed, theirs: Timed, tasks: Sequence[Task]) -> dict[str, Any]:
    """Times both on every task in turn; even tasks begin with one, odd tasks with the other."""
    total: dict[str, list[float]] = {"segzero": [], "baseline": []}
    stages: dict[str, dict[str, list[float]]] = {"segzero": {}, "baseline": {}}
    sides = [("segzero", ours), ("baseline", theirs)]
    for index, task in enumerate(tasks):
        image_rgb = task.load_image()
        for name, ask in sides if index % 2 == 0 else sides[::-1]:
            start = time.perf_counter()
            timings_ms = ask(image_rgb, task.question)
            total[name].append((time.perf_counter() - start) * 1e3)
            for stage, value in timings_ms.items():
                stages[name].setdefault(stage, []).append(value)
    return {
        "end_to_end_ms": paired(total["segzero"], total["baseline"]),
        "segzero": _summary(total["segzero"], stages["segzero"]),
        "baseline": _summary(total["baseline"], stages["baseline"]),
    }


def _summary(total_ms: Sequence[float], stages_ms: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "end_to_end_ms": percentiles(total_ms),
        "stages_ms": {stage: percentiles(values) for stage, values in stages_ms.items()},
    }


def _measure_here(arguments: argparse.Namespace) -> dict[str, Any]:
    threads = arguments.only_threads
    pin_to_cores(threads)
    import torch

    from segzero_rt.pipeline import SegZero

    from .transformers_pipeline import TransformersPipeline

    torch.set_num_threads(threads)
    ours = SegZero.load(arguments.bundle, backend="cpu", draft_tokens=arguments.draft_tokens)  # threads: as users get
    theirs = TransformersPipeline(
        ours.bundle.root,
        arguments.policy,
        arguments.segmenter,
        round_weights=arguments.round_weights,
        compiled=arguments.compiled,
    )
    tasks = list(make_tasks(arguments.images, arguments.questions))
    answers = compare_answers(ours, theirs, tasks, time_different=arguments.time_different)
    if not answers["timed"]:
        raise SystemExit(f"expected equal answers to time, got none: {answers['different'][:2]}")
    ours.policy.forget_replies()  # no guess of a timed reply may come from having answered that question before
    timings = interleave(
        lambda image_rgb, question: dict(ours(image_rgb, question).timings_ms),
        lambda image_rgb, question: theirs(image_rgb, question).timings_ms,
        [tasks[index] for index in answers["timed"]],
    )
    return {
        "bundle": bundle_card(ours.bundle),
        "num_questions": len(tasks),
        "num_timed": len(answers.pop("timed")),
        "draft_tokens": arguments.draft_tokens,
        "compiled": arguments.compiled,
        **answers,
        **timings,
    }


def _line(result: dict[str, Any]) -> str:
    times = result["end_to_end_ms"]
    low, high = times["ratio_interval_95"]
    return (
        f"{times['segzero_median']:.1f} ms against {times['baseline_median']:.1f} ms, {times['ratio']:.2f}x "
        f"({low:.2f} to {high:.2f}), {result['num_timed']} of {result['num_questions']} timed, "
        f"{result['num_equal']} equal, mask IoU {result['mask_iou']}"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="latency against transformers + Sam2Model, same answers")
    parser.add_argument("--policy", type=Path, required=True, help="checkpoint folder of the policy")
    parser.add_argument("--segmenter", type=Path, required=True, help="checkpoint folder of the segmenter")
    parser.add_argument("--bundle", help="the bundle made from them (default: the embedded one)")
    parser.add_argument("--images", help="pictures, or a dataset folder with its questions (default: drawn)")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--no-round-weights",
        dest="round_weights",
        action="store_false",
        help="leave the baseline's weights as the checkpoint has them instead of rounding to the bundle's float16",
    )
    parser.add_argument(
        "--time-different", action="store_true", help="time questions that both answered in other words, too"
    )
    parser.add_argument("--compiled", action="store_true", help="the baseline's models by torch.compile")
    parser.add_argument(
        "--draft-tokens", type=int, help="tokens that segzero-rt guesses ahead (default: as users get; 0: none)"
    )
    parser.add_argument(
        "--variant", default="", help="put behind the file's name, such as int8, so that several can be kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    parser.add_argument("--only-threads", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run_and_exit(main, "baseline")
