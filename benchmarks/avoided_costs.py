"""What a question would cost without each saving: taken back one at a time, before and after in one run, with its gIoU.

    python -m benchmarks.avoided_costs TEST [--bundle B] [--portable DIR] [--questions 60] [--threads 1 2]

For each cost a second pipeline of the same bundle is loaded that has it again, all else alike. The two answer the same
questions of a dataset in turns, who goes first alternating; both are scored, and how many answers and masks are the
same to the bit stands beside the times. The last row has all of them again at once.

`--portable` is a bundle of the same weights in the same storage, exported with `--flavour portable`: attention, norms
and activations of plain operators, none of them fused. Each number of cores is a process of its own that is pinned to
so many.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.bundle import Bundle
from segzero_rt.commands.options import positive_integer
from segzero_rt.dataset import Sample, read_dataset
from segzero_rt.environment import bundle_card
from segzero_rt.evaluation import Record, giou_loss, score_sample
from segzero_rt.graph import Graph, default_threads
from segzero_rt.image import ImageRgb
from segzero_rt.kernels.backend import KERNELS_VARIABLE
from segzero_rt.operators.library import OPERATORS_VARIABLE
from segzero_rt.pipeline import SegZero
from segzero_rt.policy import policy_specs
from segzero_rt.segmentation import Segmentation
from segzero_rt.segmenter import ImageEncoder

from .measuring import RESULTS, paired, pin_to_cores, run_and_exit, write_result

Ask = Callable[[ImageRgb, str], Segmentation]
ALL_COSTS = "all of these"
"""Name of the last row."""
_WARM_UP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One thing that a question need not pay for."""

    name: str
    make: Callable[[Bundle], Ask]
    """The pipeline that pays for it."""
    least_cores: int = 1
    """With fewer there is nothing to save."""
    same_numbers: bool = True
    """The same products and sums, but for their order; else a reply's digits may move by a step."""


def as_it_is(bundle: Bundle) -> Ask:
    """What users get."""
    return SegZero.load(bundle, backend="cpu")


def without_guesses(bundle: Bundle) -> Ask:
    """A run of the decoder for every token."""
    return SegZero.load(bundle, backend="cpu", draft_tokens=0)


def encoder_afterwards(bundle: Bundle) -> Ask:
    """The segmenter's encoder when the reply is there, on all cores, as the authors' pipeline has it."""
    pipeline = SegZero.load(bundle, backend="cpu")
    wait_for_reply(pipeline)
    return pipeline


def wait_for_reply(pipeline: SegZero) -> None:
    """Takes the encoder's own thread away; it then has no core to leave to the policy."""
    pipeline._thread = None
    pipeline.encoder = ImageEncoder.load(pipeline.bundle, backend="cpu", threads=default_threads())


def all_threads(bundle: Bundle) -> Ask:
    """Every graph on all cores, the small ones too."""
    return SegZero.load(bundle, backend="cpu", threads=default_threads())


def attention_in_blocks(bundle: Bundle) -> Ask:
    """The decoder's attention as ONNX Runtime has it for long prompts."""
    pipeline = SegZero.load(bundle, backend="cpu")
    attend_in_blocks(pipeline, threads=1)
    return pipeline


def attend_in_blocks(pipeline: SegZero, *, threads: int) -> None:
    """Loads the decoder once more."""
    manifest = pipeline.bundle.manifest.policy
    file, spec = pipeline.bundle.file(manifest.graphs.decoder), policy_specs(manifest)["decoder"]
    pipeline.policy.decoder = Graph.load(file, spec, backend="cpu", threads=threads, short_prompts=False)


def prompt_in_two_runs(bundle: Bundle) -> Ask:
    """The picture's part of the prompt read before the question's, in a run of its own."""
    pipeline = SegZero.load(bundle, backend="cpu")
    return lambda image_rgb, question: pipeline.ask(pipeline.look(image_rgb), question)


def kernels_in_python(bundle: Bundle) -> Ask:
    """Pictures taken in and masks made by Pillow, OpenCV and NumPy."""
    pipeline = SegZero.load(bundle, backend="cpu")

    def ask(image_rgb: ImageRgb, question: str) -> Segmentation:
        with reference(KERNELS_VARIABLE):
            return pipeline(image_rgb, question)

    return ask


def operators_as_functions(bundle: Bundle) -> Ask:
    """The graphs' own functions in ONNX Runtime, not the compiled operators that may take their place."""
    with reference(OPERATORS_VARIABLE):
        return SegZero.load(bundle, backend="cpu")


@contextlib.contextmanager
def reference(variable: str) -> Iterator[None]:
    """Forces the reference of what an environment variable chooses meanwhile."""
    before = os.environ.get(variable)
    os.environ[variable] = "reference"
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def none_saved(bundle: Bundle) -> Ask:
    """All of the above at once."""
    with reference(OPERATORS_VARIABLE):
        pipeline = SegZero.load(bundle, backend="cpu", threads=default_threads(), draft_tokens=0)
        wait_for_reply(pipeline)
        attend_in_blocks(pipeline, threads=default_threads())

    def ask(image_rgb: ImageRgb, question: str) -> Segmentation:
        with reference(KERNELS_VARIABLE):
            return pipeline.ask(pipeline.look(image_rgb), question)

    return ask


COSTS = (
    Cost(name="a run of the decoder for each token", make=without_guesses),
    Cost(name="the segmenter's encoder after the reply", make=encoder_afterwards, least_cores=2),
    Cost(name="all cores for every graph", make=all_threads, least_cores=2),
    Cost(name="attention in blocks", make=attention_in_blocks),
    Cost(name="the prompt in two runs", make=prompt_in_two_runs),
    Cost(name="pictures and masks by Pillow, OpenCV, NumPy", make=kernels_in_python),
    Cost(name="ONNX Runtime's operators, none compiled here", make=operators_as_functions, same_numbers=False),
    Cost(name=ALL_COSTS, make=none_saved, same_numbers=False),
)
PORTABLE = "graphs of plain operators"


def compare(now: Ask, before: Ask, samples: Sequence[Sample]) -> dict[str, Any]:
    """Asks both every question in turns and scores both.

    Returns:
        `end_to_end_ms` (`now` and `before` medians, `ratio` with its interval), `saved_ms`, `giou` of both,
        `giou_lost` (what the saving costs, paired, with its interval), `equal_answers` and `equal_masks`.
    """
    sides = [("now", now), ("before", before)]
    for sample in samples[:_WARM_UP]:
        for _, ask in sides:
            ask(sample.image_rgb, sample.text)
    records: dict[str, list[Record]] = {"now": [], "before": []}
    equal_answers = equal_masks = 0
    for index, sample in enumerate(samples):
        image_rgb = sample.image_rgb
        results = {}
        for name, ask in sides if index % 2 == 0 else sides[::-1]:
            start = time.perf_counter()
            results[name] = ask(image_rgb, sample.text)
            latency_ms = (time.perf_counter() - start) * 1e3
            records[name].append(score_sample(sample, results[name], latency_ms=latency_ms))
        equal_answers += results["now"].answer == results["before"].answer
        equal_masks += np.array_equal(results["now"].masks, results["before"].masks)
    times = paired(*([one.latency_ms for one in records[name]] for name, _ in sides))
    lost, interval = giou_loss(records["now"], records["before"])
    return {
        "end_to_end_ms": {
            "now": times["segzero_median"],
            "before": times["baseline_median"],
            "ratio": times["ratio"],
            "ratio_interval_95": times["ratio_interval_95"],
        },
        "saved_ms": times["baseline_median"] - times["segzero_median"],
        "giou": {name: statistics.fmean(one.iou for one in of_side) for name, of_side in records.items()},
        "giou_lost": lost,
        "giou_lost_interval_95": list(interval),
        "equal_answers": equal_answers,
        "equal_masks": equal_masks,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every cost, on the cores that this process is pinned to."""
    pin_to_cores(arguments.only_threads)
    bundle = Bundle.open(arguments.bundle)
    samples = read_dataset(arguments.test, limit=arguments.questions)
    costs = [cost for cost in COSTS if cost.least_cores <= arguments.only_threads]
    if arguments.portable:
        portable = Bundle.open(arguments.portable)
        costs[-1:] = [
            Cost(name=PORTABLE, make=lambda _: as_it_is(portable)),
            Cost(name=ALL_COSTS, make=lambda _: none_saved(portable)),
        ]
    rows = {}
    for cost in costs:
        # Loaded anew for each, so that no guess comes from what an earlier comparison asked.
        rows[cost.name] = compare(as_it_is(bundle), cost.make(bundle), samples)
        print(f"{cost.name}: {line(rows[cost.name])}", file=sys.stderr)
    return {"bundle": bundle_card(bundle), "num_questions": len(samples), "costs": rows}


def line(row: dict[str, Any]) -> str:
    """One cost in words."""
    times = row["end_to_end_ms"]
    low, high = times["ratio_interval_95"]
    return (
        f"{times['before']:.1f} ms before, {times['now']:.1f} ms now, {times['ratio']:.2f}x ({low:.2f} to {high:.2f}); "
        f"gIoU {row['giou']['before']:.3f}, {row['giou']['now']:.3f}; {row['equal_answers']} answers equal, "
        f"{row['equal_masks']} masks"
    )


def main() -> None:
    """Runs every number of cores in a child process and writes one result file."""
    arguments = _parse()
    if arguments.only_threads:
        print(json.dumps(measure(arguments)))
        return
    read_dataset(arguments.test, limit=1)  # refused here, in one line, not in a child
    for folder in filter(None, (arguments.bundle, arguments.portable)):
        Bundle.open(folder, verify="size")
    by_threads = {}
    for threads in arguments.threads:
        command = [sys.executable, "-m", "benchmarks.avoided_costs", *sys.argv[1:], "--only-threads", str(threads)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        by_threads[str(threads)] = json.loads(child.stdout.splitlines()[-1])
    document = {"dataset": arguments.test.name, "by_threads": by_threads}
    path = write_result("avoided_costs", document, arguments.out, variant=arguments.variant)
    print(json.dumps({"result": path.name, **document}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("test", type=Path, metavar="TEST", help="a dataset folder, as `segzero scenes` writes it")
    parser.add_argument("--bundle", help="default: the embedded one")
    parser.add_argument("--portable", help="the same weights and storage, exported with --flavour portable")
    parser.add_argument("--questions", type=positive_integer, default=60, metavar="N", help="the first N (60)")
    parser.add_argument("--threads", type=positive_integer, nargs="+", default=[1, 2], help="cores (1 2)")
    parser.add_argument("--variant", default="", help="put behind the file's name, so that several can be kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    parser.add_argument("--only-threads", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run_and_exit(main, "avoided_costs")
