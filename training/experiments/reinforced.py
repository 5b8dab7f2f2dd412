"""GRPO as one arm of an experiment: the recipe's own trainer, with or without a thinking."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from ..grpo import POLICY_FOLDER, GrpoRun, build_trainer, check_rows, newest_checkpoint, save_best
from ..grpo_trainer import SharedPromptGrpoTrainer
from ..reward_readings import completion_text
from .design import answer_alone


def train_reinforced(run: GrpoRun, reply_start: str) -> Path:
    """Trains, or goes on where it was stopped; returns the folder of the best policy.

    Args:
        reply_start: what every reply begins with: given, neither sampled nor learnt.

    Raises:
        DatasetError: a row that cannot be asked or scored.
    """
    check_rows(run)
    trainer = build_trainer(run)
    begin_replies(trainer, reply_start)
    checkpoint = newest_checkpoint(run.out)
    trainer.args.eval_on_start = checkpoint is None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return save_best(trainer, run.out / POLICY_FOLDER)


def step_seconds(run: GrpoRun, reply_start: str) -> list[float]:
    """Seconds of each step of a run that is trained and left behind: nothing is validated, nothing written."""
    trainer: Any = build_trainer(run)
    begin_replies(trainer, reply_start)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    trainer.remove_callback(TensorBoardCallback)
    clock = _StepClock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


class _StepClock(TrainerCallback):
    """Seconds of each step, from its beginning to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)


def begin_replies(trainer: Any, reply_start: str) -> None:
    """Lets all replies of a trainer begin with given text, and rewards none in which no answer follows on it at once.

    Its tokens are read with the prompt when a reply is sampled, and stand at the beginning of the completion
    afterwards: rewards read the whole reply. Rewards teach nothing about them: they are the same in every reply of a
    group, and advantages of a group add up to 0, so that their gradients cancel (`tests/test_experiment_arms.py`); the
    recipe's small entropy bonus, where it has one, is all that is left.

    Raises:
        TypeError: a trainer that does not share prompts.
    """
    if not reply_start:
        return
    if not isinstance(trainer, SharedPromptGrpoTrainer):
        raise TypeError(f"expected a trainer that shares prompts, got {type(trainer).__name__}")
    processor: Any = trainer.processing_class
    start: list[int] = list(processor.tokenizer(reply_start)["input_ids"])
    sample = trainer._generate_single_turn

    def begun(
        prompt_ids: Sequence[Sequence[int]], *more: Any, **options: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        tokens, logprobs = sample([[*ids, *start] for ids in prompt_ids], *more, **options)
        given = [0.0] * len(start)  # certain
        return [[*start, *ids] for ids in tokens], [[*given, *scores] for scores in logprobs]

    trainer._generate_single_turn = begun  # type: ignore[method-assign]
    trainer.reward_funcs = [_of_answers_alone(reward, reply_start) for reward in trainer.reward_funcs]


def _of_answers_alone(reward: Any, reply_start: str) -> Any:
    """A reward function that takes a reply for nothing unless it is `answer_alone`."""

    def counted(*, completions: Sequence[Any], **given: Any) -> Any:
        texts = [answer_alone(completion_text(completion), reply_start) for completion in completions]
        return reward(completions=texts, **given)

    return counted
