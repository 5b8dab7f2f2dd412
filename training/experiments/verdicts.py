"""The claims of the papers as differences between arms, and what an interval says about each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .design import Arm
from .intervals import Interval
from .jobs import BASE, RETENTION, TEST
from .shared_rows import OOD_SPLITS


class Verdict(str, Enum):
    """What came of a claim."""

    HOLDS = "holds"
    SMALLER = "holds, but smaller than asked for"
    """The difference is there, its mean is below what the project asks for."""
    UNDECIDED = "undecided"
    """The interval reaches to both sides: see what difference could have been seen."""
    FAILS = "fails"


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """`first − second`, averaged over splits, is more than `above`."""

    name: str
    text: str
    first: str
    """Label of a policy (see `jobs.label`)."""
    second: str
    splits: tuple[str, ...]
    above: float
    """The whole interval has to lie above it."""
    least_mean: float | None = None
    """And the mean has to be this at least."""


_RL, _SFT = Arm.GRPO_REASONING.value, Arm.SFT_REASONING.value
NO_WORSE = -0.01
"""A point of 100: what counts as no loss."""

CLAIMS = (
    Claim(
        name="in distribution", text="GRPO is no worse than SFT on new questions of the kinds they were trained on",
        first=_RL, second=_SFT, splits=(TEST,), above=NO_WORSE,
    ),
    Claim(
        name="out of distribution", text="GRPO is clearly better than SFT, mean of the splits that hold something out",
        first=_RL, second=_SFT, splits=OOD_SPLITS, above=0.0, least_mean=0.03,
    ),
    Claim(
        name="new functions", text="GRPO is better than SFT on functions that no training question names",
        first=_RL, second=_SFT, splits=("ood_function",), above=0.0,
    ),
    Claim(
        name="no forgetting", text="GRPO keeps what the base policy could answer, within a point of 100",
        first=_RL, second=BASE, splits=(RETENTION,), above=NO_WORSE,
    ),
    Claim(
        name="reasoning", text="GRPO with reasoning is better out of distribution than GRPO without",
        first=_RL, second=Arm.GRPO_ANSWERS.value, splits=OOD_SPLITS, above=0.0,
    ),
    Claim(
        name="it learns", text="GRPO is better than the base policy on the kinds that it was trained on",
        first=_RL, second=BASE, splits=(TEST,), above=0.0, least_mean=0.15,
    ),
)  # fmt: skip
"""The papers' claims, the last one a condition for the others to mean anything."""


def judge(interval: Interval, above: float, least_mean: float | None = None) -> Verdict:
    """What an interval of a difference says about "more than so much"."""
    if interval.low > above:
        small = least_mean is not None and interval.mean < least_mean
        return Verdict.SMALLER if small else Verdict.HOLDS
    return Verdict.FAILS if interval.high <= above else Verdict.UNDECIDED
