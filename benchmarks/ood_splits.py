"""How a bundle does on what training never showed: gIoU on test and on every out-of-distribution split.

    python -m benchmarks.ood_splits --scenes scenes
    python -m benchmarks.ood_splits --bundle my-bundle --count 200 --scenes scenes

Each split asks some kinds of question only, so beside it stands what the test split gives for the same kinds: the
difference is what the combination costs that was held out, as far as two samples of scenes tell. Scenes are written
once to `SCENES/<split>-<count>-<seed>` and read again by a later run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segzero_rt.commands.options import positive_integer
from segzero_rt.commands.progress import Progress
from segzero_rt.dataset import Sample, read_dataset
from segzero_rt.environment import bundle_card
from segzero_rt.errors import SegZeroError
from segzero_rt.evaluation import Predict, Record, evaluate, summarize
from segzero_rt.pipeline import SegZero
from training.question_scenes import SPLIT_QUERY_KINDS, write_samples

from .measuring import RESULTS, run_and_exit, write_result

TEST = "test"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes what scenes are missing, asks everything, prints a table on stderr and the document on stdout."""
    arguments = _arguments(argv)
    try:
        pipeline = SegZero.load(arguments.bundle, backend="cpu", threads=arguments.threads)
        records: dict[str, list[Record]] = {}
        for split in (TEST, *SPLIT_QUERY_KINDS):
            count = arguments.test_count if split == TEST else arguments.count
            samples = scenes(arguments.scenes, split, count, arguments.seed)
            records[split] = ask(split, samples, lambda sample, image_rgb: pipeline(image_rgb, sample.text))
    except SegZeroError as error:
        print(f"ood_splits: {error}", file=sys.stderr)
        return 2
    document = {
        "bundle": bundle_card(pipeline.bundle),
        "seed": arguments.seed,
        "splits": {split: compare(found, records[TEST]) for split, found in records.items()},
    }
    path = write_result("ood_splits", document, arguments.out)
    print(render(document["splits"]), file=sys.stderr)
    print(json.dumps({**document, "result": path.name}))
    return 0


def scenes(folder: Path, split: str, count: int, seed: int) -> list[Sample]:
    """`count` samples of a split, written to `folder` unless an earlier run has written them.

    Raises:
        DatasetError: what lies there cannot be read.
    """
    target = folder / f"{split}-{count}-{seed}"
    if not target.exists():
        write_samples(target, split, seed, count)
    return read_dataset(target)


def ask(split: str, samples: Sequence[Sample], predict: Predict) -> list[Record]:
    """One record per sample."""
    records = []
    with Progress(len(samples), split) as progress:
        for record, _ in evaluate(samples, predict):
            records.append(record)
            progress.step()
    return records


def compare(records: Sequence[Record], test: Sequence[Record]) -> dict[str, Any]:
    """`segzero eval`'s figures of a split, and the test split's gIoU over the same kinds of question.

    Returns:
        `summarize`'s document without latencies, and `same_kinds_on_test`: `giou` weighted by kind as in `records`, and
        `num_samples`; None where the test split has no question of a kind.
    """
    summary = summarize(records)
    del summary["latency_ms"]
    kinds = summary["by_kind"]
    same = [record for record in test if record.kind in kinds]
    of_kind = {kind: [record.iou for record in same if record.kind == kind] for kind in kinds}
    beside = None
    if all(of_kind.values()):
        weighted = sum(row["num_samples"] * sum(of_kind[kind]) / len(of_kind[kind]) for kind, row in kinds.items())
        beside = {"giou": weighted / len(records), "num_samples": len(same)}
    return {**summary, "same_kinds_on_test": beside}


def render(splits: dict[str, dict[str, Any]]) -> str:
    """One line per split, in Markdown."""
    lines = [
        "| split | questions | gIoU | 95 % interval | test, same kinds | parse | false none | by kind |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for split, row in splits.items():
        low, high = row["giou_interval_95"]
        beside = row["same_kinds_on_test"]
        kinds = ", ".join(f"{kind} {one['giou']:.3f}" for kind, one in row["by_kind"].items())
        false_none = row["false_none_rate"]
        lines.append(
            f"| {split} | {row['num_samples']} | {row['giou']:.3f} | {low:.3f} to {high:.3f} "
            f"| {'–' if beside is None else format(beside['giou'], '.3f')} | {row['parse_rate']:.3f} "
            f"| {'–' if false_none is None else format(false_none, '.3f')} | {kinds} |"
        )
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ood_splits", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--scenes", type=Path, required=True, metavar="DIR", help="where the datasets are kept")
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded `tabletop`")
    parser.add_argument("--count", type=positive_integer, default=100, metavar="N", help="questions of each ood split")
    parser.add_argument("--test-count", type=positive_integer, default=300, metavar="N", help="of the test split")
    parser.add_argument("--seed", type=int, default=7, metavar="K")
    parser.add_argument("--threads", type=positive_integer, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the result file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_and_exit(main, "ood_splits")
