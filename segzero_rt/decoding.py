"""The greedy decode loop: one token a run, or several at once where guesses turn out right (`drafting.py`).

A run takes the last token that was said and some guesses, and gives the decoder's own choice after each of them.
Choices count up to the first one that differs from its guess; the cache is cut back to them, and the next run writes
over what lay behind. So the tokens are those of a loop without guesses, as long as a token's numbers do not depend on
the others of its run: `rows_are_independent` tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from segzero_rt.drafting import Draft
from segzero_rt.graph import BoundGraph, Graph
from segzero_rt.kv_cache import KVCache

if TYPE_CHECKING:  # most replies are free
    from segzero_rt.constrained import AnswerConstraint


@dataclass(slots=True)
class DecodeCounts:
    """What a reply took."""

    runs: int = 0
    """Of the decoder, the prompt's not counted."""
    drafted: int = 0
    """Guesses handed to it."""
    accepted: int = 0
    """Guesses that it would have said itself."""


class TokenRuns:
    """Runs of the decoder over tokens by number, after what is in a cache of one sequence."""

    def __init__(self, embedding: Graph, cache: KVCache) -> None:
        self._embedding = embedding
        self._cache = cache
        self._bound: dict[int, tuple[NDArray[np.int64], BoundGraph]] = {}

    def choices(self, token_ids: Sequence[int]) -> list[int]:
        """Adds the tokens to the cache; returns the likeliest token after each."""
        return [int(token_id) for token_id in self.logits(token_ids).argmax(axis=-1)]

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Adds the tokens to the cache; returns float32 [tokens, vocab], which the next run overwrites."""
        count = len(token_ids)
        if count not in self._bound:
            ids = np.zeros((1, count), dtype=np.int64)
            outputs = {"inputs_embeds": self._cache.step_embeds(count)}
            self._bound[count] = ids, self._embedding.bind({"input_ids": ids}, outputs)
        ids, bound = self._bound[count]
        ids[0] = token_ids
        bound.run()
        logits: NDArray[np.float32] = self._cache.step(count)[0]
        return logits


class GreedyReply:
    """The tokens of one reply, as an iterator; `finished` and `counts` tell how it went."""

    def __init__(
        self,
        runs: TokenRuns,
        cache: KVCache,
        *,
        end_token_ids: Sequence[int],
        draft: Draft | None,
        constraint: AnswerConstraint | None = None,
    ) -> None:
        self._runs = runs
        self._constraint = constraint
        self._cache = cache
        self._ends = frozenset(end_token_ids)
        self._draft = draft
        self.finished = False
        """The policy ended the reply by itself."""
        self.counts = DecodeCounts()

    def tokens(self, first: int, budget: int) -> Iterator[int]:
        """Up to `budget` tokens, the first of which is known already. Runs the decoder when the next one is asked for.

        The token that ends the reply is not among them.
        """
        choices, left = [first], budget
        if self._draft:
            self._draft.take(choices)
        while left > 0:
            for token_id in choices:
                if token_id in self._ends:
                    self.finished = True
                    return
                yield token_id
            left -= len(choices)
            if left > 0:
                choices = self._next(choices[-1], left) if self._draft else self._choices(choices[-1:], left)
                self.counts.runs += 1

    def _choices(self, token_ids: Sequence[int], left: int) -> list[int]:
        """What follows each token; with a grammar as far as the guesses among them are right."""
        if self._constraint is None:
            return self._runs.choices(token_ids)
        return self._constraint.choices(self._runs.logits(token_ids), token_ids[1:], left)

    def _next(self, last: int, left: int) -> list[int]:
        """At least one token, at most `left`."""
        draft = self._draft
        assert draft is not None, "called with a draft alone"
        length = int(self._cache.lengths[0])
        guesses = draft.guesses(min(draft.count, left - 1))
        said = self._choices([last, *guesses], left)
        right = next((place for place, guess in enumerate(guesses) if guess != said[place]), len(guesses))
        ended = next((place for place, token_id in enumerate(said[: right + 1]) if token_id in self._ends), right)
        right = min(right, ended)
        self._cache.truncate(length + 1 + right)
        self.counts.drafted += len(guesses)
        self.counts.accepted += right
        draft.take(said[: right + 1], said[right + 1 :])
        return said[: right + 1]


def rows_are_independent(runs: TokenRuns, cache: KVCache, token_ids: Sequence[int]) -> bool:
    """Whether a token's numbers are the same bit for bit, whatever follows it in the same run.

    They are in float32; they are not where activations are quantised by the range of all tokens of a run. The cache
    stays as it is.

    Args:
        token_ids: some different tokens, at least three; the first is looked at.

    Raises:
        ValueError: the cache has no room for them.
    """
    length = int(cache.lengths[0])
    first, *others = token_ids
    rows = []
    for followers in (others, others[::-1], [*others[1:], *others[:1]]):
        rows.append(runs.logits([first, *followers])[0].copy())
        cache.truncate(length)
    return all(np.array_equal(row, rows[0]) for row in rows)
