"""A checkpoint's weight, read when it is written and a few rows at a time: no export holds a checkpoint in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CHUNK_BYTES = 32 << 20
"""Of float32 rows held at a time where rows can be written one after the other."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor whose shape is known and whose rows are read on demand."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], Floats]
    """`rows(start, stop)` reads float32 [stop - start, ...] along the first axis."""

    @classmethod
    def of(cls, values: np.ndarray) -> Weight:
        """An array that is in memory already."""
        floats = np.asarray(values, dtype=np.float32)
        return cls(floats.shape, lambda start, stop: floats[start:stop])

    @classmethod
    def stacked(cls, parts: Sequence[Weight]) -> Weight:
        """The parts one below the other."""
        ends = np.cumsum([part.shape[0] for part in parts])

        def rows(start: int, stop: int) -> Floats:
            cut = []
            for part, end in zip(parts, ends, strict=True):
                begin = int(end) - part.shape[0]
                if start < end and stop > begin:
                    cut.append(part.rows(max(start - begin, 0), min(stop - begin, part.shape[0])))
            return np.concatenate(cut)

        return cls((int(ends[-1]), *parts[0].shape[1:]), rows)

    def part(self, start: int, stop: int) -> Weight:
        """Rows `start` to `stop` as a weight of their own."""
        return Weight((stop - start, *self.shape[1:]), lambda first, last: self.rows(start + first, start + last))

    def array(self) -> Floats:
        """All of it."""
        return self.rows(0, self.shape[0])

    def chunks(self) -> Iterator[Floats]:
        """All of it in pieces of whole rows, each of about `CHUNK_BYTES`."""
        step = max(1, CHUNK_BYTES // max(1, 4 * int(np.prod(self.shape[1:]))))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(start + step, self.shape[0]))
