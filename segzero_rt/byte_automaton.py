"""Deterministic automata over bytes, put together from small patterns: what a grammar table is made from.

A pattern is a function that adds states to a builder and returns where it begins and ends; `compile_pattern` makes the
automaton by the subset construction. Nothing here knows of answers or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

DEAD = 0xFFFF
"""No state: the byte cannot come here."""


@dataclass(slots=True)
class Builder:
    """States of a non-deterministic automaton under construction."""

    edges: list[list[tuple[range, int]]] = field(default_factory=list)
    """Of each state: bytes and where they lead."""
    empty: list[list[int]] = field(default_factory=list)
    """Of each state: where it leads without a byte."""

    def state(self) -> int:
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1


Pattern: TypeAlias = Callable[[Builder, int], int]
"""Adds itself behind a state and returns the state where it ends."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ByteAutomaton:
    """S states, of which 0 is the first; from each the end can be reached."""

    next_state: NDArray[np.uint16]
    """uint16 [S, 256]: the state after a byte, or `DEAD`."""
    accepting: NDArray[np.bool_]
    """bool [S]: whether the text may end here."""

    def walk(self, data: bytes, state: int = 0) -> int:
        """The state after some bytes, or `DEAD`."""
        for byte in data:
            if state == DEAD:
                return DEAD
            state = int(self.next_state[state, byte])
        return state

    def accepts(self, data: bytes) -> bool:
        """Whether the bytes are a whole text."""
        state = self.walk(data)
        return state != DEAD and bool(self.accepting[state])


def literal(text: str) -> Pattern:
    """These characters."""

    def add(builder: Builder, state: int) -> int:
        for byte in text.encode():
            after = builder.state()
            builder.edges[state].append((range(byte, byte + 1), after))
            state = after
        return state

    return add


def one_of(first: str, last: str) -> Pattern:
    """One ASCII character from `first` to `last`."""

    def add(builder: Builder, state: int) -> int:
        after = builder.state()
        builder.edges[state].append((range(ord(first), ord(last) + 1), after))
        return after

    return add


def sequence(*parts: Pattern) -> Pattern:
    """One after the other."""

    def add(builder: Builder, state: int) -> int:
        for part in parts:
            state = part(builder, state)
        return state

    return add


def choice(*parts: Pattern) -> Pattern:
    """Any one of them."""

    def add(builder: Builder, state: int) -> int:
        end = builder.state()
        for part in parts:
            builder.empty[part(builder, state)].append(end)
        return end

    return add


def optional(part: Pattern) -> Pattern:
    """The part or nothing."""
    return choice(part, sequence())


def repeated(part: Pattern) -> Pattern:
    """The part any number of times, or nothing."""

    def add(builder: Builder, state: int) -> int:
        begin = builder.state()  # a state of its own: what leads back must not lead to what came before
        builder.empty[state].append(begin)
        builder.empty[part(builder, begin)].append(begin)
        return begin

    return add


def number_up_to(limit: int) -> Pattern:
    """A whole number from 0 to `limit` without leading zeros.

    Raises:
        ValueError: the limit is negative.
    """
    if limit < 0:
        raise ValueError(f"expected a limit from 0 on, got {limit}")
    digits, any_digit = str(limit), one_of("0", "9")
    shapes = [literal("0")]
    for length in range(1, len(digits)):
        shapes.append(sequence(one_of("1", "9"), *[any_digit] * (length - 1)))
    for place, digit in enumerate(digits):  # equal up to here, less here, anything behind
        low = "1" if place == 0 else "0"
        if digit > low:
            rest = [any_digit] * (len(digits) - place - 1)
            shapes.append(sequence(literal(digits[:place]), one_of(low, chr(ord(digit) - 1)), *rest))
    return choice(*shapes, literal(digits))


def text_until(stops: Mapping[str, Pattern]) -> Pattern:
    """Any UTF-8 text up to the first of the stops, with it, and then what belongs to that stop.

    Args:
        stops: words of ASCII, none of which holds another.
    """

    def add(builder: Builder, state: int) -> int:
        end = builder.state()
        prefixes = sorted({word[:length] for word in stops for length in range(len(word))})
        states = {prefix: builder.state() for prefix in prefixes}
        builder.empty[state].append(states[""])
        for prefix, here in states.items():
            for byte in range(0x80):
                seen = prefix + chr(byte)
                if seen in stops:
                    after = builder.state()
                    builder.empty[stops[seen](builder, after)].append(end)
                else:
                    after = states[_longest_known_end(seen, states)]
                builder.edges[here].append((range(byte, byte + 1), after))
        _add_wide_characters(builder, list(states.values()), states[""])
        return end

    return add


def compile_pattern(pattern: Pattern) -> ByteAutomaton:
    """The deterministic automaton of a pattern.

    Raises:
        ValueError: it has more states than a table can number.
    """
    builder = Builder()
    first = builder.state()
    last = pattern(builder, first)
    start = _closure(builder, [first])
    numbers, rows, pending = {start: 0}, [], [start]
    known: dict[frozenset[int], int] = {}
    for members in pending:
        row = [DEAD] * 256
        for byte, targets in _targets(builder, members).items():
            key = frozenset(targets)
            if key not in known:
                closed = _closure(builder, targets)
                if closed not in numbers:
                    numbers[closed] = len(numbers)
                    pending.append(closed)
                known[key] = numbers[closed]
            row[byte] = known[key]
        rows.append(row)
    if len(rows) >= DEAD:
        raise ValueError(f"expected fewer than {DEAD} states, got {len(rows)}")
    accepting = np.array([last in members for members in pending], np.bool_)
    return ByteAutomaton(next_state=np.array(rows, np.uint16), accepting=accepting)


def bytes_to_end(automaton: ByteAutomaton, usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each state, the fewest bytes to an accepting one; -1 where there is no way.

    Args:
        usable: bool [256], bytes that may be taken.
    """
    distances = np.where(automaton.accepting, 0, -1).astype(np.int64)
    targets = np.where(usable, automaton.next_state, DEAD).astype(np.int64)
    reached = np.append(automaton.accepting, np.zeros(DEAD + 1 - len(distances), np.bool_))
    for steps in range(1, len(distances)):
        fresh = (distances < 0) & reached[targets].any(axis=1)
        if not fresh.any():
            break
        distances[fresh] = steps
        reached[: len(distances)] |= fresh
    return distances


def _longest_known_end(seen: str, known: Mapping[str, int]) -> str:
    return next(seen[start:] for start in range(len(seen) + 1) if seen[start:] in known)


def _add_wide_characters(builder: Builder, begins: Sequence[int], end: int) -> None:
    """Characters beyond ASCII, well-formed by table 3-7 of Unicode 15: lead byte, then one to three more."""
    one, two, three = builder.state(), builder.state(), builder.state()
    builder.edges[one].append((range(0x80, 0xC0), end))
    builder.edges[two].append((range(0x80, 0xC0), one))
    builder.edges[three].append((range(0x80, 0xC0), two))
    leads = [(range(0xC2, 0xE0), one), (range(0xE1, 0xED), two), (range(0xEE, 0xF0), two), (range(0xF1, 0xF4), three)]
    for lead, second, after in (
        (0xE0, range(0xA0, 0xC0), one),
        (0xED, range(0x80, 0xA0), one),
        (0xF0, range(0x90, 0xC0), two),
        (0xF4, range(0x80, 0x90), two),
    ):
        middle = builder.state()
        builder.edges[middle].append((second, after))
        leads.append((range(lead, lead + 1), middle))
    for begin in begins:
        builder.edges[begin].extend(leads)


def _closure(builder: Builder, states: Iterable[int]) -> tuple[int, ...]:
    """The states and all that they lead to without a byte, in order."""
    found, pending = set(states), list(states)
    while pending:
        for after in builder.empty[pending.pop()]:
            if after not in found:
                found.add(after)
                pending.append(after)
    return tuple(sorted(found))


def _targets(builder: Builder, members: Sequence[int]) -> dict[int, set[int]]:
    """Where bytes lead from any of the states; those that lead nowhere are left out."""
    targets: dict[int, set[int]] = {}
    for member in members:
        for span, after in builder.edges[member]:
            for byte in span:
                targets.setdefault(byte, set()).add(after)
    return targets
