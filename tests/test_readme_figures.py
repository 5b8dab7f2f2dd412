"""Figures in the pages' sentences are what the committed results say; the tables are held by test_readme_table.py."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme_table import newest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE, BENCHMARKS = "README.md", "benchmarks/README.md"


def words(text: str) -> str:
    """Without line ends: sentences may be broken anywhere."""
    return " ".join(text.split())


TEXTS = {page: words((REPOSITORY / page).read_text(encoding="utf-8")) for page in (PAGE, BENCHMARKS)}


def interval(document: dict[str, Any], name: str = "giou") -> str:
    low, high = document[f"{name}_interval_95"]
    return f"{document[name]:.3f} ({low:.3f} to {high:.3f})"


def ratio(side: dict[str, Any]) -> str:
    low, high = side["end_to_end_ms"]["ratio_interval_95"]
    return f"{side['end_to_end_ms']['ratio']:.1f}x ({low:.2f} to {high:.2f})"


def none_answers(document: dict[str, Any]) -> str:
    kind = document["by_kind"]["none"]
    return f"{round(kind['giou'] * kind['num_samples'])} of {kind['num_samples']}"


def loop_row(document: dict[str, Any], arm: str) -> str:
    one = document["arms"][arm]
    rollout, rest = (statistics.median(one[name]) for name in ("rollout_s", "rest_s"))
    return f"| {rollout:.2f} | {rest:.2f} | {one['loop_samples_per_s']:.2f}"


Sentence = Callable[[dict[str, Any]], str]
FIGURES: list[tuple[str, str, Sentence]] = [
    (PAGE, "ood_splits", lambda one: (
        f"{one['splits']['ood_function']['by_kind']['function']['giou']:.3f} of gIoU by function on `ood_function`")),
    (PAGE, "eval_test900_int8", lambda one: (
        f"gIoU is {one['giou']:.3f}, and {none_answers(one)} questions about something absent get none")),
    (PAGE, "thinking_ablation", lambda one: f"in {100 * one['swapped']['follows']:.0f} of 100 cases"),
    (PAGE, "rollout", lambda one: f"{one['speed_up']['shared']['loop']:.1f} times the samples per second of TRL's"),
    (PAGE, "export_size_int4", lambda one: (
        f"random weights, {one['checkpoint_bytes'] / 1e9:.1f} GB) became an int4 bundle in "
        f"{one['exports']['int4']['peak_bytes'] / 1e9:.1f} GB of memory")),
    (PAGE, "large_answer", lambda one: (
        f"a question at {' x '.join(map(str, one['input_size_hw']))} in {one['timings_ms']['total'] / 1e3:.0f} s")),
    (BENCHMARKS, "eval_test300_int8", lambda one: f"gIoU of all kinds together {one['giou']:.3f}"),
    (BENCHMARKS, "eval_test300_int8", lambda one: f"answered with none {none_answers(one)}"),
    (BENCHMARKS, "eval_test300_int8", lambda one: f"false none {100 * one['false_none_rate']:.1f} %"),
    (BENCHMARKS, "eval_test300_float16", lambda one: f"float16 {none_answers(one).split(' of ')[0]} of"),
    (BENCHMARKS, "eval_test900_int8", lambda one: f"{none_answers(one)} such are answered with none"),
    (BENCHMARKS, "eval_test900_int8", lambda one: f"gIoU there is {interval(one)}"),
    (BENCHMARKS, "eval_test300_int4", lambda one: f"the pair scores {interval(one)}"),
    (BENCHMARKS, "eval_test300_awq", lambda one: interval(one).rstrip(")")),
    (BENCHMARKS, "eval_test300_qdq", lambda one: interval(one).rstrip(")")),
    (BENCHMARKS, "baseline_int8", lambda one: f"{one['by_threads']['1']['end_to_end_ms']['ratio']:.1f}x on one core"),
    (BENCHMARKS, "baseline_int8", lambda one: ratio(one["by_threads"]["2"])),
    (BENCHMARKS, "thinking_ablation", lambda one: (
        f"follows in {100 * one['swapped']['follows']:.0f} % of {one['swapped']['num_samples']}")),
    (BENCHMARKS, "thinking_ablation", lambda one: (
        "from {normal} to {removed} with the thinking removed, to {shuffled} with it shuffled".format(
            **{name: f"{row['giou']:.3f}" for name, row in one["giou"].items()}))),
    (BENCHMARKS, "rollout", lambda one: loop_row(one, "trl")),
    (BENCHMARKS, "rollout", lambda one: loop_row(one, "shared")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("page", "result", "sentence"),
    FIGURES,
    ids=[f"{page}: {result} {n}" for n, (page, result, _) in enumerate(FIGURES)],
)
def test_a_sentence_says_what_its_result_says(page: str, result: str, sentence: Sentence) -> None:
    name, document = newest(result)
    assert words(sentence(document)) in TEXTS[page], f"{page} and benchmarks/results/{name} disagree"


def test_the_thinking_is_worth_what_the_page_says() -> None:
    giou = newest("thinking_ablation")[1]["giou"]
    assert "without it gIoU is halved" in TEXTS[PAGE] and 0.4 <= giou["removed"]["giou"] / giou["normal"]["giou"] <= 0.6


PROGRAMS = sorted(
    {
        (page, line.strip())
        for page in TEXTS
        for line in re.findall(
            r"^(?!<!--).*?python -m (benchmarks\.[^`#\n]+)",
            (REPOSITORY / page).read_text(encoding="utf-8").replace("\\\n", " "),
            re.M,
        )
    }
)


@pytest.mark.parametrize(("page", "line"), PROGRAMS, ids=lambda text: text[:60])
def test_programs_that_the_pages_name_exist_with_their_options(page: str, line: str) -> None:
    module, *rest = line.split()
    source = REPOSITORY / f"{module.replace('.', '/')}.py"
    assert source.is_file(), f"{page}: {line}"
    text = source.read_text(encoding="utf-8")
    missing = [part for part in rest if part.startswith("--") and f'"{part.split("=")[0]}"' not in text]
    assert not missing, f"{page}: {line}: {missing}"
