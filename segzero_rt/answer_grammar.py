"""The grammar of a reply that can be read: free thinking, then the format's JSON with numbers inside the picture.

    thinking  </think>  blanks  <answer>  JSON  </answer>  end

The thinking is any text. It ends with its tag, or goes straight to `<answer>`; what follows is the format's own JSON:
its keys in their order, as many points as it has, whole numbers from 0 to the picture's sides, one blank or line feed
wherever JSON allows white space. What no such grammar can promise: that a box has an area, and that an answer is not
the prompt's example said again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer_format import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, AnswerFormat
from segzero_rt.byte_automaton import (
    DEAD,
    ByteAutomaton,
    Pattern,
    bytes_to_end,
    choice,
    compile_pattern,
    literal,
    number_up_to,
    optional,
    repeated,
    sequence,
    text_until,
)
from segzero_rt.errors import BundleError
from segzero_rt.kernels.sample_token import GrammarTable

MAX_BLANKS = 3
"""Blanks and line feeds between `</think>` and `<answer>`. Of an unbounded number a greedy policy may say no end."""

_BLANK = choice(literal(" "), literal("\n"))
_GAP = optional(_BLANK)


def answer_automaton(answer_format: AnswerFormat, answer_size_hw: tuple[int, int]) -> ByteAutomaton:
    """The bytes of a reply in a format.

    Args:
        answer_size_hw: height and width that coordinates count up to (`PolicyManifest.answer_size_hw`).

    Raises:
        ValueError: a size that is not positive.
    """
    if min(answer_size_hw) < 1:
        raise ValueError(f"expected a positive size, got {answer_size_hw}")
    answer = sequence(_GAP, json_pattern(answer_format, answer_size_hw), _GAP, literal(ANSWER_CLOSE))
    blanks = sequence(*[_GAP] * MAX_BLANKS)
    return compile_pattern(
        text_until({ANSWER_OPEN: answer, THINK_CLOSE: sequence(blanks, literal(ANSWER_OPEN), answer)})
    )


def json_pattern(answer_format: AnswerFormat, answer_size_hw: tuple[int, int]) -> Pattern:
    """What stands between the answer's tags, blanks at both ends aside."""
    height, width = answer_size_hw
    x, y = number_up_to(width), number_up_to(height)
    lists = {answer_format.box_key: [x, y, x, y]} | {key: [x, y] for key in answer_format.point_keys}
    members = [sequence(literal(f'"{key}"'), _mark(":"), _listed(numbers)) for key, numbers in lists.items()]
    one = sequence(literal("{"), _GAP, _separated(members), _GAP, literal("}"))
    if not answer_format.multiple:
        return choice(one, literal(answer_format.none_text))
    return choice(
        sequence(literal("["), _GAP, one, repeated(sequence(_mark(","), one)), _GAP, literal("]")),
        literal(answer_format.none_text),
    )


def token_table(automaton: ByteAutomaton, tokens: Sequence[bytes | None], end_token_ids: Sequence[int]) -> GrammarTable:
    """The automaton as a table over tokens.

    Args:
        tokens: the bytes of each token; None for what may never be said: special tokens, numbers without a token.
        end_token_ids: tokens that end a reply.

    Raises:
        BundleError: no token ends a reply, or the tokens lack single bytes that an answer may need.
    """
    ends = sorted({number for number in end_token_ids if 0 <= number < len(tokens)})
    if not ends:
        raise BundleError(f"expected a token that ends replies below {len(tokens)}, got {list(end_token_ids)}")
    single = np.zeros(256, np.bool_)
    for token in tokens:
        if token is not None and len(token) == 1:
            single[token[0]] = True
    steps = bytes_to_end(automaton, single)
    if (steps < 0).any():
        raise BundleError("expected a token for every single byte of an answer's JSON, got a vocabulary without some")
    ended = len(automaton.next_state)
    lengths = np.array([0 if token is None else len(token) for token in tokens])
    lengths[ends] = 0
    allowed = np.concatenate([_spellings(automaton, tokens, lengths), np.zeros((1, len(tokens)), np.bool_)])
    allowed[:ended][:, ends] = automaton.accepting[:, None]
    allowed[ended, ends] = True
    spelled = [token or b"" for token in tokens]
    return GrammarTable(
        next_state=np.concatenate([automaton.next_state, np.full((1, 256), DEAD, np.uint16)]),
        allowed=_packed(allowed),
        steps_to_end=np.append(steps + 1, 0).astype(np.int32),
        token_offsets=np.cumsum([0, *map(len, spelled)]).astype(np.int32),
        token_bytes=np.frombuffer(b"".join(spelled), np.uint8),
        end_tokens=_packed(np.isin(np.arange(len(tokens)), ends)[None])[0],
    )


def _spellings(
    automaton: ByteAutomaton, tokens: Sequence[bytes | None], lengths: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """bool [S, V]: whether all bytes of a token can follow a state. State by state, for all tokens at once; those of
    length 0 cannot."""
    spelled = np.zeros((len(tokens), int(lengths.max(initial=0))), np.uint8)
    for row, token in zip(spelled, tokens, strict=True):
        row[: len(token or b"")] = np.frombuffer((token or b"")[: spelled.shape[1]], np.uint8)
    table = automaton.next_state
    possible = np.zeros((len(automaton.next_state), len(tokens)), np.bool_)
    begun = np.flatnonzero(lengths)
    for state, survivors in enumerate(possible):
        alive = begun
        states = table[state][spelled[alive, 0]]
        for place in range(1, spelled.shape[1] + 1):
            going = states != DEAD
            alive, states = alive[going], states[going]
            survivors[alive[lengths[alive] == place]] = True
            longer = lengths[alive] > place
            alive, states = alive[longer], states[longer]
            if not len(alive):
                break
            states = table[states, spelled[alive, place]]
    return possible


def _packed(bits: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """bool [..., V] as uint32 [..., (V + 31) // 32], the lowest bit first."""
    padding = np.zeros((*bits.shape[:-1], -bits.shape[-1] % 32), np.bool_)
    packed = np.packbits(np.concatenate([bits, padding], axis=-1), axis=-1, bitorder="little")
    return np.asarray(packed.view("<u4"), np.uint32)


def _mark(character: str) -> Pattern:
    """A comma or colon with a blank on either side, or none."""
    return sequence(_GAP, literal(character), _GAP)


def _separated(parts: Sequence[Pattern]) -> Pattern:
    joined = [parts[0]]
    for part in parts[1:]:
        joined += [_mark(","), part]
    return sequence(*joined)


def _listed(numbers: Sequence[Pattern]) -> Pattern:
    return sequence(literal("["), _GAP, _separated(numbers), _GAP, literal("]"))
