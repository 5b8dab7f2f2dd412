"""Questions about a scene, with the objects they mean and a short templated thinking.

`ask` makes one question of a given query kind, or says that the scene has none. Geometry is read from the objects
alone, so it works alike on a rendered `Scene` (source pixels) and on the training cache (input pixels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .draws import pick, shuffled
from .knowledge import FUNCTION_WORDINGS, KNOWLEDGE, taught_uses
from .object_kinds import KINDS
from .phrases import Thing, article_name, be, count_word, helpful, made_to, material_word, where, with_the
from .scenes import DEFAULT_SIZE_HW, allowed_looks

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
CLEAR_SHARE = 0.05
"""Of the picture's width or height: centres closer than this are not called left of, above, leftmost …"""
CLEAR_GAP_RATIO = 1.25
"""The second nearest object is at least so many times as far as the nearest."""
CLEAR_AREA_RATIO = 1.3
"""The largest object covers at least so many times the pixels of the second largest."""


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
        things: the scene's objects, at least one.
        size_hw: of the coordinate system the objects are given in.
        split: decides which combinations may be asked (see `knowledge.py`, `HELD_OUT_RELATION`).
    """

    def __init__(self, rng: np.random.Generator, things: Sequence[Thing], size_hw: tuple[int, int], split: str) -> None:
        self.rng, self.things, self.size_hw, self.split = rng, things, size_hw, split

    def ask(self, query_kind: str, target_kind: str | None = None) -> Question | None:
        """One question of `query_kind`, about an object of `target_kind` if that is given; None if there is none."""
        makers = {
            NAME: self._name, ATTRIBUTE: self._attribute, RELATION: self._relation, SEVERAL: self._several,
            FUNCTION: self._function, CONSEQUENCE: self._consequence, COMPOSITIONAL: self._compositional,
        }  # fmt: skip
        if query_kind == NONE:
            return self.ask_for_nothing(target_kind)
        present = sorted({thing.kind for thing in self.things})
        for kind in [target_kind] if target_kind else shuffled(self.rng, present):
            question = makers[query_kind](kind)
            if question is not None:
                return question
        return None

    def ask_for_nothing(self, target_kind: str | None = None) -> Question:
        """A question of kind `none`, which every scene has: a kind, a look, an anchor that is not there.

        Args:
            target_kind: the kind that is missed, if it is absent and the draw asks for a missing kind.
        """
        present = {thing.kind for thing in self.things}
        absent = [kind for kind in KINDS if kind not in present]
        kind = target_kind if target_kind is not None and target_kind in absent else pick(self.rng, absent)
        style = self.rng.random()
        question = self._missing_look() if style < 0.4 else None
        if question is not None:
            return question
        if style < 0.55:
            thing = pick(self.rng, self.things)
            sides = [side for side in SIDES if self.split == "ood_relation" or self._may_relate(thing.kind, side)]
            side = pick(self.rng, sides)
            return _nothing(f"the {thing.kind} {side} the {kind}", kind, "anchor")
        if style < 0.65:
            return _nothing(f"all {KINDS[kind].plural}", kind, "plural")
        noun = pick(self.rng, (kind, kind, *KINDS[kind].synonyms))
        return _nothing(pick(self.rng, ("the {}", "{}", "where is the {}")).format(noun), kind, "kind")

    # -- the taught kinds ----------------------------------------------------------------------------------------------

    def _name(self, kind: str) -> Question | None:
        found = self._of_kind(kind)
        if len(found) != 1:
            return None
        noun = pick(self.rng, (kind, kind, *KINDS[kind].synonyms))
        text = pick(self.rng, ("the {}", "the {}", "{}", "where is the {}")).format(noun)
        return self._found(text, NAME, found[0])

    def _attribute(self, kind: str) -> Question | None:
        """By colour or material, where the kind alone would not do, or `the red thing` where only one is red."""
        found = self._of_kind(kind)
        if not found:
            return None
        target = pick(self.rng, found)
        thing = self.things[target]
        phrases = []
        if sum(self.things[other].colour == thing.colour for other in found) == 1:
            phrases += [f"the {thing.colour} {kind}"] * 3
        if sum(other.colour == thing.colour for other in self.things) == 1:
            phrases.append(f"the {thing.colour} {pick(self.rng, ('thing', 'object'))}")
        alone = sum(self.things[other].material == thing.material for other in found) == 1
        if alone and len({material for _, material in KINDS[kind].looks}) > 1:
            phrases.append(f"the {material_word(thing.material)} {kind}")
        return self._found(pick(self.rng, phrases), ATTRIBUTE, target) if phrases else None

    def _relation(self, kind: str) -> Question | None:
        return self._by_relation(RELATIONS, kind, noun=kind, query_kind=RELATION)

    def _by_relation(self, relations: Sequence[str], kind: str, noun: str, query_kind: str) -> Question | None:
        """`noun` stands for the object in the question: its kind, or a function for compositional questions."""
        for relation in shuffled(self.rng, relations):
            if not self._may_relate(kind, relation):
                continue
            if relation in SIDES:
                question = self._beside(relation, kind, noun, query_kind)
            elif relation == "nearest":
                question = self._nearest(kind)
            else:
                question = self._extreme(relation, kind, noun, query_kind)
            if question is not None:
                return question
        return None

    def _beside(self, relation: str, kind: str, noun: str, query_kind: str) -> Question | None:
        dx, dy = SIDES[relation]
        margin = CLEAR_SHARE * (self.size_hw[1] if dx else self.size_hw[0])
        for anchor in self._anchors(kind):
            ax, ay = self.things[anchor].centre_xy
            centres = {i: self.things[i].centre_xy for i in self._of_kind(kind)}
            offsets = {i: (x - ax) * dx + (y - ay) * dy for i, (x, y) in centres.items()}
            beyond = [i for i, offset in offsets.items() if offset > margin]
            if len(beyond) != 1 or any(abs(offset) <= margin for offset in offsets.values()):
                continue
            lead = f"{self._anchored(anchor)} {relation.capitalize()} it"
            text = f"{with_the(noun)} {relation} the {self.things[anchor].kind}"
            return self._found(text, query_kind, beyond[0], lead=lead, detail=relation)
        return None

    def _nearest(self, kind: str) -> Question | None:
        for anchor in self._anchors(kind):
            gaps = sorted((self._distance(anchor, i), i) for i in range(len(self.things)) if i != anchor)
            clear = len(gaps) == 1 or gaps[1][0] >= CLEAR_GAP_RATIO * gaps[0][0]
            if not clear or self.things[gaps[0][1]].kind != kind:
                continue
            wordings = ("the object nearest to the {}", "the thing closest to the {}", "what is next to the {}")
            text = pick(self.rng, wordings).format(self.things[anchor].kind)
            lead = f"{self._anchored(anchor)} Nearest to it"
            return self._found(text, RELATION, gaps[0][1], lead=lead, detail="nearest")
        return None

    def _extreme(self, relation: str, kind: str, noun: str, query_kind: str) -> Question | None:
        among = self._of_kind(kind)
        everything = query_kind == RELATION and self.rng.random() < 0.3
        if everything:
            among = list(range(len(self.things)))
        if len(among) < 2:
            return None
        target = self._clear_extreme(relation, among)
        if target is None or self.things[target].kind != kind:
            return None
        word = pick(self.rng, {"largest": ("largest", "biggest")}.get(relation, (relation,)))
        asked = "object" if everything else noun.removeprefix("the ")
        lead = f"The {relation} {'object' if everything else kind}"
        return self._found(f"the {word} {asked}", query_kind, target, lead=lead, detail=relation)

    def _clear_extreme(self, relation: str, among: Sequence[int]) -> int | None:
        """The object of `among` that is clearly ahead of the next, if one is."""
        sign = -1 if relation in ("largest", "rightmost") else 1
        sized = relation in ("largest", "smallest")
        things = self.things
        values = sorted((sign * (things[i].area_px if sized else things[i].centre_xy[0]), i) for i in among)
        first, second = values[0][0], values[1][0]
        if sized:
            smaller, larger = sorted((abs(first), abs(second)))
            clear = larger >= CLEAR_AREA_RATIO * smaller
        else:
            clear = second - first >= CLEAR_SHARE * self.size_hw[1]
        return values[0][1] if clear else None

    def _several(self, kind: str) -> Question | None:
        options = self._several_options(kind, self._of_kind(kind))
        if not options:
            return None
        text, members, group = pick(self.rng, options)
        ordered = tuple(sorted(members, key=lambda i: self.things[i].centre_xy[0]))
        listed = ", ".join(f"{article_name(self.things[i])} {self._where(i)}" for i in ordered)
        count = f"There are {len(ordered)} {group}: " if group else "There are "
        thinking = f"{count}{listed}."
        return Question(text=text, kind=SEVERAL, targets=ordered, thinking=thinking, detail=str(len(ordered)))

    def _several_options(self, kind: str, found: list[int]) -> list[tuple[str, list[int], str]]:
        """(text, objects, what they have in common), the likelier ones twice."""
        options: list[tuple[str, list[int], str]] = []
        if 2 <= len(found) <= MAX_SEVERAL:
            plural = KINDS[kind].plural
            wordings = (f"all {plural}", f"the {plural}", f"every {kind}", f"the {count_word(len(found))} {plural}")
            options += [(pick(self.rng, wordings), found, plural)] * 2
        colour = self.things[found[0]].colour if found else ""
        coloured = [i for i, thing in enumerate(self.things) if thing.colour == colour]
        if 2 <= len(coloured) <= MAX_SEVERAL:
            text = pick(self.rng, (f"all {colour} things", f"every {colour} object", f"the {colour} objects"))
            options.append((text, coloured, f"{colour} things"))
        singles = self._anchors(kind, in_order=True)
        if len(found) == 1 and singles:
            partner = pick(self.rng, singles)
            options.append((f"the {kind} and the {self.things[partner].kind}", [found[0], partner], ""))
        return options

    def _missing_look(self) -> Question | None:
        """A kind that lies there in a colour in which it does not; None where it has all colours it comes in."""
        kind = pick(self.rng, self.things).kind
        taken = {other.colour for other in self.things if other.kind == kind}
        colours = sorted({colour for colour, _ in allowed_looks(kind, self.split)} - taken)
        if not colours:
            return None
        look = f"{pick(self.rng, colours)} {kind}"
        return _nothing(f"the {look}", look, "colour")

    # -- the kinds left to reinforcement -------------------------------------------------------------------------------

    def _function(self, kind: str) -> Question | None:
        found = self._of_kind(kind)
        if len(found) != 1:
            return None
        use, wording = self._use(kind)
        text = FUNCTION_WORDINGS[wording].format(use=use)
        return self._found(text, FUNCTION, found[0], lead=f"{made_to(kind, use)} There", detail=use)

    def _consequence(self, kind: str) -> Question | None:
        found = self._of_kind(kind)
        if len(found) != 1:
            return None
        known = KNOWLEDGE[kind]
        held_out = self.split == "ood_wording"
        said = known.held_out_consequence if held_out else pick(self.rng, known.consequences)
        lead = f"{said.capitalize()}, so {helpful(kind)}. It"
        return self._found(f"{said}, what helps", CONSEQUENCE, found[0], lead=lead, detail=said)

    def _compositional(self, kind: str) -> Question | None:
        use, _ = self._use(kind)
        return self._by_relation((*SIDES, *EXTREMES), kind, noun=f"the thing to {use}", query_kind=COMPOSITIONAL)

    def _use(self, kind: str) -> tuple[str, int]:
        """(use, wording) as the split allows."""
        known = KNOWLEDGE[kind]
        if self.split == "ood_function":
            return known.held_out_use, int(self.rng.integers(len(FUNCTION_WORDINGS)))
        if self.split == "ood_wording":
            return pick(self.rng, known.uses), known.held_out_wording
        return pick(self.rng, taught_uses(kind))

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _found(self, text: str, query_kind: str, target: int, *, lead: str = "There", detail: str = "") -> Question:
        thinking = f"{lead} {be(lead)} {article_name(self.things[target])} {self._where(target)}."
        return Question(text=text, kind=query_kind, targets=(target,), thinking=thinking, detail=detail)

    def _of_kind(self, kind: str) -> list[int]:
        return [i for i, thing in enumerate(self.things) if thing.kind == kind]

    def _distance(self, one: int, other: int) -> float:
        """Between centres, in source proportions whatever shape the coordinate system was squeezed to."""
        (ax, ay), (bx, by) = self.things[one].centre_xy, self.things[other].centre_xy
        across, down = (ax - bx) / self.size_hw[1], (ay - by) / self.size_hw[0]
        return float(np.hypot(across * DEFAULT_SIZE_HW[1], down * DEFAULT_SIZE_HW[0]))

    def _may_relate(self, kind: str, relation: str) -> bool:
        """Each kind keeps one relation for the split `ood_relation`, which asks nothing else of it."""
        return (HELD_OUT_RELATION[kind] == relation) == (self.split == "ood_relation")

    def _anchors(self, kind: str, *, in_order: bool = False) -> list[int]:
        """Objects that `the …` names beyond doubt, of another kind than `kind`; in random order."""
        order = range(len(self.things))
        kinds = [thing.kind for thing in self.things]
        return [
            i
            for i in (order if in_order else shuffled(self.rng, order))
            if kinds[i] != kind and kinds.count(kinds[i]) == 1
        ]

    def _anchored(self, anchor: int) -> str:
        kind = self.things[anchor].kind
        return f"The {kind} {be(kind)} {self._where(anchor)}."

    def _where(self, index: int) -> str:
        return where(self.things[index].centre_xy, self.size_hw)


def _nothing(text: str, missing: str, detail: str) -> Question:
    thinking = f"There {be(missing)} no {missing}."
    return Question(text=text, kind=NONE, targets=(), thinking=thinking, detail=detail)
