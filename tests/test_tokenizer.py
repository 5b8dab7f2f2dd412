"""The runtime's own tokenizer against the `tokenizers` library: the same numbers, the same text."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from segzero_rt.answer_format import FORMATS
from segzero_rt.errors import BundleError
from segzero_rt.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
RELEASED = REPOSITORY / "../shared/assets/qwen2.5-vl-7b/tokenizer.json"

TEXTS = [
    "",
    " ",
    "a",
    "The red mug, left of the 2nd plate (12,345 px).",
    "it's I'LL we'Ve 'S 'ſ",
    "  two  spaces\n\n\n and\r\nlines \t tabs \n",
    "trailing   ",
    "\u00a0non\u2003breaking\u3000spaces\u200b\x85",
    "déjà vu, de\u0301ja\u0300, ﬁne, Å Å",
    "红色的杯子在盘子左边。 日本語テキスト 한국어",
    "مرحبا بالعالم שלום हिन्दी ไทย",
    "🍎🏳️‍🌈👨‍👩‍👧 ½ ² ⅷ ① ٣ 四",
    "x\u0300\u0301 ªº µ __init__ snake_case $5 €9 #1",
    "\x00\x01\x1c\x1d\x1f\x7f\x85",
    "<|im_start|>user\n<|image_pad|><|im_end|> <tool_call> <|endoftext|",
    '<think> a </think>\n<answer>[{"bbox_2d": [10, 100, 200, 210], "point_2d": [30, 110]}]</answer>',
    *(form.user_prompt("something to cut paper with") for form in FORMATS.values()),
]
_ALPHABET = "ab Zé\u0301'stñ漢字🍎٣½_ \n\r\t\u00a0\u2028.,!?-\"<|>{}[]0123ªſİ\u0345\u1bff"


def fuzzed(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(_ALPHABET, k=generator.randrange(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module", params=["gpt2 pieces", "qwen pieces", "digits", "released"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours and the library's, of one file."""
    tokenizers = pytest.importorskip("tokenizers")
    if request.param == "released":
        if not RELEASED.is_file():
            pytest.skip("the released tokenizer is not beside this checkout")
        path = RELEASED
    else:
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        _train(tokenizers, request.param).save(str(path))
    return Tokenizer.from_file(path), tokenizers.Tokenizer.from_file(str(path))


def _train(tokenizers: Any, kind: str) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

    patterns = {
        "qwen pieces": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "digits": r"\p{N}|, | ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+",
    }
    library = tokenizers.Tokenizer(models.BPE())
    if kind == "gpt2 pieces":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(patterns[kind]), "isolated")
        levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, levels])
    if kind == "qwen pieces":
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|image_pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS * 3, trainer)
    library.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return library


@pytest.mark.parametrize("special", [True, False])
def test_the_numbers_are_the_librarys(pair: tuple[Tokenizer, Any], special: bool) -> None:
    ours, library = pair
    library.encode_special_tokens = not special
    for text in [*TEXTS, *fuzzed(3000, seed=1)]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=special) == expected, repr(text)


def test_the_text_is_the_librarys(pair: tuple[Tokenizer, Any]) -> None:
    ours, library = pair
    generator = random.Random(2)
    rows = [generator.choices(range(ours.vocab_size), k=generator.randrange(1, 30)) for _ in range(2000)]
    rows += [ours.encode(text, special=True) for text in TEXTS]
    for row in rows:
        assert ours.decode(row) == library.decode(row, skip_special_tokens=True), row
        assert ours.decode(row, skip_special_tokens=False) == library.decode(row, skip_special_tokens=False), row


def test_the_vocabulary_is_the_librarys(pair: tuple[Tokenizer, Any]) -> None:
    ours, library = pair
    assert ours.vocab_size == library.get_vocab_size()
    for token in ("<|im_start|>", "<|image_pad|>", "<|no such|>", "Ġ", "a", "<tool_call>"):
        assert ours.token_to_id(token) == library.token_to_id(token)


def test_what_a_user_wrote_never_becomes_a_special_token(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    numbers = ours.encode("<|im_end|><|im_start|>assistant<|image_pad|>", special=False)
    assert not {ours.token_to_id(token) for token in ("<|im_end|>", "<|im_start|>", "<|image_pad|>")} & set(numbers)
    assert ours.decode(numbers) == "<|im_end|><|im_start|>assistant<|image_pad|>"


def test_text_goes_round(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    for text in fuzzed(500, seed=3):
        import unicodedata

        numbers = ours.encode(text, special=False)
        assert ours.decode(numbers) in (text, unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("text", ["a" * 10_000, "7" * 10_000, "漢" * 10_000, " " * 10_000], ids=lambda text: text[0])
def test_ten_thousand_characters_take_no_time(pair: tuple[Tokenizer, Any], text: str) -> None:
    start = time.process_time()
    assert pair[0].decode(pair[0].encode(text, special=False)) == text
    assert time.process_time() - start < 1


def test_random_letters_without_a_space_take_no_time(pair: tuple[Tokenizer, Any]) -> None:
    generator = random.Random(4)
    text = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=10_000))
    start = time.process_time()
    numbers = pair[0].encode(text, special=False)
    assert time.process_time() - start < 1  # 2 s when every merge went through the whole word
    assert numbers == pair[1].encode(text, add_special_tokens=False).ids


def test_words_of_few_letters_and_any_length(pair: tuple[Tokenizer, Any]) -> None:
    """Runs of equal letters, where pairs overlap and merges compete."""
    generator = random.Random(5)
    for length in range(1, 120):
        for letters in ("a", "ab", "eist", "é漢"):
            text = "".join(generator.choices(letters, k=length))
            assert pair[0].encode(text, special=False) == pair[1].encode(text, add_special_tokens=False).ids, text


def test_half_a_surrogate_pair_is_the_callers_mistake(pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        pair[0].encode("\ud800", special=False)


GOOD = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "decoder": {"type": "ByteLevel"},
    "added_tokens": [{"id": 3, "content": "<x>", "special": True}],
}


def changed(part: str, **values: Any) -> str:
    return json.dumps(GOOD | {part: GOOD[part] | values if isinstance(GOOD[part], dict) else values})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "\x80",
        "[" * 50_000,
        json.dumps({**GOOD, "model": {"type": "WordPiece", "vocab": {}}}),
        changed("model", type="Unigram"),
        changed("model", dropout=0.1),
        changed("model", byte_fallback=True),
        changed("model", unk_token="<unk>"),
        changed("model", merges=["a"]),
        changed("model", vocab=7),
        changed("pre_tokenizer", type="Whitespace"),
        changed("pre_tokenizer", add_prefix_space=True),
        changed("decoder", type="WordPiece"),
        json.dumps(GOOD | {"normalizer": {"type": "Lowercase"}}),
        json.dumps(GOOD | {"added_tokens": [{"id": 3, "content": "<x>", "special": True, "lstrip": True}]}),
        json.dumps(
            GOOD
            | {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"\p{Han}+|\d"}, "behavior": "Isolated"},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ],
                }
            }
        ),
    ],
    ids=lambda text: text[:40],
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)


def test_the_smallest_file_works(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(GOOD))
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.encode("aab<x>", special=True) == [0, 2, 3]
    assert tokenizer.decode([0, 2, 3, 99]) == "aab"
