"""The report of an experiment: `report.json` with everything, `report.md` with tables, verdicts and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .design import Arm
from .findings import OOD_MEAN, REASONING_ON_TEST, findings
from .jobs import RETENTION, TEST, Workplace
from .plots import plot_curves, plot_rates
from .settings import Settings
from .shared_rows import OOD_SPLITS

REPORT_JSON, REPORT_MD, CURVES_NAME, RATES_NAME = "report.json", "report.md", "curves.svg", "rates.svg"


def write_report(workplace: Workplace, settings: Settings, cost: Mapping[str, Any]) -> dict[str, Any]:
    """Writes all files of the report; returns the document.

    Raises:
        SegZeroError: too little is measured yet for the claims.
    """
    document = findings(workplace, settings, cost)
    plot_curves(workplace.folder / CURVES_NAME, document["curves"])
    plot_rates(workplace.folder / RATES_NAME, {arm: rates["tried"] for arm, rates in document["rates"].items()})
    texts = {REPORT_JSON: json.dumps(document, indent=1, allow_nan=False) + "\n", REPORT_MD: render(document)}
    for name, text in texts.items():
        temporary = workplace.folder / f"{name}.part"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(workplace.folder / name)
    return document


def render(document: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    settings = document["settings"]["whole"]
    recipe = settings["grpo"]
    questions = settings["steps"] * recipe["prompts_per_step"]
    arms = f"{len(settings['seeds'])} seeds for each arm, after {len(settings['grpo_rates'])} learning rates each"
    about = (
        f"From one base policy: {questions} questions of the same kinds, {questions * recipe['num_generations']} "
        f"samples (replies learnt from) and {arms} on validation. Values are box gIoU of greedy answers; intervals are "
        f"95 % of a paired bootstrap over pictures and seeds; `detectable` is the difference that 80 of 100 such "
        f"experiments would show."
    )
    cost = document["cost"]
    estimated = f"Estimated before it began: {cost['hours']:.1f} hours, {cost['workers']} processes of one thread."
    if document["left_out"]:
        about += f" Not measured yet: {', '.join(document['left_out'])}."
    parts = [
        f"# Experiment `{settings['name']}`: GRPO against supervised fine-tuning", about,
        "## Claims", _claims(document), "## Policies", _policies(document), "## Differences", _differences(document),
        "## Retention", _retention(document), "## By kind of question, test", _by_kind(document),
        "## Learning rates", _rates(document), f"![learning rates]({RATES_NAME})",
        "## Learning curves", f"![learning curves]({CURVES_NAME})", "## Cost", estimated,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _interval(entry: Mapping[str, float], *, signed: bool = False, digits: int = 3) -> str:
    sign = "+" if signed else ""
    mean, low, high = (format(entry[name], f"{sign}.{digits}f") for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _mean(entry: Mapping[str, float] | None) -> str:
    return "–" if entry is None else f"{entry['mean']:.3f}"


def _claims(document: Mapping[str, Any]) -> str:
    rows = [
        [
            claim["text"], f"{claim['first']} − {claim['second']}", _interval(claim, signed=True),
            f"{claim['above']:+.2f}" + ("" if claim["least_mean"] is None else f", mean {claim['least_mean']:+.2f}"),
            f"{claim['detectable']:.3f}", f"**{claim['verdict']}**",
        ]
        for claim in document["claims"]
    ]  # fmt: skip
    return _table(["claim", "difference", "mean (95 %)", "above", "detectable", "verdict"], rows)


def _policies(document: Mapping[str, Any]) -> str:
    rows = []
    for name, policy in document["policies"].items():
        splits = policy["splits"]
        rows.append([
            name, _interval(splits[TEST]), _mean(policy.get(REASONING_ON_TEST)),
            *(_mean(splits[split]) for split in OOD_SPLITS),
            _interval(policy[OOD_MEAN]), f"{splits[RETENTION]['mean']:.3f}", f"{splits[TEST]['parse_rate']:.3f}",
            f"{splits[TEST]['thinking_tokens']:.1f}",
        ])  # fmt: skip
    head = ["policy", TEST, "of it: reasoning", *OOD_SPLITS, "mean of ood", RETENTION, "parsed", "thinking tokens"]
    seeds = "; ".join(
        f"{name}: {', '.join(format(value, '.3f') for value in policy['splits'][TEST]['by_seed'])}"
        for name, policy in document["policies"].items()
    )
    return f"{_table(head, rows)}\n\nTest, seed by seed: {seeds}."


def _differences(document: Mapping[str, Any]) -> str:
    columns = [TEST, *OOD_SPLITS, OOD_MEAN, RETENTION]
    rows = [
        [f"{row['first']} − {row['second']}", *(_interval(row[name], signed=True) for name in columns)]
        for row in document["differences"]
    ]
    return _table(["difference", *columns], rows)


def _retention(document: Mapping[str, Any]) -> str:
    rows = []
    for name, policy in document["policies"].items():
        if (entry := policy.get(RETENTION)) is None:
            continue
        lost = [_interval(entry["lost_points"][group], signed=True, digits=1) for group in ("all", "visual", "found")]
        kept = entry["kept"]["all"]
        rows.append([name, *lost, "–" if kept is None else f"{kept:.3f}"])
    return _table(["policy", "points lost", "visual questions", "things by name", "kept"], rows)


def _by_kind(document: Mapping[str, Any]) -> str:
    kinds = list(next(iter(document["policies"].values()))["splits"][TEST]["by_kind"])
    rows = [
        [name, *(f"{policy['splits'][TEST]['by_kind'][kind]['value']:.3f}" for kind in kinds)]
        for name, policy in document["policies"].items()
    ]
    return _table(["policy", *kinds], rows)


def _rates(document: Mapping[str, Any]) -> str:
    rows = [
        [
            arm.value,
            ", ".join(f"{rate}: {value:.3f}" for rate, value in rates["tried"].items()),
            f"{rates['chosen']:.3g}",
        ]
        for arm in Arm
        for rates in (document["rates"][arm.value],)
    ]
    return _table(["arm", "validation by rate", "chosen"], rows)
