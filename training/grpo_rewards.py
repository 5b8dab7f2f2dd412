"""Which rewards a preset trains with, by name, and what its rows must have for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from segzero_rt.errors import SegZeroError

from .reward_extras import abstention_reward, empty_thinking_penalty
from .rewards import Reward, check_seg_zero_row, check_vision_reasoner_row, seg_zero_rewards, vision_reasoner_rewards
from .rows import TrainingRow


@dataclass(frozen=True, kw_only=True)
class RewardSet:
    """Terms that are added up, and the check that a row can be scored by them."""

    rewards: tuple[Reward, ...]
    check_row: Callable[[TrainingRow], None]

    def check_rows(self, rows: Iterable[TrainingRow]) -> None:
        """Raises `DatasetError`, naming the row, where one lacks what a term reads."""
        for row in rows:
            self.check_row(row)


def _seg_zero_strict() -> RewardSet:
    return RewardSet(rewards=seg_zero_rewards(strict=True), check_row=check_seg_zero_row)


def _seg_zero_soft() -> RewardSet:
    return RewardSet(rewards=seg_zero_rewards(strict=False), check_row=check_seg_zero_row)


def _vision_reasoner() -> RewardSet:
    return RewardSet(rewards=vision_reasoner_rewards(), check_row=check_vision_reasoner_row)


def _tabletop() -> RewardSet:
    """VisionReasoner's terms, read by the runtime's own parser, and what is missing in them: "there is none"."""
    rewards = (*vision_reasoner_rewards(mode="tolerant"), abstention_reward(), empty_thinking_penalty())
    return RewardSet(rewards=rewards, check_row=check_vision_reasoner_row)


REWARD_SETS: dict[str, Callable[[], RewardSet]] = {
    "seg_zero_strict": _seg_zero_strict,
    "seg_zero_soft": _seg_zero_soft,
    "vision_reasoner": _vision_reasoner,
    "tabletop": _tabletop,
}


def reward_set(name: str) -> RewardSet:
    """Raises `SegZeroError` for a name that is none."""
    if name not in REWARD_SETS:
        raise SegZeroError(f"expected rewards of {', '.join(REWARD_SETS)}, got {name!r}")
    return REWARD_SETS[name]()
