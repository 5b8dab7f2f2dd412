"""Short questions that need no box: what the base policy knows besides grounding, and must not forget later.

About a picture (colour, count, presence, what lies where) and about the world (what a thing is for, what helps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .draws import pick
from .knowledge import FUNCTION_WORDINGS, KNOWLEDGE
from .object_kinds import KINDS, PAIR_NOUNS
from .phrases import Thing, article_name, be, helpful, made_to, where, with_article
from .questions import EXTREMES, SIDES
from .scene_cache import CachedObject

Pair = tuple[str, str]
"""(question, answer) in plain text."""

KNOWLEDGE_QUESTIONS = (
    "What would you use to {use}?",
    "Name something to {use}.",
    "What is the {kind} made for?",
    "{said}. What helps?",
)
WORDED_QUESTIONS = ('Please name "{text}".', "What is {text}?", 'Which thing is meant by "{text}"?', "{text}")
"""The same knowledge in the words of the questions that find things; the answer is a name, never a box."""
WORDED_SHARE = 0.6
CONSEQUENCE_SHARE = 0.35


def ask_about_picture(
    rng: np.random.Generator, things: Sequence[CachedObject], size_hw: tuple[int, int]
) -> tuple[str, str]:
    """(question, answer) in plain text."""
    asks = tuple(PICTURE_QUESTIONS.values())
    for number in rng.permutation(len(asks)):
        pair = asks[int(number)](rng, things, size_hw)
        if pair is not None:
            return pair
    return _presence(rng, things, size_hw)


def _singles(things: Sequence[Thing]) -> list[Thing]:
    kinds = [thing.kind for thing in things]
    return [thing for thing in things if kinds.count(thing.kind) == 1]


def _colour(
    rng: np.random.Generator, things: Sequence[CachedObject], size_hw: tuple[int, int]
) -> tuple[str, str] | None:
    singles = _singles(things)
    if not singles:
        return None
    thing = pick(rng, singles)
    return f"What colour {be(thing.kind)} the {thing.kind}?", thing.colour


def _count(
    rng: np.random.Generator, things: Sequence[CachedObject], size_hw: tuple[int, int]
) -> tuple[str, str] | None:
    if rng.random() < 0.25:
        return "How many objects are there?", str(len(things))
    kind = pick(rng, things).kind if rng.random() < 0.75 else pick(rng, list(KINDS))
    return f"How many {KINDS[kind].plural} are there?", str(sum(thing.kind == kind for thing in things))


def _presence(rng: np.random.Generator, things: Sequence[CachedObject], size_hw: tuple[int, int]) -> tuple[str, str]:
    kind = pick(rng, things).kind if rng.random() < 0.5 else pick(rng, list(KINDS))
    asked = f"Are there {kind}?" if kind in PAIR_NOUNS else f"Is there {with_article(kind)}?"
    return asked, "yes" if any(thing.kind == kind for thing in things) else "no"


def _place(
    rng: np.random.Generator, things: Sequence[CachedObject], size_hw: tuple[int, int]
) -> tuple[str, str] | None:
    places = [where(thing.centre_xy, size_hw) for thing in things]
    alone = [i for i, place in enumerate(places) if places.count(place) == 1]
    if not alone:
        return None
    chosen = pick(rng, alone)
    return f"What is {places[chosen]}?", article_name(things[chosen])


def _region(
    rng: np.random.Generator, things: Sequence[CachedObject], size_hw: tuple[int, int]
) -> tuple[str, str] | None:
    thing = pick(rng, things)
    return f"What is in [{', '.join(str(round(v)) for v in thing.box_xyxy)}]?", article_name(thing)


PICTURE_QUESTIONS: dict[str, Callable[[np.random.Generator, Sequence[CachedObject], tuple[int, int]], Pair | None]] = {
    "colour": _colour, "count": _count, "presence": _presence, "place": _place, "region": _region,
}  # fmt: skip
"""Kind of short question → what makes one of a picture; None where the picture has none of that kind."""


def ask_about_world(rng: np.random.Generator) -> tuple[str, str]:
    """(question, answer) of world knowledge; every use and consequence occurs, those held out of grounding too."""
    kind = pick(rng, list(KNOWLEDGE))
    known = KNOWLEDGE[kind]
    use = pick(rng, (*known.uses, known.held_out_use))
    said = pick(rng, (*known.consequences, known.held_out_consequence))
    if rng.random() < WORDED_SHARE:
        return pick(rng, WORDED_QUESTIONS).format(text=_worded(rng, use, said)), kind
    template = pick(rng, KNOWLEDGE_QUESTIONS)
    answer = f"to {use}" if "{kind}" in template else kind
    return template.format(use=use, kind=kind, said=said.capitalize()), answer


def think_about_world(rng: np.random.Generator) -> Pair:
    """(question that finds things, what comes to mind about it): the same knowledge, in a thinking's words."""
    kind = pick(rng, list(KNOWLEDGE))
    known = KNOWLEDGE[kind]
    if rng.random() < CONSEQUENCE_SHARE:
        said = pick(rng, (*known.consequences, known.held_out_consequence))
        return f"{said}, what helps", f"{said.capitalize()}, so {helpful(kind)}."
    use = pick(rng, (*known.uses, known.held_out_use))
    return _use_worded(rng, use), made_to(kind, use)


def _worded(rng: np.random.Generator, use: str, said: str) -> str:
    """A use or a consequence as questions that find things say it."""
    return f"{said}, what helps" if rng.random() < CONSEQUENCE_SHARE else _use_worded(rng, use)


def _use_worded(rng: np.random.Generator, use: str) -> str:
    """As a question by function, or one that combines it with a place or a size, would say it."""
    anchor = pick(rng, list(KINDS))
    alone = [wording.format(use=use) for wording in FUNCTION_WORDINGS]
    extreme = [f"the {extreme} thing to {use}" for extreme in EXTREMES]
    beside = [f"the thing to {use} {side} the {anchor}" for side in SIDES]
    return pick(rng, pick(rng, (alone, extreme, beside)))
