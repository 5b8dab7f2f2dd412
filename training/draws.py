"""Random draws from short lists, one number of the generator each: what every seed reproduces is made of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One option, each as likely.

    Raises:
        ValueError: there are none.
    """
    return options[int(rng.integers(len(options)))]


def shuffled(rng: np.random.Generator, options: Sequence[T]) -> list[T]:
    """All options in random order."""
    return [options[i] for i in rng.permutation(len(options))]
