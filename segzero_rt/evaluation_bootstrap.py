"""Bootstrap intervals over pictures: questions on one picture fail together, so whole pictures are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_DRAWS = 2000


def mean_interval(
    images: Sequence[str], values: Sequence[float], *, num_draws: int = NUM_DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of `values`; `images` names the picture of each."""
    return ratio_interval(images, values, np.ones(len(values)).tolist(), num_draws=num_draws, seed=seed)


def ratio_interval(
    images: Sequence[str],
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the sum of `numerators` over the sum of `denominators`, which is cIoU's form.

    Draws whose denominators are all 0 say nothing and are left out.

    Raises:
        ValueError: no values, lists of different lengths, or denominators that are all 0.
    """
    if not images or not len(images) == len(numerators) == len(denominators) or not any(denominators):
        raise ValueError(
            f"expected as many pictures as numerators and denominators, not all 0, got {len(images)}, "
            f"{len(numerators)} and {len(denominators)}"
        )
    pictures = sorted(set(images))
    index = {picture: position for position, picture in enumerate(pictures)}
    where = np.array([index[image] for image in images])
    tops, bottoms = np.bincount(where, weights=numerators), np.bincount(where, weights=denominators)
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(num_draws):
        drawn = rng.integers(0, len(pictures), len(pictures))
        bottom = bottoms[drawn].sum()
        if bottom > 0:
            ratios.append(tops[drawn].sum() / bottom)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
