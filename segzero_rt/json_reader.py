"""The strict JSON reader: RFC 8259, and the dialect of Python's `json.loads` that the families' own scripts accept.

One forward scan, no backtracking, no recursion deeper than `MAX_DEPTH`: time is linear in the text, whatever the text.
It never raises; a text that is not JSON gives a `JsonReading` with a `JsonFault` and the position where it was met.
What models really write is read by `json_tolerant`, which shares the types and limits below.

Limits, which RFC 8259 §9 allows a reader to set: nesting up to `MAX_DEPTH`, numbers up to `MAX_NUMBER_CHARS`
characters, in the RFC dialect no number beyond the range of a double. An object's repeated key keeps the last value.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Union

JsonValue = Union[None, bool, int, float, str, "list[JsonValue]", "dict[str, JsonValue]"]

MAX_DEPTH = 64
"""Lists and objects within one another."""
MAX_NUMBER_CHARS = 1024
"""Characters of one number; beyond 15 digits it is read as a double."""


class JsonFault(str, Enum):
    """Why a text was not read. Closed set; the kernels return the same codes."""

    ENDED = "ended"
    """The text ended inside a value."""
    UNEXPECTED = "unexpected"
    """A character that cannot stand here."""
    BAD_NUMBER = "bad_number"
    """Not a number of this dialect, too long, or out of range."""
    BAD_STRING = "bad_string"
    """A raw control character or an unknown escape in a string."""
    TOO_DEEP = "too_deep"
    """More than `MAX_DEPTH` lists and objects within one another."""
    TRAILING = "trailing"
    """A value was read, but the document goes on."""


class Dialect(str, Enum):
    """Which documents the strict reader accepts."""

    RFC8259 = "rfc8259"
    PYTHON = "python"
    """RFC 8259, and `NaN`, `Infinity`, `-Infinity`, and numbers beyond a double's range (read as infinite)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonReading:
    """One attempt to read a value. Positions count characters of the text given, not of a slice of it."""

    value: JsonValue
    """The value; None beside a fault."""
    end: int
    """Just after the value; beside a fault, where it was met."""
    fault: JsonFault | None = None


class JsonStop(Exception):
    """Carries a fault out of the scan. Internal to the readers: it never reaches a caller."""

    def __init__(self, fault: JsonFault, position: int) -> None:
        super().__init__(fault, position)
        self.fault = fault
        self.position = position


_BLANK = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# RFC 8259 §8.1 wants UTF-8, in which no surrogate stands by itself; Python's reader takes any character.
_PLAIN = {
    "rfc8259": re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]*'),
    "python": re.compile(r'[^"\\\x00-\x1f]*'),
}
_PLAIN_STRING = re.compile(r'"([^"\\\x00-\x1f\ud800-\udfff]*)"')
_INTEGER = "-?(?:0|[1-9][0-9]{0,14})"
_PLAIN_INTEGERS = re.compile(rf"\[ ?({_INTEGER}(?:, ?{_INTEGER}){{0,15}}) ?\]")
_HEX4 = re.compile(r"[0-9a-fA-F]{4}")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS: dict[str, JsonValue] = {"true": True, "false": False, "null": None}
_PYTHON_LITERALS: dict[str, JsonValue] = {
    **_LITERALS,
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}


def read_json(text: str, *, start: int = 0, end: int | None = None, dialect: Dialect = Dialect.RFC8259) -> JsonReading:
    """Reads `text[start:end]` as one JSON document, white space around it included. Never raises.

    Returns:
        The value, or the first fault and its position. Integers of up to 15 digits are `int`, other numbers `float`.
    """
    scan = _StrictScan(text, start, len(text) if end is None else end, dialect)
    try:
        value = scan.document()
    except JsonStop as stop:
        return JsonReading(value=None, end=stop.position, fault=stop.fault)
    return JsonReading(value=value, end=scan.at)


def plain_integers(text: str, at: int, end: int) -> tuple[list[JsonValue], int] | None:
    """Shortcut for the list that makes up most of an answer: `[12, 34, …]`, up to 16 whole numbers of up to 15 digits.

    Returns its value and the position after it, exactly as the readers' general rules give them; None for any other
    text. Looks at no more than the list itself.
    """
    found = _PLAIN_INTEGERS.match(text, at, end)
    return None if found is None else ([int(token) for token in found[1].split(",")], found.end())


def number_value(token: str) -> int | float:
    """Returns the value of a decimal number of at most `MAX_NUMBER_CHARS`; beyond a double's range it is infinite."""
    if len(token) <= 15 and token.lstrip("+-").isdecimal():
        return int(token)
    return float(token)


def unescape(text: str, at: int, end: int) -> tuple[str, int]:
    """Reads one escape whose backslash stands at `at`; returns its character(s) and the position after it.

    A high surrogate followed by an escaped low one is one character; a lone surrogate stays as it is.

    Raises:
        JsonStop: unknown escape, or the text ends inside it.
    """
    if at + 1 >= end:
        raise JsonStop(JsonFault.ENDED, end)
    mark = text[at + 1]
    if mark in _ESCAPES:
        return _ESCAPES[mark], at + 2
    if mark != "u":
        raise JsonStop(JsonFault.BAD_STRING, at)
    unit = _hex_unit(text, at + 2, end)
    if 0xD800 <= unit <= 0xDBFF and text.startswith("\\u", at + 6, end) and _HEX4.match(text, at + 8, end):
        low = int(text[at + 8 : at + 12], 16)
        if 0xDC00 <= low <= 0xDFFF:
            return chr(0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)), at + 12
    return chr(unit), at + 6


def _hex_unit(text: str, at: int, end: int) -> int:
    if _HEX4.match(text, at, end) is None:
        raise JsonStop(JsonFault.BAD_STRING if at + 4 <= end else JsonFault.ENDED, min(at, end))
    return int(text[at : at + 4], 16)


class _StrictScan:
    """State of one strict scan: the position `at` only moves forward."""

    __slots__ = ("_end", "_finite", "_literals", "_plain", "_text", "at")

    def __init__(self, text: str, start: int, end: int, dialect: Dialect) -> None:
        self.at = start
        self._text = text
        self._end = end
        self._plain = _PLAIN[dialect.value]
        self._finite = dialect is Dialect.RFC8259
        self._literals = _LITERALS if dialect is Dialect.RFC8259 else _PYTHON_LITERALS

    def document(self) -> JsonValue:
        self._skip_blank()
        value = self._value(0)
        self._skip_blank()
        if self.at < self._end:
            raise JsonStop(JsonFault.TRAILING, self.at)
        return value

    def _skip_blank(self) -> None:
        blank = _BLANK.match(self._text, self.at, self._end)
        if blank is not None:
            self.at = blank.end()

    def _peek(self) -> str:
        if self.at >= self._end:
            raise JsonStop(JsonFault.ENDED, self._end)
        return self._text[self.at]

    def _value(self, depth: int) -> JsonValue:
        mark = self._peek()
        if mark == "{":
            return self._object(depth)
        if mark == "[":
            plain = plain_integers(self._text, self.at, self._end) if depth < MAX_DEPTH else None
            if plain is None:
                return self._array(depth)
            items, self.at = plain
            return items
        if mark == '"':
            return self._string()
        if mark not in "0123456789":
            for word, value in self._literals.items():
                if self._text.startswith(word, self.at, self._end):
                    self.at += len(word)
                    return value
        return self._number()

    def _open(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise JsonStop(JsonFault.TOO_DEEP, self.at)
        self.at += 1
        self._skip_blank()

    def _object(self, depth: int) -> JsonValue:
        self._open(depth)
        members: dict[str, JsonValue] = {}
        if self._peek() == "}":
            self.at += 1
            return members
        while True:
            if self._peek() != '"':
                raise JsonStop(JsonFault.UNEXPECTED, self.at)
            key = self._string()
            self._skip_blank()
            self._expect(":")
            members[key] = self._value(depth + 1)
            if self._closes("}"):
                return members

    def _array(self, depth: int) -> JsonValue:
        self._open(depth)
        items: list[JsonValue] = []
        if self._peek() == "]":
            self.at += 1
            return items
        while True:
            items.append(self._value(depth + 1))
            if self._closes("]"):
                return items

    def _closes(self, closer: str) -> bool:
        """Reads what stands after an element: True for the closer, False for a comma."""
        self._skip_blank()
        if self._peek() == closer:
            self.at += 1
            return True
        self._expect(",")
        return False

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise JsonStop(JsonFault.UNEXPECTED, self.at)
        self.at += 1
        self._skip_blank()

    def _number(self) -> int | float:
        found = _NUMBER.match(self._text, self.at, self._end)
        if found is None:
            lone_minus = self._text[self.at] == "-"
            raise JsonStop(JsonFault.BAD_NUMBER if lone_minus else JsonFault.UNEXPECTED, self.at)
        if found.end() - self.at > MAX_NUMBER_CHARS:
            raise JsonStop(JsonFault.BAD_NUMBER, self.at)
        value = number_value(found.group())
        if self._finite and not math.isfinite(value):
            raise JsonStop(JsonFault.BAD_NUMBER, self.at)
        self.at = found.end()
        return value

    def _string(self) -> str:
        text, end, at = self._text, self._end, self.at + 1
        whole = _PLAIN_STRING.match(text, self.at, end)
        if whole is not None:
            self.at = whole.end()
            return whole[1]
        parts: list[str] = []
        while True:
            plain = self._plain.match(text, at, end)
            stop = at if plain is None else plain.end()
            parts.append(text[at:stop])
            if stop >= end:
                raise JsonStop(JsonFault.ENDED, end)
            mark = text[stop]
            if mark == '"':
                self.at = stop + 1
                return parts[0] if len(parts) == 1 else "".join(parts)
            if mark != "\\":
                raise JsonStop(JsonFault.BAD_STRING, stop)
            char, at = unescape(text, stop, end)
            parts.append(char)
