"""Thoughts in fewer words: what is left of each, and that pretraining teaches the share that was asked for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from small_cache import make_cache, make_tokenizer

from segzero_rt.answer_format import THINK_OPEN
from training.brief_thoughts import told_briefly
from training.grounding_data import IGNORED, LONG, SHORT, SIZE_HW, GroundingData
from training.object_kinds import COLOURS, KINDS
from training.questions import QUERY_KINDS, Asker
from training.scene_cache import SceneCache
from training.visual_questions import think_about_world

CASES = {
    "name": ("There is a pink mug at the lower right.", "a pink mug lower right."),
    "in the centre": ("There is an orange ball in the centre.", "an orange ball centre."),
    "a pair": ("There is a red pair of scissors at the top.", "a red pair of scissors top."),
    "relation": (
        "The spoon is at the left. Above it is a red mug in the centre.",
        "spoon left. Above it is a red mug centre.",
    ),
    "the anchor is a pair": (
        "The glasses are at the upper left. Left of it is a pink mug at the left.",
        "glasses upper left. Left of it is a pink mug left.",
    ),
    "superlative": ("The largest mug is a red mug at the top.", "the largest mug is a red mug top."),
    "several of a kind": (
        "There are 2 mugs: a red mug at the left, a blue mug in the centre.",
        "2 mugs: a red mug left, a blue mug centre.",
    ),
    "several kinds": ("There are a red mug at the left, an apple at the top.", "a red mug left, an apple top."),
    "none": ("There is no red mug.", "no red mug."),
    "function": (
        "A mug is made to drink tea from. There is a pink mug at the left.",
        "a mug. a pink mug left.",
    ),
    "function of a pair": ("Scissors are made to cut paper.", "scissors."),
    "consequence": (
        "My coffee has nowhere to go, so a mug helps. It is a silver mug in the centre.",
        "a mug. a silver mug centre.",
    ),
    "consequence of a pair": ("The loose thread bothers me, so the scissors help.", "scissors."),
    "nothing to leave out": ("hm", "hm"),
    "empty": ("", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_of_a_thought(name: str) -> None:
    thinking, told = CASES[name]
    assert told_briefly(thinking) == told
    assert told_briefly(told) == told, "what is brief stays as it is"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SceneCache:
    return make_cache(tmp_path_factory.mktemp("scenes"))


def named(text: str) -> list[str]:
    """Kinds, colours, and words for places, in order."""
    places = ("upper", "lower", "left", "right", "top", "bottom", "centre")
    known = {*KINDS, *(kind.plural for kind in KINDS.values()), *COLOURS, *places}
    return [word for word in re.findall(r"\w+", text.lower()) if word in known]


@pytest.mark.parametrize("kind", QUERY_KINDS)
def test_what_is_found_and_where_is_still_said(kind: str, cache: SceneCache) -> None:
    rng, asked = np.random.default_rng(0), 0
    for things in cache.objects * 5:
        question = Asker(rng, things, SIZE_HW, "train").ask(kind)
        if question is None:
            continue
        asked += 1
        long, told = question.thinking, told_briefly(question.thinking)
        # The use that a long thought repeats may name things of its own ("cut paper at the table").
        assert named(told) == named(long)[-len(named(told)) :] or set(named(told)) <= set(named(long))
        assert named(told)[-2:] == named(long)[-2:]
        assert len(told) < len(long)
    assert asked


def test_a_thought_about_the_world_keeps_what_comes_to_mind() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        told = told_briefly(think_about_world(rng)[1])
        assert re.fullmatch(rf"(an? )?({'|'.join(KINDS)})\.", told), told


@pytest.mark.parametrize("share, least, most", [(0.0, 0.0, 0.0), (0.4, 0.3, 0.5), (1.0, 1.0, 1.0)])
def test_pretraining_teaches_the_share_that_was_asked_for(
    share: float, least: float, most: float, cache: SceneCache, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(cache, tmp_path)
    data = GroundingData(cache, tokenizer, brief_share=share)
    layout = data.layout((6, SHORT), (1, LONG))
    batch = data.batch(np.random.default_rng(0), np.arange(12).repeat(4), layout)
    thoughts = []
    for row in batch.labels:
        said = tokenizer.decode(row[row != IGNORED].tolist(), skip_special_tokens=False)
        thoughts += re.findall(rf"{THINK_OPEN} (.+?)(?: </think>|(?={THINK_OPEN})|$)", said)
    brief = np.mean([told_briefly(thought) == thought for thought in thoughts])
    assert len(thoughts) > 200 and least <= brief <= most
    # Boxes and places to look at are found in brief thoughts, too.
    assert len(batch.box_at) > 200 and len(batch.watch_at) > 1.5 * len(batch.box_at)
