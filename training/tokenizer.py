"""The tabletop policy's own small tokenizer: byte-level BPE, single digits, Qwen's control tokens and phrase tokens.

The sentences of a family's prompt and the skeleton of its JSON never change, so each is one token here ("phrase
tokens"): a prompt costs 15 tokens instead of 150, an object 24. They match text verbatim and decode to it; free text
that happens to hold one is tokenised the same way at training and at run time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from segzero_rt.answer_format import FORMATS, SYSTEM_PROMPT

from .knowledge import FUNCTION_WORDINGS, KNOWLEDGE
from .object_kinds import COLOURS, KINDS
from .questions import QUERY_KINDS, Asker
from .scene_cache import SceneCache
from .visual_questions import KNOWLEDGE_QUESTIONS, ask_about_picture

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
VOCABULARY_SIZE = 1408
"""BPE tokens; control and phrase tokens come on top."""

OBJECT_STARTS = ('[{"bbox_2d": [', ']}, {"bbox_2d": [', '{"bbox": [')
"""Tokens after which an object's coordinates follow; the pointer read-out listens there."""
_JSON_PHRASES = (*OBJECT_STARTS, '], "point_2d": [', "]}]", '], "points_1": [', '], "points_2": [', "]}", "[]", "{}")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def _prompt_phrases() -> list[str]:
    phrases: list[str] = []
    for family in FORMATS.values():
        phrases.append(family.prompt_head)
        tail = family.prompt_tail
        for sentence_end in (".", ".", ".", ".", "</think>"):
            cut = tail.index(sentence_end, 5) + len(sentence_end)
            phrases.append(tail[:cut])
            tail = tail[cut:]
        phrases.append(tail)
    return list(dict.fromkeys(phrases))


def _corpus(cache: SceneCache, num_scenes: int) -> Iterator[str]:
    rng = np.random.default_rng(0)
    side = (cache.input_side, cache.input_side)
    for index in range(min(num_scenes, len(cache.objects))):
        asker = Asker(rng, cache.objects[index], side, "train")
        for query_kind in QUERY_KINDS:
            question = asker.ask(query_kind)
            if question is not None:
                yield from (question.text, question.thinking)
        for _ in range(3):
            yield from ask_about_picture(rng, cache.objects[index], side)
    for kind, known in KNOWLEDGE.items():
        for use in (*known.uses, known.held_out_use):
            yield from (wording.format(use=use) for wording in FUNCTION_WORDINGS)
        for said in (*known.consequences, known.held_out_consequence):
            yield from (said, said.capitalize())
        yield from KNOWLEDGE_QUESTIONS
        yield f"{kind} {KINDS[kind].plural} {' '.join(KINDS[kind].synonyms)}"
    yield " ".join(COLOURS)
    yield SYSTEM_PROMPT


def control_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary must have.

    Raises:
        KeyError: it has none, so it is not one of ours.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(f"expected a tokenizer with the token {token!r}; train it anew with `train_tokenizer`")
    return found


def train_tokenizer(cache: SceneCache, target: Path, num_scenes: int = 1200) -> Tokenizer:
    """Learn the vocabulary from questions about cached scenes and from the world knowledge; write `tokenizer.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}|, | ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, min_frequency=1, show_progress=False, special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(cache, num_scenes), trainer)
    phrases = [*_TAGS, *_prompt_phrases(), *_JSON_PHRASES]
    tokenizer.add_tokens([AddedToken(phrase, special=False, normalized=False) for phrase in phrases])
    target.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target))
    return tokenizer
