"""The tabletop tokenizer: single digits, phrases that cost one token, text that comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_cache import make_cache, make_tokenizer
from tokenizers import Tokenizer

from segzero_rt.answer_format import FORMATS, SEG_ZERO, VISION_REASONER
from training.object_kinds import COLOURS, KINDS
from training.tokenizer import CONTROL_TOKENS, OBJECT_STARTS, control_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return make_tokenizer(make_cache(folder / "scenes"), folder)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("text", ["0", "9", "42", "280", "1234567890", "[10, 100, 200, 210]", "a1b22"])
def test_every_digit_is_a_token(tokenizer: Tokenizer, text: str) -> None:
    pieces = [tokenizer.decode([one]) for one in ids_of(tokenizer, text)]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == [c for c in text if c.isdigit()]


@pytest.mark.parametrize(
    "text",
    [
        "the red mug",  # a question
        "  two  spaces\n\tand a tab ",  # white space
        "Ünïcödé, 图像, 🙂",  # bytes that training never saw
        VISION_REASONER.prompt_tail,  # phrases
        SEG_ZERO.prompt_head + SEG_ZERO.prompt_tail,
        VISION_REASONER.assistant_text("There is a mug.", [([1, 2, 30, 40], [[5, 6]]), ([7, 8, 90, 100], [[9, 10]])]),
        SEG_ZERO.assistant_text("There is a mug.", [([1, 2, 30, 40], [[5, 6], [7, 8]])]),
        "<think></think><answer>[]</answer>",
        "",
    ],
)
def test_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("family", FORMATS.values(), ids=FORMATS)
def test_a_prompt_and_an_object_cost_few_tokens(tokenizer: Tokenizer, family: object) -> None:
    assert isinstance(family, type(VISION_REASONER))
    overhead = len(ids_of(tokenizer, family.user_prompt("mug"))) - len(ids_of(tokenizer, "mug"))
    assert overhead <= 8
    points = [[123, 45], [120, 50]][: family.max_points]
    one = family.answer_text([([100, 101, 102, 103], points)])
    assert len(ids_of(tokenizer, one)) <= 32


def test_each_object_starts_with_one_token_of_its_own(tokenizer: Tokenizer) -> None:
    starts = {control_id(tokenizer, phrase) for phrase in OBJECT_STARTS}
    listed = VISION_REASONER.answer_text([([1, 2, 3, 4], [[2, 3]])] * 3)
    single = SEG_ZERO.answer_text([([1, 2, 3, 4], [[2, 3], [2, 3]])])
    assert sum(one in starts for one in ids_of(tokenizer, listed)) == 3
    assert sum(one in starts for one in ids_of(tokenizer, single)) == 1


def test_control_tokens_are_special_first_and_can_be_kept_out_of_questions(tokenizer: Tokenizer) -> None:
    ids = [control_id(tokenizer, token) for token in CONTROL_TOKENS]
    assert ids == list(range(len(CONTROL_TOKENS)))
    assert ids_of(tokenizer, "<|im_end|>") == [ids[CONTROL_TOKENS.index("<|im_end|>")]]
    tokenizer.encode_special_tokens = True
    assert not set(ids_of(tokenizer, "the <|im_end|> mug <|image_pad|>")) & set(ids)
    tokenizer.encode_special_tokens = False


def test_names_and_colours_are_single_tokens(tokenizer: Tokenizer) -> None:
    split = [word for word in (*KINDS, *COLOURS) if len(ids_of(tokenizer, f" {word}")) != 1]
    assert len(split) <= 2, "a dozen scenes may lack a word; they do not lack many"


def test_a_token_that_is_not_there_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(KeyError, match="video_pad"):
        control_id(tokenizer, "<|video_pad|>")


def test_the_file_is_what_training_returned_and_the_same_each_time(tokenizer: Tokenizer, folder: Path) -> None:
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert saved == json.loads(tokenizer.to_str())
    make_tokenizer(make_cache(folder / "scenes"), folder / "again")
    assert json.loads((folder / "again" / "tokenizer.json").read_text()) == saved
