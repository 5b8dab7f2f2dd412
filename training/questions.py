"""Questions about a scene, with the objects they mean and a short templated thinking.

`ask` makes one question of a given query kind, or says that the scene has none. Geometry is read from the objects alone, so
it works alike on a rendered `Scene` (source pixels) and on the training cache (input pixels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .knowledge import FUNCTION_WORDINGS, KNOWLEDGE, taught_uses
from .object_kinds import KINDS, PAIR_NOUNS

NAME, ATTRIBUTE, RELATION, SEVERAL, NONE = "name", "attribute", "relation", "several", "none"
FUNCTION, CONSEQUENCE, COMPOSITIONAL = "function", "consequence", "compositional"
TAUGHT_KINDS = (NAME, ATTRIBUTE, RELATION, SEVERAL, NONE)
"""Query kinds that the base policy sees with boxes."""
REASONING_KINDS = (FUNCTION, CONSEQUENCE, COMPOSITIONAL)
"""Query kinds whose boxes only reinforcement may use."""
QUERY_KINDS = TAUGHT_KINDS + REASONING_KINDS

SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
EXTREMES = ("largest", "smallest", "leftmost", "rightmost")
RELATIONS = (*SIDES, "nearest", *EXTREMES)
HELD_OUT_RELATION = {kind: RELATIONS[(3 * number) % len(RELATIONS)] for number, kind in enumerate(KINDS)}
"""kind → the relation that only the split `ood_relation` asks of it."""

MAX_SEVERAL = 4


class Thing(Protocol):
    """What a question needs to know of an object."""

    @property
    def kind(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def material(self) -> str: ...
    @property
    def centre_xy(self) -> tuple[float, float]: ...
    @property
    def area_px(self) -> float: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    text: str
    kind: str
    targets: tuple[int, ...]
    """Indices into the scene's objects, from left to right; empty for `none`."""
    thinking: str
    detail: str = ""
    """What was combined: the relation, the use. For splits and reports."""


class Asker:
    """Makes questions about one scene.

    Args:
        rng: drawn from at every question.
        things: the scene's objects.
        size_hw: of the coordinate system the objects are given in.
        split: decides which combinations may be asked (see `knowledge.py`, `HELD_OUT_RELATION`).
    """

    def __init__(self, rng: np.random.Generator, things: Sequence[Thing], size_hw: tuple[int, int], split: str) -> None:
        self.rng, self.things, self.size_hw, self.split = rng, things, size_hw, split

    def ask(self, query_kind: str, target_kind: str | None = None) -> Question | None:
        """One question of `query_kind`, about an object of `target_kind` if that is given; None if the scene has none."""
        makers = {
            NAME: self._name, ATTRIBUTE: self._attribute, RELATION: self._relation, SEVERAL: self._several,
            FUNCTION: self._function, CONSEQUENCE: self._consequence, COMPOSITIONAL: self._compositional,
        }  # fmt: skip
        if query_kind == NONE:
            return self._none(target_kind)
        wanted = [target_kind] if target_kind else self._shuffled(sorted({thing.kind for thing in self.things}))
        for kind in wanted:
            question = makers[query_kind](kind)
            if question is not None:
                return question
        return None

    # -- the taught kinds ------------------------------------------------------------------------------------------

    def _name(self, kind: str) -> Question | None:
        found = self._of_kind(kind)
        if len(found) != 1:
            return None
        noun = self._one_of((kind, kind, *KINDS[kind].synonyms))
        return self._found(self._one_of(("the {}", "the {}", "{}", "where is the {}")).format(noun), NAME, found[0])

    def _attribute(self, kind: str) -> Question | None:
        """By colour or material, where the kind alone would not do, or `the red thing` where only one is red."""
        found = self._of_kind(kind)
        target = self._one_of(found)
        if target is None:
            return None
        thing = self.things[target]
        phrases = []
        same_look = [other for other in found if self.things[other].colour == thing.colour]
        if len(same_look) == 1:
            phrases += [f"the {thing.colour} {kind}"] * 3
        if sum(other.colour == thing.colour for other in self.things) == 1:
            phrases.append(f"the {thing.colour} {self._one_of(('thing', 'object'))}")
        same_material = [other for other in found if self.things[other].material == thing.material]
        if len(same_material) == 1 and len({material for _, material in KINDS[kind].looks}) > 1:
            phrases.append(f"the {_material_word(thing.material)} {kind}")
        text = self._one_of(phrases)
        return None if text is None else self._found(text, ATTRIBUTE, target)

    def _relation(self, kind: str) -> Question | None:
        for relation in self._shuffled(RELATIONS):
            if (HELD_OUT_RELATION[kind] == relation) != (self.split == "ood_relation"):
                continue
            question = self._related(relation, kind, noun=kind)
            if question is not None:
                return question
        return None

    def _related(self, relation: str, kind: str, noun: str, query_kind: str = RELATION) -> Question | None:
        """`noun` stands for the object in the question: its kind, or a function for compositional questions."""
        if relation in SIDES:
            return self._beside(relation, kind, noun, query_kind)
        if relation == "nearest":
            return self._nearest(kind, query_kind) if query_kind == RELATION else None
        return self._extreme(relation, kind, noun, query_kind)

    def _beside(self, relation: str, kind: str, noun: str, query_kind: str) -> Question | None:
        dx, dy = SIDES[relation]
        margin = 0.05 * (self.size_hw[1] if dx else self.size_hw[0])
        for anchor in self._shuffled(range(len(self.things))):
            if self.things[anchor].kind == kind or len(self._of_kind(self.things[anchor].kind)) != 1:
                continue
            ax, ay = self.things[anchor].centre_xy
            offsets = {i: (self.things[i].centre_xy[0] - ax) * dx + (self.things[i].centre_xy[1] - ay) * dy for i in self._of_kind(kind)}
            beyond = [i for i, offset in offsets.items() if offset > margin]
            if len(beyond) != 1 or any(abs(offset) <= margin for offset in offsets.values()):
                continue
            other = self.things[anchor].kind
            lead = f"The {other} is {self._where(anchor)}. {relation.capitalize()} it"
            return self._found(f"{_the(noun)} {relation} the {other}", query_kind, beyond[0], lead=lead, detail=relation)
        return None

    def _nearest(self, kind: str, query_kind: str) -> Question | None:
        for anchor in self._shuffled(range(len(self.things))):
            if self.things[anchor].kind == kind or len(self._of_kind(self.things[anchor].kind)) != 1:
                continue
            ax, ay = self.things[anchor].centre_xy
            gaps = sorted(
                (float(np.hypot(thing.centre_xy[0] - ax, thing.centre_xy[1] - ay)), i)
                for i, thing in enumerate(self.things) if i != anchor
            )  # fmt: skip
            if self.things[gaps[0][1]].kind != kind or (len(gaps) > 1 and gaps[1][0] < 1.25 * gaps[0][0]):
                continue
            other = self.things[anchor].kind
            text = self._one_of(("the object nearest to the {}", "the thing closest to the {}", "what is next to the {}"))
            lead = f"The {other} is {self._where(anchor)}. Nearest to it"
            return self._found(str(text).format(other), query_kind, gaps[0][1], lead=lead, detail="nearest")
        return None

    def _extreme(self, relation: str, kind: str, noun: str, query_kind: str) -> Question | None:
        among = self._of_kind(kind)
        everything = query_kind == RELATION and self.rng.random() < 0.3
        if everything:
            among = list(range(len(self.things)))
        if len(among) < 2:
            return None
        sign = -1 if relation in ("largest", "rightmost") else 1
        sized = relation in ("largest", "smallest")
        values = sorted((sign * (self.things[i].area_px if sized else self.things[i].centre_xy[0]), i) for i in among)
        first, second = values[0], values[1]
        clear = max(abs(first[0]), abs(second[0])) >= 1.3 * min(abs(first[0]), abs(second[0])) if sized else second[0] - first[0] >= 0.05 * self.size_hw[1]
        if not clear or self.things[first[1]].kind != kind:
            return None
        word = {"largest": ("largest", "biggest")}.get(relation, (relation,))
        asked = "object" if everything else noun
        text = f"the {self._one_of(word)} {asked.removeprefix('the ')}"
        lead = f"The {relation} {'object' if everything else kind}"
        return self._found(text, query_kind, first[1], lead=lead, detail=relation)

    def _several(self, kind: str) -> Question | None:
        found = self._of_kind(kind)
        options: list[tuple[str, list[int], str]] = []
        if 2 <= len(found) <= MAX_SEVERAL:
            plural = KINDS[kind].plural
            text = self._one_of((f"all {plural}", f"the {plural}", f"every {kind}", f"the {_count_word(len(found))} {plural}"))
            options += [(str(text), found, plural)] * 2
        colour = self.things[found[0]].colour if found else ""
        coloured = [i for i, thing in enumerate(self.things) if thing.colour == colour]
        if 2 <= len(coloured) <= MAX_SEVERAL:
            text = self._one_of((f"all {colour} things", f"every {colour} object", f"the {colour} objects"))
            options.append((str(text), coloured, f"{colour} things"))
        singles = [i for i, thing in enumerate(self.things) if len(self._of_kind(thing.kind)) == 1 and thing.kind != kind]
        if len(found) == 1 and singles:
            partner = self._one_of(singles)
            options.append((f"the {kind} and the {self.things[partner].kind}", [found[0], partner], ""))
        choice = self._one_of(options)
        if choice is None:
            return None
        text, members, group = choice
        ordered = tuple(sorted(members, key=lambda i: self.things[i].centre_xy[0]))
        listed = ", ".join(f"{article_name(self.things[i])} {self._where(i)}" for i in ordered)
        count = f"There are {len(ordered)} {group}: " if group else "There are "
        return Question(text=text, kind=SEVERAL, targets=ordered, thinking=f"{count}{listed}.", detail=str(len(ordered)))

    def _none(self, target_kind: str | None) -> Question:
        present = {thing.kind for thing in self.things}
        absent = [kind for kind in KINDS if kind not in present]
        kind = target_kind if target_kind in absent else self._one_of(absent)
        style = self.rng.random()
        if style < 0.4:
            thing = self._one_of(list(self.things))
            taken = {other.colour for other in self.things if other.kind == thing.kind}
            colours = sorted({colour for colour, _ in KINDS[thing.kind].looks} - taken)
            if colours:
                colour = self._one_of(colours)
                return self._nothing(f"the {colour} {thing.kind}", f"{colour} {thing.kind}", "colour")
        if style < 0.55:
            thing = self._one_of(list(self.things))
            side = self._one_of(tuple(SIDES))
            return self._nothing(f"the {thing.kind} {side} the {kind}", str(kind), "anchor")
        if style < 0.65:
            return self._nothing(f"all {KINDS[str(kind)].plural}", str(kind), "plural")
        noun = self._one_of((kind, kind, *KINDS[str(kind)].synonyms))
        return self._nothing(str(self._one_of(("the {}", "{}", "where is the {}"))).format(noun), str(kind), "kind")

    # -- the kinds left to reinforcement ---------------------------------------------------------------------------

    def _function(self, kind: str) -> Question | None:
        found = self._of_kind(kind)
        if len(found) != 1:
            return None
        use, wording = self._use(kind)
        return self._found(FUNCTION_WORDINGS[wording].format(use=use), FUNCTION, found[0], lead=_useful(kind, use), detail=use)

    def _consequence(self, kind: str) -> Question | None:
        found = self._of_kind(kind)
        if len(found) != 1:
            return None
        known = KNOWLEDGE[kind]
        said = known.held_out_consequence if self.split == "ood_wording" else str(self._one_of(known.consequences))
        lead = f"{said.capitalize()}, so {'the' if kind in PAIR_NOUNS else 'a'} {kind} helps. It"
        return self._found(f"{said}, what helps", CONSEQUENCE, found[0], lead=lead, detail=said)

    def _compositional(self, kind: str) -> Question | None:
        use, _ = self._use(kind)
        for relation in self._shuffled((*SIDES, *EXTREMES)):
            if (HELD_OUT_RELATION[kind] == relation) != (self.split == "ood_relation"):
                continue
            question = self._related(relation, kind, f"the thing to {use}", COMPOSITIONAL)
            if question is not None:
                return question
        return None

    def _use(self, kind: str) -> tuple[str, int]:
        """(use, wording) as the split allows."""
        known = KNOWLEDGE[kind]
        if self.split == "ood_function":
            return known.held_out_use, int(self.rng.integers(len(FUNCTION_WORDINGS)))
        if self.split == "ood_wording":
            return str(self._one_of(known.uses)), known.held_out_wording
        taught = taught_uses(kind)
        return taught[int(self.rng.integers(len(taught)))]

    # -- parts -----------------------------------------------------------------------------------------------------

    def _found(self, text: str, query_kind: str, target: int, *, lead: str = "There", detail: str = "") -> Question:
        thinking = f"{lead} is {article_name(self.things[target])} {self._where(target)}."
        return Question(text=text, kind=query_kind, targets=(target,), thinking=thinking, detail=detail)

    @staticmethod
    def _nothing(text: str, missing: str, detail: str) -> Question:
        return Question(text=text, kind=NONE, targets=(), thinking=f"There is no {missing}.", detail=detail)

    def _of_kind(self, kind: str) -> list[int]:
        return [i for i, thing in enumerate(self.things) if thing.kind == kind]

    def _where(self, index: int) -> str:
        return where(self.things[index].centre_xy, self.size_hw)

    def _one_of(self, options):  # type: ignore[no-untyped-def]
        """A random option, or None if there are none."""
        return options[int(self.rng.integers(len(options)))] if len(options) else None

    def _shuffled(self, options):  # type: ignore[no-untyped-def]
        return [options[i] for i in self.rng.permutation(len(options))]


def where(centre_xy: tuple[float, float], size_hw: tuple[int, int]) -> str:
    """One of nine words for a place in the picture: `at the upper left` … `in the centre` … `at the lower right`."""
    column = min(int(3 * centre_xy[0] / size_hw[1]), 2)
    row = min(int(3 * centre_xy[1] / size_hw[0]), 2)
    if (row, column) == (1, 1):
        return "in the centre"
    if row == 1:
        return f"at the {('left', '', 'right')[column]}"
    if column == 1:
        return f"at the {('top', '', 'bottom')[row]}"
    return f"at the {('upper', '', 'lower')[row]} {('left', '', 'right')[column]}"


def article_name(thing: Thing) -> str:
    """`a red mug`, `an orange pair of scissors`."""
    noun = f"pair of {thing.kind}" if thing.kind in PAIR_NOUNS else thing.kind
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {noun}"


def _the(noun: str) -> str:
    return noun if noun.startswith("the ") else f"the {noun}"


def _useful(kind: str, use: str) -> str:
    subject = f"{kind.capitalize()} are" if kind in PAIR_NOUNS else f"A {kind} is"
    return f"{subject} made to {use}. There"


def _material_word(material: str) -> str:
    return {"wood": "wooden"}.get(material, material)


def _count_word(count: int) -> str:
    return ("no", "one", "two", "three", "four")[count]
