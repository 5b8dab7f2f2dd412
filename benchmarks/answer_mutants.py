"""Replies that are almost right: mutants of real, hostile and generated replies, made where it hurts a parser.

Mutations work on tokens (tags, brackets, keys, numbers, strings) rather than on bytes alone, so that most mutants get
past the first character. The same seed gives the same mutants.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

_TOKEN = re.compile(
    rb"</?(?:think|answer)>|```\w*|\"[^\"\n]{0,40}\"|'[^'\n]{0,40}'|[-+]?[0-9][0-9.]*(?:[eE][-+]?[0-9]+)?|\w+|\s+|."
    rb"|\n",
    re.DOTALL,
)
_BLANKS = [b" ", b"\n", b"\t", b"\r\n", b"\x0b", b"\x1c", b"\\n", b"\\t", b"\xc2\xa0", b"\xc2\x85", b"\xe2\x80\x83"]
_BLANKS += [b"\xe2\x80\x8b", b"\xef\xbb\xbf", b"\xe3\x80\x80", b"\xe2\x80\xa8", b"\xe1\x9a\x80", b"\xe2\x81\x9f"]
_NUMBERS = [
    b"0",
    b"-0",
    b"007",
    b"12",
    b"840",
    b"839.5",
    b"-5",
    b"+5",
    b".5",
    b"5.",
    b"1e2",
    b"1E-2",
    b"1e999",
    b"-1e999",
]
_NUMBERS += [b"1e-400", b"12345678901234567890", b"0.1000000000000000055511151231257827", b"999999999999999", b"1.2.3"]
_NUMBERS += [b"4.9e-324", b"2.2250738585072011e-308", b"9007199254740993", b"10", b"100", b"200", b"210", b"30", b"110"]
_NUMBERS += [b"9" * 400, b"1" * 1025, b"0." + b"3" * 300, b"NaN", b"nan", b"inf", b"-Infinity", b"0x10", b"12px", b"1e"]
_WORDS = [b"null", b"None", b"NULL", b"true", b"False", b"undefined", b"nul", b"-true"]
_KEYS = [b"bbox_2d", b"point_2d", b"bbox", b"points_1", b"points_2", b"points", b"box", b"BBox-2D", b"xyxy", b"label"]
_KEYS += [b"point 2", b"points_2d9", b"boundingBox2d", b"b_b_o_x", b"\\u0062box_2d", b"point_\\u0032d", b"bboxes", b""]
_KEYS += [b"bbox\\n", b"points_0", b"p\xc3\xb6int", b"\\ud83d\\ude00", b"\\ud83d", b"x" * 33, b"objects", b"points_10"]
_QUOTES = [b'"', b"'", b"`", b'\\"', b"\\'", b""]
_MARKS = [bytes([c]) for c in b"[]{}()<>,:;\"'`\\/#*-+.%_e"]
_FRAGMENTS = [
    *(b"<answer>", b"</answer>", b"<think>", b"</think>", b"<ANSWER>", b"</ answer >", b"< think>", b"< /answer>"),
    *(b"<answer", b"answer>", b"```json\n", b"```", b"``````", b"\\u12", b"\\u00", b"\\", b"//", b"/*", b"*/", b"# x"),
    *(b'["{', b'}"]', b"}}", b"{{", b"[]", b"{}", b"()", b"null", b'""', b"thinking process here </think>", b"\x00"),
    *(
        b"\x80",
        b"\xff",
        b"\xe2\x80",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x98\x80",
        b"\xc3\xa9",
        b"\xef\xbc\x91",
        b"\x7f",
        b"\x1f",
    ),
    *(b"the mug", b"man's", b"I see [two] mugs {here}", b", ", b": ", b"[1, 2, 3, 4]", b"[[1, 2], [3, 4]]", b"[120]"),
]


def mutants(seeds: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Endless mutants of the seeds and of generated replies.

    Args:
        seeds: replies to begin with; at least one.
        seed: of the random choices.
    """
    rng = random.Random(seed)
    while True:
        text = rng.choice(seeds) if rng.random() < 0.6 else generated_reply(rng)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5, 9))):
            text = _mutated(text, seeds, rng)
        yield text[:6000]


def generated_reply(rng: random.Random) -> bytes:
    """A reply by the grammar of real ones, loosely: thinking or none, an answer in tags or none, objects in a list."""
    answer = _value(rng, 0) if rng.random() < 0.4 else _objects(rng)
    if rng.random() < 0.2:
        answer = b"```json\n" + answer + b"\n```"
    if rng.random() < 0.85:
        answer = b"<answer>" + answer + b"</answer>"
    if rng.random() < 0.15:
        answer += rng.choice(_FRAGMENTS) + b"<answer>" + _objects(rng) + b"</answer>"
    thinking = b"<think> " + rng.choice((b"A mug.", b"", b"[1]", b"No <answer>[]</answer> yet.")) + b" </think>\n"
    return thinking + answer if rng.random() < 0.7 else answer


def _objects(rng: random.Random) -> bytes:
    objects = [_object(rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))]
    listed = rng.choice((b", ", b",", b" ", b",\n")).join(objects)
    return listed if rng.random() < 0.25 else b"[" + listed + b"]"


def _object(rng: random.Random) -> bytes:
    own = rng.choice(((b"bbox_2d", b"point_2d"), (b"bbox", b"points_1", b"points_2")))
    keys = [key if rng.random() < 0.9 else rng.choice(_KEYS) for key in own]
    if rng.random() < 0.2:
        keys.append(rng.choice(_KEYS))
    members = [_key(rng, key) + _list(rng, 4 if index == 0 else 2) for index, key in enumerate(keys)]
    return b"{" + b", ".join(members) + b"}"


def _key(rng: random.Random, key: bytes) -> bytes:
    quote = b'"' if rng.random() < 0.85 else rng.choice(_QUOTES)
    return quote + key + quote + rng.choice((b": ", b":", b" : "))


def _list(rng: random.Random, length: int) -> bytes:
    if rng.random() < 0.05:
        length = rng.randrange(6)
    numbers = sorted(rng.randrange(840) for _ in range(length)) if rng.random() < 0.8 else range(length)
    return b"[" + b", ".join(b"%d" % number for number in numbers) + b"]"


def _value(rng: random.Random, depth: int) -> bytes:
    kind = rng.randrange(9 if depth < 4 else 5)
    if kind < 2:
        return rng.choice(_NUMBERS)
    if kind == 2:
        return rng.choice(_WORDS)
    if kind == 3:
        return rng.choice((b'"a"', b'"12"', b'" 12.5 "', b'"\\u0031"', b'"\\ud83d\\ude00"', b'"man\'s"', b"'x'", b'""'))
    if kind < 7:
        return b"[" + b", ".join(_value(rng, depth + 1) for _ in range(rng.randrange(5))) + b"]"
    members = [_key(rng, rng.choice(_KEYS)) + _value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return b"{" + b", ".join(members) + b"}"


def _mutated(text: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    choice = rng.random()
    if choice < 0.08:
        return text[: rng.randrange(len(text) + 1)]
    if choice < 0.16:  # a piece of another reply
        other = rng.choice(seeds)
        begin = rng.randrange(len(other) + 1)
        at = rng.randrange(len(text) + 1)
        return text[:at] + other[begin : begin + rng.randrange(200)] + text[at:]
    if choice < 0.22:
        return _with_bytes(text, rng)
    tokens = _TOKEN.findall(text)
    if not tokens:
        return rng.choice(_FRAGMENTS)
    at = rng.randrange(len(tokens))
    if choice < 0.34:
        del tokens[at : at + rng.choice((1, 1, 1, 2, 4))]
    elif choice < 0.44:
        tokens[at:at] = tokens[at : at + rng.choice((1, 1, 3, 8))] * rng.choice((1, 1, 2, 40))
    elif choice < 0.52:
        other = rng.randrange(len(tokens))
        tokens[at], tokens[other] = tokens[other], tokens[at]
    elif choice < 0.80:
        tokens[at] = _replacement(tokens[at], rng)
    else:
        kinds = (_FRAGMENTS, _MARKS, _BLANKS, _NUMBERS, _WORDS)
        tokens.insert(at, rng.choice(rng.choice(kinds)))
    return b"".join(tokens)


def _with_bytes(text: bytes, rng: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        if at < len(changed) and rng.random() < 0.5:
            changed[at] = rng.randrange(256)
        else:
            changed.insert(at, rng.randrange(256))
    return bytes(changed)


def _replacement(token: bytes, rng: random.Random) -> bytes:
    """Another token of the same kind, or the same one written in another way."""
    if token[:1] in b"\"'" and len(token) > 1:
        quote = rng.choice(_QUOTES)
        return quote + (rng.choice(_KEYS) if rng.random() < 0.6 else token[1:-1]) + quote
    if token[:1].isdigit() or token[:1] in b"+-":
        return rng.choice(_NUMBERS)
    if token.isspace():
        return rng.choice(_BLANKS) * rng.choice((0, 1, 2, 9))
    if token.startswith(b"<"):
        return rng.choice(
            (token.upper(), token.replace(b">", b" >"), token.replace(b"<", b"< "), rng.choice(_FRAGMENTS))
        )
    if token.isalpha():
        return rng.choice((*_WORDS, token.swapcase(), rng.choice(_KEYS)))
    return rng.choice(_MARKS)
