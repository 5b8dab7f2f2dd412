r"""Box gIoU of policy folders on any split, by kind of question; with a base, also what was gained over it.

    python -m training.experiments.evaluate runs/grpo/hf --split validation --questions 200
    python -m training.experiments.evaluate runs/a/hf runs/b/hf --split ood_function \
        --base training/checkpoints/tabletop/base_brief --json

Policies answer greedily, in PyTorch and float32, all the same questions. Choose by `validation`; `test` and the `ood_*`
splits are for what has been chosen. The test questions of the README, seed 7, are those of `segzero scenes`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segzero_rt.commands.options import positive_integer
from segzero_rt.errors import SegZeroError

from .design import EMPTY_THINKING
from .shared_rows import DEFAULT_FOLDER


def main(argv: Sequence[str] | None = None) -> int:
    """Asks every policy; prints a table on stderr and one JSON document on stdout with `--json`."""
    arguments = _arguments(argv)
    try:
        document = evaluate_folders(arguments)
    except SegZeroError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    print(render(document), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(document))
    return 0


def evaluate_folders(arguments: argparse.Namespace) -> dict[str, Any]:
    """The document: `policies`, each with `measures.summary`, its `interval_95`, and `gain` over the base.

    Raises:
        SegZeroError: no such split, kind or policy.
    """
    import torch

    from ..picture_memory import TowerMemories
    from .intervals import difference, mean_interval
    from .live_policy import LivePolicy
    from .measures import score_rows, summary, write_scores
    from .shared_rows import split_rows

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    kinds = () if arguments.kinds is None else tuple(arguments.kinds.split(","))
    rows = split_rows(arguments.rows, arguments.split, seed=arguments.seed, num_rows=arguments.questions, kinds=kinds)
    start = EMPTY_THINKING if arguments.without_reasoning else ""
    folders = list(dict.fromkeys([*([arguments.base] if arguments.base else []), *arguments.policies]))
    memories = TowerMemories(len(rows))
    scores = {
        folder: score_rows(LivePolicy.load(folder, memories=memories), rows, reply_start=start, told=folder)
        for folder in folders
    }
    if arguments.scores is not None:
        arguments.scores.mkdir(parents=True, exist_ok=True)
        for number, folder in enumerate(folders):
            write_scores(arguments.scores / f"{number}-{arguments.split}.jsonl", scores[folder])
    policies = []
    for folder in folders:
        entry = {"policy": folder, **summary(scores[folder])}
        entry["interval_95"] = mean_interval([scores[folder]]).to_json()
        if arguments.base and folder != arguments.base:
            entry["gain"] = difference([([scores[folder]], [scores[arguments.base]])]).to_json()
        policies.append(entry)
    return {"split": arguments.split, "seed": arguments.seed, "policies": policies}


def render(document: dict[str, Any]) -> str:
    """One line per policy, in Markdown."""
    kinds = list(document["policies"][0]["by_kind"])
    head = ["policy", "box gIoU", "95 %", "gain", "parsed", "thinking", *kinds]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for entry in document["policies"]:
        low, high = entry["interval_95"]["low"], entry["interval_95"]["high"]
        gain = entry.get("gain")
        told = "–" if gain is None else f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        cells = [
            entry["policy"], f"{entry['value']:.3f}", f"{low:.3f} to {high:.3f}", told, f"{entry['parse_rate']:.3f}",
            f"{entry['thinking_tokens']:.1f}", *(f"{entry['by_kind'][kind]['value']:.3f}" for kind in kinds),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.experiments.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("policies", nargs="+", metavar="POLICY", help="folder of a policy, such as RUN/hf")
    parser.add_argument("--base", metavar="DIR", help="policy that the others are compared with, question by question")
    parser.add_argument("--split", default="validation", metavar="S", help="(default: validation)")
    parser.add_argument("--kinds", metavar="K,K", help="these kinds of question in turn (default: all of the split)")
    parser.add_argument("--questions", type=positive_integer, default=200, metavar="N", help="(default: 200)")
    parser.add_argument("--seed", type=int, default=7, metavar="K", help="of the questions (default: 7)")
    parser.add_argument(
        "--without-reasoning",
        action="store_true",
        help="replies begin behind an empty thinking, answers follow at once",
    )
    add_shared_options(parser)
    parser.add_argument("--scores", type=Path, metavar="DIR", help="also write every question's score and reply here")
    return parser.parse_args(argv)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Options of every program that measures."""
    parser.add_argument(
        "--rows", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="rendered questions, kept (default: runs/rows)"
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


if __name__ == "__main__":
    sys.exit(main())
