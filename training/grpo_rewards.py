"""Which rewards a preset trains with, by name, and what its rows must have for them.

A name is that of a set, and of terms beyond it, each with its setting if it has any:

    tabletop                          the set as it is
    tabletop+brevity:24+mask_iou      and a bonus for short thinking, and the segmenter's masks
    tabletop+brevity:24:0.9           a larger bonus: 0.9 instead of 0.5 for one object
    vision_reasoner+mask_iou:bundles/sam2-large

Sets of the papers stay the papers'; terms beyond them are off unless they are named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from segzero_rt.answer_format import SEG_ZERO, VISION_REASONER, AnswerFormat
from segzero_rt.answer_parser import ParseMode
from segzero_rt.bundle import Bundle
from segzero_rt.errors import DatasetError, SegZeroError

from .reward_extras import (
    abstention_reward,
    brevity_reward,
    closeness_reward,
    empty_thinking_penalty,
    mask_iou_reward,
)
from .rewards import Reward, check_seg_zero_row, check_vision_reasoner_row, seg_zero_rewards, vision_reasoner_rewards
from .rows import TrainingRow

BREVITY_BUDGET = 32
"""Words and marks of thinking from which on brevity earns nothing, where its setting names none."""
BREVITY_MOST = 0.5
"""Its bonus for one object, where its setting names none."""
MASK_IOU = "mask_iou"
_SHARE = re.compile(r"0?\.[0-9]{1,6}")
_PLUS, _COLON = "+", ":"
NO_EXTRAS = "none"
"""Asks for a set without any term beyond it."""

RowCheck = Callable[[TrainingRow], None]


@dataclass(frozen=True, kw_only=True)
class RewardSet:
    """Terms that are added up, and the checks that a row can be scored by them."""

    rewards: tuple[Reward, ...]
    checks: tuple[RowCheck, ...]
    """Each raises `DatasetError`, naming the row."""
    family: AnswerFormat
    mode: ParseMode
    """How terms beyond the papers read an answer."""

    def check_rows(self, rows: Iterable[TrainingRow]) -> None:
        """Raises `DatasetError`, naming the row, where one lacks what a term reads."""
        for row in rows:
            for check in self.checks:
                check(row)


def _seg_zero_strict() -> RewardSet:
    return RewardSet(
        rewards=seg_zero_rewards(strict=True), checks=(check_seg_zero_row,), family=SEG_ZERO, mode="seg_zero"
    )


def _seg_zero_soft() -> RewardSet:
    return replace(_seg_zero_strict(), rewards=seg_zero_rewards(strict=False))


def _vision_reasoner() -> RewardSet:
    return RewardSet(
        rewards=vision_reasoner_rewards(), checks=(check_vision_reasoner_row,), family=VISION_REASONER,
        mode="vision_reasoner",
    )  # fmt: skip


def _tabletop() -> RewardSet:
    """VisionReasoner's terms, accuracy by degrees, read by the runtime's own parser, and what is missing in them:
    "there is none". The format is read as VisionReasoner reads it, by the standard: where the tolerant parser judged
    it, one list in twelve came to begin without its bracket.
    """
    kept = (reward for reward in vision_reasoner_rewards() if reward.name != "accuracy")
    rewards = (*kept, closeness_reward(), abstention_reward(), empty_thinking_penalty())
    return replace(_vision_reasoner(), rewards=rewards, mode="tolerant")


REWARD_SETS: dict[str, Callable[[], RewardSet]] = {
    "seg_zero_strict": _seg_zero_strict,
    "seg_zero_soft": _seg_zero_soft,
    "vision_reasoner": _vision_reasoner,
    "tabletop": _tabletop,
}


def _abstention(base: RewardSet, setting: str) -> Reward:
    _no_setting("abstention", setting)
    return abstention_reward(family=base.family, mode=base.mode)


def _empty_thinking(base: RewardSet, setting: str) -> Reward:
    _no_setting("empty_thinking", setting)
    return empty_thinking_penalty(family=base.family, mode=base.mode)


def _closeness(base: RewardSet, setting: str) -> Reward:
    _no_setting("closeness", setting)
    if base.family is not VISION_REASONER:
        raise SegZeroError(f"expected closeness with rewards for {VISION_REASONER.name}, got {base.family.name}")
    return closeness_reward(mode=base.mode)


def _brevity(base: RewardSet, setting: str) -> Reward:
    budget, _, most = setting.partition(_COLON)
    if budget and not (budget.isascii() and budget.isdigit() and 4 < int(budget) < 10**6):
        raise SegZeroError(f"expected brevity:TOKENS with more than 4 tokens of thinking, got brevity:{setting:.40}")
    if most and not (_SHARE.fullmatch(most) and 0 < float(most) < 1):
        raise SegZeroError(f"expected brevity:TOKENS:MOST with MOST between 0 and 1, got brevity:{setting:.40}")
    return brevity_reward(
        budget=int(budget) if budget else BREVITY_BUDGET, most=float(most) if most else BREVITY_MOST,
        family=base.family, mode=base.mode,
    )  # fmt: skip


def _mask_iou(base: RewardSet, setting: str) -> Reward:
    Bundle.open(setting or None)  # its own error for one that does not open, before hours of training
    return mask_iou_reward(setting or None, family=base.family, mode=base.mode)


REWARD_EXTRAS: dict[str, Callable[[RewardSet, str], Reward]] = {
    "abstention": _abstention,
    "empty_thinking": _empty_thinking,
    "closeness": _closeness,
    "brevity": _brevity,
    MASK_IOU: _mask_iou,
}
"""Terms beyond the papers (`reward_extras`), by name; each takes the set that it is added to, and its setting."""


def reward_set(name: str) -> RewardSet:
    """The set of a name, and the terms that the name adds.

    Raises:
        SegZeroError: no such set or term, a term that the set has already, or a setting that is none.
    """
    base_name, *extras = name.split(_PLUS)
    if base_name not in REWARD_SETS:
        raise SegZeroError(f"expected rewards of {', '.join(REWARD_SETS)}, got {base_name!r:.60}")
    base = REWARD_SETS[base_name]()
    found = base
    for extra in extras:
        term, _, setting = extra.partition(_COLON)
        if term not in REWARD_EXTRAS:
            raise SegZeroError(f"expected reward terms of {', '.join(REWARD_EXTRAS)} to add, got {term!r:.60}")
        if term in {reward.name for reward in found.rewards}:
            raise SegZeroError(f"expected each reward term once, {term} is in {base_name} or named twice")
        checks = (check_mask_row,) if term == MASK_IOU else ()
        found = replace(
            found, rewards=(*found.rewards, REWARD_EXTRAS[term](base, setting)), checks=(*found.checks, *checks)
        )
    return found


def with_extras(name: str, extras: Sequence[str]) -> str:
    """The name of a set with these terms beyond it, in the place of those that it has; checked.

    Args:
        name: of a set, with terms added or without.
        extras: terms, each with its setting if it has one; `none` alone for no term.

    Raises:
        SegZeroError: as `reward_set`.
    """
    terms = () if tuple(extras) == (NO_EXTRAS,) else extras
    whole = _PLUS.join((name.split(_PLUS)[0], *terms))
    reward_set(whole)
    return whole


def check_mask_row(row: TrainingRow) -> None:
    """Raises `DatasetError` unless every object of the row has a mask, as `mask_iou` needs."""
    for index, one in enumerate(row.objects):
        if one.mask_rle is None:
            raise DatasetError(
                f"row {row.row_id!r:.60}: objects[{index}]: expected a mask for mask_iou, got none; prepare the rows "
                f"from a set with masks or train without it"
            )


def _no_setting(term: str, setting: str) -> None:
    if setting:
        raise SegZeroError(f"expected {term} without a setting, got {term}:{setting:.40}")
