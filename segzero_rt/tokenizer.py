"""Byte-level BPE from a `tokenizer.json`, token for token what the `tokenizers` library gives, in plain Python.

The library brings a hub client, an HTTP stack and 32 MiB with it, a tenth of the whole installation; what this family
of models needs of it is one kind of pre-tokenizer and one merge rule. Anything else in the file is refused:

* model BPE over bytes, without dropout, prefix, suffix, unknown token or byte fallback;
* normalizer none or NFC;
* pre-tokenizer ByteLevel, or a Split by a regular expression (pieces isolated) followed by ByteLevel;
* added tokens that match as they are written.

Sources: file format of huggingface/tokenizers 0.23; byte alphabet and merge rule of GPT-2 (openai/gpt-2, encoder.py).
"""

from __future__ import annotations

import heapq
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segzero_rt.errors import BundleError

_MAX_FILE_BYTES = 64 << 20
_MAX_CACHED_PIECES = 8192

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# `re` knows no Unicode categories. Every character beyond ASCII is replaced by one of these four for matching; pieces
# are then cut from the text itself. So the expression is compiled once, and only what occurs is looked up.
_LETTER, _NUMBER, _SPACE, _OTHER = "\xaa", "\xb2", "\xa0", "\xa1"
_CLASSES = {r"\p{L}": f"A-Za-z{_LETTER}", r"\p{N}": f"0-9{_NUMBER}", r"\s": rf"\t-\r {_SPACE}"}
_WHITE_SPACE = frozenset("\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))))
_PATTERN_TOKEN = re.compile(r"\\p\{[LN]\}|\\[sS]|\\.|\[\^?|\]|[^\\\[\]]", re.S)


class Tokenizer:
    """Text to token numbers and back. Use `Tokenizer.from_file`."""

    def __init__(self, document: dict[str, Any]) -> None:
        model = document["model"]
        self._vocabulary: dict[str, int] = dict(model["vocab"])
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
        self._split = re.compile(_python_pattern(_split_pattern(document["pre_tokenizer"])))
        self._normalizes = document.get("normalizer") is not None
        added: list[dict[str, Any]] = document.get("added_tokens") or []
        self._added = {token["content"]: int(token["id"]) for token in added}
        self._special = frozenset(int(token["id"]) for token in added if token["special"])
        self._any_added = _any_of(self._added)
        self._plain_added = _any_of(name for name, number in self._added.items() if number not in self._special)
        self._text_of = {number: token for token, number in self._vocabulary.items()} | {
            number: token for token, number in self._added.items()
        }
        self._cache: dict[str, tuple[int, ...]] = {}

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Raises:
            BundleError: not such a file, or one with parts that are not listed above.
        """
        try:
            if (size := path.stat().st_size) > _MAX_FILE_BYTES:
                raise BundleError(f"{path}: expected a tokenizer of at most {_MAX_FILE_BYTES} bytes, got {size}")
            document = json.loads(path.read_text(encoding="utf-8"))
            _check_supported(document)
            return cls(document)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
            raise BundleError(f"{path}: expected a tokenizer.json, got something else ({error!r:.100})") from error

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        return len(self._text_of)

    @property
    def end(self) -> int:
        """The number behind the last token's."""
        return max(self._text_of, default=-1) + 1

    def token_to_id(self, token: str) -> int | None:
        """Number of a token as it stands in the file."""
        return self._added.get(token, self._vocabulary.get(token))

    def token_bytes(self, number: int) -> bytes | None:
        """What a token adds to a reply's text, in UTF-8; None for special tokens and numbers that no token has."""
        return None if number in self._special or number not in self._text_of else self._bytes_of(number)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token numbers of `text`.

        Args:
            special: whether special tokens that are written out in the text count as such. False for what a user wrote.

        Raises:
            ValueError: the text holds half a surrogate pair.
        """
        pattern = self._any_added if special else self._plain_added
        numbers: list[int] = []
        end = 0
        for found in pattern.finditer(text) if pattern else ():
            numbers += self._encode_plain(text[end : found.start()])
            numbers.append(self._added[found.group()])
            end = found.end()
        return numbers + self._encode_plain(text[end:])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; numbers that no token has are left out, and special ones, unless they are asked for.

        Bytes that are no UTF-8 become replacement characters.
        """
        known = (number for number in token_ids if not (skip_special_tokens and number in self._special))
        return b"".join(map(self._bytes_of, known)).decode("utf-8", "replace")

    def _encode_plain(self, text: str) -> list[int]:
        if self._normalizes:
            text = unicodedata.normalize("NFC", text)
        numbers: list[int] = []
        end = 0
        for found in self._split.finditer("".join(map(_category, text)) if not text.isascii() else text):
            for start, stop in ((end, found.start()), found.span()):  # what no alternative matches is a piece, too
                if start < stop:
                    numbers += self._encode_piece(text[start:stop])
            end = found.end()
        return numbers + (list(self._encode_piece(text[end:])) if end < len(text) else [])

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        if (known := self._cache.get(piece)) is not None:
            return known
        parts = _merge([_BYTE_TO_CHARACTER[byte] for byte in piece.encode()], self._ranks)
        numbers = tuple(self._vocabulary[part] for part in parts if part in self._vocabulary)
        if len(self._cache) < _MAX_CACHED_PIECES:
            self._cache[piece] = numbers
        return numbers

    def _bytes_of(self, number: int) -> bytes:
        token: str = self._text_of.get(number, "")
        try:
            return bytes(_CHARACTER_TO_BYTE[character] for character in token)
        except KeyError:  # an added token is text, not bytes in the alphabet
            return token.encode()


def _merge(parts: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Joins neighbours, always the pair of lowest rank and of equals the leftmost, until no pair has a rank.

    A queue of pairs and links to the neighbours: a word of n letters takes n log n steps, not n times n.
    """
    before, behind = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    queue: list[tuple[int, int, str, str]] = []

    def offer(place: int) -> None:
        """Puts the pair that begins at `place` into the queue."""
        if place >= 0 and behind[place] < len(parts):
            left, right = parts[place], parts[behind[place]]
            if (rank := ranks.get((left, right))) is not None:
                heapq.heappush(queue, (rank, place, left, right))

    for place in range(len(parts)):
        offer(place)
    while queue:
        _, place, left, right = heapq.heappop(queue)
        other = behind[place]
        if parts[place] != left or other == len(parts) or parts[other] != right:
            continue  # one of the two has been joined with something else since
        parts[place], parts[other] = left + right, ""
        behind[place] = behind[other]
        if behind[place] < len(parts):
            before[behind[place]] = place
        offer(before[place])
        offer(place)
    return [part for part in parts if part]


def _byte_alphabet() -> list[str]:
    """A printable character for each byte: itself where it is printable Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_BYTE_TO_CHARACTER = _byte_alphabet()
_CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(_BYTE_TO_CHARACTER)}


def _category(character: str) -> str:
    """The stand-in of a character beyond ASCII."""
    if character.isascii():
        return character
    if character in _WHITE_SPACE:
        return _SPACE
    return {"L": _LETTER, "N": _NUMBER}.get(unicodedata.category(character)[0], _OTHER)


def _python_pattern(pattern: str) -> str:
    r"""The expression for `re`: `\p{L}`, `\p{N}`, `\s` and `\S` over the stand-ins, the rest as it is."""
    written: list[str] = []
    inside = False
    for part in _PATTERN_TOKEN.findall(pattern):
        if part in _CLASSES:
            part = _CLASSES[part] if inside else f"[{_CLASSES[part]}]"
        elif part == r"\S" and not inside:
            part = f"[^{_CLASSES[chr(92) + 's']}]"
        elif re.fullmatch(r"\\[A-Za-z]", part) and part not in (r"\r", r"\n", r"\t"):
            raise ValueError(f"the split expression uses {part}, which is not supported")
        elif part.startswith("["):
            inside = True
        elif part == "]":
            inside = False
        written.append(part)
    return "".join(written)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _split_pattern(pre_tokenizer: dict[str, Any]) -> str:
    if pre_tokenizer["type"] == "ByteLevel":
        return _GPT2_PATTERN
    pattern: str = pre_tokenizer["pretokenizers"][0]["pattern"]["Regex"]
    return pattern


def _check_supported(document: dict[str, Any]) -> None:
    """Raises ValueError with the first part of the file that this module does not do."""
    model = document["model"]
    off = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    _require(model.get("type", "BPE") == "BPE" and not any(model.get(name) for name in off), "model")
    normalizer = document.get("normalizer")
    _require(normalizer is None or normalizer == {"type": "NFC"}, "normalizer")
    pre_tokenizer = document["pre_tokenizer"]
    if pre_tokenizer["type"] == "Sequence":
        split, levels = pre_tokenizer["pretokenizers"]
        _require(split["type"] == "Split" and "Regex" in split["pattern"], "pre_tokenizer")
        _require(split["behavior"] == "Isolated" and not split.get("invert"), "pre_tokenizer")
        _require(not levels["use_regex"], "pre_tokenizer")
    else:
        levels = pre_tokenizer
        _require(levels.get("use_regex", True), "pre_tokenizer")
    _require(levels["type"] == "ByteLevel" and not levels["add_prefix_space"], "pre_tokenizer")
    decoder = document.get("decoder")
    _require(decoder is not None and decoder["type"] == "ByteLevel", "decoder")
    for token in document.get("added_tokens") or []:
        plain = not (token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
        _require(plain and bool(token["content"]), "added_tokens")


def _require(condition: bool, part: str) -> None:
    if not condition:
        raise ValueError(f"its {part} is of another kind")
