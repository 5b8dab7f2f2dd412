"""Which words of its thinking an answer needs: some are left out by rule, and the policy answers behind what is left.

    python -m benchmarks.thinking_brevity TEST [--bundle B] [--limit N]

Every question is asked once as it is, and once for each rule that changes its thinking, the reply being made to begin
with what the rule leaves. So gIoU beside the tokens that are left tells how much shorter the thinking of this policy
could be, without any training. The rules know the sentences of `training/phrases.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.dataset import Sample, read_dataset
from segzero_rt.evaluation import Record, score_sample
from segzero_rt.pipeline import SegZero

from .measuring import RESULTS, run_and_exit, write_result
from .thinking_ablation import BundleSubject, Subject, forced_start, giou_by_kind, told

_PLACE = re.compile(r" (?:(?:at|in) the )?(?:(?:upper|lower) (?:left|right)|left|right|top|bottom|centre)(?=[.,]|$)")
"""As the last words on a thing; what is "left of" another stays."""
_PREPOSITION = re.compile(r" (?:at the (?=upper|lower|left|right|top|bottom)|in the (?=centre))")
_OPENING = re.compile(r"^There (?:is|are) (?:an? )?")
_MARKS = re.compile(r"\w+|[^\w\s]")

Rule = Callable[[str], str]

RULES: dict[str, Rule] = {
    "as it is": lambda thinking: thinking,
    "without 'There is a'": lambda thinking: _OPENING.sub("", thinking),
    "without 'at the'": lambda thinking: _PREPOSITION.sub(" ", thinking),
    "without both": lambda thinking: _PREPOSITION.sub(" ", _OPENING.sub("", thinking)),
    "without places": lambda thinking: _PLACE.sub("", thinking),
}


def shorten(samples: Sequence[Sample], subject: Subject) -> dict[str, Any]:
    """Asks every sample under every rule.

    Returns:
        By rule: gIoU (overall with its interval, by kind) and the mean number of words and marks that are left.
    """
    records: dict[str, list[Record]] = {rule: [] for rule in RULES}
    marks: dict[str, list[int]] = {rule: [] for rule in RULES}
    for sample in told(samples, "shortened"):
        normal = subject.ask(sample, "")
        thinking = normal.answer.thinking
        for name, rule in RULES.items():
            left = rule(thinking)
            result = normal if left == thinking else subject.ask(sample, forced_start(left))
            records[name].append(score_sample(sample, result, latency_ms=0.0))
            marks[name].append(len(_MARKS.findall(left)))
    return {name: {**giou_by_kind(rows), "marks": float(np.mean(marks[name]))} for name, rows in records.items()}


def main() -> None:
    """Asks under all rules and writes one result file."""
    parser = argparse.ArgumentParser(description="gIoU with words of the thinking left out")
    parser.add_argument("test", type=Path, help="dataset folder of tabletop questions")
    parser.add_argument("--bundle", help="default: the embedded one")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    arguments = parser.parse_args()
    samples = read_dataset(arguments.test, limit=arguments.limit)
    pipeline = SegZero.load(arguments.bundle, backend="cpu", threads=arguments.threads)
    result = {"rules": shorten(samples, BundleSubject(pipeline))}
    document = {"test": arguments.test.name, "bundle": pipeline.bundle.manifest.name, **result}
    path = write_result("thinking_brevity", document, arguments.out)
    print(json.dumps({"result": str(path), **result}))


if __name__ == "__main__":
    run_and_exit(main, "thinking_brevity")
