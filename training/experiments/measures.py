"""What a policy scores on questions: one value each, kept with its picture, so that policies are compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.answer import AnswerStatus
from segzero_rt.errors import SegZeroError

from ..grpo_observer import box_giou
from ..reward_readings import parsed_answer
from ..rewards import Case
from ..rows import TrainingRow
from .design import answer_alone
from .live_policy import Asked, LivePolicy

_READ = (AnswerStatus.OK, AnswerStatus.NONE_FOUND)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What came of one question.

    Raises:
        ValueError: a value outside 0 … 1.
    """

    item: str
    """Names the question; the same for every policy."""
    kind: str
    picture: str
    """Questions on one picture fail together: intervals draw pictures."""
    value: float
    """0 … 1: box gIoU, or right and wrong."""
    parsed: bool = True
    """The reply was in the form that was asked for."""
    thinking_tokens: int = 0
    reply: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.value <= 1.0:
            raise ValueError(f"expected a value from 0 to 1, got {self.value} for {self.item}")


def score_rows(
    policy: LivePolicy, rows: Sequence[TrainingRow], *, reply_start: str = "", told: str = ""
) -> list[Score]:
    """Asks every row's question, greedily; the value is box gIoU (`grpo_observer.box_giou`).

    Args:
        reply_start: what replies are made to begin with; behind it the answer has to follow (`design.answer_alone`).
        told: name of the progress bar; empty shows none.
    """
    asked = [Asked(text=policy.answer_format.user_prompt(row.question), picture=row.image) for row in rows]
    replies = policy.answer(asked, reply_start=reply_start, told=told)
    return [score_reply(policy, row, reply, reply_start) for row, reply in zip(rows, replies, strict=True)]


def score_reply(policy: LivePolicy, row: TrainingRow, reply: str, reply_start: str = "") -> Score:
    """The score of one reply to a row's question."""
    case = Case(text=reply, objects=row.objects, input_size_hw=row.input_size_hw, row_id=row.row_id)
    return box_score(policy, case, kind=row.kind, picture=row.image.name, reply_start=reply_start)


def box_score(policy: LivePolicy, case: Case, *, kind: str, picture: str, reply_start: str = "") -> Score:
    """The score of a reply with boxes."""
    counted = replace(case, text=answer_alone(case.text, reply_start))
    answer = parsed_answer(counted.text, policy.answer_format, "tolerant", case.input_size_hw)
    return Score(
        item=case.row_id,
        kind=kind,
        picture=picture,
        value=box_giou(counted, answer),
        parsed=answer.status in _READ,
        thinking_tokens=len(policy.text_ids(answer.thinking)),
        reply=case.text,
    )


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over all questions and by kind, as plain JSON types.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("expected at least one score")
    return {
        "value": mean(scores),
        "num_questions": len(scores),
        "parse_rate": float(np.mean([score.parsed for score in scores])),
        "thinking_tokens": float(np.mean([score.thinking_tokens for score in scores])),
        "by_kind": {
            kind: {"value": mean(of_kind), "num_questions": len(of_kind)} for kind, of_kind in by_kind(scores).items()
        },
    }


def mean(scores: Iterable[Score]) -> float:
    """Mean value."""
    return float(np.mean([score.value for score in scores]))


def by_kind(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """The scores of each kind of question, kinds in alphabetical order."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        found.setdefault(score.kind, []).append(score)
    return dict(sorted(found.items()))


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """Writes one line of JSON per question, the whole file or none of it."""
    temporary = path.with_suffix(".part")
    temporary.write_text(
        "".join(json.dumps(asdict(score), ensure_ascii=False) + "\n" for score in scores), encoding="utf-8"
    )
    temporary.replace(path)


def read_scores(path: Path) -> list[Score]:
    """Reads what `write_scores` wrote.

    Raises:
        SegZeroError: the file is absent or holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Score(**json.loads(line)) for line in lines]
    except (OSError, TypeError, ValueError) as error:
        raise SegZeroError(f"expected scores in {path}, could not read them: {error}; measure again") from error
