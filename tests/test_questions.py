"""Questions mean what they say: every question's targets are found again from its words alone, by brute force."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import hypot

import numpy as np
import pytest

from training.knowledge import FUNCTION_WORDINGS, KNOWLEDGE
from training.object_kinds import COLOURS, KINDS, MATERIAL_SHINE
from training.phrases import article_name, where
from training.questions import (
    ATTRIBUTE,
    COMPOSITIONAL,
    CONSEQUENCE,
    FUNCTION,
    HELD_OUT_RELATION,
    NAME,
    NONE,
    QUERY_KINDS,
    RELATION,
    RELATIONS,
    SEVERAL,
    Asker,
    Question,
)
from training.scenes import SPLITS

SIZE_HW = (300, 400)
TRAINING_SPLITS = ("train", "validation", "test", "ood_colour")


@dataclass(frozen=True)
class Lying:
    """An object as a row of a table: kind, colour, material, centre, visible pixels."""

    kind: str
    colour: str
    material: str
    centre_xy: tuple[float, float]
    area_px: float = 1000.0


# -- an independent reading of the questions -----------------------------------------------------------------------

NOUNS = {word: kind for kind, spec in KINDS.items() for word in (kind, spec.plural, *spec.synonyms)}
USES = {use: kind for kind, known in KNOWLEDGE.items() for use in (*known.uses, known.held_out_use)}
SAID = {said: kind for kind, known in KNOWLEDGE.items() for said in (*known.consequences, known.held_out_consequence)}
ADJECTIVES = {**{colour: ("colour", colour) for colour in COLOURS}}
ADJECTIVES |= {material: ("material", material) for material in MATERIAL_SHINE} | {"wooden": ("material", "wood")}
SIDE_TESTS = {
    "left of": lambda thing, anchor: thing[0] < anchor[0],
    "right of": lambda thing, anchor: thing[0] > anchor[0],
    "above": lambda thing, anchor: thing[1] < anchor[1],
    "below": lambda thing, anchor: thing[1] > anchor[1],
}
EXTREME_KEYS = {
    "largest": lambda thing: -thing.area_px,
    "biggest": lambda thing: -thing.area_px,
    "smallest": lambda thing: thing.area_px,
    "leftmost": lambda thing: thing.centre_xy[0],
    "rightmost": lambda thing: -thing.centre_xy[0],
}
WORDINGS = [re.compile(re.escape(wording).replace(r"\{use\}", "(.+)")) for wording in FUNCTION_WORDINGS]
WORDINGS.append(re.compile(r"(?:the )?thing to (.+)"))  # compositional questions


def named(phrase: str, things: list[Lying]) -> list[int]:
    """Objects that a noun phrase without a relation names."""
    phrase = phrase.removeprefix("where is ")
    for wording in WORDINGS:
        match = wording.fullmatch(phrase)
        if match and match[1] in USES:
            return named(USES[match[1]], things)
    if phrase.endswith(", what helps"):
        return named(SAID[phrase.removesuffix(", what helps")], things)
    phrase = re.sub(r"^(the (two|three|four) |the |all |every )", "", phrase)
    if phrase in NOUNS:
        return [i for i, thing in enumerate(things) if thing.kind == NOUNS[phrase]]
    if phrase in ("object", "objects", "thing", "things"):
        return list(range(len(things)))
    word, rest = phrase.split(" ", 1)
    attribute, value = ADJECTIVES[word]
    return [i for i in named(rest, things) if getattr(things[i], attribute) == value]


def meant(text: str, things: list[Lying]) -> set[int]:
    """What a question asks for, from its words and the objects alone."""
    nearest = re.fullmatch(r"(?:the object nearest to|the thing closest to|what is next to) the (.+)", text)
    if nearest:
        (anchor,) = named(nearest[1], things)
        ax, ay = things[anchor].centre_xy
        gaps = {i: hypot(t.centre_xy[0] - ax, t.centre_xy[1] - ay) for i, t in enumerate(things) if i != anchor}
        return {min(gaps, key=gaps.__getitem__)}
    beside = re.fullmatch(r"(.+) (left of|right of|above|below) the (.+)", text)
    if beside and beside[3] in NOUNS:
        anchors = named(beside[3], things)
        test = SIDE_TESTS[beside[2]]
        candidates = named(beside[1], things)
        return {i for a in anchors for i in candidates if test(things[i].centre_xy, things[a].centre_xy)}
    extreme = re.fullmatch(r"the (largest|biggest|smallest|leftmost|rightmost) (.+)", text)
    if extreme:
        among = named(extreme[2], things)
        return {min(among, key=lambda i: EXTREME_KEYS[extreme[1]](things[i]))}
    both = re.fullmatch(r"the (\w+) and the (\w+)", text)
    if both:
        return {*named(both[1], things), *named(both[2], things)}
    return set(named(text, things))


def lying_at_random(rng: np.random.Generator) -> list[Lying]:
    """Up to nine objects with kinds and colours that often repeat; no picture is drawn."""
    kinds = list(rng.choice(list(KINDS), size=5))
    things = []
    for _ in range(int(rng.integers(1, 10))):
        kind = str(rng.choice(kinds))
        colour, material = KINDS[kind].looks[int(rng.integers(len(KINDS[kind].looks)))]
        centre = (float(rng.uniform(0, SIZE_HW[1])), float(rng.uniform(0, SIZE_HW[0])))
        things.append(Lying(kind, colour, material, centre, float(rng.uniform(200, 6000))))
    return things


def many_questions(split: str, query_kind: str, count: int = 400) -> list[tuple[list[Lying], Question]]:
    rng = np.random.default_rng(QUERY_KINDS.index(query_kind))
    scenes = [lying_at_random(rng) for _ in range(count)]
    asked = [(things, Asker(rng, things, SIZE_HW, split).ask(query_kind)) for things in scenes]
    return [(things, question) for things, question in asked if question is not None]


# -- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("query_kind", QUERY_KINDS)
def test_targets_are_exactly_what_the_words_mean(query_kind: str, split: str) -> None:
    asked = many_questions(split, query_kind)
    assert len(asked) >= 40
    for things, question in asked:
        assert question.kind == query_kind
        assert set(question.targets) == meant(question.text, things), (question, things)
        assert len(question.targets) == len(set(question.targets))


@pytest.mark.parametrize("query_kind", [kind for kind in QUERY_KINDS if kind not in (SEVERAL, NONE)])
def test_singular_kinds_mean_one_object_and_the_thinking_says_which(query_kind: str) -> None:
    for things, question in many_questions("train", query_kind):
        (target,) = question.targets
        thing = things[target]
        assert question.thinking.endswith(f"{article_name(thing)} {where(thing.centre_xy, SIZE_HW)}.")


def test_several_are_two_to_four_from_left_to_right_and_all_are_listed() -> None:
    for things, question in many_questions("train", SEVERAL):
        assert 2 <= len(question.targets) <= 4
        xs = [things[i].centre_xy[0] for i in question.targets]
        assert xs == sorted(xs)
        assert all(article_name(things[i]) in question.thinking for i in question.targets)


def test_none_asks_in_every_style_for_what_is_not_there() -> None:
    asked = [question for _, question in many_questions("test", NONE)]
    assert {question.detail for question in asked} == {"colour", "anchor", "plural", "kind"}
    assert all(question.targets == () and question.thinking.startswith("There ") for question in asked)


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ("mug", "There is no mug."),
        ("glasses", "There are no glasses."),
        ("scissors", "There are no scissors."),
    ],
)
def test_verbs_follow_pair_nouns(thinking: str, expected: str) -> None:
    rng = np.random.default_rng(0)
    things = [Lying("ball", "red", "rubber", (10, 10))]
    said = {Asker(rng, things, SIZE_HW, "test").ask_for_nothing(thinking).thinking for _ in range(60)}
    assert expected in said
    wrong = r"\b(glasses|scissors) (is|helps)\b|There is no (\w+ )?(glasses|scissors)|\ba apple\b|\bA apple\b"
    for query_kind in QUERY_KINDS:
        for _, question in many_questions("train", query_kind, 150):
            assert not re.search(wrong, question.thinking), question.thinking


# -- hand-made scenes: everything that may be asked, and nothing else ----------------------------------------------

MUG_LEFT = Lying("mug", "red", "ceramic", (60, 150), 3000)
MUG_RIGHT = Lying("mug", "blue", "ceramic", (340, 150), 1000)
PLATE = Lying("plate", "red", "ceramic", (200, 150), 5000)
KEY_TOP = Lying("key", "gold", "metal", (230, 20), 500)

HAND_MADE = {
    "a kind that stands alone, by name and synonym": (
        [MUG_LEFT, PLATE], NAME, "mug",
        dict.fromkeys(("the mug", "mug", "where is the mug", "the cup", "cup", "where is the cup"), (0,)),
    ),
    "two of a kind have no name": ([MUG_LEFT, MUG_RIGHT], NAME, "mug", {}),
    "not there": ([PLATE], NAME, "mug", {}),
    "two mugs by colour; red alone would also mean the plate": (
        [MUG_LEFT, MUG_RIGHT, PLATE], ATTRIBUTE, "mug",
        {"the red mug": (0,), "the blue mug": (1,), "the blue thing": (1,), "the blue object": (1,)},
    ),
    "equal twins have no attribute": ([MUG_LEFT, MUG_LEFT], ATTRIBUTE, "mug", {}),
    "wood and metal forks in one colour each": (
        [Lying("fork", "brown", "wood", (50, 50)), Lying("fork", "silver", "metal", (200, 50))], ATTRIBUTE, "fork",
        {
            "the brown fork": (0,), "the brown thing": (0,), "the brown object": (0,), "the wooden fork": (0,),
            "the silver fork": (1,), "the silver thing": (1,), "the silver object": (1,), "the metal fork": (1,),
        },
    ),
    "several mugs; several red things": (
        [MUG_LEFT, MUG_RIGHT, PLATE], SEVERAL, "mug",
        {
            "all mugs": (0, 1), "the mugs": (0, 1), "every mug": (0, 1), "the two mugs": (0, 1),
            "all red things": (0, 2), "every red object": (0, 2), "the red objects": (0, 2),
        },
    ),
    "a pair of different things": ([PLATE, KEY_TOP], SEVERAL, "key", {"the key and the plate": (0, 1)}),
    "five mugs are too many": ([MUG_LEFT] * 5, SEVERAL, "mug", {}),
    "a consequence": (
        [KEY_TOP, PLATE], CONSEQUENCE, "key",
        {f"{said}, what helps": (0,) for said in KNOWLEDGE["key"].consequences},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("things", "query_kind", "kind", "expected"), HAND_MADE.values(), ids=HAND_MADE)
def test_hand_made_scenes(
    things: list[Lying], query_kind: str, kind: str, expected: dict[str, tuple[int, ...]]
) -> None:
    rng = np.random.default_rng(0)
    asked = [Asker(rng, things, SIZE_HW, "train").ask(query_kind, kind) for _ in range(150)]
    got = {question.text: question.targets for question in asked if question is not None}
    assert got == expected


RELATED = {
    "left, right, extremes of two mugs beside a plate": (
        [MUG_LEFT, MUG_RIGHT, PLATE],
        {
            "left of": {("the mug left of the plate", 0)}, "right of": {("the mug right of the plate", 1)},
            "largest": {("the largest mug", 0), ("the biggest mug", 0)}, "smallest": {("the smallest mug", 1),
            ("the smallest object", 1)}, "leftmost": {("the leftmost mug", 0), ("the leftmost object", 0)},
            "rightmost": {("the rightmost mug", 1), ("the rightmost object", 1)},
        },
    ),
    "too close to be left of it": (
        [Lying("mug", "red", "ceramic", (210, 160)), PLATE],
        {
            "nearest": {
                ("the object nearest to the plate", 0), ("the thing closest to the plate", 0),
                ("what is next to the plate", 0),
            },
            "smallest": {("the smallest object", 0)},
        },
    ),
    "above an anchor that is not unique is not asked": (
        [Lying("mug", "red", "ceramic", (200, 20)), PLATE, PLATE], {"smallest": {("the smallest object", 0)}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("things", "expected"), RELATED.values(), ids=RELATED)
def test_hand_made_relations(things: list[Lying], expected: dict[str, set[tuple[str, int]]]) -> None:
    got: dict[str, set[tuple[str, int]]] = {}
    for split in ("train", "ood_relation"):  # together they ask every relation
        rng = np.random.default_rng(1)
        for _ in range(300):
            question = Asker(rng, things, SIZE_HW, split).ask(RELATION, "mug")
            if question is not None:
                got.setdefault(question.detail, set()).add((question.text, question.targets[0]))
    assert got == expected


# -- what is held out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_kind", [RELATION, COMPOSITIONAL])
def test_a_kinds_held_out_relation_is_asked_in_its_split_alone(query_kind: str) -> None:
    for split in (*TRAINING_SPLITS, "ood_relation"):
        for things, question in many_questions(split, query_kind):
            kind = things[question.targets[0]].kind
            assert question.detail in RELATIONS
            assert (HELD_OUT_RELATION[kind] == question.detail) == (split == "ood_relation"), question


def test_held_out_words_are_asked_in_their_splits_alone() -> None:
    for split in SPLITS:
        for things, question in many_questions(split, FUNCTION):
            known = KNOWLEDGE[things[question.targets[0]].kind]
            wording = next(i for i, w in enumerate(FUNCTION_WORDINGS) if question.text == w.format(use=question.detail))
            assert (question.detail == known.held_out_use) == (split == "ood_function")
            if split != "ood_function":  # new uses come in any words
                assert (wording == known.held_out_wording) == (split == "ood_wording")
        for things, question in many_questions(split, CONSEQUENCE):
            known = KNOWLEDGE[things[question.targets[0]].kind]
            assert (question.detail == known.held_out_consequence) == (split == "ood_wording")
        for things, question in many_questions(split, COMPOSITIONAL):
            held_out = KNOWLEDGE[things[question.targets[0]].kind].held_out_use
            assert (held_out in question.text) == (split == "ood_function")


def test_every_use_and_consequence_belongs_to_one_kind() -> None:
    assert set(KNOWLEDGE) == set(KINDS)
    assert len(USES) == sum(len(known.uses) + 1 for known in KNOWLEDGE.values())
    assert len(SAID) == sum(len(known.consequences) + 1 for known in KNOWLEDGE.values())
    assert len(NOUNS) == len({word for spec in KINDS.values() for word in (spec.name, spec.plural, *spec.synonyms)})


GOLDEN = [
    ("the spoon", (1,)),
    ("the silver object", (1,)),
    ("the object nearest to the spoon", (2,)),
    ("the scissors", (2, 0)),
    ("the green scissors", ()),
    ("something to eat soup with", (1,)),
    ("the sugar lies at the bottom of the glass, what helps", (1,)),
    ("the thing to cut paper with right of the spoon", (0,)),
]


def test_seeds_keep_their_questions() -> None:
    """Trained weights and published scores belong to these draws: a change here is a new data set."""
    rng = np.random.default_rng(2024)
    things = lying_at_random(rng)
    asker = Asker(rng, things, SIZE_HW, "test")
    asked = [asker.ask(query_kind) for query_kind in QUERY_KINDS]
    assert [(q.text, q.targets) if q else None for q in asked] == GOLDEN
