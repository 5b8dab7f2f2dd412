"""Intervals for differences between policies that answered the same questions: a paired bootstrap.

Pictures are drawn, not questions, since questions on one picture fail together; and of arms that were trained several
times, seeds are drawn, each arm's on its own. A difference over several splits is the mean of the splits' differences:
pictures are drawn within each split, seeds once for all, since a seed is one policy.

With three seeds the bootstrap sees little of their spread (its variance is 2/3 of the unbiased one): values of every
seed stand beside the interval wherever it is reported.

Shapes: S seeds, N questions, P pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .measures import Score

NUM_DRAWS = 4000
_POWER = 1.96 + 0.84
"""Standard errors of a difference that a two-sided 5 % test sees in 80 of 100 trials."""
_DRAWS_AT_ONCE = 500

Scores = Sequence[Sequence[Score]]
"""Of one arm on one split: for each seed, the scores of all questions in the same order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean or difference of means with its 95 % percentile interval."""

    mean: float
    low: float
    high: float
    standard_error: float
    """Standard deviation of the bootstrap's draws."""

    @property
    def detectable(self) -> float:
        """Difference that would have been seen with a probability of 80 %."""
        return _POWER * self.standard_error

    def to_json(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "detectable": self.detectable}


def mean_interval(scores: Scores, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Interval:
    """Of one arm's mean over seeds and questions.

    Raises:
        ValueError: no scores, or seeds that did not answer the same questions.
    """
    return difference([(scores, None)], num_draws=num_draws, seed=seed)


def difference(
    splits: Sequence[tuple[Scores, Scores | None]], *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> Interval:
    """Of (first arm's mean − second arm's mean), averaged over splits; None as the second arm stands for 0.

    Args:
        splits: both arms' scores on each split; the number of seeds of an arm is the same on all of them.

    Raises:
        ValueError: no scores, seeds or arms that did not answer the same questions in the same order, or an arm with
            another number of seeds on another split.
    """
    if not splits:
        raise ValueError("expected scores of at least one split, got none")
    sums = [_by_picture(first, second) for first, second in splits]
    counts = {(len(first), 0 if second is None else len(second)) for _, first, second in sums}
    if len(counts) != 1:
        raise ValueError(f"expected the same number of seeds on every split, got {sorted(counts)}")
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [_draw(rng, sums, min(_DRAWS_AT_ONCE, num_draws - first)) for first in range(0, num_draws, _DRAWS_AT_ONCE)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    whole = np.mean([_plain_mean(per_picture, first, second) for per_picture, first, second in sums])
    return Interval(mean=float(whole), low=float(low), high=float(high), standard_error=float(means.std()))


_Sums = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64] | None]
"""Questions of each picture [P], and the sums of values over them [S, P] of either arm."""


def _by_picture(first: Scores, second: Scores | None) -> _Sums:
    seeds = [*first, *(second or ())]
    if not first or not first[0] or (second is not None and not second):
        raise ValueError("expected scores of at least one seed and question in each arm, got none")
    asked = [(score.item, score.picture) for score in seeds[0]]
    if any([(score.item, score.picture) for score in scores] != asked for scores in seeds):
        raise ValueError("expected every seed of both arms to have answered the same questions in the same order")
    pictures = sorted({picture for _, picture in asked})
    places = {picture: place for place, picture in enumerate(pictures)}
    where = np.array([places[picture] for _, picture in asked])

    def sums(arm: Scores) -> NDArray[np.float64]:
        values = [[score.value for score in scores] for scores in arm]
        return np.stack([np.bincount(where, row, len(pictures)) for row in values])

    return np.bincount(where), sums(first), None if second is None else sums(second)


def _plain_mean(counts: NDArray[np.int64], first: NDArray[np.float64], second: NDArray[np.float64] | None) -> float:
    mean = first.mean(0).sum() - (0.0 if second is None else second.mean(0).sum())
    return float(mean / counts.sum())


def _draw(rng: np.random.Generator, splits: Sequence[_Sums], draws: int) -> NDArray[np.float64]:
    """float64 [draws]."""
    _, first, second = splits[0]
    first_seeds = _times_drawn(rng, len(first), draws)
    second_seeds = None if second is None else _times_drawn(rng, len(second), draws)
    total = np.zeros(draws)
    for counts, of_first, of_second in splits:
        pictures = _times_drawn(rng, len(counts), draws)  # [draws, P]
        value = (pictures @ of_first.T * first_seeds).sum(1) / len(of_first)
        if of_second is not None and second_seeds is not None:
            value -= (pictures @ of_second.T * second_seeds).sum(1) / len(of_second)
        total += value / (pictures @ counts)
    return total / len(splits)


def _times_drawn(rng: np.random.Generator, count: int, draws: int) -> NDArray[np.int64]:
    """How often each of `count` came in as many draws with replacement, [draws, count]."""
    return np.asarray(rng.multinomial(count, np.full(count, 1 / count), draws), np.int64)
