"""parse_prompts: every build against the reference, in every field, on everything there is."""

from __future__ import annotations

import ctypes
import gzip
import json
import random
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_corpus import CORPUS, text_of
from kernel_builds import BUILDS, COMPILED_BUILDS, DEVICE_BUILDS, NEEDS_COMPILER, kernel_build

from benchmarks.kernel_fuzz import disagreements, fuzz
from segzero_rt.answer_format import FORMATS, SEG_ZERO, VISION_REASONER
from segzero_rt.answer_geometry import MAX_POINTS
from segzero_rt.answer_objects import BOX_NAMES, MAX_KEYS, POINT_NAMES
from segzero_rt.answer_parser import MAX_ANSWERS_TRIED, MAX_OBJECTS, MAX_VALUES, MODES, parse_answer
from segzero_rt.json_reader import MAX_DEPTH, MAX_NUMBER_CHARS, Dialect, JsonFault, read_json
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.build import HERE
from segzero_rt.kernels.parse_prompts import MAX_SIDE, decode_reply, encode_reply, parse_prompts

ASSETS = Path(__file__).resolve().parents[1] / ".." / "shared" / "assets"
NEEDS_ASSETS = pytest.mark.skipif(not ASSETS.exists(), reason=f"public suites and real outputs are not at {ASSETS}")
SQUARE: dict[str, Any] = {"answer_format": VISION_REASONER, "input_size_hw": (840, 840), "source_size_hw": (840, 840)}
OBJECT = '{"bbox_2d": [120, 130, 260, 340], "point_2d": [190, 235]}'
EVERY_WAY = list(product(FORMATS.values(), MODES, (True, False)))


@pytest.fixture(scope="module")
def host() -> Kernels:
    return resolve_kernels("host")


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernel_build(request.param)


@pytest.fixture(params=COMPILED_BUILDS)
def compiled(request: pytest.FixtureRequest) -> Kernels:
    return kernel_build(request.param)


def _check(replies: list[bytes], compiled: Kernels, **arguments: Any) -> None:
    arguments = {**SQUARE, **arguments}
    wrong, _ = disagreements(replies, arguments, (compiled, resolve_kernels("reference")))
    assert wrong == [], f"{len(wrong)} disagreements with {arguments}"


# --- the contract, on every build


def test_a_batch_by_hand(kernels: Kernels) -> None:
    replies = [
        f"<think> two mugs </think><answer>[{OBJECT}, {OBJECT}]</answer>".encode(),
        b"<think>\xc3\xa9</think><answer>[]</answer>",
        b"no answer",
        b'<answer>[{"bbox_2d": [0, 0, 420, 840], "point_2d": [500, 5]}]</answer>',
    ]
    read = parse_prompts(
        replies, **{**SQUARE, "source_size_hw": (420, 1680), "finished": [True, True, False, True]}, kernels=kernels
    )
    assert read.status.tolist() == [0, 1, 2, 0]
    assert read.thinking_spans.tolist() == [[8, 16], [7, 9], [0, 9], [0, 0]]
    assert read.num_objects.tolist() == [2, 0, 0, 1]
    assert read.object_offsets.tolist() == [0, 2, 2, 2, 3]
    assert read.boxes_xyxy.tolist() == [[240, 65, 520, 170], [240, 65, 520, 170], [0, 0, 840, 420]]
    assert read.point_offsets.tolist() == [0, 1, 2, 2]
    assert read.points_xy.tolist() == [[380, 118], [380, 118]]
    assert [len(read.prompts(index)) for index in range(4)] == [2, 0, 0, 1]


def test_no_replies_have_their_shapes(kernels: Kernels) -> None:
    read = parse_prompts([], **SQUARE, kernels=kernels)
    assert len(read) == 0 and read.object_offsets.tolist() == [0] == read.point_offsets.tolist()
    assert (read.boxes_xyxy.shape, read.points_xy.shape, read.thinking_spans.shape) == ((0, 4), (0, 2), (0, 2))


def test_sizes_and_ends_may_differ_by_reply(kernels: Kernels) -> None:
    reply = f"<answer>[{OBJECT}".encode()  # without its last bracket: whole only if the policy ended it
    arguments = {**SQUARE, "source_size_hw": np.array([[840, 840], [84, 840]]), "finished": np.array([True, True])}
    assert parse_prompts([reply, reply], **arguments, kernels=kernels).boxes_xyxy[:, 3].tolist() == [340, 34]
    read = parse_prompts([reply, reply], **{**SQUARE, "finished": [False, True]}, kernels=kernels)
    assert read.status.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("no width", {"input_size_hw": (840, 0)}, "positive"),
        ("too wide", {"source_size_hw": (1, MAX_SIDE + 1)}, "positive sizes up to"),
        ("a mode that is none", {"mode": "loose"}, "tolerant"),
        ("ends of another number", {"finished": [True, False, True]}, "for 2 replies or one for all"),
        ("ends in two axes", {"finished": [[True, False]]}, "of shape"),
        ("sizes of another number", {"input_size_hw": np.ones((3, 2), int)}, "for 2 replies or one for all"),
        ("sizes that are none", {"input_size_hw": (1, 2, 3)}, "pair"),
    ],
)
def test_what_the_caller_must_mend(name: str, change: dict[str, Any], message: str, kernels: Kernels) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompts([b"", b""], **{**SQUARE, **change}, kernels=kernels)


def test_replies_are_bytes(kernels: Kernels) -> None:
    with pytest.raises(TypeError, match="expected replies as bytes, got str"):
        parse_prompts([b"", "<answer>[]</answer>"], **SQUARE, kernels=kernels)  # type: ignore[list-item]


def test_one_reply_and_many_are_read_alike(kernels: Kernels) -> None:
    replies = [encode_reply(text_of(case)) for case in CORPUS if isinstance(case["text"], str)][:200]
    together = parse_prompts(replies, **SQUARE, kernels=kernels)
    for index, reply in enumerate(replies):
        alone = parse_prompts([reply], **SQUARE, kernels=kernels)
        assert alone.status[0] == together.status[index] and alone.prompts(0) == together.prompts(index)
        text = decode_reply(reply)
        assert together.answer(index, text) == parse_answer(text, **SQUARE)


# --- compiled builds against the reference


@pytest.mark.parametrize(("answer_format", "mode", "finished"), EVERY_WAY, ids=lambda v: getattr(v, "name", str(v)))
def test_hostile_corpus(answer_format: Any, mode: str, finished: bool, compiled: Kernels) -> None:
    replies = [encode_reply(text) for text in map(text_of, CORPUS) if len(text) < 50_000]
    _check(
        replies, compiled, answer_format=answer_format, mode=mode, finished=finished, source_size_hw=(481, 1919)
    )  # odd sizes: rounding shows


@NEEDS_ASSETS
@pytest.mark.parametrize("mode", MODES)
def test_real_outputs(mode: str, compiled: Kernels) -> None:
    with gzip.open(ASSETS / "model_outputs.jsonl.gz", "rt", encoding="utf-8") as lines:
        replies = [encode_reply(json.loads(line)["output"]) for line in lines]
    assert len(replies) == 13_754
    for answer_format in FORMATS.values():
        _check(replies, compiled, answer_format=answer_format, mode=mode, source_size_hw=(1080, 1920))


def _suite() -> list[bytes]:
    folders = ("JSONTestSuite_test_parsing", "simdjson_jsonchecker")
    return [path.read_bytes() for folder in folders for path in sorted((ASSETS / "json" / folder).glob("*.json"))]


@NEEDS_COMPILER
@NEEDS_ASSETS
def test_public_json_suites_as_documents(host: Kernels) -> None:
    documents = _suite()
    assert len(documents) == 318 + 27 + 81
    for document in documents:
        for dialect in Dialect:
            text = decode_reply(document)
            reading = read_json(text, dialect=dialect)
            if reading.fault is None and dialect is Dialect.RFC8259:
                document.decode("utf-8")  # what is accepted is UTF-8
            fault, end = _read_document(host, document, dialect)
            assert fault is reading.fault, document[:80]
            assert end == len(encode_reply(text[: reading.end])) or "\udc80" <= max(text) <= "\udcff"


@NEEDS_ASSETS
@pytest.mark.parametrize("mode", MODES)
def test_public_json_suites_as_answers(mode: str, compiled: Kernels) -> None:
    documents = [document for document in _suite() if len(document) < 60_000]
    boxes = [OBJECT.encode().replace(b"190", document[:2000]) for document in documents]
    for replies in (documents, [b"<answer>" + d + b"</answer>" for d in documents], [b"[" + b + b"]" for b in boxes]):
        for answer_format in FORMATS.values():
            _check(replies, compiled, answer_format=answer_format, mode=mode)


def _read_document(host: Kernels, document: bytes, dialect: Dialect) -> tuple[JsonFault | None, int]:
    assert host.library is not None
    end = ctypes.c_int64()
    code = host.library.segzero_read_document(
        document, ctypes.c_int64(len(document)), int(dialect is Dialect.PYTHON), ctypes.byref(end)
    )
    return [None, *JsonFault][code], end.value


def _fuzz(count: int, seed: int, builds: list[Kernels]) -> None:
    statuses = set()
    for wrong, arguments, read in fuzz(count, seed, builds):
        assert wrong == [], arguments
        statuses.update((arguments["mode"], int(code)) for code in np.unique(read.status))
    assert statuses >= set(product(MODES, range(4))), "each outcome is met in each mode"


@pytest.mark.parametrize("on_device", DEVICE_BUILDS)
def test_mutants_are_read_alike(on_device: str, host: Kernels) -> None:
    _fuzz(20_000, 7, [host, kernel_build(on_device)])


@pytest.mark.slow
@pytest.mark.parametrize("on_device", DEVICE_BUILDS)
def test_a_million_mutants_are_read_alike(on_device: str, host: Kernels) -> None:
    _fuzz(1_000_000, 8, [host, kernel_build(on_device)])


@NEEDS_COMPILER
def test_numbers_are_those_of_python(host: Kernels) -> None:
    assert host.library is not None
    convert = host.library.segzero_read_decimal
    convert.restype = ctypes.c_double
    for token in _number_tokens():
        given = convert(token.encode(), ctypes.c_int64(len(token)))
        assert repr(given) == repr(float(token)), token


def _number_tokens() -> list[str]:
    rng = random.Random(3)
    tokens = ["0", "-0", "0.0", "5.", ".5", "+7", "1e0", "1E+2", "00012", "9007199254740993", "4.9406564584124654e-324"]
    tokens += ["2.4703282292062327e-324", "2.4703282292062328e-324", "2.2250738585072011e-308", "1e-400", "1e400"]
    tokens += [
        "1.7976931348623157e308",
        "1.7976931348623159e308",
        "0." + "0" * 400 + "1e400",
        "1" + "0" * 300 + "e-300",
    ]
    tokens += [
        "9" * 1000,
        "0." + "9" * 1000,
        "1e99999",
        "1e-99999",
        "0e99999999999",
        "179769313486231580793" + "0" * 288,
    ]
    for _ in range(4000):  # a double, the middle to its neighbour, and a hair beside that
        value = np.array([rng.getrandbits(63)], np.uint64).view(np.float64)[0]
        if np.isfinite(value):
            middle = (int(value * 2**60) * 2 + 1) if 1e-3 < abs(value) < 1e3 else 0
            tokens += [repr(float(value)), f"{value:.30e}", f"{value:.{rng.randrange(40)}g}"]
            tokens += [str(middle), str(middle * 10**20 + rng.randrange(-1, 2))] if middle else []
    for _ in range(4000):
        digits = "".join(rng.choices("0123456789", k=rng.randrange(1, 40)))
        tokens.append(f"{digits}.{rng.randrange(10 ** rng.randrange(1, 25))}e{rng.randrange(-340, 340)}")
    return [token for token in tokens if len(token) <= MAX_NUMBER_CHARS]


def test_white_space_is_that_of_python(compiled: Kernels) -> None:
    ranges = ((0, 0x300), (0x1670, 0x1690), (0x1FF0, 0x2070), (0x2FF0, 0x3010), (0xFEF0, 0xFF20))  # around all of it
    characters = [chr(code) for begin, end in ranges for code in range(begin, end)]
    assert {chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()} <= set(characters)
    characters += [chr(code) for code in (0xD800, 0xDFFF, 0xFEFF, 0xFF11, 0x1F600, 0x10FFFF)]
    templates = (
        "<think>{0}x{0}</think><answer>[]",
        f"<answer>[{OBJECT}{{0}},{OBJECT}]",
        f"{{0}}[{OBJECT}]{{0}}[{OBJECT}]",
    )
    for template in templates:
        replies = [encode_reply(template.replace("{0}", character)) for character in characters]
        _check(replies, compiled)
        _check(replies, compiled, mode="vision_reasoner")


def test_names_of_boxes_and_points_are_those_of_the_reference(compiled: Kernels) -> None:
    stems = ("bbox", "box", "xyxy", "point", "points", "boundingbox", "bboxxyxy", "boxxyxy", "pointss", "bboxes")
    endings = ("", "2d", "xy", "2", "0", "9", "10", "2d0", "2d9", "2d10", "d2", "xy1", "2dxy", "xyxy", "s", "2D_9", "é")
    keys = {f"{stem}{ending}" for stem in stems for ending in endings} | BOX_NAMES | POINT_NAMES
    keys |= {f"p_o-i n_t{joiner * count}s" for joiner in "_- " for count in (0, 1, 20, 40)}
    for other in ("bbox_2d", "point_2d"):
        value = "[190, 235]" if other == "bbox_2d" else "[120, 130, 260, 340]"
        full = "[120, 130, 260, 340]" if other == "bbox_2d" else "[190, 235]"
        _check([f'<answer>{{"{other}": {full}, "{key}": {value}}}'.encode() for key in sorted(keys)], compiled)


def _point_keys(count: int) -> str:
    """An object with so many keys that mean a point, all different, each with a point of its own."""
    keys = [f"point{'_' * (n % 27)}{'-' * (n // 27)}" for n in range(count)]
    members = ", ".join(f'"{key}": [{n}, 1]' for n, key in enumerate(keys))
    return f'{{{members}, "bbox": [0, 0, 99, 99]}}'


def _wrapper(count: int) -> str:
    """An object of so many keys, one of them with an answer in it."""
    members = ", ".join(f'"k{n}": {n}' for n in range(count - 1))
    return f'{{{members}, "in": [{OBJECT}]}}'


AT_THE_LIMIT = [
    ("the most objects", "[" + ", ".join([OBJECT] * MAX_OBJECTS) + "]"),
    ("one object more", "[" + ", ".join([OBJECT] * (MAX_OBJECTS + 1)) + "]"),
    ("the most keys with points", _point_keys(MAX_KEYS)),
    ("one key more", _point_keys(MAX_KEYS + 1)),
    ("a wrapper of the most keys", _wrapper(MAX_KEYS)),
    ("a wrapper of one key more", _wrapper(MAX_KEYS + 1)),
    ("a wrapper's repeated key", f'{{"a": [{OBJECT}], "a": 5, "b": {OBJECT}}}'),
    ("a wrapper's key repeated in escapes", f'{{"a": 1, "\\u0061": {OBJECT}}}'),
    ("wrappers in wrappers", '{"a": ' * (MAX_DEPTH - 3) + f"[{OBJECT}]" + "}" * (MAX_DEPTH - 3)),
    ("too deep", "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)),
    ("the most values", "[x] " * (MAX_VALUES - 1) + f"[{OBJECT}]"),
    ("one value more", "[x] " * MAX_VALUES + f"[{OBJECT}]"),
    ("the most points", f'{{"bbox": [0, 0, 99, 99], "points": {[[n, n] for n in range(MAX_POINTS + 3)]}}}'),
    ("a long tape", "[" + ", ".join(map(str, range(5000))) + f", {OBJECT}]"),
    ("answers that are none", f"[{OBJECT}]</answer>" + "<answer>x</answer>" * MAX_ANSWERS_TRIED),
    ("one answer less that is none", f"[{OBJECT}]</answer>" + "<answer>x</answer>" * (MAX_ANSWERS_TRIED - 1)),
    ("a longest number", f'[{{"bbox": [1, 2, {"9" * MAX_NUMBER_CHARS}, 99]}}]'),
    ("half an escape at the end", '["\\u1é'),
    ("half an escape before a bracket at the end", '["\\u[]'),
]


@pytest.mark.parametrize(("name", "text"), AT_THE_LIMIT, ids=[name for name, _ in AT_THE_LIMIT])
def test_limits_are_the_references(name: str, text: str, compiled: Kernels) -> None:
    for reply in (f"<answer>{text}</answer>", f"<answer>{text}", text):
        for mode in MODES:
            _check([encode_reply(reply)], compiled, mode=mode)


# Answers in the form that is read in one pass, and what differs from it by a little.
NEARLY_PLAIN = {
    "numbers": [
        *("0", "-0", "00", "07", "-7", "+7", "1234567", "12345678", "123456789012345", "1234567890123456", "7.", ".7"),
        *("7.5", "7.05", "-7.25", "0.1", "123.45678901234", "123.456789012345", "7e1", "7E1", "7a", "7 7", "7%", "- 7"),
        *("NaN", "Infinity", "true", "null", '"7"', '" 7"', "[7]", "7,", "", "７"),
    ],
    "labels": [
        *(
            '"a"',
            '"blue coat"',
            '"exactly eight b"',
            '"é"',
            '"\\u0061"',
            '"\\""',
            '"a"b"',
            '"a", "b"',
            '"a\tb"',
            '"a\x01"',
        ),
        *(
            '"<answer>"',
            '"</answer>"',
            '"<"',
            '"a\x80"',
            '"}"',
            '"]"',
            '"a" ',
            '"a" x',
            '"unended',
            "'a'",
            '""',
            '"\x7f"',
        ),
        *('"' + "x" * length + '"' for length in range(6, 18)),
    ],
    "keys": [
        *("label", "Box", "_box", "- bbox_2d", "BBOX_2D", "xyxy", "x", "points", "point_2d", "points_1", "po int", ""),
        *("bbox", "bbox_2d", "bbox_2d ", "b\\u0062ox", "\\u0062ox", "áçã", "label " * 8, "color", " ", "__", "-"),
    ],
    "ends": [
        *(
            "]",
            "] ",
            "]]",
            "],",
            "]}",
            "] x",
            "]\n```",
            "",
            "}]",
            ", {}]",
            ", []]",
            ", null]",
            ",]",
            '], "a"]',
            "]<",
            "]<b>",
        ),
        *(
            "]</answer> [1]",
            "]< / answer >",
            "]<answer>[]</answer>",
            "]</think>",
            "]\u00a0",
            "]\ufeff",
            "] // end",
            "]#",
        ),
    ],
}


def _nearly_plain() -> list[bytes]:
    whole = '[{"bbox_2d": [10, 20, 300, 400], "point_2d": [30, 50]}'
    numbers, labels, keys, ends = NEARLY_PLAIN.values()
    texts = [f'[{{"bbox_2d": [{number}, 20, 300, 400], "point_2d": [30, {number}]}}]' for number in numbers]
    texts += [f'{{"bbox": [10,20,300,{number}],"points_1": [30, 50], "points_2": [35, 55]}}' for number in numbers]
    texts += [f'[{{"bbox_2d": [10, 20, 300, 400], "label": {label}, "point_2d": [30, 50]}}]' for label in labels]
    texts += [f'{{"label": {label}, "bbox": [10, 20, 300, 400], "points_2": [30, 50]}}' for label in labels]
    texts += [f'[{{"bbox_2d": [10, 20, 300, 400], "{key}": [30, 50, 310, 410]}}]' for key in keys]
    texts += [f'[{{"{key}": [3, 5], "bbox_2d": [1, 2, 300, 400], "point_2d": [30, 50]}}]' for key in keys]
    texts += [f'{{"bbox": [10, 20, 300, 400], "{key}": 5, "points_2": [30, 50], "points_1": [3, 5]}}' for key in keys]
    texts += [whole + end for end in ends] + [f"{whole}, {whole[1:]}{end}" for end in ends]
    texts += [f'{{"bbox": [10, 20, 300, 400], "points_1": [30, 50], "points_2": [35, 55]}}{end[1:]}' for end in ends]
    texts += [whole.replace(" ", blank) + "]" for blank in ("", "\n", "\r\n\t", "\x0b", "\u00a0", "\u3000")]
    return [encode_reply(text) for text in texts]


@pytest.mark.parametrize(("answer_format", "mode", "finished"), EVERY_WAY, ids=lambda v: getattr(v, "name", str(v)))
def test_what_is_nearly_the_usual_answer(answer_format: Any, mode: str, finished: bool, compiled: Kernels) -> None:
    for around in (b"%b", b"<think> a </think><answer>%b</answer>", b"<think>a</think> <answer> %b"):
        replies = [around % text for text in _nearly_plain()]
        _check(replies, compiled, answer_format=answer_format, mode=mode, finished=finished, source_size_hw=(481, 1919))


@pytest.mark.parametrize(
    ("box_key", "point_keys"),
    [("area", ("spot",)), ("bbox", ("bbox",)), ("bbox", ("point", "point")), ("Box", ("POINT_XY",)), ("label", ("x",))],
)
def test_formats_with_keys_of_their_own(box_key: str, point_keys: tuple[str, ...], compiled: Kernels) -> None:
    own = replace(VISION_REASONER, box_key=box_key, point_keys=point_keys)
    texts = [reply.replace(b"bbox_2d", box_key.encode()) for reply in _nearly_plain()]
    texts += [reply.replace(b"point_2d", point_keys[0].encode()) for reply in texts]
    for mode in ("tolerant", "rfc8259"):
        _check(texts, compiled, answer_format=own, mode=mode)


def test_any_number_of_tags_is_found(compiled: Kernels) -> None:
    answer = f"<answer>[{OBJECT}]</answer>"
    for count in range(30):
        for tag in (
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            "< / Think >",
            "<think></think>",
            "<answer>[]</answer>",
        ):
            texts = (
                tag * count + answer,
                f"<think>x{tag * count}</think>{answer}",
                answer + tag * count,
                f"[{OBJECT}]",
            )
            for mode in ("tolerant", "rfc8259"):
                _check([encode_reply(text) for text in texts], compiled, mode=mode)


@NEEDS_COMPILER
def test_the_source_has_the_limits_of_the_reference() -> None:
    constants = "".join(path.read_text("utf-8") for path in sorted(HERE.glob("*.cuh")))
    limits = dict(re.findall(r"constexpr u32 (k\w+) = (\d+);", constants))
    expected = {
        "kMaxObjects": MAX_OBJECTS,
        "kMaxPoints": MAX_POINTS,
        "kMaxKeys": MAX_KEYS,
        "kMaxDepth": MAX_DEPTH,
        "kMaxNumberChars": MAX_NUMBER_CHARS,
        "kMaxAnswersTried": MAX_ANSWERS_TRIED,
        "kMaxValues": MAX_VALUES,
    }
    assert {name: int(limits[name]) for name in expected} == expected


@pytest.mark.parametrize(
    "data", [b"\x80", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x82\x82\x82", b"\xc0\xaf", b"\xf4\x90\x80\x80"]
)
def test_bytes_that_are_no_text(data: bytes, compiled: Kernels) -> None:
    answer = f"[{OBJECT}]".encode()
    replies = [
        b"<think>" + data + b" x " + data + b"</think><answer>" + answer + b"</answer>",
        b"<answer>" + answer.replace(b"{", b'{"' + data + b'": 1, ') + b"</answer>",
        b"<answer>" + data + answer + data + b"</answer>",
        b'<answer>["\\u1' + data,
        b'<answer>["\\u' + data + b"abc",
        data,
    ]
    for mode in MODES:
        _check(replies, compiled, mode=mode)
        _check(replies, compiled, mode=mode, answer_format=SEG_ZERO, finished=False)
