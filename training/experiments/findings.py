"""What an experiment has shown, as one JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segzero_rt.environment import environment_card
from segzero_rt.errors import SegZeroError

from ..questions import REASONING_KINDS
from .design import Arm
from .intervals import Interval, Scores, difference, mean_interval
from .jobs import BASE, CURVE, MEASURED, RETENTION, TEST, VALIDATION, Job, JobKind, Workplace, label, long_jobs
from .measures import Score, read_scores, summary
from .retention import compare_retention
from .settings import Settings
from .shared_rows import OOD_SPLITS
from .verdicts import CLAIMS, Claim, judge

OOD_MEAN = "ood_mean"
PACKAGES = ("segzero-rt", "numpy", "torch", "transformers", "trl", "accelerate", "matplotlib")
REASONING_ON_TEST = "reasoning_on_test"
"""The kinds that no policy was shown boxes for before."""
PAIRS = (
    (Arm.GRPO_REASONING, Arm.SFT_REASONING), (Arm.GRPO_REASONING, Arm.SFT_ANSWERS),
    (Arm.GRPO_REASONING, Arm.GRPO_ANSWERS), (Arm.GRPO_ANSWERS, Arm.SFT_ANSWERS),
    (Arm.SFT_REASONING, Arm.SFT_ANSWERS),
)  # fmt: skip
"""Arms whose difference is told on every split."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All scores of an experiment."""

    scores: Mapping[str, Mapping[str, Scores]]
    """Label of a policy → split → scores of each seed."""

    def difference(self, first: str, second: str, splits: Sequence[str]) -> Interval:
        """`first − second`, averaged over splits."""
        return difference([(self.scores[first][split], self.scores[second][split]) for split in splits])


def missing(workplace: Workplace) -> list[str]:
    """Labels of policies, some of whose seeds are not measured yet; in order."""
    jobs = _jobs(workplace, JobKind.MEASURE)
    return list(dict.fromkeys(label(job) for job in jobs if workplace.result(job) is None))


def read_measured(workplace: Workplace) -> Measured:
    """Reads what the measuring jobs have written, of policies whose every seed is measured.

    Raises:
        SegZeroError: a policy that a claim is about is not among them.
    """
    left_out = missing(workplace)
    needed = {name for claim in CLAIMS for name in (claim.first, claim.second)}
    if unknown := [name for name in left_out if name in needed]:
        raise SegZeroError(
            f"expected {', '.join(sorted(needed))} to be measured, {', '.join(unknown)} not yet; call the experiment "
            "again without --report: it goes on"
        )
    scores: dict[str, dict[str, list[list[Score]]]] = {}
    for job in _jobs(workplace, JobKind.MEASURE):
        name = label(job)
        if name in left_out:
            continue
        for split in MEASURED:
            found = read_scores(workplace.job_folder(job) / f"{split}.jsonl")
            scores.setdefault(name, {}).setdefault(split, []).append(found)
    return Measured(scores=scores)


def findings(workplace: Workplace, settings: Settings, cost: Mapping[str, Any]) -> dict[str, Any]:
    """The document of the report, plain JSON types."""
    measured = read_measured(workplace)
    return {
        "settings": settings.to_json(),
        "environment": environment_card(PACKAGES),
        "cost": dict(cost),
        "left_out": missing(workplace),
        "rates": _rates(workplace),
        "curves": _curves(workplace),
        "policies": {name: _policy(measured, name) for name in measured.scores},
        "differences": _differences(measured),
        "claims": [_claim(measured, claim) for claim in CLAIMS],
    }


def _jobs(workplace: Workplace, kind: JobKind) -> list[Job]:
    return [job for job in long_jobs(workplace.preset) if job.kind is kind]


def _rates(workplace: Workplace) -> dict[str, Any]:
    """For each arm what every rate validated at, and which one was taken."""
    tried: dict[str, dict[str, float]] = {arm.value: {} for arm in Arm}
    for job in _jobs(workplace, JobKind.SWEEP):
        result = workplace.result(job)
        assert job.arm is not None and job.rate is not None and result is not None
        tried[job.arm.value][f"{job.rate:.3g}"] = result[VALIDATION]
    return {arm.value: {"tried": tried[arm.value], "chosen": workplace.best_rate(arm)} for arm in Arm}


def _curves(workplace: Workplace) -> dict[str, list[list[list[float]]]]:
    """Label → for each seed that is done, (samples, validation) pairs."""
    curves: dict[str, list[list[list[float]]]] = {}
    for job in _jobs(workplace, JobKind.FINAL):
        if (result := workplace.result(job)) is not None:
            curves.setdefault(label(job), []).append(result[CURVE])
    return curves


def _policy(measured: Measured, name: str) -> dict[str, Any]:
    scores = measured.scores[name]
    splits = {split: _split(scores[split]) for split in MEASURED}
    ood = difference([(scores[split], None) for split in OOD_SPLITS])
    reasoning = [[one for one in seed if one.kind in REASONING_KINDS] for seed in scores[TEST]]
    document: dict[str, Any] = {"splits": splits, OOD_MEAN: ood.to_json()}
    if all(reasoning):
        document[REASONING_ON_TEST] = mean_interval(reasoning).to_json()
    if name != BASE:
        document[RETENTION] = compare_retention(measured.scores[BASE][RETENTION], scores[RETENTION]).to_json()
    return document


def _split(arm: Scores) -> dict[str, Any]:
    every = [score for seed in arm for score in seed]
    return {
        **mean_interval(arm).to_json(),
        "by_seed": [float(np.mean([score.value for score in seed])) for seed in arm],
        **{key: value for key, value in summary(every).items() if key != "value"},
    }


def _differences(measured: Measured) -> list[dict[str, Any]]:
    """Every pair of arms, and every policy against the base, on every split."""
    pairs = [(first.value, second.value) for first, second in PAIRS]
    pairs = [pair for pair in pairs if measured.scores.keys() >= set(pair)]
    pairs += [(name, BASE) for name in measured.scores if name != BASE]
    columns: dict[str, Sequence[str]] = {TEST: (TEST,), **{split: (split,) for split in OOD_SPLITS}}
    columns |= {OOD_MEAN: OOD_SPLITS, RETENTION: (RETENTION,)}
    return [
        {
            "first": first, "second": second,
            **{name: measured.difference(first, second, splits).to_json() for name, splits in columns.items()},
        }
        for first, second in pairs
    ]  # fmt: skip


def _claim(measured: Measured, claim: Claim) -> dict[str, Any]:
    interval = measured.difference(claim.first, claim.second, claim.splits)
    return {
        "name": claim.name, "text": claim.text, "first": claim.first, "second": claim.second,
        "splits": list(claim.splits), "above": claim.above, "least_mean": claim.least_mean,
        **interval.to_json(), "verdict": judge(interval, claim.above, claim.least_mean).value,
    }  # fmt: skip
