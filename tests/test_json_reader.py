"""The JSON readers: public suites and a differential test for the strict one, a table of notations for the other."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import pytest

from segzero_rt.json_reader import MAX_DEPTH, MAX_NUMBER_CHARS, Dialect, JsonFault, read_json
from segzero_rt.json_tolerant import read_tolerant

SUITES = Path(__file__).resolve().parents[1] / ".." / "shared" / "assets" / "json"
NEEDS_SUITES = pytest.mark.skipif(not SUITES.exists(), reason=f"public JSON suites are not at {SUITES}")

# simdjson's own exclusions, and one limit of simdjson's (integers of 64 bits) that RFC 8259 does not ask for.
SIMDJSON_ALLOWED = {
    "fail01_EXCLUDE.json": "RFC 8259 allows any value at the top",
    "fail18_EXCLUDE.json": "20 levels; the limit here is 64",
    "fail39_EXCLUDE.json": "RFC 8259 allows a repeated key",
    "fail41_toolarge.json": "an integer above 64 bits is read as a double",
}
# What RFC 8259 leaves to the reader (i_ files): those accepted here. The others are refused: not UTF-8, a byte order
# mark, more than 64 levels, or a number beyond a double's range.
SUITE_OPTIONAL_ACCEPTED = {
    "i_number_double_huge_neg_exp.json",
    "i_number_real_underflow.json",
    "i_number_too_big_neg_int.json",
    "i_number_too_big_pos_int.json",
    "i_number_very_big_negative_int.json",
    "i_object_key_lone_2nd_surrogate.json",
    "i_string_1st_surrogate_but_2nd_missing.json",
    "i_string_1st_valid_surrogate_2nd_invalid.json",
    "i_string_incomplete_surrogate_and_escape_valid.json",
    "i_string_incomplete_surrogate_pair.json",
    "i_string_incomplete_surrogates_escape_valid.json",
    "i_string_invalid_lonely_surrogate.json",
    "i_string_invalid_surrogate.json",
    "i_string_inverted_surrogates_U+1D11E.json",
    "i_string_lone_second_surrogate.json",
}


def _accepts(path: Path) -> bool:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:  # RFC 8259 §8.1: JSON text is UTF-8
        return False
    return read_json(text).fault is None


@NEEDS_SUITES
def test_json_test_suite() -> None:
    files = sorted((SUITES / "JSONTestSuite_test_parsing").glob("*.json"))
    assert len(files) == 318
    wrong = [
        path.name
        for path in files
        if _accepts(path) != (path.name.startswith("y_") or path.name in SUITE_OPTIONAL_ACCEPTED)
    ]
    assert wrong == []


@NEEDS_SUITES
def test_simdjson_jsonchecker() -> None:
    files = sorted((SUITES / "simdjson_jsonchecker").glob("*.json"))
    assert len(files) == 27 + 81
    wrong = [
        path.name for path in files if _accepts(path) != (path.name.startswith("pass") or path.name in SIMDJSON_ALLOWED)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "fault", "position"),
    [
        ("", JsonFault.ENDED, 0),
        ("  ", JsonFault.ENDED, 2),
        ("[1, 2", JsonFault.ENDED, 5),
        ('{"a', JsonFault.ENDED, 3),
        ('{"a": "\\u00', JsonFault.ENDED, 9),
        ("[1 2]", JsonFault.UNEXPECTED, 3),
        ("[,]", JsonFault.UNEXPECTED, 1),
        ("[1,]", JsonFault.UNEXPECTED, 3),
        ("{1: 2}", JsonFault.UNEXPECTED, 1),
        ("nul", JsonFault.UNEXPECTED, 0),
        ("[-]", JsonFault.BAD_NUMBER, 1),
        ("[1e999]", JsonFault.BAD_NUMBER, 1),
        ("9" * (MAX_NUMBER_CHARS + 1), JsonFault.BAD_NUMBER, 0),
        ('["\t"]', JsonFault.BAD_STRING, 2),
        ('["\\x"]', JsonFault.BAD_STRING, 2),
        ("[" * (MAX_DEPTH + 1), JsonFault.TOO_DEEP, MAX_DEPTH),
        ("[] x", JsonFault.TRAILING, 3),
        ("01", JsonFault.TRAILING, 1),
        ("NaN", JsonFault.UNEXPECTED, 0),
    ],
)
def test_fault_and_where(text: str, fault: JsonFault, position: int) -> None:
    reading = read_json(text)
    assert (reading.fault, reading.end, reading.value) == (fault, position, None)


def test_depth_limit_is_exact() -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        inner = "[]" if opening == "[" else "{}"
        assert read_json(opening * (MAX_DEPTH - 1) + inner + closing * (MAX_DEPTH - 1)).fault is None
        assert read_json(opening * MAX_DEPTH + inner + closing * MAX_DEPTH).fault is JsonFault.TOO_DEEP
        assert read_json(opening * MAX_DEPTH + "[1, 2]" + closing * MAX_DEPTH).fault is JsonFault.TOO_DEEP


def test_part_of_a_text() -> None:
    reading = read_json('xx [1, "a"] yy', start=2, end=12)
    assert (reading.value, reading.end, reading.fault) == ([1, "a"], 12, None)
    assert read_json("xx [1, 2]", start=2, end=8).fault is JsonFault.ENDED
    assert read_json('["ab"]', end=4).fault is JsonFault.ENDED


def test_python_dialect_takes_what_json_loads_takes() -> None:
    for text in ("NaN", "[Infinity, -Infinity, 1e999]", '{"a": NaN}'):
        assert repr(read_json(text, dialect=Dialect.PYTHON).value) == repr(json.loads(text))
        assert read_json(text).fault is not None


def _random_document(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(7 if depth < 4 else 5)
    blank = rng.choice(["", "", " ", "\n", "\t \r"])
    if kind == 0:
        return blank + rng.choice(["0", "-1", "12.5", "1e3", "-0.0", "1E-2", "123456789012345678", "01", "1.", "+1"])
    if kind == 1:
        return rng.choice(['"a"', '"\\n\\u00e9"', '"\\ud83d\\ude00"', '"é"', '"\\', '"\\q"', '""', '"a\tb"']) + blank
    if kind == 2:
        return rng.choice(["true", "false", "null", "nul", "True", "NaN"])
    if kind <= 4:
        items = [_random_document(rng, depth + 1) for _ in range(rng.randrange(4))] if depth < 4 else []
        return "[" + ",".join(items) + rng.choice(["]", "]", "]", "]", ",]", "", "}"]) + blank
    members = [f'"{rng.choice("abc")}":{_random_document(rng, depth + 1)}' for _ in range(rng.randrange(3))]
    return "{" + blank + ",".join(members) + rng.choice(["}", "}", "}", "}", ",}", "]"])


def test_strict_reader_agrees_with_the_standard_library() -> None:
    rng = random.Random(7)
    accepted = 0
    for _ in range(6000):
        text = _random_document(rng)
        reading = read_json(text, dialect=Dialect.PYTHON)
        try:
            expected = json.loads(text)
        except json.JSONDecodeError:
            assert reading.fault is not None, text
            continue
        accepted += 1
        assert reading.fault is None, text
        assert repr(reading.value) == repr(_as_read_here(expected)), text
    assert accepted > 1500, "too few of the documents are valid for the comparison to mean anything"


def _as_read_here(value: object) -> object:
    if isinstance(value, list):
        return [_as_read_here(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _as_read_here(entry) for key, entry in value.items()}
    if type(value) is int and abs(value) >= 10**15:
        return float(value)
    return value


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("strict JSON", ' {"a": [1, 2.5, "x", true, null]}', {"a": [1, 2.5, "x", True, None]}),
        ("single quotes", "{'a': 'b'}", {"a": "b"}),
        ("back quotes", "{`a`: `b`}", {"a": "b"}),
        ("apostrophe", "{'a': 'man's hat'}", {"a": "man's hat"}),
        ("quotes in quotes", '{"a": "the "b" c", "d": 1}', {"a": 'the "b" c', "d": 1}),
        ("escaped quotes around", '{\\"a\\": \\"b\\"}', {"a": "b"}),
        ("bare names", "{a: 1, b_2: 2, c-d: 3}", {"a": 1, "b_2": 2, "c-d": 3}),
        ("half-quoted name", '{a": 1}', {"a": 1}),
        ("trailing commas", "[[1, 2, ], {'a': 1, }, ]", [[1, 2], {"a": 1}]),
        ("Python words", "[True, False, None]", [True, False, None]),
        ("words in any case", "[TRUE, Null, NONE]", [True, None, None]),
        ("infinities", "[inf, -Infinity, +inf]", [math.inf, -math.inf, math.inf]),
        ("parentheses", "[(1, 2), ()]", [[1, 2], []]),
        ("numbers", "[+1, .5, 5., 007, 1e2, -0.5E-1]", [1, 0.5, 5.0, 7, 100.0, -0.05]),
        ("comments", "[1, // one\n 2 # two\n, /* three */ 3]", [1, 2, 3]),
        ("comment ends at a tag", "[{'a': 1} // x</answer>", [{"a": 1}]),
        ("written line feeds", "[\\n1,\\t2\\r]", [1, 2]),
        ("line feed in a string", '["a\nb"]', ["a\nb"]),
        ("unknown escape", '["C:\\path"]', ["C:path"]),
        ("stray quote", '["{"a": 1}]', [{"a": 1}]),
        ("stray quotes and brace", '["{"a": 1}"}, "{"b": 2}"]', [{"a": 1}, {"b": 2}]),
        ("bracket missing at a tag", "[[{'a': 1}</answer>", [[{"a": 1}]]),
        ("bracket missing at the end", "[{'a': 1}, ", [{"a": 1}]),
        ("comma missing between objects", "[{'a': 1} {'b': 2}]", [{"a": 1}, {"b": 2}]),
        ("comma missing after a list", "{'a': [1] 'b': 2}", {"a": [1], "b": 2}),
    ],
)
def test_tolerant_notation(name: str, text: str, value: object) -> None:
    reading = read_tolerant(text, len(text) - len(text.lstrip()), may_end=True)
    assert (reading.value, reading.fault) == (value, None), name


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("brace missing", "[{'a': 1</answer>", JsonFault.UNEXPECTED),
        ("brace missing at the end", "[{'a': 1", JsonFault.ENDED),
        ("list of numbers open at a tag", "{'a': [1, 2</answer>", JsonFault.UNEXPECTED),
        ("list of numbers open", "[1, 2", JsonFault.ENDED),
        ("list of numbers open behind a comma", "[1, 2, ", JsonFault.ENDED),
        ("list of numbers open behind a comma at a tag", "[1, 2, </answer>", JsonFault.UNEXPECTED),
        ("list in an object open at a tag", "{'a': [{'b': 1}</answer>", JsonFault.UNEXPECTED),
        ("two commas", "[1,, 2]", JsonFault.UNEXPECTED),
        ("comma missing between numbers", "[1 2]", JsonFault.UNEXPECTED),
        ("colon missing", "{a 1}", JsonFault.UNEXPECTED),
        ("wrong closing bracket", "{'a': [1, 2)}", JsonFault.UNEXPECTED),
        ("unit", "[12px]", JsonFault.BAD_NUMBER),
        ("two dots", "[1.2.3]", JsonFault.BAD_NUMBER),
        ("hexadecimal", "[0x10]", JsonFault.BAD_NUMBER),
        ("full-width digits", "[１]", JsonFault.UNEXPECTED),
        ("other word", "[undefined]", JsonFault.UNEXPECTED),
        ("signed word", "[-true]", JsonFault.UNEXPECTED),
        ("string open", '["abc', JsonFault.ENDED),
        ("comment open", "[1 /* x", JsonFault.ENDED),
        ("too long a number", "[" + "1" * (MAX_NUMBER_CHARS + 1) + "]", JsonFault.BAD_NUMBER),
        ("too deep", "[" * (MAX_DEPTH + 1), JsonFault.TOO_DEEP),
        ("NUL", "[\x00]", JsonFault.UNEXPECTED),
    ],
)
def test_tolerant_refusals(name: str, text: str, fault: JsonFault) -> None:
    assert read_tolerant(text, 0, may_end=True).fault is fault, name


def test_end_of_a_cut_text_closes_nothing() -> None:
    assert read_tolerant("[{'a': 1}", 0, may_end=True).value == [{"a": 1}]
    assert read_tolerant("[{'a': 1}", 0, may_end=False).fault is JsonFault.ENDED
    assert read_tolerant("[{'a': 1}</answer>", 0, may_end=False).value == [{"a": 1}]


def test_tolerant_reader_reads_strict_json_as_the_strict_one_does() -> None:
    rng = random.Random(11)
    compared = 0
    for _ in range(3000):
        text = _random_document(rng).strip()
        strict = read_json(text)
        if strict.fault is None and text[0] in "[{":
            compared += 1
            tolerant = read_tolerant(text, 0, may_end=False)
            assert (tolerant.value, tolerant.end, tolerant.fault) == (strict.value, len(text), None), text
    assert compared > 300


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '["' + '"' * 10**6, "[" + " " * 10**6, "[1, " * 250_000, '{"a":"' * 10**5]
)
def test_time_is_linear(text: str) -> None:
    begin = time.process_time()
    read_json(text)
    read_tolerant(text, 0, may_end=True)
    assert time.process_time() - begin < 10, "1 MB takes about a second; far more means a scan that goes back"
