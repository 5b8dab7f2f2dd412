"""sample_token: the next token of each of B replies, greedily or at random, held to a grammar.

**Contract.** For each row, the same token in every build:

1. *Candidates* are the tokens that the row's grammar state allows; without a grammar, all. Where fewer tokens are left
   than the longest way to the end takes, only those after which the rest still suffices; where it never did, that is
   left aside. A logit that is no number makes no candidate as long as there is another.
2. *Temperature 0*: the candidate with the largest logit, of equals the first.
3. *Otherwise* each candidate weighs `2 ** (scale * (logit - largest))`, `scale = log2(e) / temperature`, in whole
   numbers: `WEIGHT_BITS` of fixed point, from float32 arithmetic that is spelled out in `weigh`. What weighs less than
   `2 ** -WEIGHT_BITS` of the likeliest is never drawn. Sums of whole numbers do not depend on their order.
4. *Top-p* keeps the likeliest candidates that together weigh `top_p` of all, and every one as heavy as the lightest.
5. *The draw*: `(kept weight * random) >> 64` by Philox4x32-10 (Salmon et al., SC 2011) with the row's seed as key and
   the token's place in its reply as counter; the first candidate whose running sum is greater. So a reply does not
   depend on the batch that it is in.
6. *The state* goes on by the token's bytes, or to the grammar's last state by a token that ends replies, where only
   such tokens are allowed. A row without any candidate gets token -1 and keeps its state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from segzero_rt.kernels.backend import Kernels, resolve_kernels

WEIGHT_BITS = 32
DEAD = 0xFFFF
LARGEST = float(np.finfo(np.float32).max)
# 2 ** f for f in [0, 1): of degree 5, exact at both ends, within 3e-7.
EXP2 = (1.0, 0.6931502223014832, 0.2401634007692337, 0.05582844465970993, 0.00896086823195219, 0.0018970622913911939)
Number = TypeVar("Number", np.int32, np.uint64)
NO_LIMIT = 1 << 30
"""Of `steps_left`: the reply may become as long as it likes."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GrammarTable:
    """A grammar over V tokens with S states, of which 0 is the first and S - 1 that of ended replies."""

    next_state: NDArray[np.uint16]
    """uint16 [S, 256]: the state after a byte, or `DEAD`."""
    allowed: NDArray[np.uint32]
    """uint32 [S, (V + 31) // 32]: bit i of word w is token 32 w + i."""
    steps_to_end: NDArray[np.int32]
    """int32 [S]: tokens that surely suffice to end a reply from here, the one that ends it included."""
    token_offsets: NDArray[np.int32]
    """int32 [V + 1]: the bytes of token i are those from entry i to entry i + 1."""
    token_bytes: NDArray[np.uint8]
    end_tokens: NDArray[np.uint32]
    """uint32 [(V + 31) // 32]: tokens that end a reply."""

    def __post_init__(self) -> None:
        states, words = len(self.next_state), (self.vocab_size + 31) // 32
        shapes = (self.next_state.shape, self.allowed.shape, self.steps_to_end.shape, self.end_tokens.shape)
        if shapes != ((states, 256), (states, words), (states,), (words,)) or not 1 < states < DEAD:
            raise ValueError(f"expected tables of {states} states and {self.vocab_size} tokens, got shapes {shapes}")
        if self.token_offsets[0] != 0 or (np.diff(self.token_offsets) < 0).any():
            raise ValueError("expected token offsets that begin with 0 and never fall")
        if self.token_offsets[-1] != len(self.token_bytes):
            raise ValueError(f"expected {self.token_offsets[-1]} bytes of tokens, got {len(self.token_bytes)}")
        targets = self.next_state[self.next_state != DEAD]
        if targets.size and targets.max() >= states:
            raise ValueError(f"expected states below {states}, got {targets.max()}")

    @property
    def vocab_size(self) -> int:
        return len(self.token_offsets) - 1

    @property
    def most_steps(self) -> int:
        """Of all states: with as many tokens left, no budget forbids anything."""
        return int(self.steps_to_end.max())

    @property
    def ended(self) -> int:
        """The state of replies that have ended."""
        return len(self.next_state) - 1

    def allows(self, state: int, token_id: int) -> bool:
        return bool(int(self.allowed[state, token_id >> 5]) >> (token_id & 31) & 1)

    def advance(self, state: int, token_id: int) -> int:
        """The state after an allowed token."""
        if int(self.end_tokens[token_id >> 5]) >> (token_id & 31) & 1:
            return self.ended
        begin, end = self.token_offsets[token_id : token_id + 2].tolist()
        for byte in self.token_bytes[begin:end].tolist():
            state = int(self.next_state[state, byte])
            if state == DEAD:
                break
        return state

    def allowed_tokens(self, state: int) -> NDArray[np.bool_]:
        """bool [V]."""
        bits = np.unpackbits(self.allowed[state].astype("<u4").view(np.uint8), bitorder="little")
        return bits[: self.vocab_size].astype(np.bool_)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledTokens:
    """One token for each of B replies."""

    token_ids: NDArray[np.int32]
    """int32 [B]; -1 where nothing could be said."""
    states: NDArray[np.int32]
    """int32 [B]: grammar states after them; as they were where there is no grammar."""


def sample_token(
    logits: NDArray[np.float32],
    *,
    grammar: GrammarTable | None = None,
    states: NDArray[np.int32] | None = None,
    steps_left: NDArray[np.int32] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: NDArray[np.uint64] | None = None,
    places: NDArray[np.int32] | None = None,
    kernels: Kernels | None = None,
) -> SampledTokens:
    """Chooses by the contract above.

    Args:
        logits: float32 [B, V].
        grammar: what may be said; None for anything.
        states: int32 [B], where each reply stands in the grammar; by default at its beginning.
        steps_left: int32 [B], tokens that each reply may still have, this one and the one that ends it included.
        temperature: from 0 (greedily) on.
        top_p: above 0, up to 1.
        seeds: uint64 [B]; by default 0.
        places: int32 [B], how many tokens each reply has; by default none.
        kernels: the build to use; by default what `resolve_kernels` gives.

    Raises:
        ValueError: logits of another dtype, shape or vocabulary, other arguments that do not fit, or a state that the
            grammar does not have.
    """
    if logits.dtype != np.float32 or logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"expected logits as float32 [B, V], got {logits.dtype} {list(logits.shape)}")
    check_choice(logits.shape[1], grammar, temperature, top_p)
    count = len(logits)
    at = _filled(states, count, 0, np.int32, "states")
    if grammar is not None and count and (at.min() < 0 or at.max() > grammar.ended):
        raise ValueError(f"expected states from 0 to {grammar.ended}, got {at.min()} to {at.max()}")
    left = _filled(steps_left, count, NO_LIMIT, np.int32, "steps_left")
    keys = _filled(seeds, count, 0, np.uint64, "seeds")
    said = _filled(places, count, 0, np.int32, "places")
    scale = sharpness(temperature)
    chosen = kernels or resolve_kernels()
    if chosen.device is not None:
        from segzero_rt.kernels.sample_token_device import sample_with_device

        return sample_with_device(chosen.device, logits, grammar, at, left, temperature, top_p, keys, said)
    if chosen.library is not None:
        from segzero_rt.kernels.sample_token_host import sample_on_host

        return sample_on_host(chosen.library, logits, grammar, at, left, scale, top_p, keys, said)
    tokens, after = np.full(count, -1, np.int32), at.copy()
    for row in range(count):
        candidates = _candidates(logits[row], grammar, int(at[row]), int(left[row]))
        if candidates.any():
            random = philox(int(keys[row]), int(said[row]))
            tokens[row] = _choose(logits[row], candidates, scale, top_p, random)
            after[row] = at[row] if grammar is None else grammar.advance(int(at[row]), int(tokens[row]))
    return SampledTokens(token_ids=tokens, states=after)


def check_choice(vocab_size: int, grammar: GrammarTable | None, temperature: float, top_p: float) -> None:
    """Raises:
    ValueError: numbers out of their range, or a grammar of another vocabulary.
    """
    if not (math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"expected a temperature from 0 on and top_p in (0, 1], got {temperature} and {top_p}")
    if grammar is not None and grammar.vocab_size != vocab_size:
        raise ValueError(f"expected logits of {grammar.vocab_size} tokens, got {vocab_size}")


def sharpness(temperature: float) -> float:
    """`log2(e) / temperature` as float32 holds it; 0 for a temperature of 0, which means greedily."""
    return float(np.float32(min(math.log2(math.e) / temperature, LARGEST))) if temperature > 0 else 0.0


def weigh(logits: NDArray[np.float32], largest: np.float32, scale: float) -> NDArray[np.uint64]:
    """Weights in `WEIGHT_BITS` of fixed point: uint64 in the shape of the logits; 0 for what is no number.

    Every step is one float32 operation, rounded to nearest; logits are held to finite numbers before.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        power = (_finite(logits) - largest) * np.float32(scale)
    counted = power > np.float32(-WEIGHT_BITS - 1)
    power = np.where(counted, power, np.float32(0))
    whole = np.floor(power)
    part = power - whole
    value = np.full_like(part, np.float32(EXP2[-1]))
    for factor in EXP2[-2::-1]:
        value = value * part + np.float32(factor)
    fixed = (value * np.float32(1 << WEIGHT_BITS)).astype(np.uint64) >> (-whole).astype(np.uint64)
    return np.where(counted, fixed, np.uint64(0))


def philox(seed: int, place: int) -> int:
    """64 random bits: the first two words of Philox4x32-10 with the seed as key and the place as counter."""
    words, keys = [place & 0xFFFFFFFF, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    return philox_words(words, keys)[0] | philox_words(words, keys)[1] << 32


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10: four words of 32 bits from a counter of four and a key of two."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k, second & 0xFFFFFFFF, (first >> 32) ^ d ^ m, first & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def _candidates(logits: NDArray[np.float32], grammar: GrammarTable | None, state: int, left: int) -> NDArray[np.bool_]:
    candidates = np.ones(len(logits), np.bool_) if grammar is None else grammar.allowed_tokens(state)
    if grammar is not None and left < grammar.most_steps:
        affordable = candidates.copy()
        for token_id in np.flatnonzero(candidates):
            after = grammar.advance(state, int(token_id))
            affordable[token_id] = after != DEAD and grammar.steps_to_end[after] < left
        candidates = affordable if affordable.any() else candidates
    numbers = candidates & ~np.isnan(logits)
    return numbers if numbers.any() else candidates


def _choose(logits: NDArray[np.float32], candidates: NDArray[np.bool_], scale: float, top_p: float, random: int) -> int:
    indices = np.flatnonzero(candidates)
    values = _finite(logits[indices])
    if np.isnan(values).all():
        return int(indices[0])
    if scale == 0.0:
        return int(indices[values.argmax()])
    weights = weigh(values, values.max(), scale)
    needed = max(int(top_p * float(weights.sum())), 1)
    descending = np.sort(weights)[::-1]
    lightest = descending[np.searchsorted(descending.cumsum(), np.uint64(needed))]
    kept = np.where(weights >= max(int(lightest), 1), weights, 0).cumsum()
    drawn = int(kept[-1]) * random >> 64
    return int(indices[np.searchsorted(kept, np.uint64(drawn), side="right")])


def _finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(logits, np.float32(-LARGEST), np.float32(LARGEST))


def _filled(
    values: NDArray[Number] | None, count: int, default: int, dtype: type[Number], name: str
) -> NDArray[Number]:
    if values is None:
        return np.full(count, default, dtype)
    if values.dtype != dtype or values.shape != (count,):
        raise ValueError(f"expected {name} as {np.dtype(dtype)} [{count}], got {values.dtype} {list(values.shape)}")
    return np.ascontiguousarray(values)
