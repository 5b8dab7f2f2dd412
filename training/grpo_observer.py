"""What a run is judged by beside its rewards: box gIoU per kind of question, and samples for the report.

TRL calls `Observer` as one more reward function, with weight 0: so it sees every completion with its row, in training
and in evaluation, and its values are logged with the rewards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer import Answer, AnswerStatus
from segzero_rt.answer_format import AnswerFormat

from .grpo_data import QUESTION
from .reward_readings import parsed_answer
from .rewards import Case, Reward, cases_of, score
from .rows import IMAGE_PATH, KIND

BOX_GIOU = "box_giou"
"""Name of the observer's value: IoU of all answered with all true boxes' area; 1 for "none" rightly said."""
_KEPT_SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class ObservedSample:
    """One completion for the report."""

    step: int
    question: str
    kind: str
    image: Path
    case: Case
    answer: Answer
    terms: dict[str, float]
    box_iou: float


class Observer:
    """The reward function of weight 0.

    Args:
        answer_format: the family whose answers the runtime's parser reads.
        rewards: the terms whose breakdown samples keep.
    """

    __name__ = BOX_GIOU  # TRL names a reward function by this

    def __init__(self, answer_format: AnswerFormat, rewards: Sequence[Reward]) -> None:
        self.answer_format, self.rewards = answer_format, tuple(rewards)
        self.samples: deque[ObservedSample] = deque(maxlen=_KEPT_SAMPLES)
        """The newest completions, the oldest first."""

    def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        log_metric: Callable[[str, float], None] | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float]:
        cases = cases_of(completions, columns)
        answers = [parsed_answer(case.text, self.answer_format, "tolerant", case.input_size_hw) for case in cases]
        values = [box_giou(case, answer) for case, answer in zip(cases, answers, strict=True)]
        if log_metric is not None:
            for name, value in _metrics(columns[KIND], values, answers):
                log_metric(name, value)
        step = 0 if trainer_state is None else trainer_state.global_step
        for row, (case, answer) in enumerate(zip(cases, answers, strict=True)):
            self.samples.append(
                ObservedSample(
                    step=step,
                    question=columns[QUESTION][row],
                    kind=columns[KIND][row],
                    image=Path(columns[IMAGE_PATH][row]),
                    case=case,
                    answer=answer,
                    terms=dict(score(case, self.rewards).terms),
                    box_iou=values[row],
                )
            )
        return values


def box_giou(case: Case, answer: Answer) -> float:
    """0 … 1: IoU of the area of all answered boxes with that of all true ones; no object: 1 for "none", else 0."""
    if not case.objects:
        return float(answer.status is AnswerStatus.NONE_FOUND)
    truth = _area([one.box_xyxy for one in case.objects], case.input_size_hw)
    said = _area([prompt.box_xyxy for prompt in answer.prompts], case.input_size_hw)
    union = np.count_nonzero(truth | said)
    return float(np.count_nonzero(truth & said) / union) if union else 0.0


def _area(boxes_xyxy: Sequence[Sequence[float]], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """bool [H, W]: pixels whose centre some box holds."""
    area = np.zeros(size_hw, bool)
    for left, top, right, bottom in boxes_xyxy:
        area[max(round(top), 0) : max(round(bottom), 0), max(round(left), 0) : max(round(right), 0)] = True
    return area


def _metrics(kinds: Sequence[str], values: Sequence[float], answers: Sequence[Answer]) -> Iterator[tuple[str, float]]:
    """(metric, value) of every completion: `box_giou/KIND`, and whether the reply could be read."""
    for kind, value, answer in zip(kinds, values, answers, strict=True):
        if kind:
            yield f"{BOX_GIOU}/{kind}", value
        yield "parse_rate", float(answer.status in (AnswerStatus.OK, AnswerStatus.NONE_FOUND))
