"""A greedy reply that can always be read: each choice is the likeliest token that the answer's grammar allows.

The decode loop hands over the numbers of a run and the guesses that it ran with. What may be said next depends on what
was said before alone, so a guess decides no more here than it does without a grammar: how fast a reply comes. As long
as the decoder's own choice is allowed, which it mostly is, nothing but one bit is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer_format import AnswerFormat
from segzero_rt.answer_grammar import answer_automaton, token_table
from segzero_rt.chat import Chat
from segzero_rt.errors import QuestionError
from segzero_rt.kernels.sample_token import DEAD, GrammarTable, sample_token
from segzero_rt.manifest import PolicyManifest


def grammar_of(chat: Chat, answer_format: AnswerFormat, manifest: PolicyManifest) -> GrammarTable:
    """The grammar of a policy's replies in a format.

    Raises:
        BundleError: its tokenizer cannot spell such replies.
    """
    tokens = chat.token_bytes()
    tokens += [None] * (manifest.vocab_size - len(tokens))
    return token_table(answer_automaton(answer_format, manifest.answer_size_hw), tokens, manifest.eos_token_ids)


class AnswerConstraint:
    """One reply on its way through a grammar."""

    def __init__(self, grammar: GrammarTable, started: Sequence[int] = ()) -> None:
        """
        Args:
            started: tokens that the reply was made to begin with.

        Raises:
            QuestionError: the grammar does not take them.
        """
        self._grammar = grammar
        self.state = 0
        """Where the reply stands in the grammar."""
        for token_id in started:
            if self.state == DEAD or not grammar.allows(self.state, token_id):
                raise QuestionError("expected a reply_start that an answer can follow; change it, or ask unconstrained")
            self.state = grammar.advance(self.state, token_id)

    def choices(self, logits: NDArray[np.float32], guesses: Sequence[int], left: int) -> list[int]:
        """What is said after the last token and after each guess, up to the first that was wrong.

        Behind that stands what the decoder would say by itself: guesses for the next run.

        Args:
            logits: float32 [1 + guesses, vocab].
            left: tokens that the reply may still have, the one that ends it included.
        """
        said = [int(token_id) for token_id in logits.argmax(axis=-1)]
        for place, row in enumerate(logits):
            said[place] = self._say(row, said[place], left - place)
            if place >= len(guesses) or guesses[place] != said[place]:
                break
        return said

    def _say(self, row: NDArray[np.float32], likeliest: int, left: int) -> int:
        grammar, state = self._grammar, self.state
        if grammar.allows(state, likeliest) and not np.isnan(row[likeliest]):
            after = grammar.advance(state, likeliest)
            if grammar.steps_to_end[after] < left:
                self.state = after
                return likeliest
        chosen = sample_token(
            row[None], grammar=grammar, states=np.array([state], np.int32), steps_left=np.array([left], np.int32)
        )
        self.state = int(chosen.states[0])
        return int(chosen.token_ids[0])
