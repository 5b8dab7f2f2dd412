r"""The tolerant JSON reader: what real policies write, with no guessing of numbers.

It reads one value at a given place and stops right after it. Same guarantees as the strict reader: one forward scan,
bounded depth and number length, linear time, never raises. `at` only moves forward; no rule looks further ahead than
the next character that is not blank.

Grammar, beyond RFC 8259 ("in the open" = inside no object, where only lists of objects can stand):

    blank     = Unicode white space | U+FEFF | U+200B | the two characters \n, \r, \t written out
              | "//" or "#" to the end of line or "<" | "/*" … "*/"
    value     = object | array | string | number | word
    object    = "{" [ member { "," member } [ "," ] ] "}"       the "," may miss after a list or object
    member    = ( string | name [ stray quote ] ) ":" value       name = [A-Za-z_][A-Za-z0-9_-]*
    array     = "[" … "]" | "(" … ")"                             a last "," may stand
    in the open, around an object in an array:
                stray quotes and "{" before its "{"; stray quotes and "}" after it; a missing "," before the next "{";
                a missing "]" at the think or answer tag that follows, or, if `may_end`, at the end of the text
    string    = quoted by ", ', ` or \" (closed by the same); any characters, line feeds too. A quote inside closes it
                only if one of , : } ] ) or a comment follows, or the text ends: `"man's "best" hat"` is one string
    number    = [+-] digits [ "." digits ] [ exponent ], leading zeros, ".5", "5." and "+5" allowed
    word      = true false null none nan inf infinity in any case, the last two with a sign

Never supplied: a missing "}", a missing bracket of a list of numbers, a missing digit. What a cut or a slip of the pen
leaves of an object is a fault, so that no box is ever made up from half of one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from segzero_rt.answer_tags import TAG
from segzero_rt.json_reader import (
    MAX_DEPTH,
    MAX_NUMBER_CHARS,
    JsonFault,
    JsonStop,
    JsonValue,
    number_value,
    plain_integers,
    unescape,
)

_SPACE = re.compile(r"[\s\ufeff\u200b]*")
_LINE_COMMENT = re.compile(r"[^\n<]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_PLAIN_KEY = re.compile(r'"([A-Za-z0-9_]{1,32})" ?: ?')
_WORD = re.compile(r"[+-]?[A-Za-z]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_MARKS = "{}[](),:\"'"
_QUOTES = "\"'`"
_RUNS = {quote: re.compile(rf"[^{quote}\\]*") for quote in _QUOTES}
_AFTER_STRING = ",:}])#"
_AFTER_NUMBER = re.compile(r"[\w.%]")
_WORDS: dict[str, JsonValue] = {
    "true": True,
    "false": False,
    "null": None,
    "none": None,
    "nan": math.nan,
    "inf": math.inf,
    "infinity": math.inf,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TolerantReading:
    """One attempt to read a value at a place in a text."""

    value: JsonValue
    """The value; None beside a fault."""
    end: int
    """Just after the value; beside a fault, where it was met. Always after the start."""
    fault: JsonFault | None = None
    has_member: bool = False
    """Whether a `key:` was read. A fault before the first one means prose in brackets rather than a broken answer."""


def read_tolerant(text: str, start: int, *, may_end: bool) -> TolerantReading:
    """Reads the value whose bracket stands at `start`, by the grammar above. Never raises.

    Args:
        text: the whole reply.
        start: position of a `[` or `{`.
        may_end: whether the end of the text may stand for the missing `]` of a list of whole objects. False for a
            reply that was cut by its token budget.
    """
    scan = _TolerantScan(text, start, may_end)
    try:
        value = scan.read()
    except JsonStop as stop:
        end = max(stop.position, start + 1)
        return TolerantReading(value=None, end=end, fault=stop.fault, has_member=scan.has_member)
    return TolerantReading(value=value, end=scan.at, has_member=scan.has_member)


class _TolerantScan:
    """State of one tolerant scan: the position `at` only moves forward."""

    __slots__ = ("_end", "_may_end", "_text", "at", "has_member")

    def __init__(self, text: str, start: int, may_end: bool) -> None:
        self.at = start
        self.has_member = False
        self._text = text
        self._end = len(text)
        self._may_end = may_end

    def read(self) -> JsonValue:
        return self._value(0, in_object=False)

    def _skip_blank(self) -> None:
        text, at = self._text, self.at
        if text[at : at + 1] in _MARKS:  # nothing to skip, the usual case; also true at the end of the text
            return
        while True:
            at = _match_end(_SPACE, text, at)
            mark = text[at : at + 2]
            if mark in ("\\n", "\\r", "\\t"):
                at += 2
            elif mark == "//" or mark[:1] == "#":
                at = _match_end(_LINE_COMMENT, text, at)
            elif mark == "/*":
                close = text.find("*/", at + 2)
                if close < 0:
                    raise JsonStop(JsonFault.ENDED, self._end)
                at = close + 2
            else:
                self.at = at
                return

    def _peek(self) -> str:
        if self.at >= self._end:
            raise JsonStop(JsonFault.ENDED, self._end)
        return self._text[self.at]

    def _quote_length(self) -> int:
        """Returns the length of the quote at `at`: 1, 2 for one with a backslash before it, 0 for none."""
        mark = self._text[self.at : self.at + 2]
        if mark[:1] in _QUOTES:  # also true at the end of the text, where `mark` is empty
            return len(mark[:1])
        return 2 if len(mark) == 2 and mark[0] == "\\" and mark[1] in _QUOTES else 0

    def _value(self, depth: int, *, in_object: bool) -> JsonValue:
        mark = self._peek()
        if mark == "{":
            return self._object(depth)
        plain = plain_integers(self._text, self.at, self._end) if mark == "[" and depth < MAX_DEPTH else None
        if plain is not None:
            items, self.at = plain
            return items
        if mark in "[(":
            return self._array(depth, "]" if mark == "[" else ")", in_object)
        if self._quote_length():
            return self._string()
        number = _NUMBER.match(self._text, self.at)
        if number is not None:
            return self._number(number.end())
        word = _WORD.match(self._text, self.at)
        if word is None:
            raise JsonStop(JsonFault.UNEXPECTED, self.at)
        return self._word(word.group())

    def _open(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise JsonStop(JsonFault.TOO_DEEP, self.at)
        self.at += 1

    def _object(self, depth: int) -> JsonValue:
        self._open(depth)
        members: dict[str, JsonValue] = {}
        while True:
            self._skip_blank()
            if self._peek() == "}":
                self.at += 1
                return members
            key = self._key_and_colon()
            self.has_member = True
            self._skip_blank()
            value = members[key] = self._value(depth + 1, in_object=True)
            self._skip_blank()
            mark = self._peek()
            if mark == ",":
                self.at += 1
            elif mark != "}" and not (isinstance(value, (list, dict)) and self._quote_length()):
                raise JsonStop(JsonFault.UNEXPECTED, self.at)

    def _key_and_colon(self) -> str:
        plain = _PLAIN_KEY.match(self._text, self.at)
        if plain is not None:  # the same as below, at once
            self.at = plain.end()
            return plain[1]
        key = self._key()
        self._skip_blank()
        if self._peek() != ":":
            raise JsonStop(JsonFault.UNEXPECTED, self.at)
        self.at += 1
        return key

    def _key(self) -> str:
        if self._quote_length():
            return self._string()
        name = _NAME.match(self._text, self.at)
        if name is None:
            raise JsonStop(JsonFault.UNEXPECTED, self.at)
        self.at = name.end()
        self.at += self._quote_length()
        return name.group()

    def _array(self, depth: int, closer: str, in_object: bool) -> JsonValue:
        self._open(depth)
        items: list[JsonValue] = []
        while True:
            self._skip_blank()
            if not in_object and self._closes_itself(items):
                return items
            if self._peek() == closer:
                self.at += 1
                return items
            if not in_object:
                self._skip_stray_opening()
            items.append(self._value(depth + 1, in_object=in_object))
            self._skip_blank()
            self._read_separator(items[-1], closer, in_object)

    def _read_separator(self, item: JsonValue, closer: str, in_object: bool) -> None:
        """Moves over the comma after an element; leaves a closer, or what may stand for one, to the caller."""
        whole = not in_object and isinstance(item, (list, dict))
        if whole:
            self._skip_stray_marks()
            if self.at >= self._end or self._text[self.at] in "<{" or self._quote_length():
                return
        mark = self._peek()
        if mark == ",":
            self.at += 1
        elif mark != closer:
            raise JsonStop(JsonFault.UNEXPECTED, self.at)

    def _closes_itself(self, items: list[JsonValue]) -> bool:
        """Whether a list of whole objects ends here without its bracket: at a tag or the end of the text."""
        if not items or not isinstance(items[-1], (list, dict)):
            return False
        if self.at >= self._end:
            return self._may_end
        return self._text[self.at] == "<" and TAG.match(self._text, self.at) is not None

    def _skip_stray_opening(self) -> None:
        """Moves over quotes and opening braces right before an object; any other quote begins a string."""
        while self.at < self._end:
            length = 1 if self._text[self.at] == "{" else self._quote_length()
            after = _match_end(_SPACE, self._text, self.at + length)
            if not length or not self._text.startswith("{", after):
                return
            self.at = after

    def _skip_stray_marks(self) -> None:
        """Moves over quotes and closing braces left over after a whole object, unless the next object follows."""
        while self.at < self._end:
            length = 1 if self._text[self.at] == "}" else self._quote_length()
            if not length:
                return
            after = _match_end(_SPACE, self._text, self.at + length)
            if self._text.startswith("{", after):
                return
            self.at = after
            self._skip_blank()

    def _number(self, end: int) -> int | float:
        if end - self.at > MAX_NUMBER_CHARS or _AFTER_NUMBER.match(self._text, end):
            raise JsonStop(JsonFault.BAD_NUMBER, self.at)
        token = self._text[self.at : end]
        self.at = end
        return number_value(token)

    def _word(self, word: str) -> JsonValue:
        name = word.lstrip("+-").lower()
        value = _WORDS.get(name, ...) if len(word) <= 10 else ...
        if value is ... or (name != word.lower() and not isinstance(value, float)):
            raise JsonStop(JsonFault.UNEXPECTED, self.at)
        self.at += len(word)
        if _AFTER_NUMBER.match(self._text, self.at):
            raise JsonStop(JsonFault.UNEXPECTED, self.at)
        return -value if word[0] == "-" and isinstance(value, float) else value

    def _string(self) -> str:
        text, end = self._text, self._end
        length = self._quote_length()
        quote = text[self.at + length - 1]
        run = _RUNS[quote]
        at = self.at + length
        parts: list[str] = []
        while True:
            stop = _match_end(run, text, at)
            parts.append(text[at:stop])
            if stop >= end:
                raise JsonStop(JsonFault.ENDED, end)
            closing = text[stop] == quote if length == 1 else text.startswith("\\" + quote, stop)
            if closing and self._ends_string(stop + length):
                self.at = stop + length
                return parts[0] if len(parts) == 1 else "".join(parts)
            if text[stop] == quote:
                char, at = quote, stop + 1
            else:
                char, at = _lenient_escape(text, stop, end)
            parts.append(char)

    def _ends_string(self, at: int) -> bool:
        """Whether a quote just before `at` closes its string, by the next mark that is not blank."""
        after = _match_end(_SPACE, self._text, at)
        mark = self._text[after : after + 2]
        return mark[:1] in _AFTER_STRING or mark in ("//", "/*", "\\n", "\\r", "\\t")


def _match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _lenient_escape(text: str, at: int, end: int) -> tuple[str, int]:
    """An escape of JSON, or any other character after a backslash for itself."""
    try:
        return unescape(text, at, end)
    except JsonStop as stop:
        if stop.fault is JsonFault.ENDED:
            raise
        return text[at + 1], at + 2
