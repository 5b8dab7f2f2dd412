"""What is compared: four ways to train one base policy, and the numbers that decide a whole experiment.

What a *sample* is: one reply that is learnt from. GRPO's samples are the replies that the policy writes itself,
`num_generations` to each question; supervised fine-tuning's are labelled replies. Arms see the same questions in the
same number of samples, so that SFT sees each labelled example `num_generations` times, in as many passes over the
questions, while GRPO sees each question once and answers it that often. Where SFT sees each example once, so that the
number of *questions* is the same, the arm's name ends in `_once`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from segzero_rt.answer_format import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

from .. import grpo_presets
from ..grpo_presets import GrpoPreset

EMPTY_THINKING = f"{THINK_OPEN}{THINK_CLOSE}\n{ANSWER_OPEN}"
"""What replies without reasoning begin with, in training and whenever they are measured: given, never learnt. The
prompt stays the one that the base policy knows, so that arms differ in the reasoning alone."""


def answer_alone(reply: str, reply_start: str) -> str:
    """The reply, if its answer follows at once on what it was made to begin with; else nothing.

    The base policy that may not think first thinks in its answer, and then answers: rewarded or measured as it is, that
    would be an arm with reasoning. Where nothing was given, every reply is what it is.
    """
    if not reply_start:
        return reply
    rest = reply.removeprefix(reply_start).lstrip()
    once = reply.count(THINK_CLOSE) <= 1 and reply.count(ANSWER_OPEN) <= 1
    return reply if reply.startswith(reply_start) and rest.startswith(("[", "{")) and once else ""


class Arm(str, Enum):
    """One way to train."""

    SFT_ANSWERS = "sft_answers"
    """(a) Labelled boxes behind an empty thinking."""
    SFT_REASONING = "sft_reasoning"
    """(b) A templated thinking, then the labelled boxes."""
    GRPO_REASONING = "grpo_reasoning"
    """(c) Rewards alone; the policy thinks as it likes."""
    GRPO_ANSWERS = "grpo_answers"
    """(d) Rewards alone, behind an empty thinking."""

    @property
    def reinforced(self) -> bool:
        return self in (Arm.GRPO_REASONING, Arm.GRPO_ANSWERS)

    @property
    def reply_start(self) -> str:
        """What all its replies begin with."""
        return "" if self in (Arm.SFT_REASONING, Arm.GRPO_REASONING) else EMPTY_THINKING


SFT_ARMS = tuple(arm for arm in Arm if not arm.reinforced)


@dataclass(frozen=True, kw_only=True)
class ExperimentPreset:
    """Everything that decides an experiment but the base policy and the folder.

    Raises:
        ValueError: numbers that do not fit together.
    """

    name: str
    grpo: GrpoPreset
    """The recipe. Its kinds of training questions, pictures, frozen parts, precision, weight decay, clipping and share
    of warm-up are every arm's; its rewards, group size and sampling are GRPO's alone."""
    steps: int
    """GRPO's optimiser steps in a final run; supervised arms take as many as make the same number of samples."""
    sweep_steps: int
    """The same for each run of the sweep."""
    evaluations: int
    """Validations of a final run, the last one at its end; the best of them is what is kept of the run."""
    sweep_evaluations: int
    grpo_rates: tuple[float, ...]
    """Learning rates that the sweep tries."""
    sft_rates: tuple[float, ...]
    """As many: the same effort for each arm, around what is usual for each method."""
    seeds: tuple[int, ...]
    sft_batch: int
    """Labelled examples of one optimiser step."""
    validation_questions: int
    test_questions: int
    ood_questions: int
    """Of each split that holds something out."""
    retention_pictures: int
    """Each is asked about in eight ways."""
    data_seed: int = 42
    """Of training and validation questions."""
    test_seed: int = 11
    """Of all that is measured; the README's table is of another seed."""
    timed_steps: int = 3
    """Steps of each arm that are timed before anything long begins; the first is a warm-up."""

    def __post_init__(self) -> None:
        rates = (*self.grpo_rates, *self.sft_rates)
        if len(self.grpo_rates) != len(self.sft_rates) or not rates or min(rates) <= 0.0:
            raise ValueError(
                f"expected as many learning rates above 0 for both methods, got {self.grpo_rates} and {self.sft_rates}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"expected different seeds, got {self.seeds}")
        for steps, evaluations in ((self.steps, self.evaluations), (self.sweep_steps, self.sweep_evaluations)):
            if evaluations < 1 or steps < evaluations or steps % evaluations:
                raise ValueError(f"expected steps in equal parts between evaluations, got {steps} and {evaluations}")
        if self.grpo.samples_per_step % self.sft_batch:
            raise ValueError(
                f"expected {self.grpo.samples_per_step} samples of a GRPO step in batches of {self.sft_batch}"
            )
        if self.grpo.prompts_per_step % self.sft_batch:
            raise ValueError(
                f"expected {self.grpo.prompts_per_step} questions of a GRPO step in batches of {self.sft_batch}"
            )
        if self.timed_steps < 2:
            raise ValueError(f"expected at least 2 timed steps, the first a warm-up, got {self.timed_steps}")

    @property
    def num_rows(self) -> int:
        """Training questions: all that GRPO sees in a final run."""
        return self.steps * self.grpo.prompts_per_step

    def rates(self, arm: Arm) -> tuple[float, ...]:
        """What the sweep tries for an arm."""
        return self.grpo_rates if arm.reinforced else self.sft_rates

    def arm_steps(self, arm: Arm, grpo_steps: int) -> int:
        """Optimiser steps that make as many samples as `grpo_steps` steps of GRPO."""
        return grpo_steps if arm.reinforced else grpo_steps * self.grpo.samples_per_step // self.sft_batch

    def once_steps(self) -> int:
        """Supervised steps in which every training question is seen once."""
        return self.num_rows // self.sft_batch

    def samples_per_step(self, arm: Arm) -> int:
        """Replies that one optimiser step of an arm learns from."""
        return self.grpo.samples_per_step if arm.reinforced else self.sft_batch


def tabletop() -> ExperimentPreset:
    """The tabletop base policy on two CPU cores; GRPO's recipe is the preset `tabletop`'s, in one run of 120 steps,
    since most of what it gains it gains in its first hundred; from the base whose thoughts were all taught at full
    length, and without the reward for brevity, since supervised arms are shown such thoughts and get no reward.
    """
    recipe = replace(
        grpo_presets.tabletop(), policy="training/checkpoints/tabletop/base", rewards="tabletop", max_steps=600,
        base_share=0.0, num_runs=1,
    )  # fmt: skip  # without a share of the base: what an arm forgets is to be seen
    centre = recipe.learning_rate
    return ExperimentPreset(
        name="tabletop", grpo=recipe, steps=120, sweep_steps=40, evaluations=6, sweep_evaluations=2,
        grpo_rates=(centre / 3, centre, 3 * centre), sft_rates=(1e-4, 3e-4, 1e-3), seeds=(1, 2, 3),
        sft_batch=recipe.prompts_per_step, validation_questions=144, test_questions=360, ood_questions=240,
        retention_pictures=120,
    )  # fmt: skip


def debug() -> ExperimentPreset:
    """Every code path in a minute, nothing learnt and nothing to be seen."""
    recipe = replace(
        grpo_presets.debug(), name="debug", row_kinds=("function", "none"), max_completion_tokens=48, warmup_steps=1
    )
    return ExperimentPreset(
        name="debug", grpo=recipe, steps=2, sweep_steps=1, evaluations=2, sweep_evaluations=1,
        grpo_rates=(1e-5, 1e-4), sft_rates=(1e-5, 1e-4), seeds=(1, 2), sft_batch=2,
        validation_questions=2, test_questions=2, ood_questions=1, retention_pictures=1, timed_steps=2,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], ExperimentPreset]] = {preset.__name__: preset for preset in (debug, tabletop)}
