"""Guesses of what a policy says next. The decoder checks several in one run, which costs little more than one token.

A token costs a run over all weights, and a run over six tokens reads the weights once as well. So the loop
(`decoding.py`) hands the decoder a few guesses along with the last token; those that it would have said itself are
taken, and the first that it would not have said is replaced by its own. A guess decides how fast a reply comes, not
what it says, as far as a run of one token computes what a run of several does: where the two
round otherwise, the likelier of two tokens that are all but equally likely may be the other one.

Guesses come from two places, neither of which is trained:
1. what usually follows the last tokens, counted over replies of the answer format, made up when the drafter is made
   (their brackets, keys and tags hold for all replies), and over prompts and replies of this policy since then;
2. what the decoder said after the first wrong guess of its last run: often right all the same, one token further on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from segzero_rt.answer_format import AnswerFormat

ORDER = 3
"""Tokens that a guess looks back at. More find less that they have seen; fewer take one key's numbers for another's."""
MAX_CONTEXTS = 1 << 14
"""A drafter that has seen more contexts starts anew: some hundred replies, a few MB."""
TRUSTED = 0.6
"""Share of its context's occurrences from which on a counted token goes before the decoder's own earlier guess."""

_SIDES = (7, 40, 123, 205, 66, 8, 180, 94, 250, 31, 149, 112)
"""Numbers of the made-up replies: of one, two and three digits, so that what ends a number is seen after each."""
_OBJECTS = (0, 1, 2, 3, 1, 1, 2, 1)
"""Objects in each made-up reply."""


class Drafter:
    """Counts what follows what. One for each answer format of a policy; it may serve several replies at once."""

    def __init__(self, made_up: Iterable[Sequence[int]]) -> None:
        """
        Args:
            made_up: token numbers of replies in the format, each with the token that ends it.
        """
        self._made_up = [tuple(reply) for reply in made_up]
        self._follows: dict[tuple[int, ...], _Follows] = {}
        self.forget()

    @classmethod
    def of_format(cls, answer_format: AnswerFormat, encode: Callable[[str], list[int]], end_token_id: int) -> Drafter:
        """A drafter that knows the format's skeleton as the tokenizer writes it, and nothing else."""
        return cls([*encode(text), end_token_id] for text in made_up_replies(answer_format))

    def forget(self) -> None:
        """Back to what it knew when it was made."""
        self._follows = {}
        for reply in self._made_up:
            self.learn(reply, 0)

    def learn(self, tokens: Sequence[int], start: int) -> None:
        """Counts `tokens[start:]`, each in the context of those before it."""
        if len(self._follows) > MAX_CONTEXTS:
            self.forget()
        follows = self._follows
        for place in range(max(start, 1), len(tokens)):
            for length in range(1, min(ORDER, place) + 1):
                context = tuple(tokens[place - length : place])
                if context not in follows:
                    follows[context] = _Follows()
                follows[context].add(tokens[place])

    def guess(self, tokens: Sequence[int]) -> tuple[int | None, float]:
        """What most often followed the longest end of `tokens` that has been seen, and how sure that is, 0 to 1."""
        for length in range(min(ORDER, len(tokens)), 0, -1):
            found = self._follows.get(tuple(tokens[len(tokens) - length :]))
            if found is not None:
                return found.best, found.best_count / (found.total + 0.3)  # seen once is not yet certain
        return None, 0.0


class Draft:
    """Guesses along one reply."""

    def __init__(self, drafter: Drafter, prompt: Sequence[int], count: int) -> None:
        """
        Args:
            prompt: tokens before the reply, as far as they may come up in it.
            count: guesses for each run of the decoder.
        """
        self.count = count
        self._drafter = drafter
        self._said = list(prompt)
        self._later: Sequence[int] = ()
        drafter.learn(self._said, 0)

    def take(self, tokens: Sequence[int], later: Sequence[int] = ()) -> None:
        """Goes on by tokens that were said; `later` is what the decoder said to the wrong guesses behind them."""
        start = len(self._said)
        self._said.extend(tokens)
        self._drafter.learn(self._said, start)
        self._later = later

    def guesses(self, count: int) -> list[int]:
        """`count` tokens that may come next, the likely ones first to fail; any token where nothing is known."""
        context = self._said[-ORDER:]
        known = len(context)
        for place in range(count):
            counted, share = self._drafter.guess(context)
            if share < TRUSTED and place < len(self._later):
                counted = self._later[place]
            context.append(context[-1] if counted is None else counted)
        return context[known:]


class _Follows:
    """What came after one context."""

    __slots__ = ("_counts", "best", "best_count", "total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.best = 0
        self.best_count = 0
        self.total = 0

    def add(self, token_id: int) -> None:
        count = self._counts.get(token_id, 0) + 1
        self._counts[token_id] = count
        self.total += 1
        if count >= self.best_count:  # of equals the latest
            self.best, self.best_count = token_id, count


def made_up_replies(answer_format: AnswerFormat) -> list[str]:
    """Replies with an empty thinking and with numbers that mean nothing, for their skeleton."""
    numbers = itertools.cycle(_SIDES)
    replies = []
    for count in _OBJECTS:
        objects = [
            (
                [next(numbers) for _ in range(4)],
                [[next(numbers), next(numbers)] for _ in range(answer_format.max_points)],
            )
            for _ in range(count if answer_format.multiple else min(count, 1))
        ]
        replies.append(answer_format.assistant_text("", objects))
    return replies
