"""What a reply may say: texts by hand, and the tokens that llguidance allows for the same language at every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_corpus import CORPUS, text_of

from segzero_rt.answer import AnswerStatus
from segzero_rt.answer_format import FORMATS, SEG_ZERO, VISION_REASONER, AnswerFormat
from segzero_rt.answer_grammar import answer_automaton, token_table
from segzero_rt.answer_parser import parse_answer
from segzero_rt.bundle import EMBEDDED
from segzero_rt.byte_automaton import DEAD, compile_pattern, number_up_to
from segzero_rt.errors import BundleError
from segzero_rt.kernels.sample_token import GrammarTable
from segzero_rt.tokenizer import Tokenizer

SIZE_HW = (84, 280)
TOKENIZER = EMBEDDED / "policy" / "tokenizer.json"
END = 2
THOUGHT = "<think> a plate </think>\n"
ONE = '{"bbox_2d": [10, 20, 280, 84], "point_2d": [0, 7]}'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    if not TOKENIZER.is_file():
        pytest.skip("the checkout has no embedded bundle yet")
    return Tokenizer.from_file(TOKENIZER)


@pytest.fixture(scope="module")
def tables(tokenizer: Tokenizer) -> dict[str, GrammarTable]:
    tokens = [tokenizer.token_bytes(number) for number in range(tokenizer.end)]
    return {name: token_table(answer_automaton(known, SIZE_HW), tokens, [END]) for name, known in FORMATS.items()}


TEXTS: list[tuple[str, AnswerFormat, str, bool]] = [
    ("one object", VISION_REASONER, f"{THOUGHT}<answer>[{ONE}]</answer>", True),
    ("two objects", VISION_REASONER, f"{THOUGHT}<answer>[{ONE}, {ONE}]</answer>", True),
    ("nothing", VISION_REASONER, f"{THOUGHT}<answer>[]</answer>", True),
    ("no thinking", VISION_REASONER, f"<answer>[{ONE}]</answer>", True),
    ("thinking beyond ASCII", VISION_REASONER, f"<think>\u00e9\u4e2d\U0001f37d</think><answer>[{ONE}]</answer>", True),
    ("a tag that is almost one", VISION_REASONER, f"</thin</think></answer<answer>[{ONE}]</answer>", False),
    ("tags that are almost ones", VISION_REASONER, f"<<answe</thin</think> \n\n<answer>[{ONE}]</answer>", True),
    ("no list", VISION_REASONER, f"{THOUGHT}<answer>{ONE}]</answer>", False),
    ("a comma too many", VISION_REASONER, f"{THOUGHT}<answer>[{ONE},]</answer>", False),
    ("two blanks", VISION_REASONER, f"{THOUGHT}<answer>[  {ONE}]</answer>", False),
    ("a line feed", VISION_REASONER, f"{THOUGHT}<answer>[\n{ONE}\n]</answer>", True),
    ("words after it", VISION_REASONER, f"{THOUGHT}<answer>[{ONE}]</answer>.", False),
    ("words before the answer", VISION_REASONER, f"{THOUGHT}so <answer>[{ONE}]</answer>", False),
    ("beyond the right side", VISION_REASONER, f"<answer>[{ONE.replace('280', '281')}]</answer>", False),
    ("below the lower side", VISION_REASONER, f"<answer>[{ONE.replace('84', '85')}]</answer>", False),
    ("a leading zero", VISION_REASONER, f"<answer>[{ONE.replace('10', '010')}]</answer>", False),
    ("a fraction", VISION_REASONER, f"<answer>[{ONE.replace('10', '1.5')}]</answer>", False),
    ("a negative number", VISION_REASONER, f"<answer>[{ONE.replace('10', '-1')}]</answer>", False),
    ("no point", VISION_REASONER, '<answer>[{"bbox_2d": [1, 2, 3, 4]}]</answer>', False),
    ("the other format", VISION_REASONER, '<answer>{"bbox": [1, 2, 3, 4]}</answer>', False),
    ("an object", SEG_ZERO, '<answer>{"bbox": [1,2,3,4], "points_1": [1,2], "points_2": [3,4]}</answer>', True),
    ("an object in a list", SEG_ZERO, '<answer>[{"bbox": [1,2,3,4]}]</answer>', False),
    ("no object", SEG_ZERO, f"{THOUGHT}<answer>{{}}</answer>", True),
    ("nothing at all", SEG_ZERO, "", False),
]


@pytest.mark.parametrize(("name", "answer_format", "text", "whole"), TEXTS, ids=[row[0] for row in TEXTS])
def test_texts(name: str, answer_format: AnswerFormat, text: str, whole: bool) -> None:
    assert answer_automaton(answer_format, SIZE_HW).accepts(text.encode()) is whole


@pytest.mark.parametrize("data", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x82<", b"\xf4\x90\x80\x80", b"\x80"])
def test_bytes_that_are_no_text_cannot_be_thought(data: bytes) -> None:
    automaton = answer_automaton(VISION_REASONER, SIZE_HW)
    assert automaton.walk(b"a" + data) == DEAD
    assert automaton.walk("a\u20ac\ud7ff\U0010ffff".encode()) == automaton.walk(b"a")


@pytest.mark.parametrize("limit", [0, 1, 9, 10, 27, 100, 280, 999, 1000])
def test_numbers_up_to(limit: int) -> None:
    automaton = compile_pattern(number_up_to(limit))
    wanted = {str(number).encode() for number in range(limit + 1)}
    tried = [str(number).encode() for number in range(2 * limit + 30)] + [b"", b"00", b"01", b"-1", b"1 "]
    assert {data for data in tried if automaton.accepts(data)} == wanted
    with pytest.raises(ValueError, match="from 0 on"):
        number_up_to(-1)


def test_replies_of_the_formats_are_in_their_grammars() -> None:
    for known in FORMATS.values():
        automaton = answer_automaton(known, SIZE_HW)
        for count in range(4 if known.multiple else 2):
            objects = [([0, 84 - index, 280, 1], [[7, 8]] * known.max_points) for index in range(count)]
            assert automaton.accepts(known.assistant_text("so it is", objects).encode())


def test_what_the_grammar_accepts_can_be_read(tables: dict[str, GrammarTable]) -> None:
    rng = np.random.default_rng(3)
    for name, table in tables.items():
        for _ in range(40):
            text = random_reply(table, rng).decode()
            written = text[text.index("<answer>") + len("<answer>") : -len("</answer>")]
            objects = json.loads(written)
            if not all(
                has_area(entry, FORMATS[name]) for entry in (objects if isinstance(objects, list) else [objects])
            ):
                continue  # a box without area is no object, in any grammar
            # Seg-Zero's own script takes brackets in the thinking for the answer.
            for mode in ("rfc8259", "tolerant", *(["vision_reasoner"] if name == "vision_reasoner" else [])):
                answer = parse_answer(
                    text, answer_format=FORMATS[name], input_size_hw=SIZE_HW, source_size_hw=(480, 640), mode=mode
                )
                assert answer.status in (AnswerStatus.OK, AnswerStatus.NONE_FOUND), (mode, text)


def has_area(entry: dict[str, Any], answer_format: AnswerFormat) -> bool:
    left, top, right, bottom = entry.get(answer_format.box_key, (0, 0, 1, 1))
    return left != right and top != bottom


def random_reply(table: GrammarTable, rng: np.random.Generator) -> bytes:
    """Any allowed tokens, thinking kept short and answers with a bias to their end."""
    state, said = 0, b""
    for place in range(400):
        allowed = np.flatnonzero(table.allowed_tokens(state))
        if place > 12 and rng.random() < 0.7:
            steps = np.array([table.steps_to_end[table.advance(state, int(token_id))] for token_id in allowed])
            allowed = allowed[steps == steps.min()]
        token_id = int(rng.choice(allowed))
        state = table.advance(state, token_id)
        if state == table.ended:
            return said
        said += table.token_bytes[slice(*table.token_offsets[token_id : token_id + 2])].tobytes()
    raise AssertionError(f"no end after {said[:200]!r}")


def test_the_way_to_the_end_is_as_long_as_it_says(tables: dict[str, GrammarTable]) -> None:
    table = tables["vision_reasoner"]
    assert table.steps_to_end[0] == len("<answer>[]</answer>") + 1
    assert table.steps_to_end[table.ended] == 0 and table.steps_to_end.min() == 0
    for state in range(table.ended):
        allowed = np.flatnonzero(table.allowed_tokens(state))
        after = [int(table.steps_to_end[table.advance(state, int(token_id))]) for token_id in allowed]
        assert min(after) <= table.steps_to_end[state] - 1, "with so many steps left one can always go on"


def test_special_tokens_are_never_said_but_to_end(tables: dict[str, GrammarTable], tokenizer: Tokenizer) -> None:
    table = tables["vision_reasoner"]
    special = [number for number in range(tokenizer.end) if tokenizer.token_bytes(number) is None]
    assert END in special and len(special) > 3
    for state in range(table.ended + 1):
        said = [number for number in special if table.allows(state, number)]
        assert said == ([END] if table.steps_to_end[state] <= 1 else [])


def test_vocabularies_that_cannot_say_an_answer_are_refused() -> None:
    automaton = answer_automaton(VISION_REASONER, SIZE_HW)
    bytes_alone: list[bytes | None] = [bytes([number]) for number in range(256)]
    assert token_table(automaton, [*bytes_alone, None], [256]).vocab_size == 257
    with pytest.raises(BundleError, match="ends replies"):
        token_table(automaton, bytes_alone, [256])
    with pytest.raises(BundleError, match="every single byte"):
        token_table(automaton, [*(None if token == b"[" else token for token in bytes_alone), None], [256])


# --- llguidance as the oracle: the same language, written as one regular expression over all numbers


def lark_grammar(answer_format: AnswerFormat) -> str:
    numbers = {
        axis: "(" + "|".join(map(str, range(limit + 1))) + ")" for axis, limit in zip("yx", SIZE_HW, strict=True)
    }
    comma, gap = "[ \\n]?,[ \\n]?", "[ \\n]?"

    def listed(axes: str) -> str:
        return f"\\[{gap}" + comma.join(numbers[axis] for axis in axes) + f"{gap}\\]"

    members = [f'"{answer_format.box_key}"{gap}:{gap}{listed("xyxy")}']
    members += [f'"{key}"{gap}:{gap}{listed("xy")}' for key in answer_format.point_keys]
    entry = f"\\{{{gap}{comma.join(members)}{gap}\\}}"
    objects = f"(\\[{gap}{entry}({comma}{entry})*{gap}\\]|\\[\\])" if answer_format.multiple else f"({entry}|\\{{\\}})"
    tail = f"<answer>{gap}{objects}{gap}<\\/answer>"
    return (
        "start: REPLY\n"
        f"REPLY: FREE /(<\\/think>[ \\n]{{0,3}})?{tail}/\n"
        "FREE: /(.|\\n)*/ & ~/(.|\\n)*(<\\/think>|<answer>)(.|\\n)*/\n"
    )


class Vocabulary:
    """The tokenizer as llguidance takes one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.token_bytes(number) or b"" for number in range(tokenizer.end)]
        self.special_token_ids = [number for number in range(tokenizer.end) if tokenizer.token_bytes(number) is None]
        for number in self.special_token_ids:
            self.tokens[number] = b"<|special %d|>" % number
        self.eos_token_id, self.bos_token_id = END, None
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(), special=False)


def replies(name: str, table: GrammarTable, tokenizer: Tokenizer) -> list[list[int]]:
    """Token numbers: written by the format, random ones, the hostile corpus, and tokens at random."""
    rng = np.random.default_rng(11)
    known = FORMATS[name]
    written = [
        known.assistant_text(
            "The pl\u00e4te at the lower right.", [([1, 2, 280, 84], [[9, 10]] * known.max_points)] * count
        )
        for count in ((0, 1, 3) if known.multiple else (0, 1))
    ]
    texts = [*written, *(random_reply(table, rng).decode() for _ in range(60))]
    texts += [text for text in map(text_of, CORPUS[:400:10]) if text.isprintable() and len(text) < 600]
    return [tokenizer.encode(text, special=False) for text in texts]


@pytest.mark.parametrize("name", FORMATS)
def test_the_allowed_tokens_are_those_of_llguidance(
    name: str, tables: dict[str, GrammarTable], tokenizer: Tokenizer
) -> None:
    oracle = pytest.importorskip("llguidance", reason="llguidance is not installed; it comes with segzero-rt[dev]")
    table = tables[name]
    theirs = oracle.LLTokenizer(oracle.TokenizerWrapper(Vocabulary(tokenizer)), n_vocab=table.vocab_size, eos_token=END)
    grammar, steps, left_out = lark_grammar(FORMATS[name]), 0, 0
    for tokens in replies(name, table, tokenizer):
        matcher, state = oracle.LLMatcher(theirs, grammar), 0
        assert not matcher.is_error(), matcher.get_error()
        for token_id in [*tokens, END]:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed, wanted = table.allowed_tokens(state), bits[: table.vocab_size].astype(bool)
            if np.count_nonzero(table.next_state[state] != DEAD) == 1 and (allowed != wanted).any():
                # Where only one byte can follow, llguidance leaves out tokens that its tokenizer would not write.
                assert wanted.any() and not (wanted & ~allowed).any()
                left_out += 1
            else:
                np.testing.assert_array_equal(allowed, wanted)
            steps += 1
            if not table.allows(state, token_id):
                break
            state = table.advance(state, token_id)
            assert matcher.consume_token(token_id)
    assert steps > 1000 and left_out < steps / 50


@pytest.mark.slow
def test_a_vocabulary_of_true_size() -> None:
    """Qwen2.5-VL's tokenizer: masks agree with a walk over the bytes for every token, at some states."""
    path = Path(__file__).resolve().parents[2] / "shared/assets/qwen2.5-vl-7b/tokenizer.json"
    if not path.is_file():
        pytest.skip("../shared/assets is not there")
    tokenizer = Tokenizer.from_file(path)
    tokens = [tokenizer.token_bytes(number) for number in range(tokenizer.end)]
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    automaton = answer_automaton(VISION_REASONER, (840, 1260))
    table = token_table(automaton, tokens, [end])
    for text in ("", "<think> \u4e2d", f"{THOUGHT}<answer>[{{", f"{THOUGHT}<answer>[{ONE}]</answer>"):
        state = automaton.walk(text.encode())
        walked = [token is not None and automaton.walk(token, state) != DEAD for token in tokens]
        walked[end] = bool(automaton.accepting[state])
        np.testing.assert_array_equal(table.allowed_tokens(state), walked)
